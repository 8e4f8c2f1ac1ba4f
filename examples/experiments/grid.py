"""Run a recipe with its seeds and with single options changed, and collect what held-out articles say.

    python examples/experiments/grid.py run examples/experiments/recipe.yaml
    python examples/experiments/grid.py table examples/experiments/recipe.yaml

A grid is a YAML file:

    config: examples/configs/recommended.yaml   # what is run
    rows: docs/results/recipe.jsonl             # one line for each finished run
    output_dir: out/recipe                      # where runs write
    seeds: [0, 1, 2]
    options: {}                                 # what all runs of the grid have other than the config
    changes:                                    # settings by name, and what each has other than that
      recipe: {}
      order_coef 1: {order_coef: 1.0}

Each run is a process of `examples/train_wiki.py`, which evaluates on held-out articles at its end. A run whose row is
there is left out; one that was stopped resumes from its newest checkpoint. `table` prints Markdown: the mean over the
seeds with its 95% interval (Student's t), each seed's own interval being in the rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats
from transformers.trainer_utils import get_last_checkpoint

from attention_rl_trainer.records.ledger import read_ledger

_TRAIN = Path(__file__).parent.parent / "train_wiki.py"
_COLUMNS = {
    "query gain": ("queries", "policy"),
    "less empty query": ("policy_less", "empty query"),
    "bound": ("parts", "query_bound"),
    "less content control": ("policy_less", "content control"),
    "less form control": ("policy_less", "form control"),
    "names its pair": ("parts", "names_its_pair"),
    "different queries": ("parts", "distinct_queries"),
    "model gain": ("parts", "model_gain"),
    "order less random": ("order_gains", "learned"),
    "share of the order gap": ("share_closed", "learned"),
}


@dataclass(frozen=True)
class Run:
    """One run of a grid.

    Attributes:
        name: name of the setting.
        seed: its seed.
        options: all of its options.
    """

    name: str
    seed: int
    options: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        """Where it writes."""
        return Path(self.options["output_dir"])


def read_grid(path: Path) -> dict[str, Any]:
    """Read a grid.

    Args:
        path: the YAML file.

    Raises:
        ValueError: a key is missing or unknown.
    """
    grid: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = {"config", "rows", "output_dir", "seeds", "options", "changes"}
    if set(grid) != expected:
        raise ValueError(f"{path} must have the keys {', '.join(sorted(expected))}, got {', '.join(sorted(grid))}")
    return grid


def runs_of(grid: dict[str, Any]) -> Iterator[Run]:
    """List a grid's runs: every setting with the first seed, then with the next.

    Args:
        grid: as `read_grid` returns it.
    """
    recipe: dict[str, Any] = yaml.safe_load(Path(grid["config"]).read_text(encoding="utf-8"))
    recipe |= grid["options"] or {}
    for seed in grid["seeds"]:
        for name, changes in grid["changes"].items():
            folder = Path(grid["output_dir"]) / f"{name.replace(' ', '_')}_seed_{seed}"
            yield Run(name, seed, recipe | (changes or {}) | {"seed": seed, "output_dir": str(folder)})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of finished runs; there may be none yet.

    Args:
        path: the JSON Lines file.
    """
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def execute(run: Run, config: str) -> dict[str, Any]:
    """Run a process to its end, and summarize it.

    Args:
        run: what to run.
        config: name of the recipe, for the row.

    Returns:
        The row.

    Raises:
        CalledProcessError: the process failed; its log is in the run's folder.
    """
    folder = run.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(run.options), encoding="utf-8")
    command = [sys.executable, str(_TRAIN), "--config", str(folder / "config.yaml")]
    if get_last_checkpoint(str(folder)) is not None:
        command.append("--resume")
    started = time.perf_counter()
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    tables = json.loads((folder / "evaluation" / "eval" / "evaluation.json").read_text(encoding="utf-8"))
    ledger = read_ledger(folder / "trajectories.jsonl")
    return {
        "name": run.name,
        "seed": run.seed,
        "config": config,
        "options": run.options,
        "seconds": round(time.perf_counter() - started),
        "resumed": "--resume" in command,
        "episodes": len(ledger),
        "kept": sum(row.verdict == "kept" for row in ledger),
        **tables,
    }


