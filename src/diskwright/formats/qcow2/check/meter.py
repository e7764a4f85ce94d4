"""How far a check or a repair is, in bytes of tables that were read."""

from __future__ import annotations

from ....contract import Procedure, Progress, Read
from ....findings import CheckResult


class Meter:
    """What all walks of one check or repair have read and still have to read."""

    def __init__(self) -> None:
        self.read = 0
        """Bytes."""
        self.total = 0
        """Bytes that will have been read at the end, as far as is known; it may grow."""
        self.passes = 0
        """How often the tables were gone through from the beginning."""

    def expect(self, left: int) -> None:
        """``left`` bytes are still to be read."""
        self.total = self.read + left

    def run(self, procedure: Procedure) -> Procedure:
        """Run ``procedure`` and count what it reads; its progress is told in bytes.  Returns its
        CheckResult, which says so."""
        result = None
        error: Exception | None = None
        while True:
            try:
                request = procedure.send(result) if error is None else procedure.throw(error)
            except StopIteration as stop:
                found: CheckResult = stop.value
                found.passes, found.bytes_read = self.passes, self.read
                return found
            if isinstance(request, Read):
                self.read += sum(length for _, length in request.ranges)
            elif isinstance(request, Progress):
                request = Progress(self.read, max(self.read, self.total))
            result = error = None
            try:
                result = yield request
            except Exception as caught:
                error = caught
