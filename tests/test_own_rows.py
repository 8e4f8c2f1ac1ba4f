"""The README's command for rows of one's own, and the script for games: run as they are written, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import train_twenty_questions
from tiny import article_texts, save_tiny_llama, write_rows

from attention_rl_trainer.cli import main
from attention_rl_trainer.configs import find_config
from attention_rl_trainer.records.ledger import read_ledger

REPOSITORY = Path(__file__).parent.parent
TOPICS, ROWS = 10, 8
# The whole command takes a quarter of an hour on the embedded model.
SMALL = (
    *("--model_name_or_path", "model", "--probe_heads", "4", "--calibration_memories", "8", "--batch-size", "8"),
    *("--warm_start_episodes", "8", "--episodes", "8", "--eval_episodes", "4"),
)


def section() -> str:
    (found,) = re.findall(r"^## Your own rows\n(.*?)^## ", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    return str(found)


def command() -> list[str]:
    (found,) = re.findall(r"```bash\n(.*?)```", section(), re.S)
    program, *words = shlex.split(found.replace("\\\n", " "))
    assert program == "attention-rl"
    return words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, and with rows whose columns are those of the README's example."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model", article_texts(5))
    (example,) = re.findall(r"```json\n(.*?)```", section(), re.S)
    question, answer, topic = json.loads(example)
    rows = [
        {question: f"Which {number}?", answer: f"The {number + group} of old towns.", topic: f"topic {group}"}
        for group in range(TOPICS)
        for number in range(ROWS)
    ]
    write_rows(tmp_path / "my.jsonl", rows)
    return tmp_path


def test_the_readmes_command_trains_on_rows_and_evaluates_on_other_topics(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(), *SMALL]) == 0
    rows = read_ledger(folder / "out" / "my" / "trajectories.jsonl")
    assert len(rows) == 8
    assert {row.title for row in rows} <= {f"topic {group}" for group in range(8)}
    assert {len(row.order) for row in rows} == {4}
    assert all(key.startswith(" Which ") for row in rows for key in row.keys)
    assert "query_over_empty" in capsys.readouterr().out
    evaluated = (folder / "out" / "my" / "evaluation" / "eval" / "evaluation.json").read_text()
    assert json.loads(evaluated)
    options = json.loads((folder / "out" / "my" / "attention_rl_config.json").read_text())
    assert (options["dataset_key_column"], options["dataset_group_column"]) == ("question", "topic")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Why?", "answer": "So.", "topic": "alone"}', r"line 81, group 'alone': 1 pair"),
        (
            '{"question": "Which 1?", "answer": "Another.", "topic": "topic 2"}',
            r"line 81, group 'topic 2', field 'quest",
        ),
        ('{"question": "Why?", "answer": ["So."], "topic": "topic 2"}', r"line 81, group 'topic 2', field 'answer'"),
        ('{"question": "Why?"', r"line 81 of"),
    ],
    ids=["one row", "two answers", "list", "broken"],
)
def test_a_row_that_is_wrong_is_refused_with_its_line(
    line: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "my.jsonl").open("a") as file:
        file.write(line + "\n")
    assert main([*command(), *SMALL]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "out").exists()


def test_topics_of_too_few_rows_are_refused_with_the_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the evaluation first, which is looked at before anything runs."""
    assert main([*command(), *SMALL, "--num_kv_pairs", "12"]) == 2
    assert "eval_dataset: no memory has enough entries: 2 had too few" in capsys.readouterr().err


def test_the_script_is_the_command_and_its_options_files_are_there() -> None:
    assert train_twenty_questions.main is main
    names = re.findall(r"--config (\w+)", train_twenty_questions.__doc__ or "")
    assert "twenty_questions" in names
    assert all(find_config(name).is_file() for name in names)
