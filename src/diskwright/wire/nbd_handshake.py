"""The server's half of the NBD handshake (fixed newstyle): bytes in, bytes out.

It holds no buffer of its own: :meth:`Handshake.parse` consumes whole messages from the
machine's buffer and leaves a part of one where it is.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from ..records import NamedTuple
from . import nbd_const as c

_GREETING = struct.Struct(">QQH")
_CLIENT_FLAGS = struct.Struct(">I")
_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")

OPTION_LIMIT = 16 << 10
"""Longest option data in bytes that is looked at; longer ones are skipped and refused."""
OPTIONS_LIMIT = 16 << 10
"""Options of one client before it is dropped: who lists exports may ask for each of them."""
SAID_LIMIT = 16 << 20
"""Bytes of replies in one handshake, likewise."""


class Export(NamedTuple):
    """What a client may choose.  ``size`` in bytes; ``name`` as it is spoken on the wire."""

    name: bytes
    size: int
    read_only: bool = False
    description: bytes = b""
    min_block: int = 1
    """Smallest request that need not be rewritten as a larger one, in bytes."""
    preferred_block: int = 4096
    multi_conn: bool = True
    rotational: bool = False
    trim: bool = True
    contexts: tuple[bytes, ...] = (c.BASE_ALLOCATION,)
    """Metadata contexts that can be asked for.  Their numbers are their places, from 1 on."""

    def flags(self, mode: int, chosen: bool = False) -> int:
        """Transmission flags; DF exists only beside structured or extended replies, and with the
        latter a choice among the contexts, where some were selected (``chosen``)."""
        flags = c.HAS_FLAGS | c.SEND_FLUSH | c.SEND_FUA | c.SEND_CACHE
        if self.read_only:
            flags |= c.READ_ONLY
        else:
            flags |= c.SEND_WRITE_ZEROES | c.SEND_FAST_ZERO
            if self.trim:
                flags |= c.SEND_TRIM
        if self.rotational:
            flags |= c.ROTATIONAL
        if self.multi_conn:
            flags |= c.CAN_MULTI_CONN
        if mode:
            flags |= c.SEND_DF
        if mode == c.EXTENDED and chosen:
            flags |= c.BLOCK_STATUS_PAYLOAD
        return flags


class _Invalid(Exception):
    """Option data that breaks its own lengths."""


class Handshake:
    """One client's option haggling.

    ``out`` collects what must be sent.  ``export`` is set when transmission begins;
    ``closed`` says why the connection must be dropped (after ``out`` was sent).  ``exports``, by
    name, may change meanwhile.  ``secure``: nothing is said without TLS.
    """

    def __init__(self, exports: Mapping[bytes, Export], secure: bool = False) -> None:
        self.exports = exports
        self.upgrade = False
        """The connection must become a TLS one (after ``out`` was sent), then :meth:`secured`."""
        self.out: list[bytes] = [
            _GREETING.pack(c.INIT_MAGIC, c.OPTION_MAGIC, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
        ]
        self.export: Export | None = None
        self.mode = c.SIMPLE
        """The form of replies that was agreed on."""
        self.contexts: dict[int, bytes] = {}
        """The metadata contexts that were selected for the export, by their numbers."""
        self.closed = ""
        self.shutting_down = False
        self._flags: int | None = None
        self._options = self._said = 0
        self._skip = 0
        self._context_export: bytes | None = None
        self._secure = secure
        self._secured = False

    def secured(self) -> None:
        """The connection is a TLS one now: everything is agreed on anew."""
        self.upgrade, self._secured = False, True

    def parse(self, buffer: memoryview, start: int, end: int) -> int:
        """Consume whole messages of ``buffer[start:end]``; returns where the rest begins."""
        while not self.closed and self.export is None and not self.upgrade:
            if self._skip:
                skipped = min(self._skip, end - start)
                self._skip -= skipped
                start += skipped
                if self._skip:
                    break
            if self._flags is None:
                if end - start < 4:
                    break
                self._flags = _CLIENT_FLAGS.unpack_from(buffer, start)[0]
                start += 4
                if self._flags & ~(c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES):
                    self.closed = "unknown client flags"
                continue
            if end - start < _OPTION.size:
                break
            magic, option, length = _OPTION.unpack_from(buffer, start)
            if magic != c.OPTION_MAGIC:
                self.closed = "bad option magic"
                break
            if length <= OPTION_LIMIT and end - start < _OPTION.size + length:
                break
            start += _OPTION.size
            self._options += 1
            if self._options > OPTIONS_LIMIT or self._said > SAID_LIMIT:
                self.closed = "too many options"
                break
            if length > OPTION_LIMIT:
                if option == c.OPT_EXPORT_NAME:
                    self.closed = "export name too long"
                else:
                    in_clear = self._secure and not self._secured
                    self._reply(option, c.REP_ERR_TLS_REQD if in_clear else c.REP_ERR_TOO_BIG)
                    self._skip = length
                continue
            self._option(option, bytes(buffer[start : start + length]))
            start += length
        if self.upgrade and start < end:  # a stranger may have put them there
            self.closed = "bytes in the clear behind STARTTLS"
        return start

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.out.append(_REPLY.pack(c.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)
        self._said += _REPLY.size + len(data)

    def _option(self, option: int, data: bytes) -> None:
        if option == c.OPT_EXPORT_NAME:
            self._export_name(data)
        elif option == c.OPT_ABORT:
            self._reply(option, c.REP_ACK)
            self.closed = "aborted by the client"
        elif option == c.OPT_STARTTLS and self._secure:
            self._start_tls(data)
        elif self._secure and not self._secured:
            self._reply(option, c.REP_ERR_TLS_REQD)
        elif self.shutting_down:
            self._reply(option, c.REP_ERR_SHUTDOWN)
        elif option == c.OPT_LIST:
            if data:
                self._reply(option, c.REP_ERR_INVALID)
                return
            for export in self.exports.values():
                name = _U32.pack(len(export.name)) + export.name
                self._reply(option, c.REP_SERVER, name + export.description)
            self._reply(option, c.REP_ACK)
        elif option in (c.OPT_STRUCTURED_REPLY, c.OPT_EXTENDED_HEADERS):
            self._agree(option, data)
        elif option in (c.OPT_INFO, c.OPT_GO):
            self._info(option, data)
        elif option in (c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT):
            self._meta_context(option, data)
        else:
            self._reply(option, c.REP_ERR_UNSUP)

    def _start_tls(self, data: bytes) -> None:
        if data or self._secured:
            self._reply(c.OPT_STARTTLS, c.REP_ERR_INVALID)
            return
        self._reply(c.OPT_STARTTLS, c.REP_ACK)
        self.upgrade = True

    def _agree(self, option: int, data: bytes) -> None:
        """A form of replies; extended headers stand above structured replies."""
        if data:
            self._reply(option, c.REP_ERR_INVALID)
        elif option == c.OPT_EXTENDED_HEADERS:
            self.mode = c.EXTENDED
            self._reply(option, c.REP_ACK)
        elif self.mode == c.EXTENDED:
            self._reply(option, c.REP_ERR_EXT_HEADER_REQD)
        else:
            self.mode = c.STRUCTURED
            self._reply(option, c.REP_ACK)

    def _export_name(self, name: bytes) -> None:
        # This option has no way to refuse, and does not go with extended headers.
        if self.mode == c.EXTENDED or (self._secure and not self._secured):
            self.closed = "an option out of place"
            return
        export = self.exports.get(name)
        if export is None or self.shutting_down:
            self.closed = "no such export"
            return
        data = struct.pack(">QH", export.size, export.flags(self.mode))
        if not (self._flags or 0) & c.FLAG_NO_ZEROES:
            data += bytes(124)
        self.out.append(data)
        self._choose(export)

    def _choose(self, export: Export) -> None:
        if self._context_export != export.name:
            self.contexts = {}
        self.export = export

    def _info(self, option: int, data: bytes) -> None:
        try:
            name, at = _string(data, 0)
            if len(data) < at + 2:
                raise _Invalid
            count = _U16.unpack_from(data, at)[0]
            if len(data) != at + 2 + 2 * count:
                raise _Invalid
            wanted = set(struct.unpack_from(f">{count}H", data, at + 2))
        except _Invalid:
            self._reply(option, c.REP_ERR_INVALID)
            return
        export = self.exports.get(name)
        if export is None:
            self._reply(option, c.REP_ERR_UNKNOWN)
            return
        # Before GO it is told what there will be once contexts are selected.
        chosen = option == c.OPT_INFO or (bool(self.contexts) and self._context_export == name)
        if c.INFO_NAME in wanted:
            self._reply(option, c.REP_INFO, _U16.pack(c.INFO_NAME) + export.name)
        if c.INFO_DESCRIPTION in wanted and export.description:
            described = _U16.pack(c.INFO_DESCRIPTION) + export.description
            self._reply(option, c.REP_INFO, described)
        if c.INFO_BLOCK_SIZE in wanted:
            sizes = (c.INFO_BLOCK_SIZE, export.min_block, export.preferred_block, c.MAX_PAYLOAD)
            self._reply(option, c.REP_INFO, struct.pack(">HIII", *sizes))
        self._reply(
            option,
            c.REP_INFO,
            struct.pack(">HQH", c.INFO_EXPORT, export.size, export.flags(self.mode, chosen)),
        )
        self._reply(option, c.REP_ACK)
        if option == c.OPT_GO:
            self._choose(export)

    def _meta_context(self, option: int, data: bytes) -> None:
        setting = option == c.OPT_SET_META_CONTEXT
        if setting:  # even a failed one replaces what was selected before
            self.contexts, self._context_export = {}, None
        try:
            if not self.mode:
                raise _Invalid
            name, at = _string(data, 0)
            if len(data) < at + 4:
                raise _Invalid
            count = _U32.unpack_from(data, at)[0]
            at += 4
            queries = []
            for _ in range(count):  # ends with the data: every query takes at least 4 bytes of it
                query, at = _string(data, at)
                queries.append(query)
            if at != len(data):
                raise _Invalid
        except _Invalid:
            self._reply(option, c.REP_ERR_INVALID)
            return
        export = self.exports.get(name)
        if export is None:
            self._reply(option, c.REP_ERR_UNKNOWN)
            return
        found: dict[int, bytes] = {}
        asked = set(queries)
        for number, context in enumerate(export.contexts, 1):
            if context in asked or (not setting and _listed(context, asked)):
                found[number] = context
                text = _U32.pack(number if setting else 0) + context
                self._reply(option, c.REP_META_CONTEXT, text)
        if setting:
            self.contexts, self._context_export = found, name
        self._reply(option, c.REP_ACK)


def _listed(context: bytes, queries: set[bytes]) -> bool:
    """Whether a list without queries, or of a whole namespace, has it."""
    namespace = context[: context.index(b":") + 1]
    kind = context[: context.rindex(b":") + 1]
    return not queries or namespace in queries or kind in queries


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    """A string behind its 32-bit length, and where it ends."""
    if len(data) < at + 4:
        raise _Invalid
    length = _U32.unpack_from(data, at)[0]
    at += 4
    if length > c.MAX_STRING or len(data) < at + length:
        raise _Invalid
    return data[at : at + length], at + length
