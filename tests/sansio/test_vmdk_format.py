"""VMDK images of many extents, by bytes alone: parts, access, identifiers, links, sizes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from diskwright.contract import DISCARD, WRITE_ZERO, ZERO_UNMAP
from diskwright.errors import (
    CorruptImage,
    ImageError,
    MalformedImage,
    NoSpace,
    NotSupported,
    UnsupportedFeature,
    UsageError,
)
from diskwright.extents import Data, Zero
from diskwright.formats import vmdk
from diskwright.formats.vmdk import cid, creation
from diskwright.formats.vmdk.descriptor import parse
from diskwright.formats.vmdk.sparse.layout import new_hosted
from sansio.files import Crash, Files

SECTOR = 512
MIB = 1 << 20
HEAD = '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={}\ncreateType="{}"\n'


def head(lines: str, create_type: str = "custom", parent: str = "ffffffff") -> bytes:
    return (HEAD.format(parent, create_type) + lines).encode()


def opened(files: dict[str, bytes], backing: bytes | None = None, **options: Any) -> Files:
    machine = Files(files, backing=backing)
    if backing is not None:
        options["backing"] = "given"
    options.setdefault("writable", True)
    machine.open(vmdk.DRIVER, **{"file-name": "disk.vmdk", **options})
    return machine


def made(size: int, **options: Any) -> dict[str, bytes]:
    machine = Files({})
    machine.run(creation.create_image({"size": size, "file-name": "dir/disk.vmdk", **options}))
    return machine.content()


def sparse(sectors: int) -> bytes:
    machine = Files({"x": b""}, "x")
    machine.run(new_hosted("file", sectors))
    return bytes(machine.slots["file"])


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extents of 1 MiB instead of 2 GiB."""
    monkeypatch.setattr(creation, "SPLIT", MIB)
    from diskwright.formats.vmdk import resizing

    monkeypatch.setattr(resizing, "SPLIT", MIB)


# -- parts
def mixed() -> dict[str, bytes]:
    """Flat, zero, sparse, a second window of the flat file, read-only; sparse on its grain."""
    return {
        "disk.vmdk": head(
            'RW 128 FLAT "a" 8\nRW 128 ZERO\nRW 300 SPARSE "s"\nRW 20 FLAT "a" 200\n'
            'RDONLY 10 FLAT "r" 0\nRW 5 VMFS "v"\n'
        ),
        "a": bytes(range(256)) * 2 * 300,
        "s": sparse(300),
        "r": b"R" * 5120,
        "v": b"V" * 2560,
    }


def test_extents_of_all_kinds_in_their_order() -> None:
    files = mixed()
    machine = opened(files)
    image = machine.format
    a = files["a"]
    want = (
        a[8 * 512 : 136 * 512] + bytes(128 * 512) + bytes(300 * 512)
        + a[200 * 512 : 220 * 512] + files["r"] + files["v"]
    )  # fmt: skip
    assert image.size == len(want)
    assert machine.read(0, len(want)) == want
    assert image.unit == 65536
    content = bytearray(want)
    rng = random.Random(3)
    for _ in range(60):
        offset = rng.randrange(len(want) - 5120)
        length = min(rng.randrange(1, 40000), len(want) - offset)
        data = rng.randbytes(length)
        barred = [(128 * 512, 256 * 512), (576 * 512, 586 * 512)]
        if any(offset < end and offset + length > start for start, end in barred):
            with pytest.raises(PermissionError):
                machine.write(offset, data)
            continue
        machine.write(offset, data)
        content[offset : offset + length] = data
        assert machine.read(0, len(want)) == content
    machine.close()
    again = opened(machine.content(), writable=False)
    assert again.read(0, len(want)) == content
    assert machine.content()["r"] == files["r"]


def test_a_discard_passes_over_what_may_not_be_written() -> None:
    machine = opened(mixed())
    size = machine.format.size
    before = machine.read(576 * 512, 5120)
    assert machine.change(0, size, DISCARD)
    assert machine.read(576 * 512, 5120) == before
    with pytest.raises(PermissionError):
        machine.change(576 * 512, 512, WRITE_ZERO)
    assert machine.change(128 * 512, 65536, ZERO_UNMAP)  # zeroes where zeroes are


