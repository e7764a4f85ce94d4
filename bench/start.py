"""How long the shortest runs take: a bare interpreter, ``diskwright`` and ``qemu-img``, in turn.

Each round starts every program once, so that a slow minute of the machine hits all of them; a run
is compared with the bare interpreter of its own round.  Modules are compiled before, as installers
do it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SOURCE = Path(__file__).resolve().parents[1] / "src"
BARE = "python -c pass"
# What the script does that an installer makes of the entry point.
CONSOLE = (
    "import sys; sys.argv[0] = 'diskwright'; from diskwright.cli.main import console; console()"
)
VERBS = {
    "info of raw": ["info", "-f", "raw", "{raw}"],
    "info of qcow2": ["info", "{qcow2}"],
    "map of qcow2": ["map", "{qcow2}"],
    "check of qcow2": ["check", "{qcow2}"],
}
Run = tuple[float, float]  # seconds, seconds of processor time


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    return parser.parse_args()


def programs(folder: Path) -> dict[str, list[str]]:
    """What is started, by its row in the table."""
    images = {"raw": str(folder / "disk.raw"), "qcow2": str(folder / "disk.qcow2")}
    ours = [sys.executable, "-c", CONSOLE]
    for name, image in images.items():
        assert run([*ours, "create", "-q", "-f", name, image, "1G"], folder) is not None
    made = {BARE: [sys.executable, "-c", "pass"]}
    for what, words in VERBS.items():
        filled = [word.format(**images) for word in words]
        made[f"diskwright, {what}"] = [*ours, *filled]
        if shutil.which("qemu-img"):
            made[f"qemu-img, {what}"] = ["qemu-img", *filled]
    return made


def run(command: list[str], folder: Path) -> Run:
    """Start a program and wait for it."""
    environment = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
    environment |= {"PYTHONPATH": str(SOURCE), "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    before = time.perf_counter()
    child = os.posix_spawnp(
        command[0],
        command,
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    took = time.perf_counter() - before
    if status:
        raise SystemExit(f"{command} failed")
    return took, usage.ru_utime + usage.ru_stime


def measured(rounds: int) -> dict[str, list[Run]]:
    """All runs of each program; those of the first round, which compiles, do not count."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = programs(folder)
        found: dict[str, list[Run]] = {row: [] for row in made}
        for number in range(rounds + 1):
            for row, command in made.items():
                one = run(command, folder)
                if number:
                    found[row].append(one)
        return found


def render(found: dict[str, list[Run]]) -> str:
    """A table: milliseconds as median (minimum), and the median of the ratios to the bare one."""
    lines = [
        f"{len(found[BARE])} rounds, Python {platform.python_version()}, {os.cpu_count()} "
        f"processors, load {os.getloadavg()[0]:.1f}.",
        "",
        "| program | ms | of the bare interpreter | processor ms | of the bare interpreter |",
        "|---|---|---|---|---|",
    ]
    for row, runs in found.items():
        cells = [row]
        for column in (0, 1):
            mine, bare = ([1000 * one[column] for one in part] for part in (runs, found[BARE]))
            ratio = median(a / b for a, b in zip(mine, bare, strict=True))
            cells += [f"{median(mine):.1f} ({min(mine):.1f})", f"{ratio:.2f}×"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(render(measured(arguments().rounds)))
