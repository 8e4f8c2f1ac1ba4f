"""Which trajectories a page shows: all of a small run, of a large one those that tell most and a sample of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attention_rl_trainer.records.ledger import LedgerRow

MAX_MEMORIES = 60


@dataclass(frozen=True)
class Meeting:
    """A memory that was read more than once: its first and its last trajectory."""

    first: LedgerRow
    last: LedgerRow

    @property
    def is_same_memory(self) -> bool:
        """Whether both read the same pairs; else only the article is the same."""
        return set(self.first.pair_numbers) == set(self.last.pair_numbers)

    @property
    def shared_pairs(self) -> int:
        """Pairs that both could choose from."""
        return len(set(self.first.pair_numbers) & set(self.last.pair_numbers))


def find_meetings(rows: Sequence[LedgerRow]) -> list[Meeting]:
    """Find memories of which there is a trajectory of an early step and of a late one.

    Args:
        rows: the ledger by episode.

    Returns:
        The same memories first, farthest apart first; then those of the same article, most pairs in common first.
    """
    by_memory: dict[tuple[str, int, frozenset[int]], list[LedgerRow]] = {}
    by_article: dict[tuple[str, int], list[LedgerRow]] = {}
    for row in rows:
        by_memory.setdefault((row.source, row.article_index, frozenset(row.pair_numbers)), []).append(row)
        by_article.setdefault((row.source, row.article_index), []).append(row)
    same = [Meeting(met[0], met[-1]) for met in by_memory.values() if met[0].step < met[-1].step]
    same.sort(key=lambda meeting: meeting.first.step - meeting.last.step)
    known = {(meeting.first.source, meeting.first.article_index) for meeting in same}
    others = [
        Meeting(met[0], met[-1])
        for article, met in by_article.items()
        if article not in known and met[0].step < met[-1].step
    ]
    others.sort(key=lambda meeting: (-meeting.shared_pairs, meeting.first.step - meeting.last.step))
    return [*same, *others][:MAX_MEMORIES]


def choose_episodes(
    rows: Sequence[LedgerRow], sizes: Sequence[int], meetings: Sequence[Meeting], limit: int
) -> set[int]:
    """Choose episodes whose sizes sum up to at most ``limit``.

    Args:
        rows: the ledger by episode.
        sizes: what each takes, such as bytes.
        meetings: those whose trajectories should be among them.

    Returns:
        Numbers of episodes: all if they fit; else those of the first and the last step, the best and the worst, those
        of ``meetings``, and of the rest every so many, as far as there is room.
    """
    if sum(sizes) <= limit:
        return {row.episode for row in rows}
    size_of = {row.episode: size for row, size in zip(rows, sizes, strict=True)}
    by_reward = sorted(rows, key=lambda row: row.reward)
    wanted = [row for row in rows if row.step in (rows[0].step, rows[-1].step)]
    wanted += [row for meeting in meetings for row in (meeting.first, meeting.last)]
    # In this order, so that the best and the worst are in however little room there is; the others may take half of it.
    chosen: set[int] = set()
    left = limit
    for row, room in [(by_reward[-1], limit), (by_reward[0], limit), *((row, limit // 2) for row in wanted)]:
        if row.episode not in chosen and size_of[row.episode] <= left - (limit - room):
            chosen.add(row.episode)
            left -= size_of[row.episode]
    rest = [row.episode for row in rows if row.episode not in chosen]
    for every in range(1, len(rest) + 1):
        part = rest[every // 2 :: every]
        if sum(size_of[episode] for episode in part) <= left:
            return chosen | set(part)
    return chosen
