"""The long mode: ``python -m fuzz`` (`make fuzz`).

Each target in a process of its own, as many at once as ``FUZZ_JOBS`` says (default: one for each
processor): ``FUZZ_TARGETS`` (default: all), ``FUZZ_RUNS`` executions each (default: a million), in
``FUZZ_FOLDER`` (default: .fuzz).  A run that was ended early is gone on with by the next one; when
there is nothing left to do, the corpora are executed once more.  Tells executions and seconds of
processor time of all runs in the folder, the share that got behind opening, the peak of memory,
what goes wrong, and the line coverage of `formats/`.  Exit status 1 when anything goes wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType
from typing import Any

from fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ROOT / "src" / "diskwright" / "formats"
_COLUMNS = "{:<8} {:>10} {:>7} {:>7} {:>7} {:>7} {:>9} {:>6}"


def main() -> int:
    runs = int(os.environ.get("FUZZ_RUNS") or 1_000_000)
    names = (os.environ.get("FUZZ_TARGETS") or " ".join(TARGETS)).split()
    folder = Path(os.environ.get("FUZZ_FOLDER") or ROOT / ".fuzz").absolute()
    jobs = int(os.environ.get("FUZZ_JOBS") or os.cpu_count() or 1)
    wrong = False
    lines: dict[str, set[int]] = {}
    titles = "target", "executions", "CPU s", "per s", "opened", "corpus", "peak MiB", "wrong"
    print(_COLUMNS.format(*titles))
    with ThreadPoolExecutor(jobs) as pool:
        for name, result in pool.map(lambda name: (name, one(name, runs, folder / name)), names):
            if "died" in result:
                print(f"{name:<8} {result['died']}: see {folder / name}/log")
            wrong |= bool(result["found"] or "died" in result)
            count, seconds = result["executions"], result["seconds"]
            print(
                _COLUMNS.format(
                    name, count, round(seconds), round(count / max(seconds, 0.01)),
                    f"{100 * result['opened'] // max(count, 1)}%",
                    len(list((folder / name / "corpus").glob("*"))), result["peak"],
                    len(result["found"]),
                ),
                flush=True,
            )  # fmt: skip
            for place, input in result["found"].items():
                print(f"    {place}: {folder / name}/found/{input}.txt")
            for file, reached in result["lines"].items():
                lines.setdefault(file, set()).update(reached)
    if lines:
        report(lines)
    return int(wrong)


def one(name: str, runs: int, folder: Path) -> dict[str, Any]:
    """The result of one target."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    with (folder / "log").open("w") as log:
        words = [sys.executable, "-m", "fuzz.guided", name, str(runs), str(folder)]
        ended = subprocess.run(words, cwd=folder, env=environment, stdout=log, stderr=log)
    found: dict[str, Any] = {"executions": 0, "opened": 0, "seconds": 0, "peak": 0, "found": {},
                             "lines": {}}  # fmt: skip
    if (folder / "result.json").exists():
        found |= json.loads((folder / "result.json").read_text())
    return found | ({"died": f"ended with {ended.returncode}"} if ended.returncode else {})


def report(lines: dict[str, set[int]]) -> None:
    """The line coverage of each file of `formats/`."""
    print("\nlines of formats/ that were reached")
    all_reached = all_lines = 0
    for path in sorted(FORMATS.rglob("*.py")):
        code = set(executable(compile(path.read_text(), str(path), "exec")))
        reached = len(code & lines.get(f"formats/{path.relative_to(FORMATS).as_posix()}", set()))
        all_reached += reached
        all_lines += len(code)
        if code:
            share = 100 * reached / len(code)
            print(f"{path.relative_to(FORMATS)!s:<40} {reached:>5} of {len(code):>5} {share:6.1f}%")
    print(f"{'all':<40} {all_reached:>5} of {all_lines:>5} {100 * all_reached / all_lines:6.1f}%")


def executable(code: CodeType) -> Iterator[int]:
    """The lines that have code, those of functions included."""
    yield from (line for _, _, line in code.co_lines() if line)
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from executable(value)


if __name__ == "__main__":
    sys.exit(main())
