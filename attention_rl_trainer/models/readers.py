"""Policy and reference reading one context: what each step of a trajectory asks of the two (design §6).

Both hold the context in a key-value cache. A step writes a query with each, lets both read the response, and brings the
reference, which has read its own query, level with the policy. `JointReaders` does so with policy and reference in one
batch: a forward of 2B rows of a few tokens costs little more than one of B. `SeparateReaders` does so one after the
other, for adapters other than plain LoRA and for models whose layers forget tokens. All tokens are ``[B, S]`` int64;
``capacity`` is the number of tokens of the longest context.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_rl_trainer.models.decoding import DecodedQuery, make_decoder
from attention_rl_trainer.models.heads import Capture
from attention_rl_trainer.models.kv_cache import PreallocatedCache
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.models.projections import UnsupportedArchitectureError, described


@dataclass(frozen=True, eq=False)
class StepQueries:
    """What both readers write in the same context."""

    query: DecodedQuery
    """The policy's query."""
    vectors: Tensor
    """Its attention vectors, averaged over its tokens, ``[B, H, D]`` in float32."""
    counterfactual: DecodedQuery
    """The reference's query."""
    others: Sequence[DecodedQuery] = ()
    """Further queries of the policy, Q - 1 of them."""


class Readers(ABC):
    """Policy and reference that have read the same context."""

    def __init__(self, policy: PolicyModel, prompt: Tensor, *, padded: bool) -> None:
        self._policy = policy
        self._prompt = prompt
        self._padded = padded
        self._prompt_reader: ContextReader | None = None

    @property
    def forward_tokens(self) -> int:
        """Tokens that passed through either model so far."""
        return self._context_tokens + (0 if self._prompt_reader is None else self._prompt_reader.forward_tokens)

    @property
    @abstractmethod
    def _context_tokens(self) -> int:
        """Those of them that were read in the shared context."""

    @abstractmethod
    def write_queries(
        self, noise: Tensor, counterfactual_noise: Tensor, other_noise: Tensor | None = None
    ) -> StepQueries:
        """Let both write a query, each from its own uniform numbers in [0, 1), ``[B, L]``.

        Args:
            other_noise: for further queries of the policy, which are forgotten, ``[B, Q - 1, L]``.
        """

    @abstractmethod
    def read_response(self, block: Tensor, num_scored: int) -> tuple[Tensor, Tensor]:
        """Let each read the response after its own query; the reference ``num_scored`` tokens of it at least.

        Returns the policy's hidden states, ``[B, S, C]``, and the reference's, at least ``[B, num_scored, C]``.
        """

    @abstractmethod
    def follow(self, token_ids: Tensor) -> Tensor:
        """Let the reference read the policy's query and the response in place of its own; returns its hidden states."""

    def read_after_prompt(self, token_ids: Tensor) -> Tensor:
        """Let the reference read tokens right after the prompt, as many at each call, and forget them.

        Returns its hidden states, ``[B, S, C]``.
        """
        num_tokens = token_ids.shape[1]
        with self._policy.reference():
            if self._prompt_reader is None:
                capacity = self._prompt.shape[1] + num_tokens
                self._prompt_reader = ContextReader(self._policy, self._prompt, capacity, padded=self._padded)
            self._prompt_reader.mark()
            hidden = self._prompt_reader.read(token_ids)
            self._prompt_reader.roll_back(num_tokens)
        return hidden


def open_readers(
    policy: PolicyModel,
    prompt: Tensor,
    capacity: int,
    *,
    joint: bool | None = None,
    replay: bool | None = None,
    padded: bool = False,
    num_queries: int = 1,
) -> Readers:
    """Let policy and reference read a prompt.

    Args:
        joint: whether in one batch; by default wherever they can.
        replay: whether they decode by `ReplayedDecoder`; by default where the policy can and there is no padding.
        padded: whether there may be padding among the tokens.
        num_queries: Q, those that the policy writes in a context.

    Raises:
        UnsupportedArchitectureError: there is padding, and the model does not read as if there was none.
        ValueError: ``joint`` is asked of a model or an adapter that cannot.
    """
    if joint is None:
        joint = policy.can_read_jointly
    elif joint and not policy.can_read_jointly:
        raise ValueError(
            "policy and reference share a batch only with plain LoRA on linear layers and a model that keeps every "
            "token in its cache; leave joint unset"
        )
    if padded:
        expect_reads_padding(policy)
    replay = policy.can_replay and not padded if replay is None else replay
    if joint:
        return JointReaders(policy, prompt, capacity, replay=replay, padded=padded, num_queries=num_queries)
    return SeparateReaders(policy, prompt, capacity, replay=replay, padded=padded)


