"""A run's way to a Hub on loopback and back: what arrives is the allow-list, and what is pulled does as the run did."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finished_run import ALWAYS
from huggingface_hub import ModelCard, snapshot_download
from loopback_hub import TOKEN, LoopbackHub
from peft import PeftModel
from tiny import OPTIONS, article_texts, save_tiny_llama, tiny_llama, tiny_trainer, write_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from attention_rl_trainer.durability.pushes import HubPushError
from attention_rl_trainer.durability.staging import list_checkpoints
from attention_rl_trainer.ordering import AttentionGuidedOrderer
from attention_rl_trainer.records.ledger import read_ledger
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

pytestmark = [
    pytest.mark.enable_socket,
    # Upstream: a large file is sent by an argument that httpx renames.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

PASSAGES = ["the river flows from a mountain lake", "kings once met bishops judges farmers", "letters about weather"]
PUBLISHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "attention_rl_config.json",
    "evaluation/eval/figures.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def finished_trainer(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> AttentionGuidedRLTrainer:
    """A trainer whose run has ended, on a base model in a folder; and what is in its folder beside the adapter."""
    folder = tmp_path_factory.mktemp("pushed")
    trainer = tiny_trainer(
        folder,
        texts,
        tokenizer,
        save_tiny_llama(folder / "base", texts),
        {"eval_dataset": [{"text": text} for text in article_texts(4, seed=9)]},
        num_episodes=16,
        warmup_episodes=1,
        filter_threshold=ALWAYS,
        eval_episodes=4,
        eval_order_episodes=2,
        hub_model_id="someone/adapter",
        hub_token=TOKEN,
    )
    trainer.train()
    trainer.evaluate()
    for name in ("training_args.bin", "logs/events.out", "notes.txt", "report/summary.md", "pytorch_model.bin"):
        path = folder / "run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not for others")
    return trainer


@pytest.fixture
def trainer(finished_trainer: AttentionGuidedRLTrainer, monkeypatch: pytest.MonkeyPatch) -> AttentionGuidedRLTrainer:
    """It, as if nothing had been pushed or saved yet."""
    monkeypatch.setattr(finished_trainer, "hub_model_id", None)
    monkeypatch.setattr(finished_trainer, "push_in_progress", None, raising=False)
    for name in PUBLISHED - {"evaluation/eval/figures.json"}:
        (finished_trainer.output_dir / name).unlink(missing_ok=True)
    return finished_trainer


def on_disk(trainer: AttentionGuidedRLTrainer, names: set[str]) -> dict[str, bytes]:
    return {name: (trainer.output_dir / name).read_bytes() for name in names}


def test_what_arrives_is_the_allow_list(hub: LoopbackHub, trainer: AttentionGuidedRLTrainer) -> None:
    trainer.push_to_hub()
    files = hub.files("someone/adapter")
    assert files == on_disk(trainer, PUBLISHED)
    texts = [value for row in read_ledger(trainer.output_dir / "trajectories.jsonl") for value in row.values]
    evaluation = json.loads((trainer.output_dir / "evaluation" / "eval" / "evaluation.json").read_text())
    texts += [step["value"] for example in evaluation["examples"] for step in example["steps"]]
    texts = [text for text in texts if len(text) > 15]
    assert len(texts) > 20
    for name, content in files.items():
        assert TOKEN.encode() not in content, name
        assert not [text for text in texts if text.encode() in content], name
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model is None
    assert str(trainer.output_dir.parent) not in card.content
    assert 'from_pretrained("someone/adapter")' in card.text
    assert "## Evaluation: eval" in card.text


def test_the_ledger_and_the_report_go_where_they_are_asked_for(
    hub: LoopbackHub, trainer: AttentionGuidedRLTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.args, "hub_upload_records", True)
    monkeypatch.setattr(trainer.args, "hub_private_repo", True)
    trainer.push_to_hub(blocking=False).result(timeout=30)
    assert set(hub.files("someone/adapter")) == PUBLISHED | {"trajectories.jsonl", "report/summary.md"}
    assert hub.repositories["someone/adapter"].is_private


def test_what_is_pulled_computes_and_orders_as_the_run_did(hub: LoopbackHub, trainer: AttentionGuidedRLTrainer) -> None:
    trainer.push_to_hub()
    base = trainer.output_dir.parent / "base"
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), snapshot_download("someone/adapter")
    )
    ids = torch.randint(1, 380, (2, 9))
    with torch.no_grad():
        assert torch.equal(adapted.eval()(ids).logits, trainer.policy.model.eval()(ids).logits)
        assert not torch.equal(adapted(ids).logits, tiny_llama()(ids).logits)
    options = {"model": str(base), "device": "cpu", "dtype": "float32"}
    pulled = AttentionGuidedOrderer.from_pretrained("someone/adapter", **options).order(PASSAGES)
    own = AttentionGuidedOrderer.from_pretrained(trainer.output_dir, **options).order(PASSAGES)
    # With what was measured of its orders.
    assert pulled.to_dict() == own.to_dict()
    assert set(pulled.trust.order_gains) == {"eval"}


@pytest.mark.parametrize("what", [401, 504, "reset"])
def test_a_push_that_fails_leaves_a_model_that_can_be_pushed(
    what: int | str, hub: LoopbackHub, trainer: AttentionGuidedRLTrainer
) -> None:
    hub.fail("POST", "/commit/", what)
    with pytest.raises(
        HubPushError, match=r"push it later with: hf upload someone/adapter .*run \. --include README\.md"
    ):
        trainer.push_to_hub()
    before = on_disk(trainer, PUBLISHED)
    assert hub.files("someone/adapter") == {}
    hub.faults.clear()
    trainer.push_to_hub()
    assert hub.files("someone/adapter") == before


def test_saving_goes_on_where_pushing_fails(
    hub: LoopbackHub,
    trainer: AttentionGuidedRLTrainer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An evaluation may follow, and a push at the end of all."""
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    hub.fail("POST", "/repos/create", 500)
    with caplog.at_level(logging.WARNING, logger="attention_rl_trainer"):
        trainer.save_model()
    assert "HTTP status 500" in caplog.text
    assert "push it later with: hf upload someone/adapter" in caplog.text
    assert all(on_disk(trainer, PUBLISHED).values())
    hub.faults.clear()
    trainer.save_model()
    assert [commit.message for commit in hub.repositories["someone/adapter"].commits] == ["Model save"]


