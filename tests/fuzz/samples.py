"""Small images of every kind that a format has, made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from diskwright.abilities import SnapshotInfo
from diskwright.bitmaps import DirtyBitmap
from diskwright.codecs.crc32c import crc32c
from diskwright.contract import WRITE_ZERO
from diskwright.errors import DiskError
from diskwright.formats import luks1
from diskwright.formats.luks1_slots import make_keys, plan_header
from diskwright.formats.vmdk.sesparse.header import new_sesparse
from diskwright.formats.vmdk.sparse.layout import new_cowd, new_hosted
from diskwright.formats.vmdk.stream.writer import StreamOptimized
from diskwright.graph import registry
from fuzz.machine import Hostile, Sample
from fuzz.pages import Pages
from house import tinyvhdx, tinyvmdk
from house.tinyvhdx import FULL, MIB, PARTIAL, ZERO, TinyVhdx

KIB = 1 << 10
KEY = b"abc"
SECRETS = {"secrets": {"s": KEY}}
FORMATS = ("raw", "qcow2", "luks", "vhdx", "vmdk")


@cache
def samples(format: str) -> tuple[Sample, ...]:
    """All kinds of images of ``format``, the plainest first."""
    return tuple(_MAKERS[format]())


def made(
    format: str, size: int, options: dict[str, Any], opening: dict[str, Any], backing: bytes | None
) -> Hostile:
    """A new image, open for writing."""
    driver = registry.driver(format)
    machine = Hostile(Sample(format, "", {"image": b""}, "image", backing=backing), {"image": b""})
    machine.fresh = False
    defaults = {option.name: option.default for option in driver.create_options}
    assert driver.create is not None
    machine.run(driver.create({**defaults, "file-name": "image", "size": size, **options}))
    machine.open(driver, **{"file-name": "image", "writable": True, **opening})
    return machine


def written(machine: Hostile) -> None:
    """Data, zeroes, and whole compressed units, wherever the format can have them."""
    size, unit = machine.format.size, min(machine.format.unit, 128 * KIB)
    for at, length in ((0, 1024), (size // 2 // 512 * 512, 3 * 512), (size - 512, 512)):
        machine.write(at, bytes([65 + length % 26]) * length)
    machine.change(2 * unit, unit, WRITE_ZERO)
    if getattr(machine.format, "pack_codec", None) is not None:
        machine.write_packed(4 * unit, b"squeeze " * (unit // 4))


# -- raw
def _raw() -> Iterator[Sample]:
    yield Sample("raw", "plain", {"image": b"raw " * 1024 + b"end"}, "image")
    window = {"offset": 512, "size": 1024}
    yield Sample("raw", "window", {"image": b"raw " * 1024}, "image", window)


# -- qcow2
def _qcow2() -> Iterator[Sample]:
    def sample(
        name: str,
        story: Callable[[Hostile], None] | None = None,
        size: int = 72 * KIB,
        backing: bytes | None = None,
        opening: dict[str, Any] | None = None,
        **options: Any,
    ) -> Sample:
        options = {"cluster_size": 512, **options}
        opening = opening or {}
        if backing is not None:
            options |= {"backing_file": "base", "backing_fmt": "raw"}
            opening = {"backing": "given"}
        machine = made("qcow2", size, options, opening, backing)
        written(machine)
        machine.flush()
        if story is not None:
            story(machine)
        machine.finish()
        return Sample("qcow2", name, machine.content(), "image", opening, backing)

    yield sample("version 3", cluster_size=4096)
    yield sample("version 2", compat="0.10")
    yield sample("backing file", backing=b"base" * 20_000)
    yield sample("snapshots", _with_snapshots)
    yield sample("bitmaps", _with_bitmaps)
    yield sample("subclusters", size=1 << 20, cluster_size=16384, extended_l2=True)
    yield sample("narrow counts", refcount_bits=1, lazy_refcounts=True)
    yield sample("wide counts", refcount_bits=64, cluster_size=1024)
    yield sample("data file", _unpacked, data_file="data.raw")
    yield sample("raw data file", _unpacked, data_file="data.raw", data_file_raw=True)
    if _there(lambda: made("qcow2", 0, {"compression_type": "zstd"}, {}, None).format.pack_codec):
        yield sample("zstd", compression_type="zstd")
    if _there(_cipher):
        aes = {"encrypt.key-secret": "s", **SECRETS}
        yield sample("AES", opening=aes, **{"encrypt.format": "aes"}, **aes)
        luks = {"encrypt.format": "luks", "cluster_size": 8192}
        yield _short(sample("LUKS", opening=aes, **luks, **aes))


def _with_snapshots(machine: Hostile) -> None:
    for name in ("one", "two"):
        _rest(machine)
        machine.run(machine.format.create_snapshot(SnapshotInfo("", name)))
        machine.write(700, name.encode() * 300)


def _with_bitmaps(machine: Hostile) -> None:
    image = machine.format
    for name, grain in (("old", 512), ("new", 4096)):
        bitmap = DirtyBitmap(name, image.size, grain, persistent=True)
        bitmap.touched = None
        image.bitmaps.add(bitmap)
    image.bitmaps.mark([(0, 5000), (50_000, 60_000)])
    _rest(machine)
    machine.run(image.store_bitmaps())


def _unpacked(machine: Hostile) -> None:
    assert "data-file" in machine.slots


def _rest(machine: Hostile) -> None:
    while machine.store.dirty():
        machine.flush()


# -- luks
_STRIPES = 3
_ROUNDS = 20
"""Of hashing: what is unlocked in no time."""


def _luks() -> Iterator[Sample]:
    if not _there(_cipher):
        return
    opening = {"key-secret": "s", **SECRETS}
    for name, options in {
        "XTS": {"cipher-alg": "aes-128"},
        "CBC, ESSIV": {"cipher-alg": "aes-256", "cipher-mode": "cbc", "ivgen-alg": "essiv"},
    }.items():
        header, key, material = _header(options | opening)
        head = header.encode().ljust(header.slots[0].offset, b"\0") + material
        head = head.ljust(header.payload, b"\0")
        disk = {"image": head + bytes(8 * KIB)}
        yield Sample("luks", name, disk, "image", opening, None, _luks_seal(key, "image", 0))
    head = header._replace(payload=0).encode() + head[luks1.LENGTH :]
    beside = {"image": bytes(8 * KIB), "": head}
    opening = {**opening, "header": "header"}
    yield Sample("luks", "header beside", beside, "image", opening, None, _luks_seal(key, "", 0))


def _header(options: dict[str, Any]) -> tuple[luks1.Header, bytes, bytes]:
    """A header, its key, a slot's key material."""
    header, passphrase = plan_header(options)
    slots = tuple(
        slot._replace(offset=4096 * (1 + n), stripes=_STRIPES)
        for n, slot in enumerate(header.slots)
    )
    header = header._replace(slots=slots, payload=4096 * 9)
    machine = Hostile(Sample("luks", "", {"image": b""}, "image"), {"image": b""})
    header, _, key = machine.run(make_keys(header, passphrase, {"iter-time": 1}))
    header, material = _quick(header, key)
    return header, key, material