def expect_reads_padding(policy: PolicyModel) -> None:
    """Refuse a model that does not read as if there was no padding.

    Raises:
        UnsupportedArchitectureError: it does not.
    """
    if not policy.reads_padding:
        raise UnsupportedArchitectureError(
            f"{described(policy.causal_lm)} does not leave out padding, so it cannot read keys and values of different "
            "lengths in one batch; use texts cut into pairs of one length, or another base model"
        )


class ContextReader:
    """One model reading a context: its cache, and the state that predicts the next token.

    The caller sets whether it reads as policy or as reference.
    """

    def __init__(
        self, policy: PolicyModel, prompt: Tensor, capacity: int, *, replay: bool = False, padded: bool = False
    ) -> None:
        self._policy = policy
        self.cache = policy.new_cache(prompt.shape[0], capacity, padded=padded)
        self._decoder = make_decoder(policy, policy.device, replay=replay)
        self.forward_tokens = 0
        self.last_hidden = self.read(prompt)[:, -1]
        self.mark()

    def read(self, token_ids: Tensor) -> Tensor:
        """Add tokens to the context; returns their hidden states ``[B, S, C]``."""
        hidden = self._policy.forward(token_ids, self.cache)
        self.last_hidden = hidden[:, -1]
        self.forward_tokens += token_ids.numel()
        return hidden

    def decode(self, noise: Tensor, *, read_last: bool, capture: Capture | None = None) -> DecodedQuery:
        """Sample a query in the present context; ``capture`` collects its vectors."""
        self.forward_tokens += noise.shape[0] * (noise.shape[1] - (0 if read_last else 1))
        captures = () if capture is None else capture.parts
        return self._decoder.decode(self.cache, self.last_hidden, noise, read_last=read_last, captures=captures)

    def mark(self) -> None:
        """Remember the present context for `roll_back`: a copy where a layer forgets old tokens or has a state."""
        self._saved_hidden = self.last_hidden
        # The policy preallocates wherever every layer keeps every token.
        self._saved = self.cache if isinstance(self.cache, PreallocatedCache) else copy.deepcopy(self.cache)

    def roll_back(self, num_tokens: int) -> None:
        """Forget the tokens that were read since `mark`."""
        self.last_hidden = self._saved_hidden
        if self._saved is self.cache:
            self.cache.crop(-num_tokens)
        else:
            self.cache = self._saved


class SeparateReaders(Readers):
    """Policy and reference one after the other, each with a cache of its own."""

    def __init__(
        self, policy: PolicyModel, prompt: Tensor, capacity: int, *, replay: bool = False, padded: bool = False
    ) -> None:
        super().__init__(policy, prompt, padded=padded)
        self._reader = ContextReader(policy, prompt, capacity, replay=replay, padded=padded)
        with policy.reference():
            self._reference = ContextReader(policy, prompt, capacity, replay=replay, padded=padded)
        self._last_token = prompt[:, -1:]
        self._ahead = 0

    @property
    def _context_tokens(self) -> int:
        return self._reader.forward_tokens + self._reference.forward_tokens

    def _write_other(self, noise: Tensor) -> DecodedQuery:
        self._reader.mark()
        # Hooked as the query that goes on is: what was captured as a graph is replayed with its hooks.
        with self._policy.attention.capture_queries() as capture:
            query = self._reader.decode(noise, read_last=False, capture=capture)
        self._reader.roll_back(noise.shape[1] - 1)
        return query

    def write_queries(
        self, noise: Tensor, counterfactual_noise: Tensor, other_noise: Tensor | None = None
    ) -> StepQueries:
        """See `Readers`."""
        others = [self._write_other(of_one) for of_one in _by_query(other_noise)]
        with self._policy.attention.capture_queries() as capture:
            query = self._reader.decode(noise, read_last=True, capture=capture)
        with self._policy.reference():
            self._reference.mark()
            counterfactual = self._reference.decode(counterfactual_noise, read_last=False)
        self._last_token = counterfactual.token_ids[:, -1:]
        self._ahead = counterfactual.token_ids.shape[1] - 1
        return StepQueries(query, capture.mean(), counterfactual, others)

    def read_response(self, block: Tensor, num_scored: int) -> tuple[Tensor, Tensor]:
        """See `Readers`."""
        hidden = self._reader.read(block)
        with self._policy.reference():
            after_own = self._reference.read(torch.cat([self._last_token, block[:, :num_scored]], dim=1))
        self._ahead += after_own.shape[1]
        return hidden, after_own[:, 1:]

    def follow(self, token_ids: Tensor) -> Tensor:
        """See `Readers`."""
        self._reference.roll_back(self._ahead)
        with self._policy.reference():
            return self._reference.read(token_ids)


