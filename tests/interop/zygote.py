"""Runs our commands one after the other without the time that starting takes: a child for each."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import sys
from typing import Any


def dirty(words: list[str]) -> str:
    """The dirty ranges of all bitmaps of the image that JSON describes, with secrets if any."""
    import diskwright

    described, secrets = json.loads(words[0]), json.loads(words[1])
    with diskwright.open(described, secrets=secrets or None, policy="trusted") as disk:
        found = {}
        for bitmap in disk.bitmaps.list():
            told = [bitmap.granularity, bitmap.enabled, bitmap.inconsistent]
            ranges = None if bitmap.inconsistent else disk.bitmaps.dirty(bitmap.name)
            found[bitmap.name] = [*told, ranges]
    return json.dumps(found)


def work(job: dict[str, Any]) -> int:
    """In the child: what is printed goes to the file that the job names."""
    from diskwright.cli.main import main

    out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(out, number)
    sys.stdin = open(os.devnull)
    os.chdir(job["folder"])
    words = job["words"]
    if words[0] == "dirty":
        os.write(1, dirty(words[1:]).encode())
        return 0
    status = main("diskwright", words)
    sys.stdout.flush()
    return status


def serve() -> None:
    """A JSON object a line in, an exit status a line out."""
    for room in ("cli", "codecs", "engine", "formats", "graph", "ops", "protocols"):
        package = importlib.import_module(f"diskwright.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # Some are of other systems, or over what is not installed.
            with contextlib.suppress(ImportError, AssertionError):
                importlib.import_module(module.name)

    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            status = 99
            try:
                status = work(json.loads(line))
            except BaseException:
                import traceback

                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        _, waited = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(waited)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
