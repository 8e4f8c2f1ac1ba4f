"""Tiny models and tokenizers, built in process. The test options in setup.cfg refuse the network."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from finished_run import OPTIONS
from processes import Job, build_trainer
from tiny import article_texts, byte_level_tokenizer, tiny_gpt2, tiny_llama
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: the content of a file may hold the time at which it was made."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Give back the threads that a run took: what follows would wait for one another on them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Thirty articles of made-up prose, long enough for every test."""
    return article_texts(30)


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special and one added token."""
    return byte_level_tokenizer(texts)


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny Llama (4 query heads, 2 groups) or GPT-2, in float32."""
    return tiny_llama() if request.param == "llama" else tiny_gpt2()


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    job = Job(folder, OPTIONS)
    trainer = build_trainer(job)
    trainer.train()
    trainer.save_model()
    return folder


def pytest_collection_finish() -> None:
    """Take what was imported and collected out of the garbage collector's sight.

    Every run of a Trainer collects garbage, which takes a second where it has to look at all of that.
    """
    gc.collect()
    gc.freeze()
