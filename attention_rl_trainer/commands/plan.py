"""``attention-rl plan``: what a run will need, in memory, time and money.

    attention-rl plan --config llama3.2_3b --gpu_memory_gib 16

takes the options of the run itself, from its YAML file or from the command line, and plans them for one GPU. No weights
are loaded; of a local or cached model only its config is read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig
from trl import ModelConfig, TrlParser  # type: ignore[attr-defined]  # trl's lazy names are not declared

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.configs import with_config_path
from attention_rl_trainer.models.base import AUTO, LLAMA, OFFLINE
from attention_rl_trainer.models.embedded import embedded_model_path
from attention_rl_trainer.options import Coefficient, Options, Positive, Share, option
from attention_rl_trainer.planning.footprint import (
    GIBIBYTE,
    MemoryPlan,
    Phase,
    largest_batch,
    largest_num_steps,
    memory_warning,
    plan_memory,
)
from attention_rl_trainer.planning.sizes import LLAMA_3_2_3B, ModelShape, RunShape, WeightBits
from attention_rl_trainer.planning.timing import KEPT_BY_DEFAULT_FILTER, Accelerator, TimePlan, plan_time

_BITS: dict[str, WeightBits] = {"float32": 32, "float16": 16, "bfloat16": 16, "auto": 16}


@dataclass
class DeviceOptions(Options):
    """The device to plan for; the defaults are an RTX A4000 by its maker's data sheet."""

    gpu_memory_gib: Positive = option(16.0, "Memory of the device, GiB.")
    reserved_gib: Coefficient = option(1.0, "Of it, what context, kernels and fragments take, GiB; an assumption.")
    bandwidth_gb_s: Positive = option(448.0, "Bandwidth of its memory, 10^9 bytes per second.")
    tflops: Positive = option(76.7, "Dense 10^12 operations per second in the precision of the weights.")
    attained: Share = option(0.4, "Share of both that is reached; an assumption.")
    kept_fraction: Coefficient = option(KEPT_BY_DEFAULT_FILTER, "Share of the trajectories that are trained on.")
    price_per_hour: Coefficient | None = option(None, "Price of the device per hour.")


@dataclass
class PlannedModel(ModelConfig):
    """TRL's model options, with this method's adapter and precision as the defaults."""

    model_name_or_path: str | None = field(
        default=LLAMA, metadata={"help": "Hub name, folder or 'offline'; only its config is read."}
    )
    dtype: str | None = field(default="bfloat16", metadata={"help": "Precision of the weights."})
    lora_r: int = field(default=8, metadata={"help": "LoRA rank."})


def model_shape(name: str) -> ModelShape:
    """Find the sizes of a model by its Hub name or folder; Llama-3.2-3B is known without its repository.

    Raises:
        ValueError: the architecture is not known here, or the name is ``"auto"``.
    """
    if name == AUTO:
        raise ValueError("model_name_or_path is 'auto', which depends on the machine; name the model to plan for")
    if name == LLAMA:
        return LLAMA_3_2_3B
    folder = str(embedded_model_path()) if name == OFFLINE else name
    return ModelShape.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def weight_bits(model: ModelConfig) -> WeightBits:
    """Read the precision of the weights off the model's options.

    Raises:
        ValueError: there is no plan for that precision.
    """
    if model.load_in_8bit:
        raise ValueError("no plan for load_in_8bit; take load_in_4bit, or the 16 bits of the dtype")
    if model.load_in_4bit:
        return 4
    if model.dtype not in _BITS:
        raise ValueError(f"dtype must be one of {', '.join(_BITS)}, got {model.dtype!r}")
    return _BITS[model.dtype]


def memory_table(plan: MemoryPlan) -> Table:
    """Lay the parts out by the phases in which they are there, in GiB."""
    table = Table(title="Memory of a step, GiB", title_justify="left")
    table.add_column("part")
    for phase in Phase:
        table.add_column(phase.value, justify="right")
    for part in plan.parts:
        size = f"{part.num_bytes / GIBIBYTE:.2f}"
        table.add_row(part.name, *(size if phase in part.phases else "" for phase in Phase))
    table.add_section()
    table.add_row("together", *(f"{plan.phase_bytes(phase) / GIBIBYTE:.2f}" for phase in Phase), style="bold")
    return table


def facts_table(
    shape: ModelShape,
    run: RunShape,
    time: TimePlan,
    budget_bytes: int,
    num_episodes: int,
    price_per_hour: float | None = None,
) -> Table:
    """Lay out what fits into the memory that a step may use, and what a run takes."""
    hours = time.hours(num_episodes)
    table = Table(title="Run", show_header=False, title_justify="left")
    rows = {
        "parameters": f"{shape.parameters:,}, adapter {shape.adapter_parameters(run.lora_rank):,}",
        "trajectory": f"{run.layout.trajectory_tokens} tokens",
        f"largest batch with T = {run.layout.num_steps}": f"{largest_batch(shape, run, budget_bytes)}",
        f"largest T with B = {run.generation_batch_size}": f"{largest_num_steps(shape, run, budget_bytes)}",
        "forward tokens per episode": f"{time.forward_tokens:,.0f}",
        "operations per episode": f"{time.rollout_flops / 1e12:.2f} TFLOP rollout, "
        f"{time.update_flops / 1e12:.2f} TFLOP update",
        "time per episode": f"{time.rollout_seconds:.3f} s rollout ({time.decode_seconds:.3f} s of it decoding), "
        f"{time.update_seconds:.3f} s update",
        f"{num_episodes:,} episodes": f"{hours:.1f} hours",
    }
    if price_per_hour is not None:
        rows["price"] = f"{hours * price_per_hour:.2f}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Parse, plan, and print, by default to standard output; returns the exit code."""
    kinds = (DeviceOptions, AttentionGuidedRLConfig, PlannedModel)
    parser = TrlParser(kinds, prog="attention-rl plan")  # type: ignore[arg-type]
    given = with_config_path(sys.argv[1:] if arguments is None else arguments)
    # The file is that of a training run, which has more options than are planned with.
    device, config, model = parser.parse_args_and_config(given, fail_with_unknown_args=False)
    console = console or Console()
    shape = model_shape(model.model_name_or_path)
    run = RunShape.from_config(config, weight_bits=weight_bits(model), lora_rank=model.lora_r)
    plan = plan_memory(shape, run)
    accelerator = Accelerator(device.bandwidth_gb_s * 1e9, device.tflops * 1e12, device.attained)
    time = plan_time(shape, run, accelerator, device.kept_fraction)
    free = int((device.gpu_memory_gib - device.reserved_gib) * GIBIBYTE)
    console.print(memory_table(plan))
    console.print(facts_table(shape, run, time, free, config.num_episodes, device.price_per_hour))
    warning = memory_warning(plan, free)
    console.print(warning or f"fits: {plan.peak_bytes / GIBIBYTE:.2f} of {free / GIBIBYTE:.2f} GiB", soft_wrap=True)
    return 0
