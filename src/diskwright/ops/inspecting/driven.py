"""What a format's own opening procedure says of a file, driven over bytes.

The procedure is the one that opens the image for everybody else, so it is held to the same bounds;
here nobody answers its requests to open what the image names.
"""

from __future__ import annotations

from ...contract import (
    Compute,
    DataRanges,
    Length,
    Open,
    Procedure,
    Progress,
    Quiesce,
    Read,
    Timed,
)
from ...errors import DiskError, ImageError, OverBudget, UnsupportedFeature
from ...graph import registry
from ...graph.named import role_of
from ...hints import Any
from .result import Facts
from .window import NotSeen, View

_FILE = "file"
_ENDLESS = 1 << 62


class _NotOpened(Exception):
    """The procedure wants to read what was not opened."""


def examine(name: str, view: View) -> Facts:
    """What the format ``name`` finds in the file.

    It is opened as for use, and if that fails a second time as for a check, which says more of an
    image that is damaged, and asks for no key.
    """
    facts = Facts(name)
    for checking in (False, True):
        format: Any = None
        found = registry.driver(name)
        assert found.open is not None
        options = {"read-only": True, "writable": False, "check": checking, "secrets": None}
        format, procedure = found.open(options)
        done = False
        try:
            _drive(procedure, view, facts)
            done = True
        except (_NotOpened, NotSeen):
            done = True
        except OverBudget:
            raise
        except UnsupportedFeature as error:
            _once(facts.unknown, error.detail)
        except ImageError as error:
            facts.violate(error.detail, error.field, error.offset)
        except DiskError:
            done = checking  # such as a key that nobody gave
        _ask(format, facts, done)
        if done:
            break
    return facts


def _ask(format: Any, facts: Facts, opened: bool) -> None:
    """What an image tells of itself, as far as it is open."""
    references = getattr(format, "references", None)
    for reference in references() if references is not None else ():
        facts.refer(*reference)
    if not opened or facts.unseen:
        return
    facts.size = format.size or None
    facts.features = dict(format.info())
    for mark in ("encrypted", "dirty"):
        if getattr(format, mark, False) is True:
            facts.features[mark] = True
    snapshots = getattr(format, "snapshots", ())
    if snapshots:
        facts.features["snapshots"] = len(snapshots)
    if getattr(format, "corrupt", False) is True:
        facts.violate("the image is marked as corrupt")


def _drive(procedure: Procedure, view: View, facts: Facts) -> None:
    answer: Any = None
    error: BaseException | None = None
    while True:
        try:
            request = procedure.send(answer) if error is None else procedure.throw(error)
        except StopIteration:
            return
        answer = error = None
        try:
            answer = _answer(request, view, facts)
        except Exception as caught:
            error = caught


def _answer(request: Any, view: View, facts: Facts) -> Any:
    if isinstance(request, Read):
        if request.slot != _FILE:
            raise _NotOpened
        return [_read(view, offset, length, facts) for offset, length in request.ranges]
    if isinstance(request, Length):
        return view.length if request.slot == _FILE else _ENDLESS
    if isinstance(request, Open):
        facts.refer(role_of(request.slot), request.reference, request.format)
        return None
    if isinstance(request, Compute | Timed):
        return request.function(*request.arguments)
    if isinstance(request, DataRanges):
        return [(request.offset, request.length)]
    if isinstance(request, Quiesce | Progress):
        return None
    raise PermissionError(1, "nothing is written while an image is looked at")


def _read(view: View, offset: int, length: int, facts: Facts) -> bytes:
    if length and offset >= view.length:
        facts.violate(f"metadata of {length} bytes behind the end of the file", offset=offset)
    try:
        return view.read(offset, length).ljust(length, b"\0")
    except NotSeen:
        _once(facts.unseen, (offset, length))
        raise


def _once(found: list[Any], value: Any) -> None:
    if value not in found:
        found.append(value)
