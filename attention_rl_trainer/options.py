"""Options that are declared once, with type, range, default and help, beside what uses them.

Each room has a small dataclass of its options, which is passed wherever they are needed; `AttentionGuidedRLConfig`
inherits them all. What a field's annotation says is checked when the object is made.
"""

from __future__ import annotations

import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

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
Groups: TypeAlias = Mapping[str, tuple[type, ...]]
"""Classes of options by the heading that they are shown under."""


def take_options(kind: type[OptionsT], source: Options, **changes: Any) -> OptionsT:
    """Make a room's options from others that have them among theirs; what these lack has its default."""
    shared = {item.name for item in fields(kind)} & {item.name for item in fields(source)}
    return kind(**{name: getattr(source, name) for name in shared} | changes)


def declaring_class(kind: type, name: str) -> type:
    """Find the class that declares a field, not one that gives it another default."""
    return next(base for base in reversed(kind.__mro__) if name in inspect.get_annotations(base))


def options_by_heading(kind: type, groups: Groups) -> dict[str, list[Field[Any]]]:
    """Sort the fields of a class by the headings of the classes that declare them; others are left out."""
    by_class = {owner: heading for heading, owners in groups.items() for owner in owners}
    sorted_fields: dict[str, list[Field[Any]]] = {heading: [] for heading in groups}
    for item in fields(kind):
        heading = by_class.get(declaring_class(kind, item.name))
        if heading is not None and item.init:
            sorted_fields[heading].append(item)
    return sorted_fields


def meaning_of(owners: Iterable[type]) -> str:
    """Join what the classes of a group say of themselves in the first line of their docstrings."""
    return " ".join((inspect.getdoc(owner) or "").partition("\n")[0] for owner in owners)


def documented(groups: Groups) -> Callable[[type[T]], type[T]]:
    """Add the options and their help texts to a class's docstring, by heading, as a list of terms and definitions."""

    def document(kind: type[T]) -> type[T]:
        paragraphs = [inspect.cleandoc(kind.__doc__ or "")]
        for heading, items in options_by_heading(kind, groups).items():
            paragraphs.append(f"**{heading.capitalize()}.** {meaning_of(groups[heading])}")
            paragraphs += [f"{_term(item)}\n{_indented(item.metadata['help'])}" for item in items]
        kind.__doc__ = "\n\n".join(paragraphs) + "\n"
        return kind

    return document


def _term(item: Field[Any]) -> str:
    return item.name if item.default is MISSING else f"{item.name} = {item.default!r}"


def _indented(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ")


def takes_names(aliases: Mapping[str, str], elsewhere: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """Let a class take arguments by names that users of another library know.

    Args:
        aliases: the argument by its other name.
        elsewhere: by a name that is none here, what to do instead.
    """

    def wrap(kind: type[T]) -> type[T]:
        construct = kind.__init__

        @functools.wraps(construct)
        def construct_by_any_name(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in kwargs.keys() & elsewhere.keys():
                raise ValueError(f"{kind.__name__} takes no {name}: {elsewhere[name]}")
            for name in kwargs.keys() & aliases.keys():
                if aliases[name] in kwargs:
                    raise ValueError(f"{name} is another name of {aliases[name]}; give one of them")
                kwargs[aliases[name]] = kwargs.pop(name)
            construct(self, *args, **kwargs)

        kind.__init__ = construct_by_any_name  # type: ignore[method-assign]
        return kind

    return wrap


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
