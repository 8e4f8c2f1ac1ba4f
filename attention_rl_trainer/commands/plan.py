"""``attention-rl plan``: what a run will need, in memory, time and money.

    attention-rl plan --config demo
    attention-rl plan --config llama3.2_3b --gpu_memory_gib 16

takes the options of the run itself, from its YAML file or from the command line. Where the run would be on the CPU of
this machine, the model is loaded and a few of its forwards are measured; a GPU is planned for by its data sheet, and
no weights are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig
from trl import ModelConfig  # type: ignore[attr-defined]  # trl's lazy names are not declared

from attention_rl_trainer.commands.parsing import CommandParser
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.errors import free_memory_gib
from attention_rl_trainer.hub import HubUnreachableError, cached_in_hub_cache, hub_obstacle
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.models.adapters import add_adapter, default_lora_config
from attention_rl_trainer.models.base import AUTO, LLAMA, OFFLINE
from attention_rl_trainer.models.choice import choose_base_model, load_named_model
from attention_rl_trainer.models.embedded import embedded_model_path
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.options import Coefficient, Options, Positive, Share, option
from attention_rl_trainer.planning.footprint import (
    GIBIBYTE,
    ROLLOUT_PHASES,
    UPDATE_PHASES,
    MemoryPlan,
    Phase,
    largest_batch,
    largest_num_steps,
    memory_warning,
    plan_memory,
)
from attention_rl_trainer.planning.launch import describe_threads, set_threads
from attention_rl_trainer.planning.measuring import Measurement, measure
from attention_rl_trainer.planning.sizes import LLAMA_3_2_3B, ModelShape, RunShape, WeightBits
from attention_rl_trainer.planning.timing import (
    Accelerator,
    MeasuredSpeed,
    TimePlan,
    plan_time,
    warm_start_seconds,
)
from attention_rl_trainer.records.health import expected_kept_fraction
from attention_rl_trainer.rollout.layout import Separators

logger = logging.getLogger(__name__)

_BITS: dict[str, WeightBits] = {"float32": 32, "float16": 16, "bfloat16": 16, "auto": 16}


@dataclass
class DeviceOptions(Options):
    """A GPU to plan for; without any of the first four a run on a CPU is planned by measuring it."""

    _argument_group_name = "device"

    gpu_memory_gib: Positive | None = option(None, "Memory of the GPU, GiB. Default: 16.")
    bandwidth_gb_s: Positive | None = option(
        None, "Bandwidth of its memory, 10^9 bytes per second. Default: 448, an RTX A4000 by its maker's data sheet."
    )
    tflops: Positive | None = option(
        None, "Dense 10^12 operations per second in the precision of the weights. Default: 76.7, of the same."
    )
    attained: Share | None = option(None, "Share of both that is reached. Default: 0.4, an assumption.")
    reserved_gib: Coefficient = option(
        1.0, "Of the memory, what context, kernels and fragments take, GiB; an assumption."
    )
    kept_fraction: Coefficient | None = option(
        None,
        "Share of the trajectories that are trained on. Default: what filter_threshold leaves of a normal one.",
    )
    price_per_hour: Coefficient | None = option(None, "Price of the device per hour.")

    @property
    def is_described(self) -> bool:
        """Whether a GPU is asked for."""
        return any(
            value is not None for value in (self.gpu_memory_gib, self.bandwidth_gb_s, self.tflops, self.attained)
        )

    @property
    def accelerator(self) -> Accelerator:
        """The GPU's rates."""
        return Accelerator((self.bandwidth_gb_s or 448.0) * 1e9, (self.tflops or 76.7) * 1e12, self.attained or 0.4)

    @property
    def free_bytes(self) -> int:
        """What a step may use of its memory."""
        return int(((self.gpu_memory_gib or 16.0) - self.reserved_gib) * GIBIBYTE)


@dataclass
class PlannedModel(ModelConfig):
    """TRL's model options, with this method's adapter and precision as the defaults."""

    _argument_group_name = "model and adapter"

    model_name_or_path: str | None = field(
        default=LLAMA, metadata={"help": "Hub name, folder, 'offline', or on a CPU 'auto'."}
    )
    dtype: str | None = field(
        default="auto",
        metadata={"help": "Precision of the weights; 'auto' is bfloat16, and on a CPU where that is native."},
    )
    lora_r: int = field(default=8, metadata={"help": "LoRA rank."})


