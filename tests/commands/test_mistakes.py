"""A user's mistakes: each is one line that names the thing and the way out, and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants
from tiny import OPTIONS, article_texts, save_tiny_llama, write_rows

from attention_rl_trainer.cli import main
from attention_rl_trainer.durability.manifest import write_manifest

COMMAND = Path(sys.executable).with_name("attention-rl")
SCRIPT = Path(__file__).parents[2] / "examples" / "train_wiki.py"


@dataclass(frozen=True)
class Mistake:
    """What is typed after ``attention-rl``, beside what is right, and what the line must say."""

    flags: tuple[str, ...]
    names: str
    way_out: str
    command: str = "train"


MISTAKES = {
    "data set": Mistake(
        ("--dataset", "./nowhere.jsonl"), "'./nowhere.jsonl'", "A source is 'offline', an existing file"
    ),
    "column": Mistake(("--dataset_text_column", "body"), "no column 'body'", "its columns are 'title', 'text'"),
    "split": Mistake(("--dataset", "twenty_questions", "--dataset_train_split", "tset"), "'tset'", "'test'"),
    "out of range": Mistake(("--num_steps", "99"), "num_steps must be in 1..4", "lower num_steps"),
    "model": Mistake(("--model_name_or_path", "./no_model"), "./no_model", "folder"),
    "folder": Mistake(("--output_dir", "articles.jsonl/run"), "'articles.jsonl/run'", "Choose a folder that you own"),
    "checkpoint": Mistake(
        ("--resume_from_checkpoint", "run/checkpoint-2"), "run/checkpoint-2/adapter_model.safetensors", "Restore it"
    ),
    "no Hub": Mistake(("--dataset", "someone/articles"), "'someone/articles'", "--dataset_name offline"),
    "unknown command": Mistake((), "no command 'trian'", "train, evaluate, order", command="trian"),
    "YAML": Mistake(("--config", "broken.yaml"), "broken.yaml is not valid YAML: line 3", "expected"),
}

OTHERS = {
    "an unknown option": Mistake(("--num_stepz", "3"), "there is no option --num_stepz", "did you mean --num_steps?"),
    "a value that is no number": Mistake(("--beta", "much"), "invalid float value: 'much'", "--help"),
    "a value without its option": Mistake(("stray",), "'stray' belongs to no option", "--OPTION"),
    "an unknown option in a file": Mistake(("--config", "wrong.yaml"), "wrong.yaml: there is no option betta", "beta?"),
    "a file that is no mapping": Mistake(("--config", "list.yaml"), "list.yaml", "mapping"),
    "a file that is not text": Mistake(("--config", "run/checkpoint-2/adapter_model.safetensors"), "UTF-8", "text"),
    "two files": Mistake(("--config", "options.yaml", "--config", "wrong.yaml"), "more than once", "give one"),
    "nothing to resume": Mistake(
        ("--resume", "--output_dir", "new"), "--resume: there is no checkpoint in new", "start"
    ),
    "no adapter": Mistake(("--use_peft", "false"), "use_peft must stay true", "only an adapter is trained"),
    "no adapter to evaluate": Mistake(("articles.jsonl",), "articles.jsonl holds no", "output_dir", command="evaluate"),
    "nothing to evaluate": Mistake((), "--adapter", "--help", command="evaluate"),
    "a number of seeds": Mistake(("--seeds", "x"), "--seeds", "--help", command="selftest"),
    "an option of the listing": Mistake(("--all",), "--all", "--help", command="env"),
}
BY_COMMAND = {
    # A case that is no mistake any more shall not train for hours.
    "train": (
        *("--config", "options.yaml", "--dataset", "articles.jsonl", "--model_name_or_path", "./model"),
        *("--episodes", "8"),
    ),
}


@pytest.fixture(autouse=True)
def _without_bars() -> Iterator[None]:
    """A process of its own learns from the environment that its output is no terminal, before it loads anything."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, articles, options and a checkpoint that is damaged."""
    folder = tmp_path_factory.mktemp("scene")
    texts = article_texts(4)
    save_tiny_llama(folder / "model", texts)
    write_rows(folder / "articles.jsonl", [{"title": f"{number}", "text": text} for number, text in enumerate(texts)])
    (folder / "options.yaml").write_text(OPTIONS + "output_dir: run\n", encoding="utf-8")
    (folder / "broken.yaml").write_text("beta: 1\nseed: [1\n", encoding="utf-8")
    (folder / "wrong.yaml").write_text("betta: 1\n", encoding="utf-8")
    (folder / "list.yaml").write_text("- beta\n", encoding="utf-8")
    checkpoint = folder / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    write_manifest(checkpoint)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"\xff" * 10)
    return folder


def typed(mistake: Mistake) -> list[str]:
    """Put the mistake behind what is right: of two the last one counts, but for a file of options."""
    right = list(BY_COMMAND.get(mistake.command, ()))
    if mistake.flags[:1] == ("--config",):
        right = right[2:]
    return [mistake.command, *right, *mistake.flags]


def expect_one_line(mistake: Mistake, code: int, out: str, err: str) -> None:
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("attention-rl")
    assert mistake.names in line
    assert mistake.way_out in line
    assert out == ""


@pytest.mark.parametrize("mistake", (MISTAKES | OTHERS).values(), ids=(MISTAKES | OTHERS).keys())
def test_a_mistake_is_one_line(
    mistake: Mistake, scene: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(scene)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", scene / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code = main(typed(mistake))
    expect_one_line(mistake, code, *capsys.readouterr())


def run_in(scene: Path, *command: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(scene / "hf"), "COLUMNS": "80"}
    return subprocess.run(command, cwd=scene, env=inherited | settings, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_of_the_real_command(mistake: Mistake, scene: Path) -> None:
    done = run_in(scene, str(COMMAND), *typed(mistake))
    expect_one_line(mistake, done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_a_mistake_is_one_line_of_a_script_under_accelerate(scene: Path) -> None:
    mistake = MISTAKES["out of range"]
    launch = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    )
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no", "--cpu")
    done = run_in(scene, *launch, *plain, str(SCRIPT), *typed(mistake)[1:])
    assert done.returncode != 0  # accelerate has codes of its own
    expect_one_line(mistake, 2, done.stdout, done.stderr)


@pytest.mark.slow
def test_debug_shows_the_traceback_of_the_real_command(scene: Path) -> None:
    done = run_in(scene, str(COMMAND), *typed(MISTAKES["out of range"]), "--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("ValueError: num_steps must be in 1..4")
