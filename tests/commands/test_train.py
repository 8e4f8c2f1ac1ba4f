"""examples/train_wiki.py as users start it: a process of its own, on a tiny saved model and a file of articles."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import OPTIONS, article_texts, save_tiny_llama, write_rows

from attention_rl_trainer.durability.manifest import find_damage

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "train_wiki.py"
# Prints what `test_adapter_loads_in_a_fresh_process` reads; the library itself is not needed to use an adapter.
USE_ADAPTER = """\
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
ids = torch.arange(1, 13).view(1, -1)
with torch.no_grad():
    adapted = model(ids).logits
    with model.disable_adapter():
        plain = model(ids).logits
print(json.dumps({
    "finite": bool(adapted.isfinite().all()),
    "difference": (adapted - plain).abs().max().item(),
    "modules": "attention_rl_trainer" in sys.modules,
}))
"""


@dataclass(frozen=True)
class Inputs:
    """What a run needs on disk."""

    model: Path
    articles: Path
    config: Path

    @property
    def flags(self) -> list[str]:
        return [
            *("--config", str(self.config)),
            *("--model_name_or_path", str(self.model)),
            *("--dataset", str(self.articles)),
            *("--batch-size", "8"),
        ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    texts = article_texts(30)
    save_tiny_llama(folder / "model", texts)
    write_rows(folder / "articles.jsonl", [{"title": f"title {n}", "text": text} for n, text in enumerate(texts)])
    (folder / "config.yaml").write_text(OPTIONS)
    return Inputs(folder / "model", folder / "articles.jsonl", folder / "config.yaml")


def start(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder of its own, without the network and with nothing of the tests on its path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=inherited | settings, capture_output=True, text=True, timeout=240
    )


def train(*flags: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return start(str(SCRIPT), *flags, folder=folder)


def episodes_of(run: Path) -> list[int]:
    return [json.loads(line)["episode"] for line in (run / "trajectories.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first_run(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of 24 episodes."""
    folder = tmp_path_factory.mktemp("first")
    done = train(*inputs.flags, "--episodes", "24", "--output_dir", "run", folder=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stderr.txt").write_text(done.stderr)
    return folder / "run"


class TestTraining:
    def test_leaves_what_a_run_promises(self, first_run: Path) -> None:
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "report/summary.md"):
            assert (first_run / name).stat().st_size > 0, name
        assert list((first_run / "report").glob("*.png"))
        assert {path.name for path in first_run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
        assert episodes_of(first_run) == list(range(24))

    def test_keeps_its_options(self, first_run: Path) -> None:
        options = json.loads((first_run / "attention_rl_config.json").read_text())
        assert (options["num_episodes"], options["generation_batch_size"]) == (24, 8)
        assert (options["learning_rate"], options["filter_threshold"]) == (1e-2, None)

    def test_says_what_will_run_before_it_runs(self, first_run: Path) -> None:
        printed = (first_run.parent / "stderr.txt").read_text()
        assert "24 episodes in 3 steps of 8" in printed
        assert "4 query heads, 2 key-value groups of 8" in printed

    def test_adapter_loads_in_a_fresh_process(self, inputs: Inputs, first_run: Path) -> None:
        done = start("-c", USE_ADAPTER, str(inputs.model), str(first_run), folder=first_run.parent)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["finite"]
        assert found["difference"] > 1e-4
        assert not found["modules"]

    @pytest.mark.slow
    def test_resume_goes_on_at_the_next_episode(self, inputs: Inputs, first_run: Path, tmp_path: Path) -> None:
        run = shutil.copytree(first_run, tmp_path / "run")
        before = (run / "trajectories.jsonl").read_text()
        done = train(*inputs.flags, "--episodes", "40", "--resume", "--output_dir", "run", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert episodes_of(run) == list(range(40))
        assert (run / "trajectories.jsonl").read_text().startswith(before)
        state = json.loads((run / "checkpoint-5" / "attention_rl_state.json").read_text())
        assert state["progress"]["num_episodes"] == state["filter"]["count"] == 40


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_its_code(number: int, code: int, inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *inputs.flags, "--episodes", "40000", "--output_dir", "run"],
            cwd=tmp_path,
            env=inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + 120
    while not (run / "checkpoint-2").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == code, (tmp_path / "log.txt").read_text()
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    episodes = episodes_of(run)
    assert episodes == list(range(len(episodes)))
    newest = max(int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*"))
    assert 8 * newest == len(episodes) < 40_000
    assert not find_damage(run / f"checkpoint-{newest}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_killed_twice_ends_like_the_demo(tmp_path: Path) -> None:
    """The embedded model and real articles; killed in the first steps and while a checkpoint is being written."""
    flags = ["--config", "demo_wiki", "--episodes", "24", "--batch-size", "4"]
    flags += ["--save_episodes", "8", "--warmup_episodes", "4", "--filter_threshold", "0", "--dtype", "float32"]

    def run_until(place: str, *more: str) -> None:
        """Kill the process as soon as there is such a file or folder."""
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *flags, "--output_dir", "killed", *more], cwd=tmp_path, env=environment
        )
        deadline = time.monotonic() + 600
        while not list((tmp_path / "killed").glob(place)) and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before"
            time.sleep(0.005)
        process.kill()
        process.wait()

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    whole = [sys.executable, str(SCRIPT), *flags, "--output_dir", "whole"]
    subprocess.run(whole, cwd=tmp_path, env=environment, check=True, timeout=900)
    run_until("trajectories.jsonl")
    run_until("_staging-checkpoint-4/*", "--resume")
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    end = [sys.executable, str(SCRIPT), *flags, "--output_dir", "killed", "--resume"]
    subprocess.run(end, cwd=tmp_path, env=environment, check=True, timeout=900)
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "attention_rl_state.json").read_text())
    assert state["updater"]["num_updates"] >= 2
    for name in (
        *("adapter_model.safetensors", "trajectories.jsonl", "checkpoint-6/optimizer.safetensors"),
        *("checkpoint-6/previous_adapter.safetensors", "checkpoint-6/random_states.safetensors"),
    ):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
