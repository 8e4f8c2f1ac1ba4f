"""Tables of entries: slices and held-out rows; grouping of rows, and every fault by source, row, group and field."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Sequence

import datasets
import pyarrow as pa
import pytest

from attention_rl_trainer.memories.stream import ArticleStream, Entries
from attention_rl_trainer.memories.tables import EntriesTable, group_rows, take_split
from attention_rl_trainer.types import StreamPosition

COLUMNS = ("question", "answer", "topic")


def table(*titles: str, name: str = "made up") -> EntriesTable:
    return EntriesTable(name, tuple(Entries(title, name, (" k", " l"), (" v", " w")) for title in titles))


def numbered(count: int) -> EntriesTable:
    return table(*(f"T{number}" for number in range(count)))


def titles(rows: Sequence[Entries]) -> list[str]:
    return [row.title for row in rows]


def row(question: object, answer: object, topic: object) -> dict[str, object]:
    return dict(zip(COLUMNS, (question, answer, topic), strict=True))


def grouped(*rows: object) -> EntriesTable:
    return group_rows(rows, *COLUMNS, name="faq")


TWO = [row("Big?", "no", "ant"), row("Red?", "yes", "ant")]


class TestEntriesTable:
    def test_rows_by_number_and_slice_and_a_short_repr(self) -> None:
        five = numbered(5)
        assert (len(five), five.num_pairs, five[1].title, five[-1].title) == (5, 10, "T1", "T4")
        assert five[1:3] == table("T1", "T2")
        assert five.skip(3) == table("T3", "T4")
        assert repr(five) == "EntriesTable('made up', 5 rows)"
        assert pickle.loads(pickle.dumps(five)) == five
        with pytest.raises(IndexError):
            five[5]

    def test_titles_are_unique(self) -> None:
        with pytest.raises(ValueError, match=r"2 rows of 'made up' have the title 'b'; rename or join them"):
            table("a", "b", "b")

    @pytest.mark.parametrize(
        ("split", "expected"),
        [
            ("train", "T0 T1 T2 T3 T4"),
            ("train[:2]", "T0 T1"),
            ("train[-1:]", "T4"),
            ("train[40%:]", "T2 T3 T4"),
            ("train[:900]", "T0 T1 T2 T3 T4"),
        ],
    )
    def test_slices_are_those_of_datasets(self, split: str, expected: str) -> None:
        assert titles(numbered(5).split(split)) == expected.split()
        rows = datasets.Dataset.from_dict({"title": titles(numbered(5))})
        (chosen,) = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
        assert rows["title"][chosen.from_ : chosen.to] == expected.split()

    def test_parts_are_taken_by_name_and_added(self) -> None:
        parts = {"train": table("a", "b"), "test": table("c", "d")}
        assert titles(take_split(parts, "test[:1]")) == ["c"]
        assert titles(take_split(parts, "train[1:]+test")) == ["b", "c", "d"]

    @pytest.mark.parametrize(
        ("split", "message"),
        [
            ("dev", r"The split 'dev' of 'made up' cannot be read: Unknown split \"dev\".*There is 'train' and 'test'"),
            ("train[", r"The split 'train\[' of 'made up' cannot be read: .*slices such as 'train\[:100\]'"),
            ("train[:200%]", r"The split 'train\[:200%\]' of 'made up' cannot be read"),
            ("train[5:]", r"The split 'train\[5:\]' of 'made up' is empty: 'train' has 2, 'test' has 1 rows"),
        ],
    )
    def test_a_split_that_is_not_there_is_refused(self, split: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            take_split({"train": table("a", "b"), "test": table("c")}, split)

    def test_a_stream_reads_entries_in_a_resumable_permutation(self) -> None:
        stream = ArticleStream(numbered(7), source="made up", seed=3, num_epochs=2)
        items = list(stream)
        assert sorted(item.article.title for item in items[:7]) == titles(numbered(7))
        resumed = ArticleStream(numbered(7), source="made up", seed=3, num_epochs=2, position=items[4].next_position)
        assert [item.article for item in resumed] == [item.article for item in items[5:]]
        assert items[7].position == StreamPosition(1, 0)


class TestHeldOut:
    def test_the_parts_are_whole_ordered_and_of_the_size_asked_for(self) -> None:
        train, held_out = numbered(40).split_by_share(0.2, seed=0)
        assert (len(train), len(held_out)) == (32, 8)
        assert set(titles(train)) | set(titles(held_out)) == set(titles(numbered(40)))
        assert titles(train) == [title for title in titles(numbered(40)) if title in titles(train)]

    def test_they_depend_on_the_names_and_the_seed_alone(self) -> None:
        rows = numbered(40)
        _, held_out = rows.split_by_share(0.2, seed=0)
        _, turned = EntriesTable("other", rows.rows[::-1]).split_by_share(0.2, seed=0)
        assert set(titles(turned)) == set(titles(held_out))
        _, others = rows.split_by_share(0.2, seed=1)
        assert set(titles(others)) != set(titles(held_out))
        # The numbers of `random.Random` do not change from one version of Python to the next.
        assert titles(numbered(10).split_by_share(0.3, seed=0)[1]) == ["T1", "T4", "T5"]

    @pytest.mark.parametrize("share", [0.0, 1.0, 0.05, 0.99, -1.0, 2.0])
    def test_a_share_that_leaves_a_part_empty_is_refused(self, share: float) -> None:
        with pytest.raises(ValueError, match=r"in \(0, 1\) and leave at least one of the 5 rows of 'made up' in each"):
            numbered(5).split_by_share(share, seed=0)


class TestGrouping:
    def test_groups_and_pairs_keep_their_order_and_begin_with_one_space(self) -> None:
        rows = [
            row(" Big?", "no\n", "ant"),
            row("Colour?", "grey", " elephant "),
            row("Red?", "  some  of them ", "ant "),
            row("Big?", "yes", "elephant"),
        ]
        assert grouped(*rows) == EntriesTable(
            "faq",
            (
                Entries("ant", "faq", (" Big?", " Red?"), (" no", " some  of them")),
                Entries("elephant", "faq", (" Colour?", " Big?"), (" grey", " yes")),
            ),
        )

    def test_a_data_set_is_read_by_its_columns(self) -> None:
        rows = datasets.Dataset.from_list([{**one, "other": [1, 2]} for one in TWO])
        assert group_rows(rows.with_format("numpy"), *COLUMNS, name="faq") == grouped(*TWO)

    def test_numbers_are_texts(self) -> None:
        rows = [row("Year", 1990.0, 7), row(2, 0.25, 7), row("Big", 10**20, 7)]
        assert grouped(*rows).rows == (Entries("7", "faq", (" Year", " 2", " Big"), (" 1990", " 0.25", f" {10**20}")),)

    def test_what_is_missing_or_repeated_is_left_out_and_counted_once(self, caplog: pytest.LogCaptureFixture) -> None:
        rows = [
            *TWO,
            row("Old?", None, "ant"),
            row("Old?", "  ", "ant"),
            row("", "no", "ant"),
            row("Old?", float("nan"), "ant"),
            row("Old?", "no", None),
            row("Red? ", "yes ", "ant"),
        ]
        with caplog.at_level(logging.WARNING):
            assert grouped(*rows) == grouped(*TWO)
        assert [record.getMessage() for record in caplog.records] == [
            "'faq': 6 of 8 rows are left out: 1 repeated (first: row 7), 3 without 'answer' (first: row 2), 1 without "
            "'question' (first: row 4), 1 without 'topic' (first: row 6)."
        ]

    def test_nothing_is_logged_where_nothing_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            grouped(*TWO)
        assert not caplog.records

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            pytest.param(
                [*TWO, row("Big?", "yes", "ant")],
                "'faq', row 2, group 'ant', field 'question': 'Big?' is in row 0 already, with another value; delete",
                id="two_values",
            ),
            pytest.param(
                [*TWO, row("Big?", "yes", "bee"), row("Big?", "yes", "cat")],
                "'faq', row 2, group 'bee': 1 pair of a key and a value, expected at least 2; add some, delete the "
                "group, or choose another group_column. 1 other groups are as small.",
                id="one_pair",
            ),
            pytest.param(
                [*TWO, row("Big?", None, "bee")],
                "'faq', row 2, group 'bee': 0 pairs of a key and a value, expected at least 2",
                id="no_pair",
            ),
            pytest.param(
                [*TWO, row("Old?", True, "ant")],
                "'faq', row 2, group 'ant', field 'answer': expected a text or a number, got the truth value True; "
                "write it out as the text",
                id="truth_value",
            ),
            pytest.param(
                [*TWO, row(["Old?"], "no", "ant")],
                "'faq', row 2, group 'ant', field 'question': expected a text or a number, got a list",
                id="list",
            ),
            pytest.param(
                [row("Old?", "no", {"name": "ant"})],
                "'faq', row 0, field 'topic': expected a text or a number, got a dict",
                id="group",
            ),
            pytest.param(
                [*TWO, row("Old?", "\ud83d", "ant")],
                r"'faq', row 2, group 'ant', field 'answer': \ud83d is half a character; write the whole one",
                id="half",
            ),
            pytest.param(
                [{"question": "Big?", "topic": "ant", "reply": "no"}],
                "'faq', row 0, has no column 'answer'; its columns are 'question', 'topic', 'reply'. Choose one of "
                "them as value_column.",
                id="column",
            ),
            pytest.param(["Big?"], "'faq', row 0: expected a mapping such as {'question': ...", id="no_mapping"),
            pytest.param([], "'faq' has no memory: of 0 rows none has a 'topic'; give rows with", id="no_row"),
            pytest.param([row("a", "b", " ")], "'faq' has no memory: of 1 rows none has a 'topic'", id="no_group"),
        ],
    )
    def test_faults_are_named(self, rows: list[object], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            grouped(*rows)

    def test_a_data_set_without_a_column_is_refused_before_it_is_read(self) -> None:
        rows = datasets.Dataset.from_list(TWO)
        with pytest.raises(ValueError, match=r"^'faq' has no column 'text'; its columns are 'question'.*as key_column"):
            group_rows(rows, "text", "answer", "topic", name="faq")

    def test_arrow_that_is_not_utf8_is_refused_with_its_row(self) -> None:
        answers = pa.array([b"yes", b"no", b"caf\xe9"]).view(pa.string())
        rows = datasets.Dataset(pa.table({"question": ["a", "b", "c"], "answer": answers, "topic": ["t"] * 3}))
        with pytest.raises(ValueError, match=r"'faq', row 2: 'utf-8' codec can't decode byte 0xe9.*; save it as UTF-8"):
            group_rows(rows, *COLUMNS, name="faq")

    def test_splits_are_not_rows(self) -> None:
        splits = datasets.DatasetDict(train=datasets.Dataset.from_list(TWO))
        with pytest.raises(ValueError, match=r"row 0: expected a mapping.*, got a str; give the rows of one table"):
            group_rows(splits, *COLUMNS, name="faq")

    def test_without_a_group_column_the_way_out_is_said(self) -> None:
        with pytest.raises(
            ValueError, match=r"'faq' is given with key_column 'question' and value_column 'answer', but without "
            r"group_column: name the column that says which rows are a memory, such as a topic; add one where"
        ):  # fmt: skip
            group_rows(TWO, "question", "answer", None, name="faq")

    def test_the_columns_must_differ(self) -> None:
        with pytest.raises(ValueError, match=r"of 'faq' must differ, got 'topic', 'answer' and 'topic'"):
            group_rows(TWO, "topic", "answer", "topic", name="faq")
