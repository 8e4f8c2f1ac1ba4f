"""The adapter that is trained: put on a base model, disabled for the reference, or used by a part of a batch (§6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention_rl_trainer.models.attention import find_attention_projections

# Options that change the base model itself; these are not undone where the adapter is switched off.
_CHANGING_OPTIONS = ("modules_to_save", "trainable_token_indices", "layer_replication", "kasa_config")
# Others put a part of the base model's weights into the adapter.
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_SAMPLED_VALUES = 64


def default_lora_config(model: PreTrainedModel) -> LoraConfig:
    """Rank 8, alpha 16, dropout 0.05 on all attention projections of a base model."""
    return LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=find_attention_projections(model),
        # GPT-2's Conv1D stores its weight transposed.
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )


def add_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PeftModel:
    """Put an adapter on a base model, or take the one that is there.

    Args:
        model: a base model, or one with an adapter named "default".
        peft_config: LoRA without target modules gets all attention projections; ``None`` for `default_lora_config`.

    Raises:
        ValueError: the model has an adapter already and ``peft_config`` asks for another, or the adapter changes more
            than can be switched off to get the base model back, or it has another name.
    """
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("the model has an adapter already; give a base model with peft_config, or no peft_config")
        if list(model.peft_config) != ["default"]:
            # PEFT saves any other adapter in a folder of the adapter's name, whatever the name is.
            names = ", ".join(map(repr, model.peft_config))
            raise ValueError(
                f"the model has adapters named {names}, but the one to be trained must be the only one, named "
                '"default", as PEFT names it where no name is given'
            )
        _expect_reversible(model.peft_config["default"])
        return model
    if peft_config is None:
        peft_config = default_lora_config(model)
    elif isinstance(peft_config, LoraConfig) and not peft_config.target_modules:
        # PEFT's own default would leave half of the projections out.
        default = default_lora_config(model)
        peft_config.target_modules = default.target_modules
        peft_config.fan_in_fan_out = default.fan_in_fan_out
    _expect_reversible(peft_config)
    before = sampled_weights(model.named_parameters())
    adapted: PeftModel = get_peft_model(model, peft_config)
    base = {name: values for name, values in sampled_weights(adapted.named_parameters()).items() if name in before}
    if base != before:
        raise ValueError(
            f"the adapter {type(peft_config).__name__} has changed the weights of the base model "
            f"({', '.join(sorted(name for name in before if base.get(name) != before[name])[:3])}); the reward is "
            "measured against the untouched base model. Use another kind, or another initialization"
        )
    return adapted


def sampled_weights(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[list[int], str, str]]:
    """Sample the values of each parameter of a base model, with or without an adapter.

    Returns:
        Shape, precision and values in hexadecimal digits, by the parameter's name in the base model.
    """
    samples = {}
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)].cpu().contiguous().view(torch.uint8)
        own_name = name.removeprefix("base_model.model.").replace("base_layer.", "")
        samples[own_name] = list(parameter.shape), str(parameter.dtype), values.numpy().tobytes().hex()
    return samples


def _expect_reversible(config: PeftConfig) -> None:
    """Refuse an adapter beside which the reference would not be the base model, or that alters the prompt."""
    options = config.to_dict()
    changes = [name for name in _CHANGING_OPTIONS if options.get(name)]
    if options.get("bias", "none") != "none":
        changes.append(f"bias={options['bias']!r}")
    if options.get("init_lora_weights", True) not in HARMLESS_INITS:
        changes.append(f"init_lora_weights={options['init_lora_weights']!r}")
    if config.is_prompt_learning:
        changes.append(f"prompt learning ({config.peft_type})")
    if changes:
        raise ValueError(
            f"the adapter has {', '.join(changes)}, which changes the base model itself or the prompt; the reward is "
            "measured against the untouched base model. Use LoRA without it"
        )


class AdapterLayers:
    """The layers of a model that the adapter has changed."""

    def __init__(self, model: PeftModel) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    @property
    def are_plain_lora(self) -> bool:
        """Whether each gives its base layer's output plus B · A · x of one adapter, as `on_first_rows` needs."""
        return all(map(_is_plain_lora, self.layers))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the layers compute as in the base model while the context lasts. May be nested.

        `PeftModel.disable_adapter` does the same but walks the model's status each time, ten times as slow.
        """
        was_disabled = [layer.disable_adapters for layer in self.layers]
        try:
            for layer in self.layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer, disabled in zip(self.layers, was_disabled, strict=True):
                layer.enable_adapters(not disabled)

    @contextmanager
    def on_first_rows(self, num_rows: int) -> Iterator[None]:
        """Adapt the first rows of a batch alone while the context lasts; without the adapter's dropout."""
        hook = partial(_adapt_rows, num_rows=num_rows)
        handles = [layer.register_forward_hook(hook) for layer in self.layers]
        try:
            with self.disabled():
                yield
        finally:
            for handle in handles:
                handle.remove()


def _is_plain_lora(layer: BaseTunerLayer) -> bool:
    if not isinstance(layer, LoraLayer) or layer.merged or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return name not in layer.lora_variant and name in layer.lora_A and isinstance(layer.lora_A[name], nn.Linear)


def _adapt_rows(layer: nn.Module, arguments: tuple[Tensor], output: Tensor, num_rows: int) -> None:
    """Add the adapter's part to the first rows of what a LoRA layer gives with its adapter disabled.

    PEFT's own mixed batches do the same by lists of row numbers, which cost a transfer to the device in every layer.
    """
    lora = cast(LoraLayer, layer)
    name = lora.active_adapters[0]
    narrow, widen = cast(nn.Linear, lora.lora_A[name]), cast(nn.Linear, lora.lora_B[name])
    states = arguments[0][:num_rows].to(narrow.weight.dtype)
    output[:num_rows] = output[:num_rows] + widen(narrow(states)) * lora.scaling[name]
