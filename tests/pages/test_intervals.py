"""Pictures of estimates: what is in them, and axes with round ticks."""

from __future__ import annotations

import math

import pytest
from run_folder import write_evaluation

from attention_rl_trainer.pages.intervals import (
    Axis,
    Line,
    Mark,
    Picture,
    picture_of_differences,
    picture_of_thirds,
    pictures_of_evaluation,
)
from attention_rl_trainer.pages.run import Figures, read_run
from attention_rl_trainer.records.thirds import compare_thirds


class TestAxis:
    @pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 1e-6], [-0.3, 0.7], [0.0, 12345.0], [-5.0, -4.99, 0.0]])
    def test_holds_the_values_with_a_few_round_ticks(self, values: list[float]) -> None:
        axis = Axis.around(values)
        assert all(0 <= axis.place(value) <= 100 for value in values)
        assert 2 <= len(axis.ticks) <= 8
        step = axis.ticks[1] - axis.ticks[0]
        assert step / 10 ** math.floor(math.log10(step) + 1e-9) == pytest.approx(
            round(step / 10 ** math.floor(math.log10(step) + 1e-9))
        )
        assert len({axis.tick_text(tick) for tick in axis.ticks}) == len(axis.ticks)

    def test_zero_has_no_sign(self) -> None:
        axis = Axis.around([-1.0, 1.0])
        assert [axis.tick_text(tick) for tick in axis.ticks] == ["-1.0", "-0.5", "0.0", "0.5", "1.0"]


class TestMarks:
    def test_text_and_zero(self) -> None:
        assert Mark(0.1, -0.02, 0.22).text == "+0.100 [-0.020, +0.220]"
        assert Mark(0.1, -0.02, 0.22).holds_zero
        assert not Mark(0.1, 0.02, 0.18).holds_zero
        assert Mark(0.1).text == "+0.100"
        assert not Mark(0.1).holds_zero

    def test_legend_only_where_there_is_something_to_distinguish(self) -> None:
        line = Line("reward", (Mark(0.1, kind="a", label="one"), Mark(0.2, kind="b", label="two")))
        assert Picture("", "", (line,)).legend == [("a", "one"), ("b", "two")]
        assert Picture("", "", (Line("reward", line.marks[:1]),)).legend == []


class TestThirds:
    def test_intervals_are_those_of_the_comparison(self) -> None:
        change = compare_thirds([0.0, 0.1, 0.2, 0.1] * 3 + [1.0, 1.1, 1.2, 1.1] * 3)
        assert change is not None
        (line,) = picture_of_thirds({"reward": change}).lines
        assert [mark.kind for mark in line.marks] == ["early", "a"]
        assert line.marks[1].high == pytest.approx(change.last.value + change.last.half_width)
        (line,) = picture_of_differences({"reward": change}, "", "").lines
        assert (line.marks[0].mean, line.marks[0].note) == (change.difference, "higher")


class TestEvaluation:
    @pytest.fixture
    def figures(self, tmp_path: object) -> Figures:
        folder = write_evaluation(tmp_path / "evaluation" / "eval" / "evaluation.json").parents[2]  # type: ignore[operator]
        (folder / "attention_rl_config.json").write_text("{}")
        return read_run(folder).evaluations["eval"]

    def test_a_picture_per_table(self, figures: Figures) -> None:
        pictures = {picture.title: picture for picture in pictures_of_evaluation([figures], ["run"])}
        orders = pictures["Orders, less the random one"].lines
        assert [(line.label, line.is_own, line.marks[0].note) for line in orders] == [
            ("greedy oracle", False, ""),
            ("learned", True, "33% of the gap"),
        ]
        assert pictures["The policy's query less another"].lines[0].label == "less empty query"
        assert [line.label for line in pictures["More figures"].lines] == [
            "bound of the query gain: selection information / V"
        ]
        assert not pictures["More figures"].is_drawn
        assert "What the answers tell" not in pictures
        assert pictures["Queries: gain over what the base model samples"].about == "40 memories of 20 articles"

    def test_two_runs_share_a_row(self, figures: Figures) -> None:
        pictures = {item.title: item for item in pictures_of_evaluation([figures, figures], ["one", "two"])}
        line = pictures["Queries: gain over what the base model samples"].lines[0]
        assert [(mark.kind, mark.label) for mark in line.marks] == [("a", "one"), ("b", "two")]

    def test_the_second_alone_is_drawn_as_the_second(self, figures: Figures) -> None:
        (mark,) = pictures_of_evaluation([None, figures], ["one", "two"])[0].lines[0].marks
        assert (mark.kind, mark.label) == ("b", "two")

    @pytest.mark.parametrize("estimate", [None, 3, {}, {"mean": None}, {"mean": "x"}, {"mean": float("nan")}])
    def test_what_is_no_estimate_is_passed_over(self, estimate: object) -> None:
        assert pictures_of_evaluation([{"queries": {"policy": estimate}}], ["run"]) == []
