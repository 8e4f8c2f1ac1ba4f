"""A folder or a file that is there as a whole or not at all.

What is written goes into a neighbour first, is synced, and gets its name in one rename. A process killed at any
moment leaves leftovers that `clear_leftovers` removes, or finishes where only the rename was missing.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from attention_rl_trainer.durability.manifest import find_damage, listed_files, write_manifest

# A push to the Hub leaves out what begins with an underscore.
_STAGING = "_staging-"
_TRASH = "_trash-"
_EARLIER = "_earlier-"
_MOVING = "moving.json"
# The Trainer's own, which takes seconds to be imported.
CHECKPOINT_PREFIX = "checkpoint"
_CHECKPOINT = re.compile(rf"{CHECKPOINT_PREFIX}-(\d+)")


class StagingError(OSError):
    """Something could not be written; what was there before still is."""


def is_checkpoint_name(name: str) -> bool:
    """Tell whether a folder of this name is a checkpoint."""
    return _CHECKPOINT.fullmatch(name) is not None


def checkpoint_step(checkpoint: Path) -> int:
    """Read the step off a checkpoint's name.

    Raises:
        ValueError: it is not ``checkpoint-<step>``.
    """
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named {CHECKPOINT_PREFIX}-<step>")
    return int(match[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints in a run's folder, by step; nothing where there is no folder."""
    found = [path for path in output_dir.glob(f"{CHECKPOINT_PREFIX}-*") if is_checkpoint_name(path.name)]
    return sorted((path for path in found if path.is_dir()), key=checkpoint_step)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Write a folder of files, with a manifest, that appears under its name in one step, or replaces the one there.

    Yields:
        The folder to write into.

    Raises:
        StagingError: the system refused a write; names the path and the reason. The target is as it was.
    """
    staging = target.with_name(_STAGING + target.name)
    is_complete = False
    try:
        _remove(staging)
        staging.mkdir(parents=True)
        yield staging
        write_manifest(staging)
        for path in staging.rglob("*"):
            sync(path)
        sync(staging)
        is_complete = True
        _publish(staging, target)
    except BaseException as error:
        # Between the end of the old folder and the name of the new one, the new one is all there is.
        if not is_complete or target.exists():
            shutil.rmtree(staging, ignore_errors=True)
        if not _is_refusal(error):
            raise
        raise StagingError(
            f"{target} could not be written: {_reason(error)}. Nothing that was there before was touched; make room "
            "or set the permissions, and resume from the checkpoint before it"
        ) from error


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Write files into a folder that may hold others; each appears in one step, and one that is the same stays.

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


def rotate_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond a limit, each in one step; ``None`` keeps all."""
    if limit is not None and limit > 0:
        for checkpoint in list_checkpoints(output_dir)[:-limit]:
            _remove(checkpoint)


def set_aside_run(output_dir: Path, records: Sequence[Path], after_step: int = -1) -> Path | None:
    """Keep what a run will not resume from: none of it is lost, and none is taken for the run's own.

    A process killed during it leaves a list of what was to be moved, with which `clear_leftovers` ends the move.

    Args:
        output_dir: the run's folder.
        records: files and folders of the run; files are copied where checkpoints up to ``after_step`` stay, all is
            moved where none does.
        after_step: checkpoints of later steps are moved; -1 for all.

    Returns:
        The folder in which it all is now, or ``None`` if there was nothing.
    """
    moved = [path for path in list_checkpoints(output_dir) if checkpoint_step(path) > after_step]
    records = [path for path in records if path.exists()]
    begins_anew = after_step < 0
    if not moved and not (begins_anew and records):
        return None
    folders = (output_dir / f"{_EARLIER}{number}" for number in range(1, 10_000))
    aside = next(folder for folder in folders if not folder.exists())
    aside.mkdir()
    if begins_anew:
        moved += records
    else:
        for record in filter(Path.is_file, records):
            shutil.copy2(record, aside / record.name)
    names = [path.name for path in moved]
    # Complete before its name says so; from here on the move will be finished, whatever happens.
    unfinished = aside / f"{_MOVING}.new"
    unfinished.write_text(json.dumps(names), encoding="utf-8")
    sync(unfinished)
    os.rename(unfinished, aside / _MOVING)
    _end_move(aside)
    return aside


def _end_move(aside: Path) -> None:
    listed = aside / _MOVING
    names = json.loads(listed.read_text(encoding="utf-8"))
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    # A run's folder may come from somebody else.
    if not is_list or any(name in ("", "..") or Path(name).name != name for name in names):
        raise StagingError(
            f"{listed} holds {names!r}, expected a list of names in {aside.parent}; nothing was moved. Remove the list"
        )
    for name in names:
        if os.path.lexists(aside.parent / name):
            os.rename(aside.parent / name, aside / name)
    listed.unlink()


def adopt_checkpoint(checkpoint: Path, output_dir: Path) -> Path:
    """Copy a complete checkpoint of another folder into a run's own, so that the run can resume from it again.

    Returns:
        The copy.
    """
    target = output_dir / checkpoint.name
    with staged_folder(target) as folder:
        for name in listed_files(checkpoint):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # The content alone: the other folder may be protected.
            shutil.copyfile(checkpoint / name, folder / name)
    return target


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, if there is one, so that the copy appears in one step."""
    if source.is_file():
        staged = target.with_name(_STAGING + target.name)
        shutil.copy2(source, staged)
        os.replace(staged, target)


def earlier_checkpoints(output_dir: Path) -> list[Path]:
    """List the folders in which `set_aside_run` put what was there."""
    return sorted(output_dir.glob(f"{_EARLIER}*"))


def clear_leftovers(output_dir: Path) -> list[Path]:
    """Tidy up after a run that was killed, in whose folder no other run is active.

    Returns:
        Checkpoints that were complete but for their name, and have it now.
    """
    for moving in output_dir.glob(f"{_EARLIER}*/{_MOVING}"):
        _end_move(moving.parent)
    finished = []
    for staging in sorted(output_dir.glob(f"{_STAGING}{CHECKPOINT_PREFIX}-*")):
        target = output_dir / staging.name.removeprefix(_STAGING)
        if not target.exists() and not find_damage(staging):
            os.rename(staging, target)
            finished.append(target)
    for leftover in (*output_dir.glob(f"{_STAGING}*"), *output_dir.glob(f"{_TRASH}*")):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return finished


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder so that no part of it is ever found under its name; of a link, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(errno.EEXIST, "there is a file where a folder is to be", str(folder))
    trash = folder.with_name(_TRASH + folder.name)
    if trash.exists():
        shutil.rmtree(trash)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def _is_refusal(error: BaseException) -> bool:
    # Libraries in Rust say so in exceptions of their own.
    # The tokenizers library raises a bare `Exception`, with the system's words and "(os error 28)".
    return isinstance(error, OSError | SafetensorError) or (type(error) is Exception and "os error" in str(error))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror} ({error.filename})"
    return str(error)
