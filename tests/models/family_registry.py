"""What becomes of a causal language model's family here: exact, or refused and why; by tiny models, in process.

    python tests/models/family_registry.py        # writes docs/families.md

A family is exact when a rollout's every log-probability, the query vectors and the gradient of an update are those of
plain forwards of the wrapped model, which use neither a cache nor a hook nor a split into backbone and head.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from peft import PeftModel
from tiny import make_environment, random_batch
from tiny_families import MODEL_TYPES, UNBUILDABLE, VARIANTS, build
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from attention_rl_trainer.models.adapters import add_adapter
from attention_rl_trainer.models.attention import find_decoder_layers
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.models.projections import UnsupportedArchitectureError
from attention_rl_trainer.models.trial import expect_trainable
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.sampler import RolloutOptions, TrajectorySampler
from attention_rl_trainer.types import Trajectory
from attention_rl_trainer.update.agreement import RolloutDisagreementError, compare
from attention_rl_trainer.update.filter import RewardStatistics, Verdict
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.objective import compute_loss_terms
from attention_rl_trainer.update.previous_adapter import AdapterSnapshot

FIRST_ID, LAST_ID = 3, 380
ROWS = 3
LARGEST_DIFFERENCE = 2e-3
"""Of log-probabilities in nats, and of gradients and vectors relative to their norm, in float32."""


@dataclass(frozen=True)
class Status:
    """What becomes of a family."""

    kind: str
    """``exact``, ``refused``, ``not built``, and what must not occur: ``wrong``, ``crash``."""
    note: str = ""
    """Why it is refused, what is wrong, or for exact ones what is special."""


def examine(name: str) -> Status:
    """Take a tiny model of a type or variant through everything that a run asks of it.

    Where its last layer has no attention that selects, with one that has.
    """
    if name in UNBUILDABLE:
        return Status("not built", UNBUILDABLE[name])
    status = _examine_layer(name, -1)
    others = re.search(r"set attention_layer to one that has: .*?(\d+)$", status.note)
    if others is None:
        return status
    layer = int(others.group(1))
    status = _examine_layer(name, layer)
    return Status(status.kind, f"with attention_layer={layer}: {status.note}")


def _examine_layer(name: str, attention_layer: int) -> Status:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(name)
        try:
            return _examine(model, attention_layer)
        except (UnsupportedArchitectureError, RolloutDisagreementError) as error:
            return Status("refused", str(error))
        except Exception as error:
            return Status("crash", f"{type(error).__name__}: {error}")


def _examine(model: PreTrainedModel, attention_layer: int) -> Status:
    peft_model = add_adapter(model, None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    allowed = torch.arange(FIRST_ID, LAST_ID)
    policy = PolicyModel(peft_model, allowed, PolicyOptions(attention_layer=attention_layer))
    expect_trainable(policy, through_choice=True)
    options = RolloutOptions(num_steps=3, tokens_per_query=4, subset_fraction=1.0)
    separators = Separators((5, 6), (7, 8))
    environment = make_environment(temperature=0.2)
    sampler = TrajectorySampler(policy, environment, separators, options, seed=7)
    trajectory = sampler.sample(random_batch(ROWS), range(ROWS))
    peft_model.train()
    compare(policy, peft_model, trajectory, [torch.arange(ROWS)])
    worst = _differences(peft_model, trajectory, allowed)
    worst |= _gradient_difference(policy, trajectory, environment, allowed)
    worst |= _vector_difference(policy, attention_layer)
    wrong = {what: round(size, 5) for what, size in worst.items() if not size <= LARGEST_DIFFERENCE}
    if wrong:
        return Status("wrong", str(wrong))
    return Status("exact", "policy and reference in one batch" if policy.can_read_jointly else "one after the other")


def _allowed_logprobs(model: PeftModel, token_ids: Tensor, allowed: Tensor) -> Tensor:
    return torch.log_softmax(model(input_ids=token_ids, use_cache=False).logits[..., allowed].float(), dim=-1)


def _differences(model: PeftModel, trajectory: Trajectory, allowed: Tensor) -> dict[str, float]:
    """Every log-probability of a rollout against plain forwards."""
    ids, query_length = trajectory.token_ids, trajectory.steps[0].query_tokens.shape[1]
    value_length = trajectory.steps[0].selected_pair.value_tokens.shape[1]
    worst = dict.fromkeys(("query", "policy value", "base value", "counterfactual value"), 0.0)

    def note(what: str, ours: Tensor, expected: Tensor) -> None:
        worst[what] = max(worst[what], (ours - expected).abs().max().item())

    def value_logprob(tokens: Tensor, start: int) -> Tensor:
        logprobs = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), dim=-1)
        value = tokens[:, start : start + value_length]
        return logprobs[:, start - 1 : start + value_length - 1].gather(2, value[..., None]).squeeze(2).mean(1)

    model.eval()
    with torch.no_grad():
        for number, step in enumerate(trajectory.steps):
            query, value = trajectory.query_starts[number], trajectory.value_starts[number]
            upto = ids[:, : value + value_length]
            logprobs = _allowed_logprobs(model, ids[:, : query + query_length - 1], allowed)[:, query - 1 :]
            index = torch.searchsorted(allowed, step.query_tokens)
            note("query", step.query_logprobs, logprobs.gather(2, index[..., None]).squeeze(2))
            note("policy value", step.policy_value_logprob, value_logprob(upto, value))
            with model.disable_adapter():
                note("base value", step.base_value_logprob, value_logprob(upto, value))
                other = upto.clone()
                other[:, query : query + query_length] = step.counterfactual_tokens
                note("counterfactual value", step.counterfactual_value_logprob, value_logprob(other, value))
    return worst


def _gradient_difference(
    policy: PolicyModel, trajectory: Trajectory, environment: Any, allowed: Tensor
) -> dict[str, float]:
    """The gradient of REINFORCE against autograd through the wrapped model's own logits."""
    model = policy.model
    verdict = Verdict(torch.ones(ROWS, dtype=torch.bool), RewardStatistics(), RewardStatistics())
    kept = KeptTrajectories.of(trajectory, verdict, LossOptions(), num_trajectories=ROWS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    terms = compute_loss_terms(policy, model, environment, AdapterSnapshot(model), kept, LossOptions(beta=0.0))
    ours = torch.autograd.grad(terms.loss, trained, allow_unused=True, materialize_grads=True)
    model.eval()
    logprobs = _allowed_logprobs(model, kept.token_ids, allowed)
    loss = torch.zeros(())
    for number, start in enumerate(kept.query_starts):
        tokens = kept.token_ids[:, start : start + kept.query_length]
        index = torch.searchsorted(allowed, tokens)[..., None]
        chosen = logprobs[:, start - 1 : start - 1 + kept.query_length].gather(2, index).squeeze(2).sum(1)
        loss = loss - (chosen * kept.advantages[:, number]).sum() / ROWS
    expected = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    ours_flat, expected_flat = (torch.cat([part.flatten() for part in parts]) for parts in (ours, expected))
    return {"gradient": ((ours_flat - expected_flat).norm() / expected_flat.norm()).item()}


PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


class _Recorder:
    """An attention function that computes as "sdpa" and keeps what it was given."""

    def __init__(self) -> None:
        self.received: list[tuple[nn.Module, Tensor, Tensor]] = []

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        self.received.append((module, query, key))
        options.pop("softcap", None)
        return sdpa_attention_forward(module, query, key, value, *args, **options)


def _vector_difference(policy: PolicyModel, attention_layer: int) -> dict[str, float]:
    """Query and key heads against what the layer compares at position 0, up to a factor.

    Where the layer calls no exchangeable attention function, the attention that it returns says what it has compared.
    """
    model, config = policy.causal_lm, policy.causal_lm.config.get_text_config()
    recorder, ids = _Recorder(), torch.arange(20, 29)[:, None]
    AttentionInterface.register("registry_recorder", recorder)
    AttentionMaskInterface.register("registry_recorder", sdpa_mask)
    layer = find_decoder_layers(model)[attention_layer]
    previous, config._attn_implementation = config._attn_implementation, "registry_recorder"
    model.eval()
    try:
        with torch.no_grad(), policy.attention.capture_queries() as queries, policy.attention.capture_keys() as keys:
            model(input_ids=ids, use_cache=False)
    finally:
        config._attn_implementation = previous
    of_layer = [entry for entry in recorder.received if any(entry[0] is module for module in layer.modules())]
    if of_layer:
        _, query, key = of_layer[-1]
        ours = keys.heads().repeat_interleave(key.shape[1] // keys.heads().shape[2], dim=2)
        return {
            "query vector": _up_to_a_factor(queries.heads(), query.transpose(1, 2)),
            "key vector": _up_to_a_factor(ours, key.transpose(1, 2)),
        }
    return {"attention": _attention_difference(policy, attention_layer)}


def _attention_difference(policy: PolicyModel, attention_layer: int) -> float:
    model, ids = policy.causal_lm, torch.arange(20, 35).view(3, 5)
    config = model.config.get_text_config()
    options: dict[str, Any] = {"output_attentions": True, "use_cache": False}
    if "rotary_dim" in config.to_dict():
        # With a mask, or positions that do not grow are taken for several texts.
        options |= {"position_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    previous, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with torch.no_grad(), policy.attention.capture_queries() as queries, policy.attention.capture_keys() as keys:
            attention = model(input_ids=ids, **options).attentions[attention_layer]
    finally:
        config._attn_implementation = previous
    query, key = queries.heads()[:, -1], keys.heads()  # [B, H, D] and [B, S, G, D]
    key = key.repeat_interleave(query.shape[1] // key.shape[2], dim=2)
    scores = torch.einsum("bhd,bshd->bhs", query, key)
    compared = attention[:, :, -1].log()
    return _up_to_a_factor(scores - scores.mean(-1, keepdim=True), compared - compared.mean(-1, keepdim=True))


def _up_to_a_factor(ours: Tensor, expected: Tensor) -> float:
    factor = (ours * expected).sum() / ours.square().sum()
    return ((factor * ours - expected).norm() / expected.norm()).item()


_INTRODUCTION = """\
# Model families

What becomes of each causal language model type that transformers {version} builds, found by a tiny random model of it:

- **exact**: every log-probability of a rollout, and the gradient of an update, are those of plain forwards of the model
  (differences below {difference} in float32), and the query and key vectors are what the attention layer compares.
  Policy and reference read in one batch where that is proved equal, else one after the other.
- **refused**: an error that says why, when the trainer is made or, where the cache does not continue a forward, at the
  first rollout.
- **not built**: no tiny model could be made.

A name with a `+` is a type with other options than its default ones. `tests/models/family_registry.py` writes this
page, and a slow test compares it: {counts}.

| type | here | note |
| --- | --- | --- |
"""


def render(statuses: Mapping[str, Status]) -> str:
    """Write the page."""
    counts = Counter(status.kind for status in statuses.values())
    head = _INTRODUCTION.format(
        version=transformers.__version__,
        difference=LARGEST_DIFFERENCE,
        counts=", ".join(f"{count} {kind}" for kind, count in counts.most_common()),
    )
    return head + "".join(f"| `{name}` | {item.kind} | {_short(item.note)} |\n" for name, item in statuses.items())


def _short(note: str) -> str:
    """Leave out what every message of its kind says, and numbers that depend on the processor."""
    note = re.split(r"; supported are|; use another base model| \(query tokens: ", note)[0]
    return " ".join(note.split()).replace("|", "\\|")[:200]


def examine_all() -> dict[str, Status]:
    """Examine every type and every variant."""
    return {name: examine(name) for name in (*MODEL_TYPES, *VARIANTS)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(render(examine_all()), encoding="utf-8")
