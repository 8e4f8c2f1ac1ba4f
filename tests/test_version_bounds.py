"""The ends of setup.cfg's version ranges, as the Makefile gives them to pip."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from version_bounds import REPOSITORY, constraints, lowest, requirements


def test_every_requirement_has_its_lower_bound_among_the_oldest() -> None:
    oldest = dict(line.split("==") for line in constraints("oldest"))
    for requirement in map(Requirement, requirements()):
        bounds = [item.version for item in requirement.specifier if item.operator == ">="]
        if requirement.name == "torch":
            assert requirement.specifier.contains(oldest["torch"])
        else:
            assert bounds == [oldest[requirement.name]]
            # A lower bound outside of its own range could never be installed.
            assert requirement.specifier.contains(oldest[requirement.name])


def test_the_newest_are_held_back_by_torch_alone() -> None:
    script = REPOSITORY / "tests" / "version_bounds.py"
    done = subprocess.run([sys.executable, script, "newest"], capture_output=True, text=True, check=True, timeout=60)
    assert [line.split("==")[0] for line in done.stdout.splitlines()] == ["torch"]


@pytest.mark.parametrize("requirement", ["peft", "peft<0.22,>=0.21", "peft==0.21", "peft>=0.21;python_version<'3.12'"])
def test_what_states_no_lower_bound_first_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match="expected a lower bound first, such as 'peft"):
        lowest(requirement)


@pytest.mark.parametrize("name", ["transformers", "peft", "accelerate", "trl", "datasets", "tokenizers", "safetensors"])
def test_what_is_installed_is_inside_the_range(name: str) -> None:
    """So that a run of the suite says something about the range that setup.cfg states."""
    (requirement,) = (item for item in map(Requirement, requirements()) if item.name == name)
    assert requirement.specifier.contains(importlib.metadata.version(name))
