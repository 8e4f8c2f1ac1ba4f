"""The modes in which a model computes: without gradients for reading, without randomness for the update (design §9)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# Numbers of a module that make its forward random in train mode.
_RANDOMNESS = ("dropout", "layerdrop", "drop_path", "jitter")


@contextmanager
def deterministic_inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and back.

    In train mode a rollout would apply dropout, and activation checkpointing would drop the cache.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def update_mode(model: nn.Module, *, adapter_dropout: bool = False) -> Iterator[None]:
    """Compute as in evaluation mode but keep activation checkpointing, and back.

    Dropout is one source of randomness among others: routers of experts add noise or draw in train mode, and decoders
    leave layers out. So every module is in evaluation mode, but for those that run their forward again in the backward,
    which they do in train mode alone: in these, what makes the forward random is set to 0.

    Args:
        model: with or without an adapter.
        adapter_dropout: whether the adapter's own dropout acts nevertheless.
    """
    modules = list(model.modules())
    was_training = [module.training for module in modules]
    checkpointing = [m for m in modules if m.training and vars(m).get("gradient_checkpointing", False)]
    randomness = [
        (module, name, value)
        for module in checkpointing
        for name, value in vars(module).items()
        if isinstance(value, float) and any(word in name for word in _RANDOMNESS)
    ]
    training = set(checkpointing)
    if adapter_dropout:
        training |= {part for part in _adapter_parts(modules) if part.training}
    try:
        for module in modules:
            module.training = module in training
        for module, name, _ in randomness:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in randomness:
            setattr(module, name, value)
        for module, training_before in zip(modules, was_training, strict=True):
            module.training = training_before


def _adapter_parts(modules: list[nn.Module]) -> set[nn.Module]:
    """Collect the modules that an adapter has added."""
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    added = {part for layer in layers for part in layer.modules()}
    return added - {part for layer in layers for part in layer.get_base_layer().modules()}
