"""What is fuzzed besides formats: the prober with `inspect`, and the NBD server's parser."""

from __future__ import annotations

import struct
from functools import cache

from diskwright.engine.budget import Budget
from diskwright.errors import ImageError
from diskwright.graph.probe import guess
from diskwright.ops.inspecting.inspector import Inspector, judge
from diskwright.ops.inspecting.window import FileWindow
from diskwright.wire.nbd_batch import ReceiveBuffer
from diskwright.wire.nbd_handshake import Export
from diskwright.wire.nbd_server import NbdServer
from fuzz.samples import FORMATS, samples
from nbd import peer

_LARGEST = 64 << 10


def probe(data: bytes) -> int:
    """The format is guessed, and what a file says of itself is the same at once and as a stream."""
    for writable in (False, True):
        try:
            guess(data[:512], data[-512:], writable)
        except ImageError as error:
            assert str(error)
    inspector = Inspector()
    half = len(data) // 2
    inspector.feed(data[:half])
    inspector.feed(data[half:])
    found = judge(FileWindow(len(data), lambda at, length: data[at : at + length]), "-", Budget())
    streamed = inspector.finish()
    assert streamed.not_seen or streamed == found
    found.to_dict()
    return 1


@cache
def images() -> list[bytes]:
    """The heads of images of all formats, and of some that have no driver."""
    found = [
        data[:_LARGEST]
        for name in FORMATS
        for sample in samples(name)
        for data in sample.files.values()
    ]
    found += [
        struct.pack(">4sIQIIQBBxxIQ", b"QFI\xfb", 1, 48, 8, 0, 1 << 20, 12, 9, 0, 56) + b"base.img",
        b"QED\0" + struct.pack("<IIIQQQQQII", 4096, 4, 1, 1, 0, 0, 4096, 1 << 20, 64, 4) + b"base",
        struct.pack(">8sIIQ", b"conectix", 2, 0x10000, 512).ljust(48, b"\0")
        + struct.pack(">QxxxxI", 1 << 20, 3),
        bytes(510) + b"\x55\xaa" + b"EFI PART",
        bytes(0x8001) + b"CD001",
        b"LUKS\xba\xbe\0\2",
    ]
    return found


def serve(data: bytes) -> int:
    """A client's bytes, in two pieces: the parser takes them, or says why it closes."""
    machine = NbdServer({b"": Export(b"", 1 << 20, description=b"a disk")}, ReceiveBuffer(64 << 10))
    at = 0
    for _ in range(2 * len(data) + 9):
        if at >= len(data) or machine.closed:
            break
        machine.take()
        space = machine.space()
        if space is None:
            assert machine.wanted <= 64 << 20
            machine.replace(ReceiveBuffer(machine.wanted))
            continue
        part = data[at : at + min(len(space), len(data) // 2 + 1)]
        space[: len(part)] = part
        at += len(part)
        batch = machine.received(len(part))
        if batch is not None:
            for cookie, kind in zip(batch.read_offsets, batch.read_lengths, strict=True):
                assert cookie >= 0 and cookie + kind <= 1 << 20
            for offset, payload in zip(batch.write_offsets, batch.payloads, strict=True):
                assert offset >= 0 and offset + len(payload) <= 1 << 20
            batch.release()
    else:
        raise AssertionError("the parser takes nothing")
    return 1


def streams() -> list[bytes]:
    """What clients say."""
    some = peer.request(peer.READ, 1, 0, 4096) + peer.request(peer.WRITE, 2, 512, data=b"x" * 600)
    more = b"".join(
        peer.request(kind, kind, 4096, 512)
        for kind in (peer.FLUSH, peer.TRIM, peer.CACHE, peer.ZERO, peer.STATUS, peer.DISC)
    )
    return [
        peer.opening() + some * 3,
        peer.opening(True, True) + some + more,
        peer.opening(extended=True, allocation=True)
        + peer.wide(peer.READ, 1, 0, 4096)
        + peer.wide(peer.WRITE, 2, 512, data=b"x" * 600)
        + peer.wide(peer.STATUS, 3, 0, 1 << 20),
        struct.pack(">I", 1) + peer.option(peer.EXPORT_NAME) + some,
        struct.pack(">I", 3)
        + peer.option(peer.LIST) + peer.option(peer.INFO, peer.info(b"", [1, 3]))
        + peer.option(peer.LIST_META, peer.meta(b"", b"base:")) + peer.option(peer.ABORT),
    ]  # fmt: skip