def model_shape(name: str) -> ModelShape:
    """Find the sizes of a model by its Hub name or folder; Llama-3.2-3B is known without its repository.

    Raises:
        ValueError: the architecture is not known here, or the name is ``"auto"``.
        HubUnreachableError: its config would have to come from the Hub, which cannot be reached.
    """
    if name == AUTO:
        raise ValueError("model_name_or_path is 'auto', which depends on the machine; name the model to plan for")
    if name == LLAMA:
        return LLAMA_3_2_3B
    _expect_config(name)
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


def _expect_config(name: str) -> None:
    if name == OFFLINE or Path(name).expanduser().exists() or cached_in_hub_cache(name, "config.json"):
        return
    if (obstacle := hub_obstacle()) is not None:
        raise HubUnreachableError(
            f"the plan needs the config.json of {name}, which is neither a folder nor in the local cache, and the Hub "
            f"cannot be reached: {obstacle}. --model_name_or_path {OFFLINE} plans with the embedded model"
        )


def is_here(name: str) -> bool:
    """Whether a model's weights are on this machine, so that it is loaded without a download."""
    if name == OFFLINE:
        return True
    path = Path(name).expanduser()
    if path.exists():
        return path.is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    return any(cached_in_hub_cache(name, file) for file in ("model.safetensors", "model.safetensors.index.json"))


_WHEN = {tuple(Phase): "always", ROLLOUT_PHASES: "rollout", ROLLOUT_PHASES[1:]: "rollout", UPDATE_PHASES: "update"}


def memory_table(plan: MemoryPlan) -> Table:
    """List the parts with the phases in which they are there, and what is there together in each, in GiB."""
    table = Table(title="Memory of a step, GiB", title_justify="left")
    table.add_column("part", overflow="fold")
    table.add_column("when", overflow="fold")
    table.add_column("GiB", justify="right", no_wrap=True)
    for part in plan.parts:
        table.add_row(part.name, _when(part.phases), f"{part.num_bytes / GIBIBYTE:.2f}")
    table.add_section()
    for phase in Phase:
        style = "bold" if phase is plan.peak_phase else None
        table.add_row("together", phase.value, f"{plan.phase_bytes(phase) / GIBIBYTE:.2f}", style=style)
    return table


def _when(phases: tuple[Phase, ...]) -> str:
    missing = [phase.value for phase in Phase if phase not in phases]
    return _WHEN.get(phases) or (f"all but {missing[0]}" if len(missing) == 1 else ", ".join(phases))


def duration(seconds: float) -> str:
    """Say a time in a unit in which it is neither 0.0 nor thousands."""
    for unit, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} seconds"


def facts_table(
    shape: ModelShape,
    run: RunShape,
    time: TimePlan,
    budget_bytes: int | None,
    length: tuple[str, float],
    price_per_hour: float | None = None,
) -> Table:
    """Lay out what fits into the memory that a step may use, if that is known, and what a run takes.

    Args:
        length: what the run consists of, and its seconds.
    """
    what, seconds = length
    rows = {
        "parameters": f"{shape.parameters:,}, adapter {shape.adapter_parameters(run.lora_rank):,}",
        "trajectory": f"{run.layout.trajectory_tokens} tokens",
    }
    if budget_bytes is not None:
        rows[f"largest batch with T = {run.layout.num_steps}"] = str(largest_batch(shape, run, budget_bytes))
        rows[f"largest T with B = {run.generation_batch_size}"] = str(largest_num_steps(shape, run, budget_bytes))
    rows |= {
        "forward tokens per episode": f"{time.forward_tokens:,.0f}",
        "operations per episode": f"{time.rollout_flops / 1e12:.2f} TFLOP rollout, "
        f"{time.update_flops / 1e12:.2f} TFLOP update",
        "time per episode": f"{time.rollout_seconds:.3f} s rollout ({time.decode_seconds:.3f} s of it decoding), "
        f"{time.update_seconds:.3f} s update",
        what: duration(seconds),
    }
    if price_per_hour is not None:
        rows["price"] = f"{seconds / 3600 * price_per_hour:.2f}"
    table = Table(title="Run", show_header=False, title_justify="left")
    for _ in range(2):
        table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def parser() -> CommandParser:
    """Make the parser of the command line."""
    kinds = (DeviceOptions, AttentionGuidedRLConfig, PlannedModel)
    purpose = "Plan the memory and the time of a run: on this machine's CPU by measuring, on a GPU by its data sheet."
    # The file is that of a training run, which has more options than are planned with.
    return CommandParser("plan", purpose, kinds, takes_any_file=True)


