"""``attention-rl`` as users type it, on a tiny model that was saved and trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import article_texts, byte_level_tokenizer, save_tiny_llama, tiny_trainer, write_rows

from attention_rl_trainer.cli import main, trained_options


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, a trained adapter, and articles that were not trained on."""
    folder = tmp_path_factory.mktemp("run")
    texts = article_texts(20)
    base = save_tiny_llama(folder / "base", texts)
    tokenizer = byte_level_tokenizer(texts)
    trainer = tiny_trainer(folder, texts, tokenizer, model=base, filter_threshold=float("-inf"), warmup_episodes=1)
    trainer.train()
    trainer.save_model()
    rows = [{"title": f"held out {n}", "text": text} for n, text in enumerate(article_texts(8, seed=9))]
    write_rows(folder / "held_out.jsonl", rows)
    return folder


def evaluate(run: Path, output: Path, *flags: str) -> int:
    articles = str(run / "held_out.jsonl")
    return main(
        ["evaluate", str(run / "run"), "--dataset", articles, "--output_dir", str(output), "--use_cpu", "true", *flags]
    )


def test_evaluate_reproduces_its_tables(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run, tmp_path / "a", "--episodes", "6") == 0
    printed = capsys.readouterr().out
    assert evaluate(run, tmp_path / "b", "--episodes", "6") == 0
    tables = [(tmp_path / name / "evaluation" / "eval" / "evaluation.json").read_bytes() for name in "ab"]
    assert tables[0] == tables[1]
    stored = json.loads(tables[0])
    assert stored["orders"]["learned"]["num_values"] == 6
    assert f"eval_query_over_empty: {stored['policy_less']['empty query']['mean']:.4f}" in printed
    assert "### Orders, scored by the base model behind empty queries" in printed


def test_options_come_from_the_adapter_and_flags_change_them(run: Path, tmp_path: Path) -> None:
    options = trained_options(run / "run")
    assert (options["num_kv_pairs"], options["tokens_per_query"], options["seed"]) == (8, 4, 42)
    assert options["filter_threshold"] == float("-inf")
    assert "output_dir" not in options
    flags = ["--seed", "3", "--num_steps", "2", "--skip_articles", "5", "--batch_size", "2"]
    assert evaluate(run, tmp_path, *flags) == 0
    stored = json.loads((tmp_path / "evaluation" / "eval" / "evaluation.json").read_text(encoding="utf-8"))
    assert stored["settings"]["T"] == 2
    assert stored["settings"]["seed"] % 2**32 == 3
    assert stored["orders"]["learned"]["num_values"] == 3


def test_an_evaluation_leaves_the_run_as_it_is(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "run").rglob("*") if path.is_file()}
    assert evaluate(run, tmp_path, "--episodes", "2") == 0
    assert {path: path.read_bytes() for path in (run / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("contents", [None, "{"])
def test_a_folder_without_readable_options_is_refused(
    contents: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if contents is not None:
        (tmp_path / "attention_rl_config.json").write_text(contents, encoding="utf-8")
    assert main(["evaluate", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("attention-rl evaluate: ")
    assert ("holds no attention_rl_config.json" if contents is None else "is not valid JSON") in message


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["unknown"], 2)])
def test_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    assert "evaluate" in capsys.readouterr().out
