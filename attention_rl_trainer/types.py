"""The shapes and records that every other module speaks of.

Shape legend, the one place where it is written down:

====== =====================================================================================
letter meaning
====== =====================================================================================
B      trajectories rolled out together (rows of a batch); one trajectory is one *episode*
N      key-value pairs of an article that take part, the in-context example (pair 0) included
M      pairs in a trajectory's memory, drawn from the N - 1 pairs after the example
T      steps of a trajectory, T <= M
Q      queries that are written in a context (``num_queries``)
K V L  tokens of a key, of a value, of a query
H G D  query heads, key-value groups, head dimension of the attention layer that selects
S P    tokens of a sequence, such as a whole trajectory; of the context before a query
A C    tokens that a query may consist of; components of a hidden state
====== =====================================================================================

Keys and values of a batch may differ in length. Then K and V are those of the longest, and `PADDING` stands in the
places that are left: before the tokens of a key, after those of a value, so that whatever follows a key or precedes a
value is next to it. Such a place is in nobody's context and in no mean.

The records check the shapes and dtypes of their tensors when they are made, so that a wrong shape is reported where it
arises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1
"""In place of a token's id where a key or a value is shorter than the longest."""


def is_token(token_ids: Tensor) -> Tensor:
    """Tell tokens from padding: ids of any shape to bool."""
    return token_ids != PADDING


def expect_tensor(name: str, tensor: Tensor, shape: Sequence[int | None], *, floating: bool) -> None:
    """Check a tensor's shape, in which ``None`` is any size, and that its dtype is a floating one or else int64.

    Raises:
        ValueError: the shape or the dtype differs; gives both, expected and got.
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
    """One key-value pair for each row of a batch; the texts are for logs only and may be empty."""

    key_tokens: Tensor
    """``[B, K]`` int64."""
    value_tokens: Tensor
    """``[B, V]`` int64."""
    key_embedding: Tensor
    """The keys' vectors, groups side by side, ``[B, G * D]``."""
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
    """The memories of a batch: M key-value pairs for each of B trajectories."""

    key_tokens: Tensor
    """``[B, M, K]`` int64."""
    value_tokens: Tensor
    """``[B, M, V]`` int64."""
    key_vectors: Tensor
    """The keys' attention vectors, ``[B, M, G, D]``."""
    pair_numbers: Tensor
    """Each pair's number in its article, ``[B, M]`` int64."""
    is_padded: bool = False
    """Whether there may be padding in a trajectory over them."""

    def __post_init__(self) -> None:
        expect_tensor("key_tokens", self.key_tokens, (None, None, None), floating=False)
        batch_size, num_pairs, _ = self.key_tokens.shape
        expect_tensor("value_tokens", self.value_tokens, (batch_size, num_pairs, None), floating=False)
        expect_tensor("key_vectors", self.key_vectors, (batch_size, num_pairs, None, None), floating=True)
        expect_tensor("pair_numbers", self.pair_numbers, (batch_size, num_pairs), floating=False)

    def gather(self, index: Tensor) -> KeyValuePair:
        """Take one pair of each row's memory, by its column, ``[B]`` int64."""
        rows = torch.arange(index.shape[0], device=index.device)
        return KeyValuePair(
            key_tokens=self.key_tokens[rows, index],
            value_tokens=self.value_tokens[rows, index],
            key_embedding=self.key_vectors[rows, index].flatten(1),
        )

    def select_rows(self, rows: Tensor) -> KeyValuePairs:
        """Keep some of the trajectories, by their rows, ``[b]`` int64."""
        return KeyValuePairs(
            key_tokens=self.key_tokens[rows],
            value_tokens=self.value_tokens[rows],
            key_vectors=self.key_vectors[rows],
            pair_numbers=self.pair_numbers[rows],
            is_padded=self.is_padded,
        )


