"""``serve`` (qemu-nbd): one disk over NBD."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from ..engine.kernel import Driver
from ..export.nbd import NbdExport, listen_tcp, listen_unix
from ..export.nbd_service import serve_until_signalled, tune_collector
from ..graph.gate import Gate
from ..graph.opener import close_disk, open_disk

DEFAULT_PORT = 10809


class Settings(NamedTuple):
    """What was asked for."""

    image: str
    format: str | None = None
    socket: str = ""
    address: str = ""
    port: int = DEFAULT_PORT
    read_only: bool = False
    persistent: bool = False
    clients: int = 1
    name: str = ""
    description: str = ""
    cache: str = "writeback"
    discard: str = "unmap"
    detect_zeroes: str = "off"
    force_share: bool = False
    policy: str | None = None
    handshake_seconds: float = 10.0


def serve(settings: Settings) -> None:
    """Serve until the last client has left or a signal came; raises what opening raises."""
    driver = Driver()
    try:
        driver.run(_serve(driver, settings))
    finally:
        driver.close()


async def _serve(driver: Driver, settings: Settings) -> None:
    node = await open_disk(
        driver,
        settings.image,
        format=settings.format,
        writable=not settings.read_only,
        cache=settings.cache,
        force_share=settings.force_share,
        gate=Gate.from_environment(settings.policy),
        discard=settings.discard,
        detect_zeroes=settings.detect_zeroes,
    )
    try:
        export = NbdExport(
            driver,
            node,
            name=os.fsencode(settings.name),
            description=os.fsencode(settings.description),
            read_only=settings.read_only,
            clients=settings.clients,
            persistent=settings.persistent,
            handshake_seconds=settings.handshake_seconds,
        )
        export.on_error = _report
        if settings.socket:
            listener = listen_unix(settings.socket)
        else:
            listener = listen_tcp(settings.address, settings.port)
        undo = tune_collector()
        try:
            if sys.stdout.isatty():
                print(f"serving {uri(settings)}", flush=True)
            await serve_until_signalled(driver, export, listener)
        finally:
            undo()
            if settings.socket:
                _unlink(settings.socket)
    finally:
        await close_disk(node)


def _report(error: BaseException) -> None:
    print(f"serve: a client was dropped: {error!r}", file=sys.stderr, flush=True)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def uri(settings: Settings) -> str:
    """Where clients find it."""
    from urllib.parse import quote

    name = quote(os.fsencode(settings.name), safe="")
    if settings.socket:
        return f"nbd+unix:///{name}?socket={quote(os.fsencode(settings.socket))}"
    host = settings.address or "localhost"
    host = f"[{host}]" if ":" in host else host
    port = "" if settings.port == DEFAULT_PORT else f":{settings.port}"
    return f"nbd://{host}{port}/{name}"
