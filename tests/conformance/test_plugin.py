"""The pytest plugin, as another project would use it, and what it gives."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diskwright
from diskwright.testing import RecordingFile, crash_states, make_image

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
PLUGIN = "diskwright.testing.plugin"
TEST = """
from diskwright.testing.subjects import subjects

def test_mine(conformance):
    conformance(next(s for s in subjects() if s.name == "null"))

def test_seed(seeded_driver, recording_leaf):
    leaf = recording_leaf(b"abc", delay=5)
    (data,) = seeded_driver.run(leaf.read([1], [2]))
    assert data == b"bc"
"""


def test_the_plugin_and_the_examples_of_its_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "test_mine.py").write_text(TEST)
    (tmp_path / "test_page.py").write_text("\n".join(examples))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "--diskwright-seed=7", "-Werror"],
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{2 + page.count('def test_')} passed" in run.stdout


def test_the_plugin_imports_nothing_before_it_is_used() -> None:
    code = f"""
import json, sys, pytest
before = set(sys.modules)
import {PLUGIN}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, check=True)
    package = {"diskwright", "diskwright.hints", "diskwright.testing"}
    assert set(json.loads(done.stdout)) <= {*package, PLUGIN}


def test_images_of_every_kind(tmp_path: Path) -> None:
    pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    for format in ("raw", "qcow2", "vmdk", "vhdx"):
        path = make_image(tmp_path, format=format, size=2 << 20, content={512: b"here"})
        assert path.name == f"disk0.{format}"
        with diskwright.open(path, format=format) as disk:
            assert disk.size == 2 << 20 and disk.read_at(511, 5) == b"\0here"
    options = {"encrypt.format": "luks", "encrypt.key-secret": "k", "encrypt.iter-time": 1}
    path = make_image(tmp_path, "locked", options=options, content=b"x", secrets={"k": "word"})
    assert diskwright.info(path).encrypted
    top = make_image(tmp_path, backing=make_image(tmp_path, content=b"below"))
    assert (tmp_path / "disk1.qcow2").exists() and top.name == "disk2.qcow2"
    with diskwright.open(top) as disk:
        assert disk.read_at(0, 5) == b"below"


def test_a_file_fails_as_it_is_told() -> None:
    file = RecordingFile(b"0123456789", capacity=16, transfer=4)
    assert (file.read(100), file.tell(), file.seek(0, os.SEEK_END)) == (b"0123", 4, 10)
    file.fail("write", 2, kept=2)
    assert file.write(b"abcdef") == 4
    with pytest.raises(OSError) as caught:
        file.write(b"efgh")
    assert caught.value.errno == errno.EIO and bytes(file.data) == b"0123456789abcdef"
    assert file.tell() == 14 and file.seek(16)
    with pytest.raises(OSError) as caught:
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError):
        file.truncate(20)
    file.fail("read", code=errno.ENXIO)
    with pytest.raises(OSError):
        file.read(1)
    assert file.calls == {"read": 2, "write": 3, "truncate": 1}
    with pytest.raises(ValueError, match="none of read, write"):
        file.fail("seek")


def test_crash_states_are_what_may_be_left() -> None:
    def work(file: RecordingFile) -> None:
        file.write(b"A" * 1024)
        file.flush()
        file.mark("first")
        file.write(b"B" * 1024)
        file.fail("flush")
        with pytest.raises(OSError):
            file.flush()
        file.flush()  # what the system has forgotten it does not find again
        file.mark("second")
        file.truncate(512)

    found = list(crash_states(work, b"", each=40, most=1000))
    assert {crash.marks for crash in found} == {(), ("first",), ("first", "second")}
    assert {crash.changes for crash in found} == {0, 1, 2, 3}
    for crash in found:
        if crash.marks:
            assert crash.image[:512] == b"A" * 512
    lengths = {len(crash.image) for crash in found if "second" in crash.marks}
    assert {512, 1024, 2048} <= lengths
    torn = {crash.image[1024:] for crash in found if crash.marks == ("first",)}
    assert {b"", b"B" * 512 + bytes(512), bytes(512) + b"B" * 512, b"B" * 1024} <= torn
    assert found == list(crash_states(work, b"", each=40, most=1000))
    assert len(list(crash_states(work, b"", most=3))) == 3


def test_disks_over_such_files(tmp_path: Path) -> None:
    base = make_image(tmp_path, content=b"below")
    top = RecordingFile(make_image(tmp_path, backing=base))
    below = {"driver": "qcow2", "file": {"driver": "file", "filename": str(base)}}
    with diskwright.open(top, options={"backing": below}) as disk:
        assert disk.read_at(0, 5) == b"below"
    assert isinstance(top, io.RawIOBase) and not top.closed
