"""``blockdev-create``: a job that makes a file, or an image in a node that is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from ..declare import Driver, Option
from ..errors import UsageError
from ..graph import names, registry
from ..graph.closing import close_disk, discard_disk
from ..graph.create import create_file, create_options, create_over
from ..graph.node import Node
from ..graph.opening import Opening
from ..graph.options import Mode
from ..graph.perms import root_use
from ..units import SECTOR
from .blockdev import DRIVERS, REF
from .commands import command
from .daemon import Daemon
from .jobs import Job
from .session import Monitor
from .types import BOOL, INT, SIZE, STR, Enum, Member, Struct, Type, Union

FORMATS = ("luks", "qcow2", "vhdx")
_TYPES: dict[str, Type] = {"str": STR, "int": INT, "size": SIZE, "bool": BOOL}
# A data file would be a node of its own, a detached header another; `version` is `compat`.
_LEFT_OUT = (
    "size", "compat", "data_file", "data_file_raw", "detached-header", "encryption", "parent",
)  # fmt: skip
_WORDS = {
    "backing_fmt": Enum(*DRIVERS),
    "compression_type": Enum("zlib", "zstd"),
    "subformat": Enum("dynamic", "fixed"),
}
_VERSIONS = {"v2": "0.10", "v3": "1.1"}


def _options() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    file = (
        Member("filename", STR),
        Member("size", SIZE),
        *_members(registry.driver("file")),
    )
    variants = {"file": Struct(file)}
    for name in FORMATS:
        own = (Member("file", REF), Member("size", SIZE), *_members(registry.driver(name)))
        variants[name] = Struct(own)
    return "driver", (Member("driver", Enum(*variants)),), variants


CREATE_OPTIONS = Union(_options)


def _members(driver: Driver) -> tuple[Member, ...]:
    found: dict[str, Member] = {}
    encrypt: list[Member] = []
    for option in driver.create_options:
        if option.own or option.name in _LEFT_OUT:
            continue
        outer, dot, name = option.name.partition(".")
        if not dot:
            found[outer] = Member(_hyphens(outer), _type(option), True)
        elif name != "format":
            encrypt.append(Member(name, _type(option), True))
    if driver.name == "qcow2":
        found["version"] = Member("version", Enum(*_VERSIONS), True)
        luks = {"luks": Struct(tuple(encrypt))}
        crypto = Union(lambda: ("format", (Member("format", Enum("luks")),), luks))
        found["encrypt"] = Member("encrypt", crypto, True)
    return tuple(found.values())


def _type(option: Option) -> Type:
    if option.name in _WORDS:
        return _WORDS[option.name]
    return Enum(*option.choices) if option.type == "enum" else _TYPES[option.type]


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


@command("blockdev-create")
def blockdev_create(
    monitor: Monitor, job_id: str, options: Annotated[dict[str, Any], CREATE_OPTIONS]
) -> None:
    """Make a file, or an image of ``size`` bytes in the node ``file``, whose content is lost.

    It is a job: JOB_STATUS_CHANGE tells of its end, query-jobs how it ended, and job-dismiss
    forgets it.
    """
    job = Job(monitor.daemon, job_id, "create")
    job.start(_create(monitor.daemon, job, dict(options)))


async def _create(daemon: Daemon, job: Job, options: dict[str, Any]) -> None:
    found = registry.driver(options.pop("driver"))
    size = options.pop("size")
    if size < 0 or size >= 1 << 63:
        raise UsageError("Image size is out of range")
    if found.kind == "protocol":
        await _create_file(daemon, options, size)
        return
    if size % SECTOR:
        raise UsageError(f"Image size must be a multiple of {SECTOR} bytes")
    reference = options.pop("file")
    given = _given(found, options)
    file = await _file(daemon, reference)
    try:
        daemon.use(file, f"job {job.id}", root_use(True, resize=True))
        try:
            await create_over(file, found, {**given, "size": size}, secrets=daemon.secrets)
        finally:
            daemon.use(file, f"job {job.id}", None)
    finally:
        if file not in daemon.owned and not file.parents:
            await close_disk(file)


async def _create_file(daemon: Daemon, options: dict[str, Any], size: int) -> None:
    where = {"driver": "file", "filename": names.check_path(options.pop("filename"))}
    preallocation = options.pop("preallocation", "off")
    beside = _given(registry.driver("file"), options)
    try:
        node, _ = await create_file(daemon.graph, where, beside)
    except OSError as error:
        path, why = where["filename"], error.strerror or error
        raise UsageError(f"Could not create '{path}': {why}") from error
    try:
        await node.truncate(size, preallocation)
        await node.flush()
    except BaseException:
        await discard_disk(node)
        raise
    await close_disk(node)


def _given(driver: Driver, options: Mapping[str, Any]) -> dict[str, Any]:
    """The driver's own creation options, complete."""
    named = {_hyphens(option.name): option.name for option in driver.create_options}
    flat = names.flatten(options)
    given = {named[key]: value for key, value in flat.items() if key != "version"}
    if "version" in flat:
        given["compat"] = _VERSIONS[flat["version"]]
    return create_options(driver, given)


async def _file(daemon: Daemon, reference: Any) -> Node:
    """The node that an image is to be made in; one that is only described is opened for that."""
    if isinstance(reference, str):
        node = daemon.find(reference, reference)
        if node.read_only:
            raise UsageError(f"Block node '{node.name}' is read-only")
        return node
    opening = Opening(daemon.graph, daemon.gate, backing=False, check=False)
    node = await opening.child(reference, Mode(writable=True), ())
    await opening.finish()
    return node
