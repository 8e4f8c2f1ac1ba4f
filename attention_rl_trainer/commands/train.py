"""``attention-rl train``: train an adapter, from flags or from a file of options.

    attention-rl train --config demo
    attention-rl train --config my_options.yaml --episodes 2000

Every option of the file can be overridden by a flag; ``--help`` lists them all. ``--batch-size``, ``--episodes``,
``--dataset`` and ``--resume`` are short for ``--generation_batch_size``, ``--num_episodes``, ``--dataset_name`` and
``--resume_from_checkpoint`` with the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text
from trl import (  # type: ignore[attr-defined]  # trl's lazy names are not declared
    ModelConfig,
    get_peft_config,
)

from attention_rl_trainer.commands.loading import evaluation_config, loading_options
from attention_rl_trainer.commands.parsing import CommandParser
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.durability.discovery import CheckpointError, find_checkpoint
from attention_rl_trainer.evaluation.before_and_after import BeforeAndAfter
from attention_rl_trainer.evaluation.evaluate import expect_evaluable
from attention_rl_trainer.memories.sources import columns_of, load_memories
from attention_rl_trainer.records.console import metrics_table
from attention_rl_trainer.trainer import BEFORE_TRAINING, AttentionGuidedRLTrainer


@dataclass
class DataArguments:
    """Where the memories come from."""

    _argument_group_name = "data"

    dataset_name: str = field(
        default="wikimedia/wikipedia",
        metadata={
            "help": "Articles: Hub data set, folder or file (Parquet, JSON Lines, text, MediaWiki dump), or 'offline'. "
            "Or 'twenty_questions', 'factbook', the file of a game, or a table, with --key_column, --value_column and "
            "--group_column.",
            "aliases": ["--dataset"],
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_eval_split: str = field(
        default="train",
        metadata={"help": "Split of the evaluation's memories.", "aliases": ["--dataset_test_split"]},
    )
    dataset_eval_name: str | None = field(default=None, metadata={"help": "Source to evaluate on at the end."})
    dataset_eval_config: str | None = field(
        default=None,
        metadata={"help": "Its configuration. Default: dataset_config, where it is the data set that is trained on."},
    )
    dataset_streaming: bool | None = field(
        default=None, metadata={"help": "Stream instead of preparing on disk. Default: by the kind of source."}
    )
    resume: bool = field(default=False, metadata={"help": "Resume from the newest checkpoint in output_dir."})


@dataclass
class AdapterConfig(ModelConfig):
    """TRL's model options, with this method's adapter as the default."""

    _argument_group_name = "model and adapter"

    model_name_or_path: str | None = field(
        default="auto",
        metadata={"help": "Hub name, folder or .gguf file; 'auto' picks by what is there, 'offline' is embedded."},
    )
    dtype: str | None = field(
        default="auto", metadata={"help": "Precision of the weights; 'auto' takes bfloat16 where it is native."}
    )
    use_peft: bool = field(default=True, metadata={"help": "Must stay true: only an adapter is trained."})
    lora_r: int = field(default=8, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA dropout."})


def parser() -> CommandParser:
    """Make the parser of the command line."""
    purpose = "Train an adapter: roll out trajectories, keep the best, reinforce their queries."
    return CommandParser("train", purpose, (DataArguments, AttentionGuidedRLConfig, AdapterConfig))


def main(flags: Sequence[str], console: Console | None = None) -> int:
    """Parse, train, save, and evaluate where there are articles for it.

    Args:
        flags: the command line.
        console: where the evaluation is printed; by default standard output.

    Returns:
        The exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C, which leaves a checkpoint.
    """
    data, args, model = parser().parse(flags)
    checkpoint = data.resume if args.resume_from_checkpoint is None else args.resume_from_checkpoint
    _expect_checkpoint(checkpoint, Path(args.output_dir))
    if not model.use_peft:
        raise ValueError("use_peft must stay true: only an adapter is trained, and the base model is the reference")
    memories = load_memories(
        data.dataset_name,
        **columns_of(args),
        config_name=data.dataset_config,
        split=data.dataset_train_split,
        streaming=data.dataset_streaming,
    )
    held_out = None
    if data.dataset_eval_name is not None:
        held_out = load_memories(
            data.dataset_eval_name,
            **columns_of(args),
            config_name=evaluation_config(data),
            split=data.dataset_eval_split,
        )
    args.model_init_kwargs = loading_options(model) | dict(args.model_init_kwargs or {})
    trainer = AttentionGuidedRLTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=memories,
        eval_dataset=held_out,
        peft_config=get_peft_config(model),
    )
    # Not only at the run's end, when it is wanted.
    expect_evaluable(trainer.loader, held_out, args)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    if held_out is not None:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            title = f"Evaluation on {data.dataset_eval_name}, split {data.dataset_eval_split}"
            console = console or Console()
            console.print(metrics_table(metrics, title))
            _show_queries(trainer.output_dir / "evaluation", console)
    if args.push_to_hub:
        trainer.push_to_hub()
    return 0


def _show_queries(evaluations: Path, console: Console) -> None:
    """Write and print what the model asked before training and after it, and end with the figures that say whether."""
    compared = BeforeAndAfter.read(evaluations / f"eval{BEFORE_TRAINING}", evaluations / "eval")
    if compared is None:
        return
    compared.write(evaluations)
    console.print(Markdown(compared.to_markdown()))
    for line in compared.lines():
        console.print(Text(line), soft_wrap=True)


def _expect_checkpoint(named: str | bool, output_dir: Path) -> None:
    """Refuse to resume where there is nothing to resume from, before the model is loaded."""
    try:
        find_checkpoint(named, output_dir, AttentionGuidedRLTrainer.run_trace)
    except CheckpointError as error:
        raise CheckpointError(f"{'--resume' if named is True else '--resume_from_checkpoint'}: {error}") from error
