"""A run's options held against the table: wrong values and what cannot act are refused, what does nothing is named."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

import transformers
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from attention_rl_trainer.inherited.table import VERDICTS, Verdict, must_stay
from attention_rl_trainer.options import check_value

logger = logging.getLogger(__name__)

# What accelerate and its launcher switch on by the environment, past the options of a run.
_SWITCHES = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "launch without --use_deepspeed"),
    "ACCELERATE_USE_FSDP": ("FSDP", "launch without --use_fsdp"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "launch without --use_megatron_lm"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism config", "launch without --use_parallelism_config"),
}
_COMPILE, _ACCUMULATE = "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_ON = ("1", "true", "yes", "y", "on", "t")


def check_inherited_options(args: TrainingArguments) -> None:
    """Hold the options of a run against `VERDICTS`, and say by a warning which of them do nothing.

    Raises:
        ValueError: an option is out of range, cannot act here, or is contradicted by another; names the way out.
    """
    _read_yaml_no(args)
    _expect_plain_environment(os.environ, args)
    hints = get_type_hints(TrainingArguments)
    for item in fields(TrainingArguments):
        value, default = getattr(args, item.name), _default(item)
        verdict = VERDICTS.get(item.name)
        if verdict is None:
            if value != default:
                logger.warning(
                    "%s is %r: transformers %s has this option, and this version of attention_rl_trainer does not know "
                    "whether it acts here",
                    *(item.name, value, transformers.__version__),
                )
        elif verdict.kind == "refused":
            _refuse(item.name, value, default, verdict, args)
        elif verdict.kind == "honoured":
            check_value(item.name, value, hints[item.name] if verdict.range is None else verdict.range)
        else:
            if verdict.range is not None:
                check_value(item.name, value, verdict.range)
            if value != default and value not in verdict.harmless:
                logger.warning("%s is %r, which has no effect here: %s", item.name, value, verdict.text)
    _expect_agreement(args)


def expect_plain_loaders(args: TrainingArguments) -> None:
    """Refuse settings of accelerate's loaders, once the Trainer's own check has read them.

    Raises:
        ValueError: names what is set.
    """
    plain: Any = AcceleratorConfig()
    config: Any = args.accelerator_config
    given = {name: value for name, value in vars(config).items() if value and value != getattr(plain, name)}
    given |= {name: value for name, value in vars(config).items() if getattr(plain, name) and not value}
    if given:
        raise ValueError(
            f"accelerator_config sets {given}, which is not supported: {VERDICTS['accelerator_config'].text}"
        )


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _read_yaml_no(args: TrainingArguments) -> None:
    """Take false, as which YAML reads a bare ``no``, for the choice of that name."""
    for name in ("eval_strategy", "logging_strategy", "save_strategy"):
        if getattr(args, name) is False:
            setattr(args, name, "no")


def _refuse(name: str, value: Any, default: Any, verdict: Verdict, args: TrainingArguments) -> None:
    if verdict.fixed is not None:
        if value != verdict.fixed:
            raise ValueError(f"{name} must stay {verdict.fixed!r}, got {value!r}: {must_stay(name)}")
        return
    # A copy of finished options has an AcceleratorConfig; `expect_plain_loaders` looks into it.
    if value is None or value is False or value == default or value in verdict.harmless or name == "accelerator_config":
        return
    if verdict.instead is not None:
        raise ValueError(
            f"{name} is {value}, but it follows from {verdict.instead} ({getattr(args, verdict.instead)}): "
            f"{verdict.text}. Set {verdict.instead} alone"
        )
    raise ValueError(f"{name} is not supported: {verdict.text}" + (f" (got {value!r})" if value is not True else ""))


def _expect_plain_environment(environment: Mapping[str, str], args: TrainingArguments) -> None:
    for name, (what, way_out) in _SWITCHES.items():
        if environment.get(name, "").lower() in _ON:
            raise ValueError(
                f"{name} is {environment[name]!r}, so accelerate switches on {what}, but each process needs the whole "
                f"model for its rollouts; {way_out}, or unset {name}"
            )
    if (backend := environment.get(_COMPILE, "no")).lower() not in ("no", ""):
        raise ValueError(
            f"{_COMPILE} is {backend!r}, so accelerate compiles the model, which is not supported: "
            f"{VERDICTS['torch_compile'].text}; launch with --dynamo_backend no, or unset {_COMPILE}"
        )
    steps = environment.get(_ACCUMULATE, "1")
    if steps not in ("1", "auto", str(args.gradient_accumulation_steps)):
        logger.warning(
            "%s is %s, which has no effect here: set gradient_accumulation_steps, which is %s",
            *(_ACCUMULATE, steps, args.gradient_accumulation_steps),
        )


def _expect_agreement(args: TrainingArguments) -> None:
    """Check what depends on two options, and name those that another one switches off."""
    if args.metric_for_best_model is not None and args.save_total_limit is not None:
        raise ValueError(
            f"save_total_limit is {args.save_total_limit} beside metric_for_best_model, but checkpoints are "
            "written by save_episodes, not at the best evaluation, and removed by age; leave save_total_limit out"
        )
    metric = args.metric_for_best_model
    needs_metric = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    if metric in ("loss", "eval_loss") or (metric is None and needs_metric):
        raise ValueError(
            f"metric_for_best_model is {metric!r}, but an evaluation has no loss"
            + (f", and the schedule {str(args.lr_scheduler_type)!r} reads a metric" if needs_metric else "")
            + "; choose one of docs/metrics.md that an evaluation logs, such as 'reward'"
        )
    if args.dataloader_num_workers > 1:
        raise ValueError(
            f"dataloader_num_workers must be 0 or 1, got {args.dataloader_num_workers}: the articles are one "
            "stream in a fixed order"
        )
    for name in ("eval_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            logger.warning(
                "%s is 'epoch', which means once, at the end: a run counts episodes and is one epoch. Set it to "
                "'steps', and %s",
                *(name, name.replace("strategy", "steps")),
            )
    if args.eval_strategy == "no":
        for name in ("eval_steps", "eval_delay", "metric_for_best_model"):
            if getattr(args, name):
                logger.warning("%s is %s, which has no effect while eval_strategy is 'no'", name, getattr(args, name))
    for kind in ("activation", "gradient"):
        name = f"{kind}_checkpointing"
        if getattr(args, f"{name}_kwargs") and not any(
            getattr(args, f"{other}_checkpointing") for other in ("activation", "gradient")
        ):
            logger.warning("%s_kwargs has no effect while %s is off", name, name)
