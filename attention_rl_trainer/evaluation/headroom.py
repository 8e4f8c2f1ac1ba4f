"""What an order of reading could be worth on some data, and whether keys can tell it, before anything is trained.

Of each memory the frozen base model gives A(k), what reading value k first tells about the other values
(`rollout.information`). Blind choice earns the mean of A, the best choice its maximum; the difference is the headroom.
A selector sees keys alone, so several readers of keys are fitted to A on some memories and choose on others, which come
from other articles. What share of the headroom their choices earn is what keys tell:

    key's mean   the mean of A over the memories in which the same key occurs, where keys recur
    heads        Σ_h w_h cos(q_h - μ, key_g(h) - μ) over all heads: other weights of the selector's heads
    layer        u · key, the keys of one layer: a query that is the same in every context
    rank 8       (q + U Vᵀ q) · key of that layer: a change of the query projection that LoRA of rank 8 can make

with q the query vectors where nothing is asked yet. Ridge regressions, strengths and the layer by cross-validation over
articles; the reader that is reported is the one that was best there, not on the memories that it is measured on.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from attention_rl_trainer.evaluation.estimates import Estimate, clustered_mean, clustered_ratio
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.models.heads import readable_layers
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.probing.fit import means_of
from attention_rl_trainer.probing.vectors import LayerVectors, join_vectors, unasked_vectors
from attention_rl_trainer.rollout.information import first_choice_values
from attention_rl_trainer.rollout.layout import Layout
from attention_rl_trainer.types import is_token

_FOLDS = 5
_RIDGES = tuple(10.0**power for power in range(-3, 6))
"""Strengths that are tried, as multiples of the features' mean square."""
_RANK = 8
_RANK_STEPS, _RANK_LEARNING_RATE = 200, 0.02
_RANK_DECAYS = (0.01, 0.1, 1.0, 10.0)
KEYS_MEAN, HEADS, LAYER, LOW_RANK = "key's mean", "heads", "layer", "rank 8"


@dataclass(frozen=True, eq=False)
class Tables:
    """Memories, and what each choice is worth in them."""

    values: Tensor
    """A at the first step, nats per token, ``[n, M]``."""
    layers: Mapping[int, LayerVectors]
    keys: Sequence[Sequence[tuple[int, ...]]]
    """The keys' tokens, n times M."""
    articles: Sequence[Hashable]
    """Of each memory."""

    def rows(self, rows: Sequence[int]) -> Tables:
        """Take some memories."""
        layers = {
            number: LayerVectors(vectors.queries[list(rows)], vectors.keys[list(rows)])
            for number, vectors in self.layers.items()
        }
        articles, keys = [self.articles[row] for row in rows], [self.keys[row] for row in rows]
        return Tables(self.values[list(rows)], layers, keys, articles)


def read_tables(
    policy: PolicyModel,
    layout: Layout,
    memories: MemoryBatch,
    articles: Sequence[Hashable],
    *,
    show_progress: bool = False,
) -> Tables:
    """Score every first choice of each memory, and take the vectors of all layers that could select.

    Raises:
        UnsupportedArchitectureError: the model does not read trees, or its attention cannot be read.
        ValueError: a memory has a single pair.
    """
    if memories.pair_numbers.shape[1] < 2:
        raise ValueError("a memory of one pair has one order; raise num_kv_pairs or subset_fraction")
    layers, values, vectors = readable_layers(policy.causal_lm), [], []
    hidden = None if show_progress else True  # None: where standard error is no terminal
    for row in tqdm(range(len(memories)), "Reading what each value tells", disable=hidden, leave=False):
        memory = memories.select_rows([row]).trimmed()
        values.append(first_choice_values(policy, layout, memory).cpu())
        found = unasked_vectors(policy, layout, memory, layers)
        vectors.append({n: LayerVectors(v.queries.cpu(), v.keys.cpu()) for n, v in found.items()})
    keys = [[tuple(key[is_token(key)].tolist()) for key in row] for row in memories.key_tokens]
    return Tables(torch.cat(values), join_vectors(vectors), keys, articles)


def articles_of(memories: MemoryBatch, *names: str) -> list[Hashable]:
    """Name the article of each memory; ``names`` of the data tell it from the articles of other data."""
    return [(*names, article.source, article.article_index) for article in memories.articles]


Reader = Callable[[Tables], Tensor]
"""Scores the choices of memories by their keys: ``[n, M]``."""


Fit = Callable[[Tables], Reader]


def _centered(values: Tensor) -> Tensor:
    centered: Tensor = values - values.mean(dim=1, keepdim=True)
    return centered


