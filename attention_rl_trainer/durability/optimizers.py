"""An optimizer and its learning-rate schedule in a checkpoint: the states are the checkpoint's, the options the run's.

So a resumed run may change its learning rate, its schedule and the options of its optimizer, and the change acts. A
schedule other than a ``LambdaLR`` keeps the rate in the optimizer alone; with it, the checkpoint's options stay.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from attention_rl_trainer.durability.states import load_tree, save_tree

logger = logging.getLogger(__name__)

OPTIMIZER_NAME = "optimizer.safetensors"
# Options in an optimizer's groups beside its learning rate; other entries may be state.
_GROUP_OPTIONS = ("initial_lr", "betas", "eps", "weight_decay", "momentum")


def save_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Write the states of both."""
    states = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scheduler_kind": type(scheduler).__name__,
    }
    save_tree(folder / OPTIMIZER_NAME, states)


def load_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler, step: int) -> None:
    """Read what `save_optimizer` wrote, under the options that optimizer and schedule have now.

    Args:
        folder: the checkpoint's.
        optimizer: its options stay if the schedule is a ``LambdaLR``.
        scheduler: one of another kind than the saved one starts at ``step``.
        step: of the checkpoint.
    """
    states = load_tree(folder / OPTIMIZER_NAME)
    options = [{name: group[name] for name in _GROUP_OPTIONS if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(states["optimizer"])
    if type(scheduler).__name__ == states["scheduler_kind"]:
        scheduler.load_state_dict(states["scheduler"])
    elif isinstance(scheduler, LambdaLR):
        scheduler.last_epoch = step
    if isinstance(scheduler, LambdaLR):
        _apply_options(options, optimizer, scheduler)
    else:
        # It may change more than the rate.
        logger.warning(
            "%s resumes with the learning rate and the other options of the optimizer that the checkpoint holds",
            type(scheduler).__name__,
        )


def _apply_options(options: Sequence[Mapping[str, Any]], optimizer: Optimizer, scheduler: LambdaLR) -> None:
    groups = optimizer.param_groups
    for group, present in zip(groups, options, strict=True):
        group.update(present)
    # In closed form, as the schedule computes it: unchanged options give the same rates.
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates  # what get_last_lr returns; there is no public way to set it
