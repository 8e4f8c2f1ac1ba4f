"""Optimizer and schedule as the options name them, made once for a made-up weight: what fails or is not read is said.

The Trainer makes them in `train`, after the model was loaded and the folder was prepared, and passes over what they do
not read.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler

# Schedules without a warm-up, and those whose function takes no keyword arguments.
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
WITHOUT_KWARGS = ("constant", "constant_with_warmup")

_REFUSED = {
    "lomo": "it steps inside the backward, before it is known that the whole update can be made",
    "layerwise": "it steps inside the backward, before it is known that the whole update can be made",
    "galore": "it projects gradients to a low rank, which those of an adapter have already",
    "apollo": "it projects gradients to a low rank, which those of an adapter have already",
    "schedule_free": "it keeps other weights for evaluation than for training, and a rollout does both",
}
_OF_ADAM = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}


def expect_optimization(args: TrainingArguments, num_steps: int) -> None:
    """Refuse an optimizer or a schedule that cannot be made, and options that they do not read.

    Args:
        num_steps: optimizer steps of the Trainer in the whole run.

    Raises:
        ValueError: names the option, and what is wrong.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    for part, reason in _REFUSED.items():
        if part in optim:
            raise ValueError(f"optim={optim} is not supported: {reason}; take another, such as adamw_torch")
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = _made(kind, options, args.weight_decay)
    except (ImportError, TypeError, ValueError, AttributeError) as error:
        given = f" with optim_args={args.optim_args!r}" if args.optim_args else ""
        raise ValueError(f"optim={optim}{given} cannot be made: {error}") from error
    _expect_read(args, optim, options)
    _expect_schedule(args, optimizer, num_steps)


def _made(kind: Any, options: dict[str, Any], weight_decay: float) -> Optimizer:
    group = {"params": [nn.Parameter(torch.zeros(1))], "weight_decay": weight_decay}
    # What it has to say of a device, it says when the run makes it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Optimizer = kind([group], **options)
    return made


def _expect_read(args: TrainingArguments, optim: str, options: dict[str, Any]) -> None:
    """Refuse options of an optimizer that this one does not read."""
    defaults = {item.name: item.default for item in fields(TrainingArguments)}
    for name, key in _OF_ADAM.items():
        if getattr(args, name) != defaults[name] and key not in options:
            raise ValueError(f"{name} is {getattr(args, name)}, but optim={optim} does not read it; leave it out")
    for mapping in (args.optim_args or "").replace(" ", "").split(","):
        key = mapping.split("=")[0]
        if key == "weight_decay":
            raise ValueError(f"optim_args has {mapping}, but the option weight_decay overrides it; set weight_decay")
        if key and not _is_read(args, key, options):
            raise ValueError(f"optim_args has {mapping}, but optim={optim} does not read {key}; leave it out")


def _is_read(args: TrainingArguments, key: str, options: dict[str, Any]) -> bool:
    """Whether another value of a key changes what the optimizer is made with, or is refused."""
    for other in ("0.123", "true"):
        changed = copy.copy(args)
        changed.optim_args = f"{args.optim_args},{key}={other}"
        try:
            if Trainer.get_optimizer_cls_and_kwargs(changed)[1] != options:
                return True
        except (AttributeError, KeyError, ValueError):
            return True
    return False


def _expect_schedule(args: TrainingArguments, optimizer: Optimizer, num_steps: int) -> None:
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.warmup_steps > 0 and name in WITHOUT_WARMUP:
        raise ValueError(
            f"warmup_steps is {args.warmup_steps}, but the schedule {name!r} has no warm-up of the learning rate; set "
            "lr_scheduler_type, such as 'constant_with_warmup'. (The method's own warm-up is warmup_episodes)"
        )
    if args.warmup_steps > 1 and args.warmup_steps != int(args.warmup_steps):
        raise ValueError(f"warmup_steps must be an integer if it is above 1, got {args.warmup_steps}")
    if args.lr_scheduler_kwargs and name in WITHOUT_KWARGS:
        raise ValueError(
            f"lr_scheduler_kwargs is {args.lr_scheduler_kwargs}, but the schedule {name!r} takes none; leave it out, "
            "or set lr_scheduler_type"
        )
    warmup = args.get_warmup_steps(num_steps)
    kwargs: Any = args.lr_scheduler_kwargs
    try:
        schedule: Any = get_scheduler(name, optimizer, warmup, num_steps, kwargs)
        factors = {}
        if isinstance(schedule, LambdaLR):
            steps = {0, warmup, num_steps // 2, num_steps - 1}
            factors = {step: schedule.lr_lambdas[0](step) for step in sorted(steps)}
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"the schedule {name!r} with lr_scheduler_kwargs={kwargs} cannot be made: {error}") from error
    for step, factor in factors.items():
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"the schedule {name!r} with lr_scheduler_kwargs={kwargs} gives a learning rate of "
                f"{factor * args.learning_rate} at step {step}; it must be finite and at least 0"
            )
