"""From the fields of an entry to the text of its key or value."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter


def expect_template(template: str, argument: str, fields: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a template that cannot be filled, or leaves out what makes the texts differ.

    Args:
        argument: its name, which begins the message.
        fields: what may stand in braces.
        needed: of these, one must.

    Raises:
        ValueError: says what was found, what is expected and the way out.
    """
    known = ", ".join(f"{{{name}}}" for name in fields)
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"{argument} is {template!r}, which cannot be read: {error}. It may hold {known}; a brace is written twice."
        ) from error
    for _, name, layout, conversion in parts:
        if name not in fields or layout or conversion:
            shown = f"{name}{'!' + conversion if conversion else ''}{':' + layout if layout else ''}"
            raise ValueError(f"{argument} is {template!r}, which holds {{{shown}}}; it may hold {known}.")
    if not any(name in needed for _, name, _, _ in parts):
        wanted = " or ".join(f"{{{name}}}" for name in needed)
        raise ValueError(f"{argument} is {template!r}, the same text for every entry; put {wanted} into it.")
