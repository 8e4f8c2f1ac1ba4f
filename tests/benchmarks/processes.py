"""Rollouts in two processes beside one, each on one thread: what each of two still gets done of what one alone does.

In a round every process rolls out a batch of its own and hears the rewards of the other, as in training; the processes
begin a round together. First one process, then two, in turn.

    python tests/benchmarks/processes.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import ROOT, Report, Timing
from torch import distributed as dist

TOKENS, STEPS = 20, 4


def run_rank(index: int, count: int, meeting: str, rows: int, rounds: int) -> list[float]:
    """Time rounds in this process, number ``index`` of ``count``; the first does not count."""
    from rollout import sample
    from scene import new_sampler, offline_batch, offline_policy

    from attention_rl_trainer.processes import Processes

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=count)
    processes = Processes(index, count)
    policy, tokenizer = offline_policy()
    batch = offline_batch(tokenizer, rows * count, STEPS, TOKENS).select_rows(processes.share(rows * count))
    sampler = new_sampler(policy, tokenizer, STEPS, TOKENS)
    seconds = []
    for _ in range(rounds + 1):
        processes.gather(None)
        started = time.perf_counter()
        processes.gather(sample(sampler, batch).avg_reward)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def run_processes(count: int, rows: int, rounds: int) -> list[float]:
    """Run processes of this script together; returns the seconds of each round."""
    meeting = Path(tempfile.mkdtemp()) / "meeting"
    common = ["--count", str(count), "--meeting", str(meeting), "--rows", str(rows), "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--index", str(index), *common],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for index in range(count)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs
    return list(json.loads(outputs[0].strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    for name, kind in (("--index", int), ("--count", int), ("--meeting", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.index is not None:
        print(json.dumps(run_rank(given.index, given.count, given.meeting, given.rows, given.rounds)))
        return
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(2):
        for count in seconds:
            seconds[count] += run_processes(count, given.rows, given.rounds)
    timings = {count: Timing(tuple(values)) for count, values in seconds.items()}
    settings = {"rows in a process": given.rows, "T": STEPS, "L = K = V": TOKENS, "threads in a process": 1}
    report = Report("processes", "python tests/benchmarks/processes.py", settings)
    report.figure("processes.throughput_ratio", timings[1].median / timings[2].median)
    report.table(["processes", "a round"], [[str(count), timing] for count, timing in timings.items()])
    report.write()


if __name__ == "__main__":
    main()
