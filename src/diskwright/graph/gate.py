"""The gate: nothing that an image *names* is opened but through it.

An image is data from anywhere.  A backing file's name in its header could make the one who opens
it read any file of theirs, so such a name is opened only as far as a policy allows, and a refusal
says what would allow it.  What the caller typed is the caller's own and needs no leave.

A path of another machine is mapped first (see :mod:`.paths`).  A mapping says what a name means,
it is no leave: the image still chooses the file below the mapped directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from ..errors import DiskError, Outside, Refused, UsageError
from ..hints import TYPE_CHECKING
from ..records import NamedTuple

if TYPE_CHECKING:
    from .paths import PathMap

VARIABLE = "DISKWRIGHT_POLICY"
POLICIES = ("untrusted", "local", "trusted")
_TRUST = f"'--policy trusted' ({VARIABLE}=trusted in the environment, policy='trusted' in Python)"
_ALLOW = "'--allow {}' (DISKWRIGHT_ALLOW in the environment, Policy(allow=...) in Python)"


class Leave(NamedTuple):
    """What may be opened: ``reference``, and if ``within`` is not empty only as a regular file
    below one of these folders, which is known when it is open."""

    reference: str
    within: tuple[str, ...] = ()


class Gate:
    """Decides about references that images make.

    ``policy``: ``untrusted`` admits nothing but what the caller typed; ``local`` regular files
    below the folder of the image that names them, and below ``folders``; ``trusted`` everything.
    Names of NBD exports among ``folders`` are admitted as they are.
    ``allow``: references (as an image may write them, or resolved) that the caller typed.
    ``paths``: what prefixes of absolute paths mean here, above all of Windows paths.
    """

    max_depth = 80
    """Longest chain of backing files that is followed: a read passes through every layer, each a
    few frames of the interpreter's stack."""

    def __init__(
        self,
        policy: str = "untrusted",
        allow: Iterable[str] = (),
        paths: Mapping[str, str] | None = None,
        folders: Sequence[str] = (),
    ) -> None:
        if policy not in POLICIES:
            raise UsageError(f"Unknown policy '{policy}': it must be one of {', '.join(POLICIES)}")
        self.policy = policy
        exports = [name for name in folders if _is_nbd(name)]
        self.typed = frozenset((*allow, *exports))
        self.paths = dict(paths or {})
        self.folders = tuple(name for name in folders if name not in exports)
        self._map: PathMap | None = None
        if self.paths:
            from .paths import PathMap

            self._map = PathMap(self.paths)

    def allowing(self, *references: str) -> Gate:
        """The same gate, which also admits ``references``: the caller typed them."""
        return Gate(self.policy, self.typed.union(references), self.paths, self.folders)

    def mapped(self, name: str) -> str | None:
        """What a path of another machine means here; None where no mapping applies."""
        return None if self._map is None else self._map.apply(name)

    def admit(
        self,
        reference: str,
        by: str,
        *,
        resolved: str = "",
        role: str = "backing file",
        folder: str | None = None,
    ) -> Leave:
        """Let ``reference`` pass, or raise Refused.

        ``by`` is the file that names it, ``folder`` the one it is in (None where there is none),
        ``resolved`` what the reference means from there, ``role`` what it is named as.
        """
        target = resolved or reference
        if self.policy == "trusted" or reference in self.typed or target in self.typed:
            return Leave(target)
        if self.policy == "untrusted":
            rule = f"the policy 'untrusted' opens no {role} that only an image names"
            raise Refused(reference, rule, self._switch(target), file=by)
        within = self._within(folder)
        if not _is_below(target, within):
            raise self.outside(reference, by, target, role)
        return Leave(target, within)

    def outside(
        self, reference: str, by: str, target: str, role: str, found: Outside | None = None
    ) -> Refused:
        """The refusal of what is not below the folders; ``found`` tells where it was instead."""
        rule = (
            f"the policy 'local' opens as {role} only a regular file below the image's own folder "
            "or an allowed one"
        )
        if found is not None:
            rule += f", and {found.why}"
        return Refused(reference, rule, self._switch(target), file=by)

    def _switch(self, target: str) -> str:
        path = _plain(target)
        if path is None:
            if _is_nbd(target):
                return f"'--allow {target}' (Policy(allow=...) in Python) or {_TRUST}"
            return _TRUST
        folder = os.path.dirname(os.path.abspath(path))
        return f"{_ALLOW.format(folder)} or {_TRUST}"

    def _within(self, folder: str | None) -> tuple[str, ...]:
        """The folders that are open to an image in ``folder``, each as it is spelt, without ``..``
        and without links: an image may write its own place in any of these ways."""
        found: dict[str, None] = {}
        for name in (*self.folders, *([] if folder is None else [folder])):
            whole = os.path.join(os.getcwd(), name)
            found.update(dict.fromkeys((whole, os.path.abspath(name), os.path.realpath(name))))
        return tuple(found)


def _is_below(target: str, folders: tuple[str, ...]) -> bool:
    from ..protocols.beneath import below

    path = _plain(target)
    return path is not None and below(path, folders) is not None


def _is_nbd(reference: str) -> bool:
    from .names import protocol_of

    return protocol_of(reference).partition("+")[0] in ("nbd", "nbds")


def _plain(reference: str) -> str | None:
    """The path that ``reference`` is; None for what is no plain file's name."""
    from .names import is_json, parse

    if not reference or is_json(reference):
        return None
    try:
        options, _ = parse(reference)
    except DiskError:
        return None
    path = options.get("filename") if options.get("driver") == "file" else None
    return path if isinstance(path, str) else None
