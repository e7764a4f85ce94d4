"""Procedures over a LUKS1 header: making it, unlocking, adding and erasing key slots.

A header stands at the start of a file, or inside one (qcow2).  A crash leaves each slot as it was,
inactive, or done: key material first, then all of the slot but its state, then, with that durable,
the state, which is one word.  To erase, the key material goes first: what a slot that still claims
to be active then holds opens nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from secrets import token_bytes
from uuid import uuid4

from ..contract import Barrier, Compute, MetaWrite, Procedure, Read, Timed, Write
from ..errors import MalformedImage, UsageError
from ..hints import Any
from ..records import NamedTuple
from ..secrets import find
from ..units import align_up
from .ciphering import check_hash, spec_of
from .luks1 import (
    ALIGNMENT,
    DIGEST,
    LEAST_ITERATIONS,
    LENGTH,
    SALT,
    SLOTS,
    STRIPES,
    Header,
    Slot,
    close_slot,
    derive,
    digest_of,
    open_slot,
    parse,
    slot_place,
)

ITER_TIME = 2000
"""Milliseconds of hashing that a passphrase costs where nobody says otherwise."""
WRONG = "Invalid password, cannot unlock any keyslot"

_WORD = 4
# Long enough to be measured (seconds), and with how many iterations the search begins.
_SAMPLE = 0.02
_FIRST = 4096
_LONGEST = 1 << 24
_WIDEST = (1 << 32) - 1


class Place(NamedTuple):
    """Where a header stands: at ``base`` of the file in ``slot``."""

    slot: str
    base: int = 0


def read_header(place: Place, room: int) -> Procedure:
    """Read and bound the header; returns it.  ``room``: bytes from its start to what follows."""
    (head,) = yield Read(place.slot, [(place.base, LENGTH)])
    return parse(head, room)


def unlock(header: Header, place: Place, passphrase: bytes) -> Procedure:
    """The disk's key.  Raises UsageError when the passphrase opens no slot."""
    header.spec.check(header.key_bytes)
    header.check_effort()
    for index, slot in enumerate(header.slots):
        if slot.active and (key := (yield from _opened(header, place, index, passphrase))):
            return key
    raise UsageError(WRONG)


def _opened(header: Header, place: Place, index: int, passphrase: bytes) -> Procedure:
    slot = header.slots[index]
    where = (place.base + slot.offset, header.material(slot))
    (material,) = yield Read(place.slot, [where])
    return (yield Compute(open_slot, (header, slot, passphrase, material)))


# -- making
def plan_header(options: Mapping[str, Any], detached: bool = False) -> tuple[Header, bytes]:
    """A header by creation options (``cipher-alg``, ...), still without key, and its passphrase.

    Raises UsageError, and UnsupportedFeature for what is not implemented.
    """
    name = options.get("key-secret")
    if name is None:
        prefix = options.get("prefix", "")
        raise UsageError(f"Parameter '{prefix}key-secret' is required for cipher")
    passphrase = find(options.get("secrets"), str(name))
    hash_name = str(options.get("hash-alg") or "sha256")
    check_hash("hash-alg", hash_name)
    vectors_hash = options.get("ivgen-hash-alg")
    spec, key_bytes = spec_of(
        str(options.get("cipher-alg") or "aes-256"),
        str(options.get("cipher-mode") or "xts"),
        str(options.get("ivgen-alg") or "plain64"),
        None if vectors_hash is None else str(vectors_hash),
    )
    _milliseconds(options)
    step = align_up(key_bytes * STRIPES, ALIGNMENT)
    slots = [Slot(False, 0, bytes(SALT), ALIGNMENT + i * step) for i in range(SLOTS)]
    payload = 0 if detached else ALIGNMENT + SLOTS * step
    header = Header(
        spec, hash_name, payload, key_bytes, bytes(DIGEST), bytes(SALT), 0, str(uuid4()),
        tuple(slots),
    )  # fmt: skip
    return header, passphrase


def area(header: Header) -> int:
    """Bytes of the header with all of its key material."""
    last = header.slots[-1]
    return align_up(last.offset + header.material(last), ALIGNMENT)


