"""``attention-rl calibrate`` on a tiny saved model: what it prints, what it writes, and that a run takes it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import OPTIONS, article_texts, save_tiny_llama, write_rows

from attention_rl_trainer.cli import main
from attention_rl_trainer.ordering import OrderSettings
from attention_rl_trainer.rollout.calibration import Calibration

FITTED = """\
attention_heads: probe
probe_heads: 3
head_similarity: cosine
head_aggregation: scores
center_vectors: true
selection_temperature: auto
calibration_memories: 6
"""


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    texts = article_texts(16)
    save_tiny_llama(tmp_path / "model", texts)
    articles = write_rows(
        tmp_path / "articles.jsonl", [{"title": f"{n}", "text": text} for n, text in enumerate(texts)]
    )
    config = tmp_path / "options.yaml"
    config.write_text(OPTIONS + FITTED, encoding="utf-8")
    return [
        *("--config", str(config)),
        *("--model_name_or_path", str(tmp_path / "model")),
        *("--dataset", str(articles)),
        *("--output_dir", str(tmp_path / "out")),
    ]


def last_lines(printed: str) -> dict[str, float]:
    pairs = (line.split(": ") for line in printed.strip().splitlines()[-3:])
    return {name: float(value) for name, value in pairs}


def test_it_prints_and_writes_what_was_fitted(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *flags]) == 0
    printed = capsys.readouterr().out
    figures = last_lines(printed)
    assert list(figures) == ["p_right", "p_right_literal", "selection_information"]
    assert all(0 <= value <= 1.5 for value in figures.values())
    calibration = Calibration.read(tmp_path / "out")
    assert calibration.heads is not None
    assert printed.count("yes") == len(calibration.heads) == 3
    assert (tmp_path / "out" / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_it_fits_what_a_run_fits(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["calibrate", *flags])
    changes = ["--num_episodes", "8", "--generation_batch_size", "8", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *flags, *changes]) == 0
    assert Calibration.read(tmp_path / "run").digest == Calibration.read(tmp_path / "out").digest


def test_it_measures_on_other_articles_where_they_are_named(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["calibrate", *flags])
    first = Calibration.read(tmp_path / "out")
    assert "memories of training that were not fitted to" in capsys.readouterr().out.replace("\n", " ")
    rows = [{"title": f"{n}", "text": text} for n, text in enumerate(article_texts(8, seed=1))]
    held_out = write_rows(tmp_path / "held_out.jsonl", rows)
    main(["calibrate", *flags, "--dataset_eval_name", str(held_out)])
    printed = capsys.readouterr().out
    assert f"({held_out})" in printed.replace("\n", "")
    assert Calibration.read(tmp_path / "out").digest == first.digest


def test_options_that_fit_nothing_are_measured_with_the_calibrated_selector(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "options.yaml").write_text(OPTIONS + "probe_heads: 3\ncalibration_memories: 6\n", encoding="utf-8")
    assert main(["calibrate", *flags]) == 0
    assert "The options fit nothing" in caplog.text
    assert Calibration.read(tmp_path / "out").query_means is not None


def test_too_few_heads_are_refused(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", *flags, "--probe_heads", "99"]) == 2
    assert "probe_heads is 99, but the model has 8 heads" in capsys.readouterr().err


def test_in_the_folder_of_a_run_it_leaves_that_of_the_adapter(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags, "--num_episodes", "8", "--generation_batch_size", "8"]) == 0
    before = Calibration.read(tmp_path / "out").digest
    assert main(["calibrate", *flags, "--calibration_memories", "8"]) == 0
    assert Calibration.read(tmp_path / "out").digest == before
    assert Calibration.read(tmp_path / "out" / "calibration").digest != before


def test_a_run_that_fits_nothing_is_evaluated_and_ordered_without_what_lies_beside_it(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.yaml").write_text(OPTIONS + "probe_heads: 3\ncalibration_memories: 6\n", encoding="utf-8")
    assert main(["calibrate", *flags]) == 0
    assert main(["train", *flags, "--num_episodes", "8", "--generation_batch_size", "8"]) == 0
    assert (tmp_path / "out" / "selector_calibration.safetensors").is_file()
    data = ["--dataset", str(tmp_path / "articles.jsonl"), "--episodes", "2", "--order_episodes", "0"]
    where = ["--model_name_or_path", str(tmp_path / "model")]
    assert main(["evaluate", str(tmp_path / "out"), *data, *where]) == 0
    assert OrderSettings.read(tmp_path / "out").calibration is None


def test_without_matplotlib_all_is_printed_but_the_picture(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["calibrate", *flags]) == 0
    printed = capsys.readouterr().out
    assert 'pip install "attention-rl-trainer[report]"' in printed.replace("\n", " ")
    assert "p_right" in last_lines(printed)


def test_the_model_is_loaded_as_the_options_say(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", *flags, "--attn_implementation", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
