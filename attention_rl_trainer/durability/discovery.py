"""Which checkpoint a run resumes from: the one named, or the newest whole one, and only one of the same run.

Whole is a checkpoint whose files are as its manifest says. Of the same run is one whose facts, which it keeps in
``run_identity.json``, are those of the present run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from attention_rl_trainer.durability.manifest import Damage, find_damage
from attention_rl_trainer.durability.staging import earlier_checkpoints, is_checkpoint_name, list_checkpoints

logger = logging.getLogger(__name__)

IDENTITY_NAME = "run_identity.json"
Fact: TypeAlias = str | int | float | bool | None


class CheckpointError(ValueError):
    """A checkpoint is not there, is damaged, or does not fit the run."""


def find_checkpoint(
    resume_from_checkpoint: str | os.PathLike[str] | bool | None, output_dir: Path, trace: str
) -> Path | None:
    """Find the checkpoint to resume from, and check that each of its files is as it was written.

    Args:
        resume_from_checkpoint: a folder; true for the newest complete one in ``output_dir``; ``None`` or false for
            none.
        output_dir: the run's folder.
        trace: name of a file that a run leaves in its folder before its first checkpoint.

    Returns:
        The folder, or ``None`` for a run from the start.

    Raises:
        CheckpointError: there is no such folder, it is damaged, or there is no complete checkpoint; names every file
            that is not as it was written.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    if resume_from_checkpoint is not True:
        return _check(os.fspath(resume_from_checkpoint))
    checkpoints = list_checkpoints(output_dir)
    damages: list[Damage] = []
    for checkpoint in reversed(checkpoints):
        found = find_damage(checkpoint)
        if not found:
            return checkpoint
        logger.warning("%s is damaged and passed over: %s", checkpoint, _listed(found))
        damages += found
    if checkpoints:
        raise CheckpointError(
            f"no checkpoint in {output_dir} is complete: {_listed(damages)}. Restore one of them, or start anew "
            "without resume_from_checkpoint"
        )
    if not (output_dir / trace).is_file():
        raise CheckpointError(f"there is no checkpoint in {output_dir}; start without resume_from_checkpoint")
    earlier = ", ".join(map(str, earlier_checkpoints(output_dir)))
    logger.warning(
        "The run in %s ended before its first checkpoint; it starts from the beginning%s",
        output_dir,
        f". Checkpoints of earlier runs are in {earlier}" if earlier else "",
    )
    return None


def _check(named: str) -> Path:
    if not named.strip():
        raise CheckpointError("resume_from_checkpoint is empty; name a checkpoint, or leave it out to start anew")
    folder = Path(named)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}; check the path, or start without it")
    if not is_checkpoint_name(folder.name):
        folder = folder.resolve()  # a link such as "latest"
    found = find_damage(folder)
    if found:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: {_listed(found)}. Restore it, or name another; "
            "resume_from_checkpoint=True takes the newest complete one"
        )
    if not is_checkpoint_name(folder.name):
        raise CheckpointError(f"{folder} is not named checkpoint-<step>; give it its name back")
    return folder


def _listed(damages: list[Damage]) -> str:
    return "; ".join(map(str, damages))


def save_identity(folder: Path, facts: Mapping[str, Fact]) -> None:
    """Write a run's facts into a checkpoint."""
    (folder / IDENTITY_NAME).write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")


def expect_same_identity(folder: Path, facts: Mapping[str, Fact]) -> None:
    """Refuse to resume as another run.

    Raises:
        CheckpointError: the checkpoint's facts differ from those given, the present run's; lists every one.
    """
    path = folder / IDENTITY_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, so it is unknown which run wrote {folder}; restore it, or name another checkpoint"
        )
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
