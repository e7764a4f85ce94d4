"""``NamedTuple`` as :mod:`typing` has it, made in half the time.

``typing.NamedTuple`` compiles the text of every annotation to see that it is one: a tenth of the
start of a short run, for what the type checker has seen before.  Here they stay text, which
:func:`typing.get_type_hints` understands as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:
    from collections import namedtuple

    # What the class itself has to keep of what its body says.
    _OWN = {"__annotations__", "__module__", "__qualname__", "__classcell__"}

    class _Meta(type):
        def __new__(cls, name: str, bases: tuple[Any, ...], body: dict[str, Any]) -> Any:
            fields = body.get("__annotations__", {})
            defaults = [body[field] for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body["__module__"])
            made.__annotations__ = fields
            made.__orig_bases__ = (NamedTuple,)
            for key, value in body.items():
                if key not in _OWN and key not in fields:
                    setattr(made, key, value)
            return made

    _base = type.__new__(_Meta, "NamedTuple", (), {})

    class _NamedTuple:
        """What classes name as their base; they are made by :class:`_Meta`."""

        def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_base,)

    NamedTuple = _NamedTuple()
