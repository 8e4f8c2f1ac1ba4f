"""The ledger: rows that are checked, a file that is read back, and what a resumed run removes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from made_up_run import make_record, make_row, write_ledger

from attention_rl_trainer.records.ledger import (
    LEDGER_NAME,
    Ledger,
    LedgerError,
    LedgerGaps,
    LedgerRow,
    read_ledger,
)


class TestRows:
    def test_rows_survive_a_round_trip(self, tmp_path: Path) -> None:
        rows = [make_row(0), make_row(1, order_gains=[0.1, 0.0, -0.1], threshold=None, title="\ud800 \u6771\u4eac")]
        assert read_ledger(write_ledger(tmp_path / "trajectories.jsonl", rows)) == rows

    def test_chosen_probabilities_follow_the_order_and_the_columns(self) -> None:
        assert make_row().chosen_probabilities == (0.5, 0.6, 1.0)

    def test_means_of_the_gains(self) -> None:
        row = LedgerRow.from_json(make_record())
        assert row.query_gain == pytest.approx(0.01)
        assert row.model_gain == pytest.approx(0.02)

    def test_an_empty_file_has_no_rows(self, tmp_path: Path) -> None:
        assert read_ledger(write_ledger(tmp_path / "trajectories.jsonl", [])) == []

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no ledger here; expected the trajectories\.jsonl"):
            read_ledger(tmp_path / "trajectories.jsonl")

    @pytest.mark.parametrize(
        "line",
        [b'{"episode": 1, "ti', b"", b"\xff\xfe", b"[" * 100_000, b'{"episode": NaN}', b"[1]"],
        ids=["cut", "blank", "not-utf8", "too-deep", "missing-keys", "list"],
    )
    def test_a_broken_line_is_named_with_its_number(self, tmp_path: Path, line: bytes) -> None:
        path = write_ledger(tmp_path / "trajectories.jsonl", [make_row(0), make_row(1)])
        path.write_bytes(path.read_bytes() + line + b"\n")
        with pytest.raises(LedgerError, match=r"trajectories\.jsonl, line 3: .*remove the line"):
            read_ledger(path)

    def test_an_integer_too_large_for_a_float_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "trajectories.jsonl"
        path.write_text(json.dumps(make_record(reward=10**400)), encoding="utf-8")
        with pytest.raises(LedgerError, match="line 1"):
            read_ledger(path)

    def test_token_gains_are_read_where_there_are_any(self) -> None:
        gains = [[[" of", 0.5], [" canals", -0.25]], [[" on", 0]], []]
        row = LedgerRow.from_json(make_record(token_gains=gains))
        assert row.token_gains == (((" of", 0.5), (" canals", -0.25)), ((" on", 0.0),), ())
        assert LedgerRow.from_json(json.loads(json.dumps(row.to_json()))) == row
        assert LedgerRow.from_json(make_record()).token_gains is None

    @pytest.mark.parametrize(
        "gains",
        ["abc", [[["a", 0.0]]] * 2, [["a"]] * 3, [[["a", 0.0, 1.0]]] * 3, [[[3, 0.0]]] * 3, [[["a", None]]] * 3],
        ids=["a text", "too few steps", "no pairs", "triples", "not a text", "not a number"],
    )
    def test_token_gains_of_another_form_are_refused(self, gains: object) -> None:
        with pytest.raises(LedgerError, match="'token_gains' must"):
            LedgerRow.from_json(make_record(token_gains=gains))

    def test_keys_that_are_not_fields_are_ignored(self) -> None:
        assert LedgerRow.from_json(make_record(added_later=1)) == LedgerRow.from_json(make_record())

    def test_missing_keys_are_named(self) -> None:
        record = make_record()
        del record["queries"], record["verdict"]
        with pytest.raises(LedgerError, match="missing keys: queries, verdict"):
            LedgerRow.from_json(record)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"reward": math.nan}, "'reward' must be a finite number, got nan"),
            ({"reward": True}, "'reward' must be a finite number, got True"),
            ({"threshold": "0.1"}, "'threshold' must be a finite number"),
            ({"episode": 1.0}, "'episode' must be an integer, got 1.0"),
            ({"episode": False}, "'episode' must be an integer, got False"),
            ({"title": None}, "'title' must be a string, got None"),
            ({"queries": "abc"}, "'queries' must be a list, got 'abc'"),
            ({"queries": ["a", "b", 3]}, "'queries' must be a string, got 3"),
            ({"verdict": "dropped"}, "'verdict' must be kept, below_threshold or warmup, got 'dropped'"),
            ({"keys": ["a"]}, r"'keys' must have 3 entries \(one for each step of 'order'\), got 1"),
            ({"order_gains": [0.1]}, "'order_gains' must have 3 entries"),
            ({"order": [9, 9, 7]}, "'order' must be one or more distinct pairs"),
            ({"order": [9, 4, 5]}, "'order' must be one or more distinct pairs"),
            ({"pair_numbers": [4, 9, 9]}, "'pair_numbers' must be distinct"),
            (
                {"selection_probabilities": [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]},
                r"'selection_probabilities' must have 3 entries \(one for each pair\), got 2",
            ),
            (
                {"selection_probabilities": [[0.2, 0.5, 0.3], [1.6, 0.0, 0.4], [0.0, 0.0, 1.0]]},
                r"'selection_probabilities' must be in \[0, 1\]",
            ),
        ],
    )
    def test_a_wrong_value_is_named(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(LedgerError, match=message):
            LedgerRow.from_json(make_record(**changes))

    def test_a_probability_may_exceed_one_by_rounding(self) -> None:
        rounded = [[0.2, 0.5, 0.3], [0.6, 0.0, 0.4], [0.0, 0.0, 1.0000001]]
        assert make_row(selection_probabilities=rounded).chosen_probabilities[-1] == 1.0000001

    def test_a_trajectory_without_steps_is_refused(self) -> None:
        nothing: list[object] = []
        empty = dict.fromkeys(
            ("order", "step_rewards", "query_gains", "model_gains", "queries", "keys", "values"), nothing
        )
        with pytest.raises(LedgerError, match="'order' must be one or more"):
            LedgerRow.from_json(make_record(selection_probabilities=[], **empty))


def episodes_of(ledger: Ledger) -> list[int]:
    return [row.episode for row in read_ledger(ledger.path)]


class TestAppend:
    def test_rows_come_back_in_order(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0), make_row(1, reward=1 / 3)])
        ledger.append([make_row(2)])
        assert read_ledger(tmp_path / LEDGER_NAME) == [make_row(0), make_row(1, reward=1 / 3), make_row(2)]

    def test_no_rows_leave_an_empty_file(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([])
        assert ledger.path.read_bytes() == b""

    @pytest.mark.parametrize(
        "text", ["Ærø, 東京 and 🙂", "two\nlines\r\n\u2028 and a \x00 and \\", '"quoted"', "\ufffd"]
    )
    def test_any_text_is_one_line(self, tmp_path: Path, text: str) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0, title=text, queries=[text] * 3), make_row(1)])
        first, _ = read_ledger(ledger.path)
        assert (first.title, first.queries) == (text, (text,) * 3)
        assert ledger.path.read_bytes().count(b"\n") == 2

    def test_letters_are_written_as_themselves(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0, title="東京")])
        assert "東京" in ledger.path.read_text(encoding="utf-8")


class TestCut:
    def test_rows_past_a_checkpoint_go(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(episode) for episode in range(6)])
        ledger.cut(4)
        assert episodes_of(ledger) == [0, 1, 2, 3]
        ledger.append([make_row(4)])
        assert episodes_of(ledger) == [0, 1, 2, 3, 4]
        assert [path.name for path in tmp_path.iterdir()] == [LEDGER_NAME]

    def test_rows_that_stay_are_the_same_bytes(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0, title="東京", reward=1 / 3)])
        before = ledger.path.read_bytes()
        ledger.append([make_row(1)])
        ledger.cut(1)
        assert ledger.path.read_bytes() == before

    @pytest.mark.parametrize("length", [1, 20, -1])
    def test_an_unfinished_last_line_goes(self, tmp_path: Path, length: int) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0), make_row(1)])
        # A kill may even leave a whole object without its line end, or half a letter.
        whole = json.dumps(make_row(2, title="東").to_json(), ensure_ascii=False).encode() + b"\n"
        with ledger.path.open("ab") as file:
            file.write(whole[:length])
        ledger.cut(10)
        assert episodes_of(ledger) == [0, 1]

    def test_everything_goes_before_the_first_episode(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0)])
        ledger.cut(0)
        assert ledger.path.read_bytes() == b""

    @pytest.mark.parametrize("damage", [b"[]\n", b"\x00\x00\n", b'{"episode": 1}\n', b"\xff\n"])
    def test_a_damaged_line_is_left_out_and_kept_beside(self, damage: bytes, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(0)])
        with ledger.path.open("ab") as file:
            file.write(damage)
        ledger.append([make_row(2), make_row(3)])
        before = ledger.path.read_bytes()
        gaps = ledger.cut(3)
        assert episodes_of(ledger) == [0, 2]
        assert gaps == LedgerGaps(1, tmp_path / f"_damaged-{LEDGER_NAME}")
        assert gaps.copy.read_bytes() == before

    def test_repeated_rows_do_not_hide_missing_ones(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(episode) for episode in (0, 1, 0, 1, 2)])
        gaps = ledger.cut(5)
        assert episodes_of(ledger) == [0, 1, 2]
        assert gaps.missing == 2
        assert gaps.copy is not None

    def test_nothing_is_missing_of_a_whole_ledger(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path)
        ledger.append([make_row(episode) for episode in range(4)])
        assert ledger.cut(3) == LedgerGaps(0, None)

    def test_without_a_file_all_is_missing(self, tmp_path: Path) -> None:
        assert Ledger(tmp_path).cut(3) == LedgerGaps(3, None)
        assert not list(tmp_path.iterdir())
