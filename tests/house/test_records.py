"""Our NamedTuple beside that of ``typing``."""

from __future__ import annotations

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
    with pytest.raises(TypeError):
        loose()
    assert isinstance(made, tuple) and issubclass(Ours, tuple)
