"""Sizes into bytes: what is in memory in each phase of a step, part by part, and the largest run that fits.

The formulas follow the tensors that are alive, not a fit. Per token and layer, in numbers unless bytes are said, with
e bytes a number, Q = H · D and U = G · D:

* **Saved for the backward** (`saved_bytes_per_token`), base weights frozen, LoRA in float32 on the attention
  projections: the input of either norm (float32 for an RMS norm) with its statistics; each projection's input in
  float32 for LoRA's A, one copy for each projection where weights are narrower, one for all where not; A's output;
  queries, keys, values and the attention's output, with a float32 log-sum for each head; and of the MLP what frozen
  matrices still need: gate, activation and up (3 I), or the four steps of GPT-2's activation (4 I).
* **Alive in a forward without gradient**: 4 C + 3 I (4 I) in the MLP: the embeddings, the layer's input, the residual
  stream and its norm stay referenced; or, in a projection, 3 C + Q and LoRA's part in float32, whichever is more.
* **Alive in the backward beside what was saved**: three gradients of I and one of C; with activation
  checkpointing only the layers' inputs were saved, and one layer's share is computed again.

What a device keeps for itself (context, kernels, fragments) is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from attention_rl_trainer.models.grouped_attention import rows_at_once
from attention_rl_trainer.planning.sizes import ModelShape, RunShape
from attention_rl_trainer.rollout.branch_values import rows_read_together
from attention_rl_trainer.rollout.groups import other_tokens
from attention_rl_trainer.rollout.information import MAX_TREE_TOKENS, unread_tokens

GIBIBYTE = 2**30
# Float32 copies of the logits that are alive at once. Drawing a token: log-probabilities, probabilities, the same in
# float64, and their float64 sums. Scoring: logits and log-probabilities. Loss: both models' log-probabilities,
# exp(previous), the difference, and the product.
_DRAWING_COPIES = 6
_SCORING_COPIES = 2
_LOSS_COPIES = 5


class Phase(StrEnum):
    """Moments of a step between which memory differs."""

    KEYS = "key embedding"
    PREFILL = "prefill"
    DECODE = "decoding"
    READ = "reading"
    SCORE = "scoring"
    LOSS = "loss"
    BACKWARD = "backward"


ROLLOUT_PHASES = (Phase.KEYS, Phase.PREFILL, Phase.DECODE, Phase.READ, Phase.SCORE)
UPDATE_PHASES = (Phase.LOSS, Phase.BACKWARD)
_CACHED_PHASES = ROLLOUT_PHASES[1:]


@dataclass(frozen=True)
class MemoryPart:
    """One thing that is in memory."""

    name: str
    num_bytes: int
    phases: tuple[Phase, ...]
    """When it is there."""
    remedy: str
    """What makes it smaller."""
    is_loaded: bool = False
    """Whether it is there before the first step."""


@dataclass(frozen=True)
class MemoryPlan:
    """What is in memory during a step."""

    parts: tuple[MemoryPart, ...]

    def parts_in(self, phase: Phase) -> tuple[MemoryPart, ...]:
        """List the parts that are there in a phase."""
        return tuple(part for part in self.parts if phase in part.phases)

    def phase_bytes(self, phase: Phase) -> int:
        """Sum the parts of a phase."""
        return sum(part.num_bytes for part in self.parts_in(phase))

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs the most."""
        return max(Phase, key=self.phase_bytes)

    @property
    def peak_bytes(self) -> int:
        """What it needs."""
        return self.phase_bytes(self.peak_phase)

    @property
    def loaded_bytes(self) -> int:
        """What is there before the first step: weights, adapter and previous adapter."""
        return sum(part.num_bytes for part in self.parts if part.is_loaded)


