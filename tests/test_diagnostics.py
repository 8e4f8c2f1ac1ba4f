"""Memory figures, and the note on an error inside a phase."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from attention_rl_trainer.errors import free_memory_gib, peak_memory_gib, phase, used_memory_gib

CPU = torch.device("cpu")
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def kib_of(path: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@NEEDS_PROC
class TestMemory:
    def test_used_is_the_resident_size(self) -> None:
        assert used_memory_gib(CPU) == pytest.approx(kib_of("/proc/self/status", "VmRSS") / 2**20, rel=0.05)

    def test_peak_is_the_largest_resident_size(self) -> None:
        assert peak_memory_gib(CPU) == pytest.approx(kib_of("/proc/self/status", "VmHWM") / 2**20, rel=0.05)
        assert peak_memory_gib(CPU) >= 0.95 * used_memory_gib(CPU)

    def test_used_grows_by_what_is_allocated(self) -> None:
        before = used_memory_gib(CPU)
        block = torch.ones(2**26)  # 256 MiB, large enough to be mapped and unmapped on its own
        assert used_memory_gib(CPU) - before == pytest.approx(0.25, abs=0.05)
        assert peak_memory_gib(CPU) >= before + 0.2
        del block
        assert used_memory_gib(CPU) - before == pytest.approx(0.0, abs=0.05)

    def test_free_is_what_the_system_offers(self) -> None:
        free = free_memory_gib(CPU)
        assert free is not None
        assert 0 < free <= kib_of("/proc/meminfo", "MemTotal") / 2**20
        assert free == pytest.approx(kib_of("/proc/meminfo", "MemAvailable") / 2**20, rel=0.2)


class TestPhase:
    @staticmethod
    def note_on(error: BaseException) -> str:
        shapes = {"trajectories": 64, "steps": 8}
        with pytest.raises(type(error)) as caught, phase("rollout", 3, CPU, shapes, "generation_batch_size"):
            raise error
        assert caught.value is error
        return "\n".join(getattr(error, "__notes__", []))

    @pytest.mark.parametrize(
        "error", [RuntimeError("bad"), torch.OutOfMemoryError("full"), MemoryError(), NotImplementedError()]
    )
    def test_a_failure_says_where_it_happened_and_what_to_lower(self, error: Exception) -> None:
        note = self.note_on(error)
        assert note.startswith("In the rollout of step 3 (trajectories 64, steps 8); memory in use ")
        assert re.search(r"memory in use \d+\.\d\d GiB, peak \d+\.\d\d GiB on cpu\.", note)
        assert note.endswith("If memory ran out, lower generation_batch_size.")

    @pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), KeyboardInterrupt()])
    def test_other_errors_are_left_alone(self, error: BaseException) -> None:
        assert self.note_on(error) == ""

    def test_the_innermost_of_nested_phases_is_noted(self) -> None:
        with (
            pytest.raises(RuntimeError) as caught,
            phase("update", 1, CPU, {}, "a"),
            phase("loss", 1, CPU, {}, "b"),
        ):
            raise RuntimeError
        assert [note.split(" of step")[0] for note in caught.value.__notes__] == ["In the loss"]

    def test_without_a_failure_nothing_happens(self) -> None:
        with phase("rollout", 1, CPU, {}, "nothing"):
            result = 2
        assert result == 2

    def test_a_failing_forward_is_noted(self) -> None:
        with (
            pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught,
            phase("update", 7, CPU, {"vocabulary": 420}, "training_batch_size"),
        ):
            torch.ones(2, 3) @ torch.ones(2, 3)
        assert "In the update of step 7 (vocabulary 420)" in caught.value.__notes__[0]