class TestOtherStarts:
    def test_accelerate_launch(self, inputs: Inputs, tmp_path: Path) -> None:
        done = start(
            *("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"),
            *(str(SCRIPT), *inputs.flags, "--episodes", "16", "--output_dir", "run"),
            folder=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert episodes_of(tmp_path / "run") == list(range(16))

    def test_a_finished_run_is_resumed(self, inputs: Inputs, tmp_path: Path) -> None:
        """With a report, and an evaluation at its end; by itself, and by a path."""
        run = tmp_path / "run"
        flags = [*inputs.flags, "--episodes", "16", "--output_dir", "run", "--dataset_eval_name", str(inputs.articles)]
        first = train(*flags, "--eval_episodes", "4", folder=tmp_path)
        assert first.returncode == 0, first.stderr
        files = [path for path in run.rglob("*") if path.is_file() and path.name != "_run.lock"]
        names = {str(path.relative_to(run)) for path in files}
        assert {"report/summary.md", "evaluation/eval/evaluation.md", "adapter_model.safetensors"} <= names
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
        for resume in (["--resume"], ["--resume_from_checkpoint", "run/checkpoint-2"]):
            again = train(*flags, "--eval_episodes", "4", *resume, folder=tmp_path)
            assert again.returncode == 0, again.stderr
            assert "nothing is run" in again.stderr
            now = [path for path in run.rglob("*") if path.is_file() and path.name != "_run.lock"]
            assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in now} == before

    def test_resume_after_a_run_that_ended_past_its_checkpoint(self, inputs: Inputs, tmp_path: Path) -> None:
        """Sixteen episodes, then a ledger with rows that no checkpoint covers, as a kill leaves it."""
        run = tmp_path / "run"
        first = train(*inputs.flags, "--episodes", "16", "--output_dir", "run", folder=tmp_path)
        assert first.returncode == 0, first.stderr
        lines = (run / "trajectories.jsonl").read_text().splitlines(keepends=True)
        uncovered = json.dumps(json.loads(lines[-1]) | {"episode": 16}) + "\n"
        (run / "trajectories.jsonl").write_text("".join(lines) + uncovered + lines[0][:40])
        second = train(*inputs.flags, "--episodes", "32", "--resume", "--output_dir", "run", folder=tmp_path)
        assert second.returncode == 0, second.stderr
        assert episodes_of(run) == list(range(32))

    def test_help_lists_the_seeds_flags(self, tmp_path: Path) -> None:
        done = train("--help", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        for flag in ("--batch-size", "--episodes", "--dataset", "--resume", "--num_kv_pairs"):
            assert flag in done.stdout


@pytest.mark.slow
class TestBadInputs:
    """Each ends the process with a message of its own as the last thing that is printed."""

    @staticmethod
    def refusal(*flags: str, folder: Path) -> str:
        done = train(*flags, "--episodes", "8", "--output_dir", "run", folder=folder)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1].removeprefix("attention-rl train: ")

    def test_no_such_model(self, inputs: Inputs, tmp_path: Path) -> None:
        missing = str(tmp_path / "nowhere")
        message = self.refusal(*inputs.flags, "--model_name_or_path", missing, folder=tmp_path)
        assert f"There is no folder or file {missing}" in message

    def test_no_such_file(self, inputs: Inputs, tmp_path: Path) -> None:
        missing = str(tmp_path / "nowhere.jsonl")
        message = self.refusal(*inputs.flags, "--dataset", missing, folder=tmp_path)
        assert f"There is no file or folder '{missing}'" in message

    def test_no_text_column(self, inputs: Inputs, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "other.jsonl", [{"title": "a", "body": "b"}])
        message = self.refusal(*inputs.flags, "--dataset", str(path), folder=tmp_path)
        assert "has no column 'text'; its columns are 'title', 'body'" in message
        assert "dataset_text_column" in message

    def test_no_article_long_enough(self, inputs: Inputs, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "short.jsonl", [{"title": "a", "text": "the river"}] * 3)
        message = self.refusal(*inputs.flags, "--dataset", str(path), folder=tmp_path)
        assert "no article is long enough" in message
        assert "(6 + 6) · 8 = 96 tokens" in message

    def test_resume_without_checkpoint(self, inputs: Inputs, tmp_path: Path) -> None:
        message = self.refusal(*inputs.flags, "--resume", folder=tmp_path)
        assert message == "--resume: there is no checkpoint in run; start without resume_from_checkpoint"

    def test_unknown_yaml_key(self, inputs: Inputs, tmp_path: Path) -> None:
        path = tmp_path / "unknown.yaml"
        path.write_text(OPTIONS + "tokens_per_question: 5\n")
        message = self.refusal(*inputs.flags[2:], "--config", str(path), folder=tmp_path)
        assert message.startswith(f"{path}: there is no option tokens_per_question")

    def test_option_out_of_range(self, inputs: Inputs, tmp_path: Path) -> None:
        message = self.refusal(*inputs.flags, "--subset_fraction", "1.5", folder=tmp_path)
        assert message == "subset_fraction must be in (0, 1], got 1.5"

    def test_trajectory_longer_than_the_context(self, inputs: Inputs, tmp_path: Path) -> None:
        message = self.refusal(*inputs.flags, "--tokens_per_query", "400", folder=tmp_path)
        assert "the model's context holds 512" in message