def test_read_only_data_is_never_called_writable() -> None:
    machine = opened(mixed())
    machine.write(0, b"x")
    assert machine.format.ready
    found = dict(machine.extents(0, machine.format.size))
    assert [e for at, e in found.items() if at == 576 * 512] == [Data("extent.4", 0, 5120, False)]
    assert found[0] == Data("extent.0", 4096, 65536, True)


def test_what_may_not_be_accessed() -> None:
    machine = opened({"disk.vmdk": head('RW 8 FLAT "a" 0\nNOACCESS 8 FLAT "gone" 0\n'),
                      "a": b"A" * 4096})  # fmt: skip
    assert machine.opened == [("a", None)]
    assert machine.read(0, 4096) == b"A" * 4096
    with pytest.raises(PermissionError, match="gone"):
        machine.read(4096, 1)
    extents, miss = machine.format.map([(0, 8192)])
    assert (len(extents), miss) == (1, None)
    result = machine.run(machine.format.check())
    assert (result.corruptions, result.uncovered) == (0, ["extent 1 may not be read"])


def test_extents_that_do_not_begin_on_a_grain() -> None:
    """One lease for everything, and the right bytes."""
    machine = opened({"disk.vmdk": head('RW 63 FLAT "a" 0\nRW 1000 SPARSE "s"\nRW 7 ZERO\n'),
                      "a": b"A" * 63 * 512, "s": sparse(1000)})  # fmt: skip
    image = machine.format
    assert image.unit >= image.size and not image.unit & (image.unit - 1)
    rng = random.Random(1)
    content = bytearray(b"A" * 63 * 512 + bytes(1007 * 512))
    for _ in range(30):
        offset = rng.randrange(1063 * 512)
        data = rng.randbytes(min(rng.randrange(1, 90000), 1063 * 512 - offset))
        machine.write(offset, data)
        content[offset : offset + len(data)] = data
    assert machine.read(0, image.size) == content
    machine.close()
    assert opened(machine.content()).read(0, image.size) == content


@pytest.mark.parametrize(
    "lines, error, says",
    [
        ("", MalformedImage, "no extents"),
        ('RW 9 FLAT "a" 0\n', CorruptImage, "only 4096 bytes"),
        ('RW 8 FLAT "a" 1\n', CorruptImage, "4608"),
        ('RW 8 FLAT "nofile" 0\n', FileNotFoundError, "nofile"),
        ('RW 8 SPARSE "a"\n', MalformedImage, "a: not a sparse"),
        ('RW 301 SPARSE "s"\n', MalformedImage, "300 sectors"),
        ('RW 8 SPARSE "s" 8\n', MalformedImage, "line 6"),
        ('RW 100 SPARSE "s"\nRW 100 SPARSE "s"\n', MalformedImage, "line 7"),
        ('RW 100 FLAT "s" 0\nRW 100 SPARSE "s"\n', MalformedImage, "line 7"),
    ],
)
def test_broken_descriptors(lines: str, error: type[Exception], says: str) -> None:
    files = {"disk.vmdk": head(lines), "a": bytes(4096), "s": sparse(300)}
    with pytest.raises(error, match=says):
        opened(files)


def test_a_short_extent_can_be_checked() -> None:
    machine = opened({"disk.vmdk": head('RW 9 FLAT "a" 0\n'), "a": bytes(4096)}, check=True)
    assert machine.run(machine.format.check()).corruptions == 1


def test_an_empty_extent_is_no_part() -> None:
    machine = opened({"disk.vmdk": head('RW 0 FLAT "none" 0\nRW 8 FLAT "a" 0\nRW 0 ZERO\n'),
                      "a": b"A" * 4096})  # fmt: skip
    assert machine.read(0, 4096) == b"A" * 4096
    assert made(0, subformat="monolithicFlat")["disk-flat.vmdk"] == b""
    assert opened(made(0, subformat="twoGbMaxExtentFlat")).format.size == 0


# -- one file
def test_an_extent_by_itself_is_only_read() -> None:
    machine = opened({"disk.vmdk": sparse(300)})
    assert machine.read(0, 300 * 512) == bytes(300 * 512)
    assert machine.format.identity is None and machine.format.backing_file is None
    with pytest.raises(PermissionError, match="descriptor"):
        machine.write(0, b"x")
    with pytest.raises((NotSupported, PermissionError)):
        machine.run(machine.format.change_backing("x", "vmdk", "00000001"))


