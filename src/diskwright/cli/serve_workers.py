"""``serve --workers``: several images in several processes, behind one address.

Each worker has its own images, and no other opens them.  This process has none: it listens, greets
clients, and hands them over.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..engine.kernel import Driver
from ..errors import DiskError, UsageError
from .images import begin_trace, new_driver
from .output import Call, Reported, reason
from .serve import Settings

if sys.platform == "win32":

    def serve_by_workers(call: Call, settings: Settings, listening: Callable[[], None]) -> None:
        """Raises UsageError: sockets cannot be handed over there."""
        raise UsageError("--workers is not supported on this system")

else:
    from ..export.budget import TOTAL_LIMIT
    from ..export.nbd_front import Front, Worker
    from ..export.nbd_service import tune_collector, until_signalled
    from ..export.nbd_worker import WorkerServer
    from .background import detach
    from .serve_run import LINGER_SECONDS, Disks, listen_and_serve, tls_of

    if TYPE_CHECKING:
        from ..export.metrics_server import MetricsServer
        from ..export.nbd_tls import ServerTls

    def serve_by_workers(call: Call, settings: Settings, listening: Callable[[], None]) -> None:
        """Serve; ``listening`` is called when clients can connect.  Raises what opening raises."""
        tls = tls_of(settings)
        begin_trace()
        workers: list[Worker] = []
        for _ in range(settings.workers):  # before this process has anything that a fork breaks
            workers.append(_fork(call, settings, tls, workers))
        driver = new_driver(worker=0)
        try:
            driver.run(driver.in_time(_front(driver, call, settings, workers, listening)))
        finally:
            driver.close()

    async def _front(
        driver: Driver,
        call: Call,
        settings: Settings,
        workers: list[Worker],
        listening: Callable[[], None],
    ) -> None:
        front = Front(
            driver,
            workers,
            clients=settings.clients,
            persistent=settings.persistent,
            handshake_seconds=settings.handshake_seconds,
            secure=bool(settings.tls_creds),
        )
        failed = False

        def lost(pid: int, status: int) -> None:
            nonlocal failed
            failed = True
            call.error(f"the worker {pid} ended with status {status}; its exports are gone")

        def metrics() -> MetricsServer:
            from ..export.metrics_workers import WorkersMetrics

            return WorkersMetrics(front)

        front.on_lost = lost
        if settings.verbose:
            front.on_left = lambda why: call.error(f"a client left: {why}")
        await front.ready()
        if driver.trace is not None:
            driver.trace.pass_on = front.signal
        try:
            await listen_and_serve(driver, call, settings, front, metrics, listening)
        finally:
            await front.shut_down()
        if failed:
            raise Reported(call.failure)

    def _fork(
        call: Call, settings: Settings, tls: ServerTls | None, before: list[Worker]
    ) -> Worker:
        ours, theirs = socket.socketpair()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pid = os.fork()
        if pid:
            theirs.close()
            return Worker(pid, ours)
        status = 1
        try:
            ours.close()
            for worker in before:
                worker.channel.close()
            for one in settings.inherited:
                one.listener.close()
            status = _work(call, settings, tls, len(before), theirs)
        finally:
            os._exit(status)

    def _work(
        call: Call, settings: Settings, tls: ServerTls | None, place: int, channel: socket.socket
    ) -> int:
        driver = new_driver(worker=place + 1)
        driver.linger = LINGER_SECONDS
        status = 0

        async def work() -> None:
            nonlocal status
            server = WorkerServer(
                driver,
                channel,
                settings.clients,
                budget=TOTAL_LIMIT // settings.workers,
                handshake_seconds=settings.handshake_seconds,
                tls=tls,
            )
            disks = Disks(driver, call, settings)
            try:
                try:
                    await disks.offer(server, settings.images[place :: settings.workers])
                except (OSError, DiskError) as error:
                    status = 1
                    await server.fail(reason(error))
                    return
                if settings.metrics:
                    from ..export.metrics_server import of_exports

                    server.gather = lambda: of_exports(server)
                if settings.background:
                    detach()
                undo = tune_collector()
                try:
                    await until_signalled(driver, server.serve_handed(), server.stop)
                finally:
                    undo()
            finally:
                await disks.close()

        try:
            driver.run(driver.in_time(work()))
        except (OSError, DiskError) as error:
            call.error(reason(error))
            status = 1
        finally:
            driver.close()
        return status