def make_keys(header: Header, passphrase: bytes, options: Mapping[str, Any]) -> Procedure:
    """A new key in the first slot of ``header``.

    Returns the whole header, its key material (for the first slot) and the key; writes nothing.
    """
    time = _milliseconds(options)
    key = token_bytes(header.key_bytes)
    iterations = yield from _iterations(header.hash, time // 8, DIGEST)
    header = header._replace(digest_salt=token_bytes(SALT), digest_iterations=iterations)
    header = header._replace(digest=(yield Compute(digest_of, (header, key))))
    iterations = yield from _iterations(header.hash, time, header.key_bytes)
    slot = header.slots[0]._replace(active=True, iterations=iterations, salt=token_bytes(SALT))
    header = _with_new(header, 0, slot)
    material = yield Compute(close_slot, (header, slot, passphrase, key))
    return header, material, key


def _with_new(header: Header, index: int, slot: Slot) -> Header:
    """The header with a new slot.  Raises UsageError where nobody would try all of its slots."""
    new = header.with_slot(index, slot)
    try:
        new.check_effort()
    except MalformedImage as error:
        raise UsageError("iter-time is too long for a header with so many key slots") from error
    return new


def _milliseconds(options: Mapping[str, Any]) -> int:
    time = options.get("iter-time")
    time = ITER_TIME if not time else int(time)
    if not 0 < time < 1 << 31:
        raise UsageError("iter-time is out of range")
    return time


def _iterations(hash_name: str, milliseconds: int, length: int) -> Procedure:
    """How many iterations of PBKDF2 take so long on this machine."""
    count = _FIRST
    while True:
        arguments = (hash_name, b"password", bytes(SALT), count, length)
        _, seconds = yield Timed(derive, arguments)
        if seconds >= _SAMPLE or count >= _LONGEST:
            break
        count *= 4
    wanted = int(count * milliseconds / 1000 / max(seconds, 1e-6))
    return min(max(wanted, LEAST_ITERATIONS), _WIDEST)


# -- changing
def amend(
    header: Header,
    place: Place,
    key: bytes,
    options: Mapping[str, Any],
    secrets: Mapping[str, bytes] | None,
    force: bool,
) -> Procedure:
    """Add or erase key slots as ``state``, ``keyslot``, ``new-secret``, ``old-secret`` and
    ``iter-time`` say; returns the header as it is then.

    Raises UsageError, before anything is written.  ``force``: also where the data become unreadable
    for good.
    """
    state = options.get("state")
    if state is None:
        raise UsageError("Parameter 'state' is missing")
    if state not in ("active", "inactive"):
        raise UsageError(f"Parameter 'state' does not accept value '{state}'")
    index = options.get("keyslot")
    if index is not None and not 0 <= index < SLOTS:
        raise UsageError(f"Invalid keyslot {index} specified, must be between 0 and {SLOTS - 1}")
    if state == "active":
        return (yield from _add(header, place, key, options, secrets, force))
    return (yield from _erase(header, place, options, secrets, force))


def _add(
    header: Header,
    place: Place,
    key: bytes,
    options: Mapping[str, Any],
    secrets: Mapping[str, bytes] | None,
    force: bool,
) -> Procedure:
    if options.get("old-secret") is not None:
        raise UsageError("'old-secret' must not be given when activating keyslots")
    name = options.get("new-secret")
    if name is None:
        raise UsageError("'new-secret' is required to activate a keyslot")
    passphrase = find(secrets, str(name))
    index = options.get("keyslot")
    if index is None:
        free = [i for i, slot in enumerate(header.slots) if not slot.active]
        if not free:
            raise UsageError("Can't add a keyslot - all keyslots are in use")
        index = free[0]
    old = header.slots[index]
    if old.active and not force:
        raise UsageError(
            f"Refusing to overwrite active keyslot {index} - please erase it first"
        )
    time = _milliseconds(options)
    iterations = yield from _iterations(header.hash, time, header.key_bytes)
    slot = old._replace(active=True, iterations=iterations, salt=token_bytes(SALT))
    _with_new(header, index, slot)
    material = yield Compute(close_slot, (header, slot, passphrase, key))
    if old.active:
        header = yield from _write_slot(header, place, index, old._replace(active=False))
    yield Write([MetaWrite(place.slot, place.base + slot.offset, material)])
    header = yield from _write_slot(header, place, index, slot._replace(active=False))
    return (yield from _write_slot(header, place, index, slot))


def _write_slot(header: Header, place: Place, index: int, slot: Slot) -> Procedure:
    """Change a slot's fields, or its state alone: it may lie in two sectors."""
    raw = slot.encode()
    if slot._replace(active=False) == header.slots[index]._replace(active=False):
        raw = raw[:_WORD]
    yield Write([MetaWrite(place.slot, place.base + slot_place(index), raw)])
    yield Barrier()
    return header.with_slot(index, slot)


def _erase(
    header: Header,
    place: Place,
    options: Mapping[str, Any],
    secrets: Mapping[str, bytes] | None,
    force: bool,
) -> Procedure:
    if options.get("new-secret") is not None:
        raise UsageError("'new-secret' must not be given when erasing keyslots")
    index, name = options.get("keyslot"), options.get("old-secret")
    old = None if name is None else find(secrets, str(name))
    active = [i for i, slot in enumerate(header.slots) if slot.active]
    if index is None and old is None:
        raise UsageError(
            "To erase keyslot(s), either explicit keyslot index or the password currently "
            "contained in them must be given"
        )
    if index is not None:
        if index not in active:
            if force:
                return header  # erased is what it was to be
            raise UsageError(f"Given keyslot {index} is already erased (inactive) ")
        if old is not None and not (yield from _opened(header, place, index, old)):
            raise UsageError(
                f"Given keyslot {index} doesn't contain the given old password for erase operation"
            )
        if active == [index] and not force:
            raise UsageError(
                f"Attempt to erase the only active keyslot {index} which will erase all the data "
                "in the image irreversibly - refusing operation"
            )
        doomed = [index]
    else:
        assert old is not None
        doomed = []
        for i in active:
            if (yield from _opened(header, place, i, old)):
                doomed.append(i)
        if not doomed:
            raise UsageError("No keyslots match given (old) password for erase operation")
        if doomed == active and not force:
            raise UsageError(
                "All the active keyslots match the (old) password that was given and erasing them "
                "will erase all the data in the image irreversibly - refusing operation"
            )
    for i in doomed:
        slot = header.slots[i]
        noise = token_bytes(header.material(slot))
        yield Write([MetaWrite(place.slot, place.base + slot.offset, noise)])
        yield Barrier()
        # The state first: alone it is one word, with the rest it may be two sectors.
        header = yield from _write_slot(header, place, i, slot._replace(active=False))
        empty = Slot(False, 0, bytes(SALT), slot.offset, slot.stripes)
        header = yield from _write_slot(header, place, i, empty)
    return header


