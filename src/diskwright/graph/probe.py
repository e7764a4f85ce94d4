"""Which format an image has, told from its first bytes, without importing a driver.

The signatures stand in one table so that probing costs a few comparisons.  An image that matches
nothing is taken for raw.  That is a guess: whoever may write the image's first sector chooses what
it is next time, so a raw image that was opened by guess refuses such a write (see ``guard``).
"""

from __future__ import annotations

from typing import NamedTuple

from .node import Node

PROBE_BYTES = 512
"""How much of an image's beginning is looked at."""


class Signature(NamedTuple):
    """``magic`` stands at byte ``offset`` of an image of format ``name``."""

    name: str
    offset: int
    magic: bytes


# From each format's specification.  The first match counts, so the narrower of two stands first.
# Formats without a driver stand here too: their images must never be taken for raw disks.
SIGNATURES: tuple[Signature, ...] = (
    Signature("qcow", 0, b"QFI\xfb\x00\x00\x00\x01"),
    Signature("qcow2", 0, b"QFI\xfb"),
    Signature("qed", 0, b"QED\x00"),
    Signature("vhdx", 0, b"vhdxfile"),
    Signature("vpc", 0, b"conectix"),
    Signature("vmdk", 0, b"KDMV"),
    Signature("vmdk", 0, b"COWD"),
    Signature("vmdk", 0, b"\xbe\xba\xfe\xca\x00\x00\x00\x00"),  # an seSparse extent
    Signature("vmdk", 0, b"# Disk DescriptorFile"),
    Signature("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    Signature("parallels", 0, b"WithoutFreeSpace"),
    Signature("parallels", 0, b"WithouFreSpacExt"),
    Signature("luks", 0, b"LUKS\xba\xbe"),
    Signature("bochs", 0, b"Bochs Virtual HD Image\x00"),
    Signature("cloop", 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount"),
    Signature("cow", 0, b"OOOM\x00\x00\x00\x02"),
)

_VERSIONS = (b"1", b"2", b"3")


def probe(head: bytes) -> str | None:
    """The format whose signature stands in ``head`` (an image's first ``PROBE_BYTES`` bytes, or
    all of a shorter one); None when no signature matches."""
    for name, offset, magic in SIGNATURES:
        if head.startswith(magic, offset):
            return name
    return "vmdk" if _is_descriptor(head) else None


def _is_descriptor(head: bytes) -> bool:
    """Whether ``head`` begins a VMDK descriptor: by its title, or by what VMware's programs go by,
    a version behind nothing but comments and blank lines.

    qemu-img 10 (measured) wants a version of 1 to 3, spelt exactly so; blanks around the words,
    empty lines, capitals and a byte order mark are found here as well.
    """
    for line in head.removeprefix(b"\xef\xbb\xbf").splitlines():
        text = line.strip().lower()
        if text.startswith(b"#"):
            if text.startswith(b"# disk descriptorfile"):
                return True
        elif text:
            name, equals, value = text.partition(b"=")
            return bool(equals) and name.strip() == b"version" and value.strip() in _VERSIONS
    return False


async def head_of(node: Node) -> bytes:
    """What there is of the first PROBE_BYTES of a node."""
    length = min(PROBE_BYTES, node.size)
    if not length:
        return b""
    (head,) = await node.read([0], [length])
    return bytes(head)
