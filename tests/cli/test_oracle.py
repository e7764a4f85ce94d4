"""Every verb beside the real qemu-img: the same arguments in two copies of one directory, the same
output, exit status and content."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.support import Pair, real

Peer = Callable[[str], str]
KIB, MIB = 1 << 10, 1 << 20


def fill(path: Path, *ranges: tuple[int, int, int]) -> None:
    with open(path, "r+b") as file:
        for offset, length, byte in ranges:
            file.seek(offset)
            file.write(bytes([byte]) * length)


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> Path:
    """The images that every test has a copy of."""
    img, io = peer("qemu-img"), peer("qemu-io")
    folder = tmp_path_factory.mktemp("origin")

    def run(folder: Path, tool: str, *args: str) -> None:
        subprocess.run([tool, *args], cwd=folder, check=True, capture_output=True)

    for name, size in (("a.raw", 4), ("same.raw", 4), ("long.raw", 8), ("late.raw", 8)):
        (folder / name).write_bytes(b"")
        os.truncate(folder / name, size * MIB)
    fill(folder / "a.raw", (0, 4096, 1), (MIB, 100 * KIB, 2), (700 * KIB + 700, 1, 3))
    fill(folder / "same.raw", (0, 4096, 1), (MIB, 100 * KIB, 2), (700 * KIB + 700, 1, 3))
    fill(folder / "late.raw", (5_000_000, 1, 9))
    (folder / "odd.raw").write_bytes(b"odd" + bytes(997))
    (folder / "empty").write_bytes(b"")
    (folder / "junk").write_bytes(b"hi\n")
    (folder / "sub").mkdir()
    run(folder, img, "create", "-q", "-f", "qcow2", "base.qcow2", "4M")
    run(folder, io, "-c", "write -P 5 0 1M", "-c", "write -z 2M 1M", "base.qcow2")
    run(folder, img, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2",
        "mid.qcow2")  # fmt: skip
    run(folder, io, "-c", "write -P 6 512k 100k", "-c", "write -P 7 2560k 64k", "mid.qcow2")
    run(folder, img, "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2",
        "top.qcow2")  # fmt: skip
    run(folder, io, "-c", "write -P 8 3M 4k", "-c", "write -z 256k 64k", "top.qcow2")
    run(folder, img, "create", "-q", "-f", "qcow2", "-b", "../a.raw", "-F", "raw",
        "sub/over.qcow2")  # fmt: skip
    run(folder, img, "create", "-q", "-f", "qcow2", "target.qcow2", "4M")
    run(folder, io, "-c", "write -P 9 0 4M", "target.qcow2")
    run(folder, img, "create", "-q", "-f", "qcow2", "small.qcow2", "1M")
    run(folder, img, "create", "-q", "-f", "qcow2", "room.qcow2", "4M")
    leaky = folder / "leaky.qcow2"
    leaky.write_bytes((folder / "mid.qcow2").read_bytes())
    fill(leaky, (0x40000, 8, 0))
    return folder


@pytest.fixture
def pair(tmp_path: Path, peer: Peer, origin: Path) -> Pair:
    return Pair(tmp_path, peer("qemu-img"), origin)


READ_ONLY = """
info top.qcow2
info --output=json top.qcow2
info --backing-chain top.qcow2
info -b --output json top.qcow2
info -U sub/over.qcow2
info --output=json sub/over.qcow2
info odd.raw
info --output=json odd.raw
info empty
info null-co://
info --output=json null-co://
info -f raw base.qcow2
info sub
info nonexistent
info
info a b
info --output=xml a.raw
info -f
info --format
info --for x
info -Z x
info --backing-chain=3 x
info -f foo a.raw
info foo:bar
info nbd://127.0.0.1:1/disk
info nbd+unix:///disk?socket=/nonexistent/socket
info --image-opts driver=nbd
info --image-opts driver=nbd,path=/x,host=y
info json:{}
info json:[]
info --image-opts foo
info --image-opts driver=raw
info --image-opts -f raw a.raw
info --image-opts driver=qcow2,file.filename=base.qcow2
info --image-opts driver=compress
info --image-opts driver=compress,file.filename=base.qcow2
info --image-opts driver=compress,file.driver=qcow2,file.file.filename=base.qcow2
info --output=json --image-opts driver=compress,file.driver=qcow2,file.file.filename=base.qcow2
map --output=json --image-opts driver=compress,file.driver=qcow2,file.file.filename=base.qcow2
check --image-opts driver=compress,file.driver=qcow2,file.file.filename=base.qcow2
create -f compress -o help
map top.qcow2
map --output=json top.qcow2
map --output=json --start-offset=512k --max-length=1M top.qcow2
map odd.raw
map --output=json odd.raw
map --output=json a.raw
map --start-offset=8M a.raw
map --output=json --start-offset=8M a.raw
map --start-offset=1X a.raw
map --max-length=-1 a.raw
map
check base.qcow2
check --output=json base.qcow2
check -q top.qcow2
check leaky.qcow2
check --output=json leaky.qcow2
check a.raw
check nonexistent
check -r foo base.qcow2
check -T foo base.qcow2
check
compare a.raw same.raw
compare -s a.raw same.raw
compare a.raw long.raw
compare long.raw empty
compare -s empty long.raw
compare long.raw late.raw
compare -p empty late.raw
compare -q long.raw late.raw
compare top.qcow2 mid.qcow2
compare -s top.qcow2 mid.qcow2
compare -f raw -F raw a.raw same.raw
compare a.raw
compare a.raw nonexistent
compare -T foo a.raw same.raw
compare --foo
bench -c 10 a.raw
bench -c 5 -d 2 -s 1k -S 3k -o 512 a.raw
bench -c x a.raw
bench -d 0 a.raw
create -f qcow2 -o backing_file= new 1M
bench -s 3G a.raw
bench -o -1 a.raw
bench -i foo a.raw
bench -t foo a.raw
bench --pattern=300 a.raw
bench --flush-interval=3 a.raw
bench -w --flush-interval=3 -d 5 a.raw
bench
foo
measure
measure --size 1G
measure --size x
measure --size 1G -O qcow2 --output json
measure -O qcow2 -o cluster_size=512,refcount_bits=64 --size 1G
measure -O qcow2 a.raw
measure -O qcow2 top.qcow2
measure -O qcow2 -o cluster_size=4k top.qcow2
measure -O qcow2 -o preallocation=full top.qcow2
measure -O raw top.qcow2
measure -O qcow2 -o foo=1 top.qcow2
measure -O vmdk top.qcow2
measure -O foo top.qcow2
measure --size 1G top.qcow2
measure -l nobody -O qcow2 base.qcow2
measure --image-opts -O qcow2 driver=qcow2,file.filename=mid.qcow2
""".strip().splitlines()


@pytest.mark.parametrize("line", READ_ONLY)
def test_says_the_same(pair: Pair, line: str) -> None:
    pair.same(*line.split())


CREATIONS = """
-f qcow2 new 64M
-f qcow2 new 1.5G
-f qcow2 -o cluster_size=128k,lazy_refcounts=on new 4M
-f qcow2 -o cluster_size=512,refcount_bits=1 new 4M
-f qcow2 -o compat=0.10 new 4M
-f qcow2 -o preallocation=metadata new 4M
-f qcow2 -o size=4M,nocow=off new
-f qcow2 -b base.qcow2 -F qcow2 new
-f qcow2 -b base.qcow2 -F qcow2 new 8M
-q -f qcow2 -o backing_file=a.raw,backing_fmt=raw new
-f raw new 1023
-f raw -o preallocation=full new 1M
new 1M
""".strip().splitlines()


@pytest.mark.parametrize("line", CREATIONS)
def test_create(pair: Pair, line: str) -> None:
    pair.same("create", *line.split())
    told = real(pair.tool, "info", "new", cwd=pair.mine).out
    expected = real(pair.tool, "info", "new", cwd=pair.theirs).out
    drop = (b"disk size", b"    file length", b"    disk size")
    assert [x for x in told.splitlines() if not x.startswith(drop)] == [
        x for x in expected.splitlines() if not x.startswith(drop)
    ]
    pair.equal("new")


REFUSED = """
create -f qcow2 new
create -f qcow2 new foo
create -f qcow2 -- new -1
create -f qcow2 new 1X
create -f nope new 1G
create -f bochs new 1G
create -f bochs nbd://127.0.0.1:1 1G
create -f qcow2 -o foo=1 new 1G
create -f qcow2 -o cluster_size=3 new 1G
create -f qcow2 -o size=1M new 2M
create -f qcow2 -o compat=0.10,lazy_refcounts=on new 2M
create -f qcow2 -o refcount_bits=3 new 2M
create -f qcow2 -b base.qcow2 new
create -f qcow2 -b nope -F qcow2 new
create -f qcow2 -u -b nope -F qcow2 new
create -b a.raw -f raw new
create -F raw new 1M
create -f qcow2 new 100000T
create -f qcow2 /nonexistent/new 1M
create
resize base.qcow2 1M
resize --preallocation=full base.qcow2 +0
resize --preallocation=foo base.qcow2 1G
resize base.qcow2 5000000
resize base.qcow2 1X
resize base.qcow2
resize base.qcow2 1M 2M
resize nonexistent 1G
convert -O qcow2 nonexistent new
convert -O nope a.raw new
convert -O bochs a.raw new
convert a.raw a.raw
convert a.raw /nonexistent/new
convert -n a.raw nonexistent
convert -n a.raw empty
convert -n -O qcow2 a.raw small.qcow2
convert -O qcow2 -B a.raw a.raw new
convert -B a.raw -F raw a.raw new
convert -B a.raw -F raw -O qcow2 a.raw a.raw new
convert -t foo a.raw new
convert -T foo a.raw new
convert -c a.raw new
convert -O qcow2 -o foo=1 a.raw new
convert -S 4097 a.raw new
convert -S 1X a.raw new
convert -m 99 a.raw new
convert -r 1X a.raw new
convert -C -S 4k a.raw new
convert --salvage -C a.raw new
convert --target-is-zero a.raw new
convert --target-image-opts a.raw new
convert -n -o foo=1 a.raw target.qcow2
convert a.raw
commit base.qcow2
commit -f raw a.raw
commit a.raw
commit -b nonexistent top.qcow2
commit -t foo top.qcow2
commit -r x top.qcow2
commit
rebase top.qcow2
rebase -b nonexistent -F qcow2 top.qcow2
rebase -u -b base.qcow2 top.qcow2
rebase -b base.qcow2 -F foo top.qcow2
rebase -u -b base.qcow2 -F foo top.qcow2
rebase -f raw -b base.qcow2 -F qcow2 a.raw
rebase -T foo -b base.qcow2 -F qcow2 top.qcow2
rebase
amend
amend base.qcow2
amend -o size=1M
amend -o size=1M base.qcow2 top.qcow2
amend -o size=1M nonexistent
amend -f raw -o size=1M a.raw
amend -f foo -o size=1M a.raw
amend -f raw -o help
amend -f bochs -o help
bitmap base.qcow2
bitmap --add base.qcow2
bitmap --add base.qcow2 a b
bitmap --add -b x base.qcow2
bitmap --add -F raw base.qcow2
bitmap -g 1k --remove base.qcow2
bitmap --add -g x base.qcow2 a
bitmap --remove base.qcow2 a
snapshot -d nobody base.qcow2
snapshot -a nobody base.qcow2
snapshot -l -c x base.qcow2
snapshot -c x a.raw
dd if=a.raw
dd of=new
dd if=a.raw of=new bs=0
dd if=a.raw of=new count=x
dd if=a.raw of=new foo=1
dd -O foo if=a.raw of=new
dd -O bochs if=a.raw of=new
amend -t foo -o size=1M base.qcow2
amend -o foo=1 base.qcow2
amend -o cluster_size=64k base.qcow2
amend -o size=foo base.qcow2
amend -o size=5M, base.qcow2
amend -o compat=42 base.qcow2
amend -o compat=0.10,refcount_bits=8 base.qcow2
amend -o compat=0.10,lazy_refcounts=on base.qcow2
amend -o refcount_bits=3 base.qcow2
amend -o refcount_bits=0 base.qcow2
amend -o lazy_refcounts=maybe base.qcow2
amend -o backing_file=a.raw top.qcow2
amend -o backing_fmt=raw top.qcow2
amend -o data_file=x base.qcow2
amend -o data_file_raw=on base.qcow2
amend -o encrypt.state=active base.qcow2
info --object foo,id=x base.qcow2
info --object secret,id=a base.qcow2
create --object secret -f qcow2 new 1M
check --object secret,id=1,data=b base.qcow2
""".strip().splitlines()


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_the_same_words(pair: Pair, line: str) -> None:
    assert pair.same(*line.split()).status == 1
    for name in ("a.raw", "base.qcow2", "mid.qcow2", "top.qcow2", "target.qcow2"):
        assert (pair.mine / name).read_bytes() == (pair.theirs / name).read_bytes(), name


AMENDMENTS = """
help base.qcow2
-f qcow2 -o help
-o compat=0.10 base.qcow2
-o compat=0.10 top.qcow2
-o compat=v3,refcount_bits=1 base.qcow2
-o refcount_bits=64,size=8M top.qcow2
-p -o lazy_refcounts=on base.qcow2
-q -p -o compat=0.10 base.qcow2
-o size=2M,size=3M base.qcow2
-t none -o backing_file=mid.qcow2,backing_fmt=qcow2 top.qcow2
--force -o data_file_raw=off base.qcow2
--image-opts -o size=6M driver=qcow2,file.filename=base.qcow2
--object secret,id=a,data=b -o refcount_bits=32 base.qcow2
""".strip().splitlines()


@pytest.mark.parametrize("line", AMENDMENTS)
def test_amend(pair: Pair, line: str) -> None:
    words = line.replace("help base", "-o help base").split()
    pair.same("amend", *words)
    name = words[-1].rpartition("=")[2]
    if not name.endswith("qcow2") or "help" in words:
        return
    drop = (b"disk size", b"    file length", b"    disk size")
    told, expected = (
        [
            line
            for line in real(pair.tool, "info", name, cwd=where).out.splitlines()
            if not line.startswith(drop)
        ]
        for where in (pair.mine, pair.theirs)
    )
    assert told == expected
    assert real(pair.tool, "check", name, cwd=pair.mine).status == 0
    assert real(pair.tool, "compare", name, str(pair.theirs / name), cwd=pair.mine).status == 0


CONVERSIONS = """
-O qcow2 a.raw new
-p -O qcow2 a.raw new
-p a.raw new
-q -p top.qcow2 new
-O raw top.qcow2 new
-O qcow2 top.qcow2 new
-O qcow2 -S 0 a.raw new
-S 0 a.raw new
-S 64k -O qcow2 a.raw new
-W -m 16 -O qcow2 top.qcow2 new
-m 1 -r 100M top.qcow2 new
-C a.raw new
-t none -T none -O qcow2 a.raw new
-O qcow2 a.raw odd.raw top.qcow2 new
-O qcow2 -o cluster_size=4k,size=1M a.raw new
-O qcow2 -o compat=0.10 top.qcow2 new
-O qcow2 -o preallocation=metadata a.raw new
-O qcow2 -B mid.qcow2 -F qcow2 top.qcow2 new
-O qcow2 -o backing_file=mid.qcow2,backing_fmt=qcow2 top.qcow2 new
--image-opts -O raw driver=raw,file.filename=a.raw,offset=512 new
-n -O qcow2 a.raw target.qcow2
-p -n -O qcow2 a.raw target.qcow2
-n --target-image-opts a.raw driver=qcow2,file.filename=target.qcow2
-n -U a.raw late.raw
-n --target-is-zero a.raw long.raw
""".strip().splitlines()


@pytest.mark.parametrize("line", CONVERSIONS)
def test_convert(pair: Pair, line: str) -> None:
    words = line.split()
    pair.same("convert", *words)
    target = words[-1].rpartition("=")[2]
    # Zeroes over data: the real tool may keep holes of the file where we write zeroes.
    pair.equal(target, allocation="new" in words and "-S" not in words)


def test_convert_through_the_filter_that_compresses(pair: Pair) -> None:
    """The real tool fails where data and zeroes change within a cluster."""
    from cli.support import ours

    target = "driver=compress,file.driver=qcow2,file.file.filename=room.qcow2"
    words = ("convert", "-n", "--target-image-opts", "a.raw", target)
    assert ours(*words, cwd=pair.mine).status == 0
    assert real(pair.tool, "compare", "a.raw", "room.qcow2", cwd=pair.mine).status == 0
    assert b'"compressed": true' in real(
        pair.tool, "map", "--output=json", "room.qcow2", cwd=pair.mine
    ).out
    assert ours(*words, cwd=pair.mine).status == 0  # what is stored is overwritten
    assert real(pair.tool, "check", "room.qcow2", cwd=pair.mine).status == 0


def test_convert_onto_a_lower_layer_keeps_what_is_between(pair: Pair) -> None:
    """The real tool copies the top layer alone and so loses the middle one's data; ours looks
    for the new backing file in the source's chain."""
    from cli.support import ours

    assert (
        ours(
            "convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "top.qcow2", "new",
            cwd=pair.mine,
        ).status
        == 0
    )  # fmt: skip
    assert real(pair.tool, "compare", "top.qcow2", "new", cwd=pair.mine).status == 0
    told = real(pair.tool, "map", "new", cwd=pair.mine).out
    assert b"base.qcow2" in told


