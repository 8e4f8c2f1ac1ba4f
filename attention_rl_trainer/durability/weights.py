"""An adapter's files: written with the same bytes by every process, and read only where they fit the model exactly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from attention_rl_trainer.durability.discovery import CheckpointError


def save_adapter(folder: Path, model: PeftModel) -> None:
    """Write weights, configuration and model card, as PEFT does, with the configuration's sets in order.

    PEFT keeps names of modules in sets, which come out differently in each process.
    """
    # Or PEFT looks for the base model's configuration at every save, on the Hub where it is no folder.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    path = folder / ADAPTER_CONFIG_NAME
    if not path.is_file():
        return
    options = vars(model.peft_config[model.active_adapter])
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config |= {name: sorted(config[name]) for name, value in options.items() if isinstance(value, set)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def adapter_digest(model: PeftModel) -> str:
    """Hash the trainable weights: the same for two adapters whose every bit is."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_adapter(folder: Path, model: PeftModel) -> None:
    """Read the weights that `save_adapter` wrote.

    The Trainer would also take a ``model.safetensors``, a ``pytorch_model.bin`` or a second adapter that someone left
    in the folder.

    Raises:
        CheckpointError: names or shapes differ from the model's adapter.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    weights = load_file(path)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    differing = sorted(
        name
        for name in weights.keys() | expected.keys()
        if name not in weights or name not in expected or weights[name].shape != expected[name].shape
    )
    if differing:
        raise CheckpointError(f"{path} does not fit the adapter; these tensors differ: {', '.join(differing[:5])}")
    set_peft_model_state_dict(model, weights)