def test_what_is_said_to_a_push_is_in_the_cards_head(
    hub: LoopbackHub, trainer: AttentionGuidedRLTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "card_metadata", {})
    trainer.push_to_hub(license="mit", language="en", tags="ordering", model_name="Reader", dataset="someone/articles")
    card = ModelCard(hub.files("someone/adapter")["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["someone/articles"])
    assert {"ordering", "attention-guided-rl"} <= set(card.data.tags)
    assert "# Reader\n" in card.text
    with pytest.raises(ValueError, match=r"leave out tasks, or write it into README\.md yourself"):
        trainer.create_model_card(tasks="ranking")


@pytest.mark.parametrize(
    ("fault", "said"), [(401, "hf auth login"), ("html", "not a Hub"), (None, "cannot be reached")]
)
def test_a_hub_that_is_not_there_is_said_before_training(
    fault: int | str | None,
    said: str,
    hub: LoopbackHub,
    tmp_path: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama()
    before = [name for name, _ in model.named_modules()]
    if fault is None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        hub.fail("POST", "/repos/create", fault)
    with pytest.raises(HubPushError, match=f"{said}.*hf upload someone/new .*adapter_model.safetensors"):
        tiny_trainer(tmp_path, texts, tokenizer, model, push_to_hub=True, hub_model_id="someone/new", hub_token=TOKEN)
    assert [name for name, _ in model.named_modules()] == before


def test_a_run_goes_on_where_its_pushes_fail(
    hub: LoopbackHub,
    tmp_path: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.fail("POST", "/commit/", 409, times=1)
    options = {"push_to_hub": True, "hub_model_id": "adapter", "hub_strategy": "checkpoint", "hub_always_push": True}
    trainer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=16, save_episodes=8, hub_token=TOKEN, **options)
    with caplog.at_level(logging.WARNING, logger="attention_rl_trainer"):
        trainer.train()
    assert "step 1' was not pushed to someone/adapter: HTTP status 409" in caplog.text
    assert len(list_checkpoints(trainer.output_dir)) == 2
    files = hub.files("someone/adapter")
    assert set(files) >= {"README.md", "last-checkpoint/optimizer.safetensors", "last-checkpoint/manifest.json"}
    assert not [name for name in files if "trajectories" in name or name.startswith("checkpoint")]


@pytest.mark.slow
def test_the_command_trains_pushes_and_orders_what_it_pulls(hub: LoopbackHub, tmp_path: Path, texts: list[str]) -> None:
    """Through the real commands, with the real variable."""
    save_tiny_llama(tmp_path / "base", texts)
    write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    (tmp_path / "options.yaml").write_text(OPTIONS + f"hub_token: {TOKEN}\nhub_model_id: adapter\n")
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_CACHE"] = str(tmp_path / "cache")

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from attention_rl_trainer.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *flags]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)

    training = ["train", "--config", "options.yaml", "--output_dir", "run", "--model_name_or_path", "base"]
    data = [
        "--dataset",
        "rows.jsonl",
        "--dataset_train_split",
        "train[:20]",
        "--num_episodes",
        "16",
        "--report_to",
        "none",
    ]
    done = run(*training, *data, "--push_to_hub", "true")
    assert done.returncode == 0, done.stderr
    files = hub.files("someone/adapter")
    assert "learning_curve.png" in files
    assert not [
        name for name in files if name.endswith((".jsonl", ".bin")) or name.startswith(("checkpoint", "report"))
    ]
    hub.fail("POST", "/commit/", 504)
    done = run(*training, *data, "--push_to_hub", "true", "--resume", "true", "--num_episodes", "32")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("attention-rl train: run was not pushed to someone/adapter")
    assert "push it later with: hf upload someone/adapter run . --include README.md" in last
    assert json.loads((tmp_path / "run" / "attention_rl_config.json").read_text())["num_episodes"] == 32
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    done = run("order", "passages.jsonl", "--adapter", "someone/adapter", "--model_name_or_path", "base", "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(done.stdout)["order"]) == [0, 1, 2]
