"""The shapes and records that every other module speaks of.

Shape legend, the one place where it is written down:

====== =====================================================================================
letter meaning
====== =====================================================================================
B      trajectories rolled out together (rows of a batch); one trajectory is one *episode*
N      key-value pairs of an article that take part, the in-context example (pair 0) counted
M      pairs in a trajectory's memory, drawn from the N - 1 pairs after the example
T      steps of a trajectory, T <= M
K V L  tokens of a key, of a value, of a query
H G D  query heads, key-value groups, head dimension of the attention layer that selects
S      tokens of a whole trajectory; C tokens of the context before a step
====== =====================================================================================

The records here check the shapes and dtypes of their tensors when they are made, so that a wrong shape is reported
where it arises. They know nothing about models, tokenizers or training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def expect_tensor(name: str, tensor: Tensor, shape: Sequence[int | None], *, floating: bool) -> None:
    """Check a tensor's shape and kind of dtype.

    Args:
        name: what to call the tensor in the error.
        tensor: the tensor.
        shape: the expected sizes; ``None`` accepts any size.
        floating: whether the dtype must be a floating one; otherwise it must be ``torch.int64``.

    Raises:
        ValueError: the shape or the dtype differs; the message gives both, expected and got.
    """
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(tensor.shape)}")
    if floating != tensor.is_floating_point() or (not floating and tensor.dtype != torch.int64):
        wanted = "a floating-point dtype" if floating else "torch.int64"
        raise ValueError(f"{name} must have {wanted}, got {tensor.dtype}")


def _expect_texts(name: str, texts: Sequence[str], batch_size: int) -> None:
    if len(texts) not in (0, batch_size):
        raise ValueError(f"{name} must hold one text for each of the {batch_size} rows, or none; got {len(texts)}")


@dataclass(frozen=True, eq=False)
class KeyValuePair:
    """One key-value pair for each row of a batch.

    Attributes:
        key_tokens: token ids of the keys, ``[B, K]`` int64.
        value_tokens: token ids of the values, ``[B, V]`` int64.
        key_embedding: the keys' vectors, heads side by side, ``[B, G * D]``.
        key_text: the keys as text, for logs only; empty when nobody asked for it.
        value_text: the values as text, for logs only.
    """

    key_tokens: Tensor
    value_tokens: Tensor
    key_embedding: Tensor
    key_text: Sequence[str] = ()
    value_text: Sequence[str] = ()

    def __post_init__(self) -> None:
        expect_tensor("key_tokens", self.key_tokens, (None, None), floating=False)
        batch_size = self.key_tokens.shape[0]
        expect_tensor("value_tokens", self.value_tokens, (batch_size, None), floating=False)
        expect_tensor("key_embedding", self.key_embedding, (batch_size, None), floating=True)
        _expect_texts("key_text", self.key_text, batch_size)
        _expect_texts("value_text", self.value_text, batch_size)


@dataclass(frozen=True, eq=False)
class KeyValuePairs:
    """The memories of a batch: M key-value pairs for each of B trajectories.

    Attributes:
        key_tokens: ``[B, M, K]`` int64.
        value_tokens: ``[B, M, V]`` int64.
        key_vectors: the keys' attention vectors, ``[B, M, G, D]``.
        pair_numbers: each pair's number in its article, ``[B, M]`` int64.
    """

    key_tokens: Tensor
    value_tokens: Tensor
    key_vectors: Tensor
    pair_numbers: Tensor

    def __post_init__(self) -> None:
        expect_tensor("key_tokens", self.key_tokens, (None, None, None), floating=False)
        batch_size, num_pairs, _ = self.key_tokens.shape
        expect_tensor("value_tokens", self.value_tokens, (batch_size, num_pairs, None), floating=False)
        expect_tensor("key_vectors", self.key_vectors, (batch_size, num_pairs, None, None), floating=True)
        expect_tensor("pair_numbers", self.pair_numbers, (batch_size, num_pairs), floating=False)

    def gather(self, index: Tensor) -> KeyValuePair:
        """Take one pair out of each row's memory.

        Args:
            index: the column of the pair to take, ``[B]`` int64.

        Returns:
            The pairs, as a batch.
        """
        rows = torch.arange(index.shape[0], device=index.device)
        return KeyValuePair(
            key_tokens=self.key_tokens[rows, index],
            value_tokens=self.value_tokens[rows, index],
            key_embedding=self.key_vectors[rows, index].flatten(1),
        )

    def select_rows(self, rows: Tensor) -> KeyValuePairs:
        """Keep some of the trajectories.

        Args:
            rows: the rows to keep, ``[b]`` int64.
        """
        return KeyValuePairs(
            key_tokens=self.key_tokens[rows],
            value_tokens=self.value_tokens[rows],
            key_vectors=self.key_vectors[rows],
            pair_numbers=self.pair_numbers[rows],
        )


@dataclass(frozen=True, eq=False)
class TrajectoryStep:
    """One step of B trajectories: the query, what it drew, and what that was worth.

    Attributes:
        context_tokens: everything before the query, ending in the query separator, ``[B, C]`` int64.
        query_tokens: the policy's query, ``[B, L]`` int64.
        selected_pair: the pair that was drawn and read.
        reward: the step's reward in nats per value token, ``[B]``.
        similarity_score: the probability with which the selector drew the pair, ``[B]``.
        selected_index: the pair's column in the memory, ``[B]`` int64.
        selection_probabilities: the selector's distribution over the memory, ``[B, M]``.
        query_logprobs: log-probability of each query token under the policy, nats, ``[B, L]``.
        query_entropy: entropy of the policy at each query token, nats, ``[B, L]``.
        counterfactual_tokens: the base model's own query in the same context, ``[B, L]`` int64.
        policy_value_logprob: log p_θ(value | context, policy's query), nats per token, ``[B]``.
        base_value_logprob: log p_base(value | context, policy's query), nats per token, ``[B]``.
        counterfactual_value_logprob: log p_base(value | context, counterfactual query), nats per token, ``[B]``.
        order_gain: what the pairs read before brought to the base model, nats per token, ``[B]``; ``None`` when not
            computed.
        context_text: the context as text, for logs only.
        query_text: the query as text, for logs only.
    """

    context_tokens: Tensor
    query_tokens: Tensor
    selected_pair: KeyValuePair
    reward: Tensor
    similarity_score: Tensor
    selected_index: Tensor
    selection_probabilities: Tensor
    query_logprobs: Tensor
    query_entropy: Tensor
    counterfactual_tokens: Tensor
    policy_value_logprob: Tensor
    base_value_logprob: Tensor
    counterfactual_value_logprob: Tensor
    order_gain: Tensor | None = None
    context_text: Sequence[str] = ()
    query_text: Sequence[str] = ()

    def __post_init__(self) -> None:
        expect_tensor("query_tokens", self.query_tokens, (None, None), floating=False)
        batch_size, query_length = self.query_tokens.shape
        expect_tensor("context_tokens", self.context_tokens, (batch_size, None), floating=False)
        expect_tensor("counterfactual_tokens", self.counterfactual_tokens, (batch_size, None), floating=False)
        expect_tensor("selected_index", self.selected_index, (batch_size,), floating=False)
        expect_tensor("selection_probabilities", self.selection_probabilities, (batch_size, None), floating=True)
        for name in ("query_logprobs", "query_entropy"):
            expect_tensor(name, getattr(self, name), (batch_size, query_length), floating=True)
        for name in (
            "reward",
            "similarity_score",
            "policy_value_logprob",
            "base_value_logprob",
            "counterfactual_value_logprob",
        ):
            expect_tensor(name, getattr(self, name), (batch_size,), floating=True)
        if self.order_gain is not None:
            expect_tensor("order_gain", self.order_gain, (batch_size,), floating=True)
        _expect_texts("context_text", self.context_text, batch_size)
        _expect_texts("query_text", self.query_text, batch_size)

    @property
    def query_gain(self) -> Tensor:
        """Worth of the policy's query to the frozen reader, nats per value token, ``[B]``."""
        return self.base_value_logprob - self.counterfactual_value_logprob

    @property
    def model_gain(self) -> Tensor:
        """Worth of the adapted reader given the policy's query, nats per value token, ``[B]``."""
        return self.policy_value_logprob - self.base_value_logprob


@dataclass(frozen=True, eq=False)
class Trajectory:
    """B whole trajectories, all of the same number of steps and of the same lengths.

    Attributes:
        steps: the T steps.
        avg_reward: mean of the steps' rewards, nats per value token, ``[B]``.
        total_reward: their sum, ``[B]``.
        token_ids: every token of the trajectory in order, ``[B, S]`` int64.
        query_starts: the position in ``token_ids`` of each step's first query token, T integers.
        value_starts: the position in ``token_ids`` of each step's first value token, T integers.
        memory: the memory that the trajectory read from.
        episodes: the episode's running number over the whole run, ``[B]`` int64.
        forward_tokens: tokens that passed through either model to roll the batch out.
    """

    steps: Sequence[TrajectoryStep]
    avg_reward: Tensor
    total_reward: Tensor
    token_ids: Tensor
    query_starts: Sequence[int]
    value_starts: Sequence[int]
    memory: KeyValuePairs
    episodes: Tensor
    forward_tokens: int = field(default=0)

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a trajectory must have at least one step, got none")
        batch_size = self.steps[0].query_tokens.shape[0]
        expect_tensor("avg_reward", self.avg_reward, (batch_size,), floating=True)
        expect_tensor("total_reward", self.total_reward, (batch_size,), floating=True)
        expect_tensor("token_ids", self.token_ids, (batch_size, None), floating=False)
        expect_tensor("episodes", self.episodes, (batch_size,), floating=False)
        for name, starts in (("query_starts", self.query_starts), ("value_starts", self.value_starts)):
            if len(starts) != len(self.steps):
                raise ValueError(
                    f"{name} must hold one position for each of {len(self.steps)} steps, got {len(starts)}"
                )

    def stack(self, field_name: str) -> Tensor:
        """Stack a tensor of every step along a new second axis.

        Args:
            field_name: the name of a tensor attribute or property of `TrajectoryStep`.

        Returns:
            ``[B, T, ...]``.
        """
        return torch.stack([getattr(step, field_name) for step in self.steps], dim=1)


@dataclass(frozen=True)
class ArticleReference:
    """Where a trajectory's pairs come from.

    Attributes:
        title: the article's title.
        source: the data set or file.
        epoch: the pass over the source, from 0.
        article_index: the article's identity in the source.
        next_position: the position in the source right after the article.
    """

    title: str
    source: str
    epoch: int
    article_index: int
    next_position: StreamPosition


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """A place between two articles of a stream.

    Args:
        epoch: Passes over the source that are complete.
        index: Rows of this epoch that are taken from the source, those of other processes and skipped ones included.

    Raises:
        ValueError: One of them is negative.
    """

    epoch: int = 0
    index: int = 0

    def __post_init__(self) -> None:
        if self.epoch < 0 or self.index < 0:
            raise ValueError(f"epoch and index must be 0 or more, got epoch={self.epoch}, index={self.index}.")

    def to_dict(self) -> dict[str, int]:
        """Return the position as a JSON object."""
        return {"epoch": self.epoch, "index": self.index}

    @classmethod
    def from_dict(cls, state: Mapping[str, int]) -> StreamPosition:
        """Read a position from its JSON object.

        Args:
            state: What `to_dict` returned.

        Returns:
            The position.

        Raises:
            ValueError: The keys are not exactly "epoch" and "index", or a value is not an integer of 0 or more.
        """
        if set(state) != {"epoch", "index"}:
            raise ValueError(f"A stream position has the keys 'epoch' and 'index', got {sorted(state)}.")
        if not all(type(value) is int for value in state.values()):
            raise ValueError(f"A stream position holds integers, got {dict(state)}.")
        return cls(**state)
