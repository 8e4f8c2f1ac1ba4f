"""What a run writes down as it goes: ledger rows, metrics between two logs, warnings, and the report at its end."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_rl_trainer.durability.discovery import Fact
from attention_rl_trainer.errors import RunContext, peak_memory_gib
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.options import CountOrZero, Options, option
from attention_rl_trainer.processes import ALONE, Processes
from attention_rl_trainer.records.health import HealthLimits, HealthMonitor
from attention_rl_trainer.records.ledger import Ledger, LedgerRow, VerdictName
from attention_rl_trainer.records.metrics import MetricsBuffer, trajectory_metrics
from attention_rl_trainer.records.progress import Progress
from attention_rl_trainer.records.summary import REPORT_FOLDER, SUMMARY_NAME, RunCounts, write_report
from attention_rl_trainer.types import PADDING, Trajectory
from attention_rl_trainer.update.filter import Verdict
from attention_rl_trainer.update.micro_batches import LossSums
from attention_rl_trainer.update.warm_start import WarmStartTerms

logger = logging.getLogger(__name__)


@dataclass
class RecordOptions(Options):
    """What a run shows and leaves behind."""

    log_trajectory_steps: CountOrZero = option(10, "Print a table of one trajectory every so many steps; 0 for never.")
    log_trajectories: bool = option(
        False,
        "Give the trackers of report_to that can hold them (tensorboard, trackio, wandb) the trajectories of a rollout "
        "batch as a table, and a picture of the best one's choices, every log_trajectory_steps steps.",
    )
    report_at_end: bool = option(True, "Write plots and a summary into output_dir/report when training ends.")


@dataclass(frozen=True)
class _Share:
    """What a process has to say of its trajectories of a rollout batch."""

    rows: list[LedgerRow]
    metrics: dict[str, float]
    rewards: Tensor


class Recorder:
    """Keeps what each step gives until it is written: rows to the ledger once the update is sure, metrics to the log.

    What it keeps is of all processes, and the same in each; the first one writes.

    Args:
        folder: the run's output_dir.
        encoder: turns ids into text.
        progress: the trainer's; it counts a batch before the batch is added here.
        limits: what the health monitor warns of.
        context: the present step, the device, and how long each phase took.
        processes: those of the run.
    """

    def __init__(
        self,
        folder: Path,
        encoder: PlainTextEncoder,
        progress: Progress,
        limits: HealthLimits,
        context: RunContext,
        processes: Processes = ALONE,
    ) -> None:
        self.ledger = Ledger(folder)
        self.latest_rows: list[LedgerRow] = []
        """Of the last rollout batch."""
        self._folder = folder
        self._summary = folder / REPORT_FOLDER / SUMMARY_NAME
        self._encoder = encoder
        self._progress = progress
        self._context = context
        self._processes = processes
        self._metrics = MetricsBuffer()
        self._health = HealthMonitor(limits)
        self._pending: list[LedgerRow] = []

    @property
    def latest_row(self) -> LedgerRow | None:
        """Of the last rollout batch, the trajectory with the highest reward."""
        return max(self.latest_rows, key=lambda row: row.reward, default=None)

    # ---- A step ----

    def add(self, batch: MemoryBatch, trajectories: Trajectory | None, verdict: Verdict) -> None:
        """Note a rollout batch that was judged and counted; its rows wait for `commit`.

        Args:
            batch: this process's memories.
            trajectories: this process's; ``None`` where it has none.
            verdict: on those of all processes.
        """
        share = _Share([], {}, torch.empty(0))
        if trajectories is not None:
            mine = replace(verdict, keep=self._processes.own(verdict.keep))
            rows = ledger_rows(trajectories, batch, self._encoder, mine, self._context.step)
            share = _Share(rows, trajectory_metrics(trajectories), trajectories.avg_reward.cpu())
        shares = self._processes.gather(share)
        rows = [row for part in shares for row in part.rows]
        self._pending += rows
        self.latest_rows = rows
        num_kept = int(verdict.keep.sum())
        for part in shares:
            self._metrics.add(part.metrics, weight=len(part.rows))
        self._metrics.add({"kept_fraction": num_kept / len(rows)}, weight=len(rows))
        self._metrics.add_rewards(torch.cat([part.rewards for part in shares]))
        self._metrics.add(
            {
                "history_mean": verdict.history_after.mean,
                "history_std": verdict.history_after.std,
                "threshold": verdict.threshold,
                "kept_trajectories": num_kept,
                "episodes": self._progress.num_episodes,
                "skipped_articles": sum(self._progress.skipped.values()),
            }
        )

    def add_update(self, sums: LossSums) -> None:
        """Collect the loss of a step's update; it kept nothing if there are no query tokens."""
        self._metrics.count_step()
        self._metrics.add({"policy_loss": sums.policy})
        if sums.kl is not None:
            self._metrics.add({"kl": sums.kl / sums.num_query_tokens}, weight=sums.num_query_tokens)

    def add_warm_start(self, learned: Sequence[tuple[WarmStartTerms, int]]) -> None:
        """Collect how well the queries and values of a warm start are predicted.

        Args:
            learned: the terms of each micro-batch of this process, and its number of trajectories.
        """
        parts = []
        for terms, number in learned:
            parts.append(({"warm_start_value_logprob": terms.value_logprob.item()}, number))
            if terms.num_learned:
                parts.append(({"warm_start_query_logprob": terms.query_logprob.item()}, terms.num_learned))
        for share in self._processes.gather(parts):
            for logprobs, weight in share:
                self._metrics.add(logprobs, weight=weight)

    def add_times(self, trajectories: Trajectory | None) -> None:
        """Collect how long the phases of a rollout batch took in the slowest process, and the largest peak memory."""
        seconds, num_tokens = self._context.seconds, 0 if trajectories is None else trajectories.forward_tokens
        shares = self._processes.gather((seconds["rollout"], seconds["filter"], num_tokens))
        rollout, judging = (max(share[place] for share in shares) for place in (0, 1))
        self._metrics.add({"tokens_per_second": sum(share[2] for share in shares) / rollout}, weight=rollout)
        self._metrics.add({"rollout_seconds": rollout, "update_seconds": judging})
        self.add_update_time()

    def add_update_time(self) -> None:
        """Collect how long the update took, and the peak memory, where there may have been no rollout."""
        shares = self._processes.gather((self._context.seconds["update"], peak_memory_gib(self._context.device)))
        update, peak = (max(share[place] for share in shares) for place in (0, 1))
        self._metrics.add({"update_seconds": update, "peak_memory_gib": peak})

    def commit(self) -> None:
        """Write the rows of an update to the ledger: nothing stands in the way of its last optimizer step."""
        if self._processes.is_main:
            self.ledger.append(self._pending)
        self._pending = []

    def log(self, logs: Mapping[str, float], num_updates: int) -> dict[str, float]:
        """Join the Trainer's numbers with what was collected since the last log, and warn of what goes wrong."""
        self._metrics.add({"updates": num_updates})
        joined = {**logs, **self._metrics.drain()}
        for warning in self._health.observe(joined):
            if not self._processes.is_main:
                continue
            # The Trainer logs a step after it has counted it.
            logger.warning("Step %d: %s", self._context.step - 1, warning)
        return joined

    def correct_totals(self, totals: dict[str, float]) -> None:
        """Correct what the Trainer logs at a run's end, in place.

        It takes every batch for a full one, and has 0 floating-point operations where nobody counts them.
        """
        totals.pop("total_flos", None)
        if "train_samples_per_second" in totals and totals["train_runtime"] > 0:
            rate = self._progress.episodes_of_process / totals["train_runtime"]
            totals["train_samples_per_second"] = round(rate, 3)

    # ---- A run ----

    def forget_report(self) -> None:
        """Remove the summary of an earlier end: a run that is under way has no report."""
        self._summary.unlink(missing_ok=True)

    def counts(self, num_updates: int) -> RunCounts:
        """Count what was done, with ``num_updates`` optimizer steps, those of the warm start included."""
        done = self._progress
        of_episodes = num_updates - done.num_warm_start_updates if done.num_episodes > 0 else 0
        return RunCounts(done.num_episodes, of_episodes, done.num_warm_start)

    @property
    def has_report(self) -> bool:
        """Whether the run's report is there."""
        return self._summary.is_file()

    def write_report(
        self, log_history: Sequence[Mapping[str, float]], facts: Mapping[str, Fact], num_updates: int
    ) -> None:
        """Write summary and plots of the ledger, with ``facts`` about what ran as they are.

        What was collected since the last log is in it too.
        """
        if not self.ledger.path.is_file():
            logger.warning("No report: %s is missing", self.ledger.path)
            return
        with_plots = importlib.util.find_spec("matplotlib") is not None
        if not with_plots:
            logger.warning(
                'No plots: matplotlib is missing. Install it with: pip install "attention-rl-trainer[report]"'
            )
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self._progress.skipped.items())) or "none"
        files = write_report(
            self._folder,
            [*log_history, self._metrics.numbers()],
            {**facts, "articles skipped": skipped},
            counts=self.counts(num_updates),
            with_plots=with_plots,
        )
        logger.info("Report: %s", files[0])

    def cut_ledger(self) -> None:
        """Remove the rows past a checkpoint that a run resumes from, and say which are missing."""
        # Those of the first step after the checkpoint are counted, and wait to be written.
        num_written = self._progress.num_episodes - len(self._pending)
        gaps = self.ledger.cut(num_written)
        if gaps.missing or gaps.copy is not None:
            logger.warning(
                "%s lacks %d of the %d trajectories before the checkpoint%s; the report lacks them, the run does not",
                self.ledger.path,
                gaps.missing,
                num_written,
                "" if gaps.copy is None else f", and had damaged lines or repeated ones (as it was: {gaps.copy})",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics that are not logged yet, and what the health monitor remembers."""
        return {"metrics": self._metrics.state_dict(), "health": self._health.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned; rows that wait for `commit` are dropped."""
        self._metrics.load_state_dict(state["metrics"])
        self._health.load_state_dict(state["health"])
        self._pending = []


def ledger_rows(
    trajectory: Trajectory, batch: MemoryBatch, encoder: PlainTextEncoder, verdict: Verdict, step: int
) -> list[LedgerRow]:
    """Write a rollout batch down, one row per trajectory; ``step`` is the trainer's, from 1."""
    columns = {
        "step_rewards": trajectory.stack("reward").tolist(),
        "query_gains": trajectory.stack("query_gain").tolist(),
        "model_gains": trajectory.stack("model_gain").tolist(),
        # Rounding may lift a certain draw above 1 in the last digit.
        "selection_probabilities": trajectory.stack("selection_probabilities").clamp(max=1.0).tolist(),
        "pair_numbers": trajectory.memory.pair_numbers.tolist(),
    }
    orders = trajectory.memory.pair_numbers.gather(1, trajectory.stack("selected_index")).tolist()
    if trajectory.steps[0].order_gain is not None:
        columns["order_gains"] = trajectory.stack("order_gain").tolist()
    if trajectory.steps[0].information_gain is not None:
        columns["information_gains"] = trajectory.stack("information_gain").tolist()
    rewards, episodes, kept = trajectory.avg_reward.tolist(), trajectory.episodes.tolist(), verdict.keep.tolist()
    names: list[VerdictName] = [
        "warmup" if verdict.is_warmup else "kept" if is_kept else "below_threshold" for is_kept in kept
    ]
    token_gains = _token_gains(trajectory, encoder)
    # Each from the device once, and not for every text.
    tokens = {
        "queries": [item.query_tokens.cpu() for item in trajectory.steps],
        "keys": [item.selected_pair.key_tokens.cpu() for item in trajectory.steps],
        "values": [item.selected_pair.value_tokens.cpu() for item in trajectory.steps],
    }
    rows = []
    for row, article in enumerate(batch.articles):
        texts = {name: [encoder.decode(step_tokens[row]) for step_tokens in steps] for name, steps in tokens.items()}
        record: dict[str, object] = {
            "episode": episodes[row],
            "step": step,
            "epoch": article.epoch,
            "article_index": article.article_index,
            "title": article.title,
            "source": article.source,
            "order": orders[row],
            "reward": rewards[row],
            "order_gains": None,
            "history_mean": verdict.history.mean if verdict.history.count else None,
            "history_std": verdict.history.std if verdict.history.count else None,
            "threshold": verdict.threshold,
            "verdict": names[row],
            "token_gains": None if token_gains is None else [step[row] for step in token_gains],
        }
        rows.append(LedgerRow.from_json(record | texts | {name: values[row] for name, values in columns.items()}))
    return rows


def _token_gains(trajectory: Trajectory, encoder: PlainTextEncoder) -> list[list[list[tuple[str, float]]]] | None:
    """Each step's values, ``[B]``, by their tokens, with what each gained; ``None`` where it was not measured."""
    steps = []
    for step in trajectory.steps:
        if step.value_token_gains is None:
            return None
        values = zip(step.selected_pair.value_tokens.tolist(), step.value_token_gains.tolist(), strict=True)
        # Four digits: the gains are there to be looked at.
        steps.append(
            [
                [
                    (encoder.decode([token]), round(gain, 4))
                    for token, gain in zip(*value, strict=True)
                    if token != PADDING
                ]
                for value in values
            ]
        )
    return steps
