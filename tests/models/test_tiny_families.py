from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_families import MODEL_TYPES, READS_ANOTHER_MODEL, UNBUILDABLE, VARIANTS, VOCABULARY, build
from transformers import PreTrainedModel

BUILDABLE = [model_type for model_type in MODEL_TYPES if model_type not in UNBUILDABLE]
REFUSED = [name for name, reason in UNBUILDABLE.items() if name in MODEL_TYPES and reason != READS_ANOTHER_MODEL]


def token_ids() -> torch.Tensor:
    return torch.randint(5, 380, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=token_ids(), use_cache=False).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BUILDABLE, *VARIANTS])
def test_every_type_is_built_and_runs(name: str) -> None:
    model = build(name)

    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 4_000_000
    found = logits(model)
    assert found.shape == (2, 16, VOCABULARY)
    assert 0.3 < found.std() < 3  # Not where one of them is not finite.


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_called_unbuildable_is(model_type: str) -> None:
    with pytest.raises((AttributeError, ImportError, ValueError, StrictDataclassError)):
        logits(build(model_type))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_its_type(name: str) -> None:
    model_type, changes = VARIANTS[name]

    assert build(name).config.to_dict() != build(model_type).config.to_dict(), changes


@pytest.mark.parametrize("name", ["llama", "mixtral", "olmo+clip"])
def test_a_model_depends_on_its_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    first = build(name)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    second, other = build(name), build(name, seed=1)

    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(logits(first), logits(other))
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)


def test_attention_has_fewer_groups_than_heads_and_a_head_dimension_of_its_own() -> None:
    attention = build("qwen3").model.layers[-1].self_attn

    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.head_dim) == (128, 64, 32)
    assert attention.q_proj.in_features == 64
    assert attention.q_norm.weight.std() > 0.05
