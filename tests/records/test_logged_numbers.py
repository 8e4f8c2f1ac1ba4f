"""Every number that a run logs, computed again: from its ledger, its checkpoints, and a plain copy of the model."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY_SIZE, tiny_trainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from attention_rl_trainer.memories.tokenization import allowed_token_ids
from attention_rl_trainer.records.ledger import LedgerRow, read_ledger
from attention_rl_trainer.records.progress import load_parts
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
from attention_rl_trainer.types import Trajectory

BATCH = 5
MEASURED = {"rollout_seconds", "update_seconds", "tokens_per_second", "peak_memory_gib"}
Weights = dict[str, Tensor]


@dataclass
class Step:
    """What a plain implementation finds for one step of the Trainer."""

    loss: float = 0.0
    policy_loss: float = 0.0
    kl: float = 0.0
    """Summed over the query tokens of kept trajectories, and over the optimizer steps."""
    num_tokens: int = 0
    grad_norm: float = 0.0


class Watch(TrainerCallback):
    """Keeps the adapter before each step, and the trajectories of each rollout batch."""

    def __init__(self, trainer: AttentionGuidedRLTrainer) -> None:
        self.trainer = trainer
        self.adapters: list[Weights] = []
        self.batches: list[list[Trajectory]] = []
        sample = trainer.sampler.sample

        def watched(*arguments: Any) -> Trajectory:
            trajectory = sample(*arguments)
            self.batches[-1].append(trajectory)
            return trajectory

        trainer.sampler.sample = watched  # type: ignore[method-assign]
        trainer.add_callback(self)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.adapters.append(adapter_of(self.trainer.policy.model))
        self.batches.append([])


def adapter_of(model: Any) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class PlainUpdate:
    """Updates of an adapter by autograd over whole logits and plain SGD."""

    def __init__(self, trainer: AttentionGuidedRLTrainer, tokenizer: PreTrainedTokenizerFast) -> None:
        self.args = trainer.args
        self.model = copy.deepcopy(trainer.policy.model).eval()
        self.allowed = allowed_token_ids(tokenizer, VOCABULARY_SIZE)
        self.previous = adapter_of(self.model)

    def put(self, weights: Weights) -> None:
        for name, parameter in self.model.named_parameters():
            if name in weights:
                parameter.data = weights[name].clone()

    def log_probabilities(self, token_ids: Tensor, places: Sequence[int]) -> Tensor:
        """Of all allowed tokens, at the positions that predict the places."""
        logits = self.model(input_ids=token_ids).logits[:, [place - 1 for place in places]]
        return (logits[..., self.allowed] / self.args.query_temperature).log_softmax(dim=-1)

    def projections(self, name: str, token_ids: Tensor) -> Tensor:
        """What the last layer's projection of this name gives, ``[B, S, heads · D]``."""
        (*_, module) = [part for path, part in self.model.named_modules() if path.endswith(f".{name}")]
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
        with torch.no_grad():
            self.model(input_ids=token_ids)
        handle.remove()
        return seen[0]

    def step(self, adapter: Weights, batches: Sequence[Trajectory], rows: Mapping[int, LedgerRow]) -> Step:
        found, present = Step(), dict(adapter)
        num_trajectories = sum(len(batch.avg_reward) for batch in batches)
        for _ in range(self.args.num_iterations):
            self.put(present)
            policy, kl, num_tokens = torch.zeros(()), torch.zeros(()), 0
            for batch in batches:
                places = [start + n for start in batch.query_starts for n in range(self.args.tokens_per_query)]
                for number, episode in enumerate(batch.episodes.tolist()):
                    row = rows[episode]
                    if row.verdict != "kept":
                        continue
                    token_ids = batch.token_ids[number][None]
                    index = torch.searchsorted(self.allowed, token_ids[0, places])
                    self.put(self.previous)
                    with torch.no_grad():
                        before = self.log_probabilities(token_ids, places)[0]
                    self.put(present)
                    now = self.log_probabilities(token_ids, places)[0]
                    logprobs = now.gather(1, index[:, None])[:, 0]
                    assert row.history_mean is not None
                    advantage = row.reward - row.history_mean
                    if self.args.num_iterations == 1:
                        terms = -advantage * logprobs
                    else:
                        ratio = (logprobs - batch.stack("query_logprobs")[number].flatten()).exp()
                        clipped = ratio.clamp(1 - self.args.epsilon, 1 + self.args.epsilon)
                        terms = -torch.minimum(ratio * advantage, clipped * advantage)
                    policy = policy + terms.sum() / num_trajectories
                    kl = kl + (before.exp() * (before - now)).sum()
                    num_tokens += len(places)
            if num_tokens == 0:
                return found
            loss = policy + self.args.beta * kl / num_trajectories
            self.model.zero_grad()
            loss.backward()
            gradient = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
            norm = math.sqrt(sum(g.double().square().sum().item() for g in gradient.values() if g is not None))
            self.previous = present
            scale = self.args.learning_rate * min(1.0, self.args.max_grad_norm / (norm + 1e-6))
            present = {name: present[name] - scale * g for name, g in gradient.items() if g is not None}
            found.loss += loss.item() / self.args.num_iterations
            found.policy_loss += policy.item() / self.args.num_iterations
            found.kl += kl.item()
            found.num_tokens += num_tokens
            found.grad_norm = norm
        return found


