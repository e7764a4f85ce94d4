"""Encrypted disks: qcow2 by LUKS and by its legacy AES, and the format luks."""

from __future__ import annotations

import shutil
from typing import Any

from content import MIB, WORDS
from guest import Guest, store
from shell import Shell, has_qemu, prove, prove_disk, title

SECRETS = {"first": "hunter2", "second": "correct horse"}


def encrypt(shell: Shell, disk: bytes) -> None:
    title("Encrypted: a qcow2 image by LUKS")
    if not library_is_here():
        print("  (left out, and so are AES and luks: the library `cryptography` is not installed;")
        print("   it is the extra `crypto`)")
        return
    for name, secret in SECRETS.items():
        (shell.folder / f"{name}.key").write_text(secret)
    luks = "encrypt.format=luks,encrypt.key-secret=first,encrypt.iter-time=200"
    into(shell, disk, "qcow2", "secret.qcow2", luks)
    keys(shell, "secret.qcow2", "encrypt.")
    title("Encrypted: by the legacy AES of qcow2")
    into(shell, disk, "qcow2", "aes.qcow2", "encrypt.format=aes,encrypt.key-secret=first")
    title("Encrypted: a LUKS disk without qcow2")
    into(shell, disk, "luks", "disk.luks", "key-secret=first,iter-time=200")
    keys(shell, "disk.luks", "")


def library_is_here() -> bool:
    from diskwright.codecs.aes import library
    from diskwright.errors import UnsupportedFeature

    try:
        library()
    except UnsupportedFeature:
        return False
    return True


def opened(image: str, secret: str) -> str:
    """`--object` and `--image-opts` for ``image`` by the key in ``secret``.key."""
    format = image.rpartition(".")[2]
    key = "key-secret" if format == "luks" else "encrypt.key-secret"
    return f"--image-opts driver={format},file.filename={image},{key}={secret}"


def source(shell: Shell, image: str, secret: str) -> dict[str, Any]:
    """The same for the Python API."""
    format = image.rpartition(".")[2]
    key = "key-secret" if format == "luks" else "encrypt.key-secret"
    file = {"driver": "file", "filename": str(shell.folder / image)}
    return {"driver": format, "file": file, key: secret}


def key(name: str) -> str:
    return f"--object secret,id={name},file={name}.key"


def into(shell: Shell, disk: bytes, format: str, image: str, options: str) -> None:
    """Convert the disk, look whether it is encrypted, write to it, prove it."""
    shell(f"diskwright convert -p {key('first')} -f raw -O {format} -o {options} disk.raw {image}")
    clear = (shell.folder / image).read_bytes()
    known = [word for word in (*WORDS, b"EFI PART") if len(word) > 7 and word in clear]
    prove(not known, f"no text of the disk can be read in {image}", str(known))
    words = opened(image, "first")
    shell(f'diskwright io -r -c "read 0 512" -f {format} {image}', expect=1)
    guest = Guest(disk)
    guest.write(0x61, 11 * MIB + 5, 100_000)
    guest.zero(16 * MIB, 3 * MIB)
    guest.discard(70 * MIB, 4 * MIB)
    if format == "luks":  # it has no map, and what is discarded reads as anything
        guest.zero(70 * MIB, 4 * MIB)
    shell(f"diskwright io {key('first')} {guest.commands()} {words}", show=0)
    prove_disk(source(shell, image, "first"), guest.data, image, secrets=SECRETS)
    store(shell.folder / "model.raw", guest.data)
    if has_qemu():
        shell(f"qemu-img compare {key('first')} --image-opts driver=raw,file.filename=model.raw "
              f"{words.removeprefix('--image-opts ')}")  # fmt: skip


def keys(shell: Shell, image: str, prefix: str) -> None:
    """A second key slot; the first one erased."""
    both = f"{key('first')} {key('second')}"
    add = f"{prefix}state=active,{prefix}new-secret=second,{prefix}iter-time=200"
    shell(f"diskwright amend {both} {opened(image, 'first')} -o {add}")
    for name in SECRETS:
        shell(f'diskwright io -r {key(name)} -c "read -q 0 512" {opened(image, name)}')
    erase = f"{prefix}state=inactive,{prefix}old-secret=first"
    shell(f"diskwright amend {both} {opened(image, 'second')} -o {erase}")
    shell(f'diskwright io -r {key("first")} -c "read 0 512" {opened(image, "first")}', expect=1)
    store_of = (shell.folder / "model.raw").read_bytes()
    prove_disk(source(shell, image, "second"), store_of, f"{image} by its new key", secrets=SECRETS)
    if has_qemu():
        first, words = (opened(image, name).removeprefix("--image-opts ") for name in SECRETS)
        shell(f"qemu-img compare {key('second')} --image-opts driver=raw,file.filename=model.raw "
              f"{words}")  # fmt: skip
        if shutil.which("qemu-io"):
            line = f'qemu-io -r {key("first")} -c "read 0 512" --image-opts {first}'
            shell(line, expect=1)
    if image.endswith(".luks") and shutil.which("cryptsetup"):
        shell(f"cryptsetup open --test-passphrase --key-file second.key {image}")
        shell(f"cryptsetup open --test-passphrase --key-file first.key {image}", expect=2)