@pytest.mark.parametrize(
    "args",
    [
        ("base.qcow2", "+1M"),
        ("-q", "base.qcow2", "+512"),
        ("base.qcow2", "+0"),
        ("--shrink", "base.qcow2", "3M"),
        ("--shrink", "base.qcow2", "-1M"),
        ("-f", "raw", "a.raw", "5000"),
        ("-f", "raw", "--shrink", "a.raw", "1M"),
        ("a.raw", "1G"),
        ("--preallocation=metadata", "base.qcow2", "8M"),
        ("--preallocation=full", "-f", "raw", "a.raw", "+1M"),
    ],
)
def test_resize(pair: Pair, args: tuple[str, ...]) -> None:
    if args[-1] == "5000":
        args = (*args[:-1], "4195000")
    pair.same("resize", *args)
    pair.equal("a.raw")
    pair.equal("base.qcow2")


@pytest.mark.parametrize(
    "args",
    [
        ("top.qcow2",),
        ("-q", "top.qcow2"),
        ("-d", "top.qcow2"),
        ("-b", "base.qcow2", "top.qcow2"),
        ("-b", "mid.qcow2", "top.qcow2"),
        ("-r", "1G", "-t", "none", "mid.qcow2"),
        ("sub/over.qcow2",),
    ],
)
def test_commit(pair: Pair, args: tuple[str, ...]) -> None:
    pair.same("commit", *args)
    for name in ("base.qcow2", "mid.qcow2", "top.qcow2", "sub/over.qcow2"):
        pair.equal(name)
    pair.same("map", args[-1])


