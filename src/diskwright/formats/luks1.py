"""The LUKS1 header (LUKS On-Disk Format Specification 1.2): its fields, and the keys in them.

The key of the disk (the *master key*) stands in up to eight *key slots*, each time encrypted with
a passphrase and blown up to thousands of stripes, so that a slot can be wiped.  What
reads, writes and changes slots is in :mod:`.luks1_slots`; functions here are pure and slow, for the
pool.  Offsets are bytes from the start of the header.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from itertools import pairwise
from secrets import token_bytes

from ..codecs.aes import SECTOR
from ..errors import MalformedImage, UnsupportedFeature
from ..hints import Any
from ..ondisk import Fields
from ..records import NamedTuple
from ..units import align_up
from .ciphering import Spec, digest_bytes, parse_spec

MAGIC = b"LUKS\xba\xbe"
LENGTH = 592
SLOTS = 8
STRIPES = 4000
DIGEST, SALT = 20, 32
ALIGNMENT = 4096
"""Key material, and the payload, begin on multiples of it in headers that are made here."""
LEAST_ITERATIONS = 1000
MOST_ROUNDS = 1 << 27
"""Hashing that trying all active slots of a header may cost, in rounds of PBKDF2.

A wrong passphrase costs all of it: about a minute at two million rounds a second.  What asks for
more is no header but an attack: eight slots of two seconds each, made by a processor that does
seven million, stay below.
"""
ACTIVE, INACTIVE = 0x00AC71F3, 0x0000DEAD

HEAD = Fields(
    ">",
    "magic:6s version:H cipher-name:32s cipher-mode:32s hash-spec:32s payload-offset:I "
    "key-bytes:I mk-digest:20s mk-digest-salt:32s mk-digest-iterations:I uuid:40s",
)
KEY_SLOT = Fields(">", "active:I iterations:I salt:32s key-material-offset:I stripes:I")
_MOST_KEY = 64
_MOST_MATERIAL = 1 << 20


class Slot(NamedTuple):
    """One key slot; ``offset`` is that of its key material."""

    active: bool
    iterations: int
    salt: bytes
    offset: int
    stripes: int = STRIPES

    def encode(self) -> bytes:
        """The 48 bytes of the slot."""
        return KEY_SLOT.pack(
            ACTIVE if self.active else INACTIVE,
            self.iterations,
            self.salt,
            self.offset // SECTOR,
            self.stripes,
        )


class Header(NamedTuple):
    """All fields; ``payload`` is where the disk begins (0 where it is in another file)."""

    spec: Spec
    hash: str
    payload: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[Slot, ...]

    def encode(self) -> bytes:
        """The 592 bytes of the header."""
        return HEAD.pack(
            MAGIC,
            1,
            self.spec.cipher.encode(),
            self.spec.text.encode(),
            self.hash.encode(),
            self.payload // SECTOR,
            self.key_bytes,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode(),
        ) + b"".join(slot.encode() for slot in self.slots)

    def material(self, slot: Slot) -> int:
        """Bytes of a slot's key material, whole sectors."""
        return align_up(self.key_bytes * slot.stripes, SECTOR)

    def check_effort(self) -> None:
        """Raise MalformedImage where trying all active slots takes more than MOST_ROUNDS."""
        rounds = 0
        for index, slot in enumerate(self.slots):
            if slot.active:
                rounds += slot.iterations * self._blocks(self.key_bytes)
                rounds += self.digest_iterations * self._blocks(DIGEST)
            if rounds > MOST_ROUNDS:
                text = f"up to key slot {index}, {rounds} rounds of hashing"
                raise _malformed(text, "iterations", slot_place(index) + 4)

    def _blocks(self, length: int) -> int:
        """How many blocks of its hash make ``length`` bytes; PBKDF2 runs once for each."""
        return -(-length // digest_bytes(self.hash))

    def with_slot(self, index: int, slot: Slot) -> Header:
        """The same header with another slot ``index``."""
        return self._replace(slots=(*self.slots[:index], slot, *self.slots[index + 1 :]))

    def info(self, detached: bool = False) -> dict[str, Any]:
        """What it tells, keyed and ordered as ``qemu-img info --output=json`` does."""
        out: dict[str, Any] = {
            "ivgen-alg": self.spec.vectors,
            "detached-header": detached,
            "hash-alg": self.hash,
            "cipher-alg": self.spec.algorithm(self.key_bytes),
            "uuid": self.uuid,
        }
        if self.spec.vectors == "essiv":
            out["ivgen-hash-alg"] = self.spec.vectors_hash
        out["cipher-mode"] = self.spec.mode
        out["slots"] = [
            {
                "active": True,
                "iters": slot.iterations,
                "key-offset": slot.offset,
                "stripes": slot.stripes,
            }
            if slot.active
            else {"active": False, "key-offset": slot.offset}
            for slot in self.slots
        ]
        out["payload-offset"] = self.payload
        out["master-key-iters"] = self.digest_iterations
        return out


def slot_place(index: int) -> int:
    """Where slot ``index`` stands in the header."""
    return HEAD.size + index * KEY_SLOT.size


def parse(head: bytes, room: int) -> Header:
    """The header in ``head`` (its first 592 bytes), which with its key material is at most ``room``
    bytes long.

    Raises MalformedImage naming the field; UnsupportedFeature for other versions.  Ciphers and
    hashes may be unknown ones.
    """
    if len(head) < LENGTH or not head.startswith(MAGIC):
        raise MalformedImage("Volume is not in LUKS format", field="magic", offset=0)
    fields = HEAD.unpack_from(head)
    _, version, name, mode, hash_name, payload, key_bytes, digest, salt, iterations, uuid = fields
    if version != 1:
        raise UnsupportedFeature(f"LUKS version {version}")
    if not 1 <= key_bytes <= _MOST_KEY:
        raise _malformed(f"a key of {key_bytes} bytes", "key-bytes", 108)
    _check_iterations(iterations, "mk-digest-iter", 164)
    slots = []
    for index in range(SLOTS):
        state, count, slot_salt, sector, stripes = KEY_SLOT.unpack_from(head, slot_place(index))
        if state not in (ACTIVE, INACTIVE):
            raise _malformed(f"Keyslot {index} state is corrupted", "active", slot_place(index))
        slots.append(Slot(state == ACTIVE, count, slot_salt, sector * SECTOR, stripes))
        if state == ACTIVE:
            _check_iterations(count, f"iterations of key slot {index}", slot_place(index) + 4)
    spec = parse_spec(_text(name, "cipher-name", 8), _text(mode, "cipher-mode", 40))
    found = Header(
        spec,
        _text(hash_name, "hash-spec", 72),
        payload * SECTOR,
        key_bytes,
        digest,
        salt,
        iterations,
        _text(uuid, "uuid", 168),
        tuple(slots),
    )
    _check_places(found, room)
    return found


def _check_places(header: Header, room: int) -> None:
    """Key material is bounded, inside, and overlaps nothing."""
    areas = []
    for index, slot in enumerate(header.slots):
        at = slot_place(index)
        if not 1 <= slot.stripes <= _MOST_MATERIAL // header.key_bytes:
            raise _malformed(f"Keyslot {index} has {slot.stripes} stripes", "stripes", at + 44)
        end = slot.offset + header.material(slot)
        if slot.offset < LENGTH or end > (header.payload or room) or (slot.active and end > room):
            raise _malformed(
                f"Keyslot {index} is outside of the header area", "key-material-offset", at + 40
            )
        areas.append((slot.offset, end, index))
    areas.sort()
    for (_, end, one), (start, _, other) in pairwise(areas):
        if start < end:
            raise _malformed(
                f"Keyslots {one} and {other} overlap",
                "key-material-offset",
                slot_place(other) + 40,
            )


def _check_iterations(count: int, field: str, offset: int) -> None:
    if not count:
        raise _malformed("0 iterations", field, offset)


def _text(raw: bytes, field: str, offset: int) -> str:
    text, _, _ = raw.partition(b"\0")
    if not text.isascii() or not text.decode("ascii", "replace").isprintable():
        raise _malformed("not text", field, offset)
    return text.decode("ascii")


def _malformed(what: str, field: str, offset: int) -> MalformedImage:
    return MalformedImage(f"LUKS header: {what}", field=field, offset=offset)


# -- keys; slow
def derive(hash_name: str, secret: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """PBKDF2 (RFC 8018)."""
    return hashlib.pbkdf2_hmac(hash_name, secret, salt, iterations, length)


def digest_of(header: Header, key: bytes) -> bytes:
    """What the header says of the right key."""
    salt, iterations = header.digest_salt, header.digest_iterations
    return derive(header.hash, key, salt, iterations, DIGEST)


def open_slot(header: Header, slot: Slot, passphrase: bytes, material: bytes) -> bytes | None:
    """The disk's key from a slot's key material; None where the passphrase is not that slot's.

    Raises UnsupportedFeature.
    """
    digest_bytes(header.hash)
    key = derive(header.hash, passphrase, slot.salt, slot.iterations, header.key_bytes)
    split = bytearray(len(material))
    header.spec.make(key).decrypt([(0, len(split) // SECTOR)], material, memoryview(split))
    found = merge(bytes(split), header.key_bytes, slot.stripes, header.hash)
    return found if hmac.compare_digest(digest_of(header, found), header.digest) else None


def close_slot(header: Header, slot: Slot, passphrase: bytes, key: bytes) -> bytes:
    """The key material of a slot that holds ``key``.  Raises UnsupportedFeature."""
    outer = derive(header.hash, passphrase, slot.salt, slot.iterations, header.key_bytes)
    data = split(key, slot.stripes, header.hash).ljust(header.material(slot), b"\0")
    out = bytearray(len(data))
    header.spec.make(outer).encrypt([(0, len(out) // SECTOR)], data, memoryview(out))
    return bytes(out)


def split(key: bytes, stripes: int, hash_name: str) -> bytes:
    """The anti-forensic splitter: ``stripes`` times as long, and worth nothing without any part."""
    length = len(key)
    noise = token_bytes(length * (stripes - 1))
    state = _folded(noise, length, hash_name)
    return noise + _xor(state, key)


def merge(material: bytes, length: int, stripes: int, hash_name: str) -> bytes:
    """What was split into ``material`` (bytes behind the stripes are ignored)."""
    end = length * stripes
    state = _folded(material[: end - length], length, hash_name)
    return _xor(state, material[end - length : end])


def _folded(noise: bytes, length: int, hash_name: str) -> bytes:
    step = digest_bytes(hash_name)
    parts = [(struct.pack(">I", i), at) for i, at in enumerate(range(0, length, step))]
    new = hashlib.new
    state = bytes(length)
    for start in range(0, len(noise), length):
        data = _xor(state, noise[start : start + length])
        hashes = [new(hash_name, head + data[at : at + step]).digest() for head, at in parts]
        state = b"".join(hashes)[:length]
    return state


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")
