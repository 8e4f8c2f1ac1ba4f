"""`AttentionGuidedOrderer`: a trained adapter chooses in which order to read what it has never seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.base import default_device
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.trained import load_adapted
from attention_rl_trainer.ordering.adapter import OrderSettings, find_adapter
from attention_rl_trainer.ordering.pieces import Context, NewMemory, Pieces, batch_of, cut_pieces, pair_lengths
from attention_rl_trainer.ordering.result import ReadingOrder, ReadingStep
from attention_rl_trainer.planning.sizes import context_length_of
from attention_rl_trainer.probing.calibrated import is_calibrated
from attention_rl_trainer.rollout.calibration import CALIBRATION_NAME
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, Selection
from attention_rl_trainer.rollout.layout import Layout, Separators
from attention_rl_trainer.rollout.sampler import RolloutOptions, TrajectorySampler
from attention_rl_trainer.types import Trajectory

# So small that the likeliest token has all of the probability, unless another has the same logit.
_GREEDY_TEMPERATURE = 1e-4


class GreedyEnvironment(KVMemoryEnvironment):
    """Draws the likeliest pair, whatever the noise; the first of equals."""

    def step(self, query_vectors: Tensor, noise: Tensor) -> Selection:
        """See `MemoryEnvironment`."""
        keys, available = self.pairs.key_vectors, self.available_mask
        probabilities = self.selector.log_probabilities(query_vectors, keys, available).exp().double()
        best = probabilities.argmax(dim=1, keepdim=True)
        # The middle of what the draw gives to that pair.
        middle = probabilities.cumsum(dim=1).gather(1, best) - probabilities.gather(1, best) / 2
        return super().step(query_vectors, (middle / probabilities.sum(dim=1, keepdim=True)).squeeze(1))


class AttentionGuidedOrderer:
    """Orders passages, keys and values, or the pieces of a text, as an adapter was trained to read.

    Each step is that of training: the model writes a query in the context of what it has read, its attention chooses a
    piece, and the piece is read.

    Args:
        model: the adapter on its base model.
        tokenizer: the base model's.
        settings: how it was trained to read.

    Raises:
        ValueError: the settings need a calibration and have none, or an option is out of range.
        UnsupportedArchitectureError: the model's attention cannot be read.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, settings: OrderSettings) -> None:
        self.settings = settings
        self.encoder = PlainTextEncoder(tokenizer)
        self.policy = PolicyModel.of(model, tokenizer, settings.policy)
        self.context_length = context_length_of(self.policy.causal_lm.config)
        calibration = settings.calibration if is_calibrated(settings.policy, settings.selection) else None
        if calibration is None and is_calibrated(settings.policy, settings.selection):
            raise ValueError(
                "the adapter selects by what was fitted (attention_heads 'probe', center_vectors or "
                f"selection_temperature 'auto'), but its folder has no {CALIBRATION_NAME}; copy it from that of the run"
            )
        if calibration is not None and settings.policy.attention_heads == "probe":
            self.policy.choose_heads(calibration.heads or ())
        self._environments = {
            greedy: kind(settings.selection, calibration)
            for greedy, kind in ((True, GreedyEnvironment), (False, KVMemoryEnvironment))
        }

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        model: str | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        dtype: str = "auto",
        revision: str | None = None,
    ) -> AttentionGuidedOrderer:
        """Load an adapter with its base model, settings and calibration.

        Args:
            adapter: a run's folder, one of its checkpoints, or a Hub repository such as ``"user/adapter"``.
            model: the base model, or its name; by default the one that the adapter names.
            tokenizer: by default the base model's.
            device: by default the first CUDA GPU, else the CPU.
            dtype: precision of the base model's weights; ``"auto"`` for the device's native one.
            revision: branch, tag or commit of the adapter's repository.

        Raises:
            ValueError: there is no such adapter, something of it is missing, or the base model is another one.
            BaseModelError: the base model is not to be found, or cannot be loaded.
            HubUnreachableError: something would have to come from the Hub, which cannot be reached.
        """
        folder = find_adapter(adapter, revision)
        settings = OrderSettings.read(folder)
        place = default_device() if device is None else torch.device(device)
        adapted, own_tokenizer = load_adapted(folder, place, dtype, model=model, tokenizer=tokenizer)
        return cls(adapted, own_tokenizer, settings)

    def order(
        self,
        memory: NewMemory,
        context: Context = None,
        *,
        top_k: int | None = None,
        greedy: bool = True,
        seed: int = 0,
        max_value_tokens: int | None = None,
    ) -> ReadingOrder:
        """Choose the order in which to read one memory.

        Args:
            memory: passages, keys with values, or one text, whose pieces have the lengths of training.
            context: what was read before, such as a question; ``None`` for nothing, and of a text for its first piece.
            top_k: pieces to read; ``None``, or more than there are, for all.
            greedy: whether the likeliest token and the likeliest piece are taken, or both are drawn as in training.
            seed: of the draws.
            max_value_tokens: longer pieces are read up to here; ``None`` for all of each.

        Raises:
            ValueError: the memory is none, or with all that is read longer than the model's context; says the lengths.
            UnsupportedArchitectureError: pieces differ in length, and the model cannot read padding.
            NonFiniteError: a number of the model is not finite.
        """
        (order,) = self.order_batch(
            [memory], [context], top_k=top_k, greedy=greedy, seed=seed, max_value_tokens=max_value_tokens
        )
        return order

    def order_batch(
        self,
        memories: Sequence[NewMemory],
        contexts: Sequence[Context] | None = None,
        *,
        top_k: int | None = None,
        greedy: bool = True,
        seed: int = 0,
        max_value_tokens: int | None = None,
        batch_size: int = 8,
    ) -> list[ReadingOrder]:
        """Choose the orders of several memories; those of as many pieces are read together.

        Args:
            contexts: of each memory; ``None`` for none.
            batch_size: memories that are read at once.

        Raises:
            ValueError: as in `order`; or there are more or fewer contexts than memories.
        """
        for name, number in (("top_k", top_k), ("max_value_tokens", max_value_tokens), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if contexts is not None and len(contexts) != len(memories):
            raise ValueError(f"there are {len(contexts)} contexts for {len(memories)} memories; give one for each")
        lengths = self.settings.tokens_per_key, self.settings.tokens_per_value
        cut = [
            cut_pieces(memory, context, self.encoder, *lengths, max_value_tokens)
            for memory, context in zip(memories, contexts or [None] * len(memories), strict=True)
        ]
        orders: dict[int, ReadingOrder] = {}
        for numbers in _alike(cut, batch_size):
            pieces = [cut[number] for number in numbers]
            num_steps = min(len(pieces[0]), top_k or len(pieces[0]))
            trajectory = self._roll_out(pieces, numbers, num_steps, greedy=greedy, seed=seed)
            for row, number in enumerate(numbers):
                steps = self._steps(trajectory, row, cut[number])
                found = cut[number]
                orders[number] = ReadingOrder(steps, found.texts, found.context, greedy, self.settings.trust)
        return [orders[number] for number in range(len(memories))]

    def _roll_out(
        self, pieces: Sequence[Pieces], numbers: Sequence[int], num_steps: int, *, greedy: bool, seed: int
    ) -> Trajectory:
        options = self.settings.rollout(len(pieces[0]), num_steps, **pair_lengths(pieces))
        separators = Separators.encode(self.encoder, options)
        batch = batch_of(pieces, numbers, options)
        self._expect_fitting(Layout.of(options, separators).for_batch(batch), options)
        environment = self._environments[greedy]
        sampler = TrajectorySampler(self.policy, environment, separators, options, seed, compute_order_gain=True)
        with self._query_temperature(_GREEDY_TEMPERATURE if greedy else self.policy.query_temperature):
            return sampler.sample(batch, numbers)

    @contextmanager
    def _query_temperature(self, temperature: float) -> Iterator[None]:
        before = self.policy.query_temperature
        self.policy.query_temperature = temperature
        try:
            yield
        finally:
            self.policy.query_temperature = before

    def _expect_fitting(self, layout: Layout, options: RolloutOptions) -> None:
        needed, available = layout.trajectory_tokens, self.context_length
        if available is None or needed <= available:
            return
        # The last step is not followed by a separator.
        fitting = (available + len(layout.separators.query) - layout.prompt_tokens) // layout.step_tokens
        raise ValueError(
            f"to read {layout.num_steps} pieces of up to {layout.tokens_per_value} tokens takes {needed} tokens with "
            f"the queries between them, but the model's context holds {available}; "
            + (f"set top_k to {fitting} or less, or " if fitting > 0 else "")
            + "give max_value_tokens or shorter pieces"
        )

    def _steps(self, trajectory: Trajectory, row: int, pieces: Pieces) -> list[ReadingStep]:
        steps = []
        for step in trajectory.steps:
            assert step.order_gain is not None
            probabilities = step.selection_probabilities[row].tolist()
            steps.append(
                ReadingStep(
                    index=int(step.selected_index[row]) + pieces.first,
                    query=self.encoder.decode(step.query_tokens[row]).strip(),
                    probability=float(step.similarity_score[row]),
                    probabilities=(0.0,) * pieces.first + tuple(probabilities),
                    value_logprob=float(step.policy_value_logprob[row]),
                    query_gain=float(step.query_gain[row]),
                    model_gain=float(step.model_gain[row]),
                    order_gain=float(step.order_gain[row]),
                )
            )
        return steps


def _alike(memories: Sequence[Pieces], batch_size: int) -> Iterator[list[int]]:
    """Group the numbers of memories that have as many pieces."""
    groups: dict[int, list[int]] = {}
    for number, pieces in enumerate(memories):
        groups.setdefault(len(pieces), []).append(number)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
