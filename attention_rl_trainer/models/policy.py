"""One set of weights as two readers: the policy with its adapter, the reference without (design §4, §6).

Turns token ids into hidden states, log-probabilities and decoded queries. The output head runs only where a position is
scored, and always on contiguous hidden states: with frozen weights and no gradient, a strided slice makes the linear
layer copy the head's weight for every row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedTokenizerBase

from attention_rl_trainer.errors import logit_sums
from attention_rl_trainer.memories.tokenization import allowed_token_ids
from attention_rl_trainer.models.adapters import AdapterLayers
from attention_rl_trainer.models.attention import AttentionLayer
from attention_rl_trainer.models.branches import TokenTree, reads_branches_exactly
from attention_rl_trainer.models.causal_lm import (
    LogitsHead,
    backbone,
    base_language_model,
    default_logits_chunk_size,
    input_embeddings,
    output_head,
)
from attention_rl_trainer.models.decoding import DrawnTokens, replays_exactly
from attention_rl_trainer.models.grouped_attention import grouped_attention
from attention_rl_trainer.models.heads import AttentionReader, Capture, ChosenHeads, HeadNumber
from attention_rl_trainer.models.key_vectors import KeyVectorCache, embed_by_length, extract_embeddings
from attention_rl_trainer.models.kv_cache import PreallocatedCache, cache_argument, keeps_every_token, new_cache
from attention_rl_trainer.models.modes import deterministic_inference
from attention_rl_trainer.models.padding import PaddedCache, PaddingReader, reads_padding_exactly
from attention_rl_trainer.models.projections import UnsupportedArchitectureError, described
from attention_rl_trainer.models.sampling import sample_by_inverse
from attention_rl_trainer.options import Count, Options, Positive, option
from attention_rl_trainer.types import PADDING, is_token

logger = logging.getLogger(__name__)

# Different numbers, so that neither can be taken for the other, nor for a number of heads or experts.
_TRIED_ROWS = 5
_TRIED_TOKENS = 7


@dataclass
class PolicyOptions(Options):
    """How the policy writes, and what is held in memory for it."""

    query_temperature: Positive = option(1.0, "Divides the logits of query tokens, everywhere.")
    attention_layer: int = option(-1, "Layer whose attention selects; negative numbers count from the last.")
    attention_heads: list[str] | str | None = option(
        "layer",
        "Heads that select: 'layer' for all of attention_layer, 'probe' for those that find a pair best by half of its "
        "key, of all layers, or a list such as 17.3,18.0 (layer.head, from 0).",
    )
    probe_heads: Count = option(8, "How many heads attention_heads='probe' takes.")
    joint_reading: bool = option(
        True,
        "Read as policy and as reference in one batch, where that is proved equal to reading one after the other.",
    )
    cuda_graphs: bool = option(
        True,
        "On a CUDA device, decode queries by replaying a graph of kernels, where that is proved equal to decoding "
        "without.",
    )
    embedding_batch_size: Count = option(32, "Keys embedded in one forward.")
    logits_chunk_size: Count | None = option(
        None,
        "Positions whose vocabulary logits are held at once. Default: as many as take 64 MiB (CPU: 40) in float32.",
    )

    @property
    def head_numbers(self) -> tuple[HeadNumber, ...] | None:
        """The heads that ``attention_heads`` names; ``None`` where it says how they are found."""
        given = self.attention_heads
        if given in ("layer", "probe"):
            return None
        listed = [given] if isinstance(given, str) else given or []
        if not isinstance(listed, list | tuple) or not all(isinstance(item, str) for item in listed):
            raise ValueError(f"put quotes around heads, because the number 18.10 is 18.1; got {given!r}")
        return tuple(HeadNumber.parse(text) for item in listed for text in str(item).split(","))

    def check_options(self) -> None:
        """Check the ranges, and the form of ``attention_heads``."""
        super().check_options()
        try:
            named = self.head_numbers
        except ValueError as error:
            raise ValueError(f"attention_heads must be 'layer', 'probe' or a list of heads: {error}") from error
        if named is not None and (not named or len(set(named)) < len(named)):
            raise ValueError(
                f"attention_heads must be 'layer', 'probe' or a list of different heads, got {self.attention_heads!r}"
            )


class PolicyModel:
    """The adapted model (policy) and the same weights with the adapter disabled (reference).

    Args:
        allowed_ids: the ids that a query may contain, ascending, int64.
        key_cache_bytes: memory for the vectors of keys that were embedded before.

    Attributes:
        embedded_tokens: tokens of the keys that were embedded so far, those of remembered keys left out.

    Raises:
        ValueError: the adapter trains the output head.
        UnsupportedArchitectureError: attention or logits cannot be read off the model.
    """

    def __init__(
        self,
        model: PeftModel,
        allowed_ids: Tensor,
        options: PolicyOptions | None = None,
        *,
        key_cache_bytes: int = 64 * 2**20,
    ) -> None:
        options = options or PolicyOptions()
        self.model = model
        self.causal_lm = base_language_model(model)
        self.backbone = backbone(self.causal_lm)
        self.head = LogitsHead(self.causal_lm)
        if any(parameter.requires_grad for parameter in self.head.linear.parameters()):
            raise ValueError(
                "the output head has trainable parameters, but the base model and the previous adapter are scored with "
                "the same head; leave it out of the adapter's target_modules"
            )
        named = options.head_numbers
        self.attention: AttentionReader = (
            AttentionLayer(self.causal_lm, options.attention_layer)
            if named is None
            else ChosenHeads(self.causal_lm, named)
        )
        self._cache_argument = cache_argument(self.backbone, self.causal_lm)
        self._padding = PaddingReader(self.causal_lm, self.backbone)
        self.query_temperature = options.query_temperature
        self.logits_chunk_size = options.logits_chunk_size or default_logits_chunk_size(
            self.head.linear.weight.shape[0], on_cpu=self.device.type == "cpu"
        )
        self.embedding_batch_size = options.embedding_batch_size
        self.key_cache = KeyVectorCache(key_cache_bytes)
        self.embedded_tokens = 0
        self.allowed_ids = allowed_ids.to(self.device)
        self._first_id, self._last_id = int(allowed_ids[0]), int(allowed_ids[-1])
        self._is_range = self._last_id - self._first_id + 1 == len(allowed_ids)
        self.adapter = AdapterLayers(model)
        self._joint_reading = options.joint_reading
        self._cuda_graphs = options.cuda_graphs

    @classmethod
    def of(cls, model: PeftModel, tokenizer: PreTrainedTokenizerBase, options: PolicyOptions) -> PolicyModel:
        """Make the policy of a run: its queries consist of the tokenizer's ordinary tokens."""
        vocabulary_size = output_head(base_language_model(model)).weight.shape[0]
        return cls(model, allowed_token_ids(tokenizer, vocabulary_size), options)

    def choose_heads(self, numbers: Sequence[HeadNumber]) -> None:
        """Read vectors off these heads from now on."""
        if isinstance(self.attention, ChosenHeads) and self.attention.numbers == tuple(numbers):
            return
        self.attention = ChosenHeads(self.causal_lm, numbers)
        self.key_cache = KeyVectorCache(self.key_cache.max_bytes)

    @property
    def device(self) -> torch.device:
        """The device that token ids must be on."""
        return input_embeddings(self.causal_lm).weight.device

    def reference(self) -> AbstractContextManager[None]:
        """Let the reference read while the context lasts. May be nested."""
        return self.adapter.disabled()

    def jointly(self, num_rows: int) -> AbstractContextManager[None]:
        """Let the policy read the first rows of a batch and the reference the others; without the adapter's dropout."""
        return self.adapter.on_first_rows(num_rows)

    @cached_property
    def can_read_jointly(self) -> bool:
        """Whether policy and reference can be rows of one batch: proved on a few tokens."""
        if not self._joint_reading or not keeps_every_token(self.causal_lm):
            return False
        with self.inference():
            return self.adapter.can_adapt_rows(self.forward, self._tried_ids())

    @cached_property
    def can_replay(self) -> bool:
        """Whether queries can be decoded from a CUDA graph: proved on a few tokens."""
        if not self._cuda_graphs or self.device.type != "cuda" or not keeps_every_token(self.causal_lm):
            return False
        make_cache = partial(PreallocatedCache.of, self.causal_lm)
        try:
            with self.inference():
                return replays_exactly(self, make_cache, self._tried_ids())
        except torch.OutOfMemoryError:
            raise
        # Whatever a model's own code does with a cache whose length is on the device.
        except Exception as error:
            name = type(self.causal_lm).__name__
            logger.warning("a step of %s cannot be captured as a CUDA graph, so there are none: %s", name, error)
            return False

    def _tried_ids(self) -> Tensor:
        count = _TRIED_ROWS * _TRIED_TOKENS
        places = torch.arange(count, device=self.allowed_ids.device) % len(self.allowed_ids)
        return self.allowed_ids[places].view(_TRIED_ROWS, _TRIED_TOKENS)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode, no gradients, and the attention that reads a cache fastest, while the context lasts."""
        with deterministic_inference(self.model), grouped_attention(self.causal_lm):
            yield

    def new_cache(self, num_rows: int, capacity: int, *, padded: bool = False) -> Cache:
        """Make an empty key-value cache for at most ``capacity`` tokens per row, some of them padding if ``padded``."""
        return new_cache(self.causal_lm, num_rows, capacity, padded=padded)

    def forward(self, token_ids: Tensor, cache: Cache | None = None, *, padded: bool = False) -> Tensor:
        """Hidden states of new tokens, ``[B, S]`` to ``[B, S, C]``; the tokens are added to the cache.

        Args:
            padded: whether there may be padding among them; a cache knows that itself.
        """
        inputs = self._inputs(token_ids, cache, padded=padded)
        output = self.backbone(**inputs, use_cache=cache is not None, **{self._cache_argument: cache})
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _inputs(self, token_ids: Tensor, cache: Cache | None, *, padded: bool) -> dict[str, Any]:
        if isinstance(cache, PreallocatedCache | PaddedCache):
            are_tokens = cache.note(token_ids)
        else:
            are_tokens = is_token(token_ids) if padded else None
        return {"input_ids": token_ids} if are_tokens is None else self._padding.inputs(token_ids, are_tokens)

    def forward_tree(self, tree: TokenTree) -> Tensor:
        """Hidden states of a tree's tokens, ``[B, n, C]``.

        Raises:
            UnsupportedArchitectureError: the model does not read a branch as it reads a text.
        """
        return self._read(self._tree_inputs(tree))

    def _tree_inputs(self, tree: TokenTree) -> dict[str, Any]:
        if not self.reads_trees:
            raise UnsupportedArchitectureError(
                f"{described(self.causal_lm)} does not read a tree of tokens as it reads each of its texts: its layers "
                "are no plain attention, or take positions or masks of their own"
            )
        return self._padding.tree_inputs(tree.token_ids, tree.sees())

    def _read(self, inputs: dict[str, Any]) -> Tensor:
        hidden: Tensor = self.backbone(**inputs, use_cache=False).last_hidden_state
        return hidden

    @cached_property
    def reads_trees(self) -> bool:
        """Whether a tree's branches read like texts that end in them: proved on a few tokens."""
        if not self._padding.can_be:
            return False

        def read(tree: TokenTree) -> Tensor:
            return self._read(self._padding.tree_inputs(tree.token_ids, tree.sees()))

        try:
            with self.inference(), self.reference():
                return reads_branches_exactly(read, self.forward, self._tried_ids())
        except torch.OutOfMemoryError:
            raise
        # Whatever a model's own code does with a mask of four dimensions.
        except Exception as error:
            logger.debug("a tree cannot be read: %s", error)
            return False

    @cached_property
    def reads_padding(self) -> bool:
        """Whether padding among tokens changes nothing: proved on a few tokens."""
        if not self._padding.can_be:
            return False
        with self.inference():
            return reads_padding_exactly(self.forward, self._tried_ids())

    def embed_keys(self, token_ids: Tensor) -> Tensor:
        """The keys' vectors, adapters disabled, looked up or computed: ``[n, K]`` int64 to ``[n, G, D]`` float32."""
        return self.key_cache.embed(token_ids.cpu(), self.embed_unseen)

    def embed_unseen(self, token_ids: Tensor) -> Tensor:
        """Compute the keys' vectors, remembering nothing."""
        self.embedded_tokens += int(is_token(token_ids).sum())
        with self.inference(), self.reference():
            return embed_by_length(token_ids, self._embed)

    def _embed(self, token_ids: Tensor) -> Tensor:
        return extract_embeddings(self.backbone, self.attention, token_ids.to(self.device), self.embedding_batch_size)

    def query_log_probabilities(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next query token, ``[..., C]`` to ``[..., A]``: the softmax of `query_logits`."""
        return torch.log_softmax(self.query_logits(hidden), dim=-1)

    def query_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next query token on the axis of the A allowed ids, divided by the temperature, in float32."""
        logits = self.head(hidden)
        if self._is_range:
            allowed = logits[..., self._first_id : self._last_id + 1]
        else:
            allowed = logits.index_select(-1, self.allowed_ids)
        if self.query_temperature != 1:
            allowed = allowed / self.query_temperature
        return allowed

    def allowed_index(self, token_ids: Tensor) -> Tensor:
        """Translate allowed ids, of any shape, into places on their axis."""
        return torch.searchsorted(self.allowed_ids, token_ids.contiguous())

    def token_logprobs(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """`score_tokens` in chunks: states ``[B, n, C]`` and tokens ``[B, n]`` to ``[B, n]``, nats."""
        return self._in_chunks(self.score_tokens, hidden, token_ids)

    def query_token_logprobs(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """`score_query_tokens` in chunks: states ``[B, n, C]`` and tokens ``[B, n]`` to ``[B, n]``, nats."""
        return self._in_chunks(self.score_query_tokens, hidden, token_ids)

    def score_query_tokens(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Log-probability of query tokens over the allowed ids, from the states ``[n, C]`` before them, ``[n]``."""
        return self.query_log_probabilities(hidden).gather(1, self.allowed_index(token_ids)[:, None]).squeeze(1)

    def _in_chunks(self, score: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, token_ids: Tensor) -> Tensor:
        chunks = zip(
            torch.split(hidden.flatten(0, 1), self.logits_chunk_size),
            torch.split(token_ids.flatten(), self.logits_chunk_size),
            strict=True,
        )
        return torch.cat([score(states, ids) for states, ids in chunks]).view(token_ids.shape)

    def score_tokens(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Log-probability of article tokens over the whole vocabulary, from the states ``[n, C]`` that predict them.

        In nats, ``[n]`` float32; 0 for padding, NaN where any token's logit is not finite.
        """
        logits = self.head(hidden)
        logprobs = -nn.functional.cross_entropy(logits, token_ids, reduction="none", ignore_index=PADDING)
        # A single -inf leaves the other tokens' probabilities finite.
        return logprobs.masked_fill(~logit_sums(logits).isfinite(), torch.nan)

    def draw_tokens(self, last_hidden: Tensor, noise: Tensor) -> DrawnTokens:
        """Draw the next query token of each row.

        Args:
            last_hidden: the states that predict it, ``[B, C]``.
            noise: uniform numbers in [0, 1), ``[B]``.
        """
        log_probabilities = self.query_log_probabilities(last_hidden)
        probabilities = log_probabilities.exp()
        index = sample_by_inverse(probabilities, noise)
        logprobs = log_probabilities.gather(1, index[:, None]).squeeze(1)
        # `entropy` takes logarithms once more, which costs as much as half of the head.
        entropy: Tensor = -torch.linalg.vecdot(probabilities, log_probabilities)
        return DrawnTokens(self.allowed_ids[index], logprobs, entropy)

    def training_forward(
        self, model: nn.Module, tokens: Tensor | TokenTree, *, capture_queries: bool, padded: bool = False
    ) -> tuple[Tensor, Capture | None]:
        """Run whole trajectories with gradients, through the wrapper that the trainer holds.

        Args:
            model: the model as the trainer wrapped it; a distributed wrapper must see the forward.
            tokens: ``[b, S]`` int64, or a tree whose trunk they are.

        Returns:
            Hidden states ``[b, S, C]``, and the attention layer's query heads where wanted.
        """
        if isinstance(tokens, TokenTree):
            inputs = self._tree_inputs(tokens)
        else:
            inputs = self._inputs(tokens, None, padded=padded)
        states: list[Tensor] = []

        def keep_states(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            # What the head is given: not every wrapper calls the backbone itself. Its own logits are not used, so it
            # gets a single position.
            states.append(arguments[0])
            return (arguments[0].flatten(0, -2)[:1],)

        handle = self.head.linear.register_forward_pre_hook(keep_states)
        try:
            with self.attention.capture_queries() if capture_queries else nullcontext() as capture:
                model(**inputs, use_cache=False)
            return states[0], capture
        finally:
            handle.remove()
