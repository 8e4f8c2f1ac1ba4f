"""The adapter that is trained: put on a base model, disabled for the reference, or used by a part of a batch (§6).

Its configuration is written with what its base model is on any machine, by which it is found again.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import TypeVar, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention_rl_trainer.models.attention import find_attention_projections
from attention_rl_trainer.models.base import ModelName, name_anywhere
from attention_rl_trainer.models.given import (
    ADAPTER_NAME,
    adapter_layers,
    expect_adapter_config,
    expect_no_adapter,
    expect_whole_adapter,
    own_parameters,
)

ConstructorT = TypeVar("ConstructorT", bound=Callable[..., None])

_SAMPLED_VALUES = 64
WEIGHTS = "weights:"
"""How a revision begins that is a digest of weights."""
_EXACT = (torch.float32, torch.bfloat16)
# Of B in B · A · x, with the usual A: moves a layer's output by about a third of its input's size.
_SCALE_OF_OTHER_WEIGHTS = 0.1


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
            than can be switched off to get the base model back, or would not be saved as it is trained. A base model is
            left as it was.
    """
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("the model has an adapter already; give a base model with peft_config, or no peft_config")
        expect_whole_adapter(model)
        _write_portably(model)
        return model
    expect_no_adapter(model)
    if peft_config is None:
        peft_config = default_lora_config(model)
    expect_adapter_config(peft_config)
    # PEFT writes into it, and the user may have another use for it.
    peft_config = copy.deepcopy(peft_config)
    if isinstance(peft_config, LoraConfig) and not peft_config.target_modules:
        # PEFT's own default would leave half of the projections out.
        default = default_lora_config(model)
        peft_config.target_modules = default.target_modules
        peft_config.fan_in_fan_out = default.fan_in_fan_out
    try:
        return _with_new_adapter(model, peft_config)
    except Exception:
        take_off(model)
        raise


def _with_new_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    before = sampled_weights(model.named_parameters())
    adapted: PeftModel = get_peft_model(model, peft_config)
    base = {name: values for name, values in sampled_weights(adapted.named_parameters()).items() if name in before}
    if base != before:
        raise ValueError(
            f"the adapter {type(peft_config).__name__} has changed the weights of the base model "
            f"({', '.join(sorted(name for name in before if base.get(name) != before[name])[:3])}); the reward is "
            "measured against the untouched base model. Load it again, and use another kind, or another initialization"
        )
    expect_whole_adapter(adapted)
    _write_portably(adapted)
    return adapted


def take_off(model: PreTrainedModel) -> None:
    """Take the layers of an adapter out of a base model, whatever state they are in."""
    taken: list[str] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and not name.startswith(tuple(f"{outer}." for outer in taken)):
            model.set_submodule(name, module.get_base_layer())
            taken.append(name)
    # PEFT's note of the adapters, which a later one would be added to.
    vars(model).pop("peft_config", None)


def left_bare_on_failure(construct: ConstructorT) -> ConstructorT:
    """Let a constructor that fails take its adapter off the ``model`` that it was given without one.

    So the same object can be given again, with other options.
    """

    @wraps(construct)
    def constructed(self: object, model: object, *args: object, **kwargs: object) -> None:
        is_bare = isinstance(model, PreTrainedModel) and not adapter_layers(model)
        try:
            construct(self, model, *args, **kwargs)
        except BaseException:
            if is_bare:
                take_off(cast(PreTrainedModel, model))
            raise

    return cast(ConstructorT, constructed)


def sampled_weights(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[list[int], str, str]]:
    """Sample the values of each parameter of a base model, with or without an adapter.

    Returns:
        Shape, precision and values in hexadecimal digits, by the parameter's name in the base model.
    """
    samples = {}
    for name, parameter in parameters:
        values = _sample(parameter).view(torch.uint8)
        own_name = name.removeprefix("base_model.model.").replace("base_layer.", "")
        samples[own_name] = list(parameter.shape), str(parameter.dtype), values.numpy().tobytes().hex()
    return samples


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED_VALUES)].cpu().contiguous()


