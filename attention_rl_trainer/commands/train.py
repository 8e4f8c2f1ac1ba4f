"""``attention-rl train``: train an adapter, from flags or from a file of options.

    attention-rl train --config demo
    attention-rl train --config my_options.yaml --episodes 2000

Every option of the file can be overridden by a flag; ``--help`` lists them all. ``--batch-size``, ``--episodes``,
``--dataset`` and ``--resume`` are short for ``--generation_batch_size``, ``--num_episodes``, ``--dataset_name`` and
``--resume_from_checkpoint`` with the newest checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import (  # type: ignore[attr-defined]  # trl's lazy names are not declared
    ModelConfig,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.configs import with_config_path
from attention_rl_trainer.durability.discovery import CheckpointError, find_checkpoint
from attention_rl_trainer.memories.sources import columns_of, load_memories
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer


@dataclass
class DataArguments:
    """Where the memories come from."""

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
    dataset_eval_split: str = field(default="train", metadata={"help": "Split of the evaluation's memories."})
    dataset_eval_name: str | None = field(default=None, metadata={"help": "Source to evaluate on at the end."})
    dataset_streaming: bool | None = field(
        default=None, metadata={"help": "Stream instead of preparing on disk. Default: by the kind of source."}
    )
    resume: bool = field(default=False, metadata={"help": "Resume from the newest checkpoint in output_dir."})


@dataclass
class AdapterConfig(ModelConfig):
    """TRL's model options, with this method's adapter as the default."""

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


def main(flags: Sequence[str] | None = None) -> int:
    """Parse, train, save, and evaluate where there are articles for it.

    Args:
        flags: the command line; by default the process's own.

    Returns:
        The exit code: 130 after Ctrl-C, which leaves a checkpoint.
    """
    given = sys.argv[1:] if flags is None else flags
    kinds = (DataArguments, AttentionGuidedRLConfig, AdapterConfig)
    parser = TrlParser(kinds, prog=None if flags is None else "attention-rl train")  # type: ignore[arg-type]
    data, args, model = parser.parse_args_and_config(with_config_path(given))
    if data.resume and args.resume_from_checkpoint is None:
        _expect_run(args.output_dir)
    if not model.use_peft:
        sys.exit("--use_peft must stay true: only an adapter is trained, and the base model is the reference")
    memories = load_memories(
        data.dataset_name,
        **columns_of(args),
        config_name=data.dataset_config,
        split=data.dataset_train_split,
        streaming=data.dataset_streaming,
    )
    held_out = None
    if data.dataset_eval_name is not None:
        held_out = load_memories(data.dataset_eval_name, **columns_of(args), split=data.dataset_eval_split)
    args.model_init_kwargs = _loading_options(model) | dict(args.model_init_kwargs or {})
    trainer = AttentionGuidedRLTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=memories,
        eval_dataset=held_out,
        peft_config=get_peft_config(model),
    )
    checkpoint = args.resume_from_checkpoint
    try:
        trainer.train(resume_from_checkpoint=data.resume if checkpoint is None else checkpoint)
    except KeyboardInterrupt:
        return 130  # as a shell reports it
    trainer.save_model(args.output_dir)
    if held_out is not None:
        print(trainer.evaluate())
    if args.push_to_hub:
        trainer.push_to_hub()
    return 0


def _expect_run(output_dir: str) -> None:
    """Refuse ``--resume`` where there is nothing to resume, before the model is loaded."""
    try:
        find_checkpoint(True, Path(output_dir), AttentionGuidedRLTrainer.run_trace)
    except CheckpointError as error:
        sys.exit(f"--resume: {error}")


def _loading_options(model: AdapterConfig) -> dict[str, Any]:
    dtype = model.dtype
    if dtype == "auto" and (model.load_in_4bit or model.load_in_8bit):
        dtype = "bfloat16"  # what quantized weights are multiplied in
    options: dict[str, Any] = {"dtype": dtype, "revision": model.model_revision}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if (quantization := get_quantization_config(model)) is not None:
        options["quantization_config"] = quantization
    return options
