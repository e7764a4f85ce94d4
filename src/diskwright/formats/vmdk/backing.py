"""Delta links: the parent that a VMDK image names, and its content identifiers."""

from __future__ import annotations

from ...abilities import Reference
from ...contract import Barrier, Procedure, Truncate, Write
from ...errors import NotSupported, UsageError
from ...hints import TYPE_CHECKING
from .descriptor import NO_CONTENT, Descriptor, parse

if TYPE_CHECKING:
    from .cid import Place


class Links:
    """What an image says of itself and of its parent (see `abilities.Backed`)."""

    descriptor: Descriptor | None
    place: Place | None
    content_changed: bool
    backing_format: str | None = "vmdk"

    @property
    def backing_file(self) -> str | None:
        """parentFileNameHint, where parentCID says that there is a parent."""
        text = self.descriptor
        return None if text is None or text.parent_cid == NO_CONTENT else text.parent_hint

    @property
    def backing_names(self) -> list[str]:
        """The hint is the only name."""
        name = self.backing_file
        return [] if name is None else [name]

    def references(self) -> list[Reference]:
        """Parent, extents, and the file of the changed blocks.  A sparse extent in a descriptor
        inside an extent is the file that it is in."""
        text = self.descriptor
        if text is None:
            return []
        found = [Reference("backing file", name, "vmdk") for name in self.backing_names]
        inside = self.place is not None and self.place.room is not None
        for line in text.extents:
            if line.name is not None and not (inside and line.type == "SPARSE"):
                found.append(Reference("extent", line.name))
        changes = text.settings.get("changetrackpath")
        if changes:
            found.append(Reference("change tracking file", changes))
        return found

    @property
    def identity(self) -> str | None:
        """The CID, 8 hex digits."""
        text = self.descriptor
        return None if text is None else f"{text.cid:08x}"

    @property
    def parent_identity(self) -> str | None:
        """parentCID; None without a parent."""
        text = self.descriptor
        return None if text is None or self.backing_file is None else f"{text.parent_cid:08x}"

    def change_backing(
        self, name: str | None, fmt: str | None, identity: str | None = None
    ) -> Procedure:
        """Refer to another parent; see `abilities.Backed`.

        Raises UsageError for another format than vmdk, NoSpace when an embedded descriptor has no
        room for the name.
        """
        if self.descriptor is None or self.place is None:
            raise NotSupported("An extent without a descriptor cannot have a backing file")
        if name is not None and fmt is not None and fmt != "vmdk":
            raise UsageError("backing_file must be a vmdk image")
        return self._change_backing(self.descriptor, self.place, name, identity)

    def _change_backing(
        self, old: Descriptor, place: Place, name: str | None, identity: str | None
    ) -> Procedure:
        text = parse(old.encode())
        if name is None:
            text.set_parent(NO_CONTENT, None)
        else:
            text.set_parent(parent_cid(identity, old.parent_cid), name)
        yield from rewrite(place, text)
        self.descriptor = text


def parent_cid(identity: str | None, recorded: int) -> int:
    """The parentCID for a parent with this identity (None: the recorded one stays).

    Raises UsageError when neither says which content the parent has.
    """
    cid = recorded if identity is None else int(identity, 16)
    if cid == NO_CONTENT:
        raise UsageError("The content identifier of the backing file is not known")
    return cid


def rewrite(place: Place, text: Descriptor) -> Procedure:
    """Store ``text``, durable when it ends."""
    for writes in place.change(text):
        yield Barrier()
        yield Write(writes)
        yield Barrier()
    data = text.encode()
    place.took(data)
    if place.room is None and len(place.stored) > len(data):
        yield Truncate("file", len(data))
        place.stored = data
