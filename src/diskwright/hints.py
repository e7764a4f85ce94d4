"""The names of :mod:`typing` that annotations and class statements need, at no cost.

To import :mod:`typing` takes as long as starting the interpreter, for what only type checkers read.
They see its names here; a running program gets stand-ins.  What every command imports takes them
from here.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any as Any
    from typing import ClassVar as ClassVar
    from typing import Generic as Generic
    from typing import Protocol as Protocol
    from typing import TypeVar as TypeVar
    from typing import overload as overload
else:
    Any = ClassVar = object

    class Generic:
        """``Generic[T]``, and what is made of it, is the class itself."""

        __slots__ = ()

        def __class_getitem__(cls, parameters: object) -> type:
            return cls

    class Protocol(Generic):
        """A plain class."""

        __slots__ = ()

    def TypeVar(name: str) -> str:
        """Its name."""
        return name

    def overload(function: object) -> object:
        """The function itself."""
        return function