def saved_bytes_per_token(shape: ModelShape, run: RunShape) -> int:
    """Count the bytes that a layer keeps of each token for the backward, without activation checkpointing."""
    number, hidden, query, key = run.bytes_per_number, shape.hidden_size, shape.query_width, shape.key_width
    is_narrow = number < 4
    norms = 2 * (4 * hidden + 4) if shape.norm == "rms" else 2 * number * (hidden + 2)
    # The inputs of LoRA's A: the norm's output, and the attention's, of which the attention keeps its own if narrow.
    copies = len(shape.projections) - 1 if is_narrow else 1
    inputs = 4 * (copies * hidden + query) + (number * query if is_narrow else 0)
    low_rank = 4 * run.lora_rank * len(shape.projections)
    attention = number * (query + 2 * key) + 4 * shape.num_query_heads
    return norms + inputs + low_rank + attention + number * _mlp_copies(shape) * shape.intermediate_size


def _mlp_copies(shape: ModelShape) -> int:
    return 3 if shape.mlp == "gated" else 4


def _forward_bytes(shape: ModelShape, run: RunShape, num_tokens: int, attended_bytes: int = 0) -> int:
    """Bytes alive inside a layer while tokens pass through it without gradient."""
    number, hidden, query = run.bytes_per_number, shape.hidden_size, shape.query_width
    mlp = number * (4 * hidden + _mlp_copies(shape) * shape.intermediate_size)
    low_rank = 3 * 4 * query + (4 * hidden if number < 4 else 0)
    projection = number * (3 * hidden + query) + low_rank
    return max(num_tokens * mlp, num_tokens * projection + attended_bytes)


def _attended_bytes(shape: ModelShape, run: RunShape, rows: int, num_tokens: int) -> int:
    """Bytes that attention needs besides keys and values when tokens read a whole context.

    On a CPU the mask of one row, and, in bfloat16, scores and their softmax of a few rows; else the mask of all rows,
    and keys and values repeated for each query head.
    """
    shared = shape.num_query_heads // shape.num_key_value_heads
    number, scores = run.bytes_per_number, rows * num_tokens * run.layout.cached_tokens
    if run.on_cpu:
        mask = num_tokens * run.layout.cached_tokens * shared * (1 + number)
        row = shape.num_query_heads * num_tokens * run.layout.cached_tokens * number
        return mask + (2 * row * min(rows, rows_at_once(row)) if number < 4 else 0)
    repeated = rows * run.layout.cached_tokens * 2 * shape.query_width * number if shared > 1 else 0
    return scores * number + repeated


def cache_bytes_per_token(shape: ModelShape, run: RunShape) -> int:
    """Count the bytes of a token's keys and values in all layers of one model."""
    return 2 * shape.num_layers * shape.key_width * run.bytes_per_number


def plan_memory(shape: ModelShape, run: RunShape) -> MemoryPlan:
    """Plan the memory of a step."""
    return MemoryPlan((*_fixed_parts(shape, run), *_rollout_parts(shape, run), *_update_parts(shape, run)))


def _fixed_parts(shape: ModelShape, run: RunShape) -> tuple[MemoryPart, ...]:
    always, adapter = tuple(Phase), shape.adapter_parameters(run.lora_rank)
    smaller = "load the model in fewer bits (load_in_4bit) or take a smaller one"
    optimizer = adapter * run.optimizer_bytes_per_parameter
    return (
        MemoryPart("weights", shape.weight_bytes(run.weight_bits), always, smaller, is_loaded=True),
        MemoryPart("adapter", 4 * adapter, always, "lower lora_r", is_loaded=True),
        MemoryPart("previous adapter", 4 * adapter, always, "lower lora_r", is_loaded=True),
        MemoryPart("optimizer", optimizer, always, "lower lora_r, or set optim to adamw_bnb_8bit"),
    )


