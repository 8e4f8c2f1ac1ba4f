"""Writing a query token by token: as it comes, or with the same shapes at every token, from a CUDA graph (design §6).

A forward of one token is some fifty small kernels a layer, which a GPU runs faster than a host can launch them. A graph
is launched as a whole; it does the same again, at the same addresses. So nothing in a step may depend on how many
tokens there are: the length of the context is a number on the device, new keys and values go to the place that it
names, attention runs over a fixed number of places of which a mask takes out the empty ones, and tokens are drawn and
stored inside. `ReplayedDecoder` captures one such step for each number of places, a multiple of `PLACES`, within one
batch: weights, adapters and hooks are those of the batch, and nothing outlives it. A capture costs about what a step
costs without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import Cache

from attention_rl_trainer.models.attention import VectorCapture
from attention_rl_trainer.models.kv_cache import PreallocatedCache
from attention_rl_trainer.models.rounding import are_equal_states

PLACES = 256
_TRIED_QUERY_TOKENS = 4


class DrawnTokens(NamedTuple):
    """One token for each row: ``[B]`` each, log-probability and entropy in nats."""

    token_ids: Tensor
    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True, eq=False)
class DecodedQuery:
    """A query as it was sampled."""

    token_ids: Tensor
    """``[B, L]`` int64."""
    logprobs: Tensor
    """Log-probability of each token, nats, ``[B, L]``."""
    entropy: Tensor
    """Entropy at each token, nats, ``[B, L]``."""

    def rows(self, rows: slice) -> DecodedQuery:
        """Take some of the rows."""
        return DecodedQuery(self.token_ids[rows], self.logprobs[rows], self.entropy[rows])


class Writer(Protocol):
    """A model that queries are decoded from."""

    def forward(self, token_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Read tokens ``[B, S]`` into the cache; returns their hidden states ``[B, S, C]``."""

    def draw_tokens(self, last_hidden: Tensor, noise: Tensor) -> DrawnTokens:
        """Draw the next token of each row, from states ``[B, C]`` and uniform numbers ``[B]``."""


class QueryDecoder(Protocol):
    """Samples queries, token by token."""

    def decode(
        self,
        cache: Cache,
        last_hidden: Tensor,
        noise: Tensor,
        *,
        read_last: bool,
        captures: Sequence[VectorCapture] = (),
    ) -> DecodedQuery:
        """Sample a query, and add its tokens to the context in the cache.

        Args:
            cache: holds the context.
            last_hidden: the state that predicts the first token, ``[B, C]``.
            noise: uniform numbers in [0, 1), ``[B, L]``.
            read_last: whether the last token is run through the decoder too; without it the cache ends before it.
            captures: what collects the outputs of hooked projections at each token that is read.
        """


