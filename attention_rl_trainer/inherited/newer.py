"""Options that newer versions of transformers have, so that an older one takes them by the names of today."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

_RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
_IS_OLD = not _RENAMED.keys() & {item.name for item in fields(TrainingArguments)}


@dataclass
class NewerOptions:
    """What transformers has from 5.23 on, with its types and defaults."""

    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Compute activations of an update again in its backward, to save memory."}
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How, for example use_reentrant; as JSON on the command line."}
    )


def pass_on_newer_options(args: Any) -> None:
    """Give an older version of transformers the options by its own names, before it checks them."""
    if _IS_OLD:
        for name, older in _RENAMED.items():
            if getattr(args, name) is not None:
                setattr(args, older, getattr(args, name))


def mirror_newer_options(args: Any) -> None:
    """Let the names of today say what an older version has checked, as a newer one does itself."""
    if _IS_OLD:
        for name, older in _RENAMED.items():
            setattr(args, name, getattr(args, older))