def _rollout_parts(shape: ModelShape, run: RunShape) -> tuple[MemoryPart, ...]:
    batch = run.generation_batch_size
    logits = 4 * shape.vocabulary_size
    prompt_rows = (1 + run.num_queries) * batch if run.joint else batch
    cached_rows = max(2 * batch, prompt_rows)
    drawing = _DRAWING_COPIES * prompt_rows * logits
    scored = min(run.logits_positions(shape.vocabulary_size), batch * run.tokens_per_value)
    fewer, shorter = "lower generation_batch_size", "lower generation_batch_size, num_steps or the tokens per query"
    parts = [
        MemoryPart(
            "keys in a layer",
            _forward_bytes(shape, run, run.embedding_batch_size * run.tokens_per_key),
            (Phase.KEYS,),
            "lower embedding_batch_size",
        ),
        MemoryPart(
            "caches of policy and reference",
            cached_rows * run.layout.cached_tokens * cache_bytes_per_token(shape, run),
            _CACHED_PHASES,
            shorter,
        ),
        MemoryPart(
            "prompts in a layer",
            _forward_bytes(shape, run, prompt_rows * run.layout.prompt_tokens),
            (Phase.PREFILL,),
            fewer,
        ),
        MemoryPart("logits of the next token", drawing, (Phase.DECODE,), fewer),
        MemoryPart("responses in a layer", _reading_bytes(shape, run), (Phase.READ,), fewer),
        MemoryPart("logits of values", _SCORING_COPIES * scored * logits, (Phase.SCORE,), "lower logits_chunk_size"),
    ]
    if run.cuda_graphs and not run.on_cpu:
        # What a step needs stays with its graph, which lives as long as the caches.
        parts.append(MemoryPart("graph of a decoded token", drawing, _CACHED_PHASES, "set cuda_graphs to false"))
    if run.compute_order_gain:
        tokens = run.layout.prompt_tokens + run.tokens_per_query + run.layout.scored_tokens
        size = batch * tokens * cache_bytes_per_token(shape, run)
        parts.append(MemoryPart("cache of the order gain", size, _CACHED_PHASES, "set order_coef to 0"))
    trees = {
        "set information_coef to 0": (run.information_coef > 0, unread_tokens(run.layout, run.memory_size)),
        "lower num_queries": (run.num_queries > 1, other_tokens(run.layout, run.num_queries)),
        "set selector_gradient to sampled": (run.needs_choice_values, MAX_TREE_TOKENS),
    }
    read = {_tree_bytes(shape, run, tokens): remedy for remedy, (is_read, tokens) in trees.items() if is_read}
    if read:
        # One after the other.
        largest = max(read)
        parts.append(MemoryPart("tree of values in a layer", largest, (Phase.SCORE,), read[largest]))
    return (*parts, *_dequantized(shape, run))


def _tree_bytes(shape: ModelShape, run: RunShape, num_tokens: int) -> int:
    """Bytes alive in a layer while trees are read, as many rows as are read together."""
    rows = min(run.generation_batch_size, rows_read_together(num_tokens))
    # The mask of padded memories has a row for each.
    return _forward_bytes(shape, run, rows * num_tokens, rows * num_tokens**2 * run.bytes_per_number)


def _reading_bytes(shape: ModelShape, run: RunShape) -> int:
    """Bytes alive in a layer while both read a response, or the reference the policy's query and the response."""
    batch, block = run.generation_batch_size, run.layout.scored_tokens + run.query_separator_tokens
    rows = 2 * batch if run.joint else batch
    followed = run.tokens_per_query + block
    return max(
        _forward_bytes(shape, run, rows * block, _attended_bytes(shape, run, rows, block)),
        _forward_bytes(shape, run, batch * followed, _attended_bytes(shape, run, batch, followed)),
    )


def _dequantized(shape: ModelShape, run: RunShape) -> tuple[MemoryPart, ...]:
    if run.weight_bits != 4:
        return ()
    size = 2 * max(a * b for a, b in (*shape.projections, *shape.mlp_matrices))
    phases = tuple(phase for phase in Phase if phase is not Phase.SCORE)
    return (MemoryPart("one matrix dequantized", size, phases, "load the model in 16 bits"),)


