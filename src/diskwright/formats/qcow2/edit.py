"""What precedes the changes of a procedure that runs alone."""

from __future__ import annotations

from ...contract import Procedure
from ...hints import TYPE_CHECKING
from .. import editing

if TYPE_CHECKING:
    from .format import Qcow2


def announce(image: Qcow2) -> Procedure:
    """Make the `before` group durable, where there is one."""
    image.check_write()
    if not image.announced:
        yield from editing.before(image, image.before())
