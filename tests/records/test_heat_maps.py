"""The heat maps of selection probabilities: which trajectories are drawn, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_run import PNG_SIGNATURE, make_record, make_row

from attention_rl_trainer.records.heat_maps import (
    drawable_title,
    first_and_last_batch,
    plot_selection,
    selection_scale,
    unread_pairs,
)
from attention_rl_trainer.records.ledger import LedgerRow


class TestHeatMaps:
    def test_first_and_last_batch_are_chosen(self) -> None:
        rows = [make_row(episode, step=1 + episode // 3) for episode in (8, 7, 6, 5, 4, 3, 2, 1, 0)]
        columns = first_and_last_batch(rows, 2)
        assert [(name, [row.episode for row in batch]) for name, batch in columns] == [
            ("First batch (step 1)", [0, 1]),
            ("Last batch (step 3)", [6, 7]),
        ]
        assert [name for name, _ in first_and_last_batch(rows[:3], 2)] == ["Only batch (step 3)"]

    def test_used_pairs_are_masked_by_the_order_not_by_a_zero(self) -> None:
        row = make_row(selection_probabilities=[[0.0, 0.7, 0.3], [0.6, 0.0, 0.4], [0.0, 0.0, 1.0]])
        # Columns are the pairs 4, 9 and 7, read in the order 9, 4, 7.
        expected = [[True, True, True], [True, False, True], [False, False, True]]
        assert unread_pairs(row).tolist() == expected

    def test_colour_scale_leaves_out_the_forced_last_step(self) -> None:
        assert selection_scale([make_row()]).vmax == 0.6
        single = {name: [value[0]] for name, value in make_record().items() if isinstance(value, list)}
        forced = make_record(**(single | {"pair_numbers": [9], "selection_probabilities": [[1.0]]}))
        assert selection_scale([LedgerRow.from_json(forced)]).vmax == 1.0

    def test_selection_of_unequal_batches_and_subsets(self, tmp_path: Path) -> None:
        many = list(range(1, 16))
        uniform = [[1.0 / 15] * 15] * 15
        wide = make_row(
            3,
            step=2,
            pair_numbers=many,
            order=many[::-1],
            selection_probabilities=uniform,
            **{name: [0.0] * 15 for name in ("step_rewards", "query_gains", "model_gains")},
            **{name: ["x"] * 15 for name in ("queries", "keys", "values")},
        )
        path = plot_selection([make_row(0), make_row(1), wide], tmp_path / "selection.png")
        assert path.read_bytes().startswith(PNG_SIGNATURE)

    @pytest.mark.filterwarnings("error")
    def test_titles_are_drawn_literally_in_any_script(self, tmp_path: Path) -> None:
        rows = [make_row(0, title="A$AP^{ $x"), make_row(1, title="\u6771\u4eac\n\x1b" + "x" * 200)]
        assert plot_selection(rows, tmp_path / "selection.png").exists()
        assert drawable_title("\u6771 \u017di\u017eek") == "\u25a1 \u017di\u017eek"
        assert drawable_title("x" * 200) == "x" * 31 + "\u2026"

    def test_the_number_of_trajectories_is_checked(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="trajectories_per_batch must be at least 1, got 0"):
            plot_selection([make_row()], tmp_path / "selection.png", trajectories_per_batch=0)
