"""``serve --workers``: several images in several processes, behind one address.

Each worker has its own images, and no other opens them.  This process has none: it listens, greets
clients, and hands them over.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

from ..engine.kernel import Driver
from ..errors import DiskError, UsageError
from .images import new_driver
from .output import Call, Reported, reason
from .serve import Image, Settings

if sys.platform == "win32":

    def serve_by_workers(call: Call, settings: Settings, listening: Callable[[], None]) -> None:
        """Raises UsageError: sockets cannot be handed over there."""
        raise UsageError("--workers is not supported on this system")

else:
    from ..export.budget import TOTAL_LIMIT
    from ..export.nbd_front import Front, Worker, WorkerServer
    from ..export.nbd_service import tune_collector, until_signalled
    from .background import detach
    from .serve_run import LINGER_SECONDS, Disks, listen_and_serve

    def serve_by_workers(call: Call, settings: Settings, listening: Callable[[], None]) -> None:
        """Serve; ``listening`` is called when clients can connect.  Raises what opening raises."""
        workers: list[Worker] = []
        for i in range(settings.workers):  # before this process has anything that a fork breaks
            workers.append(_fork(call, settings, settings.images[i :: settings.workers], workers))
        driver = new_driver()
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
        )
        failed = False

        def lost(pid: int, status: int) -> None:
            nonlocal failed
            failed = True
            call.error(f"the worker {pid} ended with status {status}; its exports are gone")

        front.on_lost = lost
        await front.ready()
        try:
            await listen_and_serve(driver, call, settings, front, listening)
        finally:
            await front.shut_down()
        if failed:
            raise Reported(call.failure)

    def _fork(
        call: Call, settings: Settings, images: tuple[Image, ...], before: list[Worker]
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
            status = _work(call, settings, images, theirs)
        finally:
            os._exit(status)

    def _work(
        call: Call, settings: Settings, images: tuple[Image, ...], channel: socket.socket
    ) -> int:
        driver = new_driver()
        driver.linger = LINGER_SECONDS
        budget = TOTAL_LIMIT // settings.workers
        status = 0

        async def work() -> None:
            nonlocal status
            server = WorkerServer(driver, channel, settings.clients, budget)
            disks = Disks(driver, call, settings)
            try:
                try:
                    await disks.offer(server, images)
                except (OSError, DiskError) as error:
                    status = 1
                    await server.tell(reason(error))
                    return
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
