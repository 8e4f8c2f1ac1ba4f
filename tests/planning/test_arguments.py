"""Wrong kinds of what the trainer is given beside model and articles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_environment, tiny_config, tiny_llama
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast, TrainingArguments
from transformers.optimization import get_scheduler

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.planning.arguments import expect_arguments
from attention_rl_trainer.rollout import KVMemoryEnvironment
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
from attention_rl_trainer.update import RewardFilter


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


def schedule(of: torch.optim.Optimizer) -> Any:
    return get_scheduler("constant", of)


def a_pair() -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD([weight()], lr=1e-3)
    return optimizer, schedule(optimizer)


class Lacking:
    """An environment without a step."""

    def reset(self, pairs: object) -> None: ...


# By name: what is given, and what is said of it.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "args a dict": (
        {"args": {"output_dir": "run"}},
        "args must be an AttentionGuidedRLConfig, got dict; AttentionGuidedRLConfig(**args) makes one of it",
    ),
    "args an empty dict": ({"args": {}}, "args must be an AttentionGuidedRLConfig, got dict; Attention"),
    "args a folder": ({"args": "run"}, "args must be an AttentionGuidedRLConfig, got str; AttentionGuidedRLConfig(out"),
    "args the class": (
        {"args": AttentionGuidedRLConfig},
        "args must be an AttentionGuidedRLConfig, got the class AttentionGuidedRLConfig; AttentionGuidedRLConf",
    ),
    "callbacks one": (
        {"callbacks": EarlyStoppingCallback()},
        "callbacks must be a list of TrainerCallback, got EarlyStoppingCallback; put it into [ ]",
    ),
    "callbacks a function": (
        {"callbacks": [print]},
        "callbacks must be a list of TrainerCallback, got builtin_function_or_method among them",
    ),
    "environment the class": (
        {"environment": KVMemoryEnvironment},
        "environment must be a MemoryEnvironment, got the class KVMemoryEnvironment; make an object of it",
    ),
    "environment without a step": (
        {"environment": Lacking()},
        "environment must be a MemoryEnvironment, got Lacking, which has no step",
    ),
    "filter the class": (
        {"reward_filter": RewardFilter},
        "reward_filter must be a TrajectoryFilter, got the class RewardFilter; make an object of it",
    ),
    "filter a number": (
        {"reward_filter": 1.0},
        "reward_filter must be a TrajectoryFilter, got float, which has no judge, load_state_dict, state_dict",
    ),
    "reward a list": (
        {"reward_fn": [len]},
        "reward_fn must be a function of a step that returns [B] rewards, got list",
    ),
    "reward a class": (
        {"reward_fn": Lacking},
        "reward_fn must be a function of a step that returns [B] rewards, got the",
    ),
    "optimizers one": (
        {"optimizers": torch.optim.SGD([weight()])},
        "optimizers must be a pair (optimizer, scheduler), each of which may be None, got SGD",
    ),
    "optimizers a class": (
        {"optimizers": (torch.optim.SGD, None)},
        "optimizers must be a pair (optimizer, scheduler), each of which may be None, got the class SGD as optimizer",
    ),
    "optimizers three": ({"optimizers": (None, None, None)}, "optimizers must be a pair (optimizer, scheduler), each"),
    "optimizers none": ({"optimizers": None}, "optimizers must be a pair (optimizer, scheduler), each of which may be"),
    "optimizers turned": (
        {"optimizers": a_pair()[::-1]},
        "optimizers must be a pair (optimizer, scheduler), each of which may be None, got LambdaLR as optimizer",
    ),
    "scheduler an optimizer": (
        {"optimizers": (a_pair()[0], a_pair()[0])},
        "optimizers must be a pair (optimizer, scheduler), each of which may be None, got SGD as scheduler",
    ),
    "scheduler of another": (
        {"optimizers": (a_pair()[0], a_pair()[1])},
        "optimizers has the schedule LambdaLR of another optimizer than the one beside it",
    ),
    "rewards as TRL takes them": (
        {"reward_funcs": [len]},
        "AttentionGuidedRLTrainer takes no reward_funcs: a reward of your own is a function of a step, ",
    ),
    "a tokenizer by its old name": (
        {"tokenizer": None},
        "AttentionGuidedRLTrainer takes no tokenizer: give it as processing_class",
    ),
    "scheduler alone": (
        {"optimizers": (None, a_pair()[1])},
        "optimizers has the schedule LambdaLR of another optimizer",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_is_refused_by_name_before_the_model_is_touched(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given, message = WRONG[name]
    model = tiny_llama()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        AttentionGuidedRLTrainer(
            **{"model": model, "args": tiny_config(tmp_path), "processing_class": tokenizer} | given
        )
    assert not [parameter for parameter, _ in model.named_parameters() if "lora" in parameter]
    assert list(tmp_path.iterdir()) == []


def test_the_trainers_own_options_are_refused_with_the_way_out(tmp_path: Path) -> None:
    plain: Any = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    message = (
        r"^args must be an AttentionGuidedRLConfig, got TrainingArguments; .* has all options of TrainingArguments"
    )
    with pytest.raises(ValueError, match=message):
        expect_arguments(plain)


def test_what_is_right_passes(tmp_path: Path) -> None:
    expect_arguments(None)
    config = tiny_config(tmp_path)
    expect_arguments(
        config,
        callbacks=[EarlyStoppingCallback(), EarlyStoppingCallback],
        environment=make_environment(),
        reward_fn=len,
        reward_filter=RewardFilter(config),
        optimizers=a_pair(),
    )
    expect_arguments(config, optimizers=[a_pair()[0], None])


@pytest.mark.parametrize("options", [{"eval_strategy": "steps"}, {"eval_strategy": "epoch"}, {"eval_on_start": True}])
def test_without_articles_there_is_no_evaluation(options: dict[str, Any], tmp_path: Path) -> None:
    (name,) = options
    config = tiny_config(tmp_path, **options)
    expect_arguments(config, eval_dataset=[])
    with pytest.raises(ValueError, match=rf"^{name} is '\w+', but there are no articles .*leave {name} out$"):
        expect_arguments(config)
    expect_arguments(tiny_config(tmp_path))
