"""From a name to the frozen base model and its tokenizer: located, checked and loaded (design §3, §6).

A name is a Hub repository, a local folder, a `.gguf` file or `offline` (`embedded`). `auto` is a choice that comes
first (`choice`). Code that comes with a model is never run.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
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
from transformers.utils.peft_utils import find_adapter_config_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from attention_rl_trainer.errors import BaseModelError
from attention_rl_trainer.hub import (
    HubUnreachableError,
    expect_writable_cache,
    hub_obstacle,
    without_credentials,
)
from attention_rl_trainer.models.embedded import (
    embedded_model_path,
    embedded_revision,
    expect_gguf_reader,
    is_embedded_folder,
)

logger = logging.getLogger(__name__)

OFFLINE = "offline"
AUTO = "auto"
LLAMA = "meta-llama/Llama-3.2-3B"
GPT2 = "openai-community/gpt2"

_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Where transformers before 5.23 keeps it too; it is not written into a configuration's file.
_COMMIT_FIELD = "_commit_hash"
_WAY_OUT = f"`--model_name_or_path {OFFLINE}` uses the embedded model, which needs no network"


@dataclass(frozen=True)
class BaseModelChoice:
    """A base model that `load_base_model` and `load_tokenizer` can load."""

    name_or_path: str
    """Hub repository, local folder or `.gguf` file; never `auto` or `offline` where `choose_base_model` gave it."""
    dtype: torch.dtype
    """Precision of the frozen weights."""
    reason: str
    """Which model it is and why, in one sentence for the log."""


@dataclass(frozen=True)
class ModelName:
    """What a base model is called."""

    name: str
    """Hub repository, `offline`, local folder or `.gguf` file; "" for a model that was not loaded."""
    revision: str | None
    """Commit of a Hub repository, `embedded_revision` of the embedded model; ``None`` where there is or is known none.
    """

    @property
    def is_portable(self) -> bool:
        """Whether it means the same on every machine."""
        return bool(self.name) and (self.name == OFFLINE or not _is_local(self.name))


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


def native_dtype(device: torch.device) -> torch.dtype:
    """The precision in which a device multiplies matrices fast without emulating it.

    bfloat16 on CUDA GPUs of capability 8.0 or more and on CPUs with AMX or AVX512_BF16, else float32. Measured on two
    cores of an AMD EPYC with AVX512_BF16 and no AMX, SmolLM2-135M, 16 rows: 0.47 s against 0.98 s for 32 tokens each,
    0.089 s against 0.150 s for one.
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