def selector(rows: Sequence[LedgerRow]) -> dict[str, float]:
    entropies, largest = [], []
    for row in rows:
        for probabilities in row.selection_probabilities:
            entropies.append(-math.fsum(p * math.log(p) for p in probabilities if p > 0))
            largest.append(max(probabilities))
    return {"selector_entropy": statistics.fmean(entropies), "selector_max": statistics.fmean(largest)}


def softmax(scores: Sequence[float]) -> list[float]:
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / math.fsum(weights) for weight in weights]


def entropy_of(probabilities: Sequence[float]) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def information(plain: PlainUpdate, adapter: Weights, batch: Trajectory) -> list[float]:
    """How much of each draw depends on the query: every memory is asked with every query of its batch.

    Vectors are taken from whole forwards; the tiny Llama has 4 heads of 8 in 2 groups, of which the last layer selects.
    """
    plain.put(adapter)
    found = []
    query_rows = plain.projections("q_proj", batch.token_ids)
    with plain.model.disable_adapter():
        keys = [plain.projections("k_proj", memory).mean(dim=1).tolist() for memory in batch.memory.key_tokens]
    for step, start in enumerate(batch.query_starts):
        asked = query_rows[:, start : start + plain.args.tokens_per_query].mean(dim=1).tolist()
        for row, memory in enumerate(keys):
            read = [int(earlier.selected_index[row]) for earlier in batch.steps[:step]]
            unread = [key for number, key in enumerate(memory) if number not in read]
            choices = []
            for query in asked:
                of_heads = []
                for head in range(4):
                    q, group = query[8 * head :][:8], head // 2
                    pairs = [zip(q, key[8 * group :][:8], strict=True) for key in unread]
                    of_heads.append(softmax([math.fsum(a * b for a, b in pair) / math.sqrt(8) for pair in pairs]))
                choices.append([statistics.fmean(column) for column in zip(*of_heads, strict=True)])
            mean = [statistics.fmean(column) for column in zip(*choices, strict=True)]
            found.append(entropy_of(mean) - statistics.fmean(map(entropy_of, choices)))
    return found


def num_different(batches: Sequence[Trajectory]) -> float:
    return statistics.fmean(
        len({tuple(query) for query in queries})
        for batch in batches
        for queries in batch.stack("query_tokens").tolist()
    )


def diversity(batch: Trajectory) -> float:
    entropies = []
    for step in batch.steps:
        counts = Counter(map(tuple, step.query_tokens.tolist()))
        entropies.append(entropy_of([count / counts.total() for count in counts.values()]))
    return statistics.fmean(entropies)


def repetition(batches: Sequence[Trajectory]) -> float:
    shares = []
    for batch in batches:
        for queries in batch.stack("query_tokens").tolist():
            shares += [sum(t in query[:n] for n, t in enumerate(query)) / len(query) for query in queries]
    return statistics.fmean(shares)


