"""One part of what only a GPU can answer, in this process; `gpu` starts it and completes its file.

    python tests/benchmarks/gpu_parts.py PART FILE DEVICE SECONDS [--since TIME] [--tiny] [--recipes NAME,NAME]

Every number is written as soon as it is there. Ends with 3 where a part cannot run here, and says why in the file.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu import ROOT, read, write
from harness import PeakMemory, time_in_turn
from rollout import TOKENS, Floor, sample
from scene import SEED

import planning_peaks  # isort: skip  # its imports need the path that scene sets
from tiny import (
    OPTIONS,
    adapted,
    article_texts,
    byte_level_tokenizer,
    random_batch,
    save_tiny_llama,
    tiny_llama,
    write_rows,
)

from attention_rl_trainer.errors import BaseModelError, free_memory_gib
from attention_rl_trainer.models.base import OFFLINE, load_base_model
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.models.readers import open_readers
from attention_rl_trainer.planning.footprint import GIBIBYTE, plan_memory
from attention_rl_trainer.planning.sizes import LLAMA_3_2_3B, ModelShape, RunShape
from attention_rl_trainer.planning.timing import Accelerator, Forward, plan_time
from attention_rl_trainer.records.ledger import LEDGER_NAME, LedgerRow
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.types import Trajectory

sys.path.insert(0, str(ROOT / "tests" / "gpu"))
from moving import moved  # beside the tests of the device

CANNOT_RUN = 3
# Bytes and dense bfloat16 operations per second by the makers' data sheets; the first whose words are all in the
# card's name.
CARDS: dict[tuple[str, ...], Accelerator] = {
    ("H200",): Accelerator(4.8e12, 989e12),
    ("H100", "PCIe"): Accelerator(2.0e12, 756e12),
    ("H100", "NVL"): Accelerator(3.9e12, 835e12),
    ("H100",): Accelerator(3.35e12, 989e12),
    ("A100", "80GB"): Accelerator(1.94e12, 312e12),
    ("A100",): Accelerator(1.555e12, 312e12),
    ("L40S",): Accelerator(864e9, 362e12),
    ("L4",): Accelerator(300e9, 121e12),
    ("A10",): Accelerator(600e9, 125e12),
    ("A4000",): Accelerator(448e9, 76.7e12),
    ("4090",): Accelerator(1008e9, 165e12),
    ("T4",): Accelerator(320e9, 65e12),
}
# What a plan takes for granted where nothing was measured (`attention-rl plan`).
_ATTAINED = 0.4
# Of the free memory, what a run is cut down to.
_SHARE_OF_MEMORY = 0.85
# The command's code, where its script may not be installed; and how it ends after Ctrl-C.
_COMMAND = "import sys; from attention_rl_trainer.cli import main; sys.exit(main())"
_STOPPED = 130
# Of a recipe's time: when it is told to stop, and when it must have stopped, with a checkpoint and a report.
_TRAINING_SHARE, _STOPPING_SHARE = 0.7, 0.95
# The largest peak that leaves a card of 16 GB room for its context.
_CLAIM_GIB = 15.5
SMOLLM2_135M = ModelShape(
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_query_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocabulary_size=49152,
    context_length=8192,
)
TINY = ModelShape(
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_query_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocabulary_size=420,
    context_length=4096,
)
EMBEDDED, LLAMA_3B = "embedded", "llama-3.2-3b"


class CannotRunError(Exception):
    """A part cannot run here; says why."""


class Result:
    """A part's file, written at each addition."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = read(path)

    def section(self, name: str) -> dict[str, Any]:
        """What a section holds so far."""
        return dict(self._content.get(name, {}))

    def put(self, section: str, name: str, value: Any) -> None:
        """Set an entry of a section."""
        self._content.setdefault(section, {})[name] = value
        write(self._path, self._content)

    def figure(self, name: str, value: float | None) -> None:
        """Add a named figure, rounded to four digits."""
        self.put("figures", name, None if value is None else float(f"{value:.4g}"))

    def cannot_run(self, reason: str) -> None:
        """Say why the part was not run."""
        write(self._path, self._content | {"reason": reason})