def default_device() -> torch.device:
    """The first CUDA GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def how_to_get_access(repo_id: str) -> str:
    """What a user does about a gated model."""
    place = f"{without_credentials(constants.ENDPOINT)}/{repo_id}"
    return f"accept the licence on {place} and run `hf auth login`, or use another model"


def _locate(name_or_path: str, revision: str | None) -> _Source:
    if not name_or_path:
        raise BaseModelError(f"The name of the base model is empty, so that there is nothing to load; {_WAY_OUT}.")
    if name_or_path == AUTO:
        raise ValueError(f"{AUTO!r} is not a model but a choice: pass it to choose_base_model() first.")
    if name_or_path == OFFLINE:
        return _Source(OFFLINE, str(embedded_model_path()))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _Source(name_or_path, str(path))
    if path.is_file():
        return _locate_file(path)
    if is_embedded_folder(name_or_path):
        # An adapter that was trained elsewhere may name it so.
        return _Source(OFFLINE, str(embedded_model_path()))
    if _looks_like_a_path(name_or_path):
        raise BaseModelError(f"There is no folder or file {name_or_path}. Check the path; {_WAY_OUT}.")
    return _locate_on_hub(name_or_path, revision)


def _is_local(name: str) -> bool:
    return Path(name).expanduser().exists() or _looks_like_a_path(name)


def name_anywhere(model: PreTrainedModel) -> ModelName:
    """Find the name of a loaded base model that means the same on other machines, where it has one.

    The embedded model was loaded from a folder of a cache, as was, maybe, one of the Hub.
    """
    name = str(model.config.name_or_path or "")
    if is_embedded_folder(name):
        return ModelName(OFFLINE, embedded_revision())
    if snapshot := _SNAPSHOT.search(name):
        return ModelName(snapshot[1].replace("--", "/"), snapshot[2])
    if name and _is_local(name):
        return ModelName(str(Path(name).expanduser().absolute()), None)
    return ModelName(name, vars(model.config).get(_COMMIT_FIELD))


def commit_of(revision: str | None) -> str | None:
    """Return a revision that is a commit of the Hub; ``None`` for others."""
    return revision if revision is not None and _COMMIT.fullmatch(revision) else None


def _cached_commit(source: _Source) -> str | None:
    """The commit of a Hub model that was just loaded."""
    if source.location != source.name or _is_local(source.name):
        return None
    found = try_to_load_from_cache(source.name, "config.json", revision=source.revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _locate_file(path: Path) -> _Source:
    if path.suffix.lower() != ".gguf":
        raise BaseModelError(f"{path} is a file; expected the folder that holds the model, or a .gguf file.")
    expect_gguf_reader(path)
    return _Source(str(path), str(path.parent), gguf_file=path.name)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or name.endswith((".gguf", "/"))


def _locate_on_hub(repo_id: str, revision: str | None) -> _Source:
    try:
        is_cached = isinstance(try_to_load_from_cache(repo_id, "config.json", revision=revision), str)
    except HFValidationError as error:
        raise BaseModelError(f"{repo_id!r} is neither a folder nor the name of a Hub model: {error}") from error
    obstacle = hub_obstacle()
    if obstacle is not None and not is_cached:
        raise HubUnreachableError(
            f"{repo_id} is neither a folder nor in the local cache, and the Hub cannot be reached: {obstacle}. "
            f"{_WAY_OUT}."
        )
    if not is_cached:
        expect_writable_cache(constants.HF_HUB_CACHE, "HF_HUB_CACHE")
    return _Source(repo_id, repo_id, revision=revision, local_files_only=obstacle is not None)


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a base model, with the fast backend that encoding at the level of ids needs.

    Args:
        name_or_path: `offline`, a Hub repository, a local folder or a `.gguf` file.
        revision: Branch, tag or commit of a Hub repository; the others have none.

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
            "tokenizer in the model's folder with `tokenizer.save_pretrained(folder)`."
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
    """Load the causal language model that training starts from, in evaluation mode.

    Args:
        choice_or_name: What `choose_base_model` gave, or `offline`, a Hub repository, a local folder, a `.gguf` file.
        dtype: Precision of the weights; by default that of the choice, else the device's native one.
        device: Where the weights go; by default they stay on the CPU, from where a Trainer moves them.
        revision: As in `load_tokenizer`.
        attn_implementation: As in transformers: `"sdpa"`, `"eager"`, `"flash_attention_2"`.
        quantization_config: Quantizes while loading. A `.gguf` file is always dequantized and takes none.

    Raises:
        ValueError: The name is `auto`, or a `.gguf` file is to be quantized.
        BaseModelError: The model does not exist, is gated, is not a causal language model of transformers, or its
            weights are incomplete.
        HubUnreachableError: The model would have to come from the Hub, which cannot be reached.
    """
    if isinstance(choice_or_name, BaseModelChoice):
        name, dtype = choice_or_name.name_or_path, dtype or choice_or_name.dtype
    else:
        name, dtype = choice_or_name, dtype or native_dtype(device or default_device())
    source = _locate(name, revision)
    if source.gguf_file is not None:
        if quantization_config is not None:
            raise ValueError(f"{source.name} is a GGUF file, which is dequantized; quantization_config must be None.")
        quantization_config = GgufConfig(dequantize=True)
    _check_architecture(source)
    # transformers looks for an adapter beside the model, and asks the Hub for it unless these arguments say otherwise.
    adapter_arguments = {"local_files_only": source.local_files_only}
    arguments = source.arguments() | {"dtype": dtype, "adapter_kwargs": adapter_arguments}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    if device is not None:
        arguments["device_map"] = {"": device}
    model = _load_weights(source, arguments)
    if source.gguf_file is not None:
        # transformers names the folder, which has no model for whoever loads an adapter on this one.
        model.name_or_path = model.config.name_or_path = source.name
    if (commit := _cached_commit(source)) is not None:
        vars(model.config)[_COMMIT_FIELD] = commit
    return model


def _check_architecture(source: _Source) -> None:
    with _explained(source, "adapter"):
        # transformers would put it on the model.
        adapter_config = find_adapter_config_file(
            source.location, revision=source.revision, local_files_only=source.local_files_only
        )
    if adapter_config is not None:
        raise BaseModelError(
            f"{source.name} holds an adapter, not a base model: name the model that it was trained on "
            f"({_base_of_adapter(Path(adapter_config))})."
        )
    with _explained(source, "configuration"):
        config = AutoConfig.from_pretrained(source.location, **source.arguments())
    problem = why_not_causal(config)
    if problem is not None:
        raise BaseModelError(
            f"{source.name} cannot be the base model: {config.model_type} is {problem}. Use a decoder-only model such "
            f"as {GPT2} or {LLAMA}; {_WAY_OUT}."
        )


def _base_of_adapter(adapter_config: Path) -> str:
    try:
        stored = json.loads(adapter_config.read_text(encoding="utf-8"))
    except ValueError:
        stored = None
    name = stored.get("base_model_name_or_path") if isinstance(stored, dict) else None
    return str(name or f"{adapter_config.name} does not say which")


def why_not_causal(config: PreTrainedConfig) -> str | None:
    """Say what the models of a configuration are, where they are not causal language models."""
    if config.is_encoder_decoder:
        return "an encoder-decoder"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "not a causal language model of transformers"
    # BERT and its kin have a causal head in transformers, but attend to both sides unless they are made decoders.
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
        return f"{name} is gated: {how_to_get_access(name)}; {_WAY_OUT}."
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
