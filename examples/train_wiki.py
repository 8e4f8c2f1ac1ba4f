"""Train a language model to direct its own reading of Wikipedia.

What differs from a textbook fine-tuning script: there are no labels and no fixed inputs. The model writes queries, its
own attention draws the passage that it reads next, and the reward is how much better the passage is predicted than by
the untouched base model.

On any machine, with the embedded model and articles (`make demo` sets everything up and runs this):

    accelerate launch examples/train_wiki.py --config examples/configs/demo.yaml

With the Hub and a GPU of 16 GB:

    accelerate launch examples/train_wiki.py --config examples/configs/llama3.2_3b.yaml

Every option of the config file can be overridden on the command line; `--help` lists them all. The flags
`--batch-size`, `--episodes`, `--dataset` and `--resume` are short for `--generation_batch_size`, `--num_episodes`,
`--dataset_name` and `--resume_from_checkpoint` with the newest checkpoint.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from attention_rl_trainer import AttentionGuidedRLConfig, AttentionGuidedRLTrainer, load_articles
from attention_rl_trainer.durability.discovery import CheckpointError, find_checkpoint


@dataclass
class DataArguments:
    """Where the articles come from."""

    dataset_name: str = field(
        default="wikimedia/wikipedia",
        metadata={
            "help": "Hub data set, folder or file (Parquet, JSON Lines, text, MediaWiki dump), or 'offline'.",
            "aliases": ["--dataset"],
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_eval_split: str = field(default="train", metadata={"help": "Split of the evaluation articles."})
    dataset_eval_name: str | None = field(default=None, metadata={"help": "Articles to evaluate on at the end."})
    dataset_streaming: bool | None = field(
        default=None, metadata={"help": "Stream instead of preparing on disk. Default: by the kind of source."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint in output_dir."})


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


def expect_run(output_dir: str) -> None:
    """Refuse --resume where there is nothing to go on from, before the model is loaded."""
    try:
        find_checkpoint(True, Path(output_dir), AttentionGuidedRLTrainer.run_trace)
    except CheckpointError as error:
        sys.exit(f"--resume: {error}")


def main() -> None:
    """Parse, train, save."""
    parser = TrlParser((DataArguments, AttentionGuidedRLConfig, AdapterConfig))
    data, args, model_args = parser.parse_args_and_config()
    if data.resume and args.resume_from_checkpoint is None:
        expect_run(args.output_dir)
    if not model_args.use_peft:
        sys.exit("--use_peft must stay true: only an adapter is trained, and the base model is the reference")
    articles = load_articles(
        data.dataset_name,
        data.dataset_config,
        split=data.dataset_train_split,
        streaming=data.dataset_streaming,
        text_column=args.dataset_text_column,
    )
    held_out = None
    if data.dataset_eval_name is not None:
        held_out = load_articles(
            data.dataset_eval_name, split=data.dataset_eval_split, text_column=args.dataset_text_column
        )
    if model_args.dtype == "auto" and (model_args.load_in_4bit or model_args.load_in_8bit):
        model_args.dtype = "bfloat16"  # what quantized weights are multiplied in
    options = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    if (quantization := get_quantization_config(model_args)) is not None:
        options["quantization_config"] = quantization
    args.model_init_kwargs = options | dict(args.model_init_kwargs or {})
    trainer = AttentionGuidedRLTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=articles,
        eval_dataset=held_out,
        peft_config=get_peft_config(model_args),
    )
    checkpoint = args.resume_from_checkpoint
    try:
        trainer.train(resume_from_checkpoint=data.resume if checkpoint is None else checkpoint)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports it
    trainer.save_model(args.output_dir)
    if held_out is not None:
        print(trainer.evaluate())
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
