"""What a server tells the person who started it: where the disks are, and lines to paste."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from .serve import DEFAULT_PORT

if TYPE_CHECKING:
    from .serve import Settings

_EVERYWHERE = ("0.0.0.0", "::")
_HOST_CID = 2


def banner(settings: Settings, listeners: Sequence[socket.socket]) -> str:
    """Text of several lines, without the last line's end."""
    lines = []
    how = "read-only" if settings.read_only else "writable"
    if settings.overlay is not None:
        how += f", into {settings.overlay or 'a throw-away overlay'}"
    for image in settings.images:
        lines += [f"{image.typed} ({how}) is"]
        lines += [f"  {one}" for one in uris(settings, listeners, image.export)]
    example = uris(settings, listeners, settings.images[0].export)[0]
    lines += ["", "For example:", *(f"  {line}" for line in _examples(settings, example))]
    return "\n".join([*lines, "", "Ctrl-C ends it."])


def _examples(settings: Settings, uri: str) -> list[str]:
    read_only = ",readonly=on" if settings.read_only else ""
    folder = ""
    if settings.tls_creds and settings.secrets is not None:
        folder = settings.secrets.credentials[settings.tls_creds].folder
    if folder:
        sep = "&" if "?" in uri else "?"
        uri += f"{sep}tls-certificates={quote(os.path.abspath(folder))}"
    drive = f"file.driver=nbd,{_flat(uri)},format=raw,if=virtio{read_only}"
    tls = ""
    if folder:
        tls = f"-object tls-creds-x509,id=tls,dir={os.path.abspath(folder)},endpoint=client "
        drive = f"{drive},file.tls-creds=tls"
    quoted = shlex.quote(uri)
    return [
        f"qemu-system-x86_64 -m 1G {tls}-drive {shlex.quote(drive)}",
        f"nbdcopy {quoted} copy.raw",
        f"touch disk.raw && diskwright mount -f raw {quoted} disk.raw",
    ]


def _flat(uri: str) -> str:
    """The options of a QEMU drive for that name."""
    from ..graph.names import flatten
    from ..wire.nbd_uri import parse

    found = flatten({key: value for key, value in parse(uri).items() if not key.startswith("tls")})
    return ",".join(
        f"file.{key}={str(value).replace(',', ',,')}" for key, value in found.items() if value != ""
    )


def uris(settings: Settings, listeners: Sequence[socket.socket], export: bytes) -> list[str]:
    """Where clients on this machine find an export."""
    scheme = "nbds" if settings.tls_creds else "nbd"
    name = quote(export, safe="")
    found = []
    for listener in listeners:
        where = listener.getsockname()
        if not isinstance(where, tuple):
            path = quote(os.path.abspath(settings.socket or os.fsdecode(where)))
            found.append(f"{scheme}+unix:///{name}?socket={path}")
            continue
        host, number = where[:2]
        port = "" if number == DEFAULT_PORT else f":{number}"
        if isinstance(host, int):
            found.append(f"{scheme}+vsock://{host if host < 1 << 31 else _HOST_CID}{port}/{name}")
            continue
        host = "localhost" if host in _EVERYWHERE else f"[{host}]" if ":" in host else host
        found.append(f"{scheme}://{host}{port}/{name}")
    return list(dict.fromkeys(found))
