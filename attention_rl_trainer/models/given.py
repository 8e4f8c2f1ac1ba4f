"""What a user gives as model, adapter and tokenizer: taken, or refused by name before anything is loaded or moved (§6).

What is trained must be what is saved: an adapter of which a part is not in its files would be lost without a word.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import is_compiled_module
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedModel,
)

from attention_rl_trainer.errors import BaseModelError
from attention_rl_trainer.memories.tokenization import expect_tokenizer
from attention_rl_trainer.models.base import why_not_causal

# Options that change the base model itself; these are not undone where the adapter is switched off.
_CHANGING_OPTIONS = ("modules_to_save", "trainable_token_indices", "layer_replication", "kasa_config")
# Others put a part of the base model's weights into the adapter.
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# PEFT trains and saves a new head for these.
_TASKS_WITH_A_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
ADAPTER_NAME = "default"
"""As PEFT names an adapter where no name is given; it saves any other in a folder of the adapter's name."""
_LOAD_AGAIN = "PeftModel.from_pretrained(base_model, folder, is_trainable=True)"


def take_model(model: object, tokenizer: object, peft_config: object) -> str | PreTrainedModel | PeftModel:
    """Take what is given as model, or refuse it; tokenizer and adapter must fit too.

    Args:
        model: a name, a path, a base model, or a PEFT model of one.
        tokenizer: a fast tokenizer; ``None`` for the base model's own.
        peft_config: of a new adapter; ``None`` for the default.

    Returns:
        The model; a path as a text that no name can be mistaken for.

    Raises:
        ValueError: it is something else, or cannot be trained and saved as it is.
        BaseModelError: there is nothing at the path.
    """
    if tokenizer is not None:
        expect_tokenizer(tokenizer)
    if peft_config is not None:
        expect_adapter_config(peft_config)
    if isinstance(model, str):
        return model
    if isinstance(model, os.PathLike):
        path = Path(model).expanduser()
        if not path.exists():
            raise BaseModelError(f"There is no folder or file {path}. Check the path; a Hub name is given as a str.")
        return str(path.absolute())
    # First of all: it passes for whatever class was compiled.
    if is_compiled_module(model) or not isinstance(model, PreTrainedModel | PeftModel):
        raise ValueError(
            "model must be a name, a folder, a causal language model of transformers or a PeftModel of one, got "
            f"{_describe(model)}"
        )
    if isinstance(model, PeftModel):
        expect_whole_adapter(model)
        model_below = cast(PreTrainedModel, model.get_base_model())
    else:
        expect_no_adapter(model)
        model_below = model
    expect_language_model(model_below)
    return model


def _describe(model: object) -> str:
    kind = type(model).__name__
    if isinstance(model, type):
        return f"the class {model.__name__}; give a model, such as {model.__name__}.from_pretrained(name)"
    if is_compiled_module(model):
        return f"{kind}, a compiled model; compilation is not supported: give the model itself, `model._orig_mod`"
    # Wrappers that spread a model over devices, of whatever library, call it so.
    if isinstance(model, nn.Module) and "module" in dict(model.named_children()):
        return f"{kind} around a model; give the model itself, `model.module`: the Trainer wraps it"
    if model is None:
        return "None; 'auto' picks a model that can run here"
    return f"{kind}; load one with AutoModelForCausalLM.from_pretrained"


def expect_language_model(model: PreTrainedModel) -> None:
    """Refuse a base model that is not a causal language model, or whose weights cannot be trained on.

    Raises:
        ValueError: names what is wrong, and the way out.
    """
    kind = type(model).__name__
    problem = _why_not_language_model(model)
    if problem is not None:
        raise ValueError(
            f"{kind} cannot be the base model: it is {problem}; use a causal language model (decoder-only)"
        )
    compiled = [name for name, module in model.named_modules() if _is_compiled(module)]
    if compiled:
        raise ValueError(
            f"{kind} is compiled ({_first(compiled)}), which is not supported: the cache's growing length makes it "
            "compile again and again; give the model as it was loaded"
        )
    _expect_real_weights(model)
    # Only a model that was quantized has one.
    quantizer = vars(model).get("hf_quantizer")
    if quantizer is not None and not quantizer.is_trainable:
        raise ValueError(
            f"{kind} is quantized with {type(quantizer.quantization_config).__name__}, below which transformers trains "
            "no adapter; load it dequantized, or with bitsandbytes (load_in_4bit, load_in_8bit)"
        )


