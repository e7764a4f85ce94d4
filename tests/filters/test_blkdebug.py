"""blkdebug: rules, states, breakpoints, alignment and limits, on a memory protocol that records."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from diskwright.contract import NO_FALLBACK, Limits
from diskwright.engine.kernel import Driver
from diskwright.errors import UsageError
from diskwright.filters.blkdebug import BlkdebugNode, limits_of
from diskwright.filters.blkdebug_config import (
    make_rules,
    option_sections,
    parse_config,
    read_config,
)
from diskwright.filters.blkdebug_rules import EVENTS, InjectError, Machine, SetState
from diskwright.graph.opener import close_disk, open_disk
from diskwright.protocols.memory import MemoryNode

SIZE = 256 << 10


class Recorder(MemoryNode):
    """Keeps (operation, offset, length) of every request."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver, bytes(SIZE))
        self.log: list[tuple[str, int, int]] = []

    async def read(
        self, offsets: Sequence[int], lengths: Sequence[int], into: Any = None, tag: str = ""
    ) -> Any:
        self.log += [("read", o, n) for o, n in zip(offsets, lengths, strict=True)]
        return await super().read(offsets, lengths, into)

    async def write(
        self, offsets: Sequence[int], buffers: Any, flags: int = 0, tag: str = ""
    ) -> None:
        self.log += [("write", o, len(b)) for o, b in zip(offsets, buffers, strict=True)]
        await super().write(offsets, buffers, flags)

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        self.log += [("zero", o, n) for o, n in zip(offsets, lengths, strict=True)]
        await super().zero(offsets, lengths, flags)

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self.log += [("discard", o, n) for o, n in zip(offsets, lengths, strict=True)]
        await super().discard(offsets, lengths)


