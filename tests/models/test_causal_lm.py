"""A causal language model's output head against the model's own logits."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from attention_rl_trainer.models.causal_lm import LogitsHead, default_logits_chunk_size
from attention_rl_trainer.models.projections import UnsupportedArchitectureError


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_what_architectures_do_to_their_logits(name: str, options: dict[str, float]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(name, vocab_size=60, intermediate_size=32, pad_token_id=0, **sizes, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    nn.init.normal_(model.get_output_embeddings().weight)
    ids = torch.randint(1, 50, (2, 3))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        logits = model(input_ids=ids).logits
        plain = model.get_output_embeddings()(hidden)
        torch.testing.assert_close(LogitsHead(model)(hidden), logits)
    assert (plain - logits).abs().max() > 0.1


def test_an_unknown_change_of_the_logits_is_refused() -> None:
    class Shifted(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, *args: object, **options: object) -> object:
            output = super().forward(*args, **options)
            output.logits = output.logits * 2
            return output

    model = Shifted(tiny_llama().config)
    nn.init.normal_(model.get_output_embeddings().weight)
    with pytest.raises(UnsupportedArchitectureError, match="Shifted does something to its hidden states or logits"):
        LogitsHead(model)


def test_logits_chunks_hold_the_same_memory_for_any_vocabulary() -> None:
    for on_cpu, num_bytes in [(True, 40 * 2**20), (False, 64 * 2**20)]:
        for vocabulary in (49152, 128256, 262144):
            size = default_logits_chunk_size(vocabulary, on_cpu=on_cpu)
            assert size * vocabulary * 4 <= num_bytes < (size + 1) * vocabulary * 4
        assert default_logits_chunk_size(10**9, on_cpu=on_cpu) == 1
