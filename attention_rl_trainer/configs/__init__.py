"""The options files of a command: those that come with the package, by name, and any other by its path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent


def shipped_configs() -> list[str]:
    """List the names of the options files that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_config(name_or_path: str) -> Path:
    """Find an options file.

    Args:
        name_or_path: a path, or the name of one that comes with the package, such as ``"demo"``.

    Raises:
        ValueError: there is neither; lists the names.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if name_or_path in shipped_configs():
        return _FOLDER / f"{name_or_path}.yaml"
    raise ValueError(
        f"--config {name_or_path}: there is no such file, and no options file of that name comes with the package; "
        f"give a path to a YAML file, or one of {', '.join(shipped_configs())}"
    )


def with_config_path(flags: Sequence[str]) -> list[str]:
    """Replace the name in ``--config NAME`` or ``--config=NAME`` by its path, as TRL's parser takes it.

    Raises:
        ValueError: there is no such file, or nothing follows ``--config``.
    """
    resolved: list[str] = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if flag == "--config":
            if not rest:
                raise ValueError("--config must be followed by a path or a name")
            resolved += ["--config", str(find_config(rest.pop(0)))]
        elif flag.startswith("--config="):
            resolved += ["--config", str(find_config(flag.removeprefix("--config=")))]
        else:
            resolved.append(flag)
    return resolved