class Bench:
    """A filter over a recorder, and what went wrong with requests to it."""

    def __init__(self, *rules: InjectError | SetState, limits: Limits | None = None) -> None:
        self.driver = Driver()
        self.below = Recorder(self.driver)
        inject = [rule for rule in rules if isinstance(rule, InjectError)]
        states = [rule for rule in rules if isinstance(rule, SetState)]
        self.node = BlkdebugNode(
            self.driver, self.below, Machine(inject, states), limits or Limits()
        )
        self.said: list[str] = []
        self.node.on_message = self.said.append

    def run(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return self.driver.run(coro)

    def error(self, coro: Coroutine[Any, Any, Any]) -> int:
        """The errno that it fails with; 0 when it does not."""
        try:
            self.driver.run(coro)
        except OSError as found:
            assert found.errno
            return found.errno
        return 0

    def write(self, offset: int = 0, length: int = 512) -> int:
        return self.error(self.node.write([offset], [bytes(length)]))

    def read(self, offset: int = 0, length: int = 512) -> int:
        return self.error(self.node.read([offset], [length]))

    def event(self, tag: str) -> None:
        assert self.node.event(tag) is None


def spied(node: BlkdebugNode) -> list[str]:
    """The events that come to ``node`` from now on."""
    seen: list[str] = []
    original = node.machine.event

    def event(tag: str) -> Any:
        seen.append(tag)
        return original(tag)

    setattr(node.machine, "event", event)  # noqa: B010 - a method is replaced on purpose
    return seen


# -- rules


def test_an_event_arms_its_rules_until_another_arms_others() -> None:
    b = Bench(InjectError("write_aio", iotype="write"), InjectError("read_aio", iotype="discard"))
    assert b.write() == 0
    b.event("write_aio")
    assert [b.write(), b.write(), b.read()] == [errno.EIO, errno.EIO, 0]
    b.event("l2_update")  # arms nothing, so all stays as it is
    assert b.write() == errno.EIO
    b.event("read_aio")
    assert b.write() == 0
    assert b.error(b.node.discard([0], [512])) == errno.EIO
    assert b.below.log.count(("write", 0, 512)) == 2


def test_a_failed_request_does_not_reach_the_child() -> None:
    b = Bench(InjectError("none"))
    assert b.write() == errno.EIO
    assert b.below.log == []


def test_once_is_used_up_by_the_first_match_and_in_order() -> None:
    b = Bench(
        InjectError("write_aio", once=True),
        InjectError("write_aio", errno=errno.ENOSPC, once=True, immediately=True),
    )
    b.event("write_aio")
    assert [b.write(), b.write(), b.write()] == [errno.EIO, errno.ENOSPC, 0]
    b.event("write_aio")
    assert b.write() == 0


@pytest.mark.parametrize("iotype", [None, "read", "write", "write-zeroes", "discard", "flush",
                                    "block-status"])  # fmt: skip
def test_types_of_requests(iotype: str | None) -> None:
    requests: dict[str, Callable[[BlkdebugNode], Coroutine[Any, Any, Any]]] = {
        "read": lambda node: node.read([0], [512]),
        "write": lambda node: node.write([0], [bytes(512)]),
        "write-zeroes": lambda node: node.zero([0], [512]),
        "discard": lambda node: node.discard([0], [512]),
        "flush": lambda node: node.flush(),
        "block-status": lambda node: node.extents(0, 512),
    }
    for name, request in requests.items():
        b = Bench(InjectError("none", iotype=iotype, errno=errno.ENOSPC))
        b.node._unflushed = True
        wanted = name == iotype if iotype else name != "block-status"
        assert b.error(request(b.node)) == (errno.ENOSPC if wanted else 0), name


def test_a_sector_is_met_by_its_first_byte() -> None:
    b = Bench(InjectError("none", sector=1))
    assert b.write(0, 512) == 0
    assert b.write(0, 513) == errno.EIO
    assert b.write(512, 1) == errno.EIO
    assert b.write(513, 511) == 0
    b.node._unflushed = True
    assert b.error(b.node.flush()) == 0


def test_states() -> None:
    b = Bench(
        SetState("read_aio", 1, 2),
        SetState("read_aio", 2, 3),
        InjectError("read_aio", state=3, once=True),
    )
    outcome = []
    for _ in range(5):
        b.event("read_aio")
        outcome.append(b.read())
    assert outcome == [0, 0, errno.EIO, 0, 0]


def test_rules_see_the_state_before_the_event_and_the_first_change_wins() -> None:
    b = Bench(
        SetState("a", 0, 2), SetState("a", 0, 3), InjectError("a", state=1, once=True),
        InjectError("b", state=2, errno=errno.ENOSPC),
    )  # fmt: skip
    b.event("a")
    assert b.node.machine.state == 2
    assert b.read() == errno.EIO
    b.event("b")
    assert b.read() == errno.ENOSPC


def test_a_flush_is_announced_and_passed_on_only_after_a_write() -> None:
    b = Bench(InjectError("flush_to_disk", iotype="flush", once=True))
    assert b.error(b.node.flush()) == 0
    assert b.below.flushes == 0
    b.write()
    assert b.error(b.node.flush()) == errno.EIO
    assert b.error(b.node.flush()) == 0
    assert b.error(b.node.flush()) == 0
    assert b.below.flushes == 1


# -- breakpoints


def test_break_stops_a_request_until_it_is_resumed() -> None:
    b = Bench()
    order: list[str] = []

    async def write(tag: str, offset: int) -> None:
        await b.node.write([offset], [tag.encode() * 512])
        order.append(tag)

    async def scene() -> None:
        assert b.node.set_break("pwritev", "A")
        first = b.driver.spawn(write("1", 0))
        await b.node.wait_break("A")
        await write("2", 0)
        assert b.node.resume("A")
        await first
        assert not b.node.resume("A")

    b.run(scene())
    assert order == ["2", "1"]
    assert bytes(b.below.data[:512]) == b"1" * 512
    assert b.said == ["blkdebug: Suspended request 'A'", "blkdebug: Resuming request 'A'"]


def test_a_breakpoint_is_used_up_and_two_stop_twice() -> None:
    b = Bench()

    async def scene() -> None:
        b.node.set_break("pwritev", "A")
        b.node.set_break("pwritev", "B")
        task = b.driver.spawn(b.node.write([0], [b"x"]))
        await b.node.wait_break("A")
        await b.node.wait_break("B")
        b.node.resume("A")
        await b.driver.turn()
        assert not task.done
        b.node.resume("B")
        await task
        await b.node.write([0], [b"y"])

    b.run(scene())
    assert [line for line in b.said if "Suspended" in line] == [
        "blkdebug: Suspended request 'B'",
        "blkdebug: Suspended request 'A'",
    ]


def test_remove_break_lets_its_requests_go() -> None:
    b = Bench()

    async def scene() -> None:
        assert not b.node.set_break("nonsense", "A")
        assert b.node.set_break("pwritev", "A")
        assert b.node.remove_break("A")
        assert not b.node.remove_break("A")
        await b.node.write([0], [b"x"])
        b.node.set_break("pwritev", "A")
        task = b.driver.spawn(b.node.write([0], [b"y"]))
        await b.node.wait_break("A")
        assert not b.node.remove_break("A")  # it was used up by the request
        await task

    b.run(scene())


def test_close_lets_stopped_requests_go() -> None:
    b = Bench()

    async def scene() -> None:
        b.node.set_break("pwritev_done", "A")
        task = b.driver.spawn(b.node.write([0], [b"x"]))
        await b.node.wait_break("A")
        await b.node.close()
        await task

    b.run(scene())
    assert b.below.data[0] == ord("x")


def test_ragged_writes_of_one_unit_go_one_after_the_other() -> None:
    b = Bench(limits=Limits(alignment=4096))

    async def scene() -> None:
        b.node.set_break("pwritev_rmw_after_head", "A")
        first = b.driver.spawn(b.node.write([512], [b"1" * 512]))
        await b.node.wait_break("A")
        second = b.driver.spawn(b.node.write([1024], [b"2" * 512]))
        for _ in range(5):
            await b.driver.turn()
        assert not second.done
        b.node.resume("A")
        await first
        await second

    b.run(scene())
    assert bytes(b.below.data[:2048]) == bytes(512) + b"1" * 512 + b"2" * 512 + bytes(512)


def test_the_steps_of_a_write_are_announced() -> None:
    b = Bench(limits=Limits(alignment=4096))
    seen = spied(b.node)
    b.run(b.node.write([100], [bytes(5000)]))
    assert seen == [
        "pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail",
        "pwritev_rmw_after_tail", "pwritev", "pwritev_done",
    ]  # fmt: skip
    seen.clear()
    b.run(b.node.zero([0], [8192]))
    assert seen == ["pwritev_zero", "pwritev_done"]
    assert set(seen) <= EVENTS


def test_a_head_that_cannot_be_read_fails_the_write() -> None:
    b = Bench(InjectError("pwritev_rmw_head", iotype="read"), limits=Limits(alignment=4096))
    b.below.data[:4096] = b"k" * 4096
    assert b.write(512, 512) == errno.EIO
    assert bytes(b.below.data[:4096]) == b"k" * 4096


# -- alignment and limits


def test_the_child_sees_only_aligned_requests() -> None:
    b = Bench(limits=Limits(alignment=4096))
    model = bytearray(SIZE)
    for number, (offset, length) in enumerate(
        [(0, 1), (4095, 2), (8192, 4096), (5000, 20000), (4096, 100), (SIZE - 5, 5)], 1
    ):
        data = bytes([number]) * length
        b.run(b.node.write([offset], [data]))
        model[offset : offset + length] = data
    b.run(b.node.zero([10000], [30000]))
    model[10000:40000] = bytes(30000)
    (found,) = b.run(b.node.read([1], [SIZE - 2]))
    assert bytes(found) == model[1:-1]
    assert b.below.data == model
    assert all(o % 4096 == 0 and n % 4096 == 0 for _, o, n in b.below.log)


def test_writes_are_not_widened_beyond_the_end() -> None:
    b = Bench(limits=Limits(alignment=4096))
    b.run(b.below.truncate(10000))
    b.run(b.node.write([9000], [b"x" * 100]))
    assert b.node.size == b.below.size == 10000
    b.run(b.node.write([9990], [b"x" * 20]))
    assert b.node.size == 10010


def test_requests_are_cut_to_the_limits() -> None:
    b = Bench(limits=Limits(512, 8192, 4096, 16384, 4096, 8192))
    b.run(b.node.write([0], [bytes(20000)]))
    b.run(b.node.read([0], [20000]))
    transfers = [n for op, _, n in b.below.log if op in ("read", "write")]
    assert max(transfers) == 8192
    b.below.log.clear()
    b.run(b.node.zero([512], [40960]))
    zeroes = [(o, n) for op, o, n in b.below.log if op == "zero"]
    assert zeroes == [(4096, 16384), (20480, 16384), (36864, 4096)]
    assert [(o, n) for op, o, n in b.below.log if op == "write"] == [(512, 3584), (40960, 512)]
    b.below.log.clear()
    b.run(b.node.discard([700], [20000]))
    assert b.below.log == [("discard", 1024, 3072), ("discard", 4096, 8192),
                           ("discard", 12288, 8192)]  # fmt: skip


def test_no_fallback_refuses_what_does_not_suit_zeroing() -> None:
    b = Bench(limits=Limits(512, 0, 4096))
    assert b.error(b.node.zero([512], [4096], NO_FALLBACK)) == errno.ENOTSUP
    assert b.error(b.node.zero([4096], [4096], NO_FALLBACK)) == 0


def test_of_overlapping_writes_in_a_batch_the_later_wins() -> None:
    b = Bench(limits=Limits(alignment=4096))
    b.run(b.node.write([0, 100, 8192], [b"a" * 5000, b"b" * 100, b"c"]))
    assert bytes(b.below.data[90:210]) == b"a" * 10 + b"b" * 100 + b"a" * 10
    assert b.below.data[8192] == ord("c")
    found = b.run(b.node.read([99, 8192], [2, 1]))
    assert [bytes(part) for part in found] == [b"ab", b"c"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"align": 3}, "align 3"),
        ({"align": 1 << 31}, "align 2147483648"),
        ({"align": 4096, "max-transfer": 1024}, "max-transfer 1024"),
        ({"align": 4096, "opt-write-zero": 1024}, "opt-write-zero 1024"),
        ({"opt-write-zero": 512, "max-write-zero": 1000}, "max-write-zero 1000"),
        ({"opt-discard": 1024, "max-discard": 1536}, "max-discard 1536"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(options: dict[str, int], name: str) -> None:
    with pytest.raises(UsageError, match=f"Cannot meet constraints with {name}"):
        limits_of(options)


def test_limits_that_are_taken() -> None:
    assert limits_of({"max-transfer": 1000, "opt-discard": 7}).discard_alignment == 7
    assert limits_of({"align": 0}) == Limits()


# -- configuration


CONFIG = """
# a comment
[inject-error]
  event  =   "l2_load"
errno = "0x1c"
state = "2"
sector = "7"
once = "on"
immediately = "off"
iotype = "write-zeroes"

[set-state "named"]
event = "read_aio"
state = "1"
new_state = "2"
"""


def test_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text(CONFIG)
    inject, states = make_rules(read_config(str(tmp_path / "rules")))
    assert inject == [InjectError("l2_load", 2, "write-zeroes", 28, 7, True, False)]
    assert states == [SetState("read_aio", 1, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("event", "no group defined"),
        ("[foo]", "There is no option group 'foo'"),
        ("[inject-error]", "Missing event name for rule"),
        ('[inject-error]\nevent = "x"', "invalid parameter value: x"),
        ('[inject-error]\nevent="none"', "Invalid parameter 'event=\"none\"'"),
        ('[inject-error]\nevent = "none"\nerrno = "x"', "Parameter 'errno' expects a number"),
        ('[inject-error]\nevent = "none"\nfoo = "x"', "Invalid parameter 'foo'"),
        ('[inject-error]\nevent = "none"\niotype = "x"', "invalid parameter value: x"),
        ('[inject-error]\nevent = "none"\nonce = "1"', "expects 'on' or 'off'"),
    ],
)
def test_mistakes_in_a_configuration(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_rules(parse_config(text))


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Could not read blkdebug config file: No such file"):
        read_config(str(tmp_path / "none"))


def test_rules_from_options() -> None:
    sections = option_sections("inject-error", [{"event": "none", "errno": 28}])
    assert make_rules(sections) == ([InjectError("none", errno=28)], [])
    with pytest.raises(UsageError, match="section doesn't support the option 'new-state'"):
        option_sections("set-state", [{"event": "none", "new-state": 1}])
    with pytest.raises(UsageError, match="Unused option"):
        option_sections("set-state", {"1": {"event": "none"}})


# -- in a graph


def test_opening_by_name_and_by_options(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text('[inject-error]\nevent = "write_aio"\nonce = "on"\n')
    (tmp_path / "disk").write_bytes(bytes(65536))
    name = f"blkdebug:{tmp_path / 'rules'}:{tmp_path / 'disk'}"
    driver = Driver()

    async def scene() -> None:
        node = await open_disk(driver, name, format="raw", writable=True)
        with pytest.raises(OSError, match="Input/output error"):
            await node.write([0], [b"x"])
        await node.write([0], [b"y"])
        await close_disk(node)
        node = await open_disk(
            driver,
            {
                "driver": "raw",
                "file.driver": "blkdebug",
                "file.align": "4k",
                "file.image.driver": "file",
                "file.image.filename": str(tmp_path / "disk"),
                "file.inject-error.0.event": "read_aio",
                "file.inject-error.0.errno": 28,
                "file.inject-error.0.sector": 8,
            },
            writable=True,
        )
        assert node.limits.alignment == 4096
        (found,) = await node.read([0], [1])
        assert bytes(found) == b"y"
        with pytest.raises(OSError) as failure:
            await node.read([4095], [2])
        assert failure.value.errno == errno.ENOSPC
        await close_disk(node)

    driver.run(scene())
    driver.close()


def test_qcow2_announces_its_steps(tmp_path: Path) -> None:
    from diskwright.graph.opener import create_image

    path = tmp_path / "disk.qcow2"
    driver = Driver()
    seen: list[list[str]] = []

    async def scene() -> None:
        await create_image(driver, str(path), "qcow2", 1 << 20)
        node = await open_disk(driver, f"blkdebug::{path}", format="qcow2", writable=True)
        below = node.child("file")
        assert isinstance(below, BlkdebugNode)
        seen.append(spied(below))
        await node.write([1000], [b"x"])
        await node.flush()
        await close_disk(node)

    driver.run(scene())
    driver.close()
    assert {"write_aio", "l2_alloc_write", "refblock_load", "flush_to_disk"} <= set(seen[0])
    assert set(seen[0]) <= EVENTS
