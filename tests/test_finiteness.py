"""What an error about a number that is not finite says."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from tiny import random_batch

from attention_rl_trainer.errors import NonFiniteError, expect_finite, located, logit_sums

ARTICLES = random_batch(3).articles
ADVICE = (
    ". The optimizer step was not taken, and nothing of it was recorded. Check the model's weights and precision; a "
    "lower learning_rate or float32 weights may help"
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4), (3, 2, 4, 5)])
def test_names_quantity_step_article_and_row(value: float, shape: tuple[int, ...]) -> None:
    bad = torch.zeros(shape)
    bad[1] = value
    with pytest.raises(NonFiniteError) as caught:
        expect_finite({"fine": torch.zeros(3, 1), "reward": bad}, ARTICLES, trajectory_step=7)
    expected = "reward is not finite at step 7 of the trajectory on article 'title 1' (made up), row 1"
    assert str(caught.value) == expected + ADVICE


def test_the_first_step_of_any_trajectory_is_named() -> None:
    values = torch.zeros(3, 4, 2)
    values[0, 3, 1] = math.nan
    values[2, 1, 0] = math.inf
    with pytest.raises(NonFiniteError) as caught:
        expect_finite({"KL": values}, ARTICLES)
    expected = (
        "KL is not finite at step 2 of the trajectory on articles 'title 0' (made up), 'title 2' (made up), rows 0, 2"
    )
    assert str(caught.value) == expected + ADVICE
    assert [article.title for article in caught.value.articles] == ["title 0", "title 2"]


def test_the_first_quantity_that_is_not_finite_is_named() -> None:
    bad = torch.full((3, 1), math.nan)
    with pytest.raises(NonFiniteError) as caught:
        expect_finite({"logit": torch.ones(3, 1), "vector": bad, "reward": bad}, trajectory_step=1)
    assert caught.value.quantity == "vector"
    assert caught.value.articles == ()


def test_finite_numbers_pass() -> None:
    expect_finite({"a": torch.tensor([3e38, -3e38, 1e-45]), "b": torch.zeros(3, 2)}, ARTICLES, trajectory_step=1)


def test_places_from_the_inside_out_up_to_the_step() -> None:
    error = NonFiniteError("the loss")
    with pytest.raises(NonFiniteError) as caught, located("micro-batch 2", ARTICLES[:1]):
        raise error
    assert caught.value is error
    error.add_place("the update of step 3", ARTICLES, step=3)
    error.add_place("the run of step 3", step=3)
    expected = "the loss is not finite on article 'title 0' (made up), in micro-batch 2, in the update of step 3"
    assert str(error) == expected + ADVICE
    assert error.step == 3


def test_survives_pickling() -> None:
    error = NonFiniteError("KL", "at step 2 of the trajectory", ARTICLES[:1], [0])
    error.add_place("the update of step 3", step=3)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.step) == (str(error), 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logit_sums(value: float) -> None:
    logits = torch.randn(4, 50, requires_grad=True) * 1e30
    assert logit_sums(logits).isfinite().all()
    assert not logit_sums(logits).requires_grad
    with torch.no_grad():
        logits[2, 7] = value
    assert logit_sums(logits).isfinite().tolist() == [True, True, False, True]