def main(flags: Sequence[str], console: Console | None = None) -> int:
    """Parse, plan, and print, by default to standard output; returns the exit code."""
    device, config, model = parser().parse(flags)
    console = console or Console()
    name = _measured_model(device, config, model)
    if name is not None:
        _plan_here(name, device, config, model, console)
    else:
        shape = model_shape(model.model_name_or_path)
        run = RunShape.from_config(config, weight_bits=weight_bits(model), lora_rank=model.lora_r)
        _print(shape, run, device.accelerator, device.free_bytes, (device, config), console)
    return 0


def _measured_model(device: DeviceOptions, config: AttentionGuidedRLConfig, model: PlannedModel) -> str | None:
    """Name the model that is measured; ``None`` where a GPU is planned for."""
    if device.is_described or config.device.type != "cpu":
        return None
    name = str(model.model_name_or_path)
    if name == AUTO:
        name = choose_base_model(AUTO, config.device).name_or_path
    if is_here(name):
        return name
    if name != LLAMA:
        _expect_config(name)
    if config.use_cpu:
        raise ValueError(
            f"the weights of {name} are not on this machine, so its CPU cannot be measured with them; fetch them with: "
            f"hf download {name}, or describe a GPU (--gpu_memory_gib 16)"
        )
    logger.info("The weights of %s are not on this machine, so nothing is measured; planned for is a GPU", name)
    return None


def _plan_here(
    name: str, device: DeviceOptions, config: AttentionGuidedRLConfig, model: PlannedModel, console: Console
) -> None:
    """Plan for the CPU of this machine."""
    if model.load_in_4bit or model.load_in_8bit:
        raise ValueError("a plan for a CPU is measured with whole weights; leave load_in_4bit and load_in_8bit out")
    set_threads(config.num_threads)
    free = free_memory_gib(config.device)
    base, tokenizer = load_named_model(name, config.device, {"dtype": model.dtype})
    shape = ModelShape.from_config(base.config)
    lora = default_lora_config(base)
    lora.r = model.lora_r
    policy = PolicyModel.of(add_adapter(base, lora), tokenizer, config)
    separators = Separators.encode(PlainTextEncoder(tokenizer), config)
    run = RunShape.from_config(
        config,
        weight_bits=32 if base.dtype.itemsize == 4 else 16,
        lora_rank=model.lora_r,
        joint=policy.can_read_jointly,
        on_cpu=True,
        separators=separators,
    )
    logger.info("Measuring a rollout and an update on this CPU")
    measured = measure(policy, separators, config)
    budget = None if free is None else int(free * GIBIBYTE)
    _print(shape, run, measured.speed, budget, (device, config), console)
    console.print(_described(measured), soft_wrap=True)


def _described(measured: Measurement) -> str:
    speed = measured.speed
    seconds = measured.reading_seconds + measured.decoding_seconds + measured.update_seconds
    return (
        f"measured on this CPU ({describe_threads()}) in {seconds:.1f} s, beside whatever else runs: "
        f"{speed.reading:.0f} tokens per second read, {speed.decoding:.1f} of each query written, {speed.update:.0f} "
        "trained on; loading, calibration and evaluations are extra"
    )


def _print(
    shape: ModelShape,
    run: RunShape,
    speed: Accelerator | MeasuredSpeed,
    free_bytes: int | None,
    options: tuple[DeviceOptions, AttentionGuidedRLConfig],
    console: Console,
) -> None:
    device, config = options
    kept = expected_kept_fraction(config.filter_threshold) if device.kept_fraction is None else device.kept_fraction
    plan, time = plan_memory(shape, run), plan_time(shape, run, speed, 1.0 if kept is None else round(kept, 2))
    what, seconds = f"{config.num_episodes:,} episodes", time.seconds * config.num_episodes
    if config.warm_start_episodes:
        what += f" after {config.warm_start_episodes:,} of a warm start"
        seconds += warm_start_seconds(shape, run, speed) * config.warm_start_episodes
    console.print(memory_table(plan))
    console.print(facts_table(shape, run, time, free_bytes, (what, seconds), device.price_per_hour))
    if free_bytes is not None:
        warning = memory_warning(plan, free_bytes)
        fits = f"fits: {plan.peak_bytes / GIBIBYTE:.2f} of {free_bytes / GIBIBYTE:.2f} GiB"
        console.print(warning or fits, soft_wrap=True)
