"""What a file is, told from its bytes: format, what else it could be taken for, what it names, and
what is wrong with it.  Nothing that it names is opened, and no policy matters."""

from __future__ import annotations

import io
import os
from typing import IO, Any

from ..engine.budget import Budget, current
from ..engine.kernel import BaseDriver
from .inspecting.inspector import Inspector, judge
from .inspecting.result import VERDICTS, Inspection
from .inspecting.window import FileWindow

__all__ = ["VERDICTS", "Inspection", "Inspector", "inspect", "judge"]

_CHUNK = 1 << 20

File = str | bytes | os.PathLike[str] | os.PathLike[bytes] | IO[bytes]


async def inspect(driver: BaseDriver, source: File) -> Inspection:
    """Inspect a file by its path, or a binary file object: one that can seek is read where it has
    to be, any other from here to its end.

    No lock is taken: of an image that is written to meanwhile the result may be of no state that it
    ever had.  Raises OSError, and OverBudget.
    """
    budget = current() or Budget()
    return await driver.call(_inspect, source, budget)


def _inspect(source: File, budget: Budget) -> Inspection:
    if isinstance(source, str | bytes | os.PathLike):
        with open(source, "rb", buffering=0) as file:
            return _of_file(file, os.fsdecode(source), budget)
    name = getattr(source, "name", None)
    return _of_file(source, name if isinstance(name, str) else "-", budget)


def _of_file(file: Any, name: str, budget: Budget) -> Inspection:
    if file.seekable():
        length = file.seek(0, io.SEEK_END)

        def read(offset: int, wanted: int) -> bytes:
            file.seek(offset)
            parts = []
            while wanted and (part := file.read(wanted)):
                parts.append(part)
                wanted -= len(part)
            return b"".join(parts)

        return judge(FileWindow(length, read), name, budget)
    inspector = Inspector(budget)
    while part := file.read(_CHUNK):
        inspector.feed(part)
    return inspector.finish(name)
