"""A cache of its own for every test, and no Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from attention_rl_trainer import hub


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No prepared data set of another test, or of the user, is found."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget_hub_answer()
    yield tmp_path / "datasets_cache"
    hub.forget_hub_answer()
