"""Changing an image's options in place: what is asked for is checked as a whole, then done."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from ....contract import Procedure, Progress
from ....errors import UsageError
from ....hints import TYPE_CHECKING, Any
from ....units import is_power_of_two
from ...editing import flush
from .. import header as hd
from ..creation import VERSIONS
from ..edit import announce
from ..replacing import replace_header
from .refcounts import change_refcount_bits, survey
from .version import check_downgrade, downgrade, upgrade

if TYPE_CHECKING:
    from ..format import Qcow2

_LATER = " (use compat=1.1 or greater)"
Stage = Callable[[], Procedure]


def amend(image: Qcow2, options: Mapping[str, Any], force: bool) -> Procedure:
    """Change ``options`` (names as for creation, values in their types).

    Everything that can be refused is refused before the first write; a crash leaves an image in
    which some of the changes are made.  Raises UsageError.  ``force`` allows what may lock data up
    (see the encryption options).
    """
    image.check_write()
    version, bits = _wanted(image, options)
    _check_names(image, options)
    if bits != image.refcount_bits:
        yield from survey(image, bits)
    if version < image.header.version:
        yield from check_downgrade(image)
    stages = _stages(image, options, version, bits, force)
    for number, stage in enumerate(stages):
        yield from _scaled(stage(), number, len(stages))


def _wanted(image: Qcow2, options: Mapping[str, Any]) -> tuple[int, int]:
    """The version and the width of the counts that there will be; checked against each other."""
    h = image.header
    version = h.version
    compat = options.get("compat")
    if compat is not None:
        if compat not in VERSIONS:
            raise UsageError(f"Unknown compatibility level {compat}")
        version = VERSIONS[compat]
    bits = options.get("refcount_bits")
    if bits is not None and (not is_power_of_two(bits) or bits > 64):
        raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
    bits = image.refcount_bits if bits is None else int(bits)
    if version == 2 and bits != 16:
        if "refcount_bits" not in options:
            raise UsageError(f"compat={compat} requires refcount_bits=16")
        raise UsageError(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above" + _LATER
        )
    if options.get("lazy_refcounts") and version == 2 and not h.compatible & hd.LAZY_REFCOUNTS:
        raise UsageError(
            "Lazy refcounts only supported with compatibility level 1.1 and above" + _LATER
        )
    return version, bits


def _check_names(image: Qcow2, options: Mapping[str, Any]) -> None:
    """Files that the image names, of which only the data file's name can be changed."""
    h = image.header
    for key, now in (("backing_file", image.backing_file), ("backing_fmt", image.backing_format)):
        if key in options and options[key] != now:
            raise UsageError(
                "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead."
            )
    if "data_file" in options and not h.incompatible & hd.DATA_FILE:
        raise UsageError("data-file can only be set for images that use an external data file")
    if options.get("data_file_raw") and not h.autoclear & hd.RAW_DATA_FILE:
        raise UsageError("data-file-raw cannot be set on existing images")
    encryption = any(key.startswith("encrypt.") for key in options)
    if encryption and not h.crypt_method:
        raise UsageError("Can't amend encryption options - encryption not present")
    if encryption and h.crypt_method != 2:
        raise UsageError("Only LUKS encryption options can be amended")


def _stages(
    image: Qcow2, options: Mapping[str, Any], version: int, bits: int, force: bool
) -> list[Stage]:
    """What is to be done, in an order in which each step is possible."""
    stages: list[Stage] = []
    if version > image.header.version:
        stages.append(lambda: upgrade(image))
    if bits != image.refcount_bits:
        stages.append(lambda: change_refcount_bits(image, bits))
    if "data_file" in options or "data_file_raw" in options:
        stages.append(lambda: _change_data_file(image, options))
    if "lazy_refcounts" in options and version > 2:
        stages.append(lambda: _change_lazy(image, bool(options["lazy_refcounts"])))
    if any(key.startswith("encrypt.") for key in options):
        from ..encryption import amend_encryption

        stages.append(lambda: amend_encryption(image, options, force))
    if "size" in options and options["size"] != image.size:
        stages.append(lambda: image.resize(int(options["size"]), "off", True))
    if version < image.header.version:
        stages.append(lambda: downgrade(image))
    return stages


def _scaled(procedure: Procedure, number: int, stages: int) -> Procedure:
    """``procedure`` with its progress as that of one stage of several."""
    answer: Any = None
    error: Exception | None = None
    while True:
        try:
            request = procedure.send(answer) if error is None else procedure.throw(error)
        except StopIteration as stop:
            return stop.value
        answer = error = None
        if isinstance(request, Progress):
            part = min(1.0, request.done / request.total) if request.total else 0.0
            request = Progress(int((number + part) * 10_000), stages * 10_000)
        try:
            answer = yield request
        except Exception as caught:
            error = caught


def _change_data_file(image: Qcow2, options: Mapping[str, Any]) -> Procedure:
    """Another name for the data file (none: the one in the header goes), or no promise any more
    that it is a raw image."""
    yield from announce(image)
    new = image.header.copy()
    if "data_file" in options:
        name = options["data_file"]
        new.set_extension(hd.EXT_DATA_FILE, os.fsencode(name) if name else None)
    if options.get("data_file_raw") is False:
        new.autoclear &= ~hd.RAW_DATA_FILE
    yield from replace_header(image, new)


def _change_lazy(image: Qcow2, lazy: bool) -> Procedure:
    """Postponing updates of the counts, or not; the counts are right on disk before it ends."""
    if bool(image.header.compatible & hd.LAZY_REFCOUNTS) == lazy:
        return
    yield from announce(image)
    yield from flush(image)
    if image.header.incompatible & hd.DIRTY:
        yield from image.withdraw()
    new = image.header.copy()
    new.compatible = new.compatible & ~hd.LAZY_REFCOUNTS | (hd.LAZY_REFCOUNTS if lazy else 0)
    yield from replace_header(image, new)
    image.reannounce()
