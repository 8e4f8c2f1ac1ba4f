"""Sources by name: a game, the fact book, rows of a user's own, articles; and options that do not belong together."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from made_up_sources import as_json_lines, numbered_dump, write

from attention_rl_trainer.memories.games import TWENTY_QUESTIONS, load_game
from attention_rl_trainer.memories.sources import is_game, load_memories
from attention_rl_trainer.memories.stream import ArticleStream, Entries
from attention_rl_trainer.memories.tables import EntriesTable

COLUMNS = {"key_column": "question", "value_column": "answer", "group_column": "topic"}
ROWS = [{"question": q, "answer": f"{q} of {t}", "topic": t} for t in ("ant", "bee", "cat") for q in ("Size", "Age")]
QUESTIONS = ["Is it big?", "Is it red?"]


def game_of(num_objects: int) -> str:
    objects = [{"name": f"thing {number}", "answers": ["yes", "no"]} for number in range(num_objects)]
    return json.dumps({"questions": QUESTIONS, "objects": objects}, indent=1)


def titles(name: str | Path, **options: str) -> list[str]:
    table = load_memories(name, **options)
    assert isinstance(table, EntriesTable)
    return [entries.title for entries in table]


class TestTwentyQuestions:
    def test_the_held_out_objects_are_those_of_the_game(self) -> None:
        train, held_out = load_game(TWENTY_QUESTIONS).split(0.2, seed=0)
        assert titles("twenty_questions") == [one.name for one in train.objects]
        assert titles("twenty_questions", split="test") == [one.name for one in held_out.objects]
        assert len(titles("twenty_questions", split="train+test")) == 514

    def test_slices_and_the_name_of_the_source(self) -> None:
        table = load_memories("twenty_questions", split="train[:100]")
        assert (len(table), table.name) == (100, "twenty_questions")
        assert table[0].source == "twenty_questions"
        assert table[0].keys[0] == " Is it a living thing?"

    def test_an_unknown_split_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"The split 'dev' of 'twenty_questions'.*There is 'train' and 'test'"):
            load_memories("twenty_questions", split="dev")


class TestFactbook:
    def test_the_countries_are_parted_by_name(self) -> None:
        train, test = titles("factbook"), titles("factbook", split="test")
        assert (len(train), len(test), set(train) & set(test)) == (205, 51, set())
        assert titles("factbook", split="test[:3]") == test[:3]


class TestGameOfAFile:
    @pytest.mark.parametrize("name", ["game.json", "GAME.JSON", "a game [1].json"])
    def test_its_objects_are_parted(self, name: str, tmp_path: Path) -> None:
        path = write(tmp_path / name, game_of(10).encode())
        assert len(titles(path)) == 8
        test = load_memories(path, split="test")
        assert test[0].source == str(path)
        assert (test[0].keys, test[0].values) == (
            (" Is it big?", " Is it red?"),
            (" Yes, it is big.", " No, it is not red."),
        )

    def test_of_two_objects_none_is_held_out(self, tmp_path: Path) -> None:
        path = write(tmp_path / "game.json", game_of(2))
        assert len(titles(path)) == 2
        with pytest.raises(ValueError, match=r"The split 'test' of '.*game.json' cannot be read"):
            load_memories(path, split="test")

    @pytest.mark.parametrize("content", [game_of(2)[:-9], '{"objects": [], "questions": []}', '{"questions": {}}'])
    def test_a_fault_of_it_is_that_of_a_game(self, content: str, tmp_path: Path) -> None:
        path = write(tmp_path / "game.json", content)
        with pytest.raises(ValueError, match=r"game\.json', line \d+"):
            load_memories(path)

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            pytest.param("a.json", game_of(2), True, id="game"),
            pytest.param("a.json", json.dumps(json.loads(game_of(2))) + "\n\n", True, id="one_line"),
            pytest.param("a.json", b"\xef\xbb\xbf\n " + game_of(2).encode(), True, id="mark"),
            pytest.param("a.json", '{"objects": [1', True, id="cut"),
            pytest.param("a.jsonl", game_of(2), False, id="other_ending"),
            pytest.param("a.json", '{"questions": ["a"], "text": "b"}\n' * 2, False, id="lines"),
            pytest.param("a.json", '{"text": "a", "questions": ["b"]}', False, id="later_field"),
            pytest.param("a.json", '[{"questions": []}]', False, id="array"),
            pytest.param("a.json", "", False, id="empty"),
        ],
    )
    def test_only_a_file_that_begins_as_a_game_is_one(
        self, name: str, content: str | bytes, expected: bool, tmp_path: Path
    ) -> None:
        assert is_game(write(tmp_path / name, content)) is expected


class TestTablesAndArticles:
    def test_rows_with_columns_are_grouped(self, tmp_path: Path) -> None:
        path = as_json_lines(tmp_path / "faq.jsonl", ROWS)
        assert titles(path, **COLUMNS) == ["ant", "bee", "cat"]
        assert load_memories(path, **COLUMNS, split="train[2:]")[0] == Entries(
            "cat", str(path), (" Size", " Age"), (" Size of cat", " Age of cat")
        )

    def test_everything_else_is_articles(self, tmp_path: Path) -> None:
        path = as_json_lines(tmp_path / "a.jsonl")
        table = load_memories(path, split="train[:4]")
        assert isinstance(table, datasets.Dataset)
        assert len(table) == 4
        assert len(list(ArticleStream(table, source=str(path), seed=0, num_epochs=1))) == 4
        assert isinstance(load_memories(path, streaming=True), datasets.IterableDataset)

    def test_a_file_that_is_called_like_a_source_is_written_with_its_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "factbook").mkdir()
        as_json_lines(tmp_path / "factbook" / "a.jsonl")
        monkeypatch.chdir(tmp_path)
        assert isinstance(load_memories("factbook"), EntriesTable)
        assert isinstance(load_memories("./factbook"), datasets.Dataset)

    @pytest.mark.parametrize("name", ["", None, 3])
    def test_what_is_not_a_name_is_refused_as_by_articles(self, name: object) -> None:
        with pytest.raises(ValueError, match="A source of articles is named by 'offline'"):
            load_memories(name)  # type: ignore[arg-type]


class TestWrongCombinations:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"key_column": "question"}, r"leave out key_column='question'\."),
            ({"config_name": "en"}, r"leave out config_name='en'\."),
            ({"streaming": True, "text_column": "t"}, r"leave out streaming=True and text_column='t'\."),
        ],
    )
    @pytest.mark.parametrize("name", ["twenty_questions", "factbook", "game.json"])
    def test_a_game_and_the_fact_book_take_no_options(
        self, name: str, options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "game.json", game_of(3))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=rf"'{name}' .*keys and values of its own; {message}"):
            load_memories(name, **options)  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["offline", "wikimedia/wikipedia", "wikipedia", "a.xml", "a.txt"])
    def test_articles_have_no_columns_of_keys(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "a.xml", numbered_dump(2))
        write(tmp_path / "a.txt", "A text.")
        monkeypatch.chdir(tmp_path)
        message = f"'{name}' holds articles, which are cut into keys and values; leave out value_column='text'"
        with pytest.raises(ValueError, match=message):
            load_memories(name, value_column="text")

    @pytest.mark.parametrize("missing", list(COLUMNS))
    def test_one_column_too_few_is_named(self, missing: str, tmp_path: Path) -> None:
        path = as_json_lines(tmp_path / "faq.jsonl", ROWS)
        given = {name: column for name, column in COLUMNS.items() if name != missing}
        with pytest.raises(
            ValueError, match=rf"'.*faq.jsonl' is given with .*, but without {missing}: name the column"
        ):
            load_memories(path, **given)

    def test_a_table_has_no_text_column_and_does_not_stream(self, tmp_path: Path) -> None:
        path = as_json_lines(tmp_path / "faq.jsonl", ROWS)
        with pytest.raises(
            ValueError, match=r"is read by key_column, .*; leave out streaming=True and text_column='t'"
        ):
            load_memories(path, **COLUMNS, streaming=True, text_column="t")
        assert isinstance(load_memories(path, **COLUMNS, streaming=False), EntriesTable)

    def test_a_csv_file_is_not_articles(self, tmp_path: Path) -> None:
        path = write(tmp_path / "faq.csv", "question,answer,topic\n")
        with pytest.raises(
            ValueError, match=r"faq.csv' is a table; say with key_column, value_column and group_column"
        ):
            load_memories(path)
