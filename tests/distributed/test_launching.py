"""The launcher's own commands, with the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ledger_of
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_wiki.py"
CONFIGS = ROOT / "examples" / "accelerate_configs"
SHORT = [
    *("--config", "demo_wiki", "--dtype", "float32", "--optim", "adamw_torch", "--learning_rate", "1e-4"),
    *("--num_episodes", "12", "--save_episodes", "4", "--warmup_episodes", "1", "--filter_threshold", "0"),
    *("--calibration_memories", "4", "--save_total_limit", "10", "--num_threads", "1", "--disable_tqdm", "true"),
]


def launch(config: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    return subprocess.run(
        [*command, str(SCRIPT), *flags, "--output_dir", str(folder)],
        env=environment | {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_two_processes_train_the_embedded_model_as_one_does(tmp_path: Path) -> None:
    done = launch("cpu_2.yaml", tmp_path / "two", *SHORT, "--generation_batch_size", "2", "--num_processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    # At each, the processes have compared their adapters.
    assert [path.name for path in sorted((tmp_path / "two").glob("checkpoint-*"))] == [
        f"checkpoint-{step}" for step in (1, 2, 3)
    ]
    alone = launch("single.yaml", tmp_path / "one", *SHORT, "--generation_batch_size", "4", "--num_processes", "1")
    assert alone.returncode == 0, alone.stderr[-3000:]
    rows, expected = ledger_of(tmp_path / "two"), ledger_of(tmp_path / "one")
    assert any(row["verdict"] == "kept" for row in rows)
    for row, other in zip(rows, expected, strict=True):
        assert (row["episode"], row["queries"], row["order"]) == (other["episode"], other["queries"], other["order"])
    found, other_adapter = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    for name, tensor in found.items():
        assert (tensor - other_adapter[name]).abs().max() <= 1e-5, name
    state = json.loads((tmp_path / "two" / "checkpoint-3" / "attention_rl_state.json").read_text())
    assert state["updater"]["num_updates"] > 0
    # What both would say is said once.
    assert done.stderr.count("Base model") == alone.stderr.count("Base model")


def test_a_wrong_number_of_processes_is_refused(tmp_path: Path) -> None:
    done = launch("single.yaml", tmp_path / "run", *SHORT, "--num_processes", "2")
    assert done.returncode != 0
    assert "num_processes is 2, but the run was launched in 1; launch with accelerate launch --multi_gpu" in done.stderr
