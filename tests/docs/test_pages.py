"""What the pages must have: every public name, every option, every page within reach; and one version everywhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import attention_rl_trainer
from attention_rl_trainer.config import OPTION_GROUPS, AttentionGuidedRLConfig
from attention_rl_trainer.configs import shipped_configs
from attention_rl_trainer.options import declaring_class
from attention_rl_trainer.records.health import Ailment

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"


def test_every_public_name_is_documented_once() -> None:
    documented = re.findall(r"^\.\. auto\w+:: attention_rl_trainer\.(\w+)", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(set(attention_rl_trainer.__all__) - {"__version__"})


def test_every_public_name_says_what_it_is() -> None:
    names = set(attention_rl_trainer.__all__) - {"__version__"}
    assert {name for name in names if not (getattr(attention_rl_trainer, name).__doc__ or "").strip()} == set()


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"```{toctree}.*?\n\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    pages = {
        path.relative_to(DOCS).with_suffix("").as_posix() for path in (*DOCS.glob("*.md"), *DOCS.glob("*/*.ipynb"))
    }
    assert {name for names in listed for name in names.split()} == pages - {"index"}


def test_every_option_of_the_method_has_a_heading() -> None:
    owners = {owner for group in OPTION_GROUPS.values() for owner in group}
    # What has none is the Trainer's, or changes a default of the Trainer's.
    inherited = {"NewerOptions", "TrainingArguments", "AttentionGuidedRLConfig"}
    for item in dataclasses.fields(AttentionGuidedRLConfig):
        owner = declaring_class(AttentionGuidedRLConfig, item.name)
        assert owner in owners or owner.__name__ in inherited, item.name


def first_column(page: str) -> list[str]:
    """The names in the first column of every table of a page, by backticks or as links."""
    rows = re.findall(r"^\| (.+?) \| .+ \|$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [name for row in rows for pair in re.findall(r"`([\w.]+)`|\[([\w-]+)\]\(", row) for name in pair if name]


def test_every_options_file_has_a_line_among_the_recipes() -> None:
    assert sorted(first_column("recipes.md")) == sorted(shipped_configs())


def test_every_warning_has_a_line_in_troubleshooting() -> None:
    assert {ailment.value for ailment in Ailment} <= set(first_column("troubleshooting.md"))


def test_the_version_is_that_of_the_package() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == attention_rl_trainer.__version__
    changes = re.search(r"^## ([\d.]+)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert changes is not None
    assert changes[1] == attention_rl_trainer.__version__
    assert "attr: attention_rl_trainer._version.__version__" in (REPOSITORY / "setup.cfg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.name
)
def test_an_issue_form_is_one(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name != "config.yml":
        assert {"name", "description", "body"} <= form.keys()
        names = [field["id"] for field in form["body"]]
        assert len(names) == len(set(names))


def test_hooks_run_what_make_lint_runs() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    (linted,) = re.findall(r"^lint: setup\n((?:\t.+\n)+)", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M)
    tools = {Path(line.split()[0]).name for line in linted.splitlines()}
    assert {Path(hook["entry"].split()[0]).name for hook in hooks} == tools
