"""Commands and Python blocks of README.md and of the pages: they parse, what they name is there, and they run."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Callable, Sequence
from configparser import ConfigParser
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.commands.launch
import datasets
import pytest
from blocks import REPOSITORY, Block, blocks, commands
from tiny import adapted, article_texts, byte_level_tokenizer, tiny_config, tiny_llama, write_rows

import attention_rl_trainer
from attention_rl_trainer.cli import COMMANDS, MISTAKEN, main
from attention_rl_trainer.commands.parsing import CommandParser
from attention_rl_trainer.commands.plain import PlainParser
from attention_rl_trainer.ordering import AttentionGuidedOrderer, OrderSettings

RUN_BY = {
    "train": "commands/test_train.py",
    "evaluate": "evaluation/test_evaluations_of_a_run.py",
    "order": "ordering/test_order_command.py",
    "report": "pages/test_report_command.py",
    "calibrate": "commands/test_calibrate.py",
    "headroom": "commands/test_headroom_command.py",
    "plan": "commands/test_plan.py",
    "selftest": "selftest/test_verdict.py",
    "env": "commands/test_env.py",
}
"""Commands are parsed here, since the documented ones take minutes and real models; small ones are run there."""

NOT_RUN = {
    "docs/hub.md:0": "needs a Hub: tests/publishing/test_pushed_runs.py has one on loopback",
    "docs/hub.md:1": "the same, with the card's fields: tests/publishing/test_card.py",
    "docs/ordering.md:2": "needs the embedded weights: tests/models/test_portable.py",
}
"""Python blocks that are not run, and why; all others are."""


class Parsed(Exception):  # not an error
    """In place of what a command does after its options were understood."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Sequence[str]], None]:
    """Let the parser of a command read its options, and stop there."""

    def stopping(method: Callable[..., Any]) -> Callable[..., Any]:
        def parse_and_stop(self: Any, flags: Sequence[str]) -> Any:
            method(self, flags)
            raise Parsed

        return parse_and_stop

    monkeypatch.setattr(CommandParser, "parse", stopping(CommandParser.parse))
    monkeypatch.setattr(PlainParser, "parse_args", stopping(PlainParser.parse_args))

    def parse(command: str, flags: Sequence[str]) -> None:
        with pytest.raises(Parsed):
            importlib.import_module(f"attention_rl_trainer.commands.{command}").main(flags)

    return parse


def file_of(words: Sequence[str]) -> Path:
    """The script that Python or accelerate is to run."""
    return REPOSITORY / next(word for word in words if word.endswith(".py"))


