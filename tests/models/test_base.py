"""Locating, checking and loading base models and their tokenizers, without a network and without a GPU."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from model_builders import CPU, TEXTS, put_in_hub_cache, tiny_llama_config
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BitsAndBytesConfig,
    CLIPTextConfig,
    GgufConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from attention_rl_trainer.errors import BaseModelError
from attention_rl_trainer.hub import HubUnreachableError
from attention_rl_trainer.models import base as base_models
from attention_rl_trainer.models.base import BaseModelChoice, load_base_model, load_tokenizer, native_dtype

pytestmark = pytest.mark.usefixtures("hub_cache")


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


def test_loading_auto_is_refused_since_it_is_a_choice() -> None:
    with pytest.raises(ValueError, match=r"pass it to choose_base_model"):
        load_tokenizer("auto")
    with pytest.raises(ValueError, match=r"pass it to choose_base_model"):
        load_base_model("auto")


def test_a_missing_gguf_package_names_the_extra(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match=r"needs the package gguf.*attention-rl-trainer\[offline\]"):
        load_tokenizer(str(gguf_file))


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


LOADERS = pytest.mark.parametrize("load", [load_tokenizer, load_base_model])


@LOADERS
@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/no-such-model", "a/b/c", "some\\model", "x.gguf"])
def test_a_missing_folder_is_named(name: str, load: Callable[[str], object]) -> None:
    with pytest.raises(BaseModelError, match=rf"There is no folder or file {re.escape(name)}.*--model_name_or_path"):
        load(name)


@LOADERS
def test_a_file_that_is_not_a_gguf_is_refused(load: Callable[[str], object], llama_folder: Path) -> None:
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
