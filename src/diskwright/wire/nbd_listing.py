"""The client's half of a handshake that chooses no export, but asks what there is."""

from __future__ import annotations

import struct

from ..errors import PeerError
from ..records import NamedTuple
from . import nbd_const as c
from .nbd_negotiation import Agreement, Declined, Negotiation, Script, broken, text_of

LIST_LIMIT = 10_000
"""Most exports that a server may list."""
_EXPORT = struct.Struct(">QH")
_SIZES = struct.Struct(">III")


class Listed(NamedTuple):
    """An export.  Sizes in bytes; ``blocks`` are the smallest, the preferred and the largest
    request, where the server tells them.  ``problem``: why nothing but the name is known."""

    name: bytes
    description: bytes = b""
    size: int = 0
    flags: int = 0
    blocks: tuple[int, ...] = ()
    extended: bool = False
    contexts: tuple[bytes, ...] = ()
    problem: str = ""


class Listing(Negotiation):
    """Asks for all exports; they are in ``exports`` when it ends with an agreement on nothing."""

    def __init__(self, *, secure: bool = False) -> None:
        self.exports: list[Listed] = []
        super().__init__(secure=secure)

    def _refuse_plain(self, style: str) -> None:
        super()._refuse_plain(style)
        raise PeerError(f"the server speaks {style} NBD and cannot list its exports")

    def _choose(self, padded: bool) -> Script[Agreement]:
        names: dict[bytes, bytes] = {}
        for kind, data in (yield from self._ask(c.OPT_LIST, limit=LIST_LIMIT)):
            if kind != c.REP_SERVER or len(data) < 4:
                raise broken("it lists something that is no export")
            end = 4 + int.from_bytes(data[:4], "big")
            if end > len(data):
                raise broken("it lists an export whose name is longer than its reply")
            names[data[4:end]] = data[end:]
        for name, description in names.items():
            try:
                self.exports.append((yield from self._about(name, description)))
            except Declined as declined:
                self.exports.append(Listed(name, description, problem=str(declined.error())))
        self._send(c.OPT_ABORT)
        return Agreement(0, 0, tls=self.secure)

    def _about(self, name: bytes, description: bytes) -> Script[Listed]:
        wanted = (c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE)
        data = text_of(name) + struct.pack(">H2H", len(wanted), *wanted)
        info: dict[int, bytes] = {}
        for kind, body in (yield from self._ask(c.OPT_INFO, data)):
            if kind != c.REP_INFO or len(body) < 2:
                raise broken("it describes an export with something that is no information")
            info[int.from_bytes(body[:2], "big")] = body[2:]
        export, sizes = info.get(c.INFO_EXPORT, b""), info.get(c.INFO_BLOCK_SIZE, bytes(12))
        if len(export) != _EXPORT.size or len(sizes) != _SIZES.size:
            raise broken("it does not tell the size of an export")
        size, flags = _EXPORT.unpack(export)
        return Listed(
            name,
            info.get(c.INFO_DESCRIPTION, description),
            size,
            flags,
            _SIZES.unpack(sizes) if c.INFO_BLOCK_SIZE in info else (),
            self._extended,
            (yield from self._contexts_of(name)),
        )

    def _contexts_of(self, name: bytes) -> Script[tuple[bytes, ...]]:
        if not self._structured:
            return ()
        data = text_of(name) + bytes(4)
        try:
            replies = yield from self._ask(c.OPT_LIST_META_CONTEXT, data)
        except Declined:
            return ()
        if any(kind != c.REP_META_CONTEXT or len(body) < 4 for kind, body in replies):
            raise broken("it lists something that is no metadata context")
        return tuple(body[4:] for _, body in replies)
