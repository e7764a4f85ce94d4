"""The NBD server as a machine without I/O: bytes in, one batch of requests out.

The transport receives into :meth:`NbdServer.space`, tells :meth:`NbdServer.received` how much
came, sends :meth:`NbdServer.take`, and closes once ``closed`` is set.  Replies are built by
:mod:`.nbd_reply`.  Source: NetworkBlockDevice/nbd, doc/proto.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from . import nbd_const as c
from .nbd_batch import Batch, Other, ReceiveBuffer, Refusal
from .nbd_frames import COMPACT, EXTENDED, UNMARKED, Frames
from .nbd_handshake import Export, Handshake

BUFFER_SIZE = 256 << 10
"""Receive buffer in bytes: a little more than a full unix socket holds."""
_SPARE = 64 << 10  # beside a large payload, so that the next headers come with it
_RUN = 256  # longest run of equal requests that one Struct decodes

_FLAGS = {  # FUA must be accepted with every command
    c.CMD_READ: c.CMD_FLAG_FUA | c.CMD_FLAG_DF,
    c.CMD_WRITE: c.CMD_FLAG_FUA,
    c.CMD_DISC: 0xFFFF,
    c.CMD_FLUSH: c.CMD_FLAG_FUA,
    c.CMD_TRIM: c.CMD_FLAG_FUA,
    c.CMD_CACHE: c.CMD_FLAG_FUA,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_FUA | c.CMD_FLAG_REQ_ONE,
}
_CHANGES = frozenset((c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES))


class NbdServer:
    """One connection.

    ``closed`` tells why the connection ends (after what :meth:`take` gives was sent and the
    batches before were answered); ``clean`` that the client asked for it.  ``export`` is what
    the client chose, once it has.  ``secure``: clients must begin TLS first, see ``upgrade``.
    """

    def __init__(
        self,
        exports: Mapping[bytes, Export],
        buffer: ReceiveBuffer | None = None,
        secure: bool = False,
    ) -> None:
        self.handshake: Handshake | None = Handshake(exports, secure)
        self.buffer = buffer or ReceiveBuffer(BUFFER_SIZE)
        self.closed = ""
        self.clean = False
        self.export: Export | None = None
        self.mode = c.SIMPLE
        """The form of replies, and whether requests are extended."""
        self.contexts: Mapping[int, bytes] = {}
        """The metadata contexts that were selected, by their numbers."""
        self.wanted = 0
        """Bytes that the buffer must hold when :meth:`space` returns None."""
        self._start = self._end = 0
        self._message = 0  # length of the message that has begun, when it is a large one
        self._skip = 0
        self._skipped: Refusal | None = None
        self._mixed = False
        self._size = 0
        self._read_only = False
        self._frames: Frames = COMPACT

    # -- the transport's side
    def take(self) -> list[bytes]:
        """Handshake replies to send now."""
        if self.handshake is None:
            return []
        out, self.handshake.out = self.handshake.out, []
        if self.export is not None:
            self.handshake = None
        return out

    @property
    def upgrade(self) -> bool:
        """When :meth:`take` was sent the connection must become a TLS one, before anything else is
        received; then :meth:`secured` is called."""
        return self.handshake is not None and self.handshake.upgrade

    def secured(self) -> None:
        """The connection is a TLS one now."""
        if self.handshake is not None:
            self.handshake.secured()

    def space(self) -> memoryview | None:
        """Where to receive next, never empty; None: :meth:`replace` the buffer first."""
        buffer, start, end = self.buffer, self._start, self._end
        if not buffer.users:
            if start:  # what is left goes to the front
                if end > start:
                    buffer.view[: end - start] = buffer.view[start:end]
                self._start, self._end = 0, end - start
                start, end = 0, end - start
            if self._message <= buffer.size:
                return buffer.view[end:] if end else buffer.view
        elif buffer.size - end >= 4096 and start + self._message <= buffer.size:
            return buffer.view[end:]
        need = max(self._message + _SPARE if self._message > BUFFER_SIZE else 0, BUFFER_SIZE)
        self.wanted = need
        return None

    def replace(self, buffer: ReceiveBuffer) -> ReceiveBuffer:
        """Go on in ``buffer`` (of at least ``wanted`` bytes); returns the old one, which batches
        may still use."""
        old, left = self.buffer, self._end - self._start
        buffer.view[:left] = old.view[self._start : self._end]
        self.buffer, self._start, self._end, self.wanted = buffer, 0, left, 0
        return old

    @property
    def left(self) -> int:
        """Bytes in the buffer that are no whole message yet."""
        return self._end - self._start

    @property
    def idle(self) -> bool:
        """No part of a message is waiting for its rest."""
        return self._start == self._end and not self._skip

    def received(self, count: int) -> Batch | None:
        """``count`` bytes were put into :meth:`space`.  Returns the requests that are whole now."""
        self._end += count
        if self.export is None and not self._negotiate():
            return None
        return self._parse()

    # -- handshake
    def _negotiate(self) -> bool:
        handshake = self.handshake
        if handshake is None:
            return False
        self._start = handshake.parse(self.buffer.view, self._start, self._end)
        if handshake.closed:
            self.closed = handshake.closed
            self.clean = handshake.closed.startswith("aborted")
        if handshake.export is None:
            return False
        self._begin(handshake.export, handshake.mode, handshake.contexts)
        return True

    def begin(self, export: Export, mode: int, contexts: Mapping[int, bytes]) -> None:
        """The handshake was carried out elsewhere, and this was agreed on."""
        self.handshake = None
        self._begin(export, mode, contexts)

    def _begin(self, export: Export, mode: int, contexts: Mapping[int, bytes]) -> None:
        self.export, self.mode, self.contexts = export, mode, contexts
        if self.mode == c.EXTENDED:
            self._frames = EXTENDED
        self._size, self._read_only = export.size, export.read_only

    # -- transmission
    def _parse(self) -> Batch | None:
        view, start, end = self.buffer.view, self._start, self._end
        batch = Batch()
        mixed = self._mixed
        frames = self._frames
        size, unpack = frames.size, frames.unpack
        plain_read, plain_write = frames.read, frames.write
        self._message = 0
        while not self.closed:
            if self._skip:
                skipped = min(self._skip, end - start)
                self._skip -= skipped
                start += skipped
                if self._skip:
                    break
                if self._skipped is not None:
                    batch.refuse(self._skipped)
                    self._skipped = None
            left = end - start
            if left < size:
                break
            head, cookie, offset, length = unpack(view, start)
            if head == plain_read:
                if left >= 2 * size and not mixed:
                    taken = self._take_reads(batch, start, min(left // size, _RUN))
                    if taken:
                        start += taken * size
                        continue
                    mixed = self._mixed = True
                if 0 < length <= c.MAX_PAYLOAD and offset + length <= self._size:
                    batch.add_reads((cookie,), (offset,), (length,))
                    start += size
                    continue
            elif head == plain_write:
                stride = size + length
                if (
                    0 < length <= c.MAX_PAYLOAD
                    and offset + length <= self._size
                    and not self._read_only
                ):
                    if left < stride:
                        self._message = stride
                        break
                    if left >= 2 * stride and not mixed:
                        taken = self._take_writes(batch, start, length, min(left // stride, _RUN))
                        if taken:
                            start += taken * stride
                            continue
                        mixed = self._mixed = True
                    payload = view[start + size : start + stride]
                    batch.add_writes(self.buffer, (cookie,), (offset,), (payload,))
                    start += stride
                    continue
            if head >> 32 != frames.magic:
                self.closed = "bad request magic"
                break
            used = self._general(batch, head, cookie, offset, length, start, left)
            if used < 0:
                break
            start += used
        self._start = start
        if batch.read_cookies:
            if mixed and not batch.write_cookies:
                self._mixed = False
            return batch
        if batch.write_cookies:
            if mixed:
                self._mixed = False
            return batch
        return batch if batch.others or batch.refusals else None

    def _take_reads(self, batch: Batch, start: int, count: int) -> int:
        """Decode ``count`` rows at once; how many were taken (0: they are not all plain reads)."""
        rows = self._frames.reads(count).unpack_from(self.buffer.data, start)
        if rows[0::4].count(self._frames.read) != count:
            return 0
        offsets, lengths = rows[2::4], rows[3::4]
        longest = max(lengths)
        if (
            longest > c.MAX_PAYLOAD
            or min(lengths) == 0
            or (
                max(offsets) + longest > self._size
                and any(o + n > self._size for o, n in zip(offsets, lengths, strict=True))
            )
        ):
            return 0
        batch.add_reads(rows[1::4], offsets, lengths)
        return count

    def _take_writes(self, batch: Batch, start: int, length: int, count: int) -> int:
        """The same for plain writes of one length."""
        frames = self._frames
        rows = frames.writes(length, count).unpack_from(self.buffer.data, start)
        if rows[0::4].count(frames.write) != count or rows[3::4].count(length) != count:
            return 0
        offsets = rows[2::4]
        if max(offsets) + length > self._size:
            return 0
        buffer = self.buffer
        if start == 0:
            payloads = buffer.payloads(frames.size, length, count)
        else:
            size = frames.size
            stride = size + length
            view = buffer.view
            payloads = [
                view[at + size : at + stride]
                for at in range(start, start + count * stride, stride)
            ]
        batch.add_writes(buffer, rows[1::4], offsets, payloads)
        return count

    def _general(
        self,
        batch: Batch,
        head: int,
        cookie: bytes,
        offset: int,
        length: int,
        start: int,
        left: int,
    ) -> int:
        """Any one request; returns the bytes used, -1 when the rest of it must come first."""
        size = self._frames.size
        flags, command = head >> 16 & 0xFFFF, head & 0xFFFF
        if command == c.CMD_DISC:
            self.closed, self.clean = "disconnected by the client", True
            return size
        extended = self.mode == c.EXTENDED
        marked = extended and bool(flags & c.CMD_FLAG_PAYLOAD_LEN)
        loaded = marked or command == c.CMD_WRITE
        if extended and loaded:
            if length > c.MAX_PAYLOAD:
                self.closed = "a payload longer than allowed"
                return size
            if not marked:
                self._frames = UNMARKED  # what is plain for this client
        choosing = marked and command == c.CMD_BLOCK_STATUS
        if choosing:
            error = None if 12 <= length <= 8 + 4 * len(self.contexts) else c.EINVAL
        else:
            error = self._judge(command, flags, offset, length)
        if loaded:
            stride = size + length
            if error is not None and not length:
                batch.refuse(Refusal(command, cookie, error, offset))
                return size
            if error is not None:  # answered when its payload has gone by
                self._skip = length
                self._skipped = Refusal(command, cookie, error, offset)
                return size
            if left < stride:
                self._message = stride
                return -1
            payload = self.buffer.view[start + size : start + stride]
            if choosing:
                self._choose(batch, flags, cookie, offset, bytes(payload))
                return stride
            batch.add_writes(self.buffer, (cookie,), (offset,), (payload,))
            batch.fua = batch.fua or bool(flags & c.CMD_FLAG_FUA)
            return stride
        if error is not None:
            batch.refuse(Refusal(command, cookie, error, offset))
        elif command == c.CMD_READ:
            batch.add_reads((cookie,), (offset,), (length,))
        else:
            batch.add_other(Other(command, flags, cookie, offset, length))
        return size

    def _choose(
        self, batch: Batch, flags: int, cookie: bytes, offset: int, payload: bytes
    ) -> None:
        """A request for the block status of some of the contexts."""
        length, numbers = int.from_bytes(payload[:8], "big"), payload[8:]
        chosen = tuple(
            int.from_bytes(numbers[at : at + 4], "big") for at in range(0, len(numbers), 4)
        )
        flags &= ~c.CMD_FLAG_PAYLOAD_LEN
        error = self._judge(c.CMD_BLOCK_STATUS, flags, offset, length)
        known = {*chosen} <= self.contexts.keys() and len({*chosen}) == len(chosen)
        if len(numbers) % 4 or not known:
            error = c.EINVAL
        if error is not None:
            batch.refuse(Refusal(c.CMD_BLOCK_STATUS, cookie, error, offset))
        else:
            batch.add_other(Other(c.CMD_BLOCK_STATUS, flags, cookie, offset, length, chosen))

    def _judge(self, command: int, flags: int, offset: int, length: int) -> int | None:
        """None: carry it out.  Otherwise the answer (0: nothing to do)."""
        allowed = _FLAGS.get(command)
        if allowed is None:
            return c.EINVAL
        if self.mode == c.EXTENDED and command == c.CMD_WRITE:
            flags &= ~c.CMD_FLAG_PAYLOAD_LEN
        if flags & ~allowed:
            return c.EINVAL
        if flags & c.CMD_FLAG_DF and not self.mode:
            return c.EINVAL
        if command == c.CMD_FLUSH:
            return None
        if command in _CHANGES and self._read_only:
            return c.EPERM
        if command in (c.CMD_READ, c.CMD_WRITE) and length > c.MAX_PAYLOAD:
            return c.EINVAL
        if offset + length > self._size:
            writes = command in (c.CMD_WRITE, c.CMD_WRITE_ZEROES)
            return c.ENOSPC if writes else c.EINVAL
        if command == c.CMD_BLOCK_STATUS and not (self.contexts and length):
            return c.EINVAL
        return None if length else 0
