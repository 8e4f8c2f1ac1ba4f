"""``attention-rl calibrate``: which heads of a model hear a query, and how well they find what it names.

    attention-rl calibrate --config recommended

takes the options of a run, fits the selector to its training articles as the run itself would, measures it on others,
and writes the calibration and a picture of the heads into ``output_dir``. Nothing is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import set_seed
from trl import ModelConfig  # type: ignore[attr-defined]  # trl's lazy names are not declared

from attention_rl_trainer.commands.parsing import CommandParser
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.memories.loading import MemoryLoader
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.sources import columns_of, load_memories
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.adapters import add_adapter
from attention_rl_trainer.models.choice import load_named_model
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.probing.calibrate import Fitted, Probe
from attention_rl_trainer.probing.calibrated import CALIBRATED, is_calibrated
from attention_rl_trainer.probing.picture import plot_heads
from attention_rl_trainer.records.identity import calibration_origin
from attention_rl_trainer.rollout.layout import Layout, Separators

logger = logging.getLogger(__name__)

PICTURE_NAME = "heads.png"


@dataclass
class CalibrateArguments:
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
    dataset_eval_split: str = field(
        default="train", metadata={"help": "Split to measure on.", "aliases": ["--dataset_test_split"]}
    )


@dataclass
class CalibratedModel(ModelConfig):
    """TRL's model options, with this method's default model."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default="auto",
        metadata={"help": "Hub name, folder or .gguf file; 'auto' picks by what is there, 'offline' is embedded."},
    )
    dtype: str | None = field(
        default="auto", metadata={"help": "Precision of the weights; 'auto' takes bfloat16 where it is native."}
    )


def parser() -> CommandParser:
    """Make the parser of the command line."""
    kinds = (CalibrateArguments, AttentionGuidedRLConfig, CalibratedModel)
    purpose = "Fit the selector to training articles as a run would, and measure it on others; nothing is trained."
    # The file is that of a training run, which has more options than matter here.
    return CommandParser("calibrate", purpose, kinds, takes_any_file=True)


def main(flags: Sequence[str], console: Console | None = None) -> int:
    """Parse, fit, measure, write and print, by default to standard output; returns the exit code."""
    data, config, model = parser().parse(flags)
    if not is_calibrated(config, config):
        logger.info("The options fit nothing; measured is the calibrated selector: %s", CALIBRATED)
        config = replace(config, **CALIBRATED)
    set_seed(config.seed)
    base, tokenizer = load_named_model(model.model_name_or_path, config.device, {"dtype": model.dtype})
    encoder = PlainTextEncoder(tokenizer)
    adapted = add_adapter(base, None)
    policy = PolicyModel.of(adapted, tokenizer, config)
    layout = Layout.of(config, Separators.encode(encoder, config))
    probe = Probe(policy, layout, config, config, show_progress=not config.disable_tqdm)
    articles, memories, held_out = _memories(data, config, MemoryLoader(config, encoder, config.seed))
    fitted = probe.fit(memories, calibration_origin(adapted, tokenizer, articles, config))
    figures = probe.figures(fitted.calibration, held_out)
    folder = Path(str(config.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    written = fitted.calibration.save(folder)
    picture = plot_heads(fitted.heads, fitted.calibration.heads, folder / PICTURE_NAME)
    console = console or Console()
    console.print(heads_table(fitted, len(memories) // 2))
    console.print(f"temperature {fitted.calibration.temperature:.4g}; written to {written}; heads in {picture}")
    where = data.dataset_eval_name or "memories of training that were not fitted to"
    console.print(f"Half of a key on {len(held_out)} memories ({where}), chance {figures['chance']:.3f}:")
    for name in ("p_right", "p_right_literal", "selection_information"):
        console.print(f"{name}: {figures[name]:.3f}", highlight=False)
    return 0


def _memories(
    data: CalibrateArguments, config: AttentionGuidedRLConfig, loader: MemoryLoader
) -> tuple[object, MemoryBatch, MemoryBatch]:
    """Read what is fitted to and what is measured on."""
    fitted_to = load_memories(
        data.dataset_name, **columns_of(config), config_name=data.dataset_config, split=data.dataset_train_split
    )
    count = config.calibration_memories
    if data.dataset_eval_name is None:
        both = loader.first_memories(fitted_to, 2 * count)
        return fitted_to, both.select_rows(range(count)), both.select_rows(range(count, 2 * count))
    held_out = load_memories(data.dataset_eval_name, **columns_of(config), split=data.dataset_eval_split)
    return fitted_to, loader.first_memories(fitted_to, count), loader.first_memories(held_out, count)


def heads_table(fitted: Fitted, num_memories: int, num_rows: int = 20) -> Table:
    """List the best heads, those that select marked."""
    chosen = fitted.calibration.heads or ()
    scores = fitted.heads
    count = min(num_rows, sum(len(values) for values in scores.accuracy.values()))
    table = Table(title=f"Heads that find a pair by half of its key, on {num_memories} memories", title_justify="left")
    for name in ("layer.head", "finds it first", "selects"):
        table.add_column(name, justify="right")
    for number in scores.best(count):
        accuracy = float(scores.accuracy[number.layer][number.head])
        table.add_row(str(number), f"{accuracy:.3f}", "yes" if number in chosen else "")
    return table
