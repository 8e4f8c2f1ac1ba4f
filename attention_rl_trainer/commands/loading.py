"""What a command line says of a model and of data, as what loads them takes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from trl import (  # type: ignore[attr-defined]  # trl's lazy names are not declared
    ModelConfig,
    get_quantization_config,
)


class EvaluatedData(Protocol):
    """Data to learn from, and data to measure on."""

    dataset_name: str
    dataset_config: str | None
    dataset_eval_name: str | None
    dataset_eval_config: str | None


def loading_options(model: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments with which TRL's model options are loaded."""
    dtype = model.dtype
    if dtype == "auto" and (model.load_in_4bit or model.load_in_8bit):
        dtype = "bfloat16"  # what quantized weights are multiplied in
    options: dict[str, Any] = {"dtype": dtype, "revision": model.model_revision}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if (quantization := get_quantization_config(replace(model, dtype=dtype))) is not None:
        options["quantization_config"] = quantization
    return options


def evaluation_config(data: EvaluatedData) -> str | None:
    """Return the configuration of the data to measure on: that of the training data, where it is the same data set."""
    if data.dataset_eval_config is None and data.dataset_eval_name == data.dataset_name:
        return data.dataset_config
    return data.dataset_eval_config
