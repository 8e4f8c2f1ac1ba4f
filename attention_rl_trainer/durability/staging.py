"""A folder or a file that is there as a whole or not at all.

What is written goes into a neighbour first, is synced, and gets its name in one rename. A process killed at any
moment leaves leftovers that `clear_leftovers` removes, or finishes where only the rename was missing.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from attention_rl_trainer.durability.manifest import find_damage, write_manifest

# A push to the Hub leaves out what begins with an underscore.
_STAGING = "_staging-"
_TRASH = "_trash-"
_EARLIER = "_earlier-"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class StagingError(OSError):
    """Something could not be written; what was there before still is."""


def checkpoint_step(checkpoint: Path) -> int:
    """Read the step off a checkpoint's name.

    Args:
        checkpoint: its folder, ``checkpoint-<step>``.

    Raises:
        ValueError: it has another name.
    """
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named {PREFIX_CHECKPOINT_DIR}-<step>")
    return int(match[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run, by step; nothing where there is no folder.

    Args:
        output_dir: the run's folder.
    """
    found = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=checkpoint_step)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Write a folder of files, with a manifest, that appears under its name in one step.

    Args:
        target: the folder. One that is there already is replaced.

    Yields:
        The folder to write into.

    Raises:
        StagingError: the system refused a write; names the path and the reason. The target is as it was.
    """
    staging = target.with_name(_STAGING + target.name)
    try:
        _remove(staging)
        staging.mkdir(parents=True)
        yield staging
        write_manifest(staging)
        for path in staging.rglob("*"):
            sync(path)
        sync(staging)
        _publish(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not _is_refusal(error):
            raise
        raise StagingError(
            f"{target} could not be written: {_reason(error)}. Nothing that was there before was touched; make room "
            "or set the permissions, and go on from the checkpoint before it"
        ) from error


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Write files into a folder that may hold others; each appears in one step, and one that is the same stays.

    Args:
        folder: where the files go.

    Yields:
        The folder to write into.

    Raises:
        StagingError: the system refused a write; names the path and the reason.
    """
    staging = folder / f"{_STAGING}files"
    try:
        _remove(staging)
        staging.mkdir(parents=True)
        yield staging
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                _place(path, folder / path.relative_to(staging))
    except Exception as error:
        if not _is_refusal(error):
            raise
        raise StagingError(f"{folder} could not be written: {_reason(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _place(path: Path, target: Path) -> None:
    if target.is_file() and filecmp.cmp(path, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    sync(path)
    os.replace(path, target)


def _publish(staging: Path, target: Path) -> None:
    if target.exists():
        # A folder that is not empty cannot be replaced by a rename.
        _remove(target)
    os.rename(staging, target)
    sync(target.parent)


def rotate_checkpoints(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints, each in one step; the newest and the best one stay.

    Args:
        output_dir: the run's folder.
        limit: how many may stay, at least the newest and the best one; ``None`` for all.
        best: the best checkpoint so far.
    """
    if limit is None or limit <= 0:
        return
    checkpoints = list_checkpoints(output_dir)
    protected = {checkpoints[-1]} if checkpoints else set()
    if best is not None:
        protected.add(Path(best))
    surplus = len(checkpoints) - max(limit, len(protected & set(checkpoints)))
    for checkpoint in [path for path in checkpoints if path not in protected][: max(0, surplus)]:
        _remove(checkpoint)


def set_aside_checkpoints(output_dir: Path, after_step: int = -1) -> Path | None:
    """Move checkpoints away that a run will not go on from, so that none is lost and none is taken for its own.

    Args:
        output_dir: the run's folder.
        after_step: those of later steps are moved.

    Returns:
        The folder in which they lie now, or ``None`` if there was none.
    """
    moved = [path for path in list_checkpoints(output_dir) if checkpoint_step(path) > after_step]
    if not moved:
        return None
    folders = (output_dir / f"{_EARLIER}{number}" for number in range(1, 10_000))
    aside = next(folder for folder in folders if not folder.exists())
    aside.mkdir()
    # The newest first: what is left at any moment is a run's beginning.
    for checkpoint in reversed(moved):
        os.rename(checkpoint, aside / checkpoint.name)
    return aside


def earlier_checkpoints(output_dir: Path) -> list[Path]:
    """List the folders in which `set_aside_checkpoints` put checkpoints.

    Args:
        output_dir: the run's folder.
    """
    return sorted(output_dir.glob(f"{_EARLIER}*"))


def clear_leftovers(output_dir: Path) -> list[Path]:
    """Tidy up after a run that was killed.

    Args:
        output_dir: its folder, in which no other run is active.

    Returns:
        Checkpoints that were complete but for their name, and have it now.
    """
    finished = []
    for staging in sorted(output_dir.glob(f"{_STAGING}{PREFIX_CHECKPOINT_DIR}-*")):
        target = output_dir / staging.name.removeprefix(_STAGING)
        if not target.exists() and not find_damage(staging):
            os.rename(staging, target)
            finished.append(target)
    for leftover in (*output_dir.glob(f"{_STAGING}*"), *output_dir.glob(f"{_TRASH}*")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return finished


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk.

    Args:
        path: the file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder so that no part of it is ever found under its name."""
    if not folder.exists():
        return
    trash = folder.with_name(_TRASH + folder.name)
    if trash.exists():
        shutil.rmtree(trash)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def _is_refusal(error: BaseException) -> bool:
    """Tell whether the system refused a write; libraries in Rust say so in exceptions of their own."""
    # The tokenizers library raises a bare `Exception`, with the system's words and "(os error 28)".
    return isinstance(error, OSError | SafetensorError) or (type(error) is Exception and "os error" in str(error))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror} ({error.filename})"
    return str(error)
