"""The targets of a conversion: made, opened, and checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ..engine.kernel import BaseDriver
from ..errors import DiskError, ImageInUse, UsageError
from ..graph import registry
from ..graph.names import parse
from ..graph.node import Node
from ..graph.opener import discard_disk
from ..hints import TYPE_CHECKING, Any
from .create import create
from .fresh import fresh_is_zero
from .images import ImageSpec, OpenFailed
from .itself import refuse_itself
from .outputs import Count, OnLost, Output, Settings, ToImage

if TYPE_CHECKING:
    from .pipes import Pipe, Spool
    from .resume import Resumption
    from .streaming import Pass


class TargetFailed(DiskError):
    """The target could not be made; ``cause`` says why."""

    def __init__(self, name: str, fmt: str, cause: OSError | DiskError) -> None:
        self.name, self.fmt, self.cause = name, fmt, cause
        super().__init__(f"{name}: error while converting {fmt}: {cause}")


class Making:
    """All that targets of one conversion have in common.

    ``size``: of the disk, in bytes; None: not known.  ``new`` gets the files that were not there
    before.  ``on_made`` is called when a target was begun that is whole at the end or not there.
    """

    def __init__(
        self,
        driver: BaseDriver,
        nodes: list[Node],
        size: int | None,
        on_lost: OnLost | None,
        on_made: Callable[[], None],
        spool: Spool | None,
    ) -> None:
        self.driver, self.nodes, self.size = driver, nodes, size
        self.on_lost, self.on_made, self.spool = on_lost, on_made, spool
        self.new: list[str] = []
        self.resumption: Resumption | None = None
        """How an earlier run is gone on with, or a later one will be."""
        self.on_progress: Callable[[int, int], None] | None = None
        self.estimate = False
        self.count: Count | None = None
        """What has been counted already, where an output looked at the disk first."""

    async def output(self, target: ImageSpec | Pipe, settings: Settings) -> Output:
        """``target``, ready to take the disk.  Raises OpenFailed, TargetFailed, UsageError."""
        if not isinstance(target, ImageSpec):
            return await self._pipe(target, settings)
        resumption = self.resumption
        if settings.create and (resumption is None or not resumption.again):
            plan, others = await self._make(target, settings)
            # What the caller named, and what was just made, needs nobody's leave to be opened.
            target = target._replace(gate=target.gate.allowing(*others, *backing_of(settings)))
            if plan is not None:
                from .streaming import InOnePass

                return InOnePass(
                    self.driver,
                    target.name,
                    plan,
                    settings.rate,
                    target.cache != "unsafe",
                    self.new.append,
                    self.on_made,
                )
            if resumption is not None:
                await resumption.target_made()
        elif not settings.create and isinstance(target.reference, str):
            try:
                refuse_itself(self.nodes, target.reference, target.name)
            except ImageInUse as error:
                raise OpenFailed(target.name, error) from error
        return await self._open(target, settings)

    async def _make(
        self, target: ImageSpec, settings: Settings
    ) -> tuple[Pass | None, tuple[str, ...]]:
        """Make the target; one that is written in one pass is only planned.  Also returns the names
        of further files that were made."""
        assert target.format is not None and isinstance(target.reference, str)
        name, fmt = target.reference, target.format
        options = {key: value for key, value in settings.options.items() if key != "size"}
        if settings.compress:
            check_compression(fmt)
            if any(key.startswith("encrypt") and value for key, value in options.items()):
                raise UsageError("Compression and encryption not supported at the same time")
        driver, gate = self.driver, target.gate
        try:
            refuse_itself(self.nodes, name, name)
            if self.size is not None and registry.driver(fmt).stream is not None:
                from .streaming import one_pass

                plan = await one_pass(driver, name, fmt, self.size, options, gate, target.cache)
                if plan is not None:
                    return plan, ()
            return None, await create(
                driver,
                name,
                fmt,
                self.size or 0,
                options,
                gate=gate,
                look_at_backing=False,
                on_new=self.new.append,
                secrets=target.secrets,
                keep_journal=settings.resume,
            )
        except (OSError, DiskError) as error:
            raise TargetFailed(target.name, fmt, error) from error

    async def _open(self, target: ImageSpec, settings: Settings) -> ToImage:
        given = opened_with(target, settings)
        node = await target.open(self.driver, writable=True, options=given or None)
        try:
            if not settings.create and node.size < (self.size or 0):
                raise UsageError("output file is smaller than input file")
            if settings.compress:
                _check_units(node)
            zero = settings.target_is_zero or (
                settings.create
                and not settings.overlay
                and await fresh_is_zero(node, settings.options)
            )
        except BaseException:
            await discard_disk(node)
            raise
        durable = target.cache != "unsafe"
        grows = self.size is None
        image = ToImage(
            self.driver, target.name, node, settings, zero, durable, grows, self.on_lost
        )
        if self.resumption is not None:
            image.journal = self.resumption
        return image

    async def _pipe(self, pipe: Pipe, settings: Settings) -> Output:
        from .pipes import Spooled, ToPipe

        spec, fmt = pipe.spec, pipe.spec.format
        assert self.spool is not None and fmt is not None
        if not settings.create:
            raise UsageError(f"Nothing can be written into that is behind {spec.name}")
        if fmt == "raw" and not (settings.options or settings.compress):
            return ToPipe(self.driver, pipe, self.size, rate=settings.rate)
        if self.nodes and registry.driver(fmt).survey is not None:
            from .inorder import in_order

            ordered = await in_order(self, pipe, settings)
            if ordered is not None:
                return ordered
        # The name may be written into the image.
        spec = spec._replace(reference=self.spool.path(f"disk.{fmt}"), cache="unsafe")
        plan, others = await self._make(spec, settings)
        if plan is not None:
            return ToPipe(self.driver, pipe, self.size, plan.writer, settings.rate)
        if others:
            raise UsageError(f"An image of several files does not fit through {pipe.name}")
        self.spool.tell(f"This {fmt} image cannot be written in order", str(spec.reference))
        image = await self._open(spec, settings)
        return Spooled(self.driver, pipe, image, str(spec.reference))


def check_together(settings: Settings, targets: Sequence[ImageSpec | Pipe]) -> None:
    """Raise UsageError for what excludes that several take what is read once."""
    if settings.overlay or settings.offload:
        what = "an overlay" if settings.overlay else "copy offloading"
        raise UsageError(f"Neither further targets nor digests are possible with {what}")
    seen: set[str] = set()
    for target in targets:
        reference = target.reference if isinstance(target, ImageSpec) else None
        if isinstance(reference, str):
            path = os.path.realpath(str(parse(reference)[0].get("filename", reference)))
            if path in seen:
                raise UsageError(f"'{target.name}' is the target twice")
            seen.add(path)


def backing_of(settings: Settings) -> tuple[str, ...]:
    """The backing file that the options of a new target name."""
    named = [settings.options.get(name) for name in ("backing_file", "parent")]
    return tuple(str(name) for name in named if name) if settings.create else ()


def typed_names(settings: Settings) -> tuple[str, ...]:
    """All files beside a new target that its options name."""
    data = settings.options.get("data_file")
    return (*backing_of(settings), *([str(data)] if data else []))


def opened_with(target: ImageSpec, settings: Settings) -> dict[str, Any]:
    """The options that open a target which is made: if encrypted, by the secret that it is made
    with."""
    keys = {k: v for k, v in settings.options.items() if k.endswith("key-secret")}
    return {**keys, **_level(target, settings)} if settings.create else {}


def _level(target: ImageSpec, settings: Settings) -> dict[str, Any]:
    """The level of compression that was asked for, as an option of opening: no image records it."""
    level = settings.options.get("compression_level")
    if level is None or target.format is None:
        return {}
    names = {option.name for option in registry.driver(target.format).options}
    return {"compression-level": level} if "compression-level" in names else {}


def check_compression(fmt: str) -> None:
    """Raise unless compressed data may be asked of the format."""
    found = registry.driver(fmt)
    if found.stream is None and "compress" not in found.capabilities:
        raise UsageError("Compression not supported for this file format")


def _check_units(out: Node) -> None:
    """Raise for a target whose format could hold compressed data, but not this image."""
    check_compression(out.driver_name)
    if not getattr(getattr(out, "format", None), "cluster_size", 0):
        raise UsageError("invalid cluster size")
