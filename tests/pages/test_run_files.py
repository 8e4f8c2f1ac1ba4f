"""What is read of a run's folder, whole, under way or broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folder import make_rows, write_run

from attention_rl_trainer.pages.run import OPTIONS_NAME, read_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", make_rows())


def test_the_options_are_where_the_trainer_writes_them() -> None:
    from attention_rl_trainer.episodes import RUN_CONFIG_NAME

    assert OPTIONS_NAME == RUN_CONFIG_NAME


def test_a_finished_run(folder: Path) -> None:
    run = read_run(folder)
    assert run.notes == []
    assert (run.name, run.num_episodes, run.planned_episodes) == ("run", 48, 48)
    assert run.rows == make_rows()
    assert run.settings == {"model": "tiny | <b>", "articles": "made up"}
    assert run.evaluations["eval"]["queries"]["policy"]["mean"] == 0.2  # type: ignore[index]
    assert run.written is not None
    assert [entry["step"] for entry in run.log_history] == [1, 2, 3, 4, 5, 6]
    # A loss that was not a number cannot be drawn.
    assert "loss" not in run.log_history[0]
    assert run.log_history[1]["loss"] == 0.5


class TestDamage:
    def test_a_cut_last_line_is_that_of_a_run_under_way(self, folder: Path) -> None:
        ledger = folder / "trajectories.jsonl"
        ledger.write_bytes(ledger.read_bytes()[:-40])
        run = read_run(folder)
        assert len(run.rows) == 47
        (note,) = run.notes
        assert note.startswith("The last line of trajectories.jsonl is unfinished and left out")

    @pytest.mark.parametrize(
        "line",
        [b"\xff\xfe\n", b"3\n", b"{}\n", b"[1]\n", b"\n", b"[" * 10_000 + b"\n", b'{"episode": 1e999}\n'],
        ids=["no text", "a number", "no fields", "a list", "empty", "deep", "infinite"],
    )
    def test_other_lines_are_left_out_by_number(self, folder: Path, line: bytes) -> None:
        ledger = folder / "trajectories.jsonl"
        lines = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join([*lines[:4], line, *lines[4:]]))
        run = read_run(folder)
        assert len(run.rows) == 48
        assert run.notes == ["Left out of trajectories.jsonl, because they are not trajectories: lines 5."]

    def test_of_many_the_first_are_named(self, folder: Path) -> None:
        ledger = folder / "trajectories.jsonl"
        ledger.write_bytes(ledger.read_bytes() + b"{}\n" * 7)
        (note,) = read_run(folder).notes
        assert note.endswith("lines 49, 50, 51, 52, 53, … (7 in all).")

    def test_rows_that_are_missing_or_twice_are_counted(self, folder: Path) -> None:
        ledger = folder / "trajectories.jsonl"
        lines = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join([*lines[:10], *lines[12:], lines[20]]))
        run = read_run(folder)
        assert len(run.rows) == 46
        assert run.notes == [
            "Left out of trajectories.jsonl, because their episodes are there before: 1 lines.",
            "2 of the 48 episodes are not in trajectories.jsonl.",
        ]

    def test_the_log_is_that_of_the_newest_checkpoint_that_has_one(self, folder: Path) -> None:
        earlier = folder / "checkpoint-2"
        earlier.mkdir()
        state = {"log_history": [{"step": 2, "episodes": 16, "kl": 0.5}]}
        (earlier / "trainer_state.json").write_text(json.dumps(state))
        assert len(read_run(folder).log_history) == 6
        (folder / "checkpoint-6" / "trainer_state.json").write_text("{")
        run = read_run(folder)
        assert run.log_history == [{"step": 2.0, "episodes": 16.0, "kl": 0.5}]
        assert "The log is that of checkpoint-2, up to episode 16; the ledger goes on to episode 48." in run.notes

    def test_a_run_before_its_first_checkpoint(self, folder: Path) -> None:
        (folder / "checkpoint-6" / "trainer_state.json").unlink()
        (folder / "report" / "summary.md").unlink()
        run = read_run(folder)
        assert run.log_history == []
        assert run.settings == {}
        (note,) = run.notes
        assert note.startswith("There is no checkpoint with a trainer_state.json yet")

    def test_a_run_before_its_first_episode(self, tmp_path: Path) -> None:
        (tmp_path / OPTIONS_NAME).write_text('{"num_episodes": 5}')
        run = read_run(tmp_path)
        assert (run.rows, run.num_episodes, run.planned_episodes, run.written) == ([], 0, 5, None)
        assert run.notes[0] == "There is no trajectories.jsonl: nothing was rolled out yet."

    @pytest.mark.parametrize("text", ["{", "[]", '{"queries": []}'])
    def test_an_unreadable_evaluation_is_no_evaluation(self, folder: Path, text: str) -> None:
        (folder / "evaluation" / "eval" / "evaluation.json").write_text(text)
        assert read_run(folder).evaluations == {}

    def test_another_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is not the folder of a run: it holds neither trajectories\.jsonl nor"):
            read_run(tmp_path)
