"""How far a run has come, and its state on disk: exact, complete, and refused where another version wrote it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_batch

from attention_rl_trainer.durability.discovery import CheckpointError
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.records.progress import (
    PREVIOUS_ADAPTER_NAME,
    STATE_NAME,
    Progress,
    load_parts,
    load_previous_adapter,
    save_parts,
)
from attention_rl_trainer.types import StreamPosition
from attention_rl_trainer.update.filter import RewardFilter, RewardStatistics

STATES = {
    "filter": RewardStatistics(7, -1 / 3, math.pi * 1e-9).state_dict(),
    "progress": {
        "num_episodes": 7,
        "num_warm_start": 0,
        "position": {"epoch": 1, "index": 12},
        "skipped": {"too short": 3},
    },
    "updater": {"num_updates": 2},
    "recorder": {"metrics": {}, "health": {}},
}

finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**53)


class TestProgress:
    def test_a_new_run_is_at_its_beginning(self) -> None:
        progress = Progress(20)
        assert (progress.num_episodes, progress.position, progress.skipped) == (0, StreamPosition(0, 0), {})
        assert (progress.total_episodes, progress.episodes_left) == (20, 20)

    def test_runs_share_nothing(self) -> None:
        one, other = Progress(20), Progress(20)
        one.advance(dataclasses.replace(random_batch(4), skipped={"empty": 1}))
        assert (other.num_episodes, other.position, other.skipped) == (0, StreamPosition(0, 0), {})

    def test_a_batch_is_numbered_and_then_counted(self) -> None:
        progress, batch = Progress(10), random_batch(4)
        assert progress.next_episodes(range(4)) == range(4)
        progress.advance(batch)
        assert (progress.num_episodes, progress.episodes_left) == (4, 6)
        assert progress.position == batch.articles[-1].next_position == StreamPosition(0, 4)
        assert progress.next_episodes(range(1, 3)) == range(5, 7)

    def test_nothing_is_left_past_the_end(self) -> None:
        progress = Progress(3)
        progress.advance(random_batch(4))
        assert progress.episodes_left == 0

    def test_a_warm_start_is_counted_before_the_first_episode(self) -> None:
        progress = Progress(10, warm_start_episodes=8)
        seen = []
        for _ in range(4):
            progress.advance(random_batch(4))
            seen.append((progress.num_warm_start, progress.warm_start_left, progress.num_episodes))
        assert seen == [(4, 4, 0), (8, 0, 0), (8, 0, 4), (8, 0, 8)]
        assert (progress.num_trajectories, progress.episodes_left) == (16, 2)
        assert progress.next_episodes(range(2)) == range(8, 10)
        assert progress.position == StreamPosition(0, 4)

    def test_a_warm_start_resumes_where_it_stood(self) -> None:
        progress, resumed = Progress(10, 8), Progress(10, 8)
        progress.advance(dataclasses.replace(random_batch(4), skipped={"short": 2}))
        resumed.load_state_dict(json.loads(json.dumps(progress.state_dict())))
        assert (resumed.num_warm_start, resumed.warm_start_left, resumed.num_episodes) == (4, 4, 0)
        assert (resumed.open_stream(), resumed.skipped) == (StreamPosition(0, 4), {"short": 2})
        resumed.advance(random_batch(4))
        assert (resumed.warm_start_left, resumed.num_trajectories) == (0, 8)
        # Of a process, its own episodes alone.
        resumed.open_stream()
        resumed.advance(random_batch(4))
        assert (resumed.episodes_of_process, resumed.num_trajectories) == (4, 12)

    def test_a_shorter_warm_start_than_before_is_over(self) -> None:
        progress, shorter = Progress(10, 8), Progress(10, 4)
        progress.advance(random_batch(4))
        progress.advance(random_batch(4))
        shorter.load_state_dict(progress.state_dict())
        assert shorter.warm_start_left == 0
        shorter.advance(random_batch(4))
        assert (shorter.num_warm_start, shorter.num_episodes) == (8, 4)

    def test_a_streams_skipped_articles_are_added_to_those_before_it(self) -> None:
        def batch(**skipped: int) -> MemoryBatch:
            return dataclasses.replace(random_batch(2), skipped=skipped)

        progress = Progress(100)
        assert progress.open_stream() == StreamPosition(0, 0)
        progress.advance(batch(short=1))
        progress.advance(batch(short=3, empty=1))
        assert progress.skipped == {"short": 3, "empty": 1}
        # A resumed run opens a new stream, which counts from 0.
        resumed = Progress(100)
        resumed.load_state_dict(progress.state_dict())
        assert resumed.open_stream() == progress.position
        resumed.advance(batch(short=2))
        assert resumed.skipped == {"short": 5, "empty": 1}

    def test_a_batch_that_is_taken_back_is_not_counted(self) -> None:
        progress = Progress(100)
        progress.open_stream()
        before = progress.state_dict()
        progress.advance(dataclasses.replace(random_batch(2), skipped={"short": 1}))
        progress.load_state_dict(before)
        assert progress.state_dict() == before
        progress.advance(dataclasses.replace(random_batch(2), skipped={"short": 1}))
        assert progress.skipped == {"short": 1}


class TestFiles:
    @given(counts, finite, finite.filter(lambda value: value >= 0), counts, counts, counts, counts, counts)
    def test_states_come_back_to_the_last_bit(
        self,
        count: int,
        mean: float,
        squares: float,
        episodes: int,
        warm_start: int,
        updates: int,
        epoch: int,
        index: int,
    ) -> None:
        judge, progress = RewardFilter(), Progress(100)
        judge.statistics = RewardStatistics(count, mean, squares)
        progress.num_episodes, progress.num_warm_start = episodes, warm_start
        progress.position = StreamPosition(epoch, index)
        states = {"filter": judge.state_dict(), "progress": progress.state_dict(), "updater": {"num_updates": updates}}
        with TemporaryDirectory() as folder:
            save_parts(Path(folder), states, {})
            loaded = load_parts(Path(folder))
        assert loaded == states
        restored, place = RewardFilter(), Progress(100)
        restored.load_state_dict(loaded["filter"])
        place.load_state_dict(loaded["progress"])
        assert restored.statistics == judge.statistics
        assert restored.statistics.mean.hex() == mean.hex()
        assert restored.statistics.sum_of_squares.hex() == squares.hex()
        assert (place.num_episodes, place.num_warm_start) == (episodes, warm_start)
        assert place.position == StreamPosition(epoch, index)

    def test_state_and_tensors_come_back(self, tmp_path: Path) -> None:
        tensors = {
            "float32": torch.randn(3, 4),
            "bfloat16": torch.randn(5).to(torch.bfloat16),
            "transposed": torch.randn(4, 3).T,
            "scalar": torch.tensor(1e-30),
        }
        save_parts(tmp_path, STATES, tensors)
        assert load_parts(tmp_path) == STATES
        restored = load_previous_adapter(tmp_path)
        assert set(restored) == set(tensors)
        for name, tensor in tensors.items():
            assert restored[name].dtype == tensor.dtype
            assert torch.equal(restored[name], tensor)

    def test_two_files_are_written(self, tmp_path: Path) -> None:
        save_parts(tmp_path, STATES, {"a": torch.ones(1)})
        assert {path.name for path in tmp_path.iterdir()} == {STATE_NAME, PREVIOUS_ADAPTER_NAME}
        assert json.loads((tmp_path / STATE_NAME).read_text()) == {"format": 7} | STATES

    @pytest.mark.parametrize("found", [0, 1, "2", 3, 4, 5, 6, 8, None])
    def test_another_format_is_refused(self, tmp_path: Path, found: object) -> None:
        path = tmp_path / STATE_NAME
        path.write_text(json.dumps({"format": found} | STATES))
        self.expect_refused(path, f"format {found!r}" if found is not None else "no format")

    def test_a_checkpoint_of_format_3_is_refused(self, tmp_path: Path) -> None:
        """What that version wrote: the numbers of the whole run side by side."""
        record = {
            "statistics": {"count": 7, "mean": 0.5, "sum_of_squares": 1.0},
            "num_episodes": 7,
            "num_updates": 2,
            "position": {"epoch": 1, "index": 12},
            "skipped": {},
            "metrics": {},
            "health": {},
            "micro_batches": {},
        }
        path = tmp_path / STATE_NAME
        path.write_text(json.dumps({"format": 3} | record))
        self.expect_refused(path, "format 3")
        path.write_text(json.dumps(record))
        self.expect_refused(path, "no format")

    def expect_refused(self, path: Path, found: str) -> None:
        message = (
            f"{path} has {found}, but this version of attention_rl_trainer reads format 7; "
            "resume with the version that wrote it, or start anew in another output_dir"
        )
        with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
            load_parts(path.parent)