def test_the_embedded_descriptor_is_about_its_own_file() -> None:
    files = made(3 * MIB)
    moved = {"disk.vmdk": files["disk.vmdk"].replace(b'SPARSE "disk.vmdk"', b'SPARSE "../etc/x"')}
    machine = opened(moved)
    assert machine.opened == []
    machine.write(5, b"hello")
    assert machine.read(0, 20) == b"\0" * 5 + b"hello" + b"\0" * 10
    several = files["disk.vmdk"].replace(b"\n\n# The Disk", b'\nRW 1 FLAT "b" 0\n#')
    with pytest.raises(UnsupportedFeature, match="several"):
        opened({"disk.vmdk": several})


def test_a_capacity_that_was_rounded_up_to_the_grain() -> None:
    file = bytearray(made(3 * MIB)["disk.vmdk"])
    text = file.replace(b"RW 6144 SPARSE", b"RW 6100 SPARSE")
    assert opened({"disk.vmdk": bytes(text)}).format.size == 6100 * 512
    text = file.replace(b"RW 6144 SPARSE", b"RW 1000 SPARSE")
    assert opened({"disk.vmdk": bytes(text)}).format.size == 3 * MIB


# -- identifiers
def test_a_new_content_identifier_precedes_the_first_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([b"\xff" * 4, b"\xfe\xff\xff\xff", b"\0" * 4, b"\x0d\xd0\xca\xab"])
    monkeypatch.setattr(cid, "random_bytes", lambda count: next(answers))
    machine = opened({"disk.vmdk": head('RW 8 FLAT "a" 0\n'), "a": b"A" * 4096})
    image = machine.format
    assert image.identity == "12345678" and not image.ready
    assert [e.writable for _, e in machine.extents(0, 4096)] == [False]
    machine.fail_after = 1  # the identifier, and then nothing more
    with pytest.raises(Crash):
        machine.write(0, b"x")
    assert b"CID=abcad00d" in machine.content()["disk.vmdk"]
    assert machine.content()["a"] == b"A" * 4096
    machine.fail_after = -1
    machine.write(0, b"y")
    assert image.identity == "abcad00d"
    assert machine.content()["disk.vmdk"] == head('RW 8 FLAT "a" 0\n').replace(
        b"12345678", b"abcad00d"
    )


def test_reading_and_closing_changes_nothing() -> None:
    files = made(MIB)
    machine = opened(files)
    machine.read(0, MIB)
    machine.flush()
    assert machine.format.close() is None
    assert machine.content() == files


def test_an_identifier_of_seven_digits_moves_nothing() -> None:
    """QEMU leaves leading zeroes out; a descriptor that moves could be torn."""
    raw = head('RW 8 FLAT "a" 0\n').replace(b"12345678", b"abcdef1")
    machine = opened({"disk.vmdk": raw, "a": bytes(4096)})
    machine.write(0, b"x")
    now = machine.content()["disk.vmdk"]
    assert len(now) == len(raw) and now.replace(machine.format.identity[1:].encode(), b"") != now
    assert f"{parse(now).cid:08x}" == machine.format.identity


def test_a_short_identifier_gets_its_digits() -> None:
    files = {"disk.vmdk": head('RW 8 FLAT "a" 0\n').replace(b"12345678", b"7"), "a": bytes(4096)}
    machine = opened(files)
    machine.write(0, b"x")
    text = parse(machine.content()["disk.vmdk"])
    assert f"{text.cid:08x}" == machine.format.identity
    assert text.extents[0].name == "a"


def test_no_room_for_a_longer_descriptor() -> None:
    files = made(MIB, backing_file="base.vmdk", backing_fmt="vmdk", backing_identity="000000aa")
    machine = opened(files, backing=bytes(MIB))
    with pytest.raises(NoSpace, match="descriptor"):
        machine.run(machine.format.change_backing("x" * 20000, "vmdk", "000000bb"))
    assert machine.format.backing_file == "base.vmdk"
    assert machine.content() == files


