"""From the options of a command line to what loads a model and data."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig
from trl import ModelConfig  # type: ignore[attr-defined]  # trl's lazy names are not declared

from attention_rl_trainer.commands.loading import evaluation_config, loading_options
from attention_rl_trainer.commands.train import DataArguments


def test_what_is_not_given_is_left_to_the_model() -> None:
    assert loading_options(ModelConfig(dtype="auto")) == {"dtype": "auto", "revision": "main"}


def test_quantized_weights_are_multiplied_in_bfloat16_unless_another_precision_is_given() -> None:
    options = loading_options(ModelConfig(dtype="auto", load_in_4bit=True, attn_implementation="sdpa"))
    assert options["dtype"] == "bfloat16"
    assert options["attn_implementation"] == "sdpa"
    assert isinstance(options["quantization_config"], BitsAndBytesConfig)
    assert options["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
    assert loading_options(ModelConfig(dtype="float16", load_in_8bit=True))["dtype"] == "float16"


@pytest.mark.parametrize(
    ("evaluated", "given", "expected"),
    [("a/b", None, "de"), ("a/b", "en", "en"), ("c/d", None, None), ("c/d", "en", "en"), (None, None, None)],
)
def test_the_configuration_of_the_training_data_is_that_of_the_same_data_set_alone(
    evaluated: str | None, given: str | None, expected: str | None
) -> None:
    data = DataArguments("a/b", "de", dataset_eval_name=evaluated, dataset_eval_config=given)
    assert evaluation_config(data) == expected
