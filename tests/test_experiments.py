"""The scripts of `examples/experiments`: a grid of runs on a tiny model, and the picture of its seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from experiments import grid as grids
from experiments import learning_curve, order_bounds
from scipy import stats
from tiny import OPTIONS, article_texts, save_tiny_llama, write_rows

from attention_rl_trainer.records.ledger import read_ledger

EVALUATION = {"eval_episodes": 6, "eval_order_episodes": 3, "eval_epochs": 2}


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of two settings and two seeds, of which one setting is not finished."""
    folder = tmp_path_factory.mktemp("grid")
    texts = article_texts(20)
    save_tiny_llama(folder / "model", texts)
    for name, rows in {"train": texts[:15], "held_out": texts[15:]}.items():
        write_rows(folder / f"{name}.jsonl", [{"title": f"{name} {n}", "text": text} for n, text in enumerate(rows)])
    recipe = yaml.safe_load(OPTIONS) | EVALUATION | {"num_episodes": 999, "generation_batch_size": 8}
    recipe |= {"model_name_or_path": str(folder / "model"), "report_to": "none"}
    recipe |= {"dataset_name": str(folder / "train.jsonl"), "dataset_eval_name": str(folder / "held_out.jsonl")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    grid = {
        "config": str(folder / "recipe.yaml"),
        "rows": str(folder / "results" / "rows.jsonl"),
        "output_dir": str(folder / "out"),
        "seeds": [0, 1],
        "options": {"num_episodes": 32},
        "changes": {"recipe": None, "no KL": {"beta": 0.0}},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    return folder / "grid.yaml"


@pytest.mark.slow
def test_a_grid_runs_what_has_no_row(grid_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = grids.read_grid(grid_file)
    runs = list(grids.runs_of(grid))
    assert [(run.name, run.seed, run.options.get("beta")) for run in runs] == [
        ("recipe", 0, None),
        ("no KL", 0, 0.0),
        ("recipe", 1, None),
        ("no KL", 1, 0.0),
    ]
    alone = grid | {"changes": {"recipe": None}}
    grids.run_grid(alone)
    rows = grids.read_rows(Path(grid["rows"]))
    assert [(row["name"], row["seed"], row["episodes"], row["resumed"]) for row in rows] == [
        ("recipe", 0, 32, False),
        ("recipe", 1, 32, False),
    ]
    for run, row in zip([runs[0], runs[2]], rows, strict=True):
        stored = json.loads((run.output_dir / "evaluation" / "eval" / "evaluation.json").read_text(encoding="utf-8"))
        assert row["queries"] == stored["queries"]
        assert row["queries"]["policy"]["num_values"] == 6
        assert row["orders"]["learned"]["num_values"] == 3
    assert rows[0]["queries"] != rows[1]["queries"]
    capsys.readouterr()
    grids.run_grid(alone)
    assert capsys.readouterr().out == ""
    table = grids.table_of(grid).splitlines()
    gains = [row["queries"]["policy"]["mean"] for row in rows]
    half = stats.t.ppf(0.975, 1) * abs(gains[0] - gains[1]) / 2
    assert table[2].startswith(f"| recipe | 2 | {np.mean(gains):+.3f} ± {half:.3f} | ")
    assert table[-1] == "Not run: no KL."
    assert grids.order_table_of(grid, "no KL") == ""
    orders = grids.order_table_of(grid, "recipe").splitlines()
    assert orders[0] == "Orders of 'recipe' (3, 3 memories):"
    assert orders[4].startswith("| exact best | +")
    assert orders[4].endswith(" |  |")
    assert len(orders) == 4 + len(rows[0]["order_gains"])

    # A row that was lost: the run is finished already, and what it gives is the same.
    Path(grid["rows"]).unlink()
    grids.run_grid(alone | {"seeds": [0]})
    (again,) = grids.read_rows(Path(grid["rows"]))
    assert again["resumed"]
    assert {name: again[name] for name in ("episodes", "queries", "orders")} == {
        name: rows[0][name] for name in ("episodes", "queries", "orders")
    }

    folders = [runs[0].output_dir, runs[2].output_dir]
    ledgers = [read_ledger(folder / "trajectories.jsonl") for folder in folders]
    means = learning_curve.binned_means(ledgers, "query_gains", 2)
    for seed, ledger in enumerate(ledgers):
        per_trajectory = [np.mean(row.query_gains) for row in ledger]
        assert means[seed].tolist() == pytest.approx([np.mean(per_trajectory[:16]), np.mean(per_trajectory[16:])])
    picture = grid_file.parent / "deeper" / "curve.png"
    learning_curve.draw(ledgers, picture, 4)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has 32 trajectories, fewer than the 33 stretches"):
        learning_curve.binned_means(ledgers, "query_gains", 33)


def test_a_grid_with_other_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("config: a\nrows: b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"grid\.yaml must have the keys changes, .*, got config, rows"):
        grids.read_grid(tmp_path / "grid.yaml")


class TestOrderBounds:
    @staticmethod
    def memory(generator: np.random.Generator) -> order_bounds.Scored:
        """Four of six keys; the oracle reads "a" first, then the alphabet, backwards after a No to "a"."""
        keys = [str(key) for key in generator.permutation(list("abcdef"))[:4]]
        answers = [str(answer) for answer in generator.choice(["yes", "no"], 4)]
        turned = dict(zip(keys, answers, strict=True)).get("a") == "no"
        first = [column for column in range(4) if keys[column] == "a"]
        rest = sorted((column for column in range(4) if keys[column] != "a"), key=keys.__getitem__, reverse=turned)
        order = (*first, *rest)
        return order_bounds.Scored("article", keys, answers, order, [], (order, 0.0), cast("Any", None))

    def test_a_clone_does_as_the_oracle_did(self) -> None:
        """It learns that what comes after "a" depends on its answer."""
        generator = np.random.default_rng(0)
        clone = order_bounds.Clone([self.memory(generator) for _ in range(400)])
        others = [self.memory(generator) for _ in range(50)]
        same = [clone.order(memory) == memory.oracle[0] for memory in others]
        assert np.mean(same) > 0.9
        assert {memory.oracle[0][1] for memory in others if memory.keys[memory.oracle[0][0]] == "a"} == {0, 1, 2, 3}

    def test_mean_places(self) -> None:
        memories = [
            order_bounds.Scored("article", ["x", "y"], ["", ""], order, [], (order, 0.0), cast("Any", None))
            for order in ((0, 1), (1, 0), (1, 0), (1, 0))
        ]
        assert order_bounds.mean_places(memories) == {"x": 0.75, "y": 0.25}
