"""Folders of runs that never were: ledger, checkpoint with a log, options, evaluation, summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from made_up_run import make_record

from attention_rl_trainer.records.ledger import LedgerRow
from attention_rl_trainer.records.summary import summarize_run

# What an article or a model may bring.
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=2'>\u2028\u202e\"'`${x}&amp;"


def make_rows(
    num_episodes: int = 48, *, batch: int = 8, rise: float = 0.2, num_articles: int = 6, seed: int = 0
) -> list[LedgerRow]:
    """Roll out trajectories of three steps over four pairs; articles and their memories come again and again."""
    generator = np.random.default_rng(seed)
    rows = []
    for episode in range(num_episodes):
        step, article = 1 + episode // batch, episode % num_articles
        query, model = generator.normal(rise * episode / num_episodes, 0.05, (2, 3))
        order = [int(pair) for pair in generator.permutation([2, 3, 5, 8])[:3]]
        probabilities = []
        for done in range(3):
            weights = generator.random(4) * [pair not in order[:done] for pair in (2, 3, 5, 8)]
            probabilities.append((weights / weights.sum()).tolist())
        reward = float((query + model).mean())
        threshold = None if step == 1 else rise * episode / num_episodes
        verdict = "warmup" if threshold is None else "kept" if reward > threshold else "below_threshold"
        rows.append(
            LedgerRow.from_json(
                make_record(
                    episode,
                    step=step,
                    article_index=article,
                    title=f"Article {article}",
                    pair_numbers=[2, 3, 5, 8],
                    order=order,
                    selection_probabilities=probabilities,
                    reward=reward,
                    step_rewards=(query + model).tolist(),
                    query_gains=query.tolist(),
                    model_gains=model.tolist(),
                    history_mean=None if step == 1 else 0.1,
                    history_std=None if step == 1 else 0.05,
                    threshold=threshold,
                    verdict=verdict,
                    keys=[f" key {pair} of {article}" for pair in order],
                )
            )
        )
    return rows


def log_of(rows: Sequence[LedgerRow]) -> list[dict[str, float]]:
    """Log what a Trainer would of each step."""
    last = {row.step: row.episode for row in rows}
    return [
        {
            "step": step,
            "episodes": episode + 1,
            "updates": step - 1,
            "loss": float("nan") if step == 1 else 1.0 / step,
            "query_entropy": 3.0 - 0.1 * step,
            "selection_information": 0.5,
            "query_diversity": 2.0,
        }
        | ({} if step == 1 else {"kl": 0.001 * step})
        for step, episode in last.items()
    ]


def write_run(
    folder: Path,
    rows: Sequence[LedgerRow],
    *,
    options: dict[str, object] | None = None,
    is_evaluated: bool = True,
) -> Path:
    """Write a finished run."""
    lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows]
    checkpoint = folder / f"checkpoint-{rows[-1].step}"
    checkpoint.mkdir(parents=True)
    (folder / "trajectories.jsonl").write_text("".join(lines), encoding="utf-8", errors="surrogatepass")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log_of(rows)}), encoding="utf-8")
    written = {"num_episodes": len(rows), "filter_threshold": "-inf", "beta": 0.1, "seed": 3} | (options or {})
    (folder / "attention_rl_config.json").write_text(json.dumps(written), encoding="utf-8")
    (folder / "report").mkdir()
    summary = summarize_run(rows, [], {"model": "tiny | <b>", "articles": "made up"})
    (folder / "report" / "summary.md").write_text(summary, encoding="utf-8")
    if is_evaluated:
        write_evaluation(folder / "evaluation" / "eval" / "evaluation.json")
    return folder


def write_evaluation(path: Path) -> Path:
    """Write an evaluation as `EvaluationTables.write` does."""

    def estimate(mean: float, half: float | None = 0.05) -> dict[str, float | int | None]:
        ends = {"low": None, "high": None} if half is None else {"low": mean - half, "high": mean + half}
        return {"mean": mean, **ends, "num_values": 40, "num_clusters": 20}

    tables = {
        "orders": {"learned": estimate(-2.0), "random": estimate(-2.1)},
        "order_gains": {"learned": estimate(0.1), "greedy oracle": estimate(0.3)},
        "share_closed": {"learned": estimate(0.33)},
        "queries": {"policy": estimate(0.2), "empty query": estimate(0.01)},
        "policy_less": {"empty query": estimate(0.19)},
        "parts": {"reward": estimate(0.4), "names_its_pair": estimate(0.5), "query_bound": estimate(0.06, None)},
        "settings": {"seed": 1, "T": 3},
        "asked": {},
        "asked_share": {},
    }
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(tables), encoding="utf-8")
    return path
