"""qcow2, versions 2 and 3 (specification: QEMU's docs/interop/qcow2)."""

from __future__ import annotations

from collections.abc import Mapping

from ...abilities import Survey
from ...contract import Procedure
from ...declare import Driver, Option
from ...hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .image import Image


def open_format(options: Mapping[str, Any]) -> tuple[Image, Procedure]:
    """A format and the procedure that fills it in; see :func:`.opening.open_image`.

    With ``salvage`` among the options one that reads what is left (:mod:`.salvage.reading`).
    """
    if options.get("salvage"):
        from .salvage.opening import open_salvaged

        return open_salvaged(options)
    from .image import Image
    from .machine.core import is_writable
    from .opening import open_image, open_writable

    if is_writable(options):
        from .format import Qcow2

        written = Qcow2(options)
        return written, open_writable(written)
    image = Image(options)
    return image, open_image(image)


def create_new(options: Mapping[str, Any]) -> Procedure:
    """The procedure that writes a new image; see :func:`.creation.create_image`."""
    from .creation import create_image

    return create_image(options)


def survey(options: Mapping[str, Any], compress: bool) -> Survey | None:
    """See :func:`.ordered.survey`."""
    from .ordered import survey

    return survey(options, compress)


def measure(options: Mapping[str, Any]) -> tuple[int, int]:
    """See :func:`.creation.measure`."""
    from .creation import measure

    return measure(options)


_CIPHER = "Name of encryption cipher "
_ENCRYPT = (
    Option("encrypt.cipher-alg", "str", _CIPHER + "algorithm"),
    Option("encrypt.cipher-mode", "str", _CIPHER + "mode"),
    Option("encrypt.format", "str", "Encrypt the image, format choices: 'aes', 'luks'"),
    Option("encrypt.hash-alg", "str", "Name of encryption hash algorithm"),
    Option("encrypt.iter-time", "int", "Time to spend in PBKDF in milliseconds"),
    Option("encrypt.ivgen-alg", "str", "Name of IV generator algorithm"),
    Option("encrypt.ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
    Option(
        "encrypt.key-secret", "str", "ID of secret providing qcow AES key or LUKS passphrase"
    ),
    Option(
        "encryption",
        "bool",
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
)

DRIVER = Driver(
    name="qcow2",
    kind="format",
    options=(
        Option("backing", "str", "Backing file to use instead of the one in the header"),
        Option("encrypt.format", "str", "Encryption that the header must name: 'aes', 'luks'"),
        Option("encrypt.key-secret", "str", "ID of the secret that unlocks the image"),
        Option("lazy-refcounts", "bool", "Postpone refcount updates"),
        Option("compression-level", "int", "Level of what is written compressed (zlib: 1 to 9, "
               "zstd: 1 to 19)"),
        Option("overlap-check", "str", "What nothing is written over: none, constant, cached, all "
               "(.template, and parts of it by name: .main-header=off)", "cached"),
        Option("pass-discard-request", "bool", "Give back space that the guest discards", True),
        Option("pass-discard-snapshot", "bool", "Give back space that only snapshots held", True),
        Option("pass-discard-other", "bool", "Give back any other space that becomes free", True),
        Option("discard-no-unref", "bool", "Keep the clusters that the guest discards", False),
        Option("cache-size", "size", "Memory for tables of all kinds"),
        Option("l2-cache-size", "size", "Memory for L2 tables"),
        Option("l2-cache-entry-size", "size", "Checked, without effect: whole tables are kept"),
        Option("refcount-cache-size", "size", "Memory for refcount blocks"),
        Option("cache-clean-interval", "int", "Seconds after which unused tables are dropped; 0: "
               "never", 600),
    ),
    create_options=(
        Option("backing_file", "str", "File name of a base image"),
        Option("backing_fmt", "str", "Image format of the base image"),
        Option("cluster_size", "size", "qcow2 cluster size", 65536),
        Option("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])", "1.1"),
        Option(
            "compression_level",
            "int",
            "Level of what a conversion compresses (zlib: 1 to 9, zstd: 1 to 19)",
            own=True,
        ),
        Option(
            "compression_type",
            "str",
            "Compression method used for image cluster compression",
            "zlib",
        ),
        Option("data_file", "str", "File name of an external data file"),
        Option("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
        Option("extended_l2", "bool", "Extended L2 tables", False),
        *_ENCRYPT,
        Option("lazy_refcounts", "bool", "Postpone refcount updates", False),
        Option(
            "preallocation",
            "enum",
            "Preallocation mode (allowed values: off, metadata, falloc, full)",
            "off",
            ("off", "metadata", "falloc", "full"),
        ),
        Option("refcount_bits", "int", "Width of a reference count entry in bits", 16),
        Option("size", "size", "Virtual disk size"),
    ),
    amend_options=(
        Option("backing_file", "str", "File name of a base image"),
        Option("backing_fmt", "str", "Image format of the base image"),
        Option("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
        Option("data_file", "str", "File name of an external data file"),
        Option("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
        Option("encrypt.iter-time", "int", "Time to spend in PBKDF in milliseconds"),
        Option("encrypt.keyslot", "int", "Select a single keyslot to modify explicitly"),
        Option(
            "encrypt.new-secret",
            "str",
            "New secret to set in the matching keyslots. Empty string to erase",
        ),
        Option("encrypt.old-secret", "str", "Select all keyslots that match this password"),
        Option(
            "encrypt.state", "str", "Select new state of affected keyslots (active/inactive)"
        ),
        Option("lazy_refcounts", "bool", "Postpone refcount updates"),
        Option("refcount_bits", "int", "Width of a reference count entry in bits"),
        Option("size", "size", "Virtual disk size"),
    ),
    salvage_options=(
        Option("backing_file", "str", "File name of the backing file"),
        Option("backing_fmt", "str", "Image format of the backing file"),
        Option("cluster_size", "size", "qcow2 cluster size"),
        Option("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
        Option("compression_type", "enum", "Compression method", None, ("zlib", "zstd")),
        Option("data_file", "str", "File name of the external data file"),
        Option("encrypt.format", "enum", "Encryption", None, ("luks", "aes", "none")),
        Option("encrypt.key-secret", "str", "ID of the secret that unlocks the image"),
        Option("extended_l2", "bool", "Extended L2 tables"),
        Option("size", "size", "Virtual disk size"),
    ),
    open=open_format,
    create=create_new,
    survey=survey,
    measure=measure,
    capabilities=frozenset(
        {
            "backing", "bitmaps", "change_backing", "check", "compress", "discard", "make_empty",
            "resize", "zero",
        }
    ),
)
