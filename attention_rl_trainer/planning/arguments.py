"""What the trainer is given beside model and articles: refused by name before anything is loaded (design §10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.rollout.environment import MemoryEnvironment
from attention_rl_trainer.update.filter import TrajectoryFilter


def expect_arguments(
    args: AttentionGuidedRLConfig | None,
    *,
    eval_dataset: object = None,
    callbacks: object = None,
    environment: object = None,
    reward_fn: object = None,
    reward_filter: object = None,
    optimizers: object = (None, None),
) -> None:
    """Check what the trainer is given, in the words of its constructor.

    Raises:
        ValueError: an argument is of another kind, or they contradict each other; names it, and the way out.
    """
    expect_options(args)
    expect_parts(environment, reward_fn, reward_filter)
    expect_callbacks(callbacks)
    expect_optimizers(optimizers)
    if args is not None:
        expect_evaluation_articles(args, eval_dataset)


def expect_options(args: object) -> None:
    """Refuse what is not the options of this trainer.

    Raises:
        ValueError: names what was given, and the way out.
    """
    if args is None or isinstance(args, AttentionGuidedRLConfig):
        return
    name = AttentionGuidedRLConfig.__name__
    if isinstance(args, type):
        way_out = (
            f"{args.__name__}(output_dir=...) makes one of it" if issubclass(args, AttentionGuidedRLConfig) else ""
        )
    elif isinstance(args, TrainingArguments):
        way_out = f"{name} has all options of TrainingArguments and those of the method: {name}(output_dir=..., ...)"
    elif isinstance(args, dict):
        way_out = f"{name}(**args) makes one of it"
    else:
        way_out = f"{name}(output_dir=...)"
    raise ValueError(f"args must be an {name}, got {_named(args)}" + (f"; {way_out}" if way_out else ""))


def expect_parts(environment: object, reward_fn: object, reward_filter: object) -> None:
    """Refuse parts of a run that lack a verb, or are classes where an object is asked for.

    Raises:
        ValueError: names which, and what it lacks.
    """
    for name, part, protocol in (
        ("environment", environment, MemoryEnvironment),
        ("reward_filter", reward_filter, TrajectoryFilter),
    ):
        if part is None:
            continue
        verbs = [verb for verb in dir(protocol) if not verb.startswith("_") and not hasattr(part, verb)]
        if isinstance(part, type) or verbs:
            lack = "; make an object of it" if isinstance(part, type) else f", which has no {', '.join(verbs)}"
            raise ValueError(f"{name} must be a {protocol.__name__}, got {_named(part)}{lack}")
    if reward_fn is not None and (isinstance(reward_fn, type) or not callable(reward_fn)):
        raise ValueError(f"reward_fn must be a function of a step that returns [B] rewards, got {_named(reward_fn)}")


def expect_callbacks(callbacks: object) -> None:
    """Refuse callbacks that are not a list of `transformers.TrainerCallback`.

    Raises:
        ValueError: names what was given.
    """
    if callbacks is None:
        return
    if not isinstance(callbacks, list):
        raise ValueError(f"callbacks must be a list of TrainerCallback, got {_named(callbacks)}; put it into [ ]")
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise ValueError(f"callbacks must be a list of TrainerCallback, got {_named(callback)} among them")


def expect_optimizers(optimizers: Any) -> None:
    """Refuse what is not a pair of an optimizer and a schedule of that optimizer, each of which may be ``None``.

    Raises:
        ValueError: names what was given.
    """
    expected = "optimizers must be a pair (optimizer, scheduler), each of which may be None"
    if not isinstance(optimizers, Sequence) or isinstance(optimizers, str) or len(optimizers) != 2:
        raise ValueError(f"{expected}, got {_named(optimizers)}")
    optimizer, scheduler = optimizers
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ValueError(f"{expected}, got {_named(optimizer)} as optimizer")
    if scheduler is None:
        return
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "optimizer"):
        raise ValueError(f"{expected}, got {_named(scheduler)} as scheduler")
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            f"optimizers has the schedule {type(scheduler).__name__} of another optimizer than the one beside it, so "
            "it would change no learning rate of the run; give both, or set lr_scheduler_type"
        )


def expect_evaluation_articles(args: AttentionGuidedRLConfig, eval_dataset: object) -> None:
    """Refuse to evaluate on the way without articles for it.

    Raises:
        ValueError: names the option.
    """
    options = {"eval_strategy": args.eval_strategy, "eval_on_start": args.eval_on_start}
    for name, value in options.items():
        if eval_dataset is None and value not in ("no", False):
            raise ValueError(
                f"{name} is {str(getattr(value, 'value', value))!r}, but there are no articles to evaluate on; give "
                f"the trainer an eval_dataset (--dataset_eval_name), or leave {name} out"
            )


def _named(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
