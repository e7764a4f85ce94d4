"""A server that does nothing: the most that this way of serving could reach.

It answers reads with bytes that it made once and forgets writes; it neither maps nor moves data
and blocks on one client at a time.  ``python ceiling.py SOCKET SIZE``
"""

from __future__ import annotations

import socket
import sys

from diskwright.wire import nbd_reply as reply
from diskwright.wire.nbd_batch import Batch, ReceiveBuffer
from diskwright.wire.nbd_handshake import Export
from diskwright.wire.nbd_server import NbdServer


def send(sock: socket.socket, buffers: list[memoryview]) -> None:
    """All of them, in pieces that the kernel takes."""
    while buffers:
        done = sock.sendmsg(buffers[:1024])
        while buffers and done >= len(buffers[0]):
            done -= len(buffers.pop(0))
        if done:
            buffers[0] = buffers[0][done:]


def answer(sock: socket.socket, machine: NbdServer, batch: Batch, headers: object) -> None:
    """One batch."""
    assert isinstance(headers, reply.ReadHeaders)
    for at in range(0, len(batch.read_cookies), reply.HEADERS):
        cookies = batch.read_cookies[at : at + reply.HEADERS]
        lengths = batch.read_lengths[at : at + reply.HEADERS]
        heads = headers.fill(cookies, batch.read_offsets[at : at + reply.HEADERS], lengths)
        buffers: list[memoryview] = [PAYLOAD] * (2 * len(cookies))
        buffers[0::2] = heads
        buffers[1::2] = [PAYLOAD[:length] for length in lengths]
        total = sum(lengths) + len(heads) * len(heads[0])
        done = sock.sendmsg(buffers) if len(buffers) <= 1024 else 0
        if done != total:
            while done:
                size = min(done, len(buffers[0]))
                done -= size
                if size < len(buffers[0]):
                    buffers[0] = buffers[0][size:]
                else:
                    buffers.pop(0)
            send(sock, buffers)
    if batch.write_cookies:
        sock.sendall(reply.done(batch.write_cookies))
        batch.release()
    for other in batch.others:
        sock.sendall(reply.done((other.cookie,)))


def serve(sock: socket.socket, size: int) -> None:
    """One client, until it leaves."""
    try:
        converse(sock, size)
    except OSError:
        pass  # it left without a word


def converse(sock: socket.socket, size: int) -> None:
    """Handshake and requests."""
    machine = NbdServer({b"": Export(b"", size)})
    send(sock, [memoryview(part) for part in machine.take()])
    headers: reply.ReadHeaders | None = None
    while not machine.closed:
        space = machine.space()
        if space is None:
            machine.replace(ReceiveBuffer(machine.wanted))
            continue
        count = sock.recv_into(space)
        if not count:
            return
        batch = machine.received(count)
        out = machine.take()
        if out:
            send(sock, [memoryview(part) for part in out])
        if batch is not None:
            headers = headers or reply.ReadHeaders(machine.mode)
            answer(sock, machine, batch, headers)


PAYLOAD = memoryview(bytes(32 << 20))


def main() -> None:
    """Serve until killed; every client has a process of its own."""
    import os

    path, size = sys.argv[1], int(sys.argv[2])
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    import threading

    assert os.name == "posix"
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        threading.Thread(target=serve, args=(sock, size), daemon=True).start()


if __name__ == "__main__":
    main()
