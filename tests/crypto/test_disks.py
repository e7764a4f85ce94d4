"""Encrypted disks: both directions with QEMU's tools, cryptsetup as a second judge, key slots, and
headers that break the specification."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import ours
from diskwright.errors import DiskError, MalformedImage, UnsupportedFeature, UsageError
from diskwright.formats import luks1

pytest.importorskip("cryptography.hazmat.primitives.ciphers")
QEMU = shutil.which("qemu-img")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="qemu-img is not installed")
SECRETS = {"s0": "hunter2", "s1": "second"}
OBJECT = ["--object", "secret,id=s0,data=hunter2"]
SIZE = (1 << 20) + 3 * 512

SPECS: list[dict[str, Any]] = [
    {},
    {"cipher-alg": "aes-128", "hash-alg": "sha1", "ivgen-alg": "plain"},
    {"cipher-alg": "aes-192", "hash-alg": "sha224"},
    {"cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha512"},
    {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "plain64", "hash-alg": "sha384"},
]
AES = {"format": "aes"}


def source(path: Path, fmt: str) -> dict[str, Any]:
    key = "key-secret" if fmt == "luks" else "encrypt.key-secret"
    return {"driver": fmt, "file": {"driver": "file", "filename": str(path)}, key: "s0"}


def image_opts(path: Path, fmt: str) -> str:
    key = "key-secret" if fmt == "luks" else "encrypt.key-secret"
    return f"driver={fmt},file.filename={path},{key}=s0"


def options(fmt: str, spec: dict[str, Any]) -> dict[str, Any]:
    given = {"key-secret": "s0", **({} if spec == AES else {"iter-time": 5}), **spec}
    if fmt == "luks":
        return given
    return {f"encrypt.{name}": value for name, value in {"format": "luks", **given}.items()}


def made(path: Path, fmt: str = "luks", **spec: Any) -> dict[str, Any]:
    diskwright.create(path, format=fmt, size=SIZE, options=options(fmt, spec), secrets=SECRETS)
    return source(path, fmt)


def qemu(*words: Any) -> None:
    done = subprocess.run([str(QEMU), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def scribble(disk: Any, model: bytearray, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        length = rng.choice([1, 7, 512, 700, 4096, 65536, 300_000])
        offset = rng.randrange(len(model) - length + 1)
        data = rng.randbytes(length) if rng.random() < 0.8 else bytes(length)
        if any(data):
            disk.write_at(offset, data)
        else:
            disk.zero(offset, length, unmap=rng.random() < 0.5)
        model[offset : offset + length] = data
        assert disk.read_at(offset, length) == data


# qemu-img measures for seconds how fast it hashes whenever it makes a disk.
_SOON = [("luks", 0), ("luks", 3), ("qcow2", 1)]
THEIRS = [
    pytest.param(fmt, spec, marks=[] if (fmt, number) in _SOON else [pytest.mark.long])
    for fmt in ("luks", "qcow2")
    for number, spec in enumerate(SPECS)
]


@needs_qemu
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("fmt", ["luks", "qcow2"])
def test_qemu_reads_ours(tmp_path: Path, fmt: str, spec: dict[str, Any]) -> None:
    ours, plain = tmp_path / "ours", tmp_path / "plain"
    model = bytearray(SIZE)
    with diskwright.open(made(ours, fmt, **spec), writable=True, secrets=SECRETS) as disk:
        if fmt == "luks":
            disk.write_at(0, bytes(SIZE))
        scribble(disk, model, 1)
    qemu("convert", *OBJECT, "--image-opts", image_opts(ours, fmt), "-O", "raw", plain)
    assert plain.read_bytes() == model


@needs_qemu
@pytest.mark.parametrize("fmt, spec", THEIRS)
def test_we_read_and_write_theirs(tmp_path: Path, fmt: str, spec: dict[str, Any]) -> None:
    theirs, plain = tmp_path / "theirs", tmp_path / "plain"
    model = bytearray(random.Random(5).randbytes(SIZE))
    model[200_000:700_000] = bytes(500_000)
    plain.write_bytes(model)
    words = ",".join(f"{k}={v}" for k, v in options(fmt, spec).items())
    qemu("convert", *OBJECT, "-f", "raw", "-O", fmt, "-o", words, plain, theirs)
    with diskwright.open(source(theirs, fmt), writable=True, secrets=SECRETS) as disk:
        assert disk.read_at(0, SIZE) == model
        scribble(disk, model, 2)
    qemu("convert", *OBJECT, "--image-opts", image_opts(theirs, fmt), "-O", "raw", plain)
    assert plain.read_bytes() == model


@needs_qemu
@pytest.mark.parametrize(
    "more",
    [{}, {"compat": "0.10"}, {"cluster_size": 512}, {"extended_l2": True},
     {"preallocation": "metadata"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("spec", [{}, AES], ids=["luks", "aes"])
def test_with_other_features(tmp_path: Path, spec: dict[str, Any], more: dict[str, Any]) -> None:
    if more.get("preallocation") and more.get("compat"):
        pytest.skip("zero flags are of version 3")
    path, plain = tmp_path / "disk", tmp_path / "plain"
    diskwright.create(
        path, format="qcow2", size=SIZE, options={**options("qcow2", spec), **more}, secrets=SECRETS
    )
    model = bytearray(SIZE)
    with diskwright.open(source(path, "qcow2"), writable=True, secrets=SECRETS) as disk:
        assert disk.read_at(0, SIZE) == model
        scribble(disk, model, 3)
    qemu("check", *OBJECT, "--image-opts", image_opts(path, "qcow2"))
    # What is behind the end of the disk must be zero when another program shows it.
    qemu("resize", *OBJECT, "--image-opts", image_opts(path, "qcow2"), SIZE + 65536)
    qemu("convert", *OBJECT, "--image-opts", image_opts(path, "qcow2"), "-O", "raw", plain)
    assert plain.read_bytes() == model + bytes(65536)


def test_an_end_in_the_midst_of_a_sector(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    diskwright.create(
        path, format="qcow2", size=1024, options=options("qcow2", AES), secrets=SECRETS
    )
    with diskwright.open(source(path, "qcow2"), writable=True, secrets=SECRETS) as disk:
        disk.write_at(0, b"x" * 1024)
    with path.open("r+b") as file:
        file.seek(24)
        file.write((600).to_bytes(8, "big"))
    with diskwright.open(source(path, "qcow2"), secrets=SECRETS) as disk:
        assert disk.read_at(0, 600) == b"x" * 600
    with diskwright.open(source(path, "qcow2"), writable=True, secrets=SECRETS) as disk:
        for change in (lambda: disk.write_at(0, b"y"), lambda: disk.resize(65536)):
            with pytest.raises(UnsupportedFeature, match="encrypted disk of 600 bytes"):
                change()


@pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="cryptsetup is not installed")
def test_cryptsetup_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    made(path)
    words = ["cryptsetup", "open", "--test-passphrase", "--key-file", "-", str(path)]
    assert subprocess.run(words, input=b"hunter2", capture_output=True).returncode == 0
    assert subprocess.run(words, input=b"wrong", capture_output=True).returncode == 2


@pytest.mark.parametrize("fmt", ["luks", "qcow2"])
def test_without_the_right_secret(tmp_path: Path, fmt: str) -> None:
    where = made(tmp_path / "disk", fmt)
    prefix = "" if fmt == "luks" else "encrypt."
    with pytest.raises(UsageError, match="Invalid password, cannot unlock any keyslot"):
        diskwright.open(where, secrets={"s0": "wrong"})
    with pytest.raises(UsageError, match="No secret with id 's0'"):
        diskwright.open(where)
    with pytest.raises(UsageError, match=f"'{prefix}key-secret' is required for cipher"):
        diskwright.open(tmp_path / "disk")
    found = diskwright.info(tmp_path / "disk")
    assert found.encrypted
    assert "hunter2" not in repr(found)


@pytest.mark.parametrize(
    "spec, error",
    [
        ({"cipher-alg": "serpent-256"}, UnsupportedFeature),
        ({"cipher-alg": "foo"}, UsageError),
        ({"cipher-mode": "ctr"}, UnsupportedFeature),
        ({"hash-alg": "md5"}, UnsupportedFeature),
        ({"ivgen-alg": "essiv", "ivgen-hash-alg": "sha1"}, UsageError),
    ],
    ids=str,
)
def test_what_is_refused_by_name(tmp_path: Path, spec: dict[str, Any], error: Any) -> None:
    with pytest.raises(error):
        made(tmp_path / "disk", "luks", **spec)
    assert not (tmp_path / "disk").exists()


def test_the_splitter() -> None:
    key = random.Random(1).randbytes(24)
    for name in ("sha1", "sha256", "sha512"):
        assert luks1.merge(luks1.split(key, 50, name), 24, 50, name) == key


@pytest.mark.parametrize(
    "offset, value",
    [
        (6, b"\0\2"),  # the version
        (40, b"xts-\xff"),  # not text
        (104, struct.pack(">I", 1)),  # the disk inside the header
        (104, struct.pack(">I", 0xFFFFFFFF)),  # the disk behind the end
        (108, struct.pack(">I", 0)),  # no key
        (108, struct.pack(">I", 1 << 31)),  # a huge one
        (164, struct.pack(">I", 0)),  # no hashing
        (208, b"\0\0\0\0"),  # no state
        (212, struct.pack(">I", 0)),
        (248, struct.pack(">I", 0)),  # key material over the header
        (248, struct.pack(">I", 0xFFFFFFFF)),
        (248, struct.pack(">I", 512)),  # over that of the next slot
        (252, struct.pack(">I", 0)),
        (252, struct.pack(">I", 0xFFFFFFFF)),
    ],
)
def test_hostile_headers(tmp_path: Path, offset: int, value: bytes) -> None:
    path = tmp_path / "disk"
    where = made(path)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    with pytest.raises((MalformedImage, UnsupportedFeature)):
        diskwright.open(where, secrets=SECRETS)
    with pytest.raises(DiskError):
        diskwright.info(path, format="luks")


def hashing(path: Path, slots: int, iterations: int, digest: int) -> None:
    """Let ``slots`` key slots be active and ask for so much."""
    with path.open("r+b") as file:
        file.seek(164)
        file.write(struct.pack(">I", digest))
        for slot in range(slots):
            file.seek(luks1.slot_place(slot))
            file.write(struct.pack(">II", luks1.ACTIVE, iterations))


# By default a key is two blocks of its hash.
ALLOWED = luks1.MOST_ROUNDS // 8 // 2 - 1000


@pytest.mark.parametrize(
    "slots, iterations, digest",
    [(1, 0xFFFFFFFF, 1), (1, 1, 0xFFFFFFFF), (1, 1 << 26, 1), (8, ALLOWED, 2001)],
)
def test_a_header_that_asks_for_hours_of_hashing(
    tmp_path: Path, slots: int, iterations: int, digest: int
) -> None:
    path = tmp_path / "disk"
    where = made(path)
    hashing(path, slots, iterations, digest)
    with pytest.raises(MalformedImage, match="rounds of hashing") as refused:
        diskwright.open(where, secrets=SECRETS)
    assert refused.value.field == "iterations"
    info = diskwright.info(path, format="luks")
    assert info.format == "luks"


@pytest.mark.long
def test_the_most_hashing_that_a_header_may_ask_for(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    where = made(path)
    hashing(path, 8, ALLOWED, 2000)
    start = time.monotonic()
    with pytest.raises(UsageError, match="Invalid password"):
        diskwright.open(where, secrets={"s0": "wrong"})
    assert time.monotonic() - start < 300


def test_no_slot_is_made_that_would_not_be_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = made(tmp_path / "disk")
    monkeypatch.setattr(luks1, "MOST_ROUNDS", 100_000)
    with pytest.raises(UsageError, match="iter-time is too long"):
        diskwright.amend(
            where, {"state": "active", "new-secret": "s1", "iter-time": 500}, secrets=SECRETS
        )
    with pytest.raises(UsageError, match="iter-time is too long"):
        diskwright.create(
            tmp_path / "other", format="luks", size=SIZE,
            options={"key-secret": "s0", "iter-time": 500}, secrets=SECRETS,
        )  # fmt: skip


@pytest.mark.parametrize("fmt", ["luks", "qcow2"])
def test_key_slots(tmp_path: Path, fmt: str) -> None:
    path = tmp_path / "disk"
    where = made(path, fmt)
    prefix = "" if fmt == "luks" else "encrypt."

    def amend(force: bool = False, **words: Any) -> None:
        given = {prefix + name.replace("_", "-"): value for name, value in words.items()}
        diskwright.amend(where, given, secrets=SECRETS, force=force)

    def opens(secret: str) -> bool:
        try:
            diskwright.open(where, secrets={"s0": secret}).close()
        except UsageError:
            return False
        return True

    with pytest.raises(UsageError, match="the only active keyslot 0"):
        amend(state="inactive", keyslot=0)
    amend(state="active", new_secret="s1", iter_time=5, keyslot=6)
    assert opens("hunter2") and opens("second")
    with pytest.raises(UsageError, match="Refusing to overwrite active keyslot 6"):
        amend(state="active", new_secret="s1", keyslot=6)
    amend(state="inactive", old_secret="s1")
    assert opens("hunter2") and not opens("second")
    amend(state="inactive", keyslot=0, force=True)
    assert not opens("hunter2")


@pytest.mark.parametrize("fmt", ["luks", "qcow2"])
@pytest.mark.parametrize("how", [diskwright.convert, diskwright.salvage])
def test_what_is_empty_reads_as_zeroes_in_a_new_encrypted_disk(
    tmp_path: Path, fmt: str, how: Any
) -> None:
    """Bytes that were never written are not zeroes once decrypted, so zeroes are written."""
    plain, path = tmp_path / "plain", tmp_path / "disk"
    model = bytearray(SIZE)
    model[300_000:300_005] = b"bytes"
    plain.write_bytes(model)
    how(plain, path, target_format=fmt, format="raw", options=options(fmt, {}), secrets=SECRETS)
    with diskwright.open(source(path, fmt), secrets=SECRETS) as disk:
        assert disk.read_at(0, SIZE) == model


@pytest.mark.parametrize("spec", [{}, AES], ids=["luks", "aes"])
def test_nothing_is_compressed_into_an_encrypted_overlay(
    tmp_path: Path, spec: dict[str, Any]
) -> None:
    """It would stand there as it is, unencrypted."""
    base, path = tmp_path / "base", tmp_path / "disk"
    base.write_bytes(b"in plain " * 1000)
    given = {**options("qcow2", spec), "backing_file": str(base), "backing_fmt": "raw"}
    diskwright.create(path, format="qcow2", size=SIZE, options=given, secrets=SECRETS)
    before = path.read_bytes()
    done = ours(
        "rebase", "-c", "-b", "", *OBJECT, "--image-opts", image_opts(path, "qcow2")
    )
    assert done.status == 1
    assert b"Compression and encryption not supported at the same time" in done.err
    assert path.read_bytes() == before
