"""Our NamedTuple beside that of ``typing``."""

from __future__ import annotations

import inspect
import pickle
import typing
from typing import Any

import pytest

from diskwright.records import NamedTuple


class Ours(NamedTuple):
    """What it is."""

    one: int
    two: list[Ours] | None = None
    """Two."""

    @property
    def twice(self) -> int:
        return self.one * 2

    @classmethod
    def of(cls, text: str) -> Ours:
        return cls(int(text))


class Derived(Ours):
    """With nothing of its own."""

    __slots__ = ()


class Theirs(typing.NamedTuple):
    """What it is."""

    one: int
    two: list[Theirs] | None = None


class Nothing(NamedTuple):
    """No fields."""


def test_it_is_what_typing_makes() -> None:
    for name in ("_fields", "_field_defaults", "__doc__", "__module__"):
        assert getattr(Ours, name) == getattr(Theirs, name)
    assert typing.get_type_hints(Ours).keys() == typing.get_type_hints(Theirs).keys()
    assert Ours(1) == Theirs(1) == (1, None) == Ours.of("1")
    made = Ours(2)._replace(two=[Ours(1)])
    assert pickle.loads(pickle.dumps(made)) == made
    assert (made.twice, Nothing(), repr(Ours(1))) == (4, (), "Ours(one=1, two=None)")
    loose: Any = Ours
    for wrong in (loose, lambda: loose(1, 2, 3), lambda: loose(three=3), lambda: loose._make([1])):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError):
        loose(1)._replace(three=3)
    assert isinstance(made, tuple) and issubclass(Ours, tuple)
    assert made._asdict() == {"one": 2, "two": [Ours(1)]}


def test_what_is_derived_is_made_like_its_base() -> None:
    first: Any = Derived(two=None, one=5)
    assert (first, first.twice, type(first._replace(one=6))) == ((5, None), 10, Derived)
    with pytest.raises(AttributeError):
        first.three = 3
    match first:
        case Ours(one, two):
            assert (one, two) == (5, None)


def test_signatures_have_the_fields() -> None:
    theirs = inspect.signature(Theirs)
    for ours in (inspect.signature(Ours), inspect.signature(Derived)):
        assert [*ours.parameters] == [*theirs.parameters]
        assert [p.default for p in ours.parameters.values()] == [
            p.default for p in theirs.parameters.values()
        ]


def test_a_default_is_followed_by_defaults() -> None:
    with pytest.raises(TypeError, match="one"):

        class Wrong(NamedTuple):
            two: int = 2
            one: int  # type: ignore[misc]
