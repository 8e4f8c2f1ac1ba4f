"""``attention-rl`` as users type it, on a tiny model that was saved and trained."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import OPTIONS, article_texts, byte_level_tokenizer, save_tiny_llama, tiny_config, tiny_trainer, write_rows

import attention_rl_trainer
from attention_rl_trainer.cli import COMMANDS, DONE, FAILED, INTERRUPTED, MISTAKEN, UNREAD, main
from attention_rl_trainer.commands.evaluate import trained_options
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.configs import find_config, shipped_configs, with_config_path
from attention_rl_trainer.durability.guard import RunLockedError
from attention_rl_trainer.durability.pushes import HubPushError
from attention_rl_trainer.durability.staging import StagingError
from attention_rl_trainer.errors import BaseModelError, NonFiniteError
from attention_rl_trainer.hub import HubUnreachableError
from attention_rl_trainer.processes import LostProcessError


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
    assert re.search(rf"query_over_empty +│ +{stored['policy_less']['empty query']['mean']:.4f} ", printed)
    assert "split train, 6 trajectories" in " ".join(printed.split())
    assert "### Orders, scored by the base model after empty queries" in printed


def test_options_come_from_the_adapter_and_flags_change_them(run: Path, tmp_path: Path) -> None:
    options = trained_options(run / "run")
    assert (options["num_kv_pairs"], options["tokens_per_query"], options["seed"]) == (8, 4, 42)
    assert options["filter_threshold"] == float("-inf")
    assert "output_dir" not in options
    assert not options.keys() & {"num_processes", "num_threads", "warm_start_episodes"}
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


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    usage = capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == usage
    assert all(f"\n    {command} " in usage for command in COMMANDS)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"attention-rl-trainer {attention_rl_trainer.__version__}\n"


def test_the_package_is_the_command_too() -> None:
    run = [sys.executable, "-m", "attention_rl_trainer", "--version"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout == f"attention-rl-trainer {attention_rl_trainer.__version__}\n"


def test_the_page_of_the_command_line_has_every_command_and_every_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `attention-rl (\w+)", page, flags=re.MULTILINE)
    assert named == list(COMMANDS)
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    assert codes == {DONE, FAILED, MISTAKEN, INTERRUPTED, UNREAD, 143}


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, time\n"
        "from attention_rl_trainer.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    print(sorted(sys.modules))\n    print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    *_, modules, seconds = done.stdout.splitlines()
    heavy = {"torch", "transformers", "trl", "peft", "bitsandbytes", "numpy", "datasets", "rich"}
    assert not heavy & set(ast.literal_eval(modules))
    assert float(seconds) < 0.5


class Ending:
    """Stands in for a command that ends in some way."""

    def __init__(self, how: BaseException | int) -> None:
        self.how = how
        self.flags: list[str] = []

    def main(self, flags: list[str]) -> int:
        self.flags = flags
        if isinstance(self.how, BaseException):
            raise self.how
        return self.how


def end_with(how: BaseException | int, monkeypatch: pytest.MonkeyPatch) -> Ending:
    """Let ``attention-rl env`` end as asked."""
    ending = Ending(how)
    monkeypatch.setitem(sys.modules, "attention_rl_trainer.commands.env", ending)
    return ending


def with_note(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


class TestEndings:
    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (ValueError("beta must be 1,\n  got 2"), 2, "beta must be 1, got 2 (ValueError; --debug shows where)"),
            (BaseModelError("no model"), 2, "no model (BaseModelError; --debug shows where)"),
            (RunLockedError("another run"), 2, "another run (RunLockedError; --debug shows where)"),
            (HubUnreachableError("no Hub"), 2, "no Hub (HubUnreachableError; --debug shows where)"),
            (FileNotFoundError(2, "nothing", "a.txt"), 2, "[Errno 2] nothing: 'a.txt' (FileNotFoundError; --debug"),
            (ModuleNotFoundError("no rich", name="rich"), 2, "no rich (ModuleNotFoundError; --debug shows where)"),
            (NonFiniteError("reward"), 1, "reward is not finite. The optimizer step was not taken"),
            (StagingError("disk full"), 1, "disk full (StagingError; --debug shows where)"),
            (HubPushError("push later"), 1, "push later (HubPushError; --debug shows where)"),
            (LostProcessError("rank 1 died"), 1, "rank 1 died (LostProcessError; --debug shows where)"),
            (MemoryError(), 1, "MemoryError (MemoryError; --debug shows where)"),
            (with_note(RuntimeError("out of memory"), "Lower B."), 1, "out of memory Lower B. (RuntimeError; --debug"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
    )
    def test_a_mistake_or_a_failure_is_one_line(
        self,
        error: Exception,
        code: int,
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        end_with(error, monkeypatch)
        assert main(["env"]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"attention-rl env: {message}")

    def test_an_error_of_the_package_says_no_more_than_its_message(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["selftest", "--config", "nowhere.yaml"]) == 2
        assert "--debug" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        "error",
        [AssertionError("a bug"), RuntimeError("a bug"), ImportError("a bug", name="attention_rl_trainer.trainer")],
        ids=lambda error: type(error).__name__,
    )
    def test_a_bug_keeps_its_traceback(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        end_with(error, monkeypatch)
        with pytest.raises(type(error), match="a bug"):
            main(["env"])

    @pytest.mark.parametrize("arguments", [["--debug", "env", "x"], ["env", "x", "--debug"], ["env", "--debug", "x"]])
    @pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()], ids=["mistake", "Ctrl-C"])
    def test_debug_shows_the_traceback_wherever_it_stands(
        self, arguments: list[str], error: BaseException, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ending = end_with(error, monkeypatch)
        with pytest.raises(type(error)):
            main(arguments)
        assert ending.flags == ["x"]

    def test_the_trainers_own_debug_goes_to_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ending = end_with(0, monkeypatch)
        flags = ["--debug", "underflow_overflow", "--debug=underflow_overflow"]
        assert main(["env", *flags]) == 0
        assert ending.flags == flags

    def test_control_c_is_130_and_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        end_with(KeyboardInterrupt(), monkeypatch)
        assert main(["env"]) == 130
        assert capsys.readouterr().err.strip() == "attention-rl env: interrupted"

    @pytest.mark.parametrize("code", [0, 1])
    def test_a_commands_own_code_is_that_of_the_call(self, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
        end_with(code, monkeypatch)
        assert main(["env"]) == code


class TestMessages:
    def test_what_the_package_says_is_printed_while_a_command_runs(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        logger = logging.getLogger("attention_rl_trainer.somewhere")
        monkeypatch.setattr(Ending, "main", lambda *_: logger.info("Base model %s", "a") or 0)
        end_with(0, monkeypatch)
        main(["env"])
        assert capsys.readouterr().err == "Base model a\n"
        logger.info("afterwards")
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(("rank", "said"), [("0", "note\ntrouble\n"), ("1", "trouble\n")])
    def test_of_several_processes_the_first_says_what_all_would(
        self, rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        logger = logging.getLogger("attention_rl_trainer.somewhere")

        def say(*_: object) -> int:
            logger.info("note")
            logger.warning("trouble")
            return 0

        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(Ending, "main", say)
        end_with(0, monkeypatch)
        main(["env"])
        assert capsys.readouterr().err == said

    def test_a_line_of_bitsandbytes_that_says_nothing_here_is_not(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

        def warn(*_: object) -> int:
            logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Use kernels", "none")
            logger.warning("anything else")
            return 0

        monkeypatch.setattr(Ending, "main", warn)
        end_with(0, monkeypatch)
        main(["env"])
        assert [record.getMessage() for record in caplog.records] == ["anything else"]


def test_an_output_that_nobody_reads_ends_a_command_quietly() -> None:
    code = (
        "import sys\nfrom types import SimpleNamespace\nfrom attention_rl_trainer.cli import main\n"
        "def fill(flags):\n    for _ in range(100000): print('line')\n    return 0\n"
        "sys.modules['attention_rl_trainer.commands.env'] = SimpleNamespace(main=fill)\n"
        "sys.exit(main(['env']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


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


def test_train_refuses_before_it_runs_what_its_evaluation_will_lack(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(OPTIONS + "report_at_end: false\neval_episodes: 8\n", encoding="utf-8")
    articles = str(write_rows(tmp_path / "articles.jsonl", [{"text": text} for text in article_texts(20)]))
    single = str(write_rows(tmp_path / "single.jsonl", [{"text": text} for text in article_texts(1)]))
    flags = ["--dataset", articles, "--dataset_eval_name", single, "--model_name_or_path", str(run / "base")]
    flags += ["--episodes", "8", "--batch-size", "8", "--output_dir", str(tmp_path / "out")]
    assert main(["train", "--config", str(config), *flags]) == 2
    assert "the first 8 episodes are on a single one; use more articles" in capsys.readouterr().err
    assert not (tmp_path / "out" / "trajectories.jsonl").exists()


def test_train_prints_its_evaluation_as_a_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(OPTIONS + "report_at_end: false\neval_tables: false\neval_episodes: 8\n", encoding="utf-8")
    rows = [{"text": text} for text in article_texts(20)]
    articles = str(write_rows(tmp_path / "articles.jsonl", rows))
    flags = ["--dataset", articles, "--dataset_eval_name", articles, "--model_name_or_path", str(run / "base")]
    flags += ["--episodes", "8", "--batch-size", "8", "--output_dir", str(tmp_path / "out")]
    assert main(["train", "--config", str(config), *flags]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"reward +│ +-?\d\.\d{4} ", printed)
    assert "split train, 8 trajectories" in " ".join(printed.split())
    assert "'eval_query_gain': " not in printed.partition("Evaluation on")[2]


def test_plan_of_a_shipped_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "llama3.2_3b", "--gpu_memory_gib", "16"]) == 0
    printed = capsys.readouterr().out
    assert "Memory of a step, GiB" in printed
    assert "largest batch with T = 8" in printed


class TestConfigs:
    def test_those_of_the_package_are_found_by_name(self) -> None:
        expected = {"demo", "factbook", "gpt2", "llama3.2_3b", "recommended", "seed", "twenty_questions"}
        assert expected <= set(shipped_configs())
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
        assert f"one of {', '.join(shipped_configs())}" in message

    def test_a_flag_without_a_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--config"]) == 2
        assert "--config must be followed by a path or a name" in capsys.readouterr().err


def test_an_evaluation_needs_no_warm_start(tmp_path: Path) -> None:
    """Its options do without the phase that they are options of."""
    began = {"warm_start_episodes": 16, "warm_start_temperature": 0.1, "warm_start_mismatch": 0.3}
    config = tiny_config(tmp_path, **began)
    config.save_json(tmp_path / "attention_rl_config.json")

    options = trained_options(tmp_path)
    assert not options.keys() & began.keys()
    assert AttentionGuidedRLConfig(**options, use_cpu=True).num_steps == 3