class PlainDecoder:
    """Runs every token as it comes."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def decode(
        self,
        cache: Cache,
        last_hidden: Tensor,
        noise: Tensor,
        *,
        read_last: bool,
        captures: Sequence[VectorCapture] = (),
    ) -> DecodedQuery:
        """See `QueryDecoder`."""
        num_tokens = noise.shape[1]
        drawn: list[DrawnTokens] = []
        for position in range(num_tokens):
            drawn.append(self._writer.draw_tokens(last_hidden, noise[:, position]))
            if read_last or position < num_tokens - 1:
                last_hidden = self._writer.forward(drawn[-1].token_ids[:, None], cache)[:, -1]
        columns = zip(*drawn, strict=True)
        return DecodedQuery(*(torch.stack(column, dim=1) for column in columns))


class _State:
    """What every step reads and writes, at the same addresses: B rows, queries of L tokens."""

    def __init__(self, last_hidden: Tensor, noise: Tensor) -> None:
        device, shape = noise.device, noise.shape
        self.last_hidden = torch.empty_like(last_hidden, memory_format=torch.contiguous_format)
        self.noise = torch.empty_like(noise, memory_format=torch.contiguous_format)
        self.token_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
        self.entropy = torch.zeros(shape, dtype=torch.float32, device=device)
        self.vectors: list[Tensor] = []
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.length = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, last_hidden: Tensor, noise: Tensor, length: int) -> None:
        self.last_hidden.copy_(last_hidden)
        self.noise.copy_(noise)
        self.position.zero_()
        self.length.fill_(length)

    def query(self) -> DecodedQuery:
        return DecodedQuery(self.token_ids.clone(), self.logprobs.clone(), self.entropy.clone())


class Graph(Protocol):
    """A step that was captured."""

    def replay(self) -> None:
        """Do it again."""


CaptureStep = Callable[[Callable[[], None], Any], Graph]


class ReplayedDecoder:
    """Runs every token with the same shapes.

    Hooks and adapters must be the same whenever it decodes with the same cache.

    Args:
        writer: the model.
        capture: makes a graph that replays a step, given another one or ``None``; without it steps are run as they are.
    """

    def __init__(self, writer: Writer, capture: CaptureStep | None = None) -> None:
        self._writer = writer
        self._capture = capture
        self._cache: Cache | None = None
        self._state: _State | None = None
        self._graphs: dict[int, Graph] = {}
        self._seen: set[int] = set()

    def decode(
        self,
        cache: Cache,
        last_hidden: Tensor,
        noise: Tensor,
        *,
        read_last: bool,
        captures: Sequence[VectorCapture] = (),
    ) -> DecodedQuery:
        """See `QueryDecoder`; the cache must be a `PreallocatedCache`."""
        assert isinstance(cache, PreallocatedCache)
        if self._state is None or cache is not self._cache or self._state.noise.shape != noise.shape:
            self._cache, self._state = cache, _State(last_hidden, noise)
            self._graphs, self._seen = {}, set()
        state, start = self._state, cache.length
        state.begin(last_hidden, noise, start)
        num_read = noise.shape[1] - (0 if read_last else 1)
        places = cache.places(start + num_read, PLACES)
        step = partial(_step, self._writer, state, cache.at_fixed_places(places, state.length), captures)
        for _ in range(num_read):
            self._run(step, places)
        cache.length = start + num_read
        for capture, vectors in zip(captures, state.vectors, strict=True):
            capture.outputs.append(vectors[:, :num_read].clone())
        if not read_last:
            drawn = self._writer.draw_tokens(state.last_hidden, state.noise[:, -1])
            state.token_ids[:, -1], state.logprobs[:, -1], state.entropy[:, -1] = drawn
        return state.query()

    def _run(self, step: Callable[[], None], places: int) -> None:
        """Run a step: as it is where nothing is captured, or for the first time at so many places; else its replay."""
        if self._capture is None or places not in self._seen:
            # Loads the kernels, which a capture cannot do.
            self._seen.add(places)
            step()
            return
        if places not in self._graphs:
            self._graphs[places] = self._capture(step, next(iter(self._graphs.values()), None))
        self._graphs[places].replay()


def _step(writer: Writer, state: _State, view: Cache, captures: Sequence[VectorCapture]) -> None:
    """Draw a token of each row, store it, and read it."""
    drawn = writer.draw_tokens(state.last_hidden, state.noise.index_select(1, state.position).squeeze(1))
    for columns, column in zip((state.token_ids, state.logprobs, state.entropy), drawn, strict=True):
        columns.index_copy_(1, state.position, column[:, None])
    state.last_hidden.copy_(writer.forward(drawn.token_ids[:, None], view)[:, -1])
    outputs = [capture.outputs.pop() for capture in captures]
    if not state.vectors:
        state.vectors = [output.new_zeros((*state.noise.shape, output.shape[-1])) for output in outputs]
    for vectors, output in zip(state.vectors, outputs, strict=True):
        vectors.index_copy_(1, state.position, output)
    state.position.add_(1)
    state.length.add_(1)


def capture_on_cuda(step: Callable[[], None], other: torch.cuda.CUDAGraph | None) -> torch.cuda.CUDAGraph:
    """Capture a step, in the memory of another capture that does not run at the same time."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as those that load data, may go on allocating.
    with torch.cuda.graph(graph, pool=None if other is None else other.pool(), capture_error_mode="thread_local"):
        step()
    return graph


def make_decoder(writer: Writer, device: torch.device, *, replay: bool) -> QueryDecoder:
    """Make a decoder for one batch, which decodes by replaying if asked to; only on a CUDA device from graphs."""
    if not replay:
        return PlainDecoder(writer)
    return ReplayedDecoder(writer, capture_on_cuda if device.type == "cuda" else None)


def replays_exactly(writer: Writer, make_cache: Callable[[int, int], PreallocatedCache], token_ids: Tensor) -> bool:
    """Prove on two short queries after a prompt ``[B, S]`` that a `ReplayedDecoder` writes what a `PlainDecoder` does.

    What is read after them must have the same states, but for the rounding of another attention kernel. A model whose
    forward asks the device for a number cannot be captured.
    """
    # The first outcome that has any mass, whatever rounding does.
    noise = torch.zeros(len(token_ids), _TRIED_QUERY_TOKENS, dtype=torch.float64, device=token_ids.device)
    num_rows, num_tokens = token_ids.shape
    plain, fixed = (make_cache(num_rows, 3 * num_tokens + 2 * _TRIED_QUERY_TOKENS) for _ in range(2))
    decoders = [make_decoder(writer, token_ids.device, replay=replay) for replay in (False, True)]
    for _ in range(2):
        states = writer.forward(token_ids, plain), writer.forward(token_ids, fixed)
        expected = decoders[0].decode(plain, states[0][:, -1], noise, read_last=True)
        found = decoders[1].decode(fixed, states[1][:, -1], noise, read_last=True)
        if not torch.equal(expected.token_ids, found.token_ids):
            return False
    return are_equal_states(writer.forward(token_ids, fixed), writer.forward(token_ids, plain))
