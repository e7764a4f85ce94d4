"""Published attacks by disk images, built byte for byte: none of them opens or changes a file of
the host.  docs/security.md has the table of what each was."""

from __future__ import annotations

import os
import shlex
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import diskwright
from cli.support import Result, ours, spied
from diskwright.errors import DiskError
from house.tinyvmdk import hosted

SECRET = b"root:x:0:0 " * 4096
SIZE = len(SECRET)
POLICIES = ("untrusted", "local")

# What reads, or changes, the disk.  The first ones look at the image alone.
LOOKS = ("info", "snapshot -l")
HEADER_ALONE = ("info --backing-chain",)
VERBS = (
    "info --backing-chain",
    "map",
    "map --output=json",
    "check -r all",
    "convert -O raw {} out.raw",
    "convert -c -O qcow2 {} out.qcow2",
    "compare {} other.raw",
    "dd if={} of=out.dd",
    "digest",
    "measure -O qcow2",
    "resize {} +1M",
    "resize --shrink {} 512",
    "commit",
    "rebase -b other.raw -F raw",
    "bench -c 1",
    "io -r -c 'read 0 512'",
    "io -c 'write 0 512'",
    "salvage -O raw {} out.salvaged",
)


def flat_descriptor(image: Path, secret: Path) -> None:
    """CVE-2022-47951: a VMDK descriptor whose flat extent is a file of the host."""
    image.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW {SIZE // 512} FLAT "{secret}" 0\n'
    )


def embedded_descriptor(image: Path, secret: Path) -> None:
    """The same inside a sparse extent, which passes for a file of one piece."""
    text = (
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW {SIZE // 512} FLAT "{secret}" 0\n'
    )
    whole = bytearray(hosted(1 << 20))
    whole[512 : 21 * 512] = text.encode().ljust(20 * 512, b"\0")
    image.write_bytes(whole)


def data_file(image: Path, secret: Path) -> None:
    """CVE-2024-32498: a qcow2 image whose external data file is a file of the host."""
    options = {"data_file": str(secret), "data_file_raw": "on"}
    diskwright.create(image, format="qcow2", size=SIZE, options=options)
    secret.write_bytes(SECRET)


def backing_file(image: Path, secret: Path) -> None:
    """A qcow2 image whose backing file is one of the host, called raw so that all of it shows."""
    diskwright.create(image, format="qcow2", size=SIZE)
    diskwright.rebase(image, str(secret), backing_format="raw", unsafe=True, policy="trusted")


def json_backing_file(image: Path, secret: Path) -> None:
    """The same by a name that is a description of nodes."""
    name = f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}'
    diskwright.create(image, format="qcow2", size=SIZE)
    diskwright.rebase(image, name, backing_format="raw", unsafe=True, policy="trusted")


def guest_header(image: Path, secret: Path) -> None:
    """CVE-2024-44082, CVE-2026-24708: what is said, or was made, to be a raw disk begins with the
    header of a qcow2 image, which its guest wrote, and names a file of the host."""
    data_file(image, secret)
    with image.open("r+b") as file:
        file.truncate(8 << 20)


ATTACKS = (
    flat_descriptor,
    embedded_descriptor,
    data_file,
    backing_file,
    json_backing_file,
    guest_header,
)


