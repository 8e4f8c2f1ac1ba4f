"""What was found and what will run, printed before the first step; what cannot work is refused here (design §10)."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedModel

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.errors import free_memory_gib
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.causal_lm import base_language_model, input_embeddings, is_loaded_in_4_bits
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.planning.footprint import memory_warning, plan_memory
from attention_rl_trainer.planning.launch import describe_threads, expect_processes, set_threads
from attention_rl_trainer.planning.sizes import ModelShape, RunShape, WeightBits, context_length_of
from attention_rl_trainer.publishing.reproduction import versions
from attention_rl_trainer.rollout.environment import DifferentiableEnvironment, ExactEnvironment, MemoryEnvironment
from attention_rl_trainer.rollout.layout import Layout, Separators
from attention_rl_trainer.update.losses import LossOptions

logger = logging.getLogger(__name__)


def expect_usable_machine(args: AttentionGuidedRLConfig) -> None:
    """Refuse what cannot run here as it was launched, and a folder that cannot be written; set the threads.

    Raises:
        ValueError: names which, and the way out.
    """
    expect_processes(args.num_processes, args.world_size)
    expect_one_device(args.n_gpu)
    set_threads(args.num_threads)
    expect_double_precision(args.device)
    # As the Trainer reads it from the launcher; it would ask accelerate for it, which wants packages for some.
    expect_no_mixed_precision(args.mixed_precision)
    expect_writable(Path(str(args.output_dir)))


def expect_fitting(
    model: PeftModel, layout: Layout, encoder: PlainTextEncoder, config: AttentionGuidedRLConfig, *, with_orders: bool
) -> None:
    """Refuse a tokenizer or lengths that the model cannot take; ``with_orders`` whether an evaluation may come.

    Raises:
        ValueError: says the arithmetic.
    """
    expect_fitting_vocabulary(encoder.max_token_id, input_embeddings(base_language_model(model)))
    expect_fitting_context(layout, model)
    expect_fitting_trees(layout, model, config)
    if with_orders:
        expect_fitting_orders(layout, model, config)


def expect_one_device(num_gpus: int) -> None:
    """Refuse GPUs that would share every forward of one process, as DataParallel does.

    Raises:
        ValueError: there is more than one.
    """
    if num_gpus > 1:
        raise ValueError(
            f"the process sees {num_gpus} GPUs and would split every forward over them; launch a process for each with "
            f"accelerate launch --multi_gpu --num_processes {num_gpus}, or one with CUDA_VISIBLE_DEVICES=0"
        )


def expect_double_precision(device: torch.device) -> None:
    """Refuse a device without float64, in which draws and thresholds are computed.

    Raises:
        ValueError: it is an Apple GPU.
    """
    if device.type == "mps":
        raise ValueError("Apple GPUs have no float64, in which queries are drawn; set use_cpu=True")


def expect_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written, before anything is computed.

    Raises:
        ValueError: names the folder and what the system says, or that its name is not valid UTF-8.
    """
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"output_dir {str(folder)!r} is not valid UTF-8, so no file could name it; rename it"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without a name, so that nothing of it can be left behind.
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir {str(folder)!r} cannot be written: {error.strerror}. Choose a folder that you own"
        ) from error


def expect_fitting_context(layout: Layout, model: PeftModel) -> None:
    """Refuse trajectories that are longer than the model's context, where its config says how long that is.

    Raises:
        ValueError: says the arithmetic.
    """
    available = context_length_of(base_language_model(model).config)
    needed, frame = layout.trajectory_tokens, layout.frame_tokens
    if available is None or needed <= available:
        return
    response = layout.scored_tokens - len(layout.separators.response)
    shown = f"shown keys {layout.shown_tokens}, " if layout.shown_tokens else ""
    raise ValueError(
        f"a trajectory has {needed} tokens, but the model's context holds {available}: {shown}example {frame} + "
        f"{layout.tokens_per_key} + {layout.tokens_per_value}, and {layout.num_steps} steps of "
        f"{frame} + {layout.tokens_per_query} + {response}. "
        "Lower num_steps, subset_fraction, num_kv_pairs or the tokens per query, key or value"
    )


