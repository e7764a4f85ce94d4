"""``serve`` (qemu-nbd): one disk over NBD."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import DiskError, UsageError
from ..records import NamedTuple
from .images import arguments, gate, new_driver, secrets, served, warn_if_guessed
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, METRICS, OBJECT, TRACE, Args, Opt
from .output import Call, UsageProblem, reason

if TYPE_CHECKING:
    import socket

    from ..engine.kernel import Driver
    from ..export.nbd_tls import ServerTls
    from ..graph.gate import Gate
    from ..graph.names import Reference
    from ..graph.node import Node
    from ..ops.snapshots import Selector
    from ..secrets import Secrets

DEFAULT_PORT = 10809
# How long to poll for the next request of a client that waits for each reply, before sleeping.
LINGER_SECONDS = 50e-6

OPTIONS = (
    FORMAT,
    IMAGE_OPTS,
    Opt("k", "socket", "PATH", "listen on a unix socket"),
    Opt("p", "port", "PORT", "listen on a TCP port (default 10809)"),
    Opt("b", "bind", "ADDRESS", "address to listen on"),
    Opt("r", "read-only", "", "let nobody write"),
    Opt("l", "load-snapshot", "SNAPSHOT", "serve an internal snapshot, read-only: an id or name, "
        "or snapshot.id=ID,snapshot.name=NAME"),
    Opt("t", "persistent", "", "go on when the last client has left"),
    Opt("e", "shared", "NUM", "clients at a time (default 1, 0 for any number)"),
    Opt("x", "export-name", "NAME", "name of the export (default: empty)"),
    Opt("D", "description", "TEXT", "description of the export"),
    Opt("A", "allocation-depth", "", "tell clients that ask which layer holds a range"),
    Opt("B", "bitmap", "NAME", "tell clients that ask what a dirty bitmap of the image or of a "
        "backing file calls dirty (several times)"),
    Opt("", "handshake-limit", "SECONDS", "time for a client's handshake (default 10)"),
    Opt("", "cache", "CACHE", "cache mode of the image (default writeback)"),
    Opt("n", "nocache", "", "the same as --cache=none"),
    Opt("", "aio", "AIO"),
    Opt("", "discard", "DISCARD", "ignore or unmap (default; qemu-nbd: ignore)"),
    Opt("", "detect-zeroes", "DETECT", "off (default), on or unmap"),
    Opt("", "tls-creds", "ID", "require TLS, with the credentials of an --object tls-creds-x509 or "
        "tls-creds-psk (endpoint=server)"),
    Opt("", "tls-authz", "ID", "admit only clients whose certificate an --object authz-simple, "
        "authz-list or authz-listfile names"),
    Opt("", "fork", "", "return when clients can connect, and serve in the background"),
    Opt("", "pid-file", "PATH", "write the server's process id there"),
    METRICS,
    TRACE,
    Opt("v", "verbose", "", "report why clients were dropped"),
    FORCE_SHARE,
    *GATE,
    OBJECT,
)


class Settings(NamedTuple):
    """What was asked for."""

    image: str
    reference: Reference
    gate: Gate
    format: str | None = None
    socket: str = ""
    address: str = "localhost"
    port: str = str(DEFAULT_PORT)
    read_only: bool = False
    persistent: bool = False
    clients: int = 1
    name: str = ""
    description: str = ""
    cache: str = "writeback"
    discard: str = "unmap"
    detect_zeroes: str = "off"
    force_share: bool = False
    handshake_seconds: float = 10.0
    pid_file: str = ""
    verbose: bool = False
    secrets: Secrets | None = None
    snapshot: Selector | None = None
    depth: bool = False
    bitmaps: tuple[str, ...] = ()
    tls_creds: str = ""
    tls_authz: str = ""
    metrics: str = ""


def main(call: Call, argv: list[str]) -> int:
    """Serve a disk until its last client has left or a signal comes."""
    if argv in (["-V"], ["--version"]):
        from .main import version

        call.out(version(call.name))
        return 0
    args = arguments(call, argv, OPTIONS, "FILENAME", "Serve a disk over NBD.")
    if args is None:
        return 0
    settings = _settings(call, args)
    if "fork" in args:
        from .background import in_background

        return in_background(call, lambda listening: serve(call, settings, listening))
    serve(call, settings, lambda: None)
    return 0


def _settings(call: Call, args: Args) -> Settings:
    if len(args.operands) != 1:
        raise UsageProblem("Invalid number of arguments")
    keys = secrets(args)
    image = args.operands[0]
    reference, cache = served(args, image, "none" if "nocache" in args else "writeback")
    ours = not call.name.startswith("qemu-nbd")
    discard = args.get("discard") or ("unmap" if ours else "ignore")
    if discard not in ("ignore", "off", "unmap", "on"):
        raise UsageError(f"Invalid discard mode `{discard}'")
    zeroes = args.get("detect-zeroes") or "off"
    if zeroes not in ("off", "on", "unmap"):
        raise UsageError(f"Failed to parse detect_zeroes mode: invalid parameter value: {zeroes}")
    return Settings(
        image=image,
        reference=reference,
        gate=gate(args),
        format=args.get("format"),
        socket=args.get("socket") or "",
        # qemu-nbd listens everywhere; a disk that nobody asked to publish stays at home
        address=args.get("bind") or ("localhost" if ours else "0.0.0.0"),
        port=args.get("port") or str(DEFAULT_PORT),
        read_only="read-only" in args or "load-snapshot" in args,
        persistent="persistent" in args,
        clients=_count(args, "shared", 1, "Invalid shared device number"),
        name=args.get("export-name") or "",
        description=args.get("description") or "",
        cache=cache,
        discard=discard,
        detect_zeroes=zeroes,
        force_share="force-share" in args,
        handshake_seconds=_count(args, "handshake-limit", 10, "Invalid handshake limit"),
        pid_file=args.get("pid-file") or "",
        verbose="verbose" in args,
        secrets=keys,
        snapshot=_snapshot(call, args),
        depth="allocation-depth" in args,
        bitmaps=tuple(args.all("bitmap")),
        tls_creds=args.get("tls-creds") or "",
        tls_authz=args.get("tls-authz") or "",
        metrics=args.get("metrics") or "",
    )


def _snapshot(call: Call, args: Args) -> Selector | None:
    if "load-snapshot" not in args:
        return None
    from .convert import snapshot_of

    return snapshot_of(call, args, "load-snapshot")


async def _show(node: Node, snapshot: Selector) -> None:
    from ..ops.snapshots import show

    try:
        await show(node, snapshot)
    except (OSError, DiskError) as error:
        raise UsageError(f"Failed to load snapshot: {reason(error)}") from error


def _count(args: Args, key: str, default: int, message: str) -> int:
    text = args.get(key)
    if text is None:
        return default
    if not text.isdecimal() or len(text) > 9:
        raise UsageError(f"{message} '{text}'")
    return int(text)


def serve(call: Call, settings: Settings, listening: Callable[[], None]) -> None:
    """Serve; ``listening`` is called when clients can connect.  Raises what opening raises."""
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
    from ..export.nbd_service import tune_collector, until_signalled
    from ..export.nbd_status import find_bitmaps
    from ..graph.opener import close_disk, open_disk
    from .background import unlink, write_pid

    tls = _tls(settings)
    node = await open_disk(
        driver,
        settings.reference,
        format=settings.format,
        writable=not settings.read_only,
        cache=settings.cache,
        force_share=settings.force_share,
        gate=settings.gate,
        discard=settings.discard,
        detect_zeroes=settings.detect_zeroes,
        secrets=settings.secrets,
    )
    try:
        if settings.snapshot is not None:
            await _show(node, settings.snapshot)
        if not settings.read_only:
            warn_if_guessed(call, settings.image, node)
        export = Server(
            driver,
            clients=settings.clients,
            persistent=settings.persistent,
            handshake_seconds=settings.handshake_seconds or 1e9,
            tls=tls,
        )
        name, disk, metrics = os.fsencode(settings.name), node, None
        if settings.metrics:
            from ..export.metrics_server import of_disk

            disk, metrics = of_disk(export, name, node)
        export.offer(
            name,
            disk,
            os.fsencode(settings.description),
            settings.read_only or node.read_only,
            depth=settings.depth,
            bitmaps=await find_bitmaps(node, settings.bitmaps),
        )
        export.on_error = lambda error: call.error(f"a request failed: {reason(error)}")
        if settings.verbose:
            export.on_left = lambda why: call.error(f"a client left: {why}")
        listeners = _listen(settings)

        async def work() -> None:
            if settings.pid_file:
                write_pid(settings.pid_file)
            if sys.stdout.isatty():
                print(f"serving {uri(settings, listeners[0])}", flush=True)
            listening()
            undo = tune_collector()
            try:
                await export.serve(*listeners)
            finally:
                undo()

        try:
            if metrics is not None:
                metrics.listen(settings.metrics)
            await until_signalled(driver, work(), export.stop)
        finally:
            if metrics is not None:
                await metrics.close()
            for path in filter(None, (settings.socket, settings.pid_file)):
                unlink(path)
    finally:
        await close_disk(node)


def _tls(settings: Settings) -> ServerTls | None:
    if not settings.tls_creds:
        if settings.tls_authz:
            raise UsageError("--tls-authz is not permitted without --tls-creds")
        return None
    from ..export.nbd_tls import ServerTls
    from ..protocols.nbd_tls import server_context

    known = settings.secrets
    if known is None or settings.tls_creds not in known.credentials:
        raise UsageError(f"No TLS credentials with id '{settings.tls_creds}'")
    identity = None
    if settings.tls_authz:
        identity = known.authz.get(settings.tls_authz)
        if identity is None:
            raise UsageError(f"No authorization with id '{settings.tls_authz}'")
    return ServerTls(server_context(known.credentials[settings.tls_creds]), identity)


def _listen(settings: Settings) -> list[socket.socket]:
    from ..export.listening import listen_tcp, listen_unix

    if settings.socket:
        try:
            return [listen_unix(settings.socket)]
        except OSError as error:
            raise UsageError(
                f"Failed to bind socket to {settings.socket}: {error.strerror or error}"
            ) from error
    try:
        return listen_tcp(settings.address, settings.port)
    except OSError as error:
        where = f"{settings.address}:{settings.port}"
        raise UsageError(f"Failed to listen on {where}: {error.strerror or error}") from error


def uri(settings: Settings, listener: socket.socket) -> str:
    """Where clients find it."""
    from urllib.parse import quote

    scheme = "nbds" if settings.tls_creds else "nbd"
    name = quote(os.fsencode(settings.name), safe="")
    if settings.socket:
        return f"{scheme}+unix:///{name}?socket={quote(os.path.abspath(settings.socket))}"
    host, number = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    port = "" if number == DEFAULT_PORT else f":{number}"
    return f"{scheme}://{host}{port}/{name}"
