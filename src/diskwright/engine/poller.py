"""Waiting for descriptors: epoll itself where there is one, because `selectors` adds about 2 µs
of Python to every wake-up, which is half of what a request at depth one costs."""

from __future__ import annotations

import select
import selectors
import socket
import sys

READ, WRITE = 1, 2

if sys.platform == "linux":

    class Poller:
        """Level-triggered interest in descriptors; masks are READ | WRITE."""

        def __init__(self) -> None:
            self._epoll = select.epoll()

        def set(self, fd: int, mask: int, old: int) -> None:
            """Change the interest in ``fd`` from ``old`` to ``mask`` (0: none)."""
            events = (select.EPOLLIN if mask & READ else 0) | (
                select.EPOLLOUT if mask & WRITE else 0
            )
            if not mask:
                self._epoll.unregister(fd)
            elif old:
                self._epoll.modify(fd, events)
            else:
                self._epoll.register(fd, events)

        def poll(self, timeout: float | None) -> list[tuple[int, int]]:
            """(fd, mask) of what is ready; errors and hang-ups count as both."""
            both = select.EPOLLERR | select.EPOLLHUP
            return [
                (fd, READ | WRITE if ev & both else (ev & select.EPOLLIN) | (ev & 4) >> 1)
                for fd, ev in self._epoll.poll(-1 if timeout is None else timeout)
            ]

        def close(self) -> None:
            self._epoll.close()

else:

    class Poller:
        """Level-triggered interest in descriptors; masks are READ | WRITE."""

        def __init__(self) -> None:
            self._selector = selectors.DefaultSelector()

        def set(self, fd: int, mask: int, old: int) -> None:
            """Change the interest in ``fd`` from ``old`` to ``mask`` (0: none)."""
            if not mask:
                self._selector.unregister(fd)
            elif old:
                self._selector.modify(fd, mask)
            else:
                self._selector.register(fd, mask)

        def poll(self, timeout: float | None) -> list[tuple[int, int]]:
            """(fd, mask) of what is ready."""
            return [(key.fd, events) for key, events in self._selector.select(timeout)]

        def close(self) -> None:
            self._selector.close()


def wake_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets: writing to the second wakes who polls the first (pipes cannot be
    polled on Windows)."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    return reader, writer
