"""What the NBD server machine hands out: receive buffers and batches of requests in columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..records import NamedTuple

_SLOTS_LIMIT = 256


class ReceiveBuffer:
    """Bytes from one socket.  ``users`` counts the batches whose payloads lie in it; the machine
    never writes over those.  ``freed`` is called when the last of them was released."""

    __slots__ = ("_length", "_slots", "data", "freed", "size", "users", "view")

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.view = memoryview(self.data)
        self.size = size
        self.users = 0
        self.freed: Callable[[], None] | None = None
        self._length = -1
        self._slots: list[memoryview] = []

    def payloads(self, head: int, length: int, count: int) -> list[memoryview]:
        """Views of the first ``count`` payloads of ``length`` bytes when writes of that size, with
        headers of ``head`` bytes (always the same), fill the buffer from its start; kept, because
        a client repeats its size."""
        if length != self._length:
            stride = head + length
            self._length = length
            self._slots = [
                self.view[at + head : at + stride]
                for at in range(0, self.size - stride + 1, stride)[:_SLOTS_LIMIT]
            ]
        return self._slots[:count]


class Other(NamedTuple):
    """A request that is neither read nor write (``length`` bytes at ``offset``).  ``chosen`` are
    the numbers of the contexts that it is about; empty: all."""

    command: int
    flags: int
    cookie: bytes
    offset: int
    length: int
    chosen: tuple[int, ...] = ()


class Refusal(NamedTuple):
    """A request that is answered without being carried out; ``errno`` 0 says it succeeded."""

    command: int
    cookie: bytes
    errno: int
    offset: int = 0


class Batch:
    """All whole requests that one call of the machine found, sorted by kind.

    Their order among each other is not kept: a client may not rely on the order of requests
    that were not answered.  Within the columns it is, so of two overlapping writes the later
    wins.  All ranges lie within the export and no read or write is longer than 32 MiB.
    """

    # Defaults of the class: most batches hold one kind, and an assignment saved is a tenth of a
    # microsecond for a client that sends one request at a time.
    read_cookies: Sequence[bytes] = ()
    read_offsets: Sequence[int] = ()
    read_lengths: Sequence[int] = ()
    write_cookies: Sequence[bytes] = ()
    write_offsets: Sequence[int] = ()
    payloads: Sequence[memoryview] = ()
    fua = False
    """Some write of the batch must be durable before it is answered."""
    others: Sequence[Other] = ()
    refusals: Sequence[Refusal] = ()
    buffer: ReceiveBuffer | None = None
    """Where the payloads lie; :meth:`release` gives it back."""

    def add_reads(
        self, cookies: Sequence[bytes], offsets: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Append to the read columns; the first ones are kept as they are."""
        if not self.read_cookies:
            self.read_cookies, self.read_offsets, self.read_lengths = cookies, offsets, lengths
            return
        if not isinstance(self.read_cookies, list):
            self.read_cookies = list(self.read_cookies)
            self.read_offsets = list(self.read_offsets)
            self.read_lengths = list(self.read_lengths)
        self.read_cookies.extend(cookies)
        self.read_offsets.extend(offsets)  # type: ignore[attr-defined]
        self.read_lengths.extend(lengths)  # type: ignore[attr-defined]

    def add_writes(
        self,
        buffer: ReceiveBuffer,
        cookies: Sequence[bytes],
        offsets: Sequence[int],
        payloads: Sequence[memoryview],
    ) -> None:
        """Append to the write columns and hold the buffer."""
        if self.buffer is None:
            self.buffer = buffer
            buffer.users += 1
            self.write_cookies, self.write_offsets, self.payloads = cookies, offsets, payloads
            return
        if not isinstance(self.write_cookies, list):
            self.write_cookies = list(self.write_cookies)
            self.write_offsets = list(self.write_offsets)
            self.payloads = list(self.payloads)
        self.write_cookies.extend(cookies)
        self.write_offsets.extend(offsets)  # type: ignore[attr-defined]
        self.payloads.extend(payloads)  # type: ignore[attr-defined]

    def add_other(self, other: Other) -> None:
        """Append what is neither read nor write."""
        if not isinstance(self.others, list):
            self.others = []
        self.others.append(other)

    def refuse(self, refusal: Refusal) -> None:
        """Append an answer."""
        if not isinstance(self.refusals, list):
            self.refusals = []
        self.refusals.append(refusal)

    def release(self) -> None:
        """The payloads are not needed any more."""
        if self.buffer is not None:
            self.payloads = ()
            buffer, self.buffer = self.buffer, None
            buffer.users -= 1
            if not buffer.users and buffer.freed is not None:
                buffer.freed()
