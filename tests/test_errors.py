"""Errors about numbers that are not finite, memory figures, and the note on an error inside a phase of a run."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import random_batch

from attention_rl_trainer.errors import (
    NonFiniteError,
    RunContext,
    expect_finite,
    free_memory_gib,
    located,
    logit_sums,
    peak_memory_gib,
    used_memory_gib,
)

ARTICLES = random_batch(3).articles
ADVICE = (
    ". The optimizer step was not taken, and nothing of this step was recorded. Check the model's weights and their "
    "precision; a lower learning_rate or float32 weights may help."
)
CPU = torch.device("cpu")
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


# ---- Numbers that are not finite ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4), (3, 2, 4, 5)])
def test_names_quantity_step_article_and_row(value: float, shape: tuple[int, ...]) -> None:
    bad = torch.zeros(shape)
    bad[1] = value
    with pytest.raises(NonFiniteError) as caught:
        expect_finite({"fine": torch.zeros(3, 1), "reward": bad}, ARTICLES, trajectory_step=7)
    expected = "reward is not finite at step 7 of the trajectory for article 'title 1' (made up), row 1"
    assert str(caught.value) == expected + ADVICE


def test_the_first_step_of_any_trajectory_is_named() -> None:
    values = torch.zeros(3, 4, 2)
    values[0, 3, 1] = math.nan
    values[2, 1, 0] = math.inf
    with pytest.raises(NonFiniteError) as caught:
        expect_finite({"KL": values}, ARTICLES)
    expected = (
        "KL is not finite at step 2 of the trajectory for articles 'title 0' (made up), 'title 2' (made up), rows 0, 2"
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
    expected = "the loss is not finite for article 'title 0' (made up), in micro-batch 2, in the update of step 3"
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


# ---- Memory ----


def kib_of(path: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@NEEDS_PROC
class TestMemory:
    def test_used_is_the_resident_size(self) -> None:
        assert used_memory_gib(CPU) == pytest.approx(kib_of("/proc/self/status", "VmRSS") / 2**20, rel=0.05)

    def test_peak_is_the_largest_resident_size(self) -> None:
        assert peak_memory_gib(CPU) == pytest.approx(kib_of("/proc/self/status", "VmHWM") / 2**20, rel=0.05)
        assert peak_memory_gib(CPU) >= 0.95 * used_memory_gib(CPU)

    def test_used_grows_by_what_is_allocated(self) -> None:
        before = used_memory_gib(CPU)
        block = torch.ones(2**26)  # 256 MiB, large enough to be mapped and unmapped on its own
        assert used_memory_gib(CPU) - before == pytest.approx(0.25, abs=0.05)
        assert peak_memory_gib(CPU) >= before + 0.2
        del block
        assert used_memory_gib(CPU) - before == pytest.approx(0.0, abs=0.05)

    def test_free_is_what_the_system_offers(self) -> None:
        free = free_memory_gib(CPU)
        assert free is not None
        assert 0 < free <= kib_of("/proc/meminfo", "MemTotal") / 2**20
        assert free == pytest.approx(kib_of("/proc/meminfo", "MemAvailable") / 2**20, rel=0.2)


def test_free_on_a_gpu_is_what_the_system_offers_and_what_pytorch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    gib, device, asked = 2**30, torch.device("cuda", 0), []

    def says(value: object) -> Callable[[torch.device], object]:
        def answer(place: torch.device) -> object:
            asked.append(place)
            return value

        return answer

    monkeypatch.setattr(torch.cuda, "mem_get_info", says((30 * gib, 140 * gib)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", says(100 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", says(12 * gib))
    # 88 of the 100 that PyTorch has taken from the system hold nothing.
    assert free_memory_gib(device) == 30 + 88
    assert asked == [device] * 3


# ---- Where a run stands ----


def context(step: int = 3, **sizes: int) -> RunContext:
    return RunContext(CPU, sizes, lambda: step)


class TestPhase:
    @staticmethod
    def note_on(error: BaseException, name: str = "rollout") -> str:
        with pytest.raises(type(error)) as caught, context(steps=8).phase(name, 64):
            raise error
        assert caught.value is error
        return "\n".join(getattr(error, "__notes__", []))

    @pytest.mark.parametrize(
        "error", [RuntimeError("bad"), torch.OutOfMemoryError("full"), MemoryError(), NotImplementedError()]
    )
    def test_a_failure_says_where_it_happened_and_what_to_lower(self, error: Exception) -> None:
        note = self.note_on(error)
        assert note.startswith("In the rollout of step 3 (trajectories 64, steps 8); memory in use ")
        assert re.search(r"memory in use \d+\.\d\d GiB, peak \d+\.\d\d GiB on cpu\.", note)
        assert note.endswith(
            ". If memory ran out, lower generation_batch_size, num_steps, tokens_per_query or tokens_per_value."
        )

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("filter", "generation_batch_size"),
            ("update", "training_batch_size or logits_chunk_size"),
            ("optimizer step", "training_batch_size or logits_chunk_size"),
            ("evaluation", "generation_batch_size"),
            ("run", "generation_batch_size"),
        ],
    )
    def test_each_phase_has_its_own_options(self, name: str, options: str) -> None:
        note = self.note_on(MemoryError(), name)
        assert note.startswith(f"In the {name} of step 3 (trajectories 64, steps 8); ")
        assert note.endswith(f". If memory ran out, lower {options}.")

    @pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), KeyboardInterrupt()])
    def test_other_errors_are_left_alone(self, error: BaseException) -> None:
        assert self.note_on(error) == ""

    def test_the_innermost_of_nested_phases_is_noted(self) -> None:
        run = context(1)
        with pytest.raises(RuntimeError) as caught, run.phase("run", 1), run.phase("update", 1):
            raise RuntimeError
        assert [note.split(" of step")[0] for note in caught.value.__notes__] == ["In the update"]

    def test_a_number_that_is_not_finite_gets_the_step_and_the_articles(self) -> None:
        run = context()
        with pytest.raises(NonFiniteError) as caught, run.phase("run", 1), run.phase("update", 2, ARTICLES[:2]):
            raise NonFiniteError("the loss")
        assert not hasattr(caught.value, "__notes__")
        expected = (
            "the loss is not finite for articles 'title 0' (made up), 'title 1' (made up), in the update of step 3"
        )
        assert str(caught.value) == expected + ADVICE
        assert caught.value.step == 3

    def test_without_a_failure_the_time_is_taken(self) -> None:
        run = context()
        with run.phase("rollout", 1):
            result = 2
        assert result == 2
        assert list(run.seconds) == ["rollout"]
        assert 0 <= run.seconds["rollout"] < 1
        before = dict(run.seconds)
        with pytest.raises(ValueError, match="no"), run.phase("rollout", 1):
            raise ValueError("no")
        assert run.seconds == before

    def test_a_failing_forward_is_noted(self) -> None:
        with (
            pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught,
            context(7, vocabulary=420).phase("update", 16, micro_batch_size=4),
        ):
            torch.ones(2, 3) @ torch.ones(2, 3)
        expected = "In the update of step 7 (trajectories per micro-batch 4, trajectories 16, vocabulary 420);"
        assert caught.value.__notes__[0].startswith(expected)

    def test_the_step_is_that_of_the_failure(self) -> None:
        steps = iter([1, 5, 6])
        run = RunContext(CPU, {}, lambda: next(steps))
        assert run.step == 1
        with pytest.raises(RuntimeError) as caught, run.phase("run", 8):
            raise RuntimeError
        assert caught.value.__notes__[0].startswith("In the run of step 5 (trajectories 8);")
