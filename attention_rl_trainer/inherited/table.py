"""A verdict for every field that `transformers.TrainingArguments` has in any version that the package allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from transformers.trainer_utils import HubStrategy, IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels

from attention_rl_trainer.options import AtLeast, Coefficient, Count, Positive

Kind = Literal["honoured", "refused", "without effect"]


@dataclass(frozen=True)
class Verdict:
    """What becomes of an option here."""

    kind: Kind
    text: str = ""
    """Of an honoured one what is particular here, else the reason and the way out."""
    range: Any = None
    """An annotation that is checked beside the field's own type, or an enumeration of its values."""
    harmless: tuple[Any, ...] = ()
    """Values beside the default that ask for nothing; a copy of finished options has some of them."""
    instead: str | None = None
    """The option of this package that the value follows from."""
    fixed: Any = None
    """The value that a refused one must keep, where it differs from the Trainer's default."""
    since: tuple[int, int] = (5, 18)
    """The first version of transformers that has the field; an older one takes it by `NewerOptions`."""


def _honoured(text: str = "", values: Any = None, since: tuple[int, int] = (5, 18)) -> Verdict:
    return Verdict("honoured", text, values, since=since)


def _refused(text: str, *harmless: Any) -> Verdict:
    return Verdict("refused", text, harmless=harmless)


def _derived(instead: str, text: str) -> Verdict:
    return Verdict("refused", text, instead=instead)


def _fixed(value: Any, text: str) -> Verdict:
    return Verdict("refused", text, fixed=value)


def _idle(text: str, *harmless: Any, values: Any = None) -> Verdict:
    return Verdict("without effect", text, values, harmless)


_EPISODES = "a run is counted in episodes, not in optimizer steps"
_PRECISION = (
    "the rollout and the update must compute alike, so precision is that of the weights; "
    "set it by --dtype bfloat16, in Python by model_init_kwargs={'dtype': 'bfloat16'}"
)
_COMPILE = (
    "the cache's growing length makes it compile again and again, for no gain where it was measured "
    "(docs/benchmarks.md); leave it out"
)
_NOT_DDPS = "gradients are added up by the trainer itself, once for each optimizer step (docs/distributed.md)"
_SHARDED = "each process needs the whole model for its rollouts (docs/distributed.md); leave it out"
_MAIN_WRITES = "the first process writes, logs and says what all would say"
_NO_PREDICTIONS = "an evaluation rolls out trajectories and gathers no predictions"
_LIGER = "its kernels would replace layers that the rollout was prepared with; leave it out"
_FOR_SCRIPTS = "a flag for scripts, which the Trainer does not read"
_OF_ADAM = "Refused where the optimizer has none."
_TRACKIO = "Read by trackio."
_WORKER = "articles are read by one stream in a fixed order, by at most one worker"

