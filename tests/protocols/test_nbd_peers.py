"""The NBD client with nbdkit's plugins and filters: sources of known content, servers that fail,
that are slow, and that lack something."""

from __future__ import annotations

import errno
import random
import subprocess
from pathlib import Path

import pytest

from diskwright.contract import FUA, NO_FALLBACK
from diskwright.engine.kernel import BaseDriver
from diskwright.extents import Zero
from peers import find_peer

from .nbd_servers import nbdkit
from .test_nbd import PLAIN, opened, run, use

MIB = 1 << 20


@PLAIN
def test_pattern(driver: BaseDriver, tmp_path: Path) -> None:
    """Every 8 bytes are their own offset: nothing is put in a wrong place, over 4 connections."""
    with nbdkit(tmp_path, "pattern", "8T") as server:
        node = opened(driver, server, **{"read-only": True})
        rng = random.Random(1)
        places = [rng.randrange(1 << 40) * 8 for _ in range(600)]

        async def work() -> None:
            parts = [driver.start(node.read(places[at::6], [4096] * 100)) for at in range(6)]
            for at, part in enumerate(parts):
                for place, found in zip(places[at::6], await part, strict=True):
                    want = b"".join(n.to_bytes(8, "big") for n in range(place, place + 4096, 8))
                    assert bytes(found) == want

        run(driver, work())
        run(driver, node.close())


@PLAIN
def test_sparse_random(driver: BaseDriver, tmp_path: Path) -> None:
    """Its holes are told, and its content is what nbdcopy reads."""
    words = ("sparse-random", "64M", "seed=3", "percent=5", "runlength=100000")
    copy = tmp_path / "copy"
    with nbdkit(tmp_path, *words) as server:
        uri = f"nbd+unix:///?socket={server.path}"
        subprocess.run([find_peer("nbdcopy"), uri, str(copy)], check=True, timeout=60)
        content = copy.read_bytes()
        node = opened(driver, server, **{"read-only": True})
        at = holes = 0
        for extent in run(driver, node.extents(0, node.size)):
            length: int = extent.length  # type: ignore[union-attr]
            if isinstance(extent, Zero):
                holes += length
                assert not any(content[at : at + length])
            else:
                (part,) = run(driver, node.read([at], [length]))
                assert bytes(part) == content[at : at + length]
            at += length
        assert at == len(content) and holes > 32 * MIB
        run(driver, node.close())


@pytest.mark.parametrize(
    ("what", "name", "number"),
    [
        ("pread", "EIO", errno.EIO),
        ("pwrite", "ENOSPC", errno.ENOSPC),
        ("zero", "EPERM", errno.EPERM),
        ("trim", "ENOMEM", errno.ENOMEM),
        ("extents", "EINVAL", errno.EINVAL),
    ],
)
def test_errors(driver: BaseDriver, tmp_path: Path, what: str, name: str, number: int) -> None:
    """Each is told to the one who asked; the connection goes on."""
    words = ("--filter=error", "memory", "1M", f"error-{what}={name}", f"error-{what}-rate=100%")
    with nbdkit(tmp_path, *words) as server:
        node = opened(driver, server)
        (link,) = node.links.links
        asked = {
            "pread": lambda: node.read([0, 4096], [512, 512]),
            "pwrite": lambda: node.write([0], [b"x"]),
            "zero": lambda: node.zero([0], [4096]),
            "trim": lambda: node.discard([0], [4096]),
            "extents": lambda: node.extents(0, MIB),
        }
        with pytest.raises(OSError) as raised:
            run(driver, asked[what]())
        assert raised.value.errno == number
        for other, ask in asked.items():
            if other != what:
                run(driver, ask())
        assert node.links.links[0] is link
        run(driver, node.close())


@PLAIN
@pytest.mark.parametrize(
    "words",
    [
        ("--filter=retry", "--filter=error", "memory", "1M", "error-zero-rate=30%",
         "retry-delay=1", "retry-exponential=no", "retries=99"),
        ("--filter=fua", "memory", "1M", "fuamode=emulate"),
        ("--filter=fua", "memory", "1M", "fuamode=force"),
        ("--filter=nozero", "memory", "1M", "zeromode=notrim"),
        ("--filter=nozero", "memory", "1M", "zeromode=emulate"),
        ("--filter=blocksize", "memory", "1M", "minblock=4K", "maxdata=16K", "maxlen=32K"),
        ("--filter=cow", "--filter=cache", "memory", "1M"),
        ("--filter=offset", "--filter=truncate", "memory", "2M", "offset=512K", "range=1M",
         "round-up=4K"),
        ("--filter=multi-conn", "--filter=noparallel", "memory", "1M",
         "multi-conn-mode=emulate", "serialize=connections"),
        ("--filter=delay", "memory", "1M", "delay-write=1ms", "delay-extents=1ms"),
    ],
    ids=["retry", "emulated-fua", "forced-fua", "no-trim", "emulated-zeroes", "blocks",
         "cow", "offset", "one-at-a-time", "delay"],
)  # fmt: skip
def test_filters(driver: BaseDriver, tmp_path: Path, words: tuple[str, ...]) -> None:
    with nbdkit(tmp_path, *words) as server:
        use(driver, opened(driver, server))


@PLAIN
def test_a_full_disk(driver: BaseDriver, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "full", "1M") as server:
        node = opened(driver, server)
        with pytest.raises(OSError) as raised:
            run(driver, node.write([0], [b"x" * 4096], FUA))
        assert raised.value.errno == errno.ENOSPC
        assert bytes(run(driver, node.read([0], [4]))[0]) == bytes(4)
        run(driver, node.close())


@PLAIN
def test_zeroes_that_must_be_fast(driver: BaseDriver, tmp_path: Path) -> None:
    for mode, fast in (("emulate", False), ("notrim", True)):
        words = ("--filter=nozero", "memory", "1M", f"zeromode={mode}", f"fastzeromode={mode}")
        with nbdkit(tmp_path, *words[:-1]) as server:
            node = opened(driver, server)
            try:
                run(driver, node.zero([0], [4096], NO_FALLBACK))
            except OSError as error:
                assert not fast and error.errno == errno.ENOTSUP
            else:
                assert fast
            run(driver, node.close())