def _update_parts(shape: ModelShape, run: RunShape) -> tuple[MemoryPart, ...]:
    number, hidden = run.bytes_per_number, shape.hidden_size
    # Other queries are branches of the trajectory.
    per_query = run.layout.num_steps * run.tokens_per_query
    row_tokens = run.layout.trajectory_tokens + (run.num_queries - 1) * per_query
    tokens = run.micro_batch_size * row_tokens
    query_tokens = run.micro_batch_size * run.num_queries * per_query
    mask = run.micro_batch_size * row_tokens**2 * number if run.num_queries > 1 else 0
    layer = tokens * saved_bytes_per_token(shape, run)
    saved, again = shape.num_layers * layer, 0
    fewer = "lower training_batch_size, or set activation_checkpointing"
    if run.activation_checkpointing:
        saved, again = tokens * number * hidden * shape.num_layers, layer
        fewer = "lower training_batch_size"
    gradients = tokens * number * (3 * shape.intermediate_size + hidden)
    positions = min(run.logits_positions(shape.vocabulary_size), query_tokens)
    logits = _LOSS_COPIES * positions * 4 * shape.vocabulary_size
    # Last states, and those of query tokens: policy's, previous adapter's, and a gradient with a chunk's part of it.
    states = number * hidden * (tokens + 4 * query_tokens)
    return (
        MemoryPart("activations", saved, UPDATE_PHASES, fewer),
        *([MemoryPart("mask of other queries", mask, UPDATE_PHASES, "lower num_queries")] if mask else []),
        MemoryPart("last states", states, (Phase.LOSS,), fewer),
        MemoryPart("logits of queries", logits, (Phase.LOSS,), "lower logits_chunk_size"),
        MemoryPart("a layer's backward", again + gradients, (Phase.BACKWARD,), fewer),
        MemoryPart(
            "gradient of the adapter", 4 * shape.adapter_parameters(run.lora_rank), (Phase.BACKWARD,), "lower lora_r"
        ),
    )


def _largest(fits: Callable[[int], bool], limit: int | None = None) -> int:
    """Find the largest number that fits, 0 if not even 1 does; whatever is below one that fits must fit too."""
    low, high = 0, 1
    while (limit is None or high <= limit) and fits(high):
        low, high = high, 2 * high
    high = high if limit is None else min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(shape: ModelShape, run: RunShape, budget_bytes: int) -> int:
    """Find the largest generation_batch_size that fits, 0 if not even one trajectory does.

    Args:
        shape: the model.
        run: everything else.
        budget_bytes: memory that a step may use, weights included.
    """
    return _largest(
        lambda batch: plan_memory(shape, replace(run, generation_batch_size=batch)).peak_bytes <= budget_bytes
    )


def largest_num_steps(shape: ModelShape, run: RunShape, budget_bytes: int) -> int:
    """Find the largest T that fits into memory and into the model's context, 0 if not even one step does.

    Args:
        shape: the model.
        run: everything else; its memory grows to as many pairs as steps.
        budget_bytes: memory that a step may use, weights included.
    """

    def fits(num_steps: int) -> bool:
        num_pairs = max(run.memory_size, num_steps)
        longer = replace(run, num_steps=num_steps, num_kv_pairs=num_pairs + 1, subset_fraction=1.0)
        within_context = shape.context_length is None or longer.layout.trajectory_tokens <= shape.context_length
        return within_context and plan_memory(shape, longer).peak_bytes <= budget_bytes

    return _largest(fits)


def memory_warning(plan: MemoryPlan, free_bytes: int, *, model_is_loaded: bool = False) -> str | None:
    """Say what to lower, or ``None`` if the plan fits.

    Args:
        plan: the run's memory.
        free_bytes: memory that is free.
        model_is_loaded: whether the weights and the adapter are in memory already, and so not in what is free.
    """
    needed = plan.peak_bytes - (plan.loaded_bytes if model_is_loaded else 0)
    if needed <= free_bytes:
        return None
    # What is loaded already can no longer be made smaller.
    present = [part for part in plan.parts_in(plan.peak_phase) if not (model_is_loaded and part.is_loaded)]
    part = max(present, key=lambda item: item.num_bytes)
    return (
        f"this run will probably not fit: its {plan.peak_phase} needs {needed / GIBIBYTE:.2f} GiB"
        f"{' beside the model' if model_is_loaded else ''}, but {free_bytes / GIBIBYTE:.2f} GiB are free. "
        f"The largest part is the {part.name}, {part.num_bytes / GIBIBYTE:.2f} GiB: {part.remedy}"
    )
