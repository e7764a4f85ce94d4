"""`--max-time`, `--max-memory` and `--max-metadata`, of every verb."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import diskwright
from cli.support import ours
from diskwright.cli.main import IMG_VERBS, OWN_VERBS
from diskwright.errors import OverBudget

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    diskwright.create("image", format="qcow2", size=64 * MIB)
    with diskwright.open("image", writable=True) as disk:
        disk.write_at(0, b"x" * (8 * MIB))
    return tmp_path


@pytest.mark.parametrize("verb", sorted({**IMG_VERBS, **OWN_VERBS}))
def test_every_verb_has_them(verb: str) -> None:
    shown = ours(verb, "--help", name="diskwright").out
    assert all(f"--max-{what}".encode() in shown for what in ("time", "memory", "metadata"))


@pytest.mark.parametrize(
    "words",
    ["info image", "check image", "map image", "convert -O raw image out", "compare image image",
     "digest image", "measure -O qcow2 image", "io -r -c map image", "snapshot -l image"],
)  # fmt: skip
@pytest.mark.parametrize(("what", "least"), [("metadata", 600), ("memory", 600)])
def test_too_much_is_an_error_and_enough_is_none(
    words: str, what: str, least: int, folder: Path
) -> None:
    verb, *rest = words.split()
    done = ours(verb, f"--max-{what}", str(least), *rest, name="diskwright")
    assert done.status == (2 if verb == "compare" else 1)
    assert f"the limit of {least} bytes of {what} was reached".encode() in done.err
    enough = ours(verb, f"--max-{what}", "16M", *rest, name="diskwright")
    assert enough.status == 0, enough.err
    # It was that command's alone.
    assert ours(verb, *rest, name="diskwright").status == 0


def test_a_deadline_ends_a_command_that_takes_longer(folder: Path) -> None:
    start = time.monotonic()
    done = ours("bench", "--max-time", "0.3", "-c", "1000000000", "image", name="diskwright")
    assert time.monotonic() - start < 5
    assert done.status == 1
    assert b"the limit of 0.3 seconds of time was reached (--max-time)" in done.err


def test_a_conversion_that_ran_out_of_time_says_what_is_left_of_the_target(folder: Path) -> None:
    done = ours("convert", "--max-time", "1e-9", "-O", "qcow2", "image", "out", name="diskwright")
    assert done.status == 1
    assert b"--max-time" in done.err
    assert b"'out'" in done.err and b"not complete" in done.err


@pytest.mark.parametrize("option", ["--max-time=0", "--max-time=x", "--max-time=nan",
                                    "--max-memory=0", "--max-metadata=-1"])  # fmt: skip
def test_wrong_limits_are_refused(option: str, folder: Path) -> None:
    assert ours("info", option, "image", name="diskwright").status == 1


def test_budgets_in_python(folder: Path) -> None:
    with diskwright.limited(diskwright.Budget(seconds=1e-9)), pytest.raises(OverBudget):
        diskwright.check("image")
    with (
        diskwright.limited(diskwright.Budget(metadata=600)),
        pytest.raises(OverBudget, match="metadata"),
    ):
        diskwright.open("image")
    with diskwright.limited(diskwright.Budget(60, 16 * MIB, 16 * MIB)):
        assert diskwright.check("image").corruptions == 0


def test_a_repair_that_has_begun_to_write_goes_on_to_its_end(folder: Path) -> None:
    """Whatever the limit, the image is as it was, or repaired."""
    data = bytearray(Path("image").read_bytes())
    data[131072 + 2 * 6] ^= 1  # a reference count
    for limit in range(0, 400_000, 40_000):
        Path("image").write_bytes(data)
        done = ours(
            "check", "-r", "all", "--max-metadata", str(limit + 1), "image", name="diskwright"
        )
        after = Path("image").read_bytes()
        sound = diskwright.check("image").corruptions == 0
        assert (after == bytes(data) and done.status == 1) or sound, limit