def test_commit_grows_a_smaller_base(pair: Pair) -> None:
    pair.same("resize", "top.qcow2", "6M")
    pair.same("commit", "top.qcow2")
    pair.equal("mid.qcow2")
    assert pair.same("info", "mid.qcow2").out.count(b"6 MiB") == 1


@pytest.mark.parametrize(
    "args",
    [
        ("-b", "base.qcow2", "-F", "qcow2", "top.qcow2"),
        ("-b", "a.raw", "-F", "raw", "top.qcow2"),
        ("-b", "late.raw", "-F", "raw", "top.qcow2"),
        ("-b", "small.qcow2", "-F", "qcow2", "top.qcow2"),
        ("-c", "-b", "a.raw", "-F", "raw", "top.qcow2"),
        ("-b", "", "top.qcow2"),
        ("-b", "", "mid.qcow2"),
        ("-t", "none", "-T", "none", "-b", "../same.raw", "-F", "raw", "sub/over.qcow2"),
    ],
)
def test_rebase_keeps_the_content(pair: Pair, args: tuple[str, ...]) -> None:
    before = pair.mine / "before.raw"
    real(pair.tool, "convert", args[-1], str(before), cwd=pair.mine)
    pair.same("rebase", *args)
    pair.equal(args[-1])
    told = real(pair.tool, "compare", args[-1], "before.raw", cwd=pair.mine)
    assert told.status == 0, told
    # Where the old content is zeroes the real tool may write them out, ours stores no data.
    for line in real(pair.tool, "info", args[-1], cwd=pair.theirs).out.splitlines():
        if line.startswith((b"backing", b"virtual size", b"    corrupt")):
            assert line in real(pair.tool, "info", args[-1], cwd=pair.mine).out.splitlines()


