"""``attention-rl`` as users type it, on a tiny model that was saved and trained."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import article_texts, byte_level_tokenizer, save_tiny_llama, tiny_trainer, write_rows

from attention_rl_trainer.cli import main
from attention_rl_trainer.commands.evaluate import trained_options
from attention_rl_trainer.configs import find_config, shipped_configs, with_config_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, a trained adapter, and articles that were not trained on."""
    folder = tmp_path_factory.mktemp("run")
    texts = article_texts(20)
    base = save_tiny_llama(folder / "base", texts)
    tokenizer = byte_level_tokenizer(texts)
    trainer = tiny_trainer(folder, texts, tokenizer, model=base, filter_threshold=float("-inf"), warmup_episodes=1)
    trainer.train()
    trainer.save_model()
    rows = [{"title": f"held out {n}", "text": text} for n, text in enumerate(article_texts(8, seed=9))]
    write_rows(folder / "held_out.jsonl", rows)
    return folder


def evaluate(run: Path, output: Path, *flags: str) -> int:
    articles = str(run / "held_out.jsonl")
    return main(
        ["evaluate", str(run / "run"), "--dataset", articles, "--output_dir", str(output), "--use_cpu", "true", *flags]
    )


def test_evaluate_reproduces_its_tables(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run, tmp_path / "a", "--episodes", "6") == 0
    printed = capsys.readouterr().out
    assert evaluate(run, tmp_path / "b", "--episodes", "6") == 0
    tables = [(tmp_path / name / "evaluation" / "eval" / "evaluation.json").read_bytes() for name in "ab"]
    assert tables[0] == tables[1]
    stored = json.loads(tables[0])
    assert stored["orders"]["learned"]["num_values"] == 6
    assert f"eval_query_over_empty: {stored['policy_less']['empty query']['mean']:.4f}" in printed
    assert "### Orders, scored by the base model after empty queries" in printed


def test_options_come_from_the_adapter_and_flags_change_them(run: Path, tmp_path: Path) -> None:
    options = trained_options(run / "run")
    assert (options["num_kv_pairs"], options["tokens_per_query"], options["seed"]) == (8, 4, 42)
    assert options["filter_threshold"] == float("-inf")
    assert "output_dir" not in options
    flags = ["--seed", "3", "--num_steps", "2", "--skip_articles", "5", "--batch_size", "2"]
    assert evaluate(run, tmp_path, *flags) == 0
    stored = json.loads((tmp_path / "evaluation" / "eval" / "evaluation.json").read_text(encoding="utf-8"))
    assert stored["settings"]["T"] == 2
    assert stored["settings"]["seed"] % 2**32 == 3
    assert stored["orders"]["learned"]["num_values"] == 3


def test_an_evaluation_leaves_the_run_as_it_is(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "run").rglob("*") if path.is_file()}
    assert evaluate(run, tmp_path, "--episodes", "2") == 0
    assert {path: path.read_bytes() for path in (run / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("contents", [None, "{"])
def test_a_folder_without_readable_options_is_refused(
    contents: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if contents is not None:
        (tmp_path / "attention_rl_config.json").write_text(contents, encoding="utf-8")
    assert main(["evaluate", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("attention-rl evaluate: ")
    assert ("holds no attention_rl_config.json" if contents is None else "is not valid JSON") in message


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["unknown"], 2)])
def test_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    printed = capsys.readouterr()
    for command in ("train", "evaluate", "plan", "selftest"):
        assert f"  {command} " in printed.out
    assert ("there is no command 'unknown'; the commands are train, evaluate, " in printed.err) is (
        "unknown" in arguments
    )


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from attention_rl_trainer.cli import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "transformers", "trl"} & set(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_train_by_flags_and_by_a_file(run: Path, tmp_path: Path) -> None:
    texts = [{"title": f"title {n}", "text": text} for n, text in enumerate(article_texts(20))]
    config = tmp_path / "options.yaml"
    lengths = {"num_kv_pairs": 8, "tokens_per_query": 4, "tokens_per_key": 6, "tokens_per_value": 6}
    settings = lengths | {"generation_batch_size": 8, "use_cpu": True, "report_at_end": False, "disable_tqdm": True}
    config.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()), encoding="utf-8")
    articles = write_rows(tmp_path / "articles.jsonl", texts)
    flags = ["--dataset", str(articles), "--model_name_or_path", str(run / "base"), "--episodes", "16"]
    assert main(["train", "--config", str(config), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    options = json.loads((tmp_path / "out" / "attention_rl_config.json").read_text(encoding="utf-8"))
    assert (options["num_kv_pairs"], options["num_episodes"], options["generation_batch_size"]) == (8, 16, 8)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_plan_of_a_shipped_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "llama3.2_3b", "--gpu_memory_gib", "16"]) == 0
    printed = capsys.readouterr().out
    assert "Memory of a step, GiB" in printed
    assert "largest batch with T = 8" in printed


class TestConfigs:
    def test_those_of_the_package_are_found_by_name(self) -> None:
        assert shipped_configs() == [
            "demo",
            "factbook",
            "gpt2",
            "llama3.2_3b",
            "recommended",
            "seed",
            "twenty_questions",
        ]
        for name in shipped_configs():
            assert find_config(name).read_text(encoding="utf-8").startswith("#")

    def test_a_file_comes_before_a_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "demo").write_text("seed: 1\n", encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        assert find_config("demo") == Path("demo")

    def test_both_spellings_of_the_flag(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("seed: 1\n", encoding="utf-8")
        path = str(tmp_path / "a.yaml")
        for flags in (["--config", path, "--seed", "2"], [f"--config={path}", "--seed", "2"]):
            assert with_config_path(flags) == ["--config", path, "--seed", "2"]

    @pytest.mark.parametrize("command", ["train", "evaluate", "plan", "selftest"])
    def test_an_unknown_one_lists_the_names(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([command, "--config", "nowhere.yaml"]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"attention-rl {command}: --config nowhere.yaml: there is no such file")
        assert "demo, factbook, gpt2, llama3.2_3b, recommended, seed, twenty_questions" in message

    def test_a_flag_without_a_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--config"]) == 2
        assert "--config must be followed by a path or a name" in capsys.readouterr().err
