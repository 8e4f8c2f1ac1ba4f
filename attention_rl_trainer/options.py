"""Options that are declared once, with type, range, default and help, beside what uses them.

Each room has a small dataclass of its options, which is passed wherever they are needed; `AttentionGuidedRLConfig`
inherits them all. What a field's annotation says is checked when the object is made.
"""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass, field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class AtLeast:
    """A finite number of at least ``minimum`` and below ``maximum``."""

    minimum: float
    maximum: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.minimum}" if math.isinf(self.maximum) else f"in [{self.minimum}, {self.maximum})"

    def admits(self, value: float) -> bool:
        """Whether a value is in the range."""
        return self.minimum <= value < self.maximum


@dataclass(frozen=True)
class Above:
    """A finite number above ``minimum`` and at most ``maximum``."""

    minimum: float
    maximum: float = math.inf

    def __str__(self) -> str:
        return f"above {self.minimum:g}" if math.isinf(self.maximum) else f"in ({self.minimum:g}, {self.maximum:g}]"

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
            check_value(name, getattr(self, name), hint)


OptionsT = TypeVar("OptionsT", bound=Options)


def take_options(kind: type[OptionsT], source: Options, **changes: Any) -> OptionsT:
    """Make a room's options from others that have them among theirs; what these lack has its default."""
    shared = {item.name for item in fields(kind)} & {item.name for item in fields(source)}
    return kind(**{name: getattr(source, name) for name in shared} | changes)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of options alone: the config inherits the Trainer's fields too, which the Trainer checks."""
    hints = get_type_hints(kind, include_extras=True)
    own = {name for base in kind.__mro__ if issubclass(base, Options) for name in inspect.get_annotations(base)}
    return {name: hint for name, hint in hints.items() if name in own}


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def check_value(name: str, value: Any, hint: Any) -> None:
    """Check an option's value against a type, a range, a choice, or an enumeration by its values.

    Raises:
        ValueError: the value has another type or is out of range; names the option, the value and what is expected.
    """
    or_none, ranges = "", []
    if get_origin(hint) in (Union, UnionType):
        arms = [arm for arm in get_args(hint) if arm is not NoneType]
        # What may be of several types is checked by whoever reads it.
        if len(arms) > 1 or value is None:
            return
        (hint,), or_none = arms, " or none"
    if get_origin(hint) is Annotated:
        hint, *ranges = get_args(hint)
    if (choices := _choices(hint)) is not None:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}{or_none}, got {value!r}")
    elif not _is_of(hint, value):
        raise ValueError(f"{name} must be {_KINDS[hint]}{or_none}, got {value!r}")
    for allowed in ranges:
        if not allowed.admits(value):
            finite = " and finite" if hint is float and math.isinf(allowed.maximum) else ""
            raise ValueError(f"{name} must be {allowed}{finite}, got {value!r}")
    if hint is float and math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")


def _choices(hint: Any) -> list[Any] | None:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    return list(get_args(hint)) if get_origin(hint) is Literal else None


def _is_of(kind: Any, value: Any) -> bool:
    if kind is int:
        return type(value) is int  # a bool is an int to Python
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return kind not in _KINDS or isinstance(value, kind)
