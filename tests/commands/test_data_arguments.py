"""The data arguments of the commands: refused before a model is looked for."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from tiny import article_texts, write_rows

from attention_rl_trainer.cli import main

# It does not exist, and is asked for after the articles.
MODEL = ["--model_name_or_path", "./nowhere"]
NO_NAME = r"A source of articles is named by 'offline', a file or folder, or a data set of the Hub"


@pytest.fixture
def articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Articles in a file whose name looks like a pattern, beside other texts in the current folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(" ".join(article_texts(1)))
    write_rows(tmp_path / "wiki[1].jsonl", [{"text": text} for text in article_texts(3)])
    return "wiki[1].jsonl"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", ""], NO_NAME),
        (["--dataset", " "], NO_NAME),
        (["--dataset_name", "ARTICLES", "--dataset_eval_name", ""], NO_NAME),
        (["--dataset_name", "ARTICLES", "--dataset_train_split", ".."], "A split is a name such as 'train'"),
        (["--dataset_name", "ARTICLES", "--dataset_config", ""], "has no configurations; got config_name=''"),
        (["--dataset_name", "ARTICLES", "--dataset_text_column", ""], "no column ''; its columns are 'text'"),
    ],
)
def test_train_refuses(
    flags: list[str], message: str, articles: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [articles if flag == "ARTICLES" else flag for flag in flags]
    assert main(["train", *given, *MODEL, "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--dataset", ""], NO_NAME), (["--dataset", ".", "--dataset_split", ""], "A split is a name such as")],
)
def test_evaluate_refuses(
    flags: list[str], message: str, articles: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "attention_rl_config.json").write_text(json.dumps({"num_kv_pairs": 8}))
    assert main(["evaluate", str(tmp_path), *flags, *MODEL, "--use_cpu", "true"]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_looks_like_a_pattern_is_read(
    articles: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "run")
    assert main(["train", "--dataset_name", articles, *MODEL, "--output_dir", output, "--use_cpu", "true"]) == 2
    assert "There is no folder or file ./nowhere" in capsys.readouterr().err


def test_evaluate_takes_the_names_of_training_and_other_columns(
    articles: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "attention_rl_config.json").write_text(json.dumps({"dataset_text_column": "body"}))
    flags = [str(tmp_path), "--dataset_name", articles, *MODEL, "--use_cpu", "true"]
    assert main(["evaluate", *flags]) == 2
    assert "no column 'body'" in capsys.readouterr().err
    # The articles are read, and the adapter is missed.
    assert main(["evaluate", *flags, "--dataset_text_column", "text"]) == 2
    assert "holds no adapter" in capsys.readouterr().err
