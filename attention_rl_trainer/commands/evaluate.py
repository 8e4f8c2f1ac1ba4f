"""``attention-rl evaluate``: what an adapter's orders and queries are worth on held-out articles.

    attention-rl evaluate out/demo --dataset twenty_questions --dataset_split test

The options that the adapter was trained with are read from its ``attention_rl_config.json``; flags change some of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainingArguments

from attention_rl_trainer.commands.parsing import CommandParser
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.memories.sources import columns_of, load_memories
from attention_rl_trainer.models.trained import load_adapted
from attention_rl_trainer.ordering.adapter import read_options
from attention_rl_trainer.probing.calibrated import calibration_beside
from attention_rl_trainer.records.console import metrics_table
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
from attention_rl_trainer.update.warm_start import WarmStartOptions

logger = logging.getLogger(__name__)


@dataclass
class EvaluateArguments:
    """What is evaluated, and on what."""

    _argument_group_name = "what is evaluated, and on what"

    adapter: str = field(metadata={"help": "Folder of the adapter, as a run leaves it in its output_dir."})
    dataset: str = field(
        default="wikimedia/wikipedia",
        metadata={
            "help": "Held-out articles: Hub data set, folder or file (Parquet, JSON Lines, text, MediaWiki dump), "
            "or 'offline'; or 'twenty_questions', 'factbook', the file of a game, or a table as in training.",
            "aliases": ["--dataset_name", "--dataset_eval_name"],
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(
        default="train",
        metadata={"help": "Split to evaluate on.", "aliases": ["--dataset_eval_split", "--dataset_test_split"]},
    )
    dataset_text_column: str | None = field(
        default=None, metadata={"help": "Column of the articles' text. Default: as in training."}
    )
    dataset_key_column: str | None = field(
        default=None, metadata={"help": "Of a table: column of the keys. Default: as in training."}
    )
    dataset_value_column: str | None = field(
        default=None, metadata={"help": "Of a table: column of the values. Default: as in training."}
    )
    dataset_group_column: str | None = field(
        default=None, metadata={"help": "Of a table: column that makes memories of rows. Default: as in training."}
    )
    skip_articles: int = field(
        default=0, metadata={"help": "Leave out this many articles at the beginning, such as those trained on."}
    )
    episodes: int = field(default=64, metadata={"help": "Trajectories to evaluate.", "aliases": ["--eval_episodes"]})
    epochs: int | None = field(
        default=None,
        metadata={
            "help": "Readings of each article, each with another memory. Default: as in training, mostly 1.",
            "aliases": ["--eval_epochs"],
        },
    )
    order_episodes: int | None = field(
        default=None,
        metadata={
            "help": "Trajectories whose orders are scored too, the slow part. Default: as in training, or all.",
            "aliases": ["--eval_order_episodes"],
        },
    )
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Trajectories at once. Default: as in training.",
            "aliases": ["--generation_batch_size"],
        },
    )
    num_steps: int | None = field(default=None, metadata={"help": "T. Default: as in training."})
    seed: int | None = field(default=None, metadata={"help": "Seed of queries and draws. Default: as in training."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model. Default: the one that the adapter was trained on."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Precision of the weights; 'auto' takes bfloat16 where it is native."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Compute on the CPU even if there is a GPU."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the tables are written. Default: the adapter's folder."}
    )


# How a run was launched and how it began, which an evaluation need not be able to do again.
_OF_TRAINING = {"model_init_kwargs", "num_processes", "num_threads"} | {item.name for item in fields(WarmStartOptions)}


def trained_options(adapter: Path) -> dict[str, Any]:
    """Read the options of this method that an adapter was trained with.

    Args:
        adapter: its folder.

    Returns:
        The fields that `AttentionGuidedRLConfig` adds to the Trainer's, and the seed.

    Raises:
        ValueError: the folder holds no options, or they are not readable.
    """
    stored = read_options(adapter)
    inherited = {item.name for item in fields(TrainingArguments)}
    own = {item.name for item in fields(AttentionGuidedRLConfig)} - inherited - _OF_TRAINING
    options = {name: stored[name] for name in sorted(own | {"seed"}) if name in stored}
    if isinstance(options.get("filter_threshold"), str):
        options["filter_threshold"] = float(options["filter_threshold"])
    return options


def evaluate(arguments: EvaluateArguments, console: Console) -> dict[str, float]:
    """Evaluate an adapter on held-out articles, and write and print the two tables.

    Args:
        arguments: what is evaluated, and on what.
        console: where they are printed, and the figures below them.

    Returns:
        The metrics.

    Raises:
        ValueError: the adapter's folder lacks something, or an option is out of range.
    """
    adapter = Path(arguments.adapter)
    options = trained_options(adapter)
    changes = {
        "generation_batch_size": arguments.batch_size,
        "num_steps": arguments.num_steps,
        "seed": arguments.seed,
        "eval_epochs": arguments.epochs,
        "eval_order_episodes": arguments.order_episodes,
        "dataset_text_column": arguments.dataset_text_column,
        "dataset_key_column": arguments.dataset_key_column,
        "dataset_value_column": arguments.dataset_value_column,
        "dataset_group_column": arguments.dataset_group_column,
    }
    options |= {name: value for name, value in changes.items() if value is not None}
    output_dir = Path(arguments.output_dir or arguments.adapter)
    config = AttentionGuidedRLConfig(
        **options
        | {
            "output_dir": str(output_dir),
            "eval_episodes": arguments.episodes,
            "eval_tables": True,
            "use_cpu": arguments.use_cpu,
            "report_to": "none",
        }
    )
    memories: Any = load_memories(
        arguments.dataset,
        **columns_of(config),
        config_name=arguments.dataset_config,
        split=arguments.dataset_split,
    )
    if arguments.skip_articles:
        memories = memories.skip(arguments.skip_articles)
    model, tokenizer = load_adapted(adapter, config.device, arguments.dtype, model=arguments.model_name_or_path)
    # The trainer takes only what could be trained.
    model.set_adapter(model.active_adapter)
    trainer = AttentionGuidedRLTrainer(
        model=model,
        args=config,
        eval_dataset=memories,
        processing_class=tokenizer,
        calibration=calibration_beside(adapter, config, config),
    )
    orders = config.eval_episodes if config.eval_order_episodes is None else config.eval_order_episodes
    slow = f"; the orders of {min(orders, arguments.episodes)} take most of the time" if orders > 0 else ""
    logger.info("Evaluating on up to %d trajectories%s", arguments.episodes, slow)
    metrics = trainer.evaluate()
    written = output_dir / "evaluation" / "eval" / "evaluation.md"
    # As it is: its lines are those of the file.
    console.out(written.read_text(encoding="utf-8"), highlight=False)
    console.print(metrics_table(metrics, f"Evaluation on {arguments.dataset}, split {arguments.dataset_split}"))
    console.print(f"The tables are in {written.parent}", highlight=False, soft_wrap=True)
    return metrics


def parser() -> CommandParser:
    """Make the parser of the command line."""
    purpose = "Measure an adapter's orders and queries on held-out articles, beside baselines."
    return CommandParser("evaluate", purpose, (EvaluateArguments,), positional="adapter")


def main(flags: Sequence[str], console: Console | None = None) -> int:
    """Parse, evaluate, print, by default to standard output."""
    (arguments,) = parser().parse(flags)
    evaluate(arguments, console or Console())
    return 0
