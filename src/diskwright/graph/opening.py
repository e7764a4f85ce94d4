"""How a description becomes a graph of nodes: protocols first, formats on top, then what the
images name."""

from __future__ import annotations

from ..errors import DiskError, ImageError, Outside, UsageError
from ..hints import TYPE_CHECKING, Any
from ..records import NamedTuple
from . import names, registry
from .closing import discard_disk
from .display import display_name, say_file
from .gate import Gate
from .graph import Graph, leaf_of
from .guard import GuardedNode
from .mapped import MappedNode
from .names import Options
from .node import Node
from .options import FILES, Mode, checked, child_option, lacks_file, take_children, take_common
from .perms import ALL
from .probe import ends_of, guess

if TYPE_CHECKING:
    from .stage import Stage

_Chain = tuple[str, ...]

_UNSAID = object()


class _Named(NamedTuple):
    """The backing file that the image in ``node`` names; ``given`` is what the caller said."""

    node: Node
    reference: str
    format: str | None
    given: Any
    mode: Mode
    chain: _Chain


class Opening:
    """One call of :func:`open_disk`: what all its nodes have in common."""

    def __init__(
        self,
        graph: Graph,
        gate: Gate,
        backing: bool,
        check: bool,
        stage: Stage | None = None,
        metadata_only: bool = False,
    ) -> None:
        self.graph = graph
        self.gate = gate
        self.backing = backing
        self.check = check
        self.stage = stage
        self.metadata_only = metadata_only
        self.pending: list[_Named] = []
        """What images named.  Opened one after the other, not each from within the one above: a
        chain may be longer than the interpreter's stack is deep."""

    async def finish(self) -> None:
        """Open everything that the images opened so far name, and what that names."""
        while self.pending:
            await self._open_named(self.pending.pop())

    async def disk(
        self, options: Options, plain: bool, format: str | None, mode: Mode, chain: _Chain
    ) -> Node:
        """The disk that ``options`` describe; for a ``plain`` file name with a format on top."""
        if plain:
            layered = format is None or registry.kind(format) != "protocol"
            options = {"file": options} if layered else dict(options)
        else:
            options = dict(options)
        if format is not None:
            options["driver"] = format
        return await self.node(options, mode, chain)

    async def node(self, options: Options, mode: Mode, chain: _Chain) -> Node:
        """The node that ``options`` describe, with all its children."""
        options = dict(options)
        mode, name = take_common(options, mode)
        if name:
            self.graph.check_name(name)
        driver_name = options.pop("driver", None)
        if driver_name is None:
            if "file" not in options:
                raise UsageError("Must specify either driver or file")
            return await self._probed(options, mode, name, chain)
        found = registry.driver(str(driver_name))
        if found.kind == "format":
            if "file" not in options:
                raise UsageError('A block device must be specified for "file"')
            below = await self.child(options.pop("file"), mode, chain)
            return await self._format(found.name, options, below, mode, name, chain, False)
        return await self._leaf(found.name, options, mode, name, chain)

    async def child(self, reference: Any, mode: Mode, chain: _Chain) -> Node:
        """The node in a slot: described by a dict, or the name of one that is open already."""
        if isinstance(reference, str):
            return self.graph.find(reference)
        if not isinstance(reference, dict):
            raise UsageError("A child is described by an object or by a node's name")
        options = dict(reference)
        if "driver" not in options and isinstance(options.get("filename"), str):
            options = {**options, **names.from_filename(options["filename"])}
        return await self.node(options, mode.below(), chain)

    async def _probed(self, options: Options, mode: Mode, name: str, chain: _Chain) -> Node:
        below = await self.child(options.pop("file"), mode, chain)
        try:
            found = guess(*await ends_of(below), mode.writable)
            registry.driver(found)
        except BaseException as error:
            say_file(error, below)
            await self._give_up(below)
            raise
        return await self._format(found, options, below, mode, name, chain, found == "raw")

    # -- protocols and filters
    async def _leaf(
        self, driver_name: str, options: Options, mode: Mode, name: str, chain: _Chain
    ) -> Node:
        found = registry.driver(driver_name)
        assert found.open is not None
        given = {"driver": driver_name, **checked(found, options)}
        if "filename" in given:
            names.check_path(given["filename"])
        inherited = {
            "read-only": not mode.writable or (self.stage is not None and not self.stage.writable),
            "force-share": mode.force_share,
            "cache.direct": mode.direct,
            "cache.no-flush": mode.no_flush,
            "discard": mode.discard,
            "auto-read-only": mode.auto_read_only,
            "within": mode.within,
            "secrets": self.graph.secrets,
            # Locks are taken once it is known what its users need.
            "perms": frozenset(),
            "shared": ALL,
        }
        opened: list[Node] = []

        async def open_child(reference: Any) -> Node:
            node = await self.child(reference, mode, chain)
            opened.append(node)
            return node

        try:
            if found.kind == "protocol":
                node: Node = await found.open(self.graph.driver, {**given, **inherited})
            else:
                node = await found.open(self.graph.driver, {**given, **inherited}, open_child)
        except BaseException as error:
            for child in opened:
                await self._give_up(child)
            if isinstance(error, OSError) and error.filename is None and "filename" in given:
                error.filename = given["filename"]
            raise
        node.options = given
        if mode.force_share:
            node.options["force-share"] = True
        if not mode.writable:
            node.read_only = True
        elif self.stage is not None and found.kind == "protocol":
            node = self.stage.over(node)
        self._take(node, mode, name)
        return node

    # -- formats
    async def _format(
        self,
        driver_name: str,
        options: Options,
        below: Node,
        mode: Mode,
        name: str,
        chain: _Chain,
        probed: bool,
    ) -> Node:
        node: MappedNode | None = None
        backing: Any = options.pop("backing", _UNSAID)
        try:
            if mode.writable and below.read_only:
                if mode.exact and driver_name != "raw":
                    raise UsageError("Block node is read-only")
                mode = mode._replace(writable=False)
            found = registry.driver(driver_name)
            assert found.open is not None
            inherited = mode._replace(writethrough=False, detect_zeroes="off", within=())
            offered = take_children(options)
            given = checked(found, options)
            told = self._told(mode, below)
            if backing is not _UNSAID or not self.backing:
                told["backing"] = "given" if isinstance(backing, dict | str) else None
            told.update((slot, "given") for slot in FILES if slot in offered)
            format, procedure = found.open({**given, **told})
            kind = GuardedNode if probed or mode.writethrough else MappedNode

            asked: list[str] = []
            files: dict[str, Node] = {}

            async def opener(
                slot: str, reference: str, inner: str | None, writable: bool = True
            ) -> None:
                assert node is not None
                asked.append(slot)
                if slot == "backing":
                    self.pending.append(_Named(node, reference, inner, backing, inherited, chain))
                else:
                    instead = offered.pop(slot, None)
                    how = inherited._replace(writable=inherited.writable and writable)
                    await self._fill(node, slot, reference, instead, how, chain, files)

            node = kind(
                self.graph.driver,
                driver_name,
                format,
                {"file": below},
                self.graph.tables,
                opener=opener,
            )
            node.options = {"driver": driver_name, **given}
            if isinstance(backing, dict | str):
                node.options["backing"] = "given"
            node.options.update((child_option(slot), "given") for slot in offered)
            if mode.force_share:
                node.options["force-share"] = True
            node.read_only = not mode.writable
            node.probed = probed
            if isinstance(node, GuardedNode):
                node.writethrough = mode.writethrough
            node.keeps_discarded = mode.exact and mode.discard == "ignore"
            self._take(node, mode, name)
            # The locks are held before the first byte is looked at.
            self.graph.refresh(node)
            node.engine.procedures.opening = True
            await node.run_procedure(procedure, whole_image=False)
            node.engine.procedures.opening = False
            node.engine.opener = None
            node.keep_tables()
            if self.metadata_only:
                offered.pop("data-file", None)
            for slot in offered:
                raise UsageError(
                    f"Block format '{driver_name}' does not support the option "
                    f"'{child_option(slot)}'"
                )
            if mode.writable:
                from .creating import equip

                equip(node)
            reference = getattr(format, "backing_file", None) or ""
            if "backing" not in asked and (reference or isinstance(backing, dict | str)):
                inner = getattr(format, "backing_format", None)
                await opener("backing", reference, inner)
            node.changed()
        except BaseException as error:
            say_file(error, below)
            if node is not None:
                node.read_only = True  # of what is half open nothing is to be written
                await discard_disk(node)
            await self._give_up(below)
            raise
        return node

    def _take(self, node: Node, mode: Mode, name: str) -> None:
        node.mode = mode
        if mode.detect_zeroes != "off":
            from .detect import detect_zeroes
            detect_zeroes(node, mode.detect_zeroes)
        self.graph.add(node, name)

    def _told(self, mode: Mode, below: Node) -> Options:
        """What a format is told beside its own options."""
        leaf = leaf_of(below)
        told: Options = {
            "read-only": not mode.writable,
            "writable": mode.writable,
            "check": self.check,
            "metadata-only": self.metadata_only,
            "file-name": leaf.options.get("filename"),
            "secrets": self.graph.secrets,
            **self.graph.told_next(),
        }
        if leaf.driver_name in ("host_device", "nbd"):
            told["zero_beyond_end"] = False  # a device holds whatever it held before
        return told

    async def _fill(
        self,
        node: Node,
        slot: str,
        reference: str,
        given: Any,
        mode: Mode,
        chain: _Chain,
        files: dict[str, Node],
    ) -> None:
        """Put the plain file that the image names (or what the caller gave instead) into a slot,
        at once.  Two slots may name the same file: it is opened, and locked, once; ``files`` are
        those that are open."""
        if given is not None:
            child = await self.child(given, mode, chain)
        else:
            from .named import located, role_of

            role = role_of(slot)
            admitted = located(self.gate, node, [reference], role)
            try:
                where = names.parse(admitted.reference)[0]
                if registry.kind(str(where.get("driver", "raw"))) != "protocol":
                    raise ImageError(
                        f"'{reference}' is named as its {role}, and is no plain file",
                        file=display_name(node),
                    )
                same = names.identity(where)
                if slot == "data-file" and same == names.identity(leaf_of(node).options):
                    raise ImageError(f"Its data file '{reference}' is the image itself")
                mode = mode._replace(within=admitted.within)
                child = files[same] = files.get(same) or await self.node(where, mode, chain)
                if mode.writable and child.read_only:
                    raise ImageError(
                        f"'{reference}' is named under another name, too, which is read-only",
                        file=display_name(node),
                    )
            except Outside as found:
                by = display_name(node)
                raise self.gate.outside(reference, by, admitted.reference, role, found) from found
            except (OSError, DiskError) as error:
                error.add_note(f"Could not open {role}")
                raise
        try:
            node.attach(slot, child)
            self.graph.refresh_slot(node, slot)
        except BaseException:
            if node.child(slot) is child:
                node.detach(slot)
            await self._give_up(child)
            raise

    async def _open_named(self, wanted: _Named) -> None:
        """Open the backing file that the image names, unless the caller gave or forbade it."""
        node, given, mode = wanted.node, wanted.given, wanted.mode._replace(writable=False)
        if given is None or (given is _UNSAID and not self.backing):
            return
        below = await self._backing(wanted, mode)
        node.attach("backing", below)
        if not self.check:
            from .named import check_identity

            check_identity(node, below)

    async def _backing(self, wanted: _Named, mode: Mode) -> Node:
        node, given = wanted.node, wanted.given
        if isinstance(given, str):
            return self.graph.find(given)
        if isinstance(given, dict):
            if "driver" not in given and wanted.format:
                given = {"driver": wanted.format, **given}
            if not wanted.reference or not lacks_file(given):
                return await self.node(given, mode, wanted.chain)
        from .named import BACKING, backing_names, located

        by = display_name(node)
        admitted = located(self.gate, node, backing_names(node) or [wanted.reference])
        chain = (*wanted.chain, names.file_identity(by))
        if len(chain) > self.gate.max_depth:
            raise ImageError(
                f"The chain of backing files is longer than {self.gate.max_depth}", file=by
            )
        try:
            parsed, plain = names.parse(admitted.reference)
            if names.identity(parsed) in chain:
                raise ImageError(
                    f"Backing file '{admitted.reference}' creates an infinite loop", file=by
                )
            mode = mode._replace(within=admitted.within)
            if isinstance(given, dict):
                # The caller said how, not where: the place is still what the image names.
                options = names.merged({"file": parsed} if plain else parsed, given)
                return await self.node(options, mode, chain)
            return await self.disk(parsed, plain, wanted.format, mode, chain)
        except Outside as found:
            raise self.gate.outside(
                wanted.reference, by, admitted.reference, BACKING, found
            ) from found
        except (OSError, DiskError) as error:
            error.add_note("Could not open backing file")
            raise

    async def _give_up(self, node: Node) -> None:
        """Close a child whose parent could not be opened, unless others use it."""
        if not node.parents and node not in self.graph.roots and node.graph is not None:
            await discard_disk(node)
