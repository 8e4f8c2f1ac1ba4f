"""The map from the seed documents to functions and tests, and the method by steps: what they name is there."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import attention_rl_trainer

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "seeds.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (?!statement|---)(.+?) \| (.+?) \| (`[^|]+`) \|$", PAGE, flags=re.MULTILINE)
NAMES = {name for row in ROWS for name in re.findall(r"`(.+?)`", row[2])}
TESTS = sorted(name for name in NAMES if ".py" in name)
METHOD = (REPOSITORY / "docs" / "steps.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\*Functions?:\* (.+?)(?:\. |\.$)", METHOD, flags=re.MULTILINE)
FUNCTIONS = sorted((NAMES - set(TESTS)) | {name for step in STEPS for name in re.findall(r"`([\w.]+)`", step)})


def test_every_row_names_a_function_and_a_test() -> None:
    heads = ("| statement |", "| --- |")
    assert len(ROWS) == sum(line.startswith("| ") and not line.startswith(heads) for line in PAGE.splitlines())
    for row in ROWS:
        assert {".py" in name for name in re.findall(r"`(.+?)`", row[2])} == {False, True}, row[0]


def test_every_step_names_its_function() -> None:
    assert len(STEPS) == len(re.findall(r"^## \d+\. ", METHOD, flags=re.MULTILINE)) == 12


def is_there(name: str) -> bool:
    """Whether a public name, or a dotted one below the package, is defined."""
    parts = name.split(".")
    if parts[0] in attention_rl_trainer.__all__:
        found: object = getattr(attention_rl_trainer, parts.pop(0))
    else:
        # A module's path ends before its first class, or before its function.
        end = next((number for number, part in enumerate(parts) if part[0].isupper()), len(parts) - 1)
        found = importlib.import_module(".".join(["attention_rl_trainer", *parts[:end]]))
        parts = parts[end:]
    for part in parts:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_functions_are_there() -> None:
    assert len(FUNCTIONS) > 60
    assert [name for name in FUNCTIONS if not is_there(name)] == []


@functools.cache
def names_in(file: str) -> set[str]:
    """The tests of a file, those of a class with its name."""
    tree = ast.parse((REPOSITORY / "tests" / file).read_text(encoding="utf-8"))
    methods = {
        f"{node.name}::{item.name}"
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.FunctionDef)
    }
    return methods | {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_tests_are_there() -> None:
    assert len(TESTS) > 80
    for name in TESTS:
        file, _, test = name.partition("::")
        assert (REPOSITORY / "tests" / file).is_file(), name
        assert not test or test in names_in(file), name