# ---- The base model of an adapter, on any machine ----


def base_of(model: PreTrainedModel | PeftModel) -> ModelName:
    """Say which base model this is; where its name means nothing elsewhere, by `weights_digest` as its revision."""
    base = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    named = name_anywhere(base)
    return named if named.is_portable else ModelName(named.name, weights_digest(base))


def weights_digest(model: PreTrainedModel) -> str | None:
    """Tell a base model's weights from others by samples of them, an adapter's left out.

    Alike in float32 and bfloat16; ``None`` in other precisions.
    """
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    foreign = {id(parameter) for layer in layers for parameter in own_parameters(layer)}
    parameters = {name: p for name, p in model.named_parameters() if id(p) not in foreign}
    if any(parameter.dtype not in _EXACT for parameter in parameters.values()):
        return None
    samples = sampled_weights((name, _sample(p).to(torch.bfloat16)) for name, p in parameters.items())
    shapes = {name.replace("base_layer.", ""): list(p.shape) for name, p in parameters.items()}
    content = json.dumps([shapes, samples], sort_keys=True).encode("ascii")
    return WEIGHTS + hashlib.sha256(content).hexdigest()[:16]


def _write_portably(model: PeftModel) -> None:
    """Have the adapter's configuration written with `base_of` its model."""
    base, config = base_of(model), model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path, config.revision = base.name or None, base.revision


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

    @torch.no_grad()
    def can_adapt_rows(self, read: Callable[[Tensor], Tensor], token_ids: Tensor) -> bool:
        """Prove on a few tokens that `on_first_rows` adapts the first rows and leaves the others as they are.

        It does not where a layer sees tokens without their rows, as the experts of a mixture do. The adapter gets other
        weights meanwhile, because a new one changes nothing.

        Args:
            read: tokens ``[B, S]`` to hidden states ``[B, S, C]``.
            token_ids: at least 3 rows of some length, each number different.
        """
        if not self.are_plain_lora:
            return False
        num_rows = len(token_ids) // 2
        shapes: dict[nn.Module, list[torch.Size]] = {layer: [] for layer in self.layers}
        handles = [layer.register_forward_hook(partial(_note_shape, shapes)) for layer in self.layers]
        try:
            with self._other_weights():
                policy = read(token_ids)
                # Each layer once, on all rows: any other input has lost them.
                if any([shape[:-1] for shape in seen] != [token_ids.shape] for seen in shapes.values()):
                    return False
                with self.disabled():
                    base = read(token_ids)
                with self.on_first_rows(num_rows):
                    joint = read(token_ids)
        finally:
            for handle in handles:
                handle.remove()
        expected = torch.cat([policy[:num_rows], base[num_rows:]]).float()
        effect = (policy - base)[:num_rows].float().norm()
        tolerance = 1e-3 if joint.dtype == torch.float32 else 0.1
        return bool((joint.float() - expected).norm() < tolerance * effect)

    @contextmanager
    def _other_weights(self) -> Iterator[None]:
        """Draw the weights that a new adapter has at 0, and restore them."""
        generator = torch.Generator().manual_seed(0)
        loras = [cast(LoraLayer, layer) for layer in self.layers]
        widening = [cast(nn.Linear, lora.lora_B[lora.active_adapters[0]]).weight for lora in loras]
        before = [weight.detach().clone() for weight in widening]
        try:
            for weight in widening:
                weight.copy_(_SCALE_OF_OTHER_WEIGHTS * torch.randn(weight.shape, generator=generator))
            yield
        finally:
            for weight, values in zip(widening, before, strict=True):
                weight.copy_(values)


def _note_shape(
    shapes: dict[nn.Module, list[torch.Size]], layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor
) -> None:
    shapes[layer].append(arguments[0].shape)


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
    output[:num_rows].add_(widen(narrow(states)), alpha=lora.scaling[name])
