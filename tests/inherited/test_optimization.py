"""Optimizers and schedules that cannot be made, and what they do not read, are refused when the options are made."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from attention_rl_trainer.inherited.optimization import WITHOUT_KWARGS, WITHOUT_WARMUP

# What a schedule needs to be made at all.
NEEDS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 5},
}
EVALUATED = {"eval_strategy": "steps", "metric_for_best_model": "reward"}


def rates(name: str, warmup: int) -> list[float]:
    """The learning rates of the first steps of a schedule over 20."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule: Any = get_scheduler(name, optimizer, warmup, 20, NEEDS.get(name))
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*([1.0] if name in ("reduce_lr_on_plateau", "greedy") else []))
    return found


class TestSchedule:
    @pytest.mark.parametrize("name", [item.value for item in SchedulerType])
    def test_warm_up_is_refused_exactly_where_it_does_nothing(self, name: str, tmp_path: Path) -> None:
        acts = rates(name, 0) != rates(name, 4)
        assert acts == (name not in WITHOUT_WARMUP)
        options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": NEEDS.get(name), **EVALUATED}
        assert tiny_config(tmp_path, **options).lr_scheduler_type == name
        for steps in (4, 0.1):
            if acts:
                tiny_config(tmp_path, **options, warmup_steps=steps)
            else:
                message = (
                    rf"^warmup_steps is {steps}, but the schedule '{name}' has no warm-up .*'constant_with_warmup'"
                )
                with pytest.raises(ValueError, match=message):
                    tiny_config(tmp_path, **options, warmup_steps=steps)

    @pytest.mark.parametrize("name", [item.value for item in SchedulerType])
    def test_an_unknown_keyword_is_refused_everywhere(self, name: str, tmp_path: Path) -> None:
        kwargs = NEEDS.get(name, {}) | {"nonsense": 1}
        message = "takes none" if name in WITHOUT_KWARGS else "cannot be made: .*nonsense"
        with pytest.raises(ValueError, match=message):
            tiny_config(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, **EVALUATED)

    @pytest.mark.parametrize("name", sorted(NEEDS))
    def test_a_missing_keyword_is_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"^the schedule '{name}' .* cannot be made: "):
            tiny_config(tmp_path, lr_scheduler_type=name)

    @pytest.mark.parametrize(
        ("name", "kwargs", "message"),
        [
            ("polynomial", {"lr_end": 1.0}, "cannot be made: lr_end"),
            ("polynomial", {"lr_end": -1.0}, r"gives a learning rate of -\d.* at step \d+; it must be finite"),
            ("inverse_sqrt", {"timescale": 0}, "cannot be made: .*division by zero"),
            ("linear", "text", "cannot be made: "),
        ],
        ids=["too high", "negative", "zero", "text"],
    )
    def test_a_keyword_out_of_range_is_refused(self, name: str, kwargs: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"^the schedule '{name}' with lr_scheduler_kwargs=.*{message}"):
            tiny_config(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs)

    def test_a_warm_up_of_two_and_a_half_steps(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^warmup_steps must be an integer if it is above 1, got 2\.5$"):
            tiny_config(tmp_path, lr_scheduler_type="linear", warmup_steps=2.5)


# Those of torch, of transformers and of bitsandbytes; the others need a package that the tests do not install.
MADE = {
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit"),
    *("paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
}
UNUSABLE = ("lomo", "layerwise", "galore", "apollo", "schedule_free")


class TestOptimizer:
    @pytest.mark.parametrize("name", [item.value for item in OptimizerNames])
    def test_each_is_made_or_refused_by_name(self, name: str, tmp_path: Path) -> None:
        said = "is not supported: it" if any(part in name for part in UNUSABLE) else "cannot be made: "
        refused = pytest.raises(ValueError, match=f"^optim={name} {said}")
        with contextlib.nullcontext() if name in MADE else refused:
            assert tiny_config(tmp_path, optim=name).optim == name

    @pytest.mark.parametrize(
        ("optim", "option"),
        [
            ("sgd", "adam_beta1"),
            ("sgd", "adam_beta2"),
            ("rmsprop", "adam_epsilon"),
            ("adagrad", "adam_beta1"),
            ("adafactor", "adam_beta2"),
        ],
    )
    def test_options_of_adam_are_refused_elsewhere(self, optim: str, option: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"^{option} is 0\.5, but optim={optim} does not read it; leave it out$"):
            tiny_config(tmp_path, optim=optim, **{option: 0.5})
        assert getattr(tiny_config(tmp_path, **{option: 0.5}), option) == 0.5

    @pytest.mark.parametrize(
        ("optim", "given", "message"),
        [
            (
                "adamw_torch",
                "momentum=0.9",
                "^optim_args has momentum=0.9, but optim=adamw_torch does not read momentum",
            ),
            ("sgd", "momentum=0.9,alpha=0.5", "^optim_args has alpha=0.5, but optim=sgd does not read alpha"),
            ("adagrad", "nesterov=true", "^optim_args has nesterov=true, but optim=adagrad does not read nesterov"),
            ("sgd", "weight_decay=0.1", "^optim_args has weight_decay=0.1, but the option weight_decay overrides it"),
            ("sgd", "momentum", "^optim=sgd with optim_args='momentum' cannot be made: "),
            ("sgd", "momentum=much", "^optim=sgd with optim_args='momentum=much' cannot be made: .*'much'"),
            ("sgd", "momentum=-1", "^optim=sgd with optim_args='momentum=-1' cannot be made: .*momentum"),
        ],
    )
    def test_arguments_that_are_not_read_or_wrong_are_refused(
        self, optim: str, given: str, message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            tiny_config(tmp_path, optim=optim, optim_args=given)

    @pytest.mark.parametrize(
        ("optim", "given"),
        [
            ("sgd", "momentum=0.9, nesterov=true"),
            ("sgd", "momentum=0.123"),
            ("rmsprop", "alpha=0.5,centered=false"),
            ("adagrad", "lr_decay=0.1"),
        ],
    )
    def test_arguments_that_are_read_pass(self, optim: str, given: str, tmp_path: Path) -> None:
        assert tiny_config(tmp_path, optim=optim, optim_args=given).optim_args == given
