"""Where paths of other machines are: from the command line, the environment, and Python."""

from __future__ import annotations

import pytest

from cli.support import ours
from diskwright.errors import UsageError
from diskwright.ops.gates import from_environment, gate_of, pairs


def test_pairs() -> None:
    assert pairs(["C:\\VMs=/srv/a=b", "D:/=/d"], "x") == {"C:\\VMs": "/srv/a=b", "D:/": "/d"}
    for word in ("C:\\VMs", "=/srv", "C:\\VMs="):
        with pytest.raises(UsageError, match="x expects FROM=TO"):
            pairs([word], "x")


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISKWRIGHT_MAP_PATH", raising=False)
    assert from_environment() == {}
    monkeypatch.setenv("DISKWRIGHT_MAP_PATH", "C:\\=/c;D:\\x=/with;;semicolon;")
    assert from_environment() == {"C:\\": "/c", "D:\\x": "/with;semicolon"}
    gate = gate_of(map_paths={"C:\\": "/other"})
    assert gate.paths.paths == {"C:\\": "/other", "D:\\x": "/with;semicolon"}
    monkeypatch.setenv("DISKWRIGHT_MAP_PATH", "C:\\")
    with pytest.raises(UsageError, match="DISKWRIGHT_MAP_PATH expects FROM=TO"):
        gate_of()


def test_on_the_command_line(tmp_path) -> None:
    assert ours("create", "-f", "raw", "a", "1M", cwd=tmp_path).status == 0
    words = ("info", "-f", "raw", "--map-path", "C:\\=/c", "--map-path=D:\\=/d", "a")
    assert ours(*words, cwd=tmp_path).status == 0
    done = ours("info", "-f", "raw", "--map-path", "nothing", "a", cwd=tmp_path)
    assert (done.status, done.err) == (1, b"qemu-img: --map-path expects FROM=TO, not 'nothing'\n")
