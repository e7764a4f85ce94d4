"""``query-qmp-schema``: the declarations in the form of QAPI's introspection.

Types have numbers for names, as QEMU's have, but for those of JSON.
"""

from __future__ import annotations

from typing import Any

from .commands import COMMANDS, EVENTS
from .types import Alternate, Array, Builtin, Enum, Member, Struct, Type, Union


def schema() -> list[dict[str, Any]]:
    """Commands and events in their order, then every type that they use, each once."""
    return _Schema().build()


class _Schema:
    def __init__(self) -> None:
        self.names: dict[Type, str] = {}
        self.shapes: dict[object, str] = {}
        self.types: list[dict[str, Any]] = []

    def build(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for command in COMMANDS.values():
            entry: dict[str, Any] = {
                "name": command.name,
                "meta-type": "command",
                "arg-type": self.name(command.arguments),
                "ret-type": self.name(command.result),
            }
            if command.oob:
                entry["allow-oob"] = True
            if command.features:
                entry["features"] = list(command.features)
            found.append(entry)
        found += [
            {"name": event.name, "meta-type": "event", "arg-type": self.name(event.data)}
            for event in EVENTS.values()
        ]
        return found + self.types

    def name(self, of: Type) -> str:
        """The name of a type, which is listed if it was not."""
        if of not in self.names:
            if isinstance(of, Array):
                self.names[of] = f"[{self.name(of.of)}]"
            elif isinstance(of, Builtin):
                self.names[of] = of.name
            else:  # types that look the same are one
                key: object = of
                if isinstance(of, Enum):
                    key = of.values
                elif isinstance(of, Struct):
                    key = of.members
                self.names[of] = self.shapes.setdefault(key, str(len(self.shapes)))
            if not any(entry["name"] == self.names[of] for entry in self.types):
                entry = {"name": self.names[of]}
                self.types.append(entry)
                entry.update(self.described(of))
        return self.names[of]

    def described(self, of: Type) -> dict[str, Any]:
        if isinstance(of, Builtin):
            return {"meta-type": "builtin", "json-type": of.kind}
        if isinstance(of, Array):
            return {"meta-type": "array", "element-type": self.name(of.of)}
        if isinstance(of, Enum):
            members = [{"name": value} for value in of.values]
            return {"meta-type": "enum", "members": members, "values": list(of.values)}
        if isinstance(of, Alternate):
            branches = [{"type": self.name(branch)} for branch in of.branches]
            return {"meta-type": "alternate", "members": branches}
        assert isinstance(of, (Struct, Union))
        found: dict[str, Any] = {
            "meta-type": "object",
            "members": [self.member(member) for member in of.members],
        }
        if isinstance(of, Union):
            found["tag"] = of.tag
            found["variants"] = [
                {"case": case, "type": self.name(struct)} for case, struct in of.variants.items()
            ]
        return found

    def member(self, member: Member) -> dict[str, Any]:
        found: dict[str, Any] = {"name": member.name, "type": self.name(member.type)}
        if member.optional:
            found["default"] = None
        return found
