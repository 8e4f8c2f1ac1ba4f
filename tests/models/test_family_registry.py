"""Every family of causal language models is exact here, or refused by name."""

from __future__ import annotations

import re

import pytest
import transformers
from family_registry import PAGE, examine, examine_all, render


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_family_is_exact_or_refused_and_the_page_says_which() -> None:
    statuses = examine_all()
    bad = {name: status for name, status in statuses.items() if status.kind not in ("exact", "refused", "not built")}
    assert not bad
    assert sum(status.kind == "exact" for status in statuses.values()) >= 80
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " in page:
        assert render(statuses) == page


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt+layerdrop", "qwen3_next", "mixtral+jitter", "phimoe+jitter", "lfm2", "olmo+clip"]
)
def test_some_families_are_exact(name: str) -> None:
    assert examine(name).kind == "exact"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("jamba", "attention_layer=2: the rollout and the update do not compute alike.*does not continue a forward"),
        ("bamba", "attention_layer=1: the rollout and the update do not compute alike.*does not continue a forward"),
        ("phi3+longrope", "the rollout and the update do not compute alike.*longrope"),
        ("llama+dynamic_rope", "the rollout and the update do not compute alike"),
        ("doge+experts", "the rollout and the update do not compute alike"),
        ("minimax+attention_last", "a step of a rollout fails: .*cache"),
        ("deepseek_v3", "no known query and key projections"),
        # From transformers 5.24 on, its projections are modules of another kind.
        (
            "inkling2_text",
            "compares is not the output of its query projection|Inkling2QueryProjection does not say how many",
        ),
        ("bloom", "does not call transformers' attention functions"),
    ],
)
def test_others_are_refused_by_name(name: str, reason: str) -> None:
    status = examine(name)
    assert status.kind == "refused"
    assert re.search(reason, status.note), status.note