# -- links
@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse", "vmfsSparse"])
def test_delta_links(subformat: str) -> None:
    base = random.Random(1).randbytes(MIB)
    files = made(MIB, subformat=subformat, backing_file="b/base.vmdk", backing_identity="0dd0feed")
    machine = Files(files)
    machine.open(vmdk.DRIVER, writable=True)
    assert machine.opened[-1] == ("b/base.vmdk", "vmdk")
    machine = opened(files, backing=base)
    image = machine.format
    assert image.backing_file == "b/base.vmdk" and image.backing_names == ["b/base.vmdk"]
    assert image.backing_format == "vmdk" and image.parent_identity == "0dd0feed"
    machine.write(1000, b"new")
    assert machine.read(0, MIB) == base[:1000] + b"new" + base[1003:]
    machine.flush()
    machine.run(image.change_backing("other.vmdk", "vmdk", "00000005"))
    assert (image.backing_file, image.parent_identity) == ("other.vmdk", "00000005")
    machine.run(image.change_backing("third.vmdk", None))
    assert image.parent_identity == "00000005"
    with pytest.raises(UsageError):
        machine.run(image.change_backing("x.raw", "raw", "00000001"))
    machine.close()
    again = opened(machine.content(), backing=base)
    assert again.format.backing_file == "third.vmdk"
    assert again.read(0, MIB) == base[:1000] + b"new" + base[1003:]
    again.run(again.format.make_empty())
    assert again.read(0, MIB) == base
    again.write(7, b"z")
    assert again.read(0, 9) == base[:7] + b"z" + base[8:9]
    again.close()
    assert opened(again.content(), backing=base).read(0, MIB) == base[:7] + b"z" + base[8:]
    again = opened(again.content(), backing=base)
    again.run(again.format.change_backing(None, None))
    assert again.format.backing_file is None and again.format.parent_identity is None
    assert parse(_text(again.content())).parent_cid == 0xFFFFFFFF


def _text(files: dict[str, bytes]) -> bytes:
    file = files["disk.vmdk"]
    return file[512:] if file[:4] == b"KDMV" else file


def test_a_parent_without_a_name_is_refused_and_a_name_without_a_parent_is_none() -> None:
    lines = 'RW 8 FLAT "a" 0\n'
    with pytest.raises(MalformedImage, match="parent"):
        opened({"disk.vmdk": head(lines, parent="00000001"), "a": bytes(4096)})
    machine = Files({"disk.vmdk": head(lines, parent="00000001"), "a": bytes(4096)})
    machine.open(vmdk.DRIVER, backing=None)
    files = {"disk.vmdk": head('parentFileNameHint="p"\n' + lines), "a": bytes(4096)}
    assert opened(files).format.backing_file is None


