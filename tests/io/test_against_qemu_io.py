"""Every answer of the io language beside that of qemu-io 10."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from peers import find_peer

MOVING = """\
read 0 4k
read -q 0 4k
read -C 0 4k
write -C 0 4k
write -q -C 0 4k
write -P 65 0 100
read -v 0 100
read -v 4000 3
read -qv 0 16
read -vC 0 3
write -s letters 0 13
read -v 0 16
write -s all 256 256
read -v 256 256
read -P 0xcd 0 4k
read -P 1 8k 4k
read -P 0 -s 512 -l 10 8k 4k
read -P 1 -s 512 8k 4k
read -P 1 -l 512 8k 4k
read -P 1 -s 512 -l 5000 8k 4k
read -P 1 -s 5000 8k 4k
read -P 0 -s 0 -l 0 8k 5
read -p 0 512
read -r 0 512
r 0 512
w 0 512
write -p 0 512
write -r 0 512
write -f 0 512
write -z 0 64k
write -zu 64k 64k
write -f -z 0 64k
write -z 100 300
write -P 7 1000 3000
write -z 2k 100
read -v 2030 40
writev 0 512 512 1k
writev -P 3 0 512
writev -f 0 512
readv 0 512 512
readv -P 3 0 512
readv -P 1 0 512
readv -v 0 3 5
readv -v 500 32
readv 0 511 2
readv 0 0
writev 0 0
read 5 0
read 1M 0
read 0x200 0x200
read 1.5k 512
read .5k 1
read 1.1k 1
read 1.k 1
read 010 1
read 1B 1K
discard 0 64k
discard -C 0 64k
discard -q 0 64k
d 0 512
flush
f
aio_write 0 64k
aio_flush
aio_read 0 64k
aio_flush
aio_read -P 1 0 64k
aio_flush
aio_read -v 0 20
aio_flush
aio_read -C 0 512
aio_flush
aio_read -q 0 512
aio_flush
aio_write -q 0 64k
aio_flush
aio_write -z 0 64k
aio_flush
aio_write -zu 0 64k
aio_flush
aio_write -f 0 512
aio_flush
aio_write 0 0
aio_flush
aio_read 2M 1
aio_flush
aio_write 2M 1
aio_flush
aio_write -z 2M 64k
aio_flush
aio_read -i 0 512
aio_write -i 0 512
length
l
info
i
map
alloc 0
alloc 0 128k
alloc 0 2M
alloc 2M
alloc 1M
alloc 1M 512
alloc 5 10
sleep 1
truncate 2M
length
truncate 512k
length
truncate -m off 1M
length
t 1536k
length
map
quit
length
"""

MISTAKES = """\
foo
\tread 0 512
READ 0 512
read
read 0
read 0 1 2
read -x 0 4k
read -a 0 4k
read -1 4k
read -P
read -P 1
read -P 1 0
read 0 1 -P
read -P abc 0 4k
read -P 256 0 4k
read -P 0x1ff 0 4k
read -P -1 0 4k
read -s 5 0 4k
read -l 5 0 4k
read -P 5 -s -1 0 5
read -P 5 -l x 0 5
read abc 4k
read 0 abc
read -- -1 4k
read 0 -- -4k
read 0 2.5
read 99999999999999999999 1
read 0 99999999999999999999
read 0 8E
read 0 3G
read 0 2G
read 0 2147483137
read 9E 512
read 0 4kB
read 1e 5
read 0x1k 1
read 0x 1
read 1s 1
read 1.5b 1
read 1_0 1
read 1,5 1
read inf 1
read -- -0 1
read -- -0k 1
read 1M 512
read 1000k 64k
read 2M 0
write
write -x 0 1
write -q
write -z -P 1 0 4k
write -z -s letters 0 4k
write -P 1 -s letters 0 4k
write -s nofile 0 4k
write -s empty 0 4k
write -s nofile -n 0 4k
write -n 0 4k
write -u 0 4k
write -b -z 0 4k
write -f -c 0 64k
write -b -f 0 512
write -c 0 100
write -c 5 64k
write -z -r 0 4k
write 0 abc
write abc 1
write -P 0 4k
write -P x 0 4k
write -P -z 0 4k
write -z 0 3G
write -z 0 9E
write 1M 1
write -z 1M 64k
write 2M 0
writev
writev 0
writev 0 abc
writev -z 0 512
writev 2M 512
readv 0 2G
readv 0 1G 1G
readv -s 3 0 512
readv 0 512 abc
aio_read 0
aio_read abc 1
aio_read 0 abc
aio_read -P x 0 1
aio_read -x 0 1
aio_read 0 3G
aio_write -u 0 64k
aio_write -z 0 64k 64k
aio_write -z 0 abc
aio_write -z abc 1
aio_flush x
discard 0
discard -x 0 1
discard 0 abc
discard abc 1
discard 1M 64k
discard 0 1G
discard 0 3G
discard 0 -- -1
discard 2M 0
truncate
truncate abc
truncate -x 1
truncate -m foo 2M
truncate -m
truncate 1M 1M
truncate 9E
alloc
alloc abc
alloc 0 abc
alloc 0 -1
alloc 0 1 2
map x
map -x
length x
length -x
flush x
sleep
sleep abc
sleep -5
help foo
help a b
break
break foo
break write_aio A
resume A
remove_break A
wait_break
sigraise
sigraise x
sigraise 0
open
open disk.raw
o
reopen -x
reopen a
reopen -rw
reopen -c foo
close
close
length
length x
open nofile
open a b
open -x
open -t foo disk.raw
open -d foo disk.raw
open -i foo disk.raw
open -o driver=nosuch disk.raw
open -o driver=qcow2
open -r -o driver=raw disk.raw
write
write 0 1
write -x 0 1
aio_write 0 1
discard 0 1
truncate 5
flush
read 0 1
reopen -w
write 0 1
reopen -r
write 0 1
q
zone_report 0 1
zone_report x 1
zone_report 0
zrp 0 x
zone_open 0 512
zone_open -z 0 512
zc 0 512
zone_finish 0 512
zone_reset 0 512
zone_append 0 512
zone_append 0 512 512
zone_append -p 0 512
zap 0 512 512 512
zap 0 512 x
"""


@pytest.mark.parametrize("script", [MOVING, MISTAKES], ids=["moving", "mistakes"])
def test_raw_sessions_read_the_same(both: Any, script: str) -> None:
    both.same("-f", "raw", "disk.raw", lines=script.splitlines())


@pytest.mark.parametrize("script", [MOVING, MISTAKES], ids=["moving", "mistakes"])
def test_qcow2_sessions_read_the_same(both: Any, script: str) -> None:
    both.image(find_peer("qemu-img"), "disk.qcow2", "1M")
    lines = script.replace("disk.raw", "disk.qcow2").replace("driver=raw", "driver=qcow2")
    both.same("-f", "qcow2", "disk.qcow2", lines=lines.splitlines())


def test_exit_status_and_streams(both: Any) -> None:
    raw = ("-f", "raw", "disk.raw")
    assert both.commands(["length", "length"], *raw).status == 0
    assert both.commands(["foo", "length"], *raw).status == 1
    assert both.commands(["read -P 5 0 1", "length"], *raw).status == 1
    assert both.commands(["aio_read 2M 1", "aio_read -P 5 0 1"], *raw).status == 0
    assert both.commands(["quit", "foo"], *raw).status == 0
    assert both.commands(["foo", "quit"], *raw).status == 1
    assert both.commands([""], *raw).status == 0
    assert both.commands([" "], *raw).status == 0
    assert (
        both.commands(
            ["length"],
        ).status
        == 1
    )
    assert both.same(*raw, lines=["foo", "quit"]).status == 1
    assert both.same(*raw, lines=[]).status == 0
    assert both.same(*raw, lines=["", "  length"]).status == 0


def test_options_of_the_tool(both: Any) -> None:
    both.commands(["length"], "disk.raw", "-f", "raw")
    both.commands(["length"], "disk.raw")
    both.commands(["length"], "-r", "disk.raw")
    both.commands(["length"], "nofile")
    both.commands(["length"], "-f", "foo", "disk.raw")
    both.commands(["length"], "-t", "foo", "disk.raw")
    both.commands(["length"], "-d", "foo", "disk.raw")
    both.commands(["length"], "-i", "foo", "disk.raw")
    both.commands(["length"], "-k", "-f", "raw", "disk.raw")
    both.commands(["length"], "-U", "-f", "raw", "disk.raw")
    both.commands(["length"], "-U", "-r", "-f", "raw", "disk.raw")
    both.commands(["length"], "--image-opts", "driver=raw,file.filename=disk.raw")
    both.commands(["length"], "--image-opts", "-f", "raw", "driver=raw,file.filename=disk.raw")
    both.commands(["length"], 'json:{"driver":"raw","file.filename":"disk.raw"}')
    both.commands(["length"], "nosuch:foo")
    both.commands(["write 0 512"], "-r", "-f", "raw", "disk.raw")
    both.commands(["write 0 512"], "-n", "-m", "-t", "none", "-f", "raw", "disk.raw")
    both.same("--cmd=length", "--format=raw", "disk.raw")


def test_a_temporary_overlay_keeps_the_image(both: Any) -> None:
    both.image(find_peer("qemu-img"), "disk.qcow2", "1M")
    before = (both.ours / "disk.qcow2").read_bytes()
    both.commands(
        ["write -P 5 0 64k", "read -P 5 0 64k", "read -P 0 64k 64k", "map"],
        "-s", "-f", "qcow2", "disk.qcow2",
    )  # fmt: skip
    assert (both.ours / "disk.qcow2").read_bytes() == before


def test_overlays_tell_what_they_hold_themselves(both: Any) -> None:
    img = find_peer("qemu-img")
    both.image(img, "base.qcow2", "1M")
    both.commands(["write -P 1 0 128k"], "-f", "qcow2", "base.qcow2")
    both.image(img, "top.qcow2", "-b", "base.qcow2", "-F", "qcow2", "2M")
    both.commands(
        ["write -P 2 64k 64k", "map", "alloc 0 64k", "alloc 0 128k", "read -P 1 0 64k",
         "read -P 2 64k 64k", "read -P 0 1M 64k", "write -z 0 64k", "read -P 0 0 64k", "map",
         "discard 64k 64k", "map", "write -P 9 1000 10", "read -v 990 30"],
        "-f", "qcow2", "top.qcow2",
    )  # fmt: skip


def test_discard_zeroes_whole_clusters_and_the_last_partial_one(both: Any) -> None:
    both.image(find_peer("qemu-img"), "disk.qcow2", str((1 << 20) + 512 * 3))
    both.commands(
        ["write -P 5 0 1M", "write -P 5 1M 1536", "discard 512 256k", "read -P 5 0 64k",
         "read -P 0 64k 192k", "read -P 5 256k 64k", "discard 1000k 26112",
         "read -P 5 1000k 24k", "read -P 0 1M 1536"],
        "-f", "qcow2", "disk.qcow2",
    )  # fmt: skip


RULES = '[inject-error]\nevent = "{event}"\n{more}\n'


@pytest.mark.parametrize(
    ("more", "commands"),
    [
        ('once = "on"', ["read 0 512", "write 0 512", "write 0 512", "read 0 512"]),
        ("", ["read 0 512", "write 0 512", "write 0 512", "read 0 512", "discard 0 512",
              "write -z 0 512", "map"]),
        ('sector = "1"\nerrno = "28"', ["write 0 512", "write 512 512", "write 1k 1k",
                                        "write 1000 30", "read 512 512", "read 2k 512"]),
        ('iotype = "discard"', ["discard 0 512", "write 0 512", "read 0 512", "discard 0 512"]),
    ],
)  # fmt: skip
def test_injected_errors(both: Any, more: str, commands: list[str]) -> None:
    both.file("rules", RULES.format(event="write_aio", more=more).encode())
    both.commands(commands, "-t", "writeback", "-f", "raw", "blkdebug:rules:disk.raw")


@pytest.mark.parametrize("iotype", ["read", "write", "write-zeroes", "discard", "block-status"])
def test_types_of_requests(both: Any, iotype: str) -> None:
    both.file("rules", RULES.format(event="none", more=f'iotype = "{iotype}"').encode())
    both.commands(
        ["write 0 512", "read 0 512", "write -z 0 512", "write -zu 0 512", "discard 0 512",
         "map", "alloc 0"],
        "-t", "writeback", "-f", "raw", "blkdebug:rules:disk.raw",
    )  # fmt: skip


BREAKS = [
    ["break write_aio A", "aio_write 0 512", "wait_break A", "length", "resume A", "aio_flush"],
    ["break write_aio A", "break write_aio B", "aio_write 0 512", "wait_break A", "wait_break B",
     "resume A", "resume B", "aio_flush"],
    ["break write_aio A", "remove_break A", "write 0 512", "resume A", "remove_break A"],
    ["break write_aio A", "aio_write 0 512", "wait_break A", "remove_break A", "aio_flush"],
    ["break write_aio A", "resume A", "aio_write 0 512", "wait_break A", "resume A", "aio_flush",
     "resume A"],
    ["break foo A", "break write_aio", "remove_break B", "resume B"],
    ["break pwritev_done A", "aio_write 0 512", "wait_break A", "read 0 512", "resume A",
     "aio_flush"],
    ["break write_aio A", "aio_write 0 512", "wait_break A", "break write_aio A",
     # The same range: which of the two ends first cannot be seen.
     "aio_write 0 512", "wait_break A", "resume A", "resume A", "aio_flush"],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BREAKS)))
def test_breakpoints(both: Any, number: int) -> None:
    both.commands(BREAKS[number], "-t", "writeback", "-f", "raw", "blkdebug::disk.raw")


ALIGNED = (
    'json:{"driver":"raw","file":{"driver":"blkdebug","config":"rules","align":4096,%s'
    '"image":{"driver":"file","filename":"disk.raw"}}}'
)


@pytest.mark.parametrize(
    "limits",
    ['"opt-discard":4096,', '"opt-discard":4096,"max-transfer":8192,',
     '"opt-discard":4096,"opt-write-zero":16384,"max-write-zero":32768,',
     '"opt-discard":16384,"max-discard":32768,'],
)  # fmt: skip
def test_unaligned_requests_on_a_picky_device(both: Any, limits: str) -> None:
    both.file("rules")
    both.commands(
        ["write -P 1 0 64k", "write -P 2 100 50", "write -P 3 4000 200", "write -P 4 8191 8194",
         "write -z 5000 20000", "write -zu 30000 30000", "discard 40000 20000", "read -v 80 90",
         "read -v 3990 230", "read -v 8180 20", "read -v 16380 10", "read -P 0 5000 3000",
         "read -v 24990 20", "read -v 29990 20"],
        "-t", "writeback", ALIGNED % limits,
    )  # fmt: skip
    assert (both.ours / "disk.raw").read_bytes() == (both.theirs / "disk.raw").read_bytes()


def test_each_ragged_end_of_zeroes_is_judged_by_itself(both: Any) -> None:
    img = find_peer("qemu-img")
    both.image(img, "base.qcow2", "-o", "cluster_size=4k", "1M")
    both.image(img, "top.qcow2", "-o", "cluster_size=4k", "-b", "base.qcow2", "-F", "qcow2", "1M")
    both.commands(
        ["write -P 5 32k 1k", "write -z 35k 2k", "write -z 50k 1k", "write -z 1022k 2k",
         "write -z 127k 10k", "write -P 6 60k 1k", "write -z 57k 4k", "map", "read -P 0 57k 4k",
         "read -P 5 32k 1k"],
        "-t", "writeback", "-f", "qcow2", "top.qcow2",
    )  # fmt: skip


@pytest.mark.parametrize("first", ["cow_read", "cow_write", "write_aio"])
@pytest.mark.parametrize("second", ["cow_read", "cow_write", "write_aio"])
def test_order_of_events_of_a_copy_on_write(both: Any, first: str, second: str) -> None:
    img = find_peer("qemu-img")
    both.image(img, "base.qcow2", "1M")
    both.commands(["write -P 1 0 64k"], "-f", "qcow2", "base.qcow2")
    both.image(img, "top.qcow2", "-b", "base.qcow2", "-F", "qcow2", "1M")
    rules = f'[set-state]\nevent = "{first}"\nstate = "1"\nnew_state = "2"\n'
    rules += f'[inject-error]\nevent = "{second}"\nstate = "2"\niotype = "write"\nonce = "on"\n'
    both.file("rules", rules.encode())
    both.commands(
        ["write -P 5 32k 4k"], "-t", "writeback", "-f", "qcow2", "blkdebug:rules:top.qcow2"
    )


@pytest.mark.parametrize("event", ["cluster_alloc", "l2_alloc_write", "l1_update"])
def test_one_failure_on_the_way_of_an_allocation(both: Any, event: str) -> None:
    """Written through, so that the tables are, too, before the answer; VM state as the disk."""
    img = find_peer("qemu-img")
    rules = f'[inject-error]\nevent = "{event}"\niotype = "write"\nonce = "on"\n'
    both.file("rules", rules.encode())
    for write in ("write 0 64k", "write -b 0 64k"):
        both.image(img, "new.qcow2", "1M")
        both.commands(
            [write, write], "-t", "writethrough", "-f", "qcow2", "blkdebug:rules:new.qcow2"
        )


def test_info_tells_of_bitmaps(both: Any) -> None:
    img = find_peer("qemu-img")
    both.image(img, "a.qcow2", "1M")
    for folder in (both.ours, both.theirs):
        for words in (["--add", "a.qcow2", "one"], ["--add", "--disable", "a.qcow2", "two"]):
            subprocess.run([img, "bitmap", *words], cwd=folder, check=True)
    both.commands(["info"], "-r", "-f", "qcow2", "a.qcow2")
