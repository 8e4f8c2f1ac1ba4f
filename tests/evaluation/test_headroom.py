"""What an order could be worth, and what keys tell of it, on tables whose answer is known."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from attention_rl_trainer.evaluation import headroom
from attention_rl_trainer.evaluation.headroom import (
    HEADS,
    KEYS_MEAN,
    LAYER,
    LOW_RANK,
    Headroom,
    Tables,
    gains_of,
    measure_headroom,
)
from attention_rl_trainer.probing.vectors import LayerVectors


@pytest.fixture(autouse=True)
def _few_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit the slow reader in earnest where it is what is tested."""
    if "rank_8" not in request.node.name:
        monkeypatch.setattr(headroom, "_RANK_STEPS", 3)


PAIRS, HEADS_OF_LAYER, GROUPS, DIM = 6, 4, 2, 8


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made_up(count: int, seed: int, *, told_by: str, first_article: int = 0) -> Tables:
    """Memories whose worth is told by layer 1's keys, by which key it is, by query and keys together, or by nothing."""
    layers = {
        number: LayerVectors(
            draw(count, 1, HEADS_OF_LAYER, DIM, seed=seed + number) + 3,
            draw(count, PAIRS, GROUPS, DIM, seed=seed + 50 + number) + 2,
        )
        for number in range(2)
    }
    names = torch.randint(0, 12, (count, PAIRS), generator=torch.Generator().manual_seed(seed + 100))
    direction = draw(GROUPS, DIM, seed=1)
    worths = {
        "keys": (layers[1].keys * direction).sum(dim=(2, 3)),
        "names": draw(12, seed=2)[names],
        # Four directions of the query ask each for one of the keys; and one is always asked for.
        "query": torch.einsum("nd,nmd->nm", layers[1].queries[:, 0, 0, :4] - 3, layers[1].keys[:, :, 0, :4] - 2)
        + 0.3 * (layers[1].keys * direction).sum(dim=(2, 3)),
        "nothing": draw(count, PAIRS, seed=seed + 200),
    }
    # Anything that is the same for all pairs of a memory is no reason to choose one.
    values = 0.05 * worths[told_by] + draw(count, 1, seed=seed + 300)
    keys = [[(int(name),) for name in row] for row in names]
    return Tables(values, layers, keys, [first_article + row for row in range(count)])


def measured(told_by: str, count: int = 120) -> Headroom:
    return measure_headroom(made_up(count, 0, told_by=told_by), made_up(60, 1000, told_by=told_by, first_article=10**6))


def test_headroom_is_the_best_less_the_mean() -> None:
    held_out = made_up(60, 1000, told_by="nothing", first_article=10**6)
    found = measure_headroom(made_up(40, 0, told_by="nothing"), held_out)

    expected = (held_out.values.max(dim=1).values - held_out.values.mean(dim=1)).mean()
    assert found.headroom.mean == pytest.approx(float(expected), rel=1e-5)
    assert found.headroom.num_clusters == 60


@pytest.mark.parametrize(("told_by", "reader"), [("keys", LAYER), ("names", KEYS_MEAN)])
def test_what_keys_tell_is_found_by_its_reader(told_by: str, reader: str) -> None:
    found = measured(told_by)

    assert found.best.name == reader
    assert found.best.share.low is not None
    assert found.best.share.low > 0.9
    assert found.best.gain.mean == pytest.approx(found.best.share.mean * found.headroom.mean, rel=1e-5)


def test_what_the_query_says_of_keys_is_found_by_rank_8() -> None:
    found = {reader.name: reader for reader in measured("query", count=400).readers}

    assert found[LOW_RANK].setting.startswith("layer 1, ")
    assert found[LOW_RANK].share.low is not None
    assert found[LOW_RANK].share.low > found[LAYER].share.mean > 0.1


def test_nothing_is_told_where_worth_is_noise() -> None:
    found = measured("nothing")

    assert {reader.name for reader in found.readers} == {KEYS_MEAN, HEADS, LAYER, LOW_RANK}
    for reader in found.readers:
        assert reader.share.low is not None
        assert reader.share.high is not None
        assert reader.share.low < 0.05
        assert reader.share.high < 0.4
    assert found.headroom.mean > 0.03


def test_keys_that_never_recur_have_no_mean() -> None:
    tables = made_up(40, 0, told_by="keys")
    unique = [[(row, column) for column in range(PAIRS)] for row in range(40)]
    fitted_to = Tables(tables.values, tables.layers, unique, tables.articles)
    found = measure_headroom(fitted_to, made_up(20, 1000, told_by="keys", first_article=10**6))

    assert KEYS_MEAN not in {reader.name for reader in found.readers}


def test_a_gain_is_that_of_the_choice_over_the_mean() -> None:
    tables = Tables(torch.tensor([[1.0, 4.0, 1.0], [3.0, 0.0, 0.0]]), {}, [[(0,)] * 3] * 2, [0, 1])
    scores = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

    assert gains_of(lambda _: scores, tables).tolist() == [2.0, -1.0]


def test_it_is_written_as_json() -> None:
    found = measured("names", count=30)
    record = json.loads(found.to_json())

    assert record["reader"] == found.best.name
    assert record["keys_tell"]["mean"] == pytest.approx(found.best.share.mean)
    assert record["headroom"]["low"] == pytest.approx(found.headroom.low)
    assert [reader["name"] for reader in record["readers"]] == [reader.name for reader in found.readers]
    assert record["num_fitted"] == 30


def test_the_same_articles_on_both_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^20 articles are both fitted to and measured on$"):
        measure_headroom(made_up(40, 0, told_by="keys"), made_up(20, 1000, told_by="keys"))


def test_too_few_articles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^to fit readers of keys takes 5 articles or more, .* got 4 and 4; "):
        measure_headroom(made_up(4, 0, told_by="keys"), made_up(4, 9, told_by="keys", first_article=10**6))