def query_entropy(plain: PlainUpdate, adapter: Weights, batches: Sequence[Trajectory]) -> list[float]:
    """Of every query token, when it was drawn."""
    plain.put(adapter)
    found: list[float] = []
    for batch in batches:
        places = [start + n for start in batch.query_starts for n in range(plain.args.tokens_per_query)]
        with torch.no_grad():
            logprobs = plain.log_probabilities(batch.token_ids, places)
        found += (-(logprobs.exp() * logprobs).sum(dim=-1)).flatten().tolist()
    return found


def of_interval(rows: Sequence[LedgerRow]) -> dict[str, float]:
    rewards = [row.reward for row in rows]
    kept = sum(row.verdict == "kept" for row in rows)
    return {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "reward_max": max(rewards),
        "query_gain": statistics.fmean(row.query_gain for row in rows),
        "model_gain": statistics.fmean(row.model_gain for row in rows),
        "kept_fraction": kept / len(rows),
        "kept_trajectories": kept,
        "episodes": rows[-1].episode + 1,
        **selector(rows),
        **({"threshold": rows[-1].threshold} if rows[-1].threshold is not None else {}),
        **(
            {"order_gain": statistics.fmean(g for row in rows for g in row.order_gains or ())}
            if rows[0].order_gains is not None
            else {}
        ),
    }


def expected_entries(
    trainer: AttentionGuidedRLTrainer, watch: Watch, plain: PlainUpdate, steps: Sequence[Step], logs: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """What is to be logged at the steps of some logs."""
    args, ledger = trainer.args, read_ledger(trainer.recorder.ledger.path)
    for before, last in itertools.pairwise([0, *logs]):
        numbers = range(before + 1, last + 1)
        found = [steps[number - 1] for number in numbers]
        batches = [watch.batches[number - 1] for number in numbers]
        rows = [row for row in ledger if row.step in numbers]
        entropies = [query_entropy(plain, watch.adapters[n - 1], watch.batches[n - 1]) for n in numbers]
        state = load_parts(Path(args.output_dir) / f"checkpoint-{last}")
        history = [row.reward for row in ledger if row.step <= last]
        assert state["filter"]["count"] == state["progress"]["num_episodes"] == len(history)
        entry: dict[str, Any] = {
            "loss": statistics.fmean(step.loss for step in found),
            "grad_norm": found[-1].grad_norm,
            "learning_rate": args.learning_rate,
            **of_interval(rows),
            "history_mean": statistics.fmean(history),
            "history_std": statistics.pstdev(history),
            "query_entropy": statistics.fmean(itertools.chain(*entropies)),
            "query_repetition": repetition(list(itertools.chain(*batches))),
            "query_diversity": math.fsum(
                len(batch.avg_reward) * diversity(batch) for batch in itertools.chain(*batches)
            )
            / len(rows),
            "distinct_queries": num_different(list(itertools.chain(*batches))),
            "skipped_articles": sum(state["progress"]["skipped"].values()),
            "updates": state["updater"]["num_updates"],
            "tokens": sum(batch.forward_tokens for batch in itertools.chain(*batches)),
            "epoch": last / len(steps),
            "step": last,
        }
        # One trajectory alone shows nothing.
        heard = [
            information(plain, watch.adapters[n - 1], batch)
            for n in numbers
            for batch in watch.batches[n - 1]
            if len(batch.avg_reward) > 1
        ]
        entry["selection_information"] = statistics.fmean(itertools.chain(*heard))
        entry["query_bound"] = entry["selection_information"] / args.tokens_per_value
        num_tokens = sum(step.num_tokens for step in found)
        if num_tokens:
            entry["policy_loss"] = statistics.fmean(step.policy_loss for step in found)
            if args.beta > 0:
                entry["kl"] = sum(step.kl for step in found) / num_tokens
        yield entry


OPTIONS: dict[str, Any] = {
    "generation_batch_size": BATCH,
    "training_batch_size": 2,
    "filter_threshold": 0.0,
    "warmup_episodes": 4,
    "optim": "sgd",
    "learning_rate": 0.3,
    "save_episodes": 1,
}
EVERYTHING: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "num_iterations": 3,
    "logging_steps": 2,
    "filter_threshold": 0.8,
    "num_episodes": 36,
    "order_coef": 0.1,
}
SETTINGS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "no KL": ({"beta": 0.0, "num_episodes": 18, "logging_steps": 2}, [2, 4]),
    "all at once": (EVERYTHING, [2, 4]),
    "three steps between two logs": ({"logging_steps": 3, "num_episodes": 28}, [3, 6]),
    "each step": ({"num_episodes": 18}, [1, 2, 3, 4]),
    # The last update has a batch of two and an empty one.
    "two batches": ({"gradient_accumulation_steps": 2, "num_episodes": 32}, [1, 2, 3, 4]),
    "three optimizer steps on a batch": ({"num_iterations": 3, "num_episodes": 18}, [1, 2, 3, 4]),
    "the first step apart": ({"logging_first_step": True, "logging_steps": 3, "num_episodes": 30}, [1, 3, 6]),
    "three optimizer steps on two batches, the last of them empty": (
        {"num_iterations": 3, "gradient_accumulation_steps": 2, "num_episodes": 24},
        [1, 2, 3],
    ),
    "no clipping": ({"max_grad_norm": 0.0, "num_episodes": 18, "logging_steps": 4}, [4]),
}
# Members of the same kinds as those above them.
SLOW = list(SETTINGS)[2:]


