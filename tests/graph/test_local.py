"""The policy ``local``: what images name is opened below their own folder and below allowed ones,
and nowhere else, whatever links, devices and races say."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import ours
from diskwright import Policy
from diskwright.errors import DiskError, Refused, UsageError
from diskwright.graph.graph import chain
from diskwright.ops.gates import gate_of
from diskwright.protocols.beneath import below

QCOW2 = "qcow2"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``vms/`` with an image's own folder, ``bases/`` and ``secret/`` beside it."""
    for name in ("DISKWRIGHT_POLICY", "DISKWRIGHT_ALLOW"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISKWRIGHT_CONFIG", "")
    for folder in ("vms/sub/deep", "bases", "secret"):
        (tmp_path / folder).mkdir(parents=True)
    for path in ("vms/base", "vms/sub/base", "bases/base", "secret/base"):
        diskwright.create(tmp_path / path, format=QCOW2, size=1 << 20)
    monkeypatch.chdir(tmp_path / "vms")
    return tmp_path


def over(name: str, image: str = "top") -> str:
    """An overlay that names ``name``, whether it is there or not."""
    diskwright.create(image, format=QCOW2, size=1 << 20)
    diskwright.rebase(image, name, backing_format=QCOW2, unsafe=True, policy="trusted")
    return image


def layers(image: str, policy: str | Policy | None = None) -> int:
    with diskwright.open(image, policy=policy) as disk:
        return len(list(chain(disk.node)))


@pytest.mark.parametrize(
    "name", ["base", "./base", "sub/base", "sub/deep/../base", "sub/../sub/base", "file:base"]
)
def test_what_lies_below_the_image_is_opened(name: str) -> None:
    assert layers(over(name)) == 2


def test_an_image_may_spell_its_own_folder_in_either_way(here: Path) -> None:
    (here / "link").symlink_to("vms")
    assert layers(over(str(here / "vms" / "base"))) == 2
    assert layers(str(here / "link" / "top")) == 2
    assert layers(over(str(here / "link" / "base"), str(here / "link" / "other"))) == 2
    assert layers(str(here / "vms" / "other"), Policy(allow=(str(here / "link"),))) == 2


@pytest.mark.parametrize(
    "name",
    ["../bases/base", "{here}/bases/base", "sub/../../bases/base", "/etc/hostname", "/dev/null",
     "sub", ".", "fifo", "json:{{\"driver\":\"raw\",\"file.filename\":\"base\"}}", "null-co://",
     "nbd://127.0.0.1:1/x", "away", "away-folder/base", "away-absolute", "sub/deep/up", "round"],
)  # fmt: skip
@pytest.mark.parametrize("walked", [True, False], ids=["openat", "no openat"])
def test_what_leads_away_is_refused(
    name: str, walked: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not walked and name in ("fifo", "round"):
        pytest.skip("a system without openat has no such files")
    os.mkfifo("fifo")
    os.symlink("../bases/base", "away")
    os.symlink("../bases", "away-folder")
    os.symlink(here / "bases" / "base", "away-absolute")
    os.symlink("../../../bases/base", "sub/deep/up")
    os.symlink("round", "round")
    name = name.format(here=here)
    over("base")
    diskwright.rebase("top", name, backing_format=QCOW2, unsafe=True, policy="trusted")
    opened = spied(monkeypatch)
    if not walked:
        monkeypatch.setattr(os, "supports_dir_fd", set())
    with pytest.raises((Refused, OSError)) as caught:
        diskwright.open("top")
    monkeypatch.undo()
    if name in ("sub", ".", "round") and isinstance(caught.value, OSError):
        return  # a folder, or no file at all
    error = caught.value
    assert isinstance(error, Refused), error
    assert (error.reference, error.file) == (name, "top")
    assert "local" in error.rule and "--policy trusted" in error.switch
    if walked:
        assert not {"fifo", "base", "null"} & {os.path.basename(path) for path in opened}


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    real = os.open

    def spy(path: Any, *arguments: Any, **named: Any) -> int:
        opened.append(os.fsdecode(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", spy)
    monkeypatch.setattr(os, "supports_dir_fd", os.supports_dir_fd | {spy})
    return opened


def test_links_that_stay_are_followed(here: Path) -> None:
    os.symlink("sub/base", "one")
    os.symlink(here / "vms" / "one", "two")
    os.symlink("sub/deep", "deep")
    os.symlink("../base", "sub/deep/up")
    assert layers(over("two")) == 2
    assert layers(over("deep/up")) == 2


def test_the_switch_that_a_refusal_names_opens_it(here: Path) -> None:
    over("../bases/base")
    with pytest.raises(Refused) as caught:
        layers("top")
    folder = str(here / "bases")
    assert f"'--allow {folder}'" in caught.value.switch
    assert layers("top", Policy(allow=(folder,))) == 2
    assert ours("map", "top", cwd=here / "vms", policy="").status == 1
    assert ours("map", "--allow", folder, "top", cwd=here / "vms", policy="").status == 0
    assert ours("map", "--allow", "../bases", "top", cwd=here / "vms", policy="").status == 0
    done = ours(
        "map", "--allow", folder, "--policy", "untrusted", "top", cwd=here / "vms", policy=""
    )
    assert done.status == 1 and b"'untrusted'" in done.err


def test_each_image_of_a_chain_has_its_own_folder(here: Path) -> None:
    over("base", str(here / "bases" / "middle"))
    over("../bases/middle")
    allowed = Policy(allow=(str(here / "bases"),))
    assert layers("top", allowed) == 3
    over(str(here / "secret" / "base"), str(here / "bases" / "middle"))
    with pytest.raises(Refused) as caught:
        layers("top", allowed)
    assert caught.value.file.endswith("bases/middle")
    over("../base", "sub/middle")  # in the folder of the top, not in that of the one that names it
    over("sub/middle")
    with pytest.raises(Refused):
        layers("top")


def test_a_link_into_another_allowed_folder(here: Path) -> None:
    os.symlink(here / "bases" / "base", "away")
    over("away")
    with pytest.raises(Refused):
        layers("top")
    assert layers("top", Policy(allow=(str(here / "bases"),))) == 2


@pytest.mark.parametrize("swapped", ["base", "sub"])
def test_what_is_swapped_for_a_link_meanwhile_is_not_followed(
    swapped: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over("sub/base" if swapped == "sub" else "base")
    real = os.stat

    def look(path: Any, *arguments: Any, **named: Any) -> os.stat_result:
        found = real(path, *arguments, **named)
        if path == swapped and "dir_fd" in named and not stat.S_ISLNK(found.st_mode):
            os.rename(here / "vms" / swapped, here / "vms" / "moved")
            os.symlink(here / "bases" / ("base" if swapped == "base" else ""), swapped)
        return found

    monkeypatch.setattr(os, "stat", look)
    monkeypatch.setattr(os, "supports_dir_fd", os.supports_dir_fd | {look})
    with pytest.raises((DiskError, OSError)):
        layers("top")


def test_files_of_one_disk_pass_too(here: Path) -> None:
    data = here / "bases" / "data"
    diskwright.create("near", format=QCOW2, size=1 << 20, options={"data_file": "near.data"})
    diskwright.create("far", format=QCOW2, size=1 << 20, options={"data_file": str(data)})
    for writable in (False, True):
        with diskwright.open("near", writable=writable) as disk:
            assert disk.read_at(0, 512) == bytes(512)
        with pytest.raises(Refused, match="data file"):
            diskwright.open("far", writable=writable)
        with diskwright.open("far", writable=writable, policy=Policy(allow=(str(here),))) as disk:
            assert disk.read_at(0, 512) == bytes(512)
    data.unlink()
    (here / "vms" / "data").symlink_to(here / "secret" / "base")
    diskwright.create("linked", format=QCOW2, size=1 << 20, options={"data_file": "linked.data"})
    os.unlink("linked.data")
    os.symlink(here / "secret" / "base", "linked.data")
    kept = (here / "secret" / "base").read_bytes()
    with pytest.raises(Refused):
        diskwright.open("linked", writable=True)
    assert (here / "secret" / "base").read_bytes() == kept


def test_what_the_caller_typed_is_not_held_to_a_folder(here: Path) -> None:
    diskwright.create("typed", format=QCOW2, options={"backing_file": "../bases/base",
                                             "backing_fmt": QCOW2})  # fmt: skip
    described = {"driver": QCOW2, "file.filename": "typed",
                 "backing": {"driver": QCOW2, "file.filename": "../bases/base"}}  # fmt: skip
    with diskwright.open(described) as disk:
        assert len(list(chain(disk.node))) == 2


def test_where_the_policy_and_the_folders_come_from(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = here / "config.toml"
    monkeypatch.setenv("DISKWRIGHT_CONFIG", str(config))
    with pytest.raises(UsageError, match="cannot be read"):
        gate_of()
    config.write_text("")
    assert gate_of().policy == "local"
    config.write_text(
        'policy = "untrusted"\nallow = ["bases", "~/x"]\n[map-path]\n"C:\\\\" = "/c"\n'
    )
    gate = gate_of(Policy(allow=("typed",)))
    assert (gate.policy, gate.paths) == ("untrusted", {"C:\\": "/c"})
    assert gate.folders == ("typed", str(here / "bases"), os.path.expanduser("~/x"))
    monkeypatch.setenv("DISKWRIGHT_ALLOW", os.pathsep.join(["/one", "/two"]))
    monkeypatch.setenv("DISKWRIGHT_POLICY", "trusted")
    assert gate_of().policy == "trusted" and gate_of().folders[:2] == ("/one", "/two")
    assert gate_of("local").policy == "local"
    for text, what in (
        ("policy = 1", "'policy' is a word"),
        ("allow = 'x'", "'allow' is a list"),
        ("map-path = 'x'", "'map-path' is a table"),
        ("colour = 'x'", "unknown key 'colour'"),
        ("= 1", "config.toml"),
    ):
        config.write_text(text)
        with pytest.raises(UsageError, match=what):
            gate_of()


def test_the_default_is_local_under_every_name(here: Path) -> None:
    over("base")
    assert ours("info", "--backing-chain", "top", cwd=here / "vms", policy="").status == 0
    over("../bases/base")
    done = ours("map", "top", cwd=here / "vms", policy="")
    assert done.status == 1 and b"the policy 'local'" in done.err


def test_below() -> None:
    assert below("/a/b/c", ["/a/b", "/a", "/x"]) == ("/a", ["b", "c"])
    assert below("/a//./b/../c", ["/a/"]) == ("/a/", ["b", "..", "c"])
    assert below("/ab", ["/a"]) is None and below("/a", ["/a"]) is None
