"""An image that one side has open for writing is refused to the other; -U shares it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import ImageInUse
from interop.tools import OURS, TRUSTED, run

Peer = Callable[[str], str]
SIDES = [("ours", "qemu"), ("qemu", "ours"), ("ours", "ours")]


@contextmanager
def holding(command: list[str]) -> Iterator[None]:
    """A program of the io family that keeps its image open until it is told to quit."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=TRUSTED,
    )
    assert process.stdin and process.stdout
    try:
        process.stdin.write(b"length\n")
        process.stdin.flush()
        seen = b""
        limit = time.monotonic() + 20
        while b"MiB" not in seen and time.monotonic() < limit:
            part = process.stdout.read1(4096)  # type: ignore[attr-defined]
            if not part:
                break
            seen += part
        assert b"MiB" in seen, seen
        yield
    finally:
        process.communicate(b"quit\n", timeout=20)


@pytest.fixture(params=["qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"disk.{request.param}"
    run([*OURS, "create", "-q", "-f", request.param, path, "1M"])
    return path


def programs(peer: Peer, image: Path) -> dict[str, list[str]]:
    fmt = image.suffix[1:]
    return {
        "ours": [*OURS, "io", "-f", fmt, str(image)],
        "qemu": [peer("qemu-io"), "-f", fmt, str(image)],
    }


@pytest.mark.parametrize(("holder", "asker"), SIDES)
def test_a_writer_keeps_others_out(holder: str, asker: str, image: Path, peer: Peer) -> None:
    both = programs(peer, image)
    with holding(both[holder]):
        said = run([*both[asker], "-c", "write 0 512"], status=1)
        assert 'Failed to get "write" lock' in said
        assert "Is another process using the image" in said
        check = [*OURS, "check"] if asker == "ours" else [peer("qemu-img"), "check"]
        said = run([*check, "-r", "all", image], status=1)
        assert 'Failed to get "write" lock' in said
        info = [*OURS, "info"] if asker == "ours" else [peer("qemu-img"), "info"]
        assert "lock" in run([*info, image], status=1)
        run([*info, "-U", image])
        run([*both[asker], "-U", "-r", "-c", "read 0 512"])
    run([*both[asker], "-c", "write 0 512"])


@pytest.mark.parametrize(("holder", "asker"), SIDES)
def test_readers_share_and_keep_writers_out(
    holder: str, asker: str, image: Path, peer: Peer
) -> None:
    both = programs(peer, image)
    with holding([*both[holder], "-r"]):
        run([*both[asker], "-r", "-c", "read 0 512"])
        said = run([*both[asker], "-c", "write 0 512"], status=1)
        assert "lock" in said
    run([*both[asker], "-c", "write 0 512"])


@pytest.mark.parametrize("side", ["ours", "qemu"])
def test_a_backing_file_in_use_is_not_written(side: str, tmp_path: Path, peer: Peer) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run([*OURS, "create", "-q", "-f", "qcow2", base, "1M"])
    run([*OURS, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top])
    other = "qemu" if side == "ours" else "ours"
    with holding(programs(peer, top)[side]):
        assert "lock" in run([*programs(peer, base)[other], "-c", "write 0 512"], status=1)
        run([*programs(peer, base)[other], "-r", "-c", "read 0 512"])


@pytest.mark.parametrize("reading", [False, True])
def test_whatever_rewrites_an_image_in_use_is_refused(
    reading: bool, image: Path, peer: Peer
) -> None:
    """Also what only reads at first, or may find that there is nothing to do."""
    before = image.read_bytes()
    with holding([*programs(peer, image)["qemu"], *(["-r"] if reading else [])]):
        for change in (
            lambda: diskwright.amend(image, {"lazy_refcounts": True}),
            lambda: diskwright.check(image, repair="leaks"),
            lambda: diskwright.check(image, repair="all"),
            lambda: diskwright.rebase(image, None, unsafe=True),
            lambda: diskwright.open(image, writable=True),
        ):
            with pytest.raises(ImageInUse, match='Failed to get "write" lock'):
                change()
        assert image.read_bytes() == before
    diskwright.amend(image, {"lazy_refcounts": True})
    assert image.read_bytes() != before
