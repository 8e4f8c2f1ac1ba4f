"""Updates: what they move, and that one that fails, in whatever phase, has moved nothing."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import made_up_kept
from torch import Tensor, nn

from attention_rl_trainer.durability.states import Stateful
from attention_rl_trainer.errors import NonFiniteError, RunContext
from attention_rl_trainer.update.kept import KeptTrajectories
from attention_rl_trainer.update.micro_batches import LossSums
from attention_rl_trainer.update.objective import LossTerms
from attention_rl_trainer.update.updater import UpdateOptions, Updater

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def batch_of(rows: int, first: int = 1) -> KeptTrajectories:
    """Trajectories whose tokens, all different, are what the toy model reads."""
    token_ids = torch.arange(first, first + rows * 3).view(rows, 3)
    return made_up_kept(token_ids, query_starts=[1], value_starts=[2], query_length=1, value_length=1)


def nothing_of(batch: KeptTrajectories) -> KeptTrajectories:
    return batch.select_rows(torch.arange(0))


class Counter:
    """A part of the run that an update changes."""

    def __init__(self) -> None:
        self.history: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = list(state["history"])


class Run:
    """A toy model that is updated as the trainer does it; fails at the n-th event of a kind, if told to."""

    def __init__(self, build: Build = adam, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.model.bias.requires_grad_(False)
        self.optimizer = build([self.model.weight])
        self.counter = Counter()
        self.sums: list[LossSums] = []
        context = RunContext(torch.device("cpu"), {}, lambda: 1)
        self.updater = Updater(
            self.model, UpdateOptions(**{"training_batch_size": 2} | options), context, self.sums.append
        )
        self.parts: dict[str, Stateful] = {"counter": self.counter, "updater": self.updater}
        self.events: list[str] = []
        self.fatal: tuple[str, int, BaseException] | None = None

    def happens(self, event: str) -> None:
        self.events.append(event)
        if self.fatal is not None and (event, self.events.count(event)) == self.fatal[:2]:
            raise self.fatal[2]

    def loss(self, kept: KeptTrajectories) -> Tensor:
        outputs: Tensor = self.model(kept.token_ids / 10)
        return (outputs.square().sum(dim=1) * kept.weights).sum()

    def differentiate(self, kept: KeptTrajectories) -> tuple[Tensor, LossTerms | None]:
        loss = self.loss(kept)
        loss.backward()
        self.happens("gradient")
        return loss.detach(), None

    def clip(self) -> None:
        self.happens("clip")
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)

    def update(self, batches: list[KeptTrajectories]) -> list[float]:
        losses = []
        handle = self.optimizer.register_step_post_hook(lambda *_: self.happens("step"))
        with ExitStack() as stack:
            stack.callback(handle.remove)
            for number, kept in enumerate(batches, 1):
                with self.updater.all_or_nothing(self.parts, 20):
                    self.counter.history.append(number)
                    self.happens("rollout")
                    losses.append(self.updater.accumulate(kept, self.differentiate).item())
                    if number == len(batches):
                        loss = self.updater.take_further_steps(self.differentiate, self.optimizer, self.clip)
                        losses[-1] += loss.item()
                    self.happens("record")
            with self.updater.all_or_nothing(self.parts, 20), self.updater.last_step():
                self.happens("commit")
        self.optimizer.step()
        self.model.zero_grad()
        return losses

    def state(self) -> dict[str, Any]:
        """All that an update changes, to the last bit."""
        return {
            "weight": self.model.weight.detach().tolist(),
            "gradient": None if self.model.weight.grad is None else self.model.weight.grad.tolist(),
            "optimizer": repr(self.optimizer.state_dict()),
            "previous adapter": {
                name: tensor.tolist() for name, tensor in self.updater.previous_adapter.state_dict().items()
            },
            "parts": {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()},
        }


TWO_BATCHES = [batch_of(3), batch_of(4, first=10)]
"""Micro-batches of two: 2 + 1 and 2 + 2."""


class TestAllOrNothing:
    @pytest.mark.parametrize(
        ("event", "number"),
        [
            ("rollout", 1),
            ("rollout", 2),
            ("gradient", 1),
            ("gradient", 4),
            ("clip", 1),
            ("step", 1),
            ("gradient", 6),
            ("clip", 2),
            ("step", 2),
            ("gradient", 12),
            ("record", 2),
            ("commit", 1),
        ],
    )
    @pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt(), NonFiniteError("the loss")])
    @pytest.mark.parametrize(("build", "updates_before"), [(adam, 0), (adam, 2), (momentum, 1)])
    def test_a_failure_in_any_phase_moves_nothing(
        self, event: str, number: int, error: BaseException, build: Build, updates_before: int
    ) -> None:
        run, other = Run(build, num_iterations=3), Run(build, num_iterations=3)
        for each in (run, other):
            for _ in range(updates_before):
                each.update([batch_of(2)])
        before, run.events, run.fatal = run.state(), [], (event, number, error)
        with pytest.raises(type(error)) as caught:
            run.update(TWO_BATCHES)
        assert caught.value is error
        assert run.events[-1] == event
        assert run.state() == before
        # What follows is as if it had never been.
        run.fatal = None
        assert run.update(TWO_BATCHES) == other.update(TWO_BATCHES)
        assert run.state() == other.state() != before

    @pytest.mark.parametrize(("event", "number"), [("gradient", 1), ("gradient", 4), ("record", 1), ("commit", 1)])
    def test_with_a_single_iteration_too(self, event: str, number: int) -> None:
        run = Run()
        run.update([batch_of(2)])
        before, run.events, run.fatal = run.state(), [], (event, number, OSError("disk full"))
        with pytest.raises(OSError, match="disk full"):
            run.update(TWO_BATCHES)
        assert run.state() == before

    @pytest.mark.parametrize("call", [1, 4, 5, 12])
    def test_a_gradient_that_is_not_finite_is_refused_before_a_step(self, call: int) -> None:
        run = Run(num_iterations=3)
        run.update([batch_of(2)])
        before, calls = run.state(), 0

        def spoil(gradient: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return gradient * torch.nan if calls == call else gradient

        run.model.weight.register_hook(spoil)
        with pytest.raises(NonFiniteError, match="the gradient of weight is not finite, in micro-batch") as caught:
            run.update(TWO_BATCHES)
        iteration = (call - 1) // 4 + 1
        assert f"of iteration {iteration}, in the update of step 1." in str(caught.value)
        assert run.state() == before

    def test_a_gradient_that_is_spoilt_after_the_update_is_refused_too(self) -> None:
        run = Run()
        before = run.state()
        with run.updater.all_or_nothing(run.parts, 20):
            run.updater.accumulate(batch_of(2), run.differentiate)
        assert run.model.weight.grad is not None
        run.model.weight.grad[0, 0] = torch.inf
        with (
            pytest.raises(
                NonFiniteError, match="the gradient of weight is not finite, in the optimizer step of step 1"
            ),
            run.updater.all_or_nothing(run.parts, 20),
            run.updater.last_step(),
        ):
            pytest.fail("nothing may be written down")
        assert run.state() == before

    def test_what_was_found_to_fit_is_forgotten_with_the_update(self) -> None:
        run = Run(training_batch_size=4)
        before, run.fatal = run.state(), ("gradient", 1, torch.OutOfMemoryError("full"))
        with run.updater.all_or_nothing(run.parts, 20):
            run.updater.accumulate(batch_of(4), run.differentiate)
        assert run.updater.state_dict()["micro_batches"]["size"] == 2
        with pytest.raises(KeyError), run.updater.all_or_nothing(run.parts, 20):
            raise KeyError
        assert run.state() == before

    def test_an_update_is_open_from_its_first_batch_to_its_last_step(self) -> None:
        run = Run()
        with pytest.raises(AssertionError, match="within all_or_nothing"):
            run.updater.accumulate(batch_of(2), run.differentiate)
        with run.updater.all_or_nothing(run.parts, 20):
            assert run.updater.num_trajectories == 20
        with run.updater.all_or_nothing(run.parts, 7):
            assert run.updater.num_trajectories == 20, "the same update"
        with run.updater.all_or_nothing(run.parts, 7), run.updater.last_step():
            pass
        with run.updater.all_or_nothing(run.parts, 7):
            assert run.updater.num_trajectories == 7


class TestSteps:
    def test_the_gradient_is_that_of_all_batches(self) -> None:
        run, other = Run(), Run()
        losses = run.update(TWO_BATCHES)
        expected = [other.loss(batch) for batch in TWO_BATCHES]
        assert losses == pytest.approx([loss.item() for loss in expected])
        sum(expected).backward()
        other.optimizer.step()
        torch.testing.assert_close(run.model.weight, other.model.weight)

    @pytest.mark.parametrize("num_iterations", [1, 2, 4])
    def test_further_iterations_by_hand(self, num_iterations: int) -> None:
        run, other = Run(num_iterations=num_iterations), Run()
        start = other.model.weight.detach().clone()
        run.update(TWO_BATCHES)
        for iteration in range(1, num_iterations + 1):
            before = other.model.weight.detach().clone()
            other.model.zero_grad()
            sum(other.loss(batch) for batch in TWO_BATCHES).backward()
            if iteration < num_iterations:  # the Trainer clips the last
                other.clip()
            other.optimizer.step()
        torch.testing.assert_close(run.model.weight, other.model.weight)
        (previous,) = run.updater.previous_adapter.state_dict().values()
        torch.testing.assert_close(previous, before)
        assert torch.equal(previous, start) == (num_iterations == 1)
        assert run.updater.num_updates == num_iterations
        assert run.events.count("clip") == num_iterations - 1

    def test_updates_are_counted_over_a_run(self) -> None:
        run = Run(num_iterations=2)
        for batches in ([batch_of(2)], [nothing_of(batch_of(2))], TWO_BATCHES):
            run.update(batches)
        assert run.updater.num_updates == 4

    @pytest.mark.parametrize("num_iterations", [1, 3])
    def test_nothing_kept_moves_nothing(self, num_iterations: int) -> None:
        run = Run(num_iterations=num_iterations)
        run.update([batch_of(2)])
        before, run.events = run.state(), []
        assert run.update([nothing_of(batch) for batch in TWO_BATCHES]) == [0.0, 0.0]
        after = run.state()
        assert after.pop("parts")["counter"] == {"history": [1, 1, 2]}, "but the batches were read"
        assert before.pop("parts")["updater"] == run.updater.state_dict()
        assert after == before
        assert run.events == ["rollout", "record"] * 2 + ["commit"]
        assert [sums.loss.item() > 0 for sums in run.sums] == [True, False]
        assert run.sums[1] == LossSums(torch.zeros(()))

    def test_a_batch_of_which_nothing_is_kept_adds_nothing(self) -> None:
        run, other = Run(num_iterations=2), Run(num_iterations=2)
        run.update([TWO_BATCHES[0], nothing_of(TWO_BATCHES[1])])
        other.update(TWO_BATCHES[:1])
        torch.testing.assert_close(run.model.weight, other.model.weight, atol=0, rtol=0)

    @pytest.mark.parametrize("num_iterations", [1, 3])
    def test_the_loss_is_a_mean_over_the_optimizer_steps_of_an_update(self, num_iterations: int) -> None:
        run, other = Run(num_iterations=num_iterations), Run()
        losses = run.update(TWO_BATCHES)
        expected = []
        for iteration in range(num_iterations):
            loss = sum(other.loss(batch) for batch in TWO_BATCHES)
            expected.append(loss.item())
            loss.backward()
            if iteration < num_iterations - 1:
                other.clip()
            other.optimizer.step()
            other.model.zero_grad()
        assert sum(losses) == pytest.approx(statistics.fmean(expected))
        (sums,) = run.sums
        assert sums.loss.item() == pytest.approx(statistics.fmean(expected))
        assert len(set(expected)) == num_iterations

    @pytest.mark.parametrize("num_iterations", [1, 2])
    def test_parts_are_summed_over_the_batches_of_an_update(self, num_iterations: int) -> None:
        run = Run(num_iterations=num_iterations)

        def differentiate(kept: KeptTrajectories) -> tuple[Tensor, LossTerms | None]:
            loss, _ = Run.differentiate(run, kept)
            # KL per query token, of which each trajectory has one: 2 in the first batch, 5 in the second.
            kl = 2.0 if kept.token_ids[0, 0] < 20 else 5.0
            return loss, LossTerms(loss, torch.tensor(0.5), kept.weights.sum() * kl)

        run.differentiate = differentiate  # type: ignore[method-assign]
        weights = torch.full((3,), 1 / 20), torch.full((4,), 1 / 20)
        batches = [replace(batch_of(3), weights=weights[0]), replace(batch_of(4, first=20), weights=weights[1])]
        run.update(batches)
        (sums,) = run.sums
        # Two micro-batches each.
        assert sums.policy == pytest.approx(4 * 0.5)
        assert sums.num_query_tokens == 7 * num_iterations
        assert sums.kl == pytest.approx((3 * 2.0 + 4 * 5.0) * num_iterations)

    def test_a_part_that_is_not_computed_is_not_zero(self) -> None:
        run = Run()
        differentiate = run.differentiate

        def without_kl(kept: KeptTrajectories) -> tuple[Tensor, LossTerms | None]:
            loss, _ = differentiate(kept)
            return loss, LossTerms(loss, loss, None)

        run.differentiate = without_kl  # type: ignore[method-assign]
        run.update(TWO_BATCHES)
        (sums,) = run.sums
        assert sums.policy == pytest.approx(sums.loss.item())
        assert sums.kl is None

    def test_state_round_trips(self) -> None:
        run, again = Run(num_iterations=2, training_batch_size=4), Run(training_batch_size=4)
        run.fatal = ("gradient", 1, MemoryError())
        run.update(TWO_BATCHES)
        again.updater.load_state_dict(run.updater.state_dict())
        assert again.updater.num_updates == 2
        assert again.updater.state_dict() == run.updater.state_dict()
        assert run.updater.state_dict()["micro_batches"] == {"configured": 4, "size": 1, "num_halvings": 1}
