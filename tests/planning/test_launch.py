from __future__ import annotations

import pytest
import torch

from attention_rl_trainer.planning.launch import choose_threads, describe_threads, expect_processes, set_threads

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [
        (3, {"OMP_NUM_THREADS": "2"}, 3),
        (None, {}, None),  # what PyTorch takes are all cores
        (None, {"OMP_NUM_THREADS": "1"}, None),
        (None, {"OMP_NUM_THREADS": "1"} | LAUNCHED, 8),
        (None, {"OMP_NUM_THREADS": "2"} | LAUNCHED, None),
        (None, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, 4),
        (None, {"LOCAL_WORLD_SIZE": "3"}, 2),
        (None, {"LOCAL_WORLD_SIZE": "20"}, 1),
    ],
)
def test_threads_are_chosen(asked: int | None, environment: dict[str, str], expected: int | None) -> None:
    assert choose_threads(asked, environment, num_cores=8) == expected


def test_threads_are_set_and_idle_cores_are_said() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(2)
        assert torch.get_num_threads() == 2
        assert describe_threads(num_cores=2) == "2 threads"
        assert describe_threads(num_cores=5) == "2 threads; 3 of 5 cores lie idle, set num_threads"
    finally:
        set_threads(before)


def test_another_number_of_processes_is_refused() -> None:
    expect_processes(None, 3)
    expect_processes(2, 2)
    with pytest.raises(ValueError, match=r"^num_processes is 2, but the run was launched in 1; .*--num_processes 2"):
        expect_processes(2, 1)
    with pytest.raises(ValueError, match=r"^num_processes is 1, but the run was launched in 4; .*--num_processes 1$"):
        expect_processes(1, 4)