def expect_fitting_trees(layout: Layout, model: PeftModel, config: AttentionGuidedRLConfig) -> None:
    """Refuse to score unread values beyond the model's context: they are read after trajectories, and after each other.

    Raises:
        ValueError: says the arithmetic.
    """
    memory_size, last = config.memory_size, layout.num_steps - 1
    at_most_two = min(2, memory_size - last)
    # After the last step, if any value is unread then, or before it.
    after_steps = layout.told_tokens(last + (at_most_two > 1), 1)
    first_two = layout.told_tokens(0, min(2, memory_size))
    asked = {
        "information_coef": (config.information_coef > 0, after_steps),
        "selector_gradient": (config.needs_choice_values, layout.told_tokens(last, at_most_two)),
        "warm_start_temperature": (config.warm_start_temperature is not None, first_two),
    }
    for option, (is_asked, needed) in asked.items():
        if is_asked:
            expect_tokens(model, needed, f"{option} scores values that are unread")


def expect_tokens(model: PeftModel, needed: int, what: str) -> None:
    """Refuse what reads more tokens than the model's context holds, where its config says how many.

    Raises:
        ValueError: says what takes how many.
    """
    available = context_length_of(base_language_model(model).config)
    if available is not None and needed > available:
        raise ValueError(
            f"{what}, which takes {needed} tokens, but the model's context holds {available}; leave that out, or lower "
            "num_steps, subset_fraction, num_kv_pairs or the tokens per query, key or value"
        )


def expect_fitting_orders(layout: Layout, model: PeftModel, config: AttentionGuidedRLConfig) -> None:
    """Refuse to score orders that are longer than the model's context: they read all M pairs, not T of them.

    Raises:
        ValueError: says the arithmetic.
    """
    available = context_length_of(base_language_model(model).config)
    if available is None or not config.eval_tables or config.eval_order_episodes == 0:
        return
    needed = replace(layout, num_steps=config.memory_size).trajectory_tokens
    if needed > available:
        raise ValueError(
            f"an evaluation reads all {config.memory_size} pairs of a memory to score orders, which takes {needed} "
            f"tokens, but the model's context holds {available}. Set eval_order_episodes to 0 (queries are measured "
            "nevertheless) or eval_tables to false, or lower subset_fraction, num_kv_pairs or the tokens per query, "
            "key or value"
        )


def expect_log_prob(environment: MemoryEnvironment, options: LossOptions) -> None:
    """Refuse to train the draws of an environment that does not give the probabilities that the loss needs.

    Raises:
        ValueError: ``selector_coef`` > 0 needs `DifferentiableEnvironment`, and a ``selector_gradient`` other than
            ``"sampled"`` needs `ExactEnvironment`.
    """
    name = type(environment).__name__
    if options.selector_coef > 0 and not isinstance(environment, DifferentiableEnvironment):
        raise ValueError(
            f"selector_coef is {options.selector_coef}, but the environment {name} has no "
            "log_prob(memory, query_vectors, index); give it one, or set selector_coef to 0"
        )
    if options.needs_choice_values and not isinstance(environment, ExactEnvironment):
        raise ValueError(
            f"selector_gradient is {options.selector_gradient!r}, but the environment {name} has no "
            "log_probabilities(memory, query_vectors, index); give it one, or set selector_gradient to 'sampled'"
        )


def expect_no_mixed_precision(mixed_precision: str) -> None:
    """Refuse accelerate's mixed precision, which acts on the update alone.

    Raises:
        ValueError: it is on.
    """
    if mixed_precision != "no":
        raise ValueError(
            f"accelerate's mixed precision is {mixed_precision!r}, but the rollout and the update must compute alike; "
            "launch with --mixed_precision no and set the precision of the weights "
            "(model_init_kwargs={'dtype': 'bfloat16'})"
        )


