"""``make bench``: the NBD server against qemu-nbd and nbdkit, with fio over a unix socket.

Every round runs every server on every workload once, so that a slow minute of the machine hits
all of them; medians over the rounds are compared, minimum and maximum stand beside.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import servers
from report import Key, render
from workloads import WORKLOADS, Images, Result, run


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each timed run")
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of each image")
    parser.add_argument("--only", default="", help="comma-separated workloads (%(prog)s --list)")
    parser.add_argument("--formats", default="raw,qcow2")
    parser.add_argument("--servers", default="", help="comma-separated parts of names")
    parser.add_argument("--directory", type=Path, default=Path(__file__).parent / ".images")
    parser.add_argument("--output", type=Path, help="write the table there as well")
    parser.add_argument("--json", type=Path, help="write every single result there")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Run everything and print the table."""
    options = arguments()
    if options.list:
        print("\n".join(f"{work.key:10} {work.title}" for work in WORKLOADS))
        return 0
    if shutil.which("fio") is None:
        print("fio is not installed: nothing was measured", file=sys.stderr)
        return 77
    keys = options.only.split(",") if options.only else [work.key for work in WORKLOADS]
    unknown = set(keys) - {work.key for work in WORKLOADS}
    if unknown:
        print(f"unknown workload: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    parts = options.servers.split(",") if options.servers else []
    names = [n for n in servers.ALL if not parts or any(part in n for part in parts)]
    images = Images(options.directory.resolve(), options.size)
    images.prepare()
    sock = images.directory / "nbd.sock"
    results: dict[Key, list[Result]] = {}
    started = time.time()
    for turn in range(options.rounds):
        for fmt in options.formats.split(","):
            for work in (w for w in WORKLOADS if w.key in keys):
                if work.image != "full" and fmt != "qcow2":
                    continue
                order = names[turn % len(names) :] + names[: turn % len(names)]
                for name in order:
                    if not servers.available(name, fmt):
                        continue
                    image = images.get(work, fmt)
                    with servers.Server(name, image, fmt, sock, images.size) as server:
                        result = run(server, work, images, options.seconds)
                    if "native" in name:  # it went around the page cache, and dropped it
                        images.warmed.clear()
                    results.setdefault((fmt, work.key, name), []).append(result)
                    print(
                        f"round {turn + 1} {fmt:5} {work.key:9} {name:18}"
                        f" {result.rate:9.0f}/s  p99 {result.p99_us:8.0f} µs"
                        f"  cpu {result.cpu_us:7.1f} µs",
                        file=sys.stderr,
                        flush=True,
                    )
    table = render(results, options.rounds, options.seconds, time.time() - started)
    print(table)
    if options.output:
        options.output.write_text(table)
    if options.json:
        rows = [[*key, [result._asdict() for result in runs]] for key, runs in results.items()]
        options.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
