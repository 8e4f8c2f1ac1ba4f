"""The command for a GPU runs without one: it skips, it survives its parts, and its cheapest part runs on the CPU."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from records.made_up_run import make_row, write_ledger

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402  # is beside the benchmarks, which run as scripts
import gpu_facts  # noqa: E402
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
assert 0 <= time.time() - float(sys.argv[sys.argv.index("--since") + 1]) < 30
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


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_is_named_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@b", "-c", "core.autocrlf=false", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.delenv("ATTENTION_RL_COMMIT", raising=False)
    folder = tmp_path / "attention_rl_trainer"
    # Sorted by git as "a.py", "a/", "a0".
    (folder / "a").mkdir(parents=True)
    for name in ("a.py", "a/b.py", "a0"):
        (folder / name).write_text(f"# {name} ä\n", encoding="utf-8")
    (folder / "a0").chmod(0o755)
    assert gpu_facts.present_commit(tmp_path) is None
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    first = git("rev-parse", "HEAD")
    for ignored in (folder / "empty", folder / "__pycache__"):
        ignored.mkdir()
    (folder / "__pycache__" / "a.pyc").touch()
    assert gpu_facts.tree(folder) == git("rev-parse", "HEAD:attention_rl_trainer")
    assert gpu_facts.present_commit(tmp_path) == first
    (folder / "a.py").write_text("# newer\n", encoding="utf-8")
    assert gpu_facts.present_commit(tmp_path) == f"{first}+changes"
    git("commit", "--quiet", "--all", "--message", "second")
    assert gpu_facts.present_commit(tmp_path) == git("rev-parse", "HEAD")
    # What is named by hand is believed only where git does not know better.
    for given, named in ((first, f"{first}+changes"), ("0" * 40, "0" * 40)):
        monkeypatch.setenv("ATTENTION_RL_COMMIT", given)
        assert gpu_facts.present_commit(tmp_path) == named


RUNS = {
    "done": "pass",
    "failed": "raise SystemExit(3)",
    # As a run does, whatever a shell in the background said of the signal.
    "stopped": "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "try: time.sleep(60)\nexcept KeyboardInterrupt: raise SystemExit(130)",
    "killed": "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)",
}


@pytest.mark.parametrize("ended", list(RUNS))
def test_a_run_is_stopped_in_time(ended: str) -> None:
    watched: list[None] = []
    # A tenth of it is what a program that stops has for that, on a machine that does other things too.
    seconds = {"stopped": 8, "killed": 2}.get(ended, 60)
    command = [sys.executable, "-c", RUNS[ended]]
    assert gpu_parts.run_for(command, seconds, lambda: watched.append(None), every=0.3) == ended
    assert len(watched) >= 3 or seconds == 60


def test_a_curve_is_written_from_what_there_is(tmp_path: Path) -> None:
    result, folder = gpu_parts.Result(tmp_path / "learning.json"), tmp_path / "run"
    folder.mkdir()
    gpu_parts.put_curve(result, "recipe", folder, 0.0)
    assert result.section("runs")["recipe"]["episodes"] == 0
    rows = [make_row(episode, query_gain=episode // 3 + 0.1 * (episode % 3), model_gain=1.0) for episode in range(30)]
    ledger = write_ledger(folder / gpu_parts.LEDGER_NAME, rows)
    # Killed while it wrote.
    ledger.write_text(ledger.read_text(encoding="utf-8") + '{"episode": 30, "ti', encoding="utf-8")
    gpu_parts.put_curve(result, "recipe", folder, 0.0, "killed")
    found = json.loads((tmp_path / "learning.json").read_text())["runs"]["recipe"]
    assert (found["ended"], found["episodes"]) == ("killed", 30)
    tenths = found["tenths: mean, standard error"]
    assert len(tenths) == 10
    # Of 2.0, 2.1 and 2.2: a standard deviation of 0.1, over the root of 3.
    assert tenths[2] == {"episodes": 3, "reward": [3.1, 0.05774], "query_gain": [2.1, 0.05774], "model_gain": [1.0, 0]}


def test_a_recipe_that_fails_does_not_keep_the_next_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {"first": "failed", "second": "killed"}

    def run_for(command: list[str], seconds: float, watch: object) -> str:
        assert seconds == 30
        return ends[command[command.index("--config") + 1]]

    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parts, "run_for", run_for)
    result = gpu_parts.Result(tmp_path / "learning.json")
    with pytest.raises(RuntimeError, match=r"recipes that ended with an error: first$"):
        gpu_parts.learning(result, gpu_parts.Scale(torch.device("cpu"), False, 60, tuple(ends)))
    assert {name: run["ended"] for name, run in result.section("runs").items()} == ends


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
        "embedded.rollout.without_graphs.floor_ratio",
        "embedded.update.floor_ratio",
    }
    assert all(value > 0 for value in figures.values())
    assert 0 < figures["embedded.decode.b2.bandwidth_share"] < 1
    assert content["settings"]["embedded"]["B"] == 2
    # What the figures are ratios of; the first round of each does not count.
    assert {name: len(rounds) for name, rounds in content["rounds, s"]["embedded, rollout"].items()} == {
        "ours": 1,
        "without graphs": 1,
        "floor": 1,
    }
