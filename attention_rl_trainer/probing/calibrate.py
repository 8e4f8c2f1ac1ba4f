"""A model and training memories into a calibration, and a calibration into its figures (design §5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.models.attention import AttentionLayer, find_decoder_layers
from attention_rl_trainer.models.heads import HeadNumber, readable_layers
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.probing.fit import (
    HeadScores,
    SelectionQuality,
    fit_temperature,
    means_of,
    score_heads,
    selection_quality,
    take_heads,
)
from attention_rl_trainer.probing.vectors import LayerVectors, iter_vectors, join_vectors
from attention_rl_trainer.rollout.calibration import Calibration, Origin
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, SelectionOptions
from attention_rl_trainer.rollout.layout import Layout
from attention_rl_trainer.rollout.selector import Selector


@dataclass(frozen=True, eq=False)
class Fitted:
    """A calibration, and what it was chosen from."""

    calibration: Calibration
    heads: HeadScores
    """Of the layers that could select, on the first half of the memories."""


def selection_facts(policy: PolicyModel, heads: PolicyOptions, selection: SelectionOptions) -> Origin:
    """Collect what a calibration depends on beside model and memories."""
    layer = heads.attention_layer % len(find_decoder_layers(policy.causal_lm))
    return {
        "attention_layer": layer if heads.attention_heads == "layer" else None,
        "head_aggregation": selection.head_aggregation,
        "head_similarity": selection.head_similarity,
        "center_vectors": selection.center_vectors,
    }


class Probe:
    """Reads memories with one model and one way to choose, to fit a calibration or to measure one.

    Args:
        policy: the adapted model, which is read with adapters off.
        heads: which heads may select, and from which layer the literal selector reads.
        selection: how they are compared, and what is fitted.
        show_progress: whether a bar is shown on standard error.

    Raises:
        UnsupportedArchitectureError: the model's attention cannot be read.
    """

    def __init__(
        self,
        policy: PolicyModel,
        layout: Layout,
        heads: PolicyOptions,
        selection: SelectionOptions,
        *,
        show_progress: bool = False,
    ) -> None:
        self._policy = policy
        self._layout = layout
        self._heads = heads
        self._selection = selection
        self._show_progress = show_progress
        model = policy.causal_lm
        self._literal = AttentionLayer(model, heads.attention_layer)
        self._named = heads.head_numbers
        if heads.attention_heads == "probe":
            self._layers = readable_layers(model)
        else:
            self._layers = {head.layer: AttentionLayer(model, head.layer) for head in self._named or ()}

    @property
    def _all_layers(self) -> dict[int, AttentionLayer]:
        return self._layers | {self._literal.layer: self._literal}

    def read(self, memories: MemoryBatch) -> dict[int, LayerVectors]:
        """Take the vectors of all layers that matter here."""
        vectors = iter_vectors(self._policy, self._layout, memories, self._all_layers)
        hidden = None if self._show_progress else True  # None: where standard error is no terminal
        bar = tqdm(vectors, "Calibrating the selector", len(memories), disable=hidden, leave=False)
        return join_vectors(list(bar))

    def fit(self, memories: MemoryBatch, origin: Origin) -> Fitted:
        """Choose heads, means and temperature on training memories.

        Raises:
            ValueError: there are fewer than two memories, or a memory has a single pair.
        """
        if len(memories) < 2 or memories.key_tokens.shape[1] < 2:
            raise ValueError(
                "to calibrate the selector takes two memories of two pairs or more, got "
                f"{len(memories)} of {memories.key_tokens.shape[1]}; raise calibration_memories, num_kv_pairs or "
                "subset_fraction"
            )
        layers = self.read(memories)
        middle = len(memories) // 2
        first = {number: vectors.rows(slice(0, middle)) for number, vectors in layers.items()}
        second = {number: vectors.rows(slice(middle, None)) for number, vectors in layers.items()}
        options = self._selection
        # The literal selector's layer may have heads of another dimension, which cannot be chosen with the others.
        candidates = {number: first[number] for number in self._layers or first}
        scores = score_heads(candidates, center=options.center_vectors, head_similarity=options.head_similarity)
        heads = self._named
        if self._heads.attention_heads == "probe":
            heads = scores.best(self._heads.probe_heads)
        means = means_of(self._of_heads(layers, heads)) if options.center_vectors else (None, None)
        selector = Selector(1.0, options.head_aggregation, options.head_similarity, *means)
        chosen = self._of_heads(second, heads)
        temperature = options.fixed_temperature or fit_temperature(chosen, selector)
        calibration = Calibration(
            temperature, heads, means[0], means[1], origin | selection_facts(self._policy, self._heads, options)
        )
        return Fitted(replace(calibration, figures=self._figures(calibration, second)), scores)

    def figures(self, calibration: Calibration, memories: MemoryBatch) -> dict[str, float]:
        """Measure a calibration on memories: ``p_right``, ``p_right_literal``, ``selection_information``, and more."""
        return self._figures(calibration, self.read(memories))

    def _figures(self, calibration: Calibration, layers: Mapping[int, LayerVectors]) -> dict[str, float]:
        selector = KVMemoryEnvironment(self._selection, calibration).selector
        quality = selection_quality(self._of_heads(layers, calibration.heads), selector)
        literal = self.literal_quality(layers)
        return {
            "p_right": quality.p_right,
            "p_right_literal": literal.p_right,
            "selection_information": quality.information,
            "selection_information_literal": literal.information,
            "selection_entropy": quality.entropy,
            "chance": 1 / layers[self._literal.layer].keys.shape[1],
        }

    def literal_quality(self, layers: Mapping[int, LayerVectors]) -> SelectionQuality:
        """Measure the seed document's selector at the attention layer, at the temperature that is best for it."""
        vectors = layers[self._literal.layer]
        selector = Selector()
        return selection_quality(vectors, replace(selector, temperature=fit_temperature(vectors, selector)))

    def _of_heads(self, layers: Mapping[int, LayerVectors], heads: tuple[HeadNumber, ...] | None) -> LayerVectors:
        return layers[self._literal.layer] if heads is None else take_heads(layers, heads)
