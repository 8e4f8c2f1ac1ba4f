"""What must be the same in a run that goes on: facts by name, kept in the checkpoint and compared at the next start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from attention_rl_trainer.durability.discovery import CheckpointError

IDENTITY_NAME = "run_identity.json"
Fact: TypeAlias = str | int | float | bool | None


def save_identity(folder: Path, facts: Mapping[str, Fact]) -> None:
    """Write the facts.

    Args:
        folder: the checkpoint's folder.
        facts: by name.
    """
    (folder / IDENTITY_NAME).write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")


def expect_same_identity(folder: Path, facts: Mapping[str, Fact]) -> None:
    """Refuse to go on as another run.

    Args:
        folder: the checkpoint's folder.
        facts: those of the present run.

    Raises:
        CheckpointError: facts differ; lists every one.
    """
    path = folder / IDENTITY_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so it cannot be told whose checkpoint {folder} is")
    saved = json.loads(path.read_text(encoding="utf-8"))
    # Through JSON, so that both sides have been rounded alike.
    present = json.loads(json.dumps(dict(facts)))
    names = [*saved, *(name for name in present if name not in saved)]
    differing = [name for name in names if saved.get(name) != present.get(name)]
    if differing:
        listed = "".join(f"\n  {name}: {saved.get(name)!r} there, {present.get(name)!r} here" for name in differing)
        raise CheckpointError(
            f"{folder} belongs to another run; start anew in another output_dir, or set these as they were:{listed}"
        )
