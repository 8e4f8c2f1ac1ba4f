"""Which trajectories are shown."""

from __future__ import annotations

from made_up_run import make_row
from run_folder import make_rows

from attention_rl_trainer.pages.picks import choose_episodes, find_meetings


class TestMeetings:
    def test_the_same_memory_comes_before_the_same_article(self) -> None:
        rows = [
            make_row(0, step=1, article_index=1),
            make_row(1, step=1, article_index=2),
            make_row(2, step=2, article_index=1, pair_numbers=[4, 9, 7, 5], selection_probabilities=[[0.25] * 4] * 3),
            make_row(3, step=3, article_index=2),
            make_row(4, step=3, article_index=3),
        ]
        met = [
            (meeting.first.episode, meeting.last.episode, meeting.is_same_memory, meeting.shared_pairs)
            for meeting in find_meetings(rows)
        ]
        assert met == [(1, 3, True, 3), (0, 2, False, 3)]

    def test_two_of_one_step_are_no_meeting(self) -> None:
        assert find_meetings([make_row(0), make_row(1)]) == []

    def test_articles_of_two_sources_are_two(self) -> None:
        assert find_meetings([make_row(0, step=1), make_row(1, step=2, source="another")]) == []

    def test_farthest_apart_come_first(self) -> None:
        rows = [make_row(n, step=n, article_index=n % 2) for n in (0, 1, 2, 3, 4)]
        assert [(item.first.episode, item.last.episode) for item in find_meetings(rows)] == [(0, 4), (1, 3)]


class TestChoice:
    def test_all_where_they_fit(self) -> None:
        rows = make_rows()
        assert choose_episodes(rows, [10] * 48, [], 480) == set(range(48))

    def test_else_what_tells_most_and_a_part_of_the_rest(self) -> None:
        rows = make_rows(400, batch=4)
        meetings = find_meetings(rows)[:2]
        chosen = choose_episodes(rows, [10] * 400, meetings, 1000)
        assert len(chosen) <= 100
        best, worst = max(rows, key=lambda row: row.reward), min(rows, key=lambda row: row.reward)
        assert {best.episode, worst.episode, *range(4), *range(396, 400)} <= chosen
        assert {episode for item in meetings for episode in (item.first.episode, item.last.episode)} <= chosen
        # The rest is of the whole run.
        assert all(any(start <= episode < start + 50 for episode in chosen) for start in range(0, 400, 50))

    def test_the_sizes_stay_within_the_limit(self) -> None:
        rows = make_rows(60)
        sizes = [1 + 7 * (row.episode % 5) for row in rows]
        for limit in (0, 1, 40, 200, 500):
            chosen = choose_episodes(rows, sizes, find_meetings(rows), limit)
            assert sum(sizes[episode] for episode in chosen) <= limit

    def test_a_trajectory_that_alone_is_too_large_is_left_out(self) -> None:
        rows = [make_row(0, step=1), make_row(1, step=2), make_row(2, step=3)]
        assert choose_episodes(rows, [5, 1000, 5], [], 20) == {0, 2}