def _quick(header: luks1.Header, key: bytes) -> tuple[luks1.Header, bytes]:
    """The same with few rounds, and the material of its first slot."""
    first = header.slots[0]._replace(iterations=_ROUNDS)
    header = header._replace(slots=(first, *header.slots[1:]), digest_iterations=_ROUNDS)
    header = header._replace(digest=luks1.digest_of(header, key))
    return header, luks1.close_slot(header, first, KEY, key)


def _luks_seal(key: bytes, file: str, base: int) -> Any:
    """The digest of the key, and a slot's key material, follow what they are made with."""

    def seal(files: Mapping[str, Pages], changed: list[tuple[str, int, int]]) -> None:
        inside = {at - base for name, at, _ in changed if name == file}
        if not any(at < luks1.LENGTH and not 112 <= at < 132 for at in inside):
            return
        data = files[file]
        try:
            header = luks1.parse(data.read(base, luks1.LENGTH), 1 << 30)
            header.spec.check(header.key_bytes)
            if header.digest_iterations > 5000 or header.key_bytes != len(key):
                return
            header = header._replace(digest=luks1.digest_of(header, key))
            data.write(base + 112, header.digest)
            slot = header.slots[0]
            if slot.active and slot.iterations <= 5000 and slot.stripes <= 64:
                material = luks1.close_slot(header, slot, KEY, key)
                if slot.offset + len(material) <= len(data):
                    data.write(base + slot.offset, material)
        except (DiskError, ValueError):
            return

    return seal


