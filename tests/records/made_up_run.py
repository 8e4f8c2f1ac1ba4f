"""Ledger rows, logged metrics and ledger files of a run that never was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from attention_rl_trainer.records.ledger import LedgerRow

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def make_record(episode: int = 0, **changes: object) -> dict[str, object]:
    """Return a ledger object with three pairs, all read, in the order 9, 4, 7."""
    record: dict[str, object] = {
        "episode": episode,
        "step": 1,
        "epoch": 0,
        "article_index": 3,
        "title": "Amsterdam",
        "source": "offline",
        "pair_numbers": [4, 9, 7],
        "order": [9, 4, 7],
        "reward": 0.03,
        "step_rewards": [0.01, 0.03, 0.05],
        "query_gains": [0.0, 0.01, 0.02],
        "model_gains": [0.01, 0.02, 0.03],
        "order_gains": None,
        "history_mean": 0.0,
        "history_std": 0.02,
        "threshold": 0.02,
        "verdict": "kept",
        "selection_probabilities": [[0.2, 0.5, 0.3], [0.6, 0.0, 0.4], [0.0, 0.0, 1.0]],
        "queries": [" What is it", " Where is it", " Who"],
        "keys": [" The city", " It lies", " Its people"],
        "values": [" of canals", " on the Amstel", " are many"],
    }
    return record | changes


def make_row(episode: int = 0, *, query_gain: float = 0.01, model_gain: float = 0.02, **changes: object) -> LedgerRow:
    rewards = {
        "reward": query_gain + model_gain,
        "step_rewards": [query_gain + model_gain] * 3,
        "query_gains": [query_gain] * 3,
        "model_gains": [model_gain] * 3,
    }
    return LedgerRow.from_json(make_record(episode, **(rewards | changes)))


def make_run(
    *, query_rise: float = 0.0, model_rise: float = 0.0, num_steps: int = 30, batch: int = 4, verdict: str = "kept"
) -> tuple[list[LedgerRow], list[dict[str, float]]]:
    """Roll out a made-up run whose gains rise linearly by the given amounts, with noise of SD 0.01."""
    generator = np.random.default_rng(0)
    rows, log_history = [], []
    for step in range(1, num_steps + 1):
        share = step / num_steps
        for _ in range(batch):
            query = float(generator.normal(query_rise * share, 0.01))
            model = float(generator.normal(model_rise * share, 0.01))
            rows.append(make_row(len(rows), query_gain=query, model_gain=model, step=step, verdict=verdict))
        rewards = [row.reward for row in rows[-batch:]]
        log_history.append(
            {
                "step": step,
                "episodes": len(rows),
                "updates": step if verdict == "kept" else 0,
                "reward": float(np.mean(rewards)),
                "reward_std": float(np.std(rewards)),
                "query_gain": query_rise * share,
                "model_gain": model_rise * share,
                "kept_fraction": float(verdict == "kept"),
                "rollout_seconds": 3.0,
                "update_seconds": 1.0,
                "tokens_per_second": 100.0,
                "peak_memory_gib": 1.0 + step,
            }
            | ({"history_mean": 0.0, "threshold": 0.01, "kl": 0.001 * step} if verdict == "kept" else {})
        )
    return rows, log_history


def write_ledger(path: Path, rows: list[LedgerRow]) -> Path:
    path.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows), encoding="utf-8")
    return path