@pytest.fixture
def attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An upload in a folder of its own, and the secret in another one."""
    for folder in ("uploads", "host"):
        (tmp_path / folder).mkdir()
    secret = tmp_path / "host" / "secret"
    secret.write_bytes(SECRET)
    (tmp_path / "uploads" / "other.raw").write_bytes(bytes(SIZE))
    monkeypatch.chdir(tmp_path / "uploads")

    def build(attack: Callable[[Path, Path], None]) -> Path:
        attack(tmp_path / "uploads" / "upload", secret)
        return secret

    return build


def run(words: str, policy: str) -> Result:
    """A verb on the upload, in this process."""
    verb, *rest = shlex.split(words.format("upload", "upload"))
    if "{}" not in words and verb != "dd":
        rest.append("upload")
    return ours(verb, *rest, name="diskwright", policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nothing_of_the_host_is_opened_shown_or_changed(
    attack: Callable[[Path, Path], None],
    policy: str,
    attacked: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = attacked(attack)
    before = secret.stat()
    upload = Path("upload").read_bytes()
    for words in (*LOOKS, *VERBS):
        with monkeypatch.context() as patched:
            opened = spied(patched)
            done = run(words, policy)
        assert secret.name not in map(os.path.basename, opened), words
        assert SECRET[:32] not in done.out + done.err, words
        for made in Path().glob("out.*"):
            assert SECRET[:32] not in made.read_bytes(), words
            made.unlink()
        Path("upload").write_bytes(upload)
    after = secret.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_each_of_these_verbs_would_open_it_if_it_was_trusted(
    attacked: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = attacked(data_file)
    upload = Path("upload").read_bytes()
    for words in VERBS:
        with monkeypatch.context() as patched:
            opened = spied(patched)
            run(words, "trusted")
        assert (secret.name in map(os.path.basename, opened)) == (words not in HEADER_ALONE), words
        Path("upload").write_bytes(upload)
        secret.write_bytes(SECRET)
        for made in Path().glob("out.*"):
            made.unlink()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("words", ["convert -O raw {} out.raw", "map", "resize {} +1M"])
def test_the_refusal_says_what_and_why(
    attack: Callable[[Path, Path], None], policy: str, words: str, attacked: Callable[..., Path]
) -> None:
    secret = attacked(attack)
    done = run(words, policy)
    assert done.status == 1
    if attack is not embedded_descriptor:  # which no reader may follow at all
        assert str(secret).encode() in done.err
        assert policy.encode() in done.err


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_inspect_tells_before_anybody_opens_it(
    attack: Callable[[Path, Path], None],
    attacked: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = attacked(attack)
    with monkeypatch.context() as patched:
        opened = spied(patched)
        found = diskwright.inspect("upload")
        gate = ours("inspect", "--require", "self-contained,raw", "upload", name="diskwright")
        said_raw = ours("inspect", "-f", "raw", "upload", name="diskwright")
    assert secret.name not in map(os.path.basename, opened)
    assert found.verdict in ("refers", "damaged")
    assert any(str(secret) in reference.name for reference in found.references)
    assert (gate.status, said_raw.status) == (2, 2)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_raw_disk_with_a_guests_header_grows_as_raw(
    policy: str, attacked: Callable[..., Path]
) -> None:
    """CVE-2026-24708: with the format given, the header is data; nothing is destroyed."""
    secret = attacked(guest_header)
    before = Path("upload").read_bytes()
    assert run("resize -f raw {} 16M", policy).status == 0
    after = Path("upload").read_bytes()
    assert len(after) == 16 << 20 and after.startswith(before)
    assert secret.read_bytes() == SECRET


def test_a_guest_cannot_write_such_a_header_to_a_disk_that_was_guessed_raw(tmp_path: Path) -> None:
    """The beginning of CVE-2026-24708, where it goes through us."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    header = b"QFI\xfb" + struct.pack(">I", 3)
    with (
        diskwright.open(tmp_path / "disk", writable=True) as disk,
        pytest.raises(PermissionError, match="qcow2"),
    ):
        disk.write_at(0, header)
    assert diskwright.inspect(tmp_path / "disk").verdict == "raw"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_file_of_two_formats_is_opened_as_neither(
    policy: str, attacked: Callable[..., Path]
) -> None:
    """CVE-2024-44082: who checks an image must see what the one who uses it will see."""
    attacked(backing_file)
    with open("upload", "ab") as file:
        file.write(b"conectix".ljust(512, b"\0"))
    with pytest.raises(DiskError, match="several formats"):
        diskwright.open("upload", policy=policy)
    assert diskwright.inspect("upload").verdict == "ambiguous"
