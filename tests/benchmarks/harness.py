"""What the benchmarks share: fair timing, peak memory, and a report as JSON, as a section of a page, and as lines.

Contenders are timed in turn, round after round, so that whatever slows the machine down hits all of them; a figure is a
ratio of medians within one run.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "docs" / "benchmarks"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one contender, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        if len(self.seconds) == 1:
            return f"{self.median:.3g} s (once)"
        return f"{self.median:.3g} s ({min(self.seconds):.3g}–{max(self.seconds):.3g})"


def time_in_turn(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int = 5,
    *,
    warm_up: bool = True,
    once: Collection[str] = (),
) -> dict[str, Timing]:
    """Time each contender once per round.

    Args:
        contenders: what to run, by name, in this order.
        repeats: rounds that count.
        warm_up: whether a round that does not count comes first.
        once: names of those that stand beside the figures and are timed in the first counted round alone.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(0 if warm_up else 1, repeats + 1):
        for name, run in contenders.items():
            if name in once and round_number != 1:
                continue
            gc.collect()
            started = time.perf_counter()
            run()
            elapsed = time.perf_counter() - started
            if round_number > 0:
                seconds[name].append(elapsed)
            print(f"  round {round_number}: {name} {elapsed:.3f} s", file=sys.stderr, flush=True)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


class PeakMemory:
    """Resident memory of this process before a block, and its peak within it, in MiB (Linux)."""

    def __init__(self) -> None:
        self.before_mib = 0.0
        self.peak_mib = 0.0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.before_mib = self._status("VmRSS")
        # Sets the peak back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *exception: object) -> None:
        self.peak_mib = self._status("VmHWM")

    @staticmethod
    def _status(name: str) -> float:
        found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is None:
            raise RuntimeError(f"/proc/self/status has no {name}")
        return int(found.group(1)) / 1024


def run_in_process(script: str, *arguments: str, return_freed_memory: bool = False) -> dict[str, Any]:
    """Run a benchmark's script in a process of its own, for a peak of its own.

    Args:
        script: its file.
        arguments: its arguments; its last line must be JSON.
        return_freed_memory: whether the allocator gives back whatever is freed. By default it keeps blocks below a
            size that moves, which adds to the peak what nobody uses.
    """
    command = [sys.executable, script, *arguments]
    environment = dict(os.environ)
    if return_freed_memory:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


@dataclass
class Report:
    """The outcome of one benchmark.

    Attributes:
        name: its section of the page and its JSON file.
        command: what anyone runs to get it.
        settings: shapes and options.
        figures: the named figures.
        blocks: Markdown paragraphs and tables.
    """

    name: str
    command: str
    settings: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)

    def figure(self, name: str, value: float) -> None:
        """Add a named figure."""
        self.figures[name] = float(value)

    def paragraph(self, text: str) -> None:
        """Add a paragraph to the page."""
        self.blocks.append(text)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table to the page."""
        lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
        self.blocks.append("\n".join(lines))

    def write(self) -> None:
        """Write JSON and the page's section, and print one ``name: value`` line for each figure."""
        facts = {"commit": commit(), "machine": machine(), "versions": versions()}
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"{self.name}.json"
        file.write_text(json.dumps({**asdict(self), **facts}, indent=2) + "\n", encoding="utf-8")
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        machine_facts = f"{facts['machine']['cpu']}, {facts['machine']['threads']} threads"
        source = f"`{self.command}`, commit {facts['commit']}, {machine_facts}."
        figures = "\n".join(f"- `{name}`: **{value:.3g}**" for name, value in self.figures.items())
        section = "\n\n".join([source, f"Settings: {settings}.", figures, *self.blocks])
        write_section(self.name, section)
        for name, value in self.figures.items():
            print(f"{name}: {value:.4g}", flush=True)


def write_section(name: str, text: str) -> None:
    """Replace what stands between the page's two marks of a benchmark.

    Args:
        name: the benchmark.
        text: Markdown.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = PAGE.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{PAGE.name} needs the lines {begin} and {end} once each, where the figures go")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    replaced = re.sub(pattern, lambda match: f"{begin}\n\n{text}\n\n{end}", page, flags=re.DOTALL)
    PAGE.write_text(replaced, encoding="utf-8")


def commit() -> str:
    """The commit that is checked out, with a mark where sources differ from it."""
    paths = ["attention_rl_trainer", "tests/benchmarks", "constraints.txt"]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """CPU, threads, memory and Python."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "python": platform.python_version(),
        "bfloat16": torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that matter."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
