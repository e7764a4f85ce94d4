"""``python -m diskwright.testing [-v] [WORD ...]``: the conformance suite on what is installed.

Only checks whose name holds one of the words are run, if there are any.  Exit status 1 when one
fails.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from ..engine.futures import BaseDriver
from .conformance import CHECKS, Check, Subject, Unavailable, run_check
from .subjects import RUNNERS, portable_mode, subjects


def main(arguments: list[str]) -> int:
    verbose = "-v" in arguments
    words = [word for word in arguments if word != "-v"]
    passed = failed = skipped = 0
    started = time.monotonic()
    for subject in subjects():
        for kernel, run in RUNNERS.items():
            for check in CHECKS:
                name = f"{subject.name}: {check.__name__} ({kernel})"
                if words and not any(word in name for word in words):
                    continue
                with portable_mode(subject.portable), tempfile.TemporaryDirectory() as folder:
                    try:
                        run(partial(_one, check, subject, Path(folder)))
                    except Unavailable as why:
                        skipped += 1
                        if verbose:
                            print(f"skipped {name}: {why}")
                    except Exception:
                        failed += 1
                        print(f"FAILED {name}")
                        traceback.print_exc(file=sys.stdout)
                    else:
                        passed += 1
                        if verbose:
                            print(f"passed {name}")
    if skipped:
        print(f"{skipped} cannot be run on this machine (-v tells why)")
    print(f"{passed} passed, {failed} failed in {time.monotonic() - started:.1f} s")
    return 1 if failed else 0


def _one(
    check: Check, subject: Subject, folder: Path, driver: BaseDriver
) -> Coroutine[Any, Any, None]:
    return run_check(check, driver, subject, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
