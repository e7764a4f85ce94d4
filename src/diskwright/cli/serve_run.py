"""What ``serve`` does: opens the disks, listens, and serves until it is told to stop."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..engine.kernel import Driver
from ..errors import DiskError, UsageError
from ..graph.graph import Graph
from ..graph.node import Node
from ..graph.opener import close_disk, create_image, open_disk
from .images import new_driver, warn_if_guessed
from .output import Call, reason
from .serve import Image, Settings

if TYPE_CHECKING:
    from ..export.metrics_server import MetricsServer
    from ..export.nbd_door import Door
    from ..export.nbd_server import Server
    from ..export.nbd_tls import ServerTls
    from ..secrets import Secrets, TlsCredentials

# How long to poll for the next request of a client that waits for each reply, before sleeping.
LINGER_SECONDS = 50e-6


def serve(call: Call, settings: Settings, listening: Callable[[], None]) -> None:
    """Serve; ``listening`` is called when clients can connect.  Raises what opening raises."""
    if settings.workers > 1:
        from .serve_workers import serve_by_workers

        serve_by_workers(call, settings, listening)
        return
    driver = new_driver()
    driver.linger = LINGER_SECONDS
    try:
        driver.run(driver.in_time(_serve(driver, call, settings, listening)))
    finally:
        driver.close()


async def _serve(
    driver: Driver, call: Call, settings: Settings, listening: Callable[[], None]
) -> None:
    from ..export.nbd_server import Server

    server = Server(
        driver,
        clients=settings.clients,
        persistent=settings.persistent,
        handshake_seconds=settings.handshake_seconds,
        tls=tls_of(settings),
    )
    disks = Disks(driver, call, settings)
    try:
        await disks.offer(server, settings.images)

        def metrics() -> MetricsServer:
            from ..export.metrics_server import MetricsServer, of_server

            return MetricsServer(driver, lambda: of_server(server))

        await listen_and_serve(driver, call, settings, server, metrics, listening)
    finally:
        await disks.close()


class Disks:
    """The disks that are served, in their order; each may be a stack of several nodes."""

    def __init__(self, driver: Driver, call: Call, settings: Settings) -> None:
        self.driver, self.call, self.settings = driver, call, settings
        self._graph = Graph(driver)
        self._open: list[Node] = []

    async def offer(self, server: Server, images: tuple[Image, ...]) -> None:
        """Open ``images`` and let clients of ``server`` choose them.  What cannot be raises, and
        what is open by then is closed by :meth:`close`."""
        from ..export.nbd_status import find_bitmaps

        settings, call = self.settings, self.call
        server.on_error = lambda error: call.error(f"a request failed: {reason(error)}")
        if settings.verbose:
            server.on_left = lambda why: call.error(f"a client left: {why}")
        for image in images:
            node = await self._disk(image)
            bitmaps = await find_bitmaps(node, settings.bitmaps)
            if settings.metrics:
                from ..graph.backend import Backend

                node = Backend(node)  # which counts requests
            server.offer(
                image.export,
                node,
                settings.description,
                settings.read_only or node.read_only,
                depth=settings.depth,
                bitmaps=bitmaps,
            )

    async def close(self) -> None:
        """Close them all; raises the first error of that."""
        first: BaseException | None = None
        while self._open:
            try:
                await close_disk(self._open.pop())
            except (OSError, DiskError) as error:
                first = first or error
        if first is not None:
            raise first

    async def _disk(self, image: Image) -> Node:
        settings = self.settings
        overlaid = settings.overlay is not None
        try:
            node = await open_disk(
                self.driver,
                image.reference,
                format=settings.format,
                writable=not settings.read_only and not overlaid,
                cache=settings.cache,
                force_share=settings.force_share,
                gate=settings.gate,
                discard=settings.discard,
                detect_zeroes=settings.detect_zeroes,
                secrets=settings.secrets,
                graph=self._graph,
            )
        except (OSError, DiskError) as error:
            if not settings.theirs:
                raise
            text = f"Failed to blk_new_open '{image.typed}': {reason(error)}"
            raise UsageError(text) from error
        self._open.append(node)
        if settings.snapshot is not None:
            await self._show(node)
        if overlaid:
            node = await self._overlay(image, node)
        elif not settings.read_only:
            warn_if_guessed(self.call, image.typed, node)
        if settings.offset:
            node = await self._above({"driver": "raw", "offset": settings.offset}, "file", node)
        return node

    async def _show(self, node: Node) -> None:
        from ..ops.snapshots import show

        assert self.settings.snapshot is not None
        try:
            await show(node, self.settings.snapshot)
        except (OSError, DiskError) as error:
            raise UsageError(f"Failed to load snapshot: {reason(error)}") from error

    async def _overlay(self, image: Image, base: Node) -> Node:
        path = self.settings.overlay
        if path:
            if os.path.lexists(path):
                await self._look_at(path, image)
            else:
                named = {"backing_file": _named(image.typed, path), "backing_fmt": base.driver_name}
                await self._create(path, base, named)
            return await self._above(_qcow2(path), "backing", base)
        folder = tempfile.gettempdir() if sys.platform == "win32" else _temporary_folder()
        descriptor, path = tempfile.mkstemp(".qcow2", "diskwright-", folder)
        os.close(descriptor)
        try:
            await self._create(path, base, {})
            # Nobody will ask for what was flushed.
            return await self._above(_qcow2(path), "backing", base, "unsafe")
        finally:
            if sys.platform != "win32":
                os.unlink(path)

    async def _look_at(self, path: str, image: Image) -> None:
        """Raise UsageError unless ``path`` is an overlay over ``image``."""
        from ..graph.names import identity, parse, resolve

        node = await open_disk(self.driver, path, format="qcow2", backing=False)
        below = getattr(getattr(node, "format", None), "backing_file", None)
        await close_disk(node)
        known = identity(parse(image.reference)[0])
        if below is None or identity(parse(resolve(path, below))[0]) != known:
            raise UsageError(f"'{path}' is there and is no overlay over '{image.typed}'")

    async def _create(self, path: str, base: Node, options: dict[str, str]) -> None:
        await create_image(
            self.driver, path, "qcow2", base.size, options, check_backing=False
        )

    async def _above(
        self, options: dict[str, object], slot: str, below: Node, cache: str = ""
    ) -> Node:
        """A node over ``below``."""
        settings = self.settings
        node = await open_disk(
            self.driver,
            {**options, slot: below.name},
            writable=not settings.read_only,
            cache=cache or settings.cache,
            discard=settings.discard,
            detect_zeroes=settings.detect_zeroes,
            graph=self._graph,
        )
        self._open.append(node)
        return node


def _qcow2(path: str) -> dict[str, object]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": path}}


def _temporary_folder() -> str:
    return os.environ.get("TMPDIR") or "/var/tmp"


def _named(base: str, path: str) -> str:
    """What the overlay at ``path`` calls its backing file."""
    from ..graph.names import foreign, protocol_of
    from ..ops.calls.making import named

    return base if foreign(base) or protocol_of(base) else named(base, path)


def tls_of(settings: Settings) -> ServerTls | None:
    if not settings.tls_creds:
        return None
    from ..export.nbd_tls import secured_by

    found = credentials(settings.secrets, settings.tls_creds)
    authz = None
    if settings.tls_authz:
        assert settings.secrets is not None
        authz = settings.secrets.authz.get(settings.tls_authz)
        if authz is None:
            raise UsageError(f"No authorization with id '{settings.tls_authz}'")
    return secured_by(found, authz)


def credentials(known: Secrets | None, id: str) -> TlsCredentials:
    """The TLS credentials of that id.  Raises UsageError."""
    if known is not None and id in known.credentials:
        return known.credentials[id]
    why = f"No TLS credentials with id '{id}'"
    if known is not None and (id in known or id in known.authz):
        why = f"Object with id '{id}' is not TLS credentials"
    raise UsageError(f"Failed to get TLS creds: {why}")


async def listen_and_serve(
    driver: Driver,
    call: Call,
    settings: Settings,
    door: Door,
    metrics: Callable[[], MetricsServer],
    listening: Callable[[], None],
) -> None:
    """Listen, say so to everybody who wants to know, and let clients in until the end.  ``metrics``
    makes what tells of it, if that is wanted."""
    from ..export.listening import notify
    from ..export.nbd_service import tune_collector, until_signalled
    from .background import unlink, write_pid

    listeners = _listen(settings)
    told = metrics() if settings.metrics else None

    def stop() -> None:
        notify(os.environ, "STOPPING=1")
        door.stop()

    async def work() -> None:
        if settings.pid_file:
            write_pid(settings.pid_file)
        if not settings.theirs and (settings.verbose or sys.stdout.isatty()):
            from .serve_banner import banner

            print(banner(settings, listeners), flush=True)
        notify(os.environ, f"READY=1\nMAINPID={os.getpid()}")
        listening()
        undo = tune_collector()
        try:
            await door.serve(*listeners)
        finally:
            undo()

    try:
        if told is not None:
            told.listen(settings.metrics)
        await until_signalled(driver, work(), stop)
    finally:
        if told is not None:
            await told.close()
        for listener in listeners:
            listener.close()
        # qemu-nbd leaves its pid file behind, and scripts that remove it themselves rely on that.
        left_behind = settings.socket, "" if settings.theirs else settings.pid_file
        for path in filter(None, left_behind):
            unlink(path)


def _listen(settings: Settings) -> list[socket.socket]:
    from ..export.listening import listen_tcp, listen_unix, listen_vsock

    if settings.inherited:
        return [one.listener for one in settings.inherited]
    if settings.socket:
        try:
            return [listen_unix(settings.socket)]
        except OSError as error:
            raise UsageError(
                f"Failed to bind socket to {settings.socket}: {error.strerror or error}"
            ) from error
    kind, _, cid = settings.address.partition(":")
    try:
        if kind == "vsock":
            return [listen_vsock(cid, settings.port)]
        return listen_tcp(settings.address, settings.port)
    except socket.gaierror as error:
        where = f"{settings.address}:{settings.port}"
        raise UsageError(f"address resolution failed for {where}: {error.strerror}") from error
    except OSError as error:
        where = f"{settings.address}:{settings.port}"
        raise UsageError(f"Failed to listen on {where}: {error.strerror or error}") from error