@dataclass(frozen=True)
class Scale:
    """How large everything is: for figures, or to rehearse."""

    device: torch.device
    is_tiny: bool
    seconds: int
    """For the part, whose process is killed then."""
    recipes: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, ModelShape]:
        """The models, the more telling first."""
        return {LLAMA_3B: TINY, EMBEDDED: TINY} if self.is_tiny else {LLAMA_3B: LLAMA_3_2_3B, EMBEDDED: SMOLLM2_135M}

    @property
    def rows(self) -> int:
        """B."""
        return 2 if self.is_tiny else 64

    @property
    def kept(self) -> int:
        """Trajectories of an update."""
        return 2 if self.is_tiny else 16

    @property
    def steps(self) -> int:
        """T."""
        return 2 if self.is_tiny else 8

    def repeats(self, name: str) -> int:
        """Rounds that count; two for the model that the targets are about."""
        return 2 if name == LLAMA_3B and not self.is_tiny else 1

    @property
    def accelerator(self) -> Accelerator | None:
        """What the card can do, ``None`` for one that is not in the table."""
        if self.device.type == "cpu":
            return Accelerator(1e10, 1e11)  # of no meaning: for the rehearsal alone
        words = set(re.split(r"[\s-]+", torch.cuda.get_device_name(self.device)))
        return next((found for names, found in CARDS.items() if words.issuperset(names)), None)

    def run_shape(self, **changes: Any) -> RunShape:
        """A run of T steps over T pairs."""
        options: dict[str, Any] = {
            "num_kv_pairs": self.steps + 1,
            "subset_fraction": 1.0,
            "tokens_per_query": TOKENS,
            "tokens_per_key": TOKENS,
            "tokens_per_value": TOKENS,
            "generation_batch_size": self.rows,
            "training_batch_size": self.kept,
            "optimizer_bytes_per_parameter": 8,
            "on_cpu": self.device.type == "cpu",
        }
        return RunShape(**options | changes)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def waiting(self, run: Callable[[], object]) -> Callable[[], None]:
        """Let something wait for the device at its end, so that a clock sees all of it."""

        def run_and_wait() -> None:
            run()
            self.synchronize()

        return run_and_wait

    def free(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def fitting(run: RunShape, shape: ModelShape, scale: Scale) -> RunShape:
    """Halve the batches of rollout and update until the plan says that they fit into what is free."""
    free = free_memory_gib(scale.device)
    budget = _SHARE_OF_MEMORY * GIBIBYTE * (free or 1e9)
    while plan_memory(shape, run).peak_bytes > budget and run.generation_batch_size > 1:
        run = replace(
            run,
            generation_batch_size=run.generation_batch_size // 2,
            training_batch_size=max(1, run.training_batch_size // 2),
        )
    return run


# --- models ---------------------------------------------------------------------------------------------------------


def random_model(shape: ModelShape, dtype: torch.dtype, device: torch.device, **changes: Any) -> Any:
    """A Llama of random weights that are drawn on the device, in their own precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return tiny_llama(
                hidden_size=shape.hidden_size,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_query_heads,
                num_key_value_heads=shape.num_key_value_heads,
                head_dim=shape.head_dim,
                intermediate_size=shape.intermediate_size,
                vocab_size=shape.vocabulary_size,
                tie_word_embeddings=shape.tied_embeddings,
                max_position_embeddings=4096,
                initializer_range=0.02,
                attention_dropout=0.0,
                **changes,
            )
    finally:
        torch.set_default_dtype(before)


def adapted_policy(model: Any, options: PolicyOptions) -> PolicyModel:
    """Put an adapter that matters on a model; every id but the first 17 is allowed."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return PolicyModel(adapted(model, scale=0.02), torch.arange(17, vocabulary), options)


def policy_of(name: str, run: RunShape, scale: Scale) -> tuple[PolicyModel, str]:
    """One of the two models in bfloat16, and whether its weights are "real" or "random"."""
    if name == EMBEDDED and not scale.is_tiny:
        try:
            return adapted_policy(load_base_model(OFFLINE, dtype=torch.bfloat16, device=scale.device), run), "real"
        except BaseModelError:
            pass  # its shape will do
    return adapted_policy(random_model(scale.shapes[name], torch.bfloat16, scale.device), run), "random"


def sampler_of(policy: PolicyModel, run: RunShape) -> TrajectorySampler:
    """A sampler of a run's lengths."""
    return TrajectorySampler(policy, KVMemoryEnvironment(), planning_peaks.SEPARATORS, run, SEED)


# --- smoke ----------------------------------------------------------------------------------------------------------


def smoke(result: Result, scale: Scale) -> None:
    """Run the tests of the device; each with its outcome, its time, and what it recorded."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--ignore=tests/gpu/test_rehearsal.py", "--quiet"]
    # The suite's own options need plug-ins, and a warning of another version of torch must not end a check here.
    command += ["--override-ini=addopts=", "-W", "default", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records"
        names = {"ATTENTION_RL_TEST_DEVICE": scale.device.type, "ATTENTION_RL_TEST_RECORDS": str(records)}
        # Plug-ins that other packages bring take seconds, and some the device's memory.
        names["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | names)
        ended = None
        while ended is None:
            # What there is by then is written.
            with suppress(subprocess.TimeoutExpired):
                ended = process.wait(timeout=1)
            written = records.read_text(encoding="utf-8") if records.is_file() else ""
            # Of the last line there may be a part only.
            tests = [dict(json.loads(line)) for line in written.rpartition("\n")[0].splitlines()]
            for test in tests[len(result.section("tests")) :]:
                result.put("tests", test["name"], test)
    outcomes = [test["outcome"] for test in tests]
    for outcome in ("passed", "failed", "skipped"):
        result.figure(f"smoke.{outcome}", outcomes.count(outcome))
    if ended != 0:
        raise RuntimeError(f"{outcomes.count('failed')} tests failed; pytest ended with {ended}")


# --- floor ----------------------------------------------------------------------------------------------------------


def floor(result: Result, scale: Scale) -> None:
    """Rollout and update against their bare forwards, and decoding against the memory's bandwidth."""
    for name, shape in scale.shapes.items():
        run = fitting(scale.run_shape(), shape, scale)
        policy, weights = policy_of(name, run, scale)
        batches = {"B": run.generation_batch_size, "micro-batch": run.training_batch_size}
        sizes = {"T": scale.steps, "L = K = V": TOKENS, "kept": scale.kept, "rounds": scale.repeats(name)}
        result.put("settings", name, {"weights": weights, "dtype": "bfloat16"} | batches | sizes)
        result.put("settings", f"{name}, decoded from graphs", policy.can_replay)
        measure_decoding(result, name, policy, 1, run, scale)
        trajectory = measure_rollout(result, name, policy, run, scale)
        measure_decoding(result, name, policy, run.generation_batch_size, run, scale)
        measure_update(result, name, policy, trajectory, run, scale)
        del policy, trajectory
        scale.free()


def measure_rollout(result: Result, name: str, policy: PolicyModel, run: RunShape, scale: Scale) -> Trajectory:
    """Time a rollout, the same without graphs, and its floor in turn; returns a rollout."""
    rows = run.generation_batch_size
    batch = random_batch(rows, scale.steps, TOKENS, TOKENS)
    bare = Floor(policy, batch, planning_peaks.SEPARATORS, scale.steps)
    bare.token_ids %= scale.shapes[name].vocabulary_size
    for attribute in ("keys", "prompt", "token_ids"):
        setattr(bare, attribute, getattr(bare, attribute).to(scale.device))
    plain = PolicyModel(policy.model, policy.allowed_ids, replace(run, cuda_graphs=False))
    found: list[Trajectory] = []

    def roll_out(writer: PolicyModel) -> None:
        found[:] = [sample(sampler_of(writer, run), batch)]

    contenders = {
        "ours": scale.waiting(partial(roll_out, policy)),
        "without graphs": scale.waiting(partial(roll_out, plain)),
        "floor": scale.waiting(bare.with_our_kernels),
    }
    # In the first round kernels are loaded and chosen, for each length of the context anew.
    timings = time_in_turn(contenders, scale.repeats(name))
    result.put("rounds, s", f"{name}, rollout", {contender: timing.seconds for contender, timing in timings.items()})
    seconds = timings["ours"].median
    result.figure(f"{name}.rollout.floor_ratio", seconds / timings["floor"].median)
    result.figure(
        f"{name}.rollout.without_graphs.floor_ratio", timings["without graphs"].median / timings["floor"].median
    )
    result.figure(f"{name}.rollout.query_tokens_per_second", rows * scale.steps * TOKENS / seconds)
    result.figure(f"{name}.rollout.forward_tokens_per_second", found[0].forward_tokens / seconds)
    return found[0]


def measure_decoding(result: Result, name: str, policy: PolicyModel, rows: int, run: RunShape, scale: Scale) -> None:
    """Time one-token forwards of both readers in the middle of a trajectory, with graphs and without."""
    context, card = run.layout.context_tokens(scale.steps // 2), scale.accelerator
    prompt = torch.randint(17, 400, (rows, context), device=scale.device)
    noise = torch.rand(rows, TOKENS, dtype=torch.float64, device=scale.device)
    # Without graphs each takes as long as many with them.
    for label, replay, repeats in (
        (f"{name}.decode.b{rows}", True, 5),
        (f"{name}.decode.b{rows}.without_graphs", False, 2),
    ):
        # The cache grows with each query.
        cached = context + TOKENS + repeats * TOKENS / 2
        forward = Forward("decode", 1, 2 * rows, 2 * rows, cached, cached, 2 * rows)
        bytes_read = forward.bytes_read(scale.shapes[name], run)
        with policy.inference():
            readers = open_readers(policy, prompt, context + (repeats + 1) * TOKENS, replay=replay)
            # Kernels are loaded, and the first graph is captured.
            readers.write_queries(noise, noise)
            scale.synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                readers.write_queries(noise, noise)
            scale.synchronize()
            seconds = (time.perf_counter() - started) / (repeats * TOKENS)
        result.figure(f"{label}.milliseconds_per_token", 1e3 * seconds)
        result.figure(f"{label}.query_tokens_per_second", rows / seconds)
        result.figure(f"{label}.bandwidth_share", card and bytes_read / seconds / card.bandwidth)


def measure_update(
    result: Result, name: str, policy: PolicyModel, trajectory: Trajectory, run: RunShape, scale: Scale
) -> None:
    """Time the gradient of kept trajectories and its bare passes in turn."""
    benchmark = _update_benchmark()
    rows = torch.arange(scale.kept, device=scale.device) % len(trajectory.token_ids)
    made_up = benchmark.make_kept(trajectory.token_ids[rows], trajectory.query_starts)
    kept = moved(made_up, scale.device)
    update = benchmark.Update(policy, kept, run.training_batch_size)
    update.positions = update.positions.to(scale.device)
    contenders = {
        "ours": scale.waiting(update.ours),
        "floor": scale.waiting(partial(update.bare, policy.head.linear)),
    }
    timings = time_in_turn(contenders, scale.repeats(name))
    result.put("rounds, s", f"{name}, update", {contender: timing.seconds for contender, timing in timings.items()})
    seconds = timings["ours"].median
    result.figure(f"{name}.update.floor_ratio", seconds / timings["floor"].median)
    result.figure(f"{name}.update.tokens_per_second", kept.token_ids.numel() / seconds)
    policy.model.eval()


def _update_benchmark() -> types.ModuleType:
    """The benchmark of the update, which compares optimizers too and so imports bitsandbytes: not needed here."""
    name = "bitsandbytes"
    missing = {} if importlib.util.find_spec(name) else {name: types.ModuleType(name)}
    with mock.patch.dict(sys.modules, missing):
        return importlib.import_module("update")


# --- plan -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A setting that a plan is held against."""

    shape: ModelShape
    run: RunShape
    halves: tuple[str, ...]


def planned_settings(scale: Scale) -> dict[str, Planned]:
    """Four settings, the most telling first; in each another part of a step dominates."""
    big, small = scale.shapes[LLAMA_3B], scale.shapes[EMBEDDED]
    wide = small if scale.is_tiny else replace(small, num_layers=2, vocabulary_size=128256)
    float32 = scale.run_shape(weight_bits=32, training_batch_size=2 if scale.is_tiny else 4)
    return {
        "llama3.2_3b.yaml": Planned(big, recipe_run(scale), ("rollout", "update")),
        "3b, rollout": Planned(big, scale.run_shape(), ("rollout",)),
        "embedded shape, update": Planned(small, scale.run_shape(), ("update",)),
        "float32, wide vocabulary, update": Planned(wide, float32, ("update",)),
    }


def recipe_run(scale: Scale) -> RunShape:
    """The run of llama3.2_3b.yaml; in a rehearsal its batches alone are smaller."""
    from trl import TrlParser  # only here: the other settings do without it

    from attention_rl_trainer.config import AttentionGuidedRLConfig
    from attention_rl_trainer.configs import find_config

    flags = ["--config", str(find_config("llama3.2_3b")), "--use_cpu", str(scale.device.type == "cpu")]
    config, _ = TrlParser((AttentionGuidedRLConfig,)).parse_args_and_config(
        flags, return_remaining_strings=True, fail_with_unknown_args=False
    )
    run = RunShape.from_config(config, weight_bits=16, on_cpu=scale.device.type == "cpu")
    # The optimizer that is measured is PyTorch's own.
    run = replace(run, optimizer_bytes_per_parameter=8)
    return replace(run, generation_batch_size=2, training_batch_size=1) if scale.is_tiny else run


def plan(result: Result, scale: Scale) -> None:
    """Peak and time against the plan's."""
    small = scale.run_shape(num_kv_pairs=3, generation_batch_size=2, training_batch_size=2)
    # What is allocated once, such as workspaces, is there before anything is measured.
    measure_halves(
        ("rollout", "update"), adapted_policy(random_model(TINY, torch.bfloat16, scale.device), small), small
    )
    for name, planned in planned_settings(scale).items():
        try:
            measure_planned(result, name, planned, scale)
        except torch.OutOfMemoryError as error:
            result.put("out of memory", name, str(error)[:300])
        scale.free()


def measure_planned(result: Result, name: str, planned: Planned, scale: Scale) -> None:
    """Measure one setting, and compare."""
    shape, run = planned.shape, planned.run
    dtype = torch.float32 if run.weight_bits == 32 else torch.bfloat16

    def build() -> PolicyModel:
        return adapted_policy(random_model(shape, dtype, scale.device), run)

    policy, peak_gib = measured_peak(build, partial(measure_halves, planned.halves, run=run), scale)
    card, planned_seconds, seconds = scale.accelerator, {}, {}
    for half in planned.halves:
        started = time.perf_counter()
        measure_halves((half,), policy, run)
        scale.synchronize()
        seconds[half] = time.perf_counter() - started
        if card is not None:
            times = plan_time(shape, run, replace(card, attained=_ATTAINED), kept_fraction=1.0)
            rows = run.generation_batch_size if half == "rollout" else run.micro_batch_size
            each = times.rollout_seconds if half == "rollout" else times.update_seconds
            planned_seconds[half] = rows * each
    memory = plan_memory(shape, run)
    phases = {phase: memory.phase_bytes(phase) / GIBIBYTE for phase in _phases_of(planned.halves)}
    figures = {
        "planned GiB": max(phases.values()),
        "phase": max(phases, key=lambda phase: phases[phase]).value,
        "measured GiB": peak_gib,
        "planned s": planned_seconds,
        "measured s": seconds,
        "B": run.generation_batch_size,
        "micro-batch": run.micro_batch_size,
    }
    if scale.device.type == "cuda":
        figures["reserved GiB"] = torch.cuda.max_memory_reserved(scale.device) / GIBIBYTE
    result.put("settings", name, figures)
    # In a rehearsal there may be no new peak.
    result.figure(f"{name}.planned_of_measured_peak", max(phases.values()) / peak_gib if peak_gib > 0 else None)
    for half, planned_half in planned_seconds.items():
        result.figure(f"{name}.{half}.planned_of_measured_time", planned_half / seconds[half])
        # What share of the card's limits `attained` should be for the plan to be right.
        result.figure(f"{name}.{half}.attained", _ATTAINED * planned_half / seconds[half])
    if name == "llama3.2_3b.yaml":
        result.put("claims", f"llama3.2_3b.yaml fits into 16 GB: peak at most {_CLAIM_GIB} GiB", peak_gib <= _CLAIM_GIB)


def _phases_of(halves: Sequence[str]) -> tuple[Any, ...]:
    phases = {"rollout": planning_peaks.ROLLOUT_PHASES, "update": planning_peaks.UPDATE_PHASES}
    return tuple(phase for half in halves for phase in phases[half])


def measure_halves(halves: Sequence[str], policy: PolicyModel, run: RunShape) -> None:
    """Roll a batch out, take an optimizer step, or both."""
    make_kept = planning_peaks.kept_trajectories
    on_device = mock.patch.object(
        planning_peaks, "kept_trajectories", lambda shape: moved(make_kept(shape), policy.device)
    )
    with on_device:
        for half in halves:
            (planning_peaks.rollout if half == "rollout" else planning_peaks.update)(policy, run)
    policy.model.zero_grad()


def measured_peak(
    build: Callable[[], PolicyModel], work: Callable[[PolicyModel], None], scale: Scale
) -> tuple[PolicyModel, float]:
    """Build a policy and work with it; returns it, and the peak beyond what was there before, GiB."""
    if scale.device.type == "cpu":
        with PeakMemory() as memory:
            policy = build()
            work(policy)
        return policy, (memory.peak_mib - memory.before_mib) / 1024
    before = torch.cuda.memory_allocated(scale.device)
    policy = build()
    torch.cuda.reset_peak_memory_stats(scale.device)
    work(policy)
    return policy, (torch.cuda.max_memory_allocated(scale.device) - before) / GIBIBYTE


# --- peer -----------------------------------------------------------------------------------------------------------


def peer(result: Result, scale: Scale) -> None:
    """Queries by our rollout against completions by TRL's GRPOTrainer, on the same model and batch."""
    try:
        import peer as benchmark
    except ModuleNotFoundError as error:
        raise CannotRunError(f"{error.name} is not installed") from error

    for name in (EMBEDDED, LLAMA_3B):
        tokenizer = byte_level_tokenizer(article_texts(30))
        run = fitting(scale.run_shape(), scale.shapes[name], scale)
        # By default a Llama's end of text is id 2, here an ordinary token.
        ends = {"eos_token_id": tokenizer.eos_token_id}
        policy = adapted_policy(random_model(scale.shapes[name], torch.bfloat16, scale.device, **ends), run)
        batch = random_batch(run.generation_batch_size, scale.steps, TOKENS, TOKENS)
        contexts = benchmark.build_contexts(batch, planning_peaks.SEPARATORS, scale.steps, TOKENS)
        scene = benchmark.Scene(policy, tokenizer, moved(contexts, scale.device))
        result.put("settings", name, {"weights": "random", "B": run.generation_batch_size, "T": scale.steps})
        timings = benchmark.measure(scene, 1 if scale.is_tiny else 2)
        result.put("rounds, s", name, {reader: timing.seconds for reader, timing in timings.items()})
        for reader, timing in timings.items():
            result.put("query tokens per second", f"{name}, {reader}", contexts.query_tokens / timing.median)
        result.figure(f"{name}.trl_speedup", timings[benchmark.TRL].median / timings[benchmark.OURS].median)
        del policy, scene
        scale.free()


# --- learning -------------------------------------------------------------------------------------------------------


def learning(result: Result, scale: Scale) -> None:
    """Run recipes as far as they get in their share of the time, and write their curves from what there is.

    Raises:
        RuntimeError: a run ended by itself with an error; the others were run all the same.
    """
    chosen, failed = recipes(scale), []
    runs = ROOT / "out" / "gpu"
    runs.mkdir(parents=True, exist_ok=True)
    for name, flags in chosen.items():
        folder = Path(tempfile.mkdtemp(prefix=f"{Path(name).stem}-", dir=runs))
        command = [sys.executable, "-c", _COMMAND, "train", *flags, "--output_dir", str(folder)]
        command += ["--use_cpu", str(scale.device.type == "cpu"), "--disable_tqdm", "true"]
        put = partial(put_curve, result, name, folder, time.monotonic())
        ended = run_for(command, scale.seconds / len(chosen), put)
        put(ended)
        failed += [name] if ended == "failed" else []
    if failed:
        raise RuntimeError(f"recipes that ended with an error: {', '.join(failed)}")


def run_for(command: Sequence[str], seconds: float, watch: Callable[[], None], every: float = 10.0) -> str:
    """Run a command, stop it as Ctrl-C does when most of its time is over, and kill it where it does not stop.

    Args:
        command: leaves a checkpoint when it is stopped.
        seconds: for all of that.
        watch: is called after each so many seconds.
        every: so many.

    Returns:
        How it ended: "done", "stopped", "killed" or "failed".
    """
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)

    def ends_by(share: float) -> bool:
        while True:
            left = max(0.0, started + share * seconds - time.monotonic())
            try:
                process.wait(timeout=min(left, every))
            except subprocess.TimeoutExpired:
                watch()
                if left <= every:
                    return False
            else:
                return True

    if not ends_by(_TRAINING_SHARE):
        process.send_signal(signal.SIGINT)
        if not ends_by(_STOPPING_SHARE):
            process.kill()
            process.wait()
            return "killed"
    return {0: "done", _STOPPED: "stopped"}.get(process.returncode, "failed")


def put_curve(result: Result, name: str, folder: Path, started: float, ended: str = "running") -> None:
    """Write what a run's ledger says so far, and the tables of a run that came to its end."""
    rows = read_whole_lines(folder / LEDGER_NAME)
    entry: dict[str, Any] = {"ended": ended, "seconds": round(time.monotonic() - started, 1), "folder": str(folder)}
    entry |= {"episodes": len(rows), "tenths: mean, standard error": curve(rows)}
    entry["held out"] = {path.stem: read(path) for path in sorted(folder.glob("evaluation/*/*.json"))}
    result.put("runs", name, entry)


def read_whole_lines(path: Path) -> list[LedgerRow]:
    """Read a ledger that is being written, or whose run was killed while it wrote."""
    written = path.read_bytes() if path.is_file() else b""
    return [LedgerRow.from_json(json.loads(line)) for line in written.rpartition(b"\n")[0].splitlines()]


def curve(rows: Sequence[LedgerRow]) -> list[dict[str, Any]]:
    """Reward and gains of each tenth of the episodes, nats per value token; empty below two episodes in each."""
    tenths = []
    for tenth in range(10 if len(rows) >= 20 else 0):
        part = rows[len(rows) * tenth // 10 : len(rows) * (tenth + 1) // 10]
        entry: dict[str, Any] = {"episodes": len(part)}
        for name in ("reward", "query_gain", "model_gain"):
            values = [getattr(row, name) for row in part]
            error = statistics.stdev(values) / len(values) ** 0.5
            entry[name] = [round(statistics.fmean(values), 5), round(error, 5)]
        tenths.append(entry)
    return tenths


def recipes(scale: Scale) -> dict[str, list[str]]:
    """Command-line flags of the runs, by name."""
    if not scale.is_tiny:
        return {name: ["--config", name] for name in scale.recipes}
    folder = Path(tempfile.mkdtemp())
    texts = article_texts(30)
    save_tiny_llama(folder / "model", texts)
    rows = write_rows(folder / "articles.jsonl", [{"title": str(n), "text": text} for n, text in enumerate(texts)])
    options = folder / "options.yaml"
    options.write_text(OPTIONS, encoding="utf-8")
    data = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(rows), "--num_episodes", "32"]
    return {"tiny": ["--config", str(options), *data]}


# --- the process ----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Result, Scale], None]] = {
    "smoke": smoke,
    "floor": floor,
    "plan": plan,
    "peer": peer,
    "learning": learning,
}


def main() -> int:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description="One part of the checks that need a GPU.")
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("file", type=Path)
    parser.add_argument("device", type=torch.device)
    parser.add_argument("seconds", type=int)
    parser.add_argument("--since", type=float, default=time.time(), help="when these seconds began, Unix time")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--recipes", default="")
    given = parser.parse_args()
    result = Result(given.file)
    device = torch.device("cuda", 0) if given.device.type == "cuda" else given.device
    seconds = max(1, round(given.seconds - (time.time() - given.since)))
    scale = Scale(device, given.tiny, seconds, tuple(name for name in given.recipes.split(",") if name))
    try:
        PARTS[given.part](result, scale)
    except CannotRunError as error:
        result.cannot_run(str(error))
        return CANNOT_RUN
    return 0


if __name__ == "__main__":
    sys.exit(main())