class JointReaders(Readers):
    """Policy and reference in one batch: the rows of the policy's other queries, its own B rows, the reference's B.

    Args:
        num_queries: Q, those that the policy writes in a context.
    """

    def __init__(
        self,
        policy: PolicyModel,
        prompt: Tensor,
        capacity: int,
        *,
        replay: bool = False,
        padded: bool = False,
        num_queries: int = 1,
    ) -> None:
        super().__init__(policy, prompt, padded=padded)
        self._rows = rows = prompt.shape[0]
        self._other_rows = others = (num_queries - 1) * rows
        self._cache = PreallocatedCache.of(policy.causal_lm, others + 2 * rows, capacity, padded=padded)
        self._decoder = make_decoder(policy, policy.device, replay=replay)
        self._own_tokens = 0
        self._last_hidden = self._read(prompt.repeat(num_queries + 1, 1), self._cache, others + rows)[:, -1]
        self._other_cache = self._cache.view(slice(0, others))
        self._pair_cache = self._cache.view(slice(others, others + 2 * rows))
        self._reference_cache = self._cache.view(slice(others + rows, others + 2 * rows))

    @property
    def _context_tokens(self) -> int:
        return self._own_tokens

    def write_queries(
        self, noise: Tensor, counterfactual_noise: Tensor, other_noise: Tensor | None = None
    ) -> StepQueries:
        """See `Readers`."""
        every = torch.cat([*_by_query(other_noise), noise, counterfactual_noise])
        by_policy = self._other_rows + self._rows
        with self._policy.jointly(by_policy), self._policy.attention.capture_queries() as capture:
            decoded = self._decoder.decode(
                self._cache, self._last_hidden, every, read_last=True, captures=capture.parts
            )
        self._own_tokens += every.numel()
        *others, query, counterfactual = (
            decoded.rows(slice(start, start + self._rows)) for start in range(0, len(every), self._rows)
        )
        return StepQueries(query, capture.mean()[self._other_rows : by_policy], counterfactual, others)

    def read_response(self, block: Tensor, num_scored: int) -> tuple[Tensor, Tensor]:
        """See `Readers`; the reference reads the whole block too, because the batch is rectangular."""
        self._pair_cache.length = self._cache.length
        hidden = self._read(block.repeat(2, 1), self._pair_cache, self._rows)
        self._last_hidden = hidden[:, -1]
        return hidden[: self._rows], hidden[self._rows :]

    def follow(self, token_ids: Tensor) -> Tensor:
        """See `Readers`; where the policy wrote other queries, they give way too."""
        end = self._pair_cache.length
        before = end - token_ids.shape[1]
        self._reference_cache.length = before
        with self._policy.reference():
            hidden = self._policy.forward(token_ids, self._reference_cache)
        self._own_tokens += token_ids.numel()
        last_hidden = [self._last_hidden[: self._rows], hidden[:, -1]]
        if self._other_rows > 0:
            self._other_cache.length = before
            read = self._read(token_ids.repeat(self._other_rows // self._rows, 1), self._other_cache, self._other_rows)
            last_hidden = [read[:, -1], *last_hidden]
        self._cache.length = end
        self._last_hidden = torch.cat(last_hidden)
        return hidden

    def _read(self, token_ids: Tensor, cache: PreallocatedCache, by_policy: int) -> Tensor:
        """Let the first rows be read by the policy and the others by the reference."""
        self._own_tokens += token_ids.numel()
        with self._policy.jointly(by_policy):
            return self._policy.forward(token_ids, cache)


def _by_query(noise: Tensor | None) -> Sequence[Tensor]:
    return () if noise is None else noise.unbind(dim=1)