@pytest.mark.parametrize(
    "args",
    [
        ("-u", "-b", "nonexistent", "-F", "qcow2", "top.qcow2"),
        ("-u", "-b", "a.raw", "-F", "raw", "top.qcow2"),
        ("-u", "-b", "", "top.qcow2"),
        ("-u", "-p", "-b", "a.raw", "-F", "raw", "top.qcow2"),
    ],
)
def test_rebase_of_the_name_alone(pair: Pair, args: tuple[str, ...]) -> None:
    pair.same("rebase", *args)
    pair.same("info", args[-1])


SALVAGE = """\
[inject-error]
event = "read_aio"
errno = "5"
sector = "2050"
once = "off"
"""


def test_salvage_keeps_what_can_be_read(pair: Pair) -> None:
    for folder in (pair.theirs, pair.mine):
        (folder / "bad.cfg").write_text(SALVAGE)
    for args in (
        ("convert", "blkdebug:bad.cfg:a.raw", "new"),
        ("convert", "--salvage", "blkdebug:bad.cfg:a.raw", "new"),
    ):
        pair.same(*args)
    pair.equal("new")
    lost = bytearray((pair.mine / "a.raw").read_bytes())
    lost[2050 * 512 : 2051 * 512] = bytes(512)
    assert (pair.mine / "new").read_bytes() == lost