# -- creation
@pytest.mark.parametrize(
    "options, says",
    [
        ({"subformat": "bogus"}, "invalid parameter value: bogus"),
        ({"adapter_type": "IDE"}, "invalid parameter value: IDE"),
        ({"compat6": True, "hwversion": "5"}, "compat6 cannot be enabled with hwversion set"),
        ({"subformat": "monolithicFlat", "zeroed_grain": True}, "Flat image can't enable"),
        ({"subformat": "vmfs", "backing_file": "x"}, "Flat image can't have backing file"),
        ({"backing_file": "x", "backing_fmt": "raw"}, "backing_file must be a vmdk image"),
        ({"backing_file": "x"}, "content identifier"),
        ({"backing_file": 'x"', "backing_identity": "00000001"}, "cannot be written"),
        ({"hwversion": "4\nCID=1"}, "cannot be written"),
        ({"preallocation": "full"}, "Preallocation"),
        ({"size": None}, "size"),
        ({"size": 1 << 50, "subformat": "twoGbMaxExtentFlat"}, "4096 extents"),
    ],
)
def test_create_options_that_do_not_go(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        next(creation.create_image({"size": MIB, "file-name": "d.vmdk", **options}))


def test_names_of_extents() -> None:
    for own, name in (
        ("x.vmdk", "x-s001.vmdk"),
        ("x", "x-s001"),
        ("y.foo.bar", "y.foo-s001.bar"),
        ("d.d/x", "x-s001"),
        ("C:\\d.d\\x.vmdk", "x-s001.vmdk"),
    ):
        wanted = creation.check_options(
            {"size": MIB, "file-name": own, "subformat": "twoGbMaxExtentSparse"}
        )
        assert [line.name for line in wanted.extents] == [name]


@pytest.mark.usefixtures("split")
def test_a_split_image_is_cut_at_the_border() -> None:
    files = made(3 * MIB + 512, subformat="twoGbMaxExtentFlat")
    assert {n: len(d) for n, d in files.items() if n != "disk.vmdk"} == {
        "disk-f001.vmdk": MIB, "disk-f002.vmdk": MIB, "disk-f003.vmdk": MIB, "disk-f004.vmdk": 512,
    }  # fmt: skip


# -- sizes
KINDS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat",
         "vmfs", "vmfsSparse"]  # fmt: skip


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("subformat", KINDS)
@pytest.mark.parametrize("backed", [False, True])
def test_resizing(subformat: str, backed: bool) -> None:
    flat = subformat.endswith("Flat") or subformat == "vmfs"
    if backed and flat:
        return
    rng = random.Random(subformat)
    options: dict[str, Any] = {"subformat": subformat}
    base = rng.randbytes(8 * MIB) if backed else None
    if backed:
        options |= {"backing_file": "b.vmdk", "backing_identity": "00000001"}
        options["zeroed_grain"] = subformat == "twoGbMaxExtentSparse"
    size = 2 * MIB + 1536
    files = made(size, **options)
    content = bytearray((base or bytes(size))[:size])
    machine = opened(files, base)
    for new in (size + 512, 5 * MIB, 3 * MIB + 4096, MIB, 9 * MIB, 9 * MIB + 1024, 512, 3 * MIB):
        for _ in range(4):
            offset = rng.randrange(size)
            data = rng.randbytes(min(rng.randrange(1, 70000), size - offset))
            machine.write(offset, data)
            content[offset : offset + len(data)] = data
        machine.flush()
        machine.run(machine.format.resize(new, shrink=new < size))
        content = bytearray(content[:new].ljust(new, b"\0"))
        size = new
        assert machine.format.size == size
        assert machine.read(0, size) == content, new
        if rng.random() < 0.5:
            machine.close()
            kept = {k: bytes(v) for k, v in machine.files.items()}
            machine = opened(kept, base)
            assert machine.format.size == size
            assert machine.read(0, size) == content, new
    machine.close()
    result = machine.run(machine.format.check())
    assert result.corruptions == 0, [x for x in result.findings if "ERROR" in x]


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("subformat", KINDS)
@pytest.mark.parametrize("new", [7 * MIB, 700_000 // 512 * 512])
def test_a_crash_while_resizing_leaves_one_size_or_the_other(subformat: str, new: int) -> None:
    size = 2 * MIB + 1536
    files = made(size, subformat=subformat)
    machine = opened(files)
    data = random.Random(2).randbytes(size)
    machine.write(0, data[:500_000])
    machine.write(size - 1000, data[-1000:])
    machine.close()
    content = machine.read(0, size)
    files = machine.content()
    step = 0
    while True:
        machine = opened(files)
        machine.fail_after = step
        try:
            machine.run(machine.format.resize(new, shrink=True))
        except Crash:
            again = opened(machine.content())
            assert again.format.size in (size, new)
            keep = min(new, 500_000)
            assert again.read(0, keep) == content[:keep]
            if again.format.size == new > size:
                assert again.read(0, new) == content.ljust(new, b"\0")
            result = again.run(again.format.check())
            assert result.corruptions == 0, [x for x in result.findings if "ERROR" in x]
            step += 1
            assert step < 500
            continue
        break
    assert step > 2


@pytest.mark.parametrize("subformat", ["monolithicSparse", "vmfsSparse"])
def test_directories_move_when_they_must(subformat: str) -> None:
    size = 3 << 30
    machine = opened(made(size, subformat=subformat))
    marks = [0, 12345, 1 << 30, size - 512]
    for mark in marks:
        machine.write(mark, b"%012d" % mark)
    machine.flush()
    for new in (5 << 30, 13 << 30, 12 << 30, 200 << 30):
        machine.run(machine.format.resize(new, shrink=True))
        machine.write(new - 512, b"%012d" % new)
        machine.flush()
        marks = [mark for mark in marks if mark < new] + [new - 512]
        for mark in marks:
            assert int(machine.read(mark, 12)) in (mark, mark + 512), new
    machine.close()
    assert machine.format.size == 200 << 30
    again = opened(machine.content())
    assert int(again.read((200 << 30) - 512, 12)) == 200 << 30
    assert again.read((13 << 30) - 512, 12) == bytes(12)
    result = again.run(again.format.check())
    assert result.corruptions == 0, [x for x in result.findings if "ERROR" in x]


def test_sizes_that_do_not_go() -> None:
    machine = opened(made(2 * MIB))
    for size, shrink in ((MIB, False), (MIB + 1, True), (0, True)):
        with pytest.raises(UsageError):
            machine.run(machine.format.resize(size, shrink=shrink))
    stream = opened(made(2 * MIB, subformat="streamOptimized"))
    with pytest.raises((NotSupported, UnsupportedFeature)):
        stream.run(stream.format.resize(4 * MIB))
    assert stream.format.size == 2 * MIB


def test_a_growing_image_takes_no_file_that_is_there(split: None) -> None:
    files = made(MIB, subformat="twoGbMaxExtentSparse")
    files["disk-s002.vmdk"] = b"precious"
    machine = opened(files)
    machine.run(machine.format.resize(2 * MIB))
    assert machine.content()["disk-s002.vmdk"] == b"precious"
    assert b'SPARSE "disk-s003.vmdk"' in machine.content()["disk.vmdk"]


# -- hostile
@pytest.mark.parametrize("seed", range(30))
def test_damaged_images_raise_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    files = mixed() if seed % 2 else made(3 * MIB)
    for _ in range(12):
        damaged = dict(files)
        name = rng.choice(["disk.vmdk", *files])
        raw = bytearray(damaged[name])
        for _ in range(rng.randrange(1, 6)):
            raw[rng.randrange(min(len(raw), 2048))] = rng.randrange(256)
        damaged[name] = bytes(raw)
        try:
            machine = opened(damaged)
            size = machine.format.size
            for offset in (0, size // 2, max(size - 4096, 0)):
                machine.read(offset, min(4096, size - offset))
                machine.write(offset, bytes(min(4096, size - offset)))
            machine.close()
        except (ImageError, OSError, NotSupported):
            pass


def test_zero_extents_hide_a_parent() -> None:
    machine = opened({"disk.vmdk": head("RW 8 ZERO\n")}, backing=b"B" * 4096)
    assert machine.read(0, 4096) == bytes(4096)
    assert [e for _, e in machine.extents(0, 4096)] == [Zero(4096)]


def test_memory_is_bounded_over_all_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    from diskwright.formats.vmdk import opening

    files = {"disk.vmdk": head("".join(f'RW 300 SPARSE "s{i}"\n' for i in range(9)))}
    files |= {f"s{i}": sparse(300) for i in range(9)}
    weight = opened(files).format.parts[0].weight
    monkeypatch.setattr(opening, "MAX_TABLES", 4 * weight)
    machine = Files(files)
    with pytest.raises(UnsupportedFeature, match="directories"):
        machine.open(vmdk.DRIVER)
    assert len(machine.opened) == 5


def test_a_resize_is_a_new_content() -> None:
    for subformat in ("monolithicSparse", "monolithicFlat"):
        machine = Files(made(MIB, subformat=subformat))
        format = machine.open(vmdk.DRIVER, writable=True)
        known = {format.identity}
        for size, shrink in ((2 * MIB, False), (MIB, True)):
            machine.run(format.resize(size, shrink=shrink))
            assert format.identity not in known or shrink
        known.add(format.identity)
        machine = Files(machine.content())
        assert machine.open(vmdk.DRIVER, writable=False).identity == format.identity
        assert len(known) == 2


def test_what_cannot_be_resized_keeps_every_byte() -> None:
    files = made(MIB, subformat="seSparse")
    machine = Files(files)
    format = machine.open(vmdk.DRIVER, writable=True)
    with pytest.raises(NotSupported, match="room for"):
        machine.run(format.resize(1 << 50))
    assert machine.content() == files


@pytest.mark.parametrize(
    "name", ['q"q.vmdk', "a\nb", "\xfc \u65e5.vmdk", ".vmdk", "x" * 240, "it's =#"]
)
def test_an_image_in_one_file_may_have_any_name(name: str) -> None:
    made = Files({}, name)
    made.run(creation.create_image({"size": MIB, "file-name": f"dir/{name}"}))
    assert Files(made.content(), name).open(vmdk.DRIVER, writable=True).size == MIB
    if set(name) & set('"\n'):
        with pytest.raises(UsageError, match="descriptor"):
            options = {"size": MIB, "file-name": name, "subformat": "monolithicFlat"}
            made.run(creation.create_image(options))
