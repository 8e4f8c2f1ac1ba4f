"""What was fitted is kept to the bit, and what is not such a file is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attention_rl_trainer.models.heads import HeadNumber
from attention_rl_trainer.rollout.calibration import CALIBRATION_NAME, Calibration

# In no order that a sort would give.
HEADS = (HeadNumber(2, 10), HeadNumber(17, 3), HeadNumber(2, 9))
ORIGIN: dict[str, Any] = {"model": "tiny", "articles": 64, "share": 0.1, "center_vectors": True, "layer": None}


def made_up(**changes: Any) -> Calibration:
    generator = torch.Generator().manual_seed(4)
    fields: dict[str, Any] = {
        "temperature": 0.1 + 0.2,  # not a short decimal
        "heads": HEADS,
        "query_means": torch.randn(3, 3, generator=generator),
        "key_means": torch.randn(3, 3, generator=generator),
        "origin": ORIGIN,
        "figures": {"p_right": 1 / 3, "p_right_literal": 0.1},
    }
    return Calibration(**fields | changes)


def expect_equal(got: Calibration, expected: Calibration) -> None:
    assert (got.temperature, got.heads, got.origin) == (expected.temperature, expected.heads, expected.origin)
    assert dict(got.figures) == dict(expected.figures)
    for name in ("query_means", "key_means"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))


class TestOnDisk:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"heads": None},
            {"query_means": None, "key_means": None},
            {"heads": None, "query_means": None, "key_means": None, "origin": {}, "figures": {}},
            {"origin": {"title": "Zürich — naïve 北京 🙂"}},
            {"query_means": torch.randn(3, 3).T},  # not contiguous
        ],
        ids=["whole", "of a layer", "without means", "a temperature alone", "letters", "strided"],
    )
    def test_what_was_saved_is_loaded(self, changes: dict[str, Any], tmp_path: Path) -> None:
        saved = made_up(**changes)
        path = saved.save(tmp_path)
        assert path == tmp_path / CALIBRATION_NAME
        assert [file.name for file in tmp_path.iterdir()] == [CALIBRATION_NAME]
        loaded = Calibration.read(tmp_path)
        expect_equal(loaded, saved)
        assert loaded.digest == saved.digest
        before = path.read_bytes()
        assert loaded.save(tmp_path).read_bytes() == before

    def test_awkward_numbers_keep_every_bit(self, tmp_path: Path) -> None:
        means = torch.tensor([[-0.0, 1e-45, 3.4e38], [1 / 3, -1e-38, 5.0], [0.0, 2**-149, 1.0]])
        saved = made_up(temperature=5e-324, query_means=means, key_means=-means, figures={"p_right": 1 - 2**-53})
        saved.save(tmp_path)
        loaded = Calibration.read(tmp_path)
        assert loaded.query_means is not None
        assert loaded.query_means.numpy().tobytes() == means.numpy().tobytes()
        assert (loaded.temperature, loaded.figures["p_right"]) == (5e-324, 1 - 2**-53)

    @pytest.mark.slow
    def test_two_processes_write_the_same_bytes(self, tmp_path: Path) -> None:
        program = (
            "import sys; from pathlib import Path; from attention_rl_trainer.rollout.calibration import Calibration; "
            "Calibration.read(Path(sys.argv[1])).save(Path(sys.argv[2]))"
        )
        folders = [tmp_path / name for name in ("first", "second")]
        for folder in folders:
            folder.mkdir()
        first = made_up().save(folders[0]).read_bytes()
        # Another seed of hash(), by which the order of sets and of some libraries' maps goes.
        environment = {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1", "PATH": ""}
        subprocess.run([sys.executable, "-c", program, *map(str, folders)], check=True, env=environment, cwd=Path.cwd())
        assert (folders[1] / CALIBRATION_NAME).read_bytes() == first
        assert made_up().save(folders[1]).read_bytes() == first

    def test_a_missing_file_says_where_one_comes_from(self, tmp_path: Path) -> None:
        wanted = rf"{CALIBRATION_NAME}; a run whose selector is calibrated writes it .* and so does attention-rl calibr"
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(ValueError, match=wanted):
                Calibration.read(folder)

    @pytest.mark.parametrize("kept", [0, 4, 40, -1])
    def test_a_damaged_file_is_refused(self, kept: int, tmp_path: Path) -> None:
        path = made_up().save(tmp_path)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match=rf"{CALIBRATION_NAME} is not a calibration that can be read: .*again"):
            Calibration.read(tmp_path)

    @pytest.mark.parametrize(
        "metadata",
        [
            None,
            {"format": "pt"},
            {"calibration": "{"},
            {"calibration": "[]"},
            {"calibration": "{}"},
            {"temperature": "1.0"},
        ],
    )
    def test_a_foreign_file_is_refused(self, metadata: dict[str, str] | None, tmp_path: Path) -> None:
        save_file({"query_means": torch.zeros(2, 3)}, tmp_path / CALIBRATION_NAME, metadata=metadata)
        with pytest.raises(ValueError, match="is not a calibration that can be read"):
            Calibration.read(tmp_path)

    @pytest.mark.parametrize(
        "changes",
        [
            {"temperature": 0},
            {"temperature": "cold"},
            {"temperature": None},
            {"temperature": float("nan")},
            {"temperature": float("inf")},
            {"heads": ["17"]},
            {"heads": ["17.3"]},  # there are means of three
            {"heads": 3},
            {"figures": [1.0]},
            {"origin": "tiny"},
        ],
        ids=str,
    )
    def test_a_file_of_other_content_is_refused(self, changes: dict[str, Any], tmp_path: Path) -> None:
        facts = {"temperature": 0.1, "heads": ["2.10", "17.3", "2.9"], "origin": {}, "figures": {}}
        tensors = {"query_means": torch.zeros(3, 3), "key_means": torch.zeros(3, 3)}
        path = tmp_path / CALIBRATION_NAME
        save_file(tensors, path, metadata={"calibration": json.dumps(facts)})
        assert Calibration.read(tmp_path).heads == HEADS
        save_file(tensors, path, metadata={"calibration": json.dumps(facts | changes)})
        with pytest.raises(ValueError, match="is not a calibration that can be read"):
            Calibration.read(tmp_path)

    @pytest.mark.parametrize("name", ["query_means", "key_means"])
    def test_means_of_one_side_alone_are_refused(self, name: str, tmp_path: Path) -> None:
        facts = {"temperature": 0.1, "heads": None, "origin": {}, "figures": {}}
        metadata = {"calibration": json.dumps(facts)}
        save_file({name: torch.zeros(2, 3)}, tmp_path / CALIBRATION_NAME, metadata=metadata)
        with pytest.raises(ValueError, match="give the means of queries and of keys, or neither"):
            Calibration.read(tmp_path)


class TestDigest:
    @pytest.mark.parametrize(
        "changes",
        [
            {"temperature": 0.3},
            {"heads": None},
            {"heads": HEADS[::-1]},
            {"heads": (HeadNumber(21, 0), *HEADS[1:])},
            {"query_means": None, "key_means": None},
            {"query_means": torch.zeros(3, 3)},
            {"key_means": torch.zeros(3, 3)},
        ],
        ids=["temperature", "no heads", "order", "another head", "no means", "query means", "key means"],
    )
    def test_every_part_that_changes_a_choice_counts(self, changes: dict[str, Any]) -> None:
        assert made_up(**changes).digest != made_up().digest

    def test_a_single_bit_of_a_mean_counts(self) -> None:
        calibration = made_up()
        assert calibration.query_means is not None
        moved = calibration.query_means.clone()
        moved[1, 2] = torch.nextafter(moved[1, 2], torch.tensor(9.0))
        assert replace(calibration, query_means=moved).digest != calibration.digest

    def test_it_matters_to_which_side_a_mean_belongs(self) -> None:
        numbers = torch.arange(12.0).view(4, 3)
        digests = {Calibration(1.0, None, numbers[:count], numbers[count:]).digest for count in (1, 2, 3)}
        assert len(digests) == 3
        taller = Calibration(1.0, None, numbers[:2].reshape(3, 2), numbers[2:].reshape(3, 2))
        assert taller.digest not in digests

    def test_origin_and_figures_do_not(self) -> None:
        calibration = made_up(origin={}, figures={})
        assert calibration.digest == made_up().digest
        assert len(calibration.digest) == 16
        assert int(calibration.digest, 16) >= 0


class TestChecks:
    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
    def test_temperature(self, temperature: float) -> None:
        with pytest.raises(ValueError, match=f"the temperature must be above 0.*, got {temperature}"):
            Calibration(temperature)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"key_means": None}, "give the means of queries and of keys, or neither"),
            ({"key_means": torch.zeros(3, 4)}, r"key_means must have shape \[3, 3\], got \[3, 4\]"),
            ({"query_means": torch.zeros(3, 3, dtype=torch.int64)}, "query_means must have a floating-point dtype"),
            ({"query_means": torch.zeros(6)}, "query_means must have shape"),
            # One mean would be taken from every head, and no one would know.
            ({"query_means": torch.zeros(1, 3)}, r"query_means must have shape \[3, any\], got \[1, 3\]"),
            ({"key_means": torch.zeros(1, 3)}, r"key_means must have shape \[3, 3\], got \[1, 3\]"),
        ],
    )
    def test_means(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            made_up(**changes)


def test_it_says_what_it_is() -> None:
    text = "3 heads (2.10, 17.3, 2.9), temperature 0.3, vectors less their means"
    figures = "; half a key draws its pair 0.33 of the time, with the literal selector 0.10"
    assert made_up().describe() == text + figures
    assert made_up(figures={}).describe() == text
    assert Calibration(0.02).describe() == "temperature 0.02"
