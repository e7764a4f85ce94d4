"""``serve --list`` (qemu-nbd -L): what another server has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from ..protocols.nbd_connect import Address, Security, establish
from ..wire.nbd_listing import Listed, Listing
from .images import look, secrets
from .options import Args
from .output import Call, printable

if TYPE_CHECKING:
    from ..engine.kernel import Driver

_FLAGS = (
    "", "readonly", "flush", "fua", "rotational", "trim", "zeroes", "df", "multi", "resize",
    "cache", "fast-zero", "block-status-payload",
)  # fmt: skip
"""The transmission flags, from the lowest bit on, by QEMU's names."""


def list_exports(call: Call, args: Args, where: tuple[str, str, str]) -> int:
    """List the exports of the server at a socket, or else an address and port."""
    path, host, port = where
    if path:
        address = Address("unix", path)
    elif host.partition(":")[0] == "vsock":
        address = Address("vsock", host.partition(":")[2] or "2", _port(port))
    else:
        address = Address("inet", host, _port(port))
    security = _security(args, address)
    listing = Listing(secure=security is not None)

    async def ask(driver: Driver) -> None:
        found = await establish(driver, address, listing, security)
        driver.forget(found.sock.fileno())
        found.sock.close()

    look(ask)
    call.out(text_of(listing.exports))
    return 0


def text_of(exports: list[Listed]) -> str:
    """As qemu-nbd shows them; what a server says moves no cursor."""
    lines = [f"exports available: {len(exports)}"]
    for one in exports:
        lines.append(f" export: '{_shown(one.name)}'")
        if one.description:
            lines.append(f"  description: {_shown(one.description)}")
        if one.problem:
            lines.append(f"  error: {one.problem}")
            continue
        flags = [_FLAGS[bit] for bit in range(1, len(_FLAGS)) if one.flags >> bit & 1]
        lines.append(f"  size:  {one.size}")
        lines.append(f"  flags: {one.flags:#x} ({''.join(f' {flag}' for flag in flags)} )")
        for what, size in zip(("min", "opt", "max"), one.blocks, strict=False):
            lines.append(f"  {what} block: {size}")
        lines.append(f"  transaction size: {64 if one.extended else 32}-bit")
        if one.contexts:
            lines.append(f"  available meta contexts: {len(one.contexts)}")
            lines += [f"   {_shown(context)}" for context in one.contexts]
    return "\n".join(lines)


def _shown(text: bytes) -> str:
    return printable(text.decode("utf-8", "replace"))


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 1 << 32):
        raise UsageError(f"'{text}' is no port")
    return int(text)


def _security(args: Args, address: Address) -> Security | None:
    wanted = args.get("tls-creds")
    if wanted is None:
        return None
    from ..protocols.nbd_tls import client_context
    from .serve_run import credentials

    host = args.get("tls-hostname") or (address.host if address.kind == "inet" else "localhost")
    return Security(client_context(credentials(secrets(args), wanted)), host)
