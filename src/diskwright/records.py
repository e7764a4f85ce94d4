"""``NamedTuple`` as :mod:`typing` has it, made in a fifth of the time.

``typing.NamedTuple`` compiles the text of every annotation to see that it is one, and
``collections.namedtuple`` the ``__new__`` of every class: a fifth of a short run, which makes
instances of a few classes only.  Here annotations stay text, which :func:`typing.get_type_hints`
understands as well, and ``__new__`` is compiled when it is first called.
"""

from __future__ import annotations

from .hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NamedTuple as NamedTuple
else:
    try:
        from _collections import _tuplegetter  # what namedtuple takes
    except ImportError:
        from operator import itemgetter

        def _tuplegetter(index: int, doc: str) -> property:
            return property(itemgetter(index), doc=doc)

    class _Meta(type):
        """Turns a class body with annotations into a subclass of tuple."""

        def __new__(cls, name: str, bases: tuple[Any, ...], body: dict[str, Any]) -> type:
            fields = tuple(body.get("__annotations__", ()))
            defaults = {field: body.pop(field) for field in fields if field in body}
            late = fields[len(fields) - len(defaults) :]
            if tuple(defaults) != late:
                raise TypeError(f"{name}: no default of {set(late) - set(defaults)} behind others")
            for index, field in enumerate(fields):
                body[field] = _tuplegetter(index, "")
            body |= {
                "__slots__": (),
                "__match_args__": fields,
                "__new__": _first_new,
                "__orig_bases__": (NamedTuple,),
                "_fields": fields,
                "_field_defaults": defaults,
            }
            return type(name, (_Record,), body)

    def _made(cls: type) -> Any:
        """The class with the fields that ``cls`` has."""
        return next(base for base in cls.__mro__ if "_fields" in base.__dict__)

    def _first_new(cls: type, *values: Any, **named: Any) -> Any:
        """Compile ``__new__`` of the class that has these fields, and call it."""
        made = _made(cls)
        names = ", ".join(made._fields)
        code = f"lambda _cls, {names}: _new(_cls, ({names}{',' if names else ''}))"
        new = eval(code, {"_new": tuple.__new__, "__name__": made.__module__})
        new.__name__, new.__qualname__ = "__new__", f"{made.__qualname__}.__new__"
        new.__defaults__ = tuple(made._field_defaults.values())
        made.__new__ = staticmethod(new)
        return new(cls, *values, **named)

    class _Signature:
        """What :mod:`inspect` tells of a class; its ``__new__`` does not show it yet."""

        def __get__(self, instance: Any, cls: type) -> Any:
            from inspect import Parameter, Signature

            made = _made(cls)
            return Signature(
                [
                    Parameter(
                        field,
                        Parameter.POSITIONAL_OR_KEYWORD,
                        default=made._field_defaults.get(field, Parameter.empty),
                        annotation=made.__annotations__[field],
                    )
                    for field in made._fields
                ]
            )

    class _Record(tuple):
        """What all of them can do."""

        __slots__ = ()
        __signature__ = _Signature()

        @classmethod
        def _make(cls, values: Iterable[Any]) -> Any:
            made = tuple.__new__(cls, values)
            if len(made) != len(cls._fields):
                raise TypeError(f"Expected {len(cls._fields)} arguments, got {len(made)}")
            return made

        def _replace(self, /, **changed: Any) -> Any:
            made = self._make(map(changed.pop, self._fields, self))
            if changed:
                raise ValueError(f"Got unexpected field names: {list(changed)!r}")
            return made

        __replace__ = _replace

        def _asdict(self) -> dict[str, Any]:
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self) -> str:
            shown = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
            return f"{type(self).__name__}({shown})"

        def __getnewargs__(self) -> tuple[Any, ...]:
            return tuple(self)

    class _NamedTuple:
        """What classes name as their base; they are made by :class:`_Meta`."""

        def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_base,)

    NamedTuple = _NamedTuple()
    _base = type.__new__(_Meta, "NamedTuple", (), {})