def run_grid(grid: dict[str, Any]) -> None:
    """Run what has no row yet.

    Args:
        grid: as `read_grid` returns it.
    """
    path = Path(grid["rows"])
    done = {(row["name"], row["seed"]) for row in read_rows(path)}
    for run in runs_of(grid):
        if (run.name, run.seed) in done:
            continue
        print(f"{run.name}, seed {run.seed}", flush=True)
        row = execute(run, grid["config"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row, allow_nan=False) + "\n")
        print(f"  {row['seconds']} s, query gain {row['queries']['policy']['mean']:+.4f}", flush=True)


def mean_over_seeds(values: list[float]) -> str:
    """Format a mean with its 95% interval by Student's t; a single value has none.

    Args:
        values: one for each seed.
    """
    if len(values) == 1:
        return f"{values[0]:+.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):+.3f} ± {half:.3f}"


def table_of(grid: dict[str, Any]) -> str:
    """Write a grid's rows as a Markdown table; settings without a row are listed as not run.

    Args:
        grid: as `read_grid` returns it.
    """
    rows = read_rows(Path(grid["rows"]))
    lines = ["| setting | seeds | " + " | ".join(_COLUMNS) + " | episodes | seconds |"]
    lines.append("|" + " --- |" * (len(_COLUMNS) + 4))
    missing = []
    for name in grid["changes"]:
        found = [row for row in rows if row["name"] == name]
        if not found:
            missing.append(name)
            continue
        cells = [name, str(len(found))]
        for part, key in _COLUMNS.values():
            values = [row[part][key]["mean"] for row in found if key in row[part]]
            cells.append(mean_over_seeds(values) if values else "")
        cells += [str(found[0]["episodes"]), str(round(np.mean([row["seconds"] for row in found])))]
        lines.append("| " + " | ".join(cells) + " |")
    if missing:
        lines += ["", "Not run: " + ", ".join(missing) + "."]
    return "\n".join(lines)


def order_table_of(grid: dict[str, Any], name: str) -> str:
    """Write what one setting's evaluations say of every order, as a Markdown table; empty without rows.

    Args:
        grid: as `read_grid` returns it.
        name: the setting.
    """
    found = [row for row in read_rows(Path(grid["rows"])) if row["name"] == name and row["orders"]]
    if not found:
        return ""
    gains = {rule: [row["order_gains"][rule]["mean"] for row in found] for rule in found[0]["order_gains"]}
    memories = ", ".join(str(row["orders"]["random"]["num_values"]) for row in found)
    lines = [
        f"Orders of {name!r} ({memories} memories):",
        "",
        "| order | less random | share of the gap closed |",
        "| --- | --- | --- |",
    ]
    for rule in sorted(gains, key=lambda rule: -np.mean(gains[rule])):
        shares = [row["share_closed"][rule]["mean"] for row in found if rule in row["share_closed"]]
        lines.append(f"| {rule} | {mean_over_seeds(gains[rule])} | {mean_over_seeds(shares) if shares else ''} |")
    return "\n".join(lines)


def main() -> None:
    """Run or tabulate a grid."""
    parser = argparse.ArgumentParser(description="Run a recipe with its seeds and with single options changed.")
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("grid", type=Path)
    arguments = parser.parse_args()
    grid = read_grid(arguments.grid)
    if arguments.command == "run":
        run_grid(grid)
    else:
        orders = [order_table_of(grid, name) for name in grid["changes"]]
        print("\n\n".join([table_of(grid), *filter(None, orders)]))


if __name__ == "__main__":
    main()