@pytest.mark.parametrize("words", [pytest.param(words, id=place) for place, words in commands()])
def test_a_command_is_understood(
    words: list[str], parse: Callable[[str, Sequence[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    if words[0] == "attention-rl":
        assert words[1] in COMMANDS
        parse(words[1], words[2:])
    elif words[:2] == ["accelerate", "launch"]:
        launched = accelerate.commands.launch.launch_command_parser().parse_args(words[2:])
        assert Path(launched.config_file).is_file()
        assert "attention_rl_trainer" in Path(launched.training_script).read_text(encoding="utf-8")
        parse("train", launched.training_script_args)
    elif words[0] == "make":
        makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^[\w -]*\b{re.escape(words[1])}\b[\w -]*:", makefile, re.MULTILINE)
    elif words[0] == "python":
        assert file_of(words).is_file()
    else:
        assert words[:2] in (["pip", "install"], ["pre-commit", "install"])
        named = [extra for word in words for extra in re.findall(r"attention-rl-trainer\[(.+)\]", word)]
        config = ConfigParser()
        config.read(REPOSITORY / "setup.cfg", encoding="utf-8")
        assert {extra for extras in named for extra in extras.split(",")} <= set(config["options.extras_require"])


MISTAKES = [
    (given, printed)
    for block in blocks("")
    for given, printed in re.findall(r"^\$ attention-rl (.+)\n(.+)$", block.text, re.MULTILINE)
]


@pytest.mark.parametrize(("given", "printed"), MISTAKES)
def test_a_mistake_is_answered_as_it_stands_there(given: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(given)) == MISTAKEN
    assert capsys.readouterr().err == f"{printed}\n"


def test_every_command_is_run_somewhere() -> None:
    assert RUN_BY.keys() == COMMANDS.keys()
    assert all((REPOSITORY / "tests" / file).is_file() for file in RUN_BY.values())


PYTHON = [pytest.param(block, id=str(block)) for block in blocks("python")]


@pytest.mark.parametrize("block", PYTHON)
def test_what_a_block_names_is_there(block: Block) -> None:
    tree = ast.parse(block.text)
    imported: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            imported |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            getattr(imported[node.value.id], node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
            inspect.signature(imported[node.func.id]).bind_partial(**keywords)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks take for given, in a folder of its own: names, files, and small things in place of real ones."""
    monkeypatch.chdir(tmp_path)
    texts = article_texts(12)
    tokenizer = byte_level_tokenizer(texts)
    rows = [{"title": f"article {number}", "text": text} for number, text in enumerate(texts)]
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *names, **options: rows if names[0] == "wikimedia/wikipedia" else load(*names, **options),
    )
    trainer, config = attention_rl_trainer.AttentionGuidedRLTrainer, attention_rl_trainer.AttentionGuidedRLConfig
    monkeypatch.setattr(
        attention_rl_trainer,
        "AttentionGuidedRLTrainer",
        lambda model, **given: trainer(tiny_llama(), processing_class=tokenizer, **given),
    )
    monkeypatch.setattr(
        attention_rl_trainer,
        "AttentionGuidedRLConfig",
        lambda **given: config(**given | vars_of_tiny_run(tmp_path)),
    )
    settings = {"tokens_per_query": 4, "tokens_per_key": 6, "tokens_per_value": 6, "selection_temperature": 0.2}
    orderer = AttentionGuidedOrderer(adapted(tiny_llama()), tokenizer, OrderSettings(settings))
    monkeypatch.setattr(AttentionGuidedOrderer, "from_pretrained", lambda name, **options: orderer)
    passages = [" ".join(text.split()[:12]) for text in texts]
    write_rows(tmp_path / "articles.jsonl", rows)
    write_rows(
        tmp_path / "my.jsonl",
        [{"question": f"{question}?", "answer": "Yes.", "topic": topic} for topic in "ab" for question in range(3)],
    )
    game = {"questions": ["Is it alive?", "Does it fly?"], "objects": []}
    game["objects"] = [{"name": name, "answers": ["yes", answer]} for name, answer in (("a", "no"), ("b", "yes"))]
    (tmp_path / "my_game.json").write_text(json.dumps(game), encoding="utf-8")
    return {
        "orderer": orderer,
        "passages": passages[:4],
        "other_passages": passages[4:8],
        "question": "who built bridges",
        "other_question": "where kings met",
        "documents": [SimpleNamespace(page_content=text) for text in passages[:4]],
        "nodes": [SimpleNamespace(get_content=partial(str, text)) for text in passages[:4]],
        "behind_query": [-2.0, -2.1, -1.9, -2.2],
        "behind_baseline": [-2.1, -2.3, -2.0, -2.2],
        "titles": ["a", "a", "b", "b"],
    }


def vars_of_tiny_run(folder: Path) -> dict[str, Any]:
    """Options that make any run one of seconds."""
    tiny = tiny_config(folder, num_episodes=16, calibration_memories=4)
    names = (
        "num_episodes generation_batch_size training_batch_size num_kv_pairs subset_fraction num_steps "
        "tokens_per_query tokens_per_key tokens_per_value optim use_cpu save_episodes log_trajectory_steps "
        "report_at_end disable_tqdm calibration_memories"
    )
    return {name: getattr(tiny, name) for name in names.split()}


RUN = [
    # The same as README.md's, which runs by default.
    pytest.param(block, id=str(block), marks=[pytest.mark.slow] * (block.page == "docs/quick_start.md"))
    for block in blocks("python")
    if str(block) not in NOT_RUN
]


@pytest.mark.parametrize("block", RUN)
def test_a_block_runs(block: Block, stage: dict[str, Any]) -> None:
    # The one name of the Hub that a block loads, and cannot here.
    text = block.text.replace('load_memories("wikimedia/wikipedia")', 'load_memories("articles.jsonl")')
    exec(compile(text, str(block), "exec"), stage)


def test_what_is_not_run_is_there() -> None:
    assert NOT_RUN.keys() <= {str(block) for block in blocks("python")}
