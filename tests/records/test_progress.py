"""The state of a run on disk: exact, complete, and no pickle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention_rl_trainer
from attention_rl_trainer.records.progress import (
    PREVIOUS_ADAPTER_NAME,
    STATE_NAME,
    CheckpointError,
    RunState,
    load_run_state,
    save_run_state,
)
from attention_rl_trainer.types import StreamPosition
from attention_rl_trainer.update.filter import RewardStatistics

STATE = RunState(RewardStatistics(7, -1 / 3, math.pi * 1e-9), 7, 2, StreamPosition(1, 12))
SOURCES = sorted(Path(attention_rl_trainer.__file__).parent.rglob("*.py"))

finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**53)


class TestRunState:
    @given(counts, finite, finite.filter(lambda value: value >= 0), counts, counts, counts, counts)
    def test_json_gives_it_back_to_the_last_bit(
        self, count: int, mean: float, squares: float, episodes: int, updates: int, epoch: int, index: int
    ) -> None:
        state = RunState(RewardStatistics(count, mean, squares), episodes, updates, StreamPosition(epoch, index))
        restored = RunState.from_state_dict(json.loads(json.dumps(state.state_dict())))
        assert restored == state
        assert restored.statistics.mean.hex() == mean.hex()
        assert restored.statistics.sum_of_squares.hex() == squares.hex()

    def test_a_new_run_is_at_its_beginning(self) -> None:
        assert RunState() == RunState(RewardStatistics(0, 0.0, 0.0), 0, 0, StreamPosition(0, 0))

    def test_runs_share_nothing(self) -> None:
        one, other = RunState(), RunState()
        one.statistics.update(torch.ones(3))
        assert other.statistics.count == 0

    @pytest.mark.parametrize("found", [0, 1, "2", None])
    def test_another_format_is_refused(self, found: object) -> None:
        with pytest.raises(CheckpointError, match=f"^the checkpoint has format {found!r}, this version reads 3$"):
            RunState.from_state_dict(STATE.state_dict() | {"format": found})


class TestFiles:
    def test_state_and_tensors_come_back(self, tmp_path: Path) -> None:
        tensors = {
            "float32": torch.randn(3, 4),
            "bfloat16": torch.randn(5).to(torch.bfloat16),
            "transposed": torch.randn(4, 3).T,
            "scalar": torch.tensor(1e-30),
        }
        save_run_state(tmp_path, STATE, tensors)
        state, restored = load_run_state(tmp_path)
        assert state == STATE
        assert set(restored) == set(tensors)
        for name, tensor in tensors.items():
            assert restored[name].dtype == tensor.dtype
            assert torch.equal(restored[name], tensor)

    def test_two_files_are_written(self, tmp_path: Path) -> None:
        save_run_state(tmp_path, STATE, {"a": torch.ones(1)})
        assert {path.name for path in tmp_path.iterdir()} == {STATE_NAME, PREVIOUS_ADAPTER_NAME}
        assert json.loads((tmp_path / STATE_NAME).read_text())["num_episodes"] == 7

    def test_another_format_is_refused(self, tmp_path: Path) -> None:
        save_run_state(tmp_path, STATE, {"a": torch.ones(1)})
        (tmp_path / STATE_NAME).write_text(json.dumps(STATE.state_dict() | {"format": 1}))
        with pytest.raises(CheckpointError, match="the checkpoint has format 1, this version reads 3"):
            load_run_state(tmp_path)
