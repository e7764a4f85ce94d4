"""The gate: nothing that an image *names* is opened but through it.

An image is data from anywhere.  A backing file's name in its header could make the one who opens
it read any file of theirs, so by default such a name is refused, and the refusal says what allows
it.  What the caller typed is the caller's own and needs no leave.

A path of another machine is mapped first (see :mod:`.paths`).  A mapping says what a name means,
it is no leave: the image still chooses the file below the mapped directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..errors import Refused, UsageError

if TYPE_CHECKING:
    from .paths import PathMap

VARIABLE = "DISKWRIGHT_POLICY"
POLICIES = ("untrusted", "trusted")
SWITCH = f"'--policy trusted' ({VARIABLE}=trusted in the environment, policy='trusted' in Python)"


class Gate:
    """Decides about references that images make.

    ``policy``: ``untrusted`` admits nothing but what the caller typed, ``trusted`` everything.
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
    ) -> None:
        if policy not in POLICIES:
            raise UsageError(f"Unknown policy '{policy}': it must be one of {', '.join(POLICIES)}")
        self.policy = policy
        self.typed = frozenset(allow)
        self.paths = dict(paths or {})
        self._map: PathMap | None = None
        if self.paths:
            from .paths import PathMap

            self._map = PathMap(self.paths)

    @classmethod
    def from_environment(
        cls,
        policy: str | None = None,
        allow: Iterable[str] = (),
        paths: Mapping[str, str] | None = None,
    ) -> Gate:
        """The gate of a command: ``policy`` where it was typed, otherwise what the variable
        DISKWRIGHT_POLICY says, otherwise ``untrusted``."""
        return cls(policy or os.environ.get(VARIABLE) or "untrusted", allow, paths)

    def allowing(self, *references: str) -> Gate:
        """The same gate, which also admits ``references``: the caller typed them."""
        return Gate(self.policy, self.typed.union(references), self.paths)

    def mapped(self, name: str) -> str | None:
        """What a path of another machine means here; None where no mapping applies."""
        return None if self._map is None else self._map.apply(name)

    def admit(
        self, reference: str, by: str, *, resolved: str = "", role: str = "backing file"
    ) -> str:
        """Let ``reference`` pass, or raise Refused.

        ``by`` is the file that names it, ``resolved`` what the reference means from there, ``role``
        what it is named as.  Returns the reference to open.
        """
        target = resolved or reference
        if self.policy == "trusted" or reference in self.typed or target in self.typed:
            return target
        raise Refused(
            reference,
            f"the policy '{self.policy}' opens no {role} that only an image names",
            SWITCH,
            file=by,
        )