def _short(sample: Sample) -> Sample:
    """A qcow2 image with LUKS inside, whose slots have few stripes."""
    data = bytearray(sample.files["image"])
    at = data.index(luks1.MAGIC)
    header = luks1.parse(bytes(data[at : at + luks1.LENGTH]), 1 << 30)
    first = header.slots[0]
    place = at + first.offset
    material = bytes(data[place : place + header.material(first)])
    key = luks1.open_slot(header, first, KEY, material)
    assert key is not None
    slots = tuple(slot._replace(stripes=_STRIPES) for slot in header.slots)
    header, material = _quick(header._replace(slots=slots), key)
    data[at : at + luks1.LENGTH] = header.encode()
    data[place : place + len(material)] = material
    files = {**sample.files, "image": bytes(data)}
    return sample._replace(files=files, seal=_luks_seal(key, "image", at))


def _cipher() -> Any:
    from diskwright.codecs.aes import library

    return library()


def _there(ask: Callable[[], object]) -> bool:
    """An optional library is there."""
    try:
        return ask() is not None
    except DiskError:
        return False


# -- vhdx
_PARENT = [
    ("parent_linkage", "{11111111-2222-4333-8444-555555555555}"),
    ("relative_path", ".\\base.vhdx"),
    ("absolute_win32_path", "C:\\base.vhdx"),
]


def _vhdx() -> Iterator[Sample]:
    def sample(name: str, backing: bytes | None = None, **options: Any) -> Sample:
        opening = {"backing": None if backing is None else "given"}
        files = {"image": TinyVhdx(**options).data}
        return Sample("vhdx", name, files, "image", opening, backing, vhdx_seal)

    yield sample("dynamic")
    log = {3 * MIB: (4 * MIB | FULL).to_bytes(4096, "little"), 3 * MIB + 4096: None}
    yield sample("a log", log=log)
    blocks = {0: (PARTIAL, b"p"), 1: (FULL, b"f"), 2: (ZERO, b"")}
    yield sample("a parent", b"base" * 9000, parent=_PARENT, blocks=blocks, bitmap={0, 2, 2047})
    yield sample("sectors of 4096", sector=4096)
    yield sample("the largest blocks", size=1 << 40, block=256 * MIB, blocks={1: (ZERO, b"")})
    yield sample("fixed", fixed=True, size=MIB, blocks={0: (FULL, b"f")})


def vhdx_seal(files: Mapping[str, Pages], changed: list[tuple[str, int, int]]) -> None:
    """The checksums of headers, region tables and the entry of the log."""
    data = files["image"]
    for _, at, length in changed:
        for place in (*tinyvhdx.HEADERS, *tinyvhdx.REGIONS, tinyvhdx.LOG):
            if place <= at < place + 64 * KIB and not (at <= place + 4 and length < 64):
                area = 4096 if place in tinyvhdx.HEADERS else 64 * KIB
                if place == tinyvhdx.LOG:
                    area = int.from_bytes(data.read(place + 8, 4), "little")
                if not 8 <= area <= MIB:
                    continue
                body = data.read(place, 4) + bytes(4) + data.read(place + 8, area - 8)
                data.write(place + 4, crc32c(body).to_bytes(4, "little"))


