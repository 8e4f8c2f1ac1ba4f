from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attention_rl_trainer.evaluation.before_and_after import FILE_NAME, BeforeAndAfter
from attention_rl_trainer.evaluation.estimates import Estimate


def tables(query: str, gain: float, names: float | None) -> dict[str, Any]:
    def figure(mean: float) -> dict[str, Any]:
        return asdict(Estimate(mean, mean - 0.1, mean + 0.1, 8, 4))

    parts = {"distinct_queries": figure(3.5)} | ({} if names is None else {"names_its_pair": figure(names)})
    steps = [{"query": query, "key": " Is it | alive?", "value": " Yes, it is."}]
    return {
        "policy_less": {"empty query": figure(gain)},
        "parts": parts,
        "settings": {"T": 4},
        "examples": [{"title": "sun", "steps": steps}, {"title": "<b>", "steps": steps * 2}],
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_both_are_side_by_side(tmp_path: Path) -> None:
    before = write(tmp_path / "before", tables("\n\n  \n", 0.01, 0.1))
    after = write(tmp_path / "after", tables(" Is it\nalive?", 0.4, 0.6))
    compared = BeforeAndAfter.read(before, after)
    assert compared is not None
    assert compared.lines() == [
        "over_empty: +0.400 [+0.300, +0.500] (before +0.010) nats per token",
        "names_its_pair: +0.600 [+0.500, +0.700] (before +0.100) of the steps",
        "different_queries: +3.500 [+3.400, +3.600] (before +3.500) of 4",
    ]
    text = compared.write(tmp_path).read_text()
    assert text == (tmp_path / FILE_NAME).read_text()
    read = "Is it \\| alive? → Yes, it is."
    assert f"| 1 | (nothing) | {read} | Is it alive? | {read} |" in text
    assert "## &lt;b>" in text


def test_two_memories_of_one_title_are_kept_apart(tmp_path: Path) -> None:
    def examples(*queries: str) -> dict[str, Any]:
        found = [{"title": "sun", "steps": [{"query": query, "key": "k", "value": "v"}]} for query in queries]
        return tables("", 0.0, None) | {"examples": found}

    before, after = write(tmp_path / "before", examples("a", "b")), write(tmp_path / "after", examples("c", "d"))
    compared = BeforeAndAfter.read(before, after)
    assert compared is not None
    assert "| 1 | a | k → v | c | k → v |" in compared.to_markdown()
    assert "| 1 | b | k → v | d | k → v |" in compared.to_markdown()


def test_without_an_evaluation_before_there_is_one_side(tmp_path: Path) -> None:
    after = write(tmp_path / "after", tables(" Is it alive?", 0.4, None))
    compared = BeforeAndAfter.read(tmp_path / "nowhere", after)
    assert compared is not None
    assert [line.split(":")[0] for line in compared.lines()] == ["over_empty", "different_queries"]
    assert compared.lines()[0] == "over_empty: +0.400 [+0.300, +0.500] nats per token"
    assert "| 2 |  |  | Is it alive? |" in compared.to_markdown()


def test_without_tables_after_training_there_is_nothing_to_compare(tmp_path: Path) -> None:
    before = write(tmp_path / "before", tables("", 0.0, None))
    assert BeforeAndAfter.read(before, tmp_path / "nowhere") is None
