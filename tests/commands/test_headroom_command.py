"""``attention-rl headroom`` on a tiny saved model and rows of one's own: what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import OPTIONS, article_texts, save_tiny_llama, write_rows

from attention_rl_trainer.cli import main


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    texts = article_texts(24)
    save_tiny_llama(tmp_path / "model", texts)
    (tmp_path / "options.yaml").write_text(OPTIONS, encoding="utf-8")
    rows = [{"title": f"{number}", "text": text} for number, text in enumerate(texts)]
    return [
        str(write_rows(tmp_path / "articles.jsonl", rows)),
        *("--config", str(tmp_path / "options.yaml")),
        *("--model_name_or_path", str(tmp_path / "model")),
        *("--output_dir", str(tmp_path / "out")),
    ]


def test_it_prints_and_writes_what_an_order_could_be_worth(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["headroom", *flags, "--headroom_memories", "12"]) == 0

    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "headroom.json").read_text(encoding="utf-8"))
    last = printed.strip().splitlines()[-2:]
    for line, name in zip(last, ("headroom", "keys_tell"), strict=True):
        figures = [record[name][part] for part in ("mean", "low", "high")]
        assert line == f"{name}: {figures[0]:+.3f} [{figures[1]:+.3f}, {figures[2]:+.3f}]"
    assert record["num_fitted"] == 12
    assert record["headroom"]["num_clusters"] == 6
    assert record["headroom"]["mean"] > 0
    assert record["reader"] in printed


def test_it_measures_on_other_rows_where_they_are_named(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"title": f"other {number}", "text": text} for number, text in enumerate(article_texts(8, seed=1))]
    other = write_rows(tmp_path / "other.jsonl", rows)

    assert main(["headroom", *flags, "--headroom_memories", "10", "--dataset_eval_name", str(other)]) == 0
    assert f"({other})" in capsys.readouterr().out.replace("\n", "")


def test_few_articles_are_read_again_but_on_one_side_alone(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["headroom", *flags, "--headroom_memories", "40"]) == 0
    record = json.loads((tmp_path / "out" / "headroom.json").read_text(encoding="utf-8"))
    # Two and a half times 24 articles, of which every third is held out.
    assert record["num_fitted"] + record["headroom"]["num_values"] == 60
    assert record["headroom"]["num_clusters"] == 8
    assert main(["headroom", *flags, "--headroom_memories", "12", "--dataset_eval_name", flags[0]]) == 2
    assert "articles are both fitted to and measured on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--headroom_memories", "9"], "headroom_memories must be 10 or more, got 9"),
        (["--num_kv_pairs", "2", "--num_steps", "1"], "a memory of one pair has one order; raise num_kv_pairs"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    flags: list[str], changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["headroom", *flags, *changes]) == 2
    assert message in capsys.readouterr().err