def reseal() -> None:
    """All checksums of VHDX anew."""
    for sample in samples("vhdx"):
        files = {"image": Pages(sample.files["image"])}
        places = (*tinyvhdx.HEADERS, *tinyvhdx.REGIONS, tinyvhdx.LOG)
        vhdx_seal(files, [("image", place, 64) for place in places])
        sample.files["image"] = bytes(files["image"])


# -- vmdk
_TEXT = (
    "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
    'createType="custom"\n{}\nddb.adapterType = "ide"\n'
)


def _vmdk() -> Iterator[Sample]:
    size = 400 * KIB

    def opened(name: str, files: dict[str, bytes], backing: bytes | None = None) -> Sample:
        opening = {"backing": None if backing is None else "given"}
        sample = Sample("vmdk", name, files, "disk.vmdk", opening, backing)
        machine = Hostile(sample, files)
        machine.open(registry.driver("vmdk"), **opening, writable=True)
        if name not in ("stream", "an extent alone"):
            written(machine)
            machine.finish()
        return sample._replace(files=machine.content())

    hosted = {"disk.vmdk": tinyvmdk.hosted(size)}
    yield opened("sparse", hosted)
    over = {"disk.vmdk": tinyvmdk.hosted(size, zeroed=True, parent="base.vmdk")}
    yield opened("zeroed grains over a parent", over, b"base" * 9000)
    yield opened("three entries in a table", {"disk.vmdk": tinyvmdk.hosted(size, 8, 3)})
    yield opened("one directory", {"disk.vmdk": tinyvmdk.hosted(size, copy=False)})
    unclean = bytearray(tinyvmdk.hosted(size))
    unclean[tinyvmdk.UNCLEAN] = 1
    yield opened("not closed", {"disk.vmdk": bytes(unclean)})
    lines = (
        'RW 128 FLAT "a" 8\nRW 128 ZERO\nRW 800 SPARSE "s"\nRW 20 FLAT "a" 200\n'
        'RDONLY 10 FLAT "r" 0\nRW 5 VMFS "v"\nRW 800 VMFSSPARSE "c"\nRW 800 SESPARSE "e"'
    )
    parts = {
        "disk.vmdk": _TEXT.format(lines).encode(),
        "a": bytes(512 * 300),
        "s": _extent(new_hosted("file", 800)),
        "r": b"R" * 5120,
        "v": b"V" * 2560,
        "c": _extent(new_cowd("file", 800)),
        "e": _extent(new_sesparse("file", 800)),
    }
    yield opened("extents of every type", parts)
    text = _TEXT.format(f'RW {size // 512} SPARSE "disk.vmdk"').encode()
    writer = StreamOptimized(size, text.replace(b"custom", b"streamOptimized"), 1)
    stream = b"".join(
        [
            *writer.head(),
            *writer.put(0, writer.codec.pack(b"grain" * 13108)),
            *writer.put(3, writer.codec.pack(b"other" * 13108)),
            *writer.end(),
        ]
    )
    yield opened("stream", {"disk.vmdk": stream})
    yield opened("an extent alone", {"disk.vmdk": parts["c"]})


def _extent(procedure: Any) -> bytes:
    machine = Hostile(Sample("vmdk", "", {"x": b""}, "x"), {"x": b""})
    machine.run(procedure)
    return machine.content()["x"]


_MAKERS: dict[str, Callable[[], Iterator[Sample]]] = {
    "raw": _raw, "qcow2": _qcow2, "luks": _luks, "vhdx": _vhdx, "vmdk": _vmdk,
}  # fmt: skip