VERDICTS: dict[str, Verdict] = {
    # A run
    "output_dir": _honoured("Refused if it cannot be written."),
    "per_device_train_batch_size": _derived("generation_batch_size", _EPISODES),
    "num_train_epochs": _derived("num_episodes", _EPISODES),
    "max_steps": _derived("num_episodes", _EPISODES),
    "seed": _honoured(
        "Of draws, of the adapter's first weights and of the articles' order.", Annotated[int, AtLeast(0, 2**32)]
    ),
    "data_seed": _refused(
        "the order of the articles follows from seed, and shuffle says whether there is one; set seed"
    ),
    "full_determinism": _honoured(),
    "use_cpu": _honoured(),
    "do_train": _idle(_FOR_SCRIPTS, True),
    "do_eval": _idle(f"{_FOR_SCRIPTS}; eval_strategy says whether a run evaluates", True),
    "do_predict": _idle(f"{_FOR_SCRIPTS}; there is nothing to predict"),
    "resume_from_checkpoint": _honoured("Read by `attention-rl train`; in Python give it to `train`."),
    "debug": _refused(
        "only 'underflow_overflow' acts here, the rest is for TPUs; leave it out",
        "underflow_overflow",
        ["underflow_overflow"],
        [],
        None,
    ),
    "auto_find_batch_size": _refused("a retried step would count its episodes twice; lower generation_batch_size"),
    # Optimization
    "learning_rate": _honoured(values=Positive),
    "lr_scheduler_type": _honoured(
        "One step per optimizer step of the Trainer. 'reduce_lr_on_plateau' and 'greedy' need metric_for_best_model.",
        SchedulerType,
    ),
    "lr_scheduler_kwargs": _honoured("Refused under 'constant' and 'constant_with_warmup', which take none."),
    "warmup_steps": _honoured(
        "Refused under a schedule that has no warm-up, as 'constant' is. Not the method's warmup_episodes.", Coefficient
    ),
    "optim": _honoured(
        "Not those that step inside the backward (LOMO, layer-wise ones), project gradients (GaLore, APOLLO) or keep "
        "other weights for evaluation (schedule-free). 'adamw_torch' is taken where bitsandbytes is missing.",
        OptimizerNames,
    ),
    "optim_args": _honoured("Refused where the optimizer does not read it."),
    "optim_target_modules": _refused(
        "it is of optimizers that are not supported; choose the adapter's layers in peft_config"
    ),
    "weight_decay": _honoured(values=Coefficient),
    "adam_beta1": _honoured(_OF_ADAM, Annotated[float, AtLeast(0, 1)]),
    "adam_beta2": _honoured(_OF_ADAM, Annotated[float, AtLeast(0, 1)]),
    "adam_epsilon": _honoured(_OF_ADAM, Coefficient),
    "max_grad_norm": _honoured("0 switches clipping off.", Coefficient),
    "gradient_accumulation_steps": _honoured("Rollout batches per optimizer step.", Count),
    "average_tokens_across_devices": _idle("the loss is normalized by the trajectories of all processes"),
    "label_smoothing_factor": _refused("the loss is of rewards, there are no labels; leave it out"),
    "neftune_noise_alpha": _refused(
        "noise on the update's embeddings alone makes it another policy than the one that rolled out; leave it out"
    ),
    "torch_empty_cache_steps": _idle(
        "an update takes smaller micro-batches where memory runs out; lower training_batch_size"
    ),
    # Precision, compilation, activations
    "bf16": _refused(_PRECISION),
    "fp16": _refused(_PRECISION),
    "bf16_full_eval": _refused(_PRECISION),
    "fp16_full_eval": _refused(_PRECISION),
    "tf32": _honoured("In rollout and update alike."),
    "activation_checkpointing": _honoured("Of the update; a rollout computes none again.", since=(5, 23)),
    "activation_checkpointing_kwargs": _honoured("Read with activation_checkpointing alone.", since=(5, 23)),
    "gradient_checkpointing": _honoured("The older name of activation_checkpointing."),
    "gradient_checkpointing_kwargs": _honoured("The older name of activation_checkpointing_kwargs."),
    "torch_compile": _refused(_COMPILE),
    "torch_compile_backend": _refused(_COMPILE),
    "torch_compile_mode": _refused(_COMPILE),
    "use_liger_kernel": _refused(_LIGER),
    "liger_kernel_config": _refused(_LIGER),
    "use_cache": _idle("a rollout keeps its own cache, an update has none"),
    # What is logged
    "logging_strategy": _honoured("A run is one epoch: 'epoch' logs once, at its end.", IntervalStrategy),
    "logging_steps": _honoured("Below 1 a share of the run's steps.", Positive),
    "logging_first_step": _honoured(),
    "logging_nan_inf_filter": _fixed(False, "a non-finite loss is an error here, not a 0 in the log"),
    "log_level": _honoured("Of transformers' messages.", Literal[tuple(trainer_log_levels)]),
    "log_level_replica": _honoured(values=Literal[tuple(trainer_log_levels)]),
    "log_on_each_node": _honoured("Of what the Trainer itself logs."),
    "include_num_input_tokens_seen": _refused(
        "a batch holds memories and not the tokens of a model's input; tokens_per_second and the ledger count those "
        "that were read. Leave it out",
        "no",
        False,
    ),
    "disable_tqdm": _honoured("Hides the bar, not the table of trajectories."),
    "report_to": _honoured(),
    "run_name": _honoured("Read by trackers."),
    "project": _honoured(_TRACKIO),
    "trackio_space_id": _honoured(_TRACKIO),
    "trackio_bucket_id": _honoured(_TRACKIO),
    "trackio_static_space_id": _honoured(_TRACKIO),
    "skip_memory_metrics": _honoured(),
    # Evaluation on the way
    "eval_strategy": _honoured("A run is one epoch: 'epoch' evaluates once, at its end.", IntervalStrategy),
    "eval_steps": _honoured("Below 1 a share of the run's steps. Default: logging_steps.", Coefficient | None),
    "eval_delay": _honoured("In steps.", Coefficient),
    "eval_on_start": _honoured("Not where a run resumes."),
    "per_device_eval_batch_size": _derived("generation_batch_size", "an evaluation rolls out like training"),
    "prediction_loss_only": _idle(_NO_PREDICTIONS),
    "eval_do_concat_batches": _idle(_NO_PREDICTIONS),
    "eval_use_gather_object": _idle(_NO_PREDICTIONS),
    "eval_accumulation_steps": _idle(_NO_PREDICTIONS),
    "include_for_metrics": _idle(_NO_PREDICTIONS),
    "batch_eval_metrics": _idle(_NO_PREDICTIONS),
    "metric_for_best_model": _honoured(
        "As EarlyStoppingCallback and 'reduce_lr_on_plateau' read it, such as 'reward'."
    ),
    "greater_is_better": _honoured("Of metric_for_best_model."),
    "load_best_model_at_end": _refused("a checkpoint is written by save_episodes, not at evaluations"),
    # Checkpoints and the Hub
    "save_strategy": _fixed("no", "save_episodes decides when a checkpoint is written"),
    "save_steps": _derived("save_episodes", _EPISODES),
    "save_total_limit": _honoured("By age. Refused beside metric_for_best_model.", Count | None),
    "save_only_model": _honoured("No run resumes from such checkpoints."),
    "save_on_each_node": _idle(_MAIN_WRITES),
    "enable_jit_checkpoint": _refused("SIGTERM writes a checkpoint anyway"),
    "ignore_data_skip": _fixed(True, "resuming seeks to the stored position instead of replaying"),
    "restore_callback_states_from_checkpoint": _honoured(),
    "push_to_hub": _honoured(),
    "hub_model_id": _honoured(),
    "hub_token": _honoured("Masked wherever options are written."),
    "hub_private_repo": _honoured(),
    "hub_strategy": _honoured(values=HubStrategy),
    "hub_always_push": _honoured(),
    "hub_revision": _honoured(),
    # Reading the articles
    "remove_unused_columns": _fixed(False, "columns are read by name"),
    "label_names": _idle("there are no labels"),
    "train_sampling_strategy": _refused("articles are read in the order that seed, shuffle and window give; set these"),
    "length_column_name": _idle("articles are not grouped by length"),
    "dataloader_drop_last": _idle("the articles are an endless stream"),
    "dataloader_num_workers": _honoured("1 reads ahead in a process of its own.", Annotated[int, AtLeast(0)]),
    "dataloader_pin_memory": _idle("batches of tokens are small and are not pinned", True, False),
    "dataloader_persistent_workers": _idle(_WORKER),
    "dataloader_prefetch_factor": _idle(_WORKER),
    "dataloader_multiprocessing_context": _idle(_WORKER),
    "dataloader_in_order": _idle(_WORKER),
    "accelerator_config": _refused(
        "batches do not pass through accelerate's loaders; set gradient_accumulation_steps and "
        "dataloader_num_workers, and leave the rest out"
    ),
    # Several processes
    "parallelism_config": _refused(_SHARDED),
    "fsdp": _refused(_SHARDED, "", [], False),
    "fsdp_config": _refused(_SHARDED, {}),
    "deepspeed": _refused(_SHARDED),
    "ddp_backend": _honoured("Of several processes."),
    "ddp_find_unused_parameters": _idle(_NOT_DDPS),
    "ddp_bucket_cap_mb": _idle(_NOT_DDPS),
    "ddp_broadcast_buffers": _idle(_NOT_DDPS),
    "ddp_static_graph": _idle(_NOT_DDPS),
    "ddp_timeout": _honoured("Of several processes: how long one waits for the others."),
    "local_rank": _idle("the launcher says it", 0),
}