def logged_of(trainer: AttentionGuidedRLTrainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SETTINGS]
)
def test_every_logged_number_can_be_computed_again(
    name: str, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    options, logs = SETTINGS[name]
    trainer = tiny_trainer(tmp_path, [*texts[:12], "too short"], tokenizer, **OPTIONS | options)
    plain, watch = PlainUpdate(trainer, tokenizer), Watch(trainer)
    output = trainer.train()
    ledger = read_ledger(trainer.recorder.ledger.path)
    assert {row.verdict == "kept" for row in ledger} == {True, False}
    by_episode = {row.episode: row for row in ledger}
    steps = [plain.step(*item, by_episode) for item in zip(watch.adapters, watch.batches, strict=True)]
    assert [entry["step"] for entry in logged_of(trainer)] == logs
    for entry, computed in zip(logged_of(trainer), expected_entries(trainer, watch, plain, steps, logs), strict=True):
        entry["tokens"] = entry["tokens_per_second"] * entry["rollout_seconds"]
        assert set(entry) - MEASURED == set(computed)
        assert {key: entry[key] for key in computed} == pytest.approx(computed, rel=2e-4, abs=2e-6)
    totals = trainer.state.log_history[-1]
    assert totals["train_loss"] == output.training_loss
    assert totals["train_loss"] == pytest.approx(statistics.fmean(step.loss for step in steps), rel=2e-4, abs=2e-6)
    assert totals["train_samples_per_second"] * totals["train_runtime"] == pytest.approx(len(ledger), rel=0.01)
    assert totals["train_steps_per_second"] * totals["train_runtime"] == pytest.approx(len(steps), rel=0.01)
    names = {"train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch", "step"}
    assert set(totals) == names


@pytest.mark.slow
def test_a_resumed_run_logs_the_same(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """From a checkpoint between two logs."""
    options = OPTIONS | EVERYTHING | {"logging_steps": 3, "num_episodes": 30}
    whole = tiny_trainer(tmp_path / "whole", texts, tokenizer, **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "run" / "checkpoint-2", tmp_path / "part" / "run" / "checkpoint-2")
    resumed = tiny_trainer(tmp_path / "part", texts, tokenizer, **options)
    resumed.train(resume_from_checkpoint=True)
    logged = [[{k: v for k, v in e.items() if k not in MEASURED} for e in logged_of(t)] for t in (whole, resumed)]
    assert logged[0] == logged[1]
    assert len(logged[0]) == 1
    totals = resumed.state.log_history[-1]
    assert totals["train_loss"] == whole.state.log_history[-1]["train_loss"]
    assert totals["train_samples_per_second"] * totals["train_runtime"] == pytest.approx(10, rel=0.01)