def _why_not_language_model(model: PreTrainedModel) -> str | None:
    config = model.config
    if config.is_encoder_decoder:
        return "an encoder-decoder"
    # What transformers does not know has only its own word for what it is.
    if type(model).__module__.startswith("transformers."):
        problem = why_not_causal(config)
        if problem is not None:
            return problem
        expected = cast(type, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        if not isinstance(model, expected):
            return f"not a {expected.__name__}, as AutoModelForCausalLM loads it"
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]  # not annotated upstream
        return "without an output head that gives vocabulary logits"
    return None


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module, its call or its forward was compiled."""
    forward = vars(module).get("forward")
    return (
        is_compiled_module(module)
        or module._compiled_call_impl is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


def _expect_real_weights(model: nn.Module) -> None:
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(
            f"{len(empty)} weights are on the meta device, which holds no values ({_first(empty)}): they were not "
            "loaded, or are kept in main memory or on disk; load the whole model on one device"
        )


def expect_adapter_config(config: object) -> None:
    """Refuse an adapter beside which the reference would not be the base model, or that alters the prompt.

    Raises:
        ValueError: names what is wrong, and the way out.
    """
    if not isinstance(config, PeftConfig):
        raise ValueError(
            f"peft_config must be a PeftConfig such as LoraConfig(r=8), got {type(config).__name__}"
            + ("; LoraConfig(**peft_config) makes one of it" if isinstance(config, dict) else "")
        )
    options = config.to_dict()
    changes = [name for name in _CHANGING_OPTIONS if options.get(name)]
    if options.get("bias", "none") != "none":
        changes.append(f"bias={options['bias']!r}")
    if options.get("init_lora_weights", True) not in HARMLESS_INITS:
        changes.append(f"init_lora_weights={options['init_lora_weights']!r}")
    if config.task_type in _TASKS_WITH_A_HEAD:
        changes.append(f"task_type={TaskType(config.task_type).value!r}")
    if config.is_prompt_learning or config.is_adaption_prompt:
        changes.append(f"prompt learning ({config.peft_type})")
    if changes:
        raise ValueError(
            f"the adapter has {', '.join(changes)}, which changes the base model itself or the prompt; the reward is "
            "measured against the untouched base model. Use LoRA without it"
        )
    if options.get("lora_alpha") == 0:
        raise ValueError("the adapter has lora_alpha=0, which multiplies all that it learns by 0; 16 is the default")
    if options.get("alora_invocation_tokens"):
        raise ValueError(
            "the adapter has alora_invocation_tokens, behind which alone PEFT lets it act, and no trajectory has any; "
            "use LoRA without it"
        )


def adapter_layers(model: nn.Module) -> list[str]:
    """Name the modules that PEFT has put into a model, of whatever kind of adapter."""
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]


def expect_no_adapter(model: PreTrainedModel) -> None:
    """Refuse a model with an adapter inside that is not a PEFT model.

    The adapter would be part of what is trained on, and not of what is saved.

    Raises:
        ValueError: names where it is, and the ways out.
    """
    if layers := adapter_layers(model):
        raise ValueError(
            f"{type(model).__name__} has adapter layers inside ({_first(layers)}) without being a PeftModel: "
            "from_pretrained on an adapter's folder, load_adapter or add_adapter put them there, or get_peft_model or "
            "an earlier trainer on the same object. To train that adapter further, give the PeftModel (an earlier "
            f"trainer's `model`), or {_LOAD_AGAIN}; for a new one load the base model again, or take the adapter off "
            "with the PeftModel's .unload()"
        )


def expect_whole_adapter(model: PeftModel) -> None:
    """Refuse a PEFT model whose adapter would not be trained, or not be saved as it was trained.

    Raises:
        ValueError: names what is wrong, and the way out.
    """
    names = ", ".join(map(repr, model.peft_config))
    if list(model.peft_config) != [ADAPTER_NAME]:
        raise ValueError(
            f"the model has adapters named {names}, but the one to be trained must be the only one, named "
            f'"{ADAPTER_NAME}", as PEFT names it where no name is given'
        )
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"the PeftModel is around {type(base).__name__}, expected a causal language model of transformers; put "
            "one adapter on the model itself"
        )
    expect_adapter_config(model.peft_config[ADAPTER_NAME])
    _expect_real_weights(model)
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    # An adapter that was deleted leaves its layers behind, empty.
    layers = {name: module for name, module in modules if own_parameters(module)}
    problem = _why_not_whole(model, layers)
    if problem is not None:
        raise ValueError(f"the adapter cannot be trained: {problem}")


def _why_not_whole(model: PeftModel, layers: dict[str, BaseTunerLayer]) -> str | None:
    """Say what is wrong with an adapter's layers, given by name, and the way out."""
    if not layers:
        return f"the PeftModel has no adapter layers, as after unload() or merge_and_unload(); give {_LOAD_AGAIN}"
    if merged := [name for name, layer in layers.items() if layer.merged]:
        return f"it is merged into the base model ({_first(merged)}), which rounds its weights; give {_LOAD_AGAIN}"
    if off := [name for name, layer in layers.items() if layer.disable_adapters]:
        return f"it is switched off ({_first(off)}); call model.enable_adapter_layers()"
    if inactive := [name for name, layer in layers.items() if list(layer.active_adapters) != [ADAPTER_NAME]]:
        return f'it is not active ({_first(inactive)}); call model.set_adapter("{ADAPTER_NAME}")'
    if foreign := sorted(set(layers) - set(_layers_of_its_own(model, layers))):
        return (
            f"there are layers of another adapter ({_first(foreign)}), which are not saved with it; put it on a model "
            "that has none"
        )
    return _why_not_trained_as_saved(model, layers)