@dataclass(frozen=True, eq=False)
class TrajectoryStep:
    """One step of B trajectories: the query, what it drew, and what that was worth; the texts are for logs only."""

    context_tokens: Tensor
    """Everything before the query, ending in the query separator, ``[B, P]`` int64."""
    query_tokens: Tensor
    """The policy's query, ``[B, L]`` int64."""
    selected_pair: KeyValuePair
    reward: Tensor
    """Nats per value token, unless a user's own function gives something else, ``[B]``."""
    similarity_score: Tensor
    """The probability with which the selector drew the pair, ``[B]``."""
    selected_index: Tensor
    """The pair's column in the memory, ``[B]`` int64."""
    selection_probabilities: Tensor
    """The selector's distribution over the memory, ``[B, M]``."""
    query_logprobs: Tensor
    """Log-probability of each query token under the policy, nats, ``[B, L]``."""
    query_entropy: Tensor
    """Entropy of the policy at each query token, nats, ``[B, L]``."""
    counterfactual_tokens: Tensor
    """The base model's own query in the same context, ``[B, L]`` int64."""
    policy_value_logprob: Tensor
    """log p_θ(value | context, policy's query), nats per token, ``[B]``."""
    base_value_logprob: Tensor
    """log p_base(value | context, policy's query), nats per token, ``[B]``."""
    counterfactual_value_logprob: Tensor
    """log p_base(value | context, counterfactual query), nats per token, ``[B]``."""
    order_gain: Tensor | None = None
    """What the earlier pairs brought to the base model, nats per token, ``[B]``; ``None`` where it is not computed."""
    information_gain: Tensor | None = None
    """What the step told the base model about the values that were unread after it, nats per token, ``[B]``; ``None``
    where it is not computed."""
    selection_information: Tensor | None = None
    """How much of the choice depends on the query, nats, ``[B]``; ``None`` where it is not measured."""
    other_queries: Tensor | None = None
    """Further queries that the policy wrote in the same context, ``[B, Q - 1, L]`` int64; ``None`` for Q = 1."""
    other_query_logprobs: Tensor | None = None
    """Log-probability of each of their tokens under the policy, nats, ``[B, Q - 1, L]``."""
    other_rewards: Tensor | None = None
    """What the step's reward would be after each of them, for the value that was drawn, ``[B, Q - 1]``."""
    value_token_gains: Tensor | None = None
    """Of each token of the value, log p_θ(token | policy's query) - log p_base(token | counterfactual query), nats,
    ``[B, V]``; 0 for padding, ``None`` where it is not kept."""
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
        for name in ("order_gain", "information_gain", "selection_information"):
            measured = getattr(self, name)
            if measured is not None:
                expect_tensor(name, measured, (batch_size,), floating=True)
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
    """B whole trajectories, all of the same number of steps and of the same lengths."""

    steps: Sequence[TrajectoryStep]
    avg_reward: Tensor
    """Mean of the steps' rewards, ``[B]``."""
    total_reward: Tensor
    """Their sum, ``[B]``."""
    token_ids: Tensor
    """Every token of the trajectory in order, ``[B, S]`` int64."""
    query_starts: Sequence[int]
    """Position of each step's first query token, T integers."""
    value_starts: Sequence[int]
    """Position of each step's first value token, T integers."""
    memory: KeyValuePairs
    episodes: Tensor
    """Running numbers of the episodes over the whole run, ``[B]`` int64."""
    forward_tokens: int = 0
    """Tokens that passed through either model to roll the batch out."""

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
        """Stack a tensor attribute or property of every `TrajectoryStep`, ``[B, T, ...]``."""
        return torch.stack([getattr(step, field_name) for step in self.steps], dim=1)


@dataclass(frozen=True)
class ArticleReference:
    """Where a trajectory's pairs come from."""

    title: str
    source: str
    """The data set or file."""
    epoch: int
    article_index: int
    """The article's identity in the source."""
    next_position: StreamPosition
    """Right after the article."""


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """A place between two articles of a stream."""

    epoch: int = 0
    """Complete passes over the source."""
    index: int = 0
    """Rows of this epoch that were taken from the source, those of other processes and skipped ones included."""

    def __post_init__(self) -> None:
        if self.epoch < 0 or self.index < 0:
            raise ValueError(f"epoch and index must be at least 0, got {self.epoch} and {self.index}")

    def to_dict(self) -> dict[str, int]:
        """Return the position as a JSON object."""
        return {"epoch": self.epoch, "index": self.index}

    @classmethod
    def from_dict(cls, state: Mapping[str, int]) -> StreamPosition:
        """Read a position from the JSON object that `to_dict` returns.

        Raises:
            ValueError: a key is missing or unknown, or a value is not an integer of 0 or more.
        """
        if set(state) != {"epoch", "index"}:
            raise ValueError(f"a stream position must have the keys 'epoch' and 'index', got {sorted(state)}")
        if not all(type(value) is int for value in state.values()):
            raise ValueError(f"epoch and index must be integers, got {dict(state)}")
        return cls(**state)
