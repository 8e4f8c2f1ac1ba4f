"""The command for a GPU runs without one: it skips, it survives its parts, and its cheapest part runs on the CPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402  # is beside the benchmarks, which run as scripts
import gpu_parts  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_without_cuda_it_says_what_it_skips() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--only", "floor,smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("skipped smoke, floor: torch ")
    assert "finds no CUDA GPU" in done.stdout


def test_without_torch_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu_facts.py").write_text("import no_such_package", encoding="utf-8")
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("skipped smoke, floor, plan, peer: ModuleNotFoundError: No module named 'no_such_package'")


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--only", "smok"], "smok: the parts are smoke, floor"), (["--device", "cpu"], "add --tiny")],
)
def test_a_wrong_command_is_refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse_arguments(given)
    assert message in capsys.readouterr().err


def test_parts_run_in_the_order_of_worth_and_learning_on_request() -> None:
    assert gpu.parse_arguments(["--only", "peer,smoke"]).parts == ["smoke", "peer"]
    assert gpu.parse_arguments([]).parts == ["smoke", "floor", "plan", "peer"]
    assert sum(gpu.LIMITS[part] for part in gpu.parse_arguments([]).parts) <= 9 * 60


# Stands in for gpu_parts.py: writes a figure, and ends as its name says.
PART = """
import json, sys, time
part, path = sys.argv[1:3]
content = json.load(open(path))
json.dump(content | {"figures": {"half": 1}}, open(path, "w"))
print("last words", flush=True)
if part == "slow":
    time.sleep(60)
sys.exit({"done": 0, "skipped": 3, "failed": 1}[part])
"""


@pytest.mark.parametrize(
    ("part", "status"), [("done", "done"), ("skipped", "skipped"), ("failed", "failed"), ("slow", "out of time")]
)
def test_what_a_part_has_measured_outlives_it(
    part: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu_parts.py").write_text(PART, encoding="utf-8")
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    arguments = argparse.Namespace(output=tmp_path, device="cpu", recipes="", tiny=True)
    content = gpu.run_part(part, arguments, {"commit": "abc"}, {}, 0.7 if part == "slow" else 30)
    assert content == json.loads((tmp_path / f"{part}.json").read_text())
    assert (content["status"], content["figures"], content["commit"]) == (status, {"half": 1}, "abc")
    assert ("output_tail" in content) == (status in ("failed", "out of time"))
    assert gpu.describe(content).startswith(f"{part}: {status} after")


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA RTX A4000", 448e9),
        ("NVIDIA L40S", 864e9),
        ("Another", None),
    ],
)
def test_a_card_is_known_by_its_name(name: str, bandwidth: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    card = gpu_parts.Scale(torch.device("cuda"), False, 60).accelerator
    assert (card and card.bandwidth) == bandwidth


def test_the_shapes_of_the_models_are_those_of_their_weights() -> None:
    sizes = {name: shape.parameters for name, shape in gpu_parts.Scale(torch.device("cpu"), False, 60).shapes.items()}
    assert sizes == {"llama-3.2-3b": 3_212_749_824, "embedded": 134_515_008}


@pytest.mark.slow
def test_floors_are_measured_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "floor.json"
    scale = gpu_parts.Scale(torch.device("cpu"), True, 60)
    monkeypatch.setattr(gpu_parts.Scale, "shapes", property(lambda self: {"embedded": gpu_parts.TINY}))
    gpu_parts.floor(gpu_parts.Result(path), scale)
    content: dict[str, Any] = json.loads(path.read_text())
    figures = content["figures"]
    assert {name for name in figures if name.endswith("floor_ratio")} == {
        "embedded.rollout.floor_ratio",
        "embedded.update.floor_ratio",
    }
    assert all(value > 0 for value in figures.values())
    assert 0 < figures["embedded.decode.b2.bandwidth_share"] < 1
    assert content["settings"]["embedded"]["B"] == 2