def _layers_of_its_own(model: PeftModel, layers: Iterable[str]) -> list[str]:
    """Pick the layers that the adapter's configuration asks for, which will be there when it is loaded."""
    tuner = cast(BaseTuner, model.base_model)
    targets = {*tuner.targeted_module_names, *(name.rpartition(".")[0] for name in tuner.targeted_parameter_names)}
    # One wrapper is inside another where several parameters of a module are adapted.
    return [name for name in layers if name.removeprefix("base_model.model.").replace(".base_layer", "") in targets]


def _why_not_trained_as_saved(model: PeftModel, layers: dict[str, BaseTunerLayer]) -> str | None:
    own = {id(parameter) for layer in layers.values() for parameter in own_parameters(layer)}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if others := [name for name, parameter in trainable.items() if id(parameter) not in own]:
        return (
            f"weights outside of it are trainable ({_first(others)}), and are not saved with it; call "
            ".requires_grad_(False) on them"
        )
    saved = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    if unsaved := [name for name, parameter in trainable.items() if parameter.data_ptr() not in saved]:
        kind = type(model.peft_config[ADAPTER_NAME]).__name__
        return f"weights of it are trainable that PEFT does not save ({_first(unsaved)}, of {kind}); use LoRA"
    if not trainable:
        return f"it is frozen, so that there is nothing to train; give {_LOAD_AGAIN}"
    peft_type = model.peft_config[ADAPTER_NAME].peft_type
    half = [name for name, p in trainable.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if half and peft_type != PeftType.LN_TUNING:  # which trains norms in the base model's precision
        return (
            f"its weights are {str(trainable[half[0]].dtype).removeprefix('torch.')} ({_first(half)}), too coarse for "
            f"small steps; PEFT keeps them in float32 unless told otherwise: give {_LOAD_AGAIN}"
        )
    if peft_type != PeftType.LORA:
        return None
    if scaled := [name for name, layer in layers.items() if isinstance(layer, LoraLayer) and _is_rescaled(layer)]:
        return f"it is scaled by hand ({_first(scaled)}), which is not saved; call unscale_layer() on these layers"
    return None


def own_parameters(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """List the parameters that an adapter has put into a layer."""
    below = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return [parameter for parameter in cast(nn.Module, layer).parameters() if id(parameter) not in below]


def _is_rescaled(layer: LoraLayer) -> bool:
    """Whether a layer's factor is not the one that PEFT computes from its configuration."""
    if ADAPTER_NAME not in layer.scaling:
        return False
    rank = layer.r[ADAPTER_NAME]
    divisor = math.sqrt(rank) if layer.use_rslora.get(ADAPTER_NAME, False) else rank
    return bool(layer.scaling[ADAPTER_NAME] != layer.lora_alpha[ADAPTER_NAME] / divisor)


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
