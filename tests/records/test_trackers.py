"""Trajectories in the trackers: TensorBoard's own files, and the interface that trackio and wandb share."""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_up_run import make_row
from tiny import tiny_config, tiny_trainer
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.records.ledger import LedgerRow
from attention_rl_trainer.records.trackers import (
    TrajectoryTrackingCallback,
    expect_trackers,
    to_markdown,
    trajectory_records,
)

STEP = {"loss": 0.5, "episodes": 8.0}


@dataclass
class Told:
    """What a module with the interface of trackio and wandb was told."""

    logged: list[dict[str, Any]] = field(default_factory=list)

    def module(self, name: str) -> ModuleType:
        module: Any = ModuleType(name)
        module.Table = lambda *, dataframe: dataframe
        module.Image = lambda value: value
        module.log = self.logged.append
        return module


@pytest.fixture(params=["trackio", "wandb"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Told]:
    told = Told()
    monkeypatch.setitem(sys.modules, request.param, told.module(request.param))
    return request.param, told


def reporting(folder: Path, *names: str) -> AttentionGuidedRLConfig:
    config = tiny_config(folder)
    config.report_to = list(names)
    return config


def tracking(
    rows: list[LedgerRow], every: int = 1, callbacks: list[TrainerCallback] | None = None
) -> TrajectoryTrackingCallback:
    return TrajectoryTrackingCallback(lambda: rows, lambda: callbacks or [], every)


def log(
    callback: TrajectoryTrackingCallback,
    args: AttentionGuidedRLConfig,
    step: int,
    logs: dict[str, float] | None = None,
    **changes: Any,
) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=changes.pop("is_main", True), **changes)
    callback.on_log(args, state, TrainerControl(), logs=STEP if logs is None else logs)


class TestRecords:
    def test_a_record_per_query(self) -> None:
        records = trajectory_records([make_row(3, step=2), make_row(4, step=2, verdict="below_threshold")])
        assert len(records) == 6
        assert records[1] == {
            "step": 2,
            "episode": 3,
            "article": "Amsterdam",
            "number": 2,
            "query": " Where is it",
            "key": " It lies",
            "value": " on the Amstel",
            "probability": 0.6,
            "reward": 0.03,
            "query_gain": 0.01,
            "model_gain": 0.02,
            "verdict": "kept",
        }
        assert [record["verdict"] for record in records] == ["kept"] * 3 + ["below_threshold"] * 3

    def test_text_stays_text_in_markdown(self) -> None:
        row = make_row(queries=["a | b\n", "<b>*x*</b>", "&lt;"])
        lines = to_markdown(trajectory_records([row])).splitlines()
        assert lines[0].startswith("| step | episode | article |")
        assert lines[2].split(" | ")[4] == r"a \| b\\n"
        assert r"&lt;b>\*x\*&lt;/b>" in lines[3]
        assert " &amp;lt; " in lines[4]

    def test_a_text_has_a_limit(self) -> None:
        text = to_markdown(trajectory_records([make_row(), make_row(1)]), limit=4)
        assert len(text.splitlines()) == 2 + 4 + 2
        assert text.endswith("2 more are in the ledger.")


class TestTensorBoard:
    def test_its_files_hold_table_and_picture(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(tmp_path / "runs"))
        callback = tracking([make_row(), make_row(1)], callbacks=[TensorBoardCallback(tb_writer=writer)])
        log(callback, reporting(tmp_path, "tensorboard"), 5)
        writer.close()
        written = EventAccumulator(str(tmp_path / "runs")).Reload()
        (table,) = written.Tensors("trajectories/text_summary")
        assert table.step == 5
        assert "| Where is it | It lies | on the Amstel | 0.6000 |" in table.tensor_proto.string_val[0].decode()
        (picture,) = written.Images("choices")
        assert (picture.step, picture.width > 300, picture.height > 100) == (5, True, True)


class TestTables:
    def test_table_and_picture_of_a_step(self, tmp_path: Path, told: tuple[str, Told]) -> None:
        name, calls = told
        log(tracking([make_row(), make_row(1, query_gain=0.5)]), reporting(tmp_path, name, "tensorboard"), 3)
        (logged,) = calls.logged
        assert logged["train/global_step"] == 3
        assert logged["trajectories"].to_dict("records") == trajectory_records(
            [make_row(), make_row(1, query_gain=0.5)]
        )
        picture = logged["choices"]
        assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
        assert len(np.unique(picture)) > 10

    def test_every_so_many_steps(self, tmp_path: Path, told: tuple[str, Told]) -> None:
        name, calls = told
        callback, args = tracking([make_row()], every=4), reporting(tmp_path, name)
        callback.on_train_begin(args, TrainerState(global_step=2), TrainerControl())
        for step in (3, 5, 6, 7, 8, 11):
            log(callback, args, step)
        assert [logged["train/global_step"] for logged in calls.logged] == [5, 8]

    def test_only_steps_of_the_main_process(self, tmp_path: Path, told: tuple[str, Told]) -> None:
        name, calls = told
        args = reporting(tmp_path, name)
        log(tracking([make_row()]), args, 1, {"eval_reward": 0.5})
        log(tracking([make_row()]), args, 1, is_main=False)
        log(tracking([]), args, 1)
        log(tracking([make_row()]), reporting(tmp_path), 1)
        assert calls.logged == []

    def test_without_matplotlib_there_is_the_table_alone(
        self, tmp_path: Path, told: tuple[str, Told], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name, calls = told
        monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
        log(tracking([make_row()]), reporting(tmp_path, name), 1)
        assert set(calls.logged[0]) == {"trajectories", "train/global_step"}


def test_a_run_that_reports_to_tensorboard(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    options: dict[str, Any] = {"report_to": ["tensorboard"], "log_completions": True, "log_trajectory_steps": 2}
    tiny_trainer(tmp_path, texts, tokenizer, num_episodes=40, **options).train()
    written = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in written.Scalars("train/reward")] == [1, 2, 3, 4, 5]
    tables = written.Tensors("trajectories/text_summary")
    assert [(event.step, event.tensor_proto.string_val[0].count(b"| article ")) for event in tables] == [
        (2, 25),
        (4, 25),
    ]
    assert [event.step for event in written.Images("choices")] == [2, 4]


class TestRefusals:
    def test_a_missing_package_is_named_with_its_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = {"tensorboardX": SimpleNamespace()}
        monkeypatch.setattr(importlib.util, "find_spec", found.get)
        expect_trackers(["tensorboard", "mlflow"])
        with pytest.raises(ValueError, match=r"^report_to names trackio, .* install it with: pip install trackio, or"):
            expect_trackers(["tensorboard", "trackio"])

    def test_tables_for_nobody_are_warned_of(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        begin = tracking([make_row()]).on_train_begin
        with caplog.at_level(logging.WARNING):
            begin(reporting(tmp_path, "tensorboard"), TrainerState(is_world_process_zero=True), TrainerControl())
            assert not caplog.records
            begin(reporting(tmp_path, "mlflow"), TrainerState(is_world_process_zero=True), TrainerControl())
        (record,) = caplog.records
        assert "report_to is mlflow, which holds no tables" in record.getMessage()

    def test_every_is_positive(self) -> None:
        with pytest.raises(ValueError, match="every must be at least 1, got 0"):
            tracking([], every=0)
