"""``serve`` (qemu-nbd): disks over NBD."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import NotSupported, UsageError
from ..records import NamedTuple
from .images import arguments, gate, secrets, served, take_trace
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, METRICS, OBJECT, TRACE, Args, Opt
from .output import Call, UsageProblem

if TYPE_CHECKING:
    from ..export.listening import Inherited
    from ..graph.gate import Gate
    from ..graph.names import Reference
    from ..ops.snapshots import Selector
    from ..secrets import Secrets

DEFAULT_PORT = 10809
NAME_LIMIT = 4096

OPTIONS = (
    FORMAT,
    IMAGE_OPTS,
    Opt("k", "socket", "PATH", "listen on a unix socket"),
    Opt("p", "port", "PORT", "listen on a TCP port (default 10809)"),
    Opt("b", "bind", "ADDRESS", "address to listen on (default localhost; qemu-nbd: all of IPv4): "
        "a name or number, of both families; vsock or vsock:CID for a vsock address"),
    Opt("r", "read-only", "", "let nobody write"),
    Opt("s", "snapshot", "", "write to a throw-away overlay: the same as --overlay"),
    Opt("", "overlay", "FILE", "do not write to the image but to an overlay: one that is gone at "
        "the end, or FILE, which is made if it is not there", optional=True),
    Opt("l", "load-snapshot", "SNAPSHOT", "serve an internal snapshot, read-only: an id or name, "
        "or snapshot.id=ID,snapshot.name=NAME"),
    Opt("o", "offset", "OFFSET", "serve what is behind so many bytes"),
    Opt("t", "persistent", "", "go on when the last client has left"),
    Opt("e", "shared", "NUM", "clients at a time (default 1, of several images any number; 0 for "
        "any number)"),
    Opt("x", "export-name", "NAME", "name of the export (default: empty, of several images their "
        "file names; once for each image)"),
    Opt("D", "description", "TEXT", "description of the export"),
    Opt("A", "allocation-depth", "", "tell clients that ask which layer holds a range"),
    Opt("B", "bitmap", "NAME", "tell clients that ask what a dirty bitmap of the image or of a "
        "backing file calls dirty (several times)"),
    Opt("", "handshake-limit", "SECONDS", "time for a client's handshake (default 10; 0: any)"),
    Opt("", "workers", "NUM", "serve several images in so many processes"),
    Opt("", "cache", "CACHE", "cache mode of the image (default writeback)"),
    Opt("n", "nocache", "", "the same as --cache=none"),
    Opt("", "aio", "AIO", "taken, and checked: how files are read and written is our own affair"),
    Opt("", "discard", "DISCARD", "ignore or unmap (default; qemu-nbd: ignore)"),
    Opt("", "detect-zeroes", "DETECT", "off (default), on or unmap"),
    Opt("", "tls-creds", "ID", "require TLS, with the credentials of an --object tls-creds-x509 or "
        "tls-creds-psk (endpoint=server)"),
    Opt("", "tls-authz", "ID", "admit only clients whose certificate an --object authz-simple, "
        "authz-list or authz-listfile names"),
    Opt("", "tls-hostname", "NAME", "with --list: the name in the server's certificate"),
    Opt("L", "list", "", "list the exports of another server"),
    Opt("", "fork", "", "return when clients can connect, and serve in the background"),
    Opt("", "pid-file", "PATH", "write the server's process id there"),
    METRICS,
    TRACE._replace(short="T"),
    Opt("v", "verbose", "", "say where clients find it, and why they were dropped"),
    Opt("", "selinux-label", "LABEL", "refused: sockets get no label"),
    Opt("c", "connect", "DEV", "refused: nbd-client attaches an export to a device"),
    Opt("d", "disconnect", "", "refused: nbd-client detaches a device"),
    FORCE_SHARE,
    *GATE,
    OBJECT,
)  # fmt: skip

_ONCE = {"aio": "--aio", "discard": "--discard", "cache": "-n and --cache"}
_NOT_LISTED = (
    "allocation-depth", "offset", "bitmap", "export-name", "description", "cache", "nocache",
    "aio", "discard", "load-snapshot", "format", "overlay", "workers",
)  # fmt: skip


class Image(NamedTuple):
    """One disk: what was typed, what it means, and the name of its export."""

    typed: str
    reference: Reference
    export: bytes


class Settings(NamedTuple):
    """What was asked for.  ``overlay``: the file of a kept one, empty for a throw-away one, None
    for none."""

    images: tuple[Image, ...]
    gate: Gate
    theirs: bool
    format: str | None
    socket: str
    address: str
    port: str
    inherited: tuple[Inherited, ...]
    read_only: bool
    persistent: bool
    clients: int
    workers: int
    description: bytes
    cache: str
    discard: str
    detect_zeroes: str
    force_share: bool
    offset: int
    overlay: str | None
    snapshot: Selector | None
    depth: bool
    bitmaps: tuple[str, ...]
    handshake_seconds: float
    background: bool
    pid_file: str
    verbose: bool
    secrets: Secrets | None
    tls_creds: str
    tls_authz: str
    metrics: str


def main(call: Call, argv: list[str]) -> int:
    """Serve disks until their last client has left or a signal comes."""
    if argv in (["-V"], ["--version"]):
        from .main import version

        call.out(version(call.name))
        return 0
    args = arguments(call, argv, OPTIONS, "FILENAME...", "Serve disks over NBD.")
    if args is None:
        return 0
    _check(call, args)
    if "list" in args:
        from .serve_list import list_exports

        return list_exports(call, args, _listed(args))
    settings = _settings(call, args)
    from .serve_run import serve

    if settings.background:
        from .background import in_background

        return in_background(call, lambda listening: serve(call, settings, listening))
    serve(call, settings, lambda: None)
    return 0


def _check(call: Call, args: Args) -> None:
    """Raise UsageError for options that cannot be, in the words of qemu-nbd."""
    given = ["cache" if key == "nocache" else key for key, _ in args.options]
    for key, words in _ONCE.items():
        if given.count(key) > 1:
            raise UsageError(f"{words} can only be specified once")
    aio = args.get("aio") or "threads"
    if aio not in ("threads", "native", "io_uring"):
        raise UsageError(f"Invalid aio mode '{aio}'")
    theirs = call.name.startswith("qemu-nbd")
    if not theirs:
        take_trace(args)
    for pattern in args.all("trace") if theirs else ():
        name = pattern.split(",")[0].removeprefix("enable=")
        if "*" not in name:
            call.warning(f"warning: trace event '{name}' does not exist")
    for key in ("selinux-label", "connect", "disconnect"):
        if key in args and "list" not in args:
            raise NotSupported(f"--{key} is not supported")
    tls = "tls-creds" in args
    for key in ("tls-authz", "tls-hostname"):
        if key in args and not tls:
            raise UsageError(f"--{key} is not permitted without --tls-creds")
    if "tls-hostname" in args and "list" not in args:
        raise UsageError("TLS hostname is only supported with export list")
    path = args.get("socket")
    if path and theirs and not os.path.isabs(path):
        raise UsageError("socket path must be absolute")


def _listed(args: Args) -> tuple[str, str, str]:
    """Socket, address and port of the server whose exports are listed."""
    if args.operands:
        raise UsageError("List mode is incompatible with a file name")
    if any(key in args for key in _NOT_LISTED) or "connect" in args:
        raise UsageError("List mode is incompatible with per-device settings")
    if "fork" in args:
        raise UsageError("List mode is incompatible with forking")
    if "tls-authz" in args:
        raise UsageError("TLS authorization is incompatible with export list")
    port = args.get("port") or str(DEFAULT_PORT)
    return args.get("socket") or "", args.get("bind") or "localhost", port


def _settings(call: Call, args: Args) -> Settings:
    theirs = call.name.startswith("qemu-nbd")
    several = len(args.operands) > 1
    if not args.operands or (several and theirs):
        raise UsageProblem("Invalid number of arguments")
    discard = args.get("discard") or ("ignore" if theirs else "unmap")
    if discard not in ("ignore", "off", "unmap", "on"):
        raise UsageError(f"Invalid discard mode `{discard}'")
    zeroes = args.get("detect-zeroes") or "off"
    if zeroes not in ("off", "on", "unmap"):
        raise UsageError(f"Failed to parse detect_zeroes mode: invalid parameter value: {zeroes}")
    images, cache = _images(args)
    if args.get("aio") == "native" and cache not in ("none", "off", "directsync"):
        raise UsageError(
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
        )
    inherited = _inherited(args)
    overlay = _overlay(args, several)
    workers = _count(args, "workers", 1, "Invalid number of workers")
    description = os.fsencode(args.get("description") or "")
    if len(description) > NAME_LIMIT:
        raise UsageError(f"export description '{args.get('description')}' too long")
    return Settings(
        images=images,
        gate=gate(args),
        theirs=theirs,
        format=args.get("format"),
        socket=args.get("socket") or "",
        # qemu-nbd listens everywhere; a disk that nobody asked to publish stays at home
        address=args.get("bind") or ("0.0.0.0" if theirs else "localhost"),
        port=args.get("port") or str(DEFAULT_PORT),
        inherited=inherited,
        read_only="read-only" in args or ("load-snapshot" in args and overlay is None),
        persistent="persistent" in args,
        clients=_count(args, "shared", 0 if several else 1, "Invalid shared device number"),
        workers=max(1, min(workers, len(images))),
        description=description,
        cache=cache,
        discard=discard,
        detect_zeroes=zeroes,
        force_share="force-share" in args,
        offset=_offset(args),
        overlay=overlay,
        snapshot=_snapshot(call, args),
        depth="allocation-depth" in args,
        bitmaps=tuple(args.all("bitmap")),
        handshake_seconds=_count(args, "handshake-limit", 10, "Invalid handshake limit") or 1e9,
        background="fork" in args,
        pid_file=args.get("pid-file") or "",
        verbose="verbose" in args,
        secrets=secrets(args),
        tls_creds=args.get("tls-creds") or "",
        tls_authz=args.get("tls-authz") or "",
        metrics=args.get("metrics") or "",
    )


def _images(args: Args) -> tuple[tuple[Image, ...], str]:
    """What is served, and the cache mode."""
    typed = args.operands
    names = args.all("export-name")
    if len(typed) == 1:
        names = names[-1:] or [""]
    elif not names:
        names = [os.path.basename(name) for name in typed]
    elif len(names) != len(typed):
        raise UsageError(f"{len(typed)} images need as many --export-name, not {len(names)}")
    exports = [os.fsencode(name) for name in names]
    for name, export in zip(names, exports, strict=True):
        if len(export) > NAME_LIMIT:
            raise UsageError(f"export name '{name}' too long")
        if exports.count(export) > 1:
            raise UsageError(f"Two exports cannot both be called '{name}': see --export-name")
    cache = "none" if "nocache" in args else "writeback"
    images = []
    for name, export in zip(typed, exports, strict=True):
        reference, cache = served(args, name, cache)
        images.append(Image(name, reference, export))
    return tuple(images), cache


def _overlay(args: Args, several: bool) -> str | None:
    if "overlay" not in args:
        return "" if "snapshot" in args else None
    path = args.get("overlay") or ""
    if path and several:
        raise UsageError("--overlay=FILE is for one image")
    if path and ("load-snapshot" in args or "image-opts" in args):
        raise UsageError("--overlay=FILE is for an image that its name says all about")
    return path


def _inherited(args: Args) -> tuple[Inherited, ...]:
    """The sockets of whoever activated us; only this process is told of them."""
    if "LISTEN_PID" not in os.environ:
        return ()
    from ..export.listening import inherited

    found = tuple(inherited(os.environ, os.getpid()))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    words = {"socket": "Unix socket", "port": "TCP port number", "bind": "The interface"}
    for key, what in words.items():
        if found and key in args:
            raise UsageError(f"{what} can't be set when using socket activation")
    return found


def _snapshot(call: Call, args: Args) -> Selector | None:
    if "load-snapshot" not in args:
        return None
    from .convert import snapshot_of

    return snapshot_of(call, args, "load-snapshot")


def _offset(args: Args) -> int:
    text = args.get("offset")
    if text is None:
        return 0
    from .sizes import BadNumber, number

    try:
        value = number(text)
    except BadNumber:
        raise UsageError(f"Invalid offset '{text}'") from None
    if not 0 <= value < 1 << 63:
        raise UsageError(f"Value '{text}' is out of range for parameter 'offset'")
    return value


def _count(args: Args, key: str, default: int, message: str) -> int:
    text = args.get(key)
    if text is None:
        return default
    from .sizes import BadNumber, number

    try:
        value = number(text, suffixes=False)
    except BadNumber:
        value = -1
    if not 0 <= value < 1 << 31:
        raise UsageError(f"{message} '{text}'")
    return value