def must_stay(name: str) -> str:
    """Say what an option must stay at, and why; its help text."""
    value = VERDICTS[name].fixed
    return f"Must stay {str(value).lower() if isinstance(value, bool) else repr(value)}: {VERDICTS[name].text}."


_HEADS = {
    "honoured": "These act as in transformers, but for what is said beside them.",
    "refused": "Another value than the default is an error that says why, and the way out.",
    "without effect": "Another value than the default is named in a warning; the run is the same.",
}


def page() -> str:
    """Write the table as the Markdown of docs/training_arguments.md."""
    lines = [
        "# Options inherited from `transformers.TrainingArguments`",
        "",
        "`AttentionGuidedRLConfig` has every option of the Trainer. This page says what becomes of each; it is the "
        "table that the options",
        "are checked against (`attention_rl_trainer/inherited/table.py`). An option that a newer transformers adds, "
        "and that is not here,",
        "is named in a warning where it is set.",
    ]
    for kind, head in _HEADS.items():
        lines += ["", f"## {kind.capitalize()}", "", head, "", "| option | |", "| --- | --- |"]
        for name, verdict in sorted(VERDICTS.items()):
            if verdict.kind == kind:
                lines.append(f"| `{name}` | {_words(verdict)} |")
    return "\n".join(lines) + "\n"


def _words(verdict: Verdict) -> str:
    words = verdict.text.replace("|", "\\|")
    if verdict.instead is not None:
        words = f"follows from `{verdict.instead}`: {words}"
    if verdict.fixed is not None:
        words = f"must stay `{verdict.fixed!r}`: {words}"
    sentence = words[:1].upper() + words[1:] + ("." if words and not words.endswith(".") else "")
    since = f" In transformers from {'.'.join(map(str, verdict.since))}." if verdict.since > (5, 18) else ""
    return (sentence + since).strip()
