"""The client's half of the NBD handshake: bytes in, bytes out.

Fixed newstyle with everything that the server may offer, plain newstyle, and oldstyle.  The
transport gives exactly the bytes that are ``wanted``, no more: what a stranger slipped in before
TLS is then never taken for what came through it.  Source: NetworkBlockDevice/nbd, doc/proto.md.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Generator, Mapping, Sequence
from typing import TypeVar

from ..errors import PeerError
from ..records import NamedTuple
from . import nbd_const as c

_GREETING = struct.Struct(">QQ")
_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_EXPORT = struct.Struct(">QH")
_OLDSTYLE = struct.Struct(">QHH")
_SIZES = struct.Struct(">III")
_PADDING = 124

REPLY_LIMIT = 16 << 10
"""Longest reply to an option in bytes: two strings and a few numbers."""
REPLIES_LIMIT = 256
"""Most replies to one option."""
LARGEST = 1 << 63
"""An export is smaller, in bytes: offsets of the system are signed."""
MOST_MIN_BLOCK = 64 << 10
"""Largest smallest request that can be honoured, in bytes."""

_REFUSALS = {
    c.REP_ERR_UNSUP: "the server does not know this option",
    c.REP_ERR_POLICY: "the server's policy forbids it",
    c.REP_ERR_INVALID: "the server calls the request invalid",
    c.REP_ERR_PLATFORM: "the server's platform does not support it",
    c.REP_ERR_TLS_REQD: "the server requires TLS: 'tls-creds' or a name with 'nbds' gives it",
    c.REP_ERR_UNKNOWN: "Requested export not available",
    c.REP_ERR_SHUTDOWN: "the server is shutting down",
    c.REP_ERR_BLOCK_SIZE_REQD: "the server wants its block sizes to be heeded",
    c.REP_ERR_TOO_BIG: "the request is too long for the server",
    c.REP_ERR_EXT_HEADER_REQD: "the server requires extended headers",
}
_NUMBERS = {
    c.REP_ERR_POLICY: errno.EACCES,
    c.REP_ERR_TLS_REQD: errno.EACCES,
    c.REP_ERR_UNKNOWN: errno.ENOENT,
    c.REP_ERR_SHUTDOWN: errno.ESHUTDOWN,
}


class Agreement(NamedTuple):
    """What client and server agreed on.  Sizes in bytes; ``flags`` are the transmission flags.
    ``contexts`` are the metadata contexts that were selected, by their number."""

    size: int
    flags: int
    min_block: int = 1
    preferred_block: int = 4096
    max_payload: int = c.MAX_PAYLOAD
    structured: bool = False
    extended: bool = False
    contexts: Mapping[int, bytes] = {}
    name: bytes = b""
    description: bytes = b""
    tls: bool = False
    style: str = "newstyle-fixed"


class Declined(Exception):
    """The server answered an option with an error."""

    def __init__(self, kind: int, said: bytes) -> None:
        self.kind = kind
        self.said = readable(said)

    def error(self) -> PeerError:
        """The same for whoever asked for the export."""
        detail = _REFUSALS.get(self.kind, f"the server refused with error {self.kind:#x}")
        if self.said:
            detail += f"\nserver reported: {self.said}"
        return PeerError(detail, _NUMBERS.get(self.kind, errno.EPROTO))


T = TypeVar("T")
Script = Generator[int, bytes, T]
Replies = list[tuple[int, bytes]]


class Negotiation:
    """Asks for ``export``.

    The transport sends what :meth:`take` gives; then, if ``upgrade`` is set, it makes the
    connection a TLS one and calls :meth:`secured`; otherwise it receives exactly ``wanted`` bytes
    and hands them to :meth:`received`; until ``agreed`` is set.  Raises PeerError for what the
    server refuses (then :meth:`take` has a farewell) and for what breaks the protocol.

    ``secure``: over TLS or not at all.  ``contexts``: metadata contexts that are asked for.
    ``extended``, ``structured``: ask for these replies.
    """

    def __init__(
        self,
        export: bytes = b"",
        *,
        secure: bool = False,
        contexts: Sequence[bytes] = (),
        structured: bool = True,
        extended: bool = True,
    ) -> None:
        self.export = export
        self.secure = secure
        self.contexts = contexts
        self.upgrade = False
        self.agreed: Agreement | None = None
        self._ask_structured, self._ask_extended = structured, extended
        self._out: list[bytes] = []
        self._structured = self._extended = False
        self._script = self._run()
        self.wanted = next(self._script)

    def take(self) -> bytes:
        """What must be sent now."""
        out, self._out = self._out, []
        return b"".join(out)

    def received(self, data: bytes) -> None:
        """The ``wanted`` bytes have come."""
        try:
            self.wanted = self._script.send(data)
        except StopIteration as stop:
            self.wanted = 0
            self.agreed = stop.value

    def secured(self) -> None:
        """The connection is a TLS one now."""
        self.upgrade = False
        self.received(b"")

    # -- what is said, in order
    def _run(self) -> Script[Agreement]:
        first, second = _GREETING.unpack((yield _GREETING.size))
        if first != c.INIT_MAGIC:
            raise PeerError("this is no NBD server: it begins with other bytes")
        if second == c.OLDSTYLE_MAGIC:
            return (yield from self._oldstyle())
        if second != c.OPTION_MAGIC:
            raise PeerError(f"the server speaks a style of NBD that nobody knows ({second:#x})")
        flags = int.from_bytes((yield 2), "big")
        no_zeroes = flags & c.FLAG_NO_ZEROES
        fixed = flags & c.FLAG_FIXED_NEWSTYLE
        self._out.append(struct.pack(">I", fixed | no_zeroes))
        if not fixed:
            self._refuse_plain("plain newstyle")
            return (yield from self._by_name(not no_zeroes, "newstyle"))
        try:
            if self.secure:
                yield from self._start_tls()
            if self._ask_extended:
                self._extended = yield from self._offered(c.OPT_EXTENDED_HEADERS)
            self._structured = self._extended
            if self._ask_structured and not self._structured:
                self._structured = yield from self._offered(c.OPT_STRUCTURED_REPLY)
            return (yield from self._choose(not no_zeroes))
        except Declined as declined:
            self._send(c.OPT_ABORT)
            raise declined.error() from None

    def _choose(self, padded: bool) -> Script[Agreement]:
        selected = yield from self._select_contexts()
        try:
            return (yield from self._go(selected))
        except Declined as declined:
            if declined.kind != c.REP_ERR_UNSUP:
                raise
        return (yield from self._by_name(padded, "newstyle-fixed", selected))

    def _refuse_plain(self, style: str) -> None:
        """What a server without options cannot do."""
        if self.secure:
            raise PeerError(f"TLS was asked for, and the server speaks {style} NBD without it")

    def _oldstyle(self) -> Script[Agreement]:
        self._refuse_plain("oldstyle")
        if self.export:
            raise PeerError(
                f"the server speaks oldstyle NBD: it has one export without a name, not "
                f"'{readable(self.export)}'",
                errno.ENOENT,
            )
        size, _, flags = _OLDSTYLE.unpack((yield _OLDSTYLE.size))
        yield _PADDING
        return self._agreement(size, flags, style="oldstyle")

    def _by_name(
        self, padded: bool, style: str, contexts: Mapping[int, bytes] | None = None
    ) -> Script[Agreement]:
        """OPT_EXPORT_NAME, which has no way to refuse but to close the connection."""
        self._send(c.OPT_EXPORT_NAME, self.export)
        size, flags = _EXPORT.unpack((yield _EXPORT.size))
        if padded:
            yield _PADDING
        return self._agreement(size, flags, style=style, contexts=contexts or {})

    def _start_tls(self) -> Script[None]:
        try:
            replies = yield from self._ask(c.OPT_STARTTLS)
        except Declined as declined:
            detail = "TLS was asked for, and the server does not offer it"
            if declined.said:
                detail += f"\nserver reported: {declined.said}"
            raise PeerError(detail, errno.EACCES) from None
        if replies:
            raise broken("it answers STARTTLS with data")
        self.upgrade = True
        yield 0

    def _offered(self, option: int) -> Script[bool]:
        """Whether the server grants an option that has neither data nor replies."""
        try:
            replies = yield from self._ask(option)
        except Declined as declined:
            if declined.kind in (c.REP_ERR_TLS_REQD, c.REP_ERR_SHUTDOWN):
                raise
            return False
        if replies:
            raise broken(f"it answers option {option} with data")
        return True

    def _select_contexts(self) -> Script[dict[int, bytes]]:
        found: dict[int, bytes] = {}
        if not (self._structured and self.contexts):
            return found
        data = text_of(self.export) + struct.pack(">I", len(self.contexts))
        data += b"".join(map(text_of, self.contexts))
        try:
            replies = yield from self._ask(c.OPT_SET_META_CONTEXT, data)
        except Declined as declined:
            if declined.kind in (c.REP_ERR_TLS_REQD, c.REP_ERR_UNKNOWN, c.REP_ERR_SHUTDOWN):
                raise
            return found
        for kind, body in replies:
            if kind != c.REP_META_CONTEXT or len(body) < 4:
                raise broken("it selects something that is no metadata context")
            number, name = int.from_bytes(body[:4], "big"), body[4:]
            if name not in self.contexts or number in found or name in found.values():
                raise broken(f"it selects the metadata context '{readable(name)}' unasked")
            found[number] = name
        return found

    def _go(self, contexts: Mapping[int, bytes]) -> Script[Agreement]:
        wanted = (c.INFO_NAME, c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE)
        data = text_of(self.export) + struct.pack(">H3H", len(wanted), *wanted)
        info: dict[int, bytes] = {}
        for kind, body in (yield from self._ask(c.OPT_GO, data)):
            if kind != c.REP_INFO or len(body) < 2:
                raise broken("it describes the export with something that is no information")
            info[int.from_bytes(body[:2], "big")] = body[2:]
        export = info.get(c.INFO_EXPORT)
        if export is None or len(export) != _EXPORT.size:
            raise broken("it does not tell the size of the export")
        size, flags = _EXPORT.unpack(export)
        sizes = info.get(c.INFO_BLOCK_SIZE)
        if sizes is not None and len(sizes) != _SIZES.size:
            raise broken("its block sizes are not three numbers")
        return self._agreement(
            size,
            flags,
            None if sizes is None else _SIZES.unpack(sizes),
            contexts=contexts,
            name=info.get(c.INFO_NAME, self.export),
            description=info.get(c.INFO_DESCRIPTION, b""),
        )

    def _agreement(
        self,
        size: int,
        flags: int,
        sizes: tuple[int, int, int] | None = None,
        *,
        style: str = "newstyle-fixed",
        contexts: Mapping[int, bytes] | None = None,
        name: bytes | None = None,
        description: bytes = b"",
    ) -> Agreement:
        if size >= LARGEST:
            raise broken(f"its export has {size} bytes, more than anything can have")
        if not flags & c.HAS_FLAGS:
            flags = 0
        found = Agreement(
            size,
            flags,
            structured=self._structured,
            extended=self._extended,
            contexts=contexts or {},
            name=self.export if name is None else name,
            description=description,
            tls=self.secure,
            style=style,
        )
        return found if sizes is None else _with_sizes(found, *sizes)

    # -- options
    def _send(self, option: int, data: bytes = b"") -> None:
        self._out.append(_OPTION.pack(c.OPTION_MAGIC, option, len(data)) + data)

    def _ask(
        self, option: int, data: bytes = b"", limit: int = REPLIES_LIMIT
    ) -> Script[Replies]:
        """Send an option; its replies before the one that ends it.  Raises Declined."""
        self._send(option, data)
        replies: Replies = []
        while True:
            magic, about, kind, length = _REPLY.unpack((yield _REPLY.size))
            if magic != c.OPTION_REPLY_MAGIC:
                raise broken(f"a reply to an option begins with {magic:#x}")
            if about != option:
                raise broken(f"it answers option {about} where {option} was asked")
            if length > REPLY_LIMIT:
                raise broken(f"a reply to option {option} is {length} bytes long")
            body = (yield length) if length else b""
            if kind == c.REP_ACK:
                if length:
                    raise broken("an acknowledgement has data")
                return replies
            if kind >> 31:
                raise Declined(kind, body)
            replies.append((kind, body))
            if len(replies) > limit:
                raise broken(f"it answers option {option} more than {limit} times")


def _with_sizes(found: Agreement, least: int, preferred: int, most: int) -> Agreement:
    """``found`` with these block sizes, as far as they can be used."""
    if not 1 <= least <= MOST_MIN_BLOCK or least & (least - 1):
        raise broken(f"its minimum block size is {least}")
    if preferred < least or preferred & (preferred - 1):
        raise broken(f"its preferred block size is {preferred}")
    if most < least:
        raise broken(f"its maximum block size is {most}")
    if found.size % least:
        raise broken(f"its export of {found.size} bytes is no multiple of its block size {least}")
    most = min(most, c.MAX_PAYLOAD)
    return found._replace(
        min_block=least, preferred_block=preferred, max_payload=most - most % least
    )


def broken(what: str) -> PeerError:
    return PeerError(f"the server breaks the protocol: {what}")


def text_of(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def readable(text: bytes) -> str:
    """What a server said, as it can be shown: nothing in it moves a terminal's cursor."""
    shown = text[: c.MAX_STRING].decode("utf-8", "replace").strip()
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in shown)