def _ridge(features: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Fit weights ``[F]`` of features ``[n, M, F]`` to targets ``[n, M]``, both less their means in each memory."""
    inputs = _centered(features).flatten(0, 1).double()
    outputs = _centered(targets).flatten().double()
    scale = inputs.square().mean() * len(inputs)
    square = inputs.T @ inputs + strength * scale * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights: Tensor = torch.linalg.solve(square, inputs.T @ outputs)
    return weights


def _fit_ridge(features_of: Callable[[Tables], Tensor], tables: Tables, strength: float) -> Reader:
    weights = _ridge(features_of(tables), tables.values, strength)
    return lambda other: (features_of(other).double() @ weights).float()


def _fit_keys_mean(tables: Tables) -> Reader:
    """Shrink each key's mean worth towards 0 by one occurrence; 0 for a key that was not seen."""
    totals: dict[tuple[int, ...], tuple[float, int]] = {}
    for keys, worths in zip(tables.keys, _centered(tables.values).tolist(), strict=True):
        for key, worth in zip(keys, worths, strict=True):
            total, count = totals.get(key, (0.0, 0))
            totals[key] = total + worth, count + 1
    means = {key: total / (count + 1) for key, (total, count) in totals.items()}
    return lambda other: torch.tensor([[means.get(key, 0.0) for key in keys] for keys in other.keys])


class _Means:
    """The vectors' means over some memories, by layer."""

    def __init__(self, tables: Tables) -> None:
        self._of = functools.cache(lambda layer: means_of(tables.layers[layer]))

    def queries(self, tables: Tables, layer: int) -> Tensor:
        """Less their mean, ``[n, H, D]``."""
        return tables.layers[layer].queries[:, 0] - self._of(layer)[0]

    def keys(self, tables: Tables, layer: int) -> Tensor:
        """Less their mean, ``[n, M, G, D]``."""
        return tables.layers[layer].keys - self._of(layer)[1]

    def cosines(self, tables: Tables) -> Tensor:
        """Of every head of every layer, ``[n, M, heads]``."""
        parts = []
        for layer in tables.layers:
            queries, keys = (
                F.normalize(self.queries(tables, layer), dim=-1),
                F.normalize(self.keys(tables, layer), dim=-1),
            )
            per_group = queries.shape[1] // keys.shape[2]
            parts.append(torch.einsum("nhd,nmhd->nmh", queries, keys.repeat_interleave(per_group, dim=2)))
        return torch.cat(parts, dim=2)

    def flat_keys(self, layer: int, tables: Tables) -> Tensor:
        """Of one layer, ``[n, M, G · D]``."""
        return self.keys(tables, layer).flatten(2)


def _fit_low_rank(tables: Tables, layer: int, decay: float) -> Reader:
    """Fit a change of the queries, constant and of rank 8 in the query, so that the choice's expected worth is high."""
    means = _Means(tables)
    queries, keys = means.queries(tables, layer), means.keys(tables, layer)
    num_heads, num_groups, width = queries.shape[1], keys.shape[2], queries.shape[2]
    # Both of about length 1, so that one rate and one decay suit any model.
    query_scale, key_scale = queries.flatten(1).norm(dim=1).mean(), keys.flatten(2).norm(dim=2).mean()
    worth = _centered(tables.values) / tables.values.std(dim=1).mean()
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(num_heads * width, _RANK, generator=generator).mul_(0.3).requires_grad_()
    up = torch.zeros(_RANK, num_groups * width).requires_grad_()
    constant = torch.zeros(num_groups * width).requires_grad_()

    def score(other: Tables) -> Tensor:
        # The heads of a group are compared with the same keys, so their sum is all that counts.
        asked = means.queries(other, layer).flatten(1) / query_scale
        return torch.einsum("nf,nmf->nm", asked @ down @ up + constant, means.keys(other, layer).flatten(2) / key_scale)

    optimizer = torch.optim.AdamW([down, up, constant], lr=_RANK_LEARNING_RATE, weight_decay=decay)
    for _ in range(_RANK_STEPS):
        loss = -(score(tables).softmax(dim=1) * worth).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # not annotated upstream
        optimizer.step()
    return lambda other: score(other).detach()


def _candidates(tables: Tables) -> dict[str, list[tuple[str, Fit]]]:
    """List the settings that cross-validation chooses from, by reader, each with its fit; of `LAYER` see below."""

    def heads(strength: float, part: Tables) -> Reader:
        return _fit_ridge(_Means(part).cosines, part, strength)

    found: dict[str, list[tuple[str, Fit]]] = {
        HEADS: [(f"ridge {ridge:g}", partial(heads, ridge)) for ridge in _RIDGES]
    }
    if sum(map(len, tables.keys)) > len({key for keys in tables.keys for key in keys}):
        found[KEYS_MEAN] = [("", _fit_keys_mean)]
    return found


def _layer_candidates(tables: Tables) -> dict[int, list[tuple[str, Fit]]]:
    """List the settings of the reader of one layer's keys, by layer."""

    def fit(number: int, strength: float, part: Tables) -> Reader:
        return _fit_ridge(partial(_Means(part).flat_keys, number), part, strength)

    return {
        number: [(f"layer {number}, ridge {ridge:g}", partial(fit, number, ridge)) for ridge in _RIDGES]
        for number in tables.layers
    }


def _folds(articles: Sequence[Hashable]) -> list[tuple[list[int], list[int]]]:
    """Cut memories into parts to fit on and to judge on, no article in both."""
    numbers = {article: number for number, article in enumerate(dict.fromkeys(articles))}
    fold_of = [numbers[article] % _FOLDS for article in articles]
    return [
        ([row for row, of in enumerate(fold_of) if of != fold], [row for row, of in enumerate(fold_of) if of == fold])
        for fold in range(_FOLDS)
    ]


def gains_of(reader: Reader, tables: Tables) -> Tensor:
    """What a reader's choices earn above blind ones, nats per token, ``[n]``."""
    chosen = reader(tables).argmax(dim=1, keepdim=True)
    return _centered(tables.values).gather(1, chosen).squeeze(1)


def _best(settings: Sequence[tuple[str, Fit]], tables: Tables) -> tuple[str, float, Fit]:
    """Choose a setting by cross-validation: by the mean gain, which is returned too, on what was not fitted to."""
    gains: list[list[Tensor]] = [[] for _ in settings]
    for fitted, judged in _folds(tables.articles):
        fitted_to, others = tables.rows(fitted), tables.rows(judged)
        for (_, fit), of_setting in zip(settings, gains, strict=True):
            of_setting.append(gains_of(fit(fitted_to), others))
    means = [torch.cat(of_setting).mean().item() for of_setting in gains]
    best = max(range(len(means)), key=means.__getitem__)
    name, fit = settings[best]
    return name, means[best], fit


@dataclass(frozen=True)
class FittedReader:
    """A reader of keys, and what it earned on memories that it was not fitted to."""

    name: str
    setting: str
    cross_validated: float
    """On the memories that it was fitted to, nats per token above blind choice."""
    gain: Estimate
    """Nats per token above blind choice."""
    share: Estimate
    """Of the headroom."""


@dataclass(frozen=True)
class Headroom:
    """What an order could be worth, and what keys tell of it; on memories that nothing was fitted to."""

    headroom: Estimate
    """Best less blind choice, nats per token."""
    spread: float
    """SD of A within a memory, nats per token."""
    readers: tuple[FittedReader, ...]
    num_fitted: int
    """Memories that the readers were fitted to."""

    @property
    def best(self) -> FittedReader:
        """The reader that was best by cross-validation."""
        return max(self.readers, key=lambda reader: reader.cross_validated)

    def to_json(self) -> str:
        """Write everything as a JSON object."""
        record: dict[str, Any] = asdict(self) | {"keys_tell": asdict(self.best.share), "reader": self.best.name}
        return json.dumps(record, indent=2)


def expect_measurable(fitted_to: Sequence[Hashable], held_out: Sequence[Hashable]) -> None:
    """Refuse memories that nothing can be fitted to or measured on, by their articles.

    Raises:
        ValueError: there are fewer than five articles to fit to, none to measure on, or one is on both sides.
    """
    if len(set(fitted_to)) < _FOLDS or not held_out:
        raise ValueError(
            f"to fit readers of keys takes {_FOLDS} articles or more, and one to measure on; got {len(set(fitted_to))} "
            f"and {len(set(held_out))}; give more data, or name other data in dataset_eval_name"
        )
    if both := set(fitted_to) & set(held_out):
        raise ValueError(f"{len(both)} articles are both fitted to and measured on")


def measure_headroom(fitted_to: Tables, held_out: Tables) -> Headroom:
    """Fit readers of keys to some memories, and let them choose on others, which must come from other articles.

    Raises:
        ValueError: see `expect_measurable`.
    """
    expect_measurable(fitted_to.articles, held_out.articles)
    best = {name: _best(settings, fitted_to) for name, settings in _candidates(fitted_to).items()}
    layers = {
        number: _best(settings, replace(fitted_to, layers={number: fitted_to.layers[number]}))
        for number, settings in _layer_candidates(fitted_to).items()
    }
    number = max(layers, key=lambda layer: layers[layer][1])
    best[LAYER] = layers[number]
    name = f"layer {number}, decay"
    low_rank = [(f"{name} {decay:g}", partial(_fit_low_rank, layer=number, decay=decay)) for decay in _RANK_DECAYS]
    best[LOW_RANK] = _best(low_rank, fitted_to)
    above = _centered(held_out.values)
    highest = above.max(dim=1).values.tolist()

    def measured(name: str, setting: str, gain: float, fit: Fit) -> FittedReader:
        gains = gains_of(fit(fitted_to), held_out).tolist()
        share = clustered_ratio(gains, highest, held_out.articles)
        return FittedReader(name, setting, gain, clustered_mean(gains, held_out.articles), share)

    return Headroom(
        headroom=clustered_mean(highest, held_out.articles),
        spread=above.std(dim=1).mean().item(),
        readers=tuple(measured(name, *item) for name, item in best.items()),
        num_fitted=len(fitted_to.articles),
    )
