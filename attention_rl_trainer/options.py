"""Options that are declared once, with type, range, default and help, beside what uses them.

Each room has a small dataclass of its options, which is passed wherever they are needed; `AttentionGuidedRLConfig`
inherits them all. What a field's annotation says is checked when the object is made.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class AtLeast:
    """A number that is finite and at least ``minimum``."""

    minimum: float

    def __str__(self) -> str:
        """Say what is expected."""
        return f"at least {self.minimum:g}"

    def admits(self, value: float) -> bool:
        """Whether a value is in the range."""
        return self.minimum <= value < math.inf


@dataclass(frozen=True)
class Above:
    """A number that is finite, above ``minimum``, and at most ``maximum``."""

    minimum: float
    maximum: float = math.inf

    def __str__(self) -> str:
        """Say what is expected."""
        if math.isinf(self.maximum):
            return f"above {self.minimum:g} and finite"
        return f"in ({self.minimum:g}, {self.maximum:g}]"

    def admits(self, value: float) -> bool:
        """Whether a value is in the range."""
        return self.minimum < value <= self.maximum and value < math.inf


Count = Annotated[int, AtLeast(1)]
CountOrZero = Annotated[int, AtLeast(0)]
Coefficient = Annotated[float, AtLeast(0)]
Positive = Annotated[float, Above(0)]
Share = Annotated[float, Above(0, 1)]


def option(default: T, text: str, **argparse: Any) -> T:
    """Declare a field of an options dataclass.

    Args:
        default: an immutable value.
        text: the help text, which is the field's documentation.
        argparse: further keys for the command line, such as ``aliases``.
    """
    return field(default=default, metadata={"help": text, **argparse})


@dataclass
class Options:
    """Base of every room's options.

    Raises:
        ValueError: an option has the wrong type or is out of range; names it, its value and the range.
    """

    def __post_init__(self) -> None:
        self.check_options()

    def check_options(self) -> None:
        """Check every option; a subclass with options that depend on each other extends this."""
        kind: type = type(self)
        for name, hint in _hints(kind).items():
            _check(name, getattr(self, name), hint)


O = TypeVar("O", bound=Options)


def take_options(kind: type[O], source: object, **changes: Any) -> O:
    """Make a room's options from an object that has them among others, such as the whole run's config."""
    own = {item.name: getattr(source, item.name) for item in fields(kind) if hasattr(source, item.name)}
    return kind(**own | changes)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    own = [base for base in kind.__mro__ if issubclass(base, Options)]
    return {
        name: hint for name, hint in hints.items() if any(name in vars(base).get("__annotations__", ()) for base in own)
    }


def _check(name: str, value: Any, hint: Any) -> None:
    is_optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    if is_optional:
        if value is None:
            return
        remaining = [arm for arm in get_args(hint) if arm is not NoneType]
        if len(remaining) > 1:
            return
        (hint,) = remaining
    ranges: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *found = get_args(hint)
        ranges = tuple(found)
    or_none = " or none" if is_optional else ""
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}")
    if hint is int and type(value) is not int:
        raise ValueError(f"{name} must be an integer{or_none}, got {value!r}")
    if hint is float and (isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value)):
        raise ValueError(f"{name} must be a number{or_none}, got {value!r}")
    for allowed in ranges:
        if not allowed.admits(value):
            finite = " and finite" if hint is float and isinstance(allowed, AtLeast) else ""
            raise ValueError(f"{name} must be {allowed}{finite}{or_none}, got {value!r}")
