"""The calibrated selector of the embedded model, on articles that it was not fitted to."""

from __future__ import annotations

import pytest
import torch

from attention_rl_trainer import SelectionOptions, load_articles
from attention_rl_trainer.memories.loading import MemoryLoader, ReadingOptions
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models import PolicyModel, add_adapter
from attention_rl_trainer.models.choice import load_named_model
from attention_rl_trainer.models.policy import PolicyOptions
from attention_rl_trainer.probing.calibrate import Probe
from attention_rl_trainer.rollout import Layout, Separators
from attention_rl_trainer.rollout.layout import LayoutOptions

# 15 keys of 20 tokens, of which half is the query.
SIZES = {"num_kv_pairs": 16, "subset_fraction": 1.0, "window": "random"}
NUM_MEMORIES = 48


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_half_a_key_draws_its_pair_on_held_out_articles() -> None:
    base, tokenizer = load_named_model("offline", torch.device("cpu"), {"dtype": "auto"})
    policy = PolicyModel.of(add_adapter(base, None), tokenizer, PolicyOptions())
    encoder = PlainTextEncoder(tokenizer)
    layout = Layout.of(LayoutOptions(**SIZES), Separators.encode(encoder))
    loader = MemoryLoader(ReadingOptions(**SIZES), encoder, seed=0)
    articles = load_articles("offline")

    def memories(first: int, end: int) -> MemoryBatch:
        return loader.first_memories(articles.select(range(first, end)), NUM_MEMORIES)

    fitted_to, held_out = memories(0, 150), memories(150, len(articles))
    selection = SelectionOptions(
        selection_temperature="auto", head_aggregation="scores", head_similarity="cosine", center_vectors=True
    )
    right = {}
    for name, heads in {
        "chosen heads": PolicyOptions(attention_heads="probe"),
        "one layer": PolicyOptions(attention_layer=18),
    }.items():
        probe = Probe(policy, layout, heads, selection)
        figures = probe.figures(probe.fit(fitted_to, {}).calibration, held_out)
        right[name] = figures["p_right"]
        assert figures["chance"] == pytest.approx(1 / 15)
        assert figures["p_right_literal"] < 0.3
    assert right["chosen heads"] >= 0.85
    assert right["one layer"] >= 0.65
