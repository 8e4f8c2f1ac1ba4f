"""The table of inherited options is complete for the installed transformers, and its page is the table."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import transformers
from packaging.version import Version
from transformers import TrainingArguments

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.inherited import VERDICTS, page
from attention_rl_trainer.options import check_value

PAGE = Path(__file__).parents[2] / "docs" / "training_arguments.md"
INSTALLED = Version(transformers.__version__).release[:2]
FIELDS = {item.name: item for item in fields(TrainingArguments)}


def test_every_field_has_a_verdict_and_every_verdict_a_field() -> None:
    expected = {name for name, verdict in VERDICTS.items() if verdict.since <= INSTALLED}
    assert FIELDS.keys() - expected == set(), "give these a verdict, by reading what the Trainer does with them"
    assert expected - FIELDS.keys() == set(), "the installed transformers has these no more"


@pytest.mark.parametrize("name", sorted(VERDICTS))
def test_a_verdict_has_a_reason_and_names_what_there_is(name: str) -> None:
    verdict = VERDICTS[name]
    assert verdict.text or verdict.kind == "honoured"
    assert verdict.fixed is None or verdict.instead is None
    if verdict.instead is not None:
        assert verdict.instead in AttentionGuidedRLConfig.__dataclass_fields__


@pytest.mark.parametrize("name", [name for name in sorted(VERDICTS) if name in FIELDS])
def test_the_default_passes(name: str) -> None:
    item, verdict = FIELDS[name], VERDICTS[name]
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    hint = get_type_hints(TrainingArguments)[name] if verdict.range is None else verdict.range
    if verdict.kind != "refused" and name != "output_dir":
        check_value(name, default, hint)


@pytest.mark.parametrize("name", [name for name, verdict in sorted(VERDICTS.items()) if verdict.fixed is not None])
def test_what_must_stay_is_the_default_here(name: str) -> None:
    assert AttentionGuidedRLConfig.__dataclass_fields__[name].default == VERDICTS[name].fixed


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "write it anew: python -c \"from attention_rl_trainer.inherited import page; print(page(), end='')\""
    )
    for name in VERDICTS:
        assert page().count(f"| `{name}` |") == 1