def expect_plain_accelerator(accelerator: Accelerator) -> None:
    """Refuse what an accelerator does to the update alone, wherever it comes from: an earlier one, too, sets its state.

    Raises:
        ValueError: it computes in mixed precision, compiles, or shares the model over processes.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate shares the model over processes ({kind.value}), but the rollout needs it whole in each; "
            "launch without the options of that plugin (examples/accelerate_configs/multi_gpu.yaml)"
        )
    expect_no_mixed_precision(accelerator.mixed_precision)
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise ValueError(
            f"accelerate compiles the model with {backend.value}, but the rollout runs it as it is; launch with "
            "--dynamo_backend no, and make no Accelerator with a dynamo_backend beside the trainer"
        )


def expect_fitting_vocabulary(max_token_id: int, embeddings: nn.Embedding) -> None:
    """Refuse a tokenizer whose ids the model cannot embed; ``max_token_id`` is the largest that text can turn into.

    Raises:
        ValueError: the id is beyond the embeddings.
    """
    if max_token_id >= embeddings.weight.shape[0]:
        raise ValueError(
            f"the tokenizer's ids go up to {max_token_id}, but the model embeds {embeddings.weight.shape[0]}; "
            "give the model's own tokenizer as processing_class"
        )


def memory_shortage(config: AttentionGuidedRLConfig, policy: PolicyModel, separators: Separators) -> str | None:
    """Plan the memory of a run whose model is loaded; say what to lower if the device has too little, or ``None``."""
    free = free_memory_gib(policy.device)
    base = policy.causal_lm
    weight_bits: WeightBits = 32 if base.dtype.itemsize == 4 else 16
    if is_loaded_in_4_bits(base):
        weight_bits = 4
    ranks = [int(getattr(item, "r", 0)) for item in policy.model.peft_config.values()]
    try:
        shape = ModelShape.from_config(base.config)
        run = RunShape.from_config(
            config,
            weight_bits=weight_bits,
            lora_rank=max(1, *ranks),
            joint=policy.can_read_jointly,
            on_cpu=policy.device.type == "cpu",
            separators=separators,
        )
    except ValueError as error:
        return f"the run's memory cannot be planned: {error}"
    if free is None:
        return None
    return memory_warning(plan_memory(shape, run), int(free * 2**30), model_is_loaded=True)


def warn_of_shortage(config: AttentionGuidedRLConfig, policy: PolicyModel, separators: Separators) -> None:
    """Warn of what `memory_shortage` finds."""
    shortage = memory_shortage(config, policy, separators)
    if shortage is not None:
        logger.warning("%s", shortage)


def run_facts(
    config: AttentionGuidedRLConfig, policy: PolicyModel, layout: Layout
) -> dict[str, str | int | float | bool | None]:
    """Collect what was found and what will run."""
    device, base = policy.device, policy.causal_lm
    trainable = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in policy.model.parameters())
    free, context = free_memory_gib(device), context_length_of(base.config)
    # Outside of a run the steps of one from the start.
    steps = (
        config.max_steps
        if config.max_steps > 0
        else math.ceil((config.warm_start_episodes + config.num_episodes) / config.episodes_per_step)
    )
    lessons = f"{config.warm_start_episodes} trajectories of a warm start and " if config.warm_start_episodes else ""
    return {
        "model": _model_name(base),
        "architecture": f"{type(base).__name__}, {base.config.get_text_config().num_hidden_layers} layers",
        "attention": str(policy.attention),
        "precision": f"weights {_dtype_names([base.dtype])}, adapter {_dtype_names([p.dtype for p in trainable])}",
        "device": f"{device} ({_device_name(device)})",
        "processes": f"{config.world_size}, each of {describe_threads()}",
        "memory free": "unknown" if free is None else f"{free:.1f} GiB",
        "parameters": f"{sum(parameter.numel() for parameter in trainable):,} trainable of {total:,}",
        "optimizer": f"{getattr(config.optim, 'value', config.optim)}, learning rate {config.learning_rate:g}",
        "pairs": f"{config.num_kv_pairs} per article, each of {config.tokens_per_key} + {config.tokens_per_value} "
        f"tokens, {config.memory_size} in a memory, {layout.num_steps} read",
        "trajectory": f"{layout.trajectory_tokens} tokens of a context of {context or 'unknown length'}",
        "run": f"{lessons}{config.num_episodes} episodes in {steps} steps of {config.episodes_per_step}",
        "selection": f"{_selector_name(config)}, heads averaged as {config.head_aggregation}",
        "seed": config.seed,
        "versions": versions(),
    }


def _selector_name(config: AttentionGuidedRLConfig) -> str:
    temperature = config.fixed_temperature
    cosine = "cosines, " if config.head_similarity == "cosine" else ""
    means = "vectors less their means, " if config.center_vectors else ""
    return f"{cosine}{means}temperature {'fitted' if temperature is None else f'{temperature:g}'}"


def _dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    return "/".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _model_name(model: PreTrainedModel) -> str:
    """Name the model; a local folder by its last part, because a report is read on other machines too."""
    name = str(model.config.name_or_path)
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def print_facts(facts: Mapping[str, str | int | float | bool | None], console: Console | None = None) -> None:
    """Print what `run_facts` collected as a table, by default to standard error."""
    table = Table(title="What will run", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        # Text, because a folder's name may hold brackets, which a plain string would give as markup.
        table.add_row(name, Text(str(value)))
    (console or Console(stderr=True)).print(table)
