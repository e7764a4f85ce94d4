"""luks: disks encrypted by LUKS version 1, with the header before the disk or in a file of its
own."""

from __future__ import annotations

from collections.abc import Mapping

from ...contract import Procedure
from ...declare import Driver, Option
from ...hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .format import Luks


def open_format(options: Mapping[str, Any]) -> tuple[Luks, Procedure]:
    """A format and the procedure that fills it in; see :func:`.format.open_image`."""
    from .format import Luks, open_image

    image = Luks(options)
    return image, open_image(image)


def create_new(options: Mapping[str, Any]) -> Procedure:
    """The procedure that writes a new image; see :func:`.creation.create_image`."""
    from .creation import create_image

    return create_image(options)


def measure(options: Mapping[str, Any]) -> tuple[int, int]:
    """See :func:`.creation.measure`."""
    from .creation import measure

    return measure(options)


_CIPHER = "Name of encryption cipher "
_HASH = "hash algorithm"

DRIVER = Driver(
    name="luks",
    kind="format",
    options=(
        Option("header", "str", "The file of a detached header"),
        Option("key-secret", "str", "ID of the secret that provides a keyslot's passphrase"),
    ),
    create_options=(
        Option("cipher-alg", "str", _CIPHER + "algorithm"),
        Option("cipher-mode", "str", _CIPHER + "mode"),
        Option("detached-header", "bool", "Create a detached LUKS header"),
        Option("hash-alg", "str", f"Name of encryption {_HASH}"),
        Option("iter-time", "int", "Time to spend in PBKDF in milliseconds"),
        Option("ivgen-alg", "str", "Name of IV generator algorithm"),
        Option("ivgen-hash-alg", "str", f"Name of IV generator {_HASH}"),
        Option("key-secret", "str", "ID of the secret that provides the keyslot passphrase"),
        Option("preallocation", "enum", "Preallocation mode (allowed values: off, falloc, full)",
               None, ("off", "falloc", "full")),
        Option("size", "size", "Virtual disk size"),
    ),
    amend_options=(
        Option("iter-time", "int", "Time to spend in PBKDF in milliseconds"),
        Option("keyslot", "int", "Select a single keyslot to modify explicitly"),
        Option(
            "new-secret",
            "str",
            "New secret to set in the matching keyslots. Empty string to erase",
        ),
        Option("old-secret", "str", "Select all keyslots that match this password"),
        Option("state", "str", "Select new state of affected keyslots (active/inactive)"),
    ),
    open=open_format,
    create=create_new,
    measure=measure,
    capabilities=frozenset({"amend", "resize"}),
)
