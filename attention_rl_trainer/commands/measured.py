"""What the commands share that measure an untrained model on memories: some that are fitted to, and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import set_seed
from trl import ModelConfig  # type: ignore[attr-defined]  # trl's lazy names are not declared

from attention_rl_trainer.commands.loading import evaluation_config, loading_options
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.memories.loading import MemoryLoader
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.sources import columns_of, load_memories
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.adapters import add_adapter
from attention_rl_trainer.models.choice import load_named_model
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.layout import Layout, Separators


@dataclass
class MeasuredData:
    """What is fitted to what."""

    _argument_group_name = "data"

    dataset_name: str = field(
        default="wikimedia/wikipedia",
        metadata={"help": "What to fit to, as for attention-rl train.", "aliases": ["--dataset"]},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to fit to."})
    dataset_eval_name: str | None = field(
        default=None, metadata={"help": "What to measure on. Default: memories of training after those fitted to."}
    )
    dataset_eval_config: str | None = field(
        default=None,
        metadata={"help": "Its configuration. Default: dataset_config, where it is the data set that is fitted to."},
    )
    dataset_eval_split: str = field(
        default="train", metadata={"help": "Split to measure on.", "aliases": ["--dataset_test_split"]}
    )


@dataclass
class MeasuredModel(ModelConfig):
    """TRL's model options, with this method's default model."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default="auto",
        metadata={"help": "Hub name, folder or .gguf file; 'auto' picks by what is there, 'offline' is embedded."},
    )
    dtype: str | None = field(
        default="auto", metadata={"help": "Precision of the weights; 'auto' takes bfloat16 where it is native."}
    )


class Measured:
    """A model with a fresh adapter, and the memories of a run."""

    def __init__(self, config: AttentionGuidedRLConfig, model: MeasuredModel) -> None:
        set_seed(config.seed)
        given: Any = config.model_init_kwargs or {}
        options = loading_options(model) | dict(given)
        base, self.tokenizer = load_named_model(str(model.model_name_or_path), config.device, options)
        self.encoder = PlainTextEncoder(self.tokenizer)
        self.model = add_adapter(base, None)
        self.policy = PolicyModel.of(self.model, self.tokenizer, config)
        self.layout = Layout.of(config, Separators.encode(self.encoder, config))
        self._config = config
        self._loader = MemoryLoader(config, self.encoder, config.seed)

    def memories(self, data: MeasuredData, num_fitted: int, num_measured: int) -> tuple[Any, MemoryBatch, MemoryBatch]:
        """Read the articles that are fitted to, their first memories, and those that are measured on."""
        columns = columns_of(self._config)
        fitted_to = load_memories(
            data.dataset_name, **columns, config_name=data.dataset_config, split=data.dataset_train_split
        )
        if data.dataset_eval_name is None:
            both = self._loader.first_memories(fitted_to, num_fitted + num_measured)
            rows: Sequence[int] = range(num_fitted, len(both))
            return fitted_to, both.head(num_fitted), both.select_rows(rows)
        held_out = load_memories(
            data.dataset_eval_name, **columns, config_name=evaluation_config(data), split=data.dataset_eval_split
        )
        measured = self._loader.first_memories(held_out, num_measured)
        return fitted_to, self._loader.first_memories(fitted_to, num_fitted), measured
