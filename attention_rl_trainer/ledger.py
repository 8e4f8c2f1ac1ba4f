"""The ledger of a run: one row for every trajectory, with its reward, threshold and verdict (design §8).

JSON Lines, so that a run that was cut off leaves every row but perhaps the last readable. Knows nothing about how a reward
came about or what the rows are used for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from attention_rl_trainer.filtering import RewardStatistics
from attention_rl_trainer.pairs import ArticleBatch
from attention_rl_trainer.report.summary import LEDGER_NAME, LedgerRow, Verdict, _decode_object
from attention_rl_trainer.tokenization import PlainTextEncoder
from attention_rl_trainer.types import Trajectory


class Ledger:
    """The ledger file of a run, written row by row.

    Args:
        folder: the run's output_dir.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_NAME

    def append(self, rows: Sequence[LedgerRow]) -> None:
        """Write rows and hand them to the operating system.

        Args:
            rows: in the order of their episodes.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

    def cut(self, num_episodes: int) -> None:
        """Forget the rows past a checkpoint, so that a resumed run does not write them twice.

        Args:
            num_episodes: rows of this and later episodes go, and so does a last line that a kill left unfinished.
        """
        if not self.path.is_file():
            return
        staged = self.path.with_suffix(".staged")
        with self.path.open("rb") as source, staged.open("wb") as target:
            for line in source:
                if line.endswith(b"\n") and LedgerRow.from_json(_decode_object(line)).episode < num_episodes:
                    target.write(line)
        os.replace(staged, self.path)

    def set_aside(self) -> Path | None:
        """Rename the ledger of an earlier run in the same folder, so that nothing is lost and nothing is mixed.

        Returns:
            Where it lies now, or ``None`` if there was none.
        """
        if not self.path.is_file():
            return None
        taken = [self.path.with_name(f"{self.path.stem}.{number}.jsonl") for number in range(1, 1000)]
        aside = next(path for path in taken if not path.exists())
        os.replace(self.path, aside)
        return aside


def ledger_rows(
    trajectory: Trajectory,
    batch: ArticleBatch,
    encoder: PlainTextEncoder,
    *,
    step: int,
    history: RewardStatistics,
    threshold: float | None,
    keep: Tensor,
    is_warmup: bool,
) -> list[LedgerRow]:
    """Write a rollout batch down.

    Args:
        trajectory: the batch as it was rolled out.
        batch: the articles' pairs that it read.
        encoder: turns ids into text.
        step: the trainer's step, from 1.
        history: the rewards before the batch.
        threshold: what a reward had to exceed; ``None`` where nothing was judged by one.
        keep: which trajectories are trained on, ``[B]`` bool.
        is_warmup: whether nothing was judged yet.

    Returns:
        One row for each trajectory.
    """
    columns = {
        "step_rewards": trajectory.stack("reward").tolist(),
        "query_gains": trajectory.stack("query_gain").tolist(),
        "model_gains": trajectory.stack("model_gain").tolist(),
        # Rounding may lift a certain draw above 1 in the last digit.
        "selection_probabilities": trajectory.stack("selection_probabilities").clamp(max=1.0).tolist(),
        "pair_numbers": trajectory.memory.pair_numbers.tolist(),
    }
    orders = trajectory.memory.pair_numbers.gather(1, trajectory.stack("selected_index")).tolist()
    order_gains = None if trajectory.steps[0].order_gain is None else trajectory.stack("order_gain").tolist()
    rewards, episodes, kept = trajectory.avg_reward.tolist(), trajectory.episodes.tolist(), keep.tolist()
    verdicts: list[Verdict] = ["warmup" if is_warmup else "kept" if is_kept else "below_threshold" for is_kept in kept]
    rows = []
    for row, article in enumerate(batch.articles):
        texts = {
            "queries": [encoder.decode(item.query_tokens[row]) for item in trajectory.steps],
            "keys": [encoder.decode(item.selected_pair.key_tokens[row]) for item in trajectory.steps],
            "values": [encoder.decode(item.selected_pair.value_tokens[row]) for item in trajectory.steps],
        }
        record = {
            "episode": episodes[row],
            "step": step,
            "epoch": article.epoch,
            "article_index": article.article_index,
            "title": article.title,
            "source": article.source,
            "order": orders[row],
            "reward": rewards[row],
            "order_gains": None if order_gains is None else order_gains[row],
            "history_mean": history.mean if history.count else None,
            "history_std": history.std if history.count else None,
            "threshold": threshold,
            "verdict": verdicts[row],
        }
        rows.append(LedgerRow.from_json(record | texts | {name: values[row] for name, values in columns.items()}))
    return rows
