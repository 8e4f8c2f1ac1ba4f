"""Whether a rollout and the update's forward compute alike (design §9).

A rollout decodes from a cache, policy and reference in one batch where that is possible; the update reads whole
trajectories at once. REINFORCE takes it for granted that both give a query the same probability under the same weights.
An architecture whose cache does not continue a forward, randomness that is left on, or an adapter that acts on other
rows than the policy's would train on wrong numbers without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention_rl_trainer.models.modes import update_mode
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.projections import described
from attention_rl_trainer.rollout.layout import positions
from attention_rl_trainer.rollout.reward import value_logprob
from attention_rl_trainer.types import Trajectory

# Mean absolute difference in nats, by the precision of the weights.
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_OF_SHORTER = 0.15
_CHECKED_UPDATES = 2


class RolloutDisagreementError(ValueError):
    """Rollout and update do not compute alike; says by how much, and what may be the cause."""


@dataclass(frozen=True)
class Disagreement:
    """How much log-probabilities of a rollout differ from those of the update's forward, nats."""

    mean: float
    """Of the absolute differences."""
    largest: float


class RolloutAgreement:
    """Holds rollouts against the update's forward, at the start of a run or of its resumption.

    Args:
        batch_size: trajectories in one forward.
    """

    def __init__(self, policy: PolicyModel, batch_size: int) -> None:
        self._policy = policy
        self._batch_size = batch_size
        self._rolled_out = False
        self._updates: set[int] = set()

    def expect(self, model: nn.Module, trajectories: Trajectory, keep: Tensor, num_updates: int) -> None:
        """Compare the first rollout batch, and the kept trajectories of the first two updates.

        Two, because the first finds a new adapter as it was made, without any effect.

        Args:
            model: the policy's model as the trainer wrapped it.
            keep: ``[B]`` bool.
            num_updates: those that were made before.

        Raises:
            RolloutDisagreementError: a log-probability differs by more than rounding explains.
        """
        rows = keep.nonzero().squeeze(1)
        if len(rows) > 0 and len(self._updates | {num_updates}) <= _CHECKED_UPDATES:
            self._updates.add(num_updates)
        elif self._rolled_out:
            return
        else:
            rows = torch.arange(min(self._batch_size, len(keep)), device=keep.device)
        self._rolled_out = True
        compare(self._policy, model, trajectories, torch.split(rows, self._batch_size))


def compare(
    policy: PolicyModel, model: nn.Module, trajectories: Trajectory, batches: Sequence[Tensor]
) -> dict[str, Disagreement]:
    """Compare the log-probabilities of a rollout with those of whole forwards over its trajectories.

    Args:
        batches: rows of the trajectories, int64, for one forward each.

    Raises:
        RolloutDisagreementError: see `RolloutAgreement.expect`.
    """
    rolled_out = {
        "query tokens": trajectories.stack("query_logprobs"),
        "values under the policy": trajectories.stack("policy_value_logprob"),
        "values under the base model": trajectories.stack("base_value_logprob"),
    }
    differences: dict[str, list[Tensor]] = {name: [] for name in rolled_out}
    for rows in batches:
        for name, logprobs in _of_whole_forwards(policy, model, trajectories, rows).items():
            difference = logprobs.view(rolled_out[name][rows].shape) - rolled_out[name][rows]
            differences[name].append(difference.flatten().abs())
    found = {name: torch.cat(parts) for name, parts in differences.items()}
    result = {name: Disagreement(part.mean().item(), part.max().item()) for name, part in found.items()}
    tolerance = _TOLERANCES.get(policy.causal_lm.dtype, _TOLERANCE_OF_SHORTER)
    if any(item.mean > tolerance for item in result.values()):
        raise RolloutDisagreementError(_message(policy, result, tolerance))
    return result


@torch.no_grad()
def _of_whole_forwards(
    policy: PolicyModel, model: nn.Module, trajectories: Trajectory, rows: Tensor
) -> dict[str, Tensor]:
    token_ids, padded = trajectories.token_ids[rows], trajectories.memory.is_padded
    first = trajectories.steps[0]
    queries = positions(trajectories.query_starts, first.query_tokens.shape[1], token_ids.device)
    values = positions(trajectories.value_starts, first.selected_pair.value_tokens.shape[1], token_ids.device)
    with update_mode(policy.model):
        hidden, _ = policy.training_forward(model, token_ids, capture_queries=False, padded=padded)
        with policy.reference():
            base_hidden = policy.forward(token_ids, padded=padded)

    def score_values(states: Tensor) -> Tensor:
        tokens = token_ids[:, values]
        logprobs = policy.token_logprobs(states[:, values - 1], tokens)
        by_step = (len(trajectories.value_starts), -1)
        return value_logprob(torch.unflatten(logprobs, 1, by_step), torch.unflatten(tokens, 1, by_step))

    return {
        "query tokens": policy.query_token_logprobs(hidden[:, queries - 1], token_ids[:, queries]),
        "values under the policy": score_values(hidden),
        "values under the base model": score_values(base_hidden),
    }


def _message(policy: PolicyModel, found: Mapping[str, Disagreement], tolerance: float) -> str:
    numbers = "; ".join(
        f"{what}: {item.mean:.3g} on average, {item.largest:.3g} at most" for what, item in found.items()
    )
    name = described(policy.causal_lm)
    if found["values under the base model"].mean > tolerance:
        causes = (
            f"the base model itself differs, so the cache of {name} does not continue a forward: recurrent layers, or "
            "rotary embeddings that are scaled by the length of the text (longrope: keep a trajectory on one side of "
            "original_max_position_embeddings), or its forward is random. Use another base model"
        )
    else:
        causes = (
            f"the base model agrees, so it is the adapter or the update's own forward: layers of {name} that see "
            "tokens without their rows (set joint_reading to false, or target the attention alone), randomness in "
            "train mode, or weights that were changed since the rollout"
        )
    return (
        "the rollout and the update do not compute alike: under the same weights the log-probabilities in nats differ "
        f"({numbers}), by at most {tolerance:g} on average where all is well. Likely causes: {causes}"
    )
