"""``daemon`` (qemu-storage-daemon): disks and exports, under the control of QMP monitors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import DiskError, UsageError
from .images import gate, new_driver, take_budget, take_trace
from .options import BUDGETS, GATE, HELP, METRICS, TRACE, Args, Opt, help_text, parse
from .output import Call, reason

if TYPE_CHECKING:
    from ..engine.kernel import Driver, Task
    from ..export.metrics_server import MetricsServer
    from ..monitor.chardev import Chardev
    from ..monitor.daemon import Daemon

OPTIONS = (
    HELP,
    Opt("V", "version", "", "print the version and exit"),
    TRACE._replace(short="T"),
    Opt("", "blockdev", "DEF", "open a node: [driver=]DRIVER,node-name=NAME[,read-only=on|off]"
        "[,cache.direct=on|off][,...], or JSON"),
    Opt("", "export", "DEF", "export a node: [type=]nbd,id=ID,node-name=NAME[,name=NAME]"
        "[,writable=on|off]; or [type=]fuse,id=ID,node-name=NAME,mountpoint=FILE[,writable=on|off]"
        "[,growable=on|off][,allow-other=on|off|auto]"),
    Opt("", "nbd-server", "DEF", "serve exports: addr.type=unix,addr.path=PATH or addr.type=inet,"
        "addr.host=HOST,addr.port=PORT[,tls-creds=ID][,tls-authz=ID][,max-connections=N]"),
    Opt("", "chardev", "DEF", "socket,id=ID,path=PATH,server=on or stdio,id=ID"),
    Opt("", "monitor", "DEF", "a QMP monitor: [chardev=]ID[,mode=control][,pretty=on|off]"),
    Opt("", "object", "DEF", "define an object: secret,id=ID,file=PATH; tls-creds-x509 or "
        "tls-creds-psk,id=ID,endpoint=server,dir=PATH; authz-simple,id=ID,identity=NAME; "
        "authz-list; authz-listfile; iothread,id=ID"),
    METRICS,
    Opt("", "pidfile", "PATH", "write the daemon's process id there"),
    Opt("", "daemonize", "", "return when all is set up, and go on in the background"),
    *GATE,
    *BUDGETS,
)  # fmt: skip


def main(call: Call, argv: list[str]) -> int:
    """Hold disks until a signal or the command ``quit`` comes."""
    args = parse(argv, OPTIONS)
    if "help" in args:
        summary = "Hold disks and serve them, under the control of QMP monitors."
        call.out(help_text(f"{call.title} [OPTIONS]", summary, OPTIONS), "")
        return 0
    if "version" in args:
        from .main import version

        call.out(version(call.name))
        return 0
    if args.operands:
        raise UsageError(f"{args.operands[0]}: Unexpected argument")
    take_budget(args)
    take_trace(args)
    if "daemonize" in args:
        from .background import in_background

        return in_background(call, lambda ready: hold(args, ready))
    hold(args, lambda: None)
    return 0


def hold(args: Args, ready: Callable[[], None]) -> None:
    """Do what the options say; ``ready`` is called when all is set up."""
    driver = new_driver()
    try:
        driver.run(driver.in_time(_hold(driver, args, ready)))
    finally:
        driver.close()


async def _hold(driver: Driver, args: Args, ready: Callable[[], None]) -> None:
    from ..export.listening import notify
    from ..export.nbd_service import tune_collector, until_signalled
    from ..monitor.daemon import Daemon
    from .background import unlink, write_pid

    daemon = Daemon(driver, gate(args))
    setup = Setup(daemon)
    pidfile = args.get("pidfile")

    async def work() -> None:
        try:
            for key, value in args.options:
                await setup.option(key, value)
            if pidfile is not None:
                write_pid(pidfile)
            notify(os.environ, f"READY=1\nMAINPID={os.getpid()}")
            ready()
        except BaseException:
            daemon.stop()
            await daemon.until_stopped()
            raise
        undo = tune_collector()
        try:
            await daemon.until_stopped()
        finally:
            undo()

    def stop() -> None:
        notify(os.environ, "STOPPING=1")
        daemon.stop()

    try:
        await until_signalled(driver, work(), stop)
    finally:
        await setup.close()
        if pidfile is not None:
            unlink(pidfile)


class Setup:
    """What options make, in their order: each may refer to what those before it made."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.chardevs: dict[str, Chardev] = {}
        self.monitors: list[Task[None]] = []
        self.metrics: list[MetricsServer] = []

    async def option(self, key: str, value: str) -> None:
        """Do what one option says.  Raises UsageError, which tells it."""
        act = getattr(self, f"_{key.replace('-', '_')}", None)
        if act is None:
            return
        try:
            await act(value)
        except (DiskError, OSError) as error:
            text = reason(error).partition("\n")[0]
            raise UsageError(f"--{key} {value}: {text}") from error

    async def close(self) -> None:
        """End the monitors and all others that listen."""
        for server in self.metrics:
            await server.close()
        for task in self.monitors:
            task.cancel()
        for task in self.monitors:
            await task
        for device in self.chardevs.values():
            device.close()

    async def _blockdev(self, text: str) -> None:
        from ..monitor import keyval, nodes
        from ..monitor.blockdev import OPTIONS as NODE

        await nodes.add(self.daemon, keyval.take(NODE, text, "driver"))

    async def _export(self, text: str) -> None:
        from ..monitor import exports, keyval

        await exports.add_export(self.daemon, keyval.take(exports.EXPORT_OPTIONS, text, "type"))

    async def _nbd_server(self, text: str) -> None:
        from ..monitor import keyval, nbdserver

        nbdserver.start_server(self.daemon, keyval.take(nbdserver.SERVER_OPTIONS, text))

    async def _object(self, text: str) -> None:
        from ..monitor import keyval, objects

        objects.define(self.daemon, keyval.take(objects.OBJECT_OPTIONS, text, "qom-type"))

    async def _chardev(self, text: str) -> None:
        from ..monitor.chardev import chardev

        made = chardev(text)
        if made.id in self.chardevs:
            made.close()
            raise UsageError(f"Chardev with id '{made.id}' already exists")
        self.chardevs[made.id] = made

    async def _metrics(self, text: str) -> None:
        from ..export.metrics_server import MetricsServer
        from ..monitor.metrics import gather

        server = MetricsServer(self.daemon.driver, lambda: gather(self.daemon))
        server.listen(text)
        self.metrics.append(server)

    async def _monitor(self, text: str) -> None:
        from ..monitor import all_commands, keyval, types
        from ..monitor.chardev import MonitorOptions, run

        wanted: MonitorOptions = keyval.take(types.of(MonitorOptions), text, "chardev")
        device = self.chardevs.get(wanted.chardev)
        if device is None:
            raise UsageError(f'chardev "{wanted.chardev}" not found')
        all_commands()
        task = self.daemon.driver.spawn(run(self.daemon, device, wanted.pretty), name="monitor")
        self.monitors.append(task)
