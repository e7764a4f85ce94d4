"""The long mode: ``python -m fuzz`` (`make fuzz`).

Each target in a process of its own, as many at once as ``FUZZ_JOBS`` says (default: one for each
processor): ``FUZZ_TARGETS`` (default: all), ``FUZZ_RUNS`` executions each (default: a million), in
``FUZZ_FOLDER`` (default: .fuzz), whose corpora the next run goes on from.  Tells executions, speed,
memory, what went wrong, and the line coverage of `formats/`.  Exit status 1 when anything went
wrong.
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
_COLUMNS = "{:<8} {:>10} {:>7} {:>7} {:>7} {:>9} {:>6}"


def main() -> int:
    runs = int(os.environ.get("FUZZ_RUNS") or 1_000_000)
    names = (os.environ.get("FUZZ_TARGETS") or " ".join(TARGETS)).split()
    folder = Path(os.environ.get("FUZZ_FOLDER") or ROOT / ".fuzz").absolute()
    jobs = int(os.environ.get("FUZZ_JOBS") or os.cpu_count() or 1)
    wrong = False
    lines: dict[str, set[int]] = {}
    print(_COLUMNS.format("target", "executions", "per s", "opened", "corpus", "peak MiB", "wrong"))
    with ThreadPoolExecutor(jobs) as pool:
        for name, result in pool.map(lambda name: (name, one(name, runs, folder / name)), names):
            if result is None:
                print(f"{name:<8} ended early: see {folder / name}/log")
                wrong = True
                continue
            wrong |= bool(result["found"])
            count = result["executions"]
            print(
                _COLUMNS.format(
                    name, count, round(count / max(result["seconds"], 0.01)),
                    f"{100 * result['opened'] // count}%",
                    len(list((folder / name / "corpus").iterdir())), result["peak"],
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


def one(name: str, runs: int, folder: Path) -> dict[str, Any] | None:
    """The result of one target; None when it died."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    with (folder / "log").open("w") as log:
        words = [sys.executable, "-m", "fuzz.guided", name, str(runs), str(folder)]
        subprocess.run(words, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    except OSError:
        return None
    return found


def report(lines: dict[str, set[int]]) -> None:
    """The line coverage of each file of `formats/`."""
    print("\nlines of formats/ that were reached")
    all_reached = all_lines = 0
    for path in sorted(FORMATS.rglob("*.py")):
        code = set(executable(compile(path.read_text(), str(path), "exec")))
        reached = len(code & lines.get(str(path), set()))
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
