"""Key vectors are computed once per content, within a bound, and do not depend on what else is computed."""

from __future__ import annotations

import pytest
import torch
from tiny import make_policy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.models.attention import AttentionLayer
from attention_rl_trainer.models.key_vectors import KeyVectorCache, extract_embeddings


def test_extract_embeddings_is_the_mean_of_each_sequence_alone(model: PreTrainedModel) -> None:
    layer, ids = AttentionLayer(model), torch.randint(1, 90, (7, 5))
    with torch.no_grad():
        vectors = extract_embeddings(model.base_model, layer, ids, batch_size=3)
        for row in range(7):
            with layer.capture_keys() as capture:
                model(input_ids=ids[row : row + 1])
            torch.testing.assert_close(vectors[row : row + 1], capture.heads().mean(dim=1), atol=1e-5, rtol=1e-4)


class Embedder:
    """Counts what it embeds; a key's vector is its first token."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, token_ids: Tensor) -> Tensor:
        self.seen += token_ids.tolist()
        return token_ids[:, :1, None].float().expand(-1, 2, 4)


def test_each_content_is_embedded_once_and_rows_keep_their_order() -> None:
    cache, embedder = KeyVectorCache(10**6), Embedder()
    first = cache.embed(torch.tensor([[5, 1], [7, 1], [5, 1]]), embedder)
    assert first[:, 0, 0].tolist() == [5, 7, 5]
    second = cache.embed(torch.tensor([[9, 1], [7, 1], [5, 2]]), embedder)
    assert second[:, 0, 0].tolist() == [9, 7, 5]
    assert sorted(embedder.seen) == [[5, 1], [5, 2], [7, 1], [9, 1]]
    assert len(cache) == 4


def test_keys_of_another_length_are_other_keys() -> None:
    cache, embedder = KeyVectorCache(10**6), Embedder()
    cache.embed(torch.tensor([[5, 0]]), embedder)
    cache.embed(torch.tensor([[5]]), embedder)
    assert embedder.seen == [[5, 0], [5]]


def test_memory_is_bounded_and_what_was_used_last_stays() -> None:
    embedder = Embedder()
    cache = KeyVectorCache(10**6)
    cache.embed(torch.tensor([[0]]), embedder)
    cache = KeyVectorCache(3 * cache.num_bytes)
    for token in (1, 2, 3, 1, 4):
        cache.embed(torch.tensor([[token]]), embedder)
    assert len(cache) == 3
    assert cache.num_bytes <= cache.max_bytes
    embedder.seen.clear()
    cache.embed(torch.tensor([[1], [3], [4]]), embedder)
    assert embedder.seen == []
    cache.embed(torch.tensor([[2]]), embedder)
    assert embedder.seen == [[2]]


def test_without_memory_everything_is_embedded_and_correct() -> None:
    cache, embedder = KeyVectorCache(0), Embedder()
    for _ in range(2):
        assert cache.embed(torch.tensor([[3], [4]]), embedder)[:, 0, 0].tolist() == [3, 4]
    assert len(cache) == 0
    assert len(embedder.seen) == 4


def test_a_remembered_vector_does_not_hold_its_batch() -> None:
    cache, embedder = KeyVectorCache(10**6), Embedder()
    cache.embed(torch.arange(50)[:, None], embedder)
    vector = next(iter(cache.vectors.values()))
    assert vector.untyped_storage().nbytes() == vector.numel() * vector.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_bit_equal_whatever_they_are_embedded_with(
    dtype: torch.dtype, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    keys = torch.randint(1, 380, (41, 6))
    policy = make_policy(model.to(dtype), tokenizer, embedding_batch_size=8)
    at_once = policy.embed_keys(keys)
    policy.key_cache = KeyVectorCache(10**6)
    order = torch.randperm(41)
    pieces = torch.split(order, [1, 3, 17, 20])
    vectors = torch.cat([policy.embed_keys(torch.cat([keys[piece], keys[:2]]))[:-2] for piece in pieces])
    assert torch.equal(vectors, at_once[order])
    policy.key_cache = KeyVectorCache(0)
    assert torch.equal(policy.embed_keys(keys), at_once)
