"""Games: faults by file, line, object and field; splits; information by hand and by a slow reference; our own data."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from twenty_questions_source import QUESTIONS, as_json, build

from attention_rl_trainer.memories.games import (
    TWENTY_QUESTIONS,
    Game,
    GameObject,
    expected_information_gain,
    greedy_questions,
    information_gain,
    load_game,
    play_greedily,
)

FISH = '  {"name": "fish", "answers": ["no", "no"]}'
HEAD = '{\n "questions": ["Big?", "Red?"],\n "objects": [\n'
"""Three lines: the first object of a list after it stands on line 4."""


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "game.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def two_objects(second: str) -> str:
    """A game whose first object is right, and whose second one begins on line 5."""
    return f"{HEAD}{FISH},\n{second}\n]}}"


def answered(answers: str) -> str:
    return two_objects(f'{{"name": "cat", "answers": {answers}}}')


class TestLoading:
    def test_answers_by_order_and_by_question(self, tmp_path: Path) -> None:
        game = load_game(
            write(
                tmp_path,
                """{"questions": [" Big? ", "Red?", "What for?"],
                "objects": [{"name": "crane", "category": "tool", "answers": ["yes", null, "to lift  things"]},
                            {"answers": {"What for? ": "nothing", "Big?": " no "}, "name": "gnat", "category": null},
                            {"name": "Zoë 🦊", "answers": {"Red?": "unknown", "Big?": "sometimes", "What for?": null}}]
                }""",
            )
        )
        assert game == Game(
            questions=("Big?", "Red?", "What for?"),
            objects=(
                GameObject("crane", "tool", ("yes", None, "to lift  things")),
                GameObject("gnat", None, ("no", None, "nothing")),
                GameObject("Zoë 🦊", None, ("sometimes", "unknown", None)),
            ),
        )
        assert [one.known_questions() for one in game.objects] == [(0, 2), (0, 2), (0, 1)]

    def test_a_byte_order_mark_and_a_path_as_text(self, tmp_path: Path) -> None:
        path = write(tmp_path, b"\xef\xbb\xbf" + answered('["no", "yes"]').encode())
        assert load_game(str(path)).objects[1].answers == ("no", "yes")

    @pytest.mark.parametrize(
        ("content", "line", "message"),
        [
            pytest.param(
                answered('["y\xe9s", "no"]').encode("latin-1"), 5, "the byte 0xe9 is not UTF-8; save it as", id="utf8"
            ),
            pytest.param(HEAD + FISH + "\n" + FISH + "]}", 5, "column 3: this is not JSON: Expecting ','", id="comma"),
            pytest.param("", 1, "column 1: this is not JSON: Expecting value", id="empty"),
            pytest.param(
                "\n[1]", 2, "expected a JSON object with the fields 'questions', 'objects', got a list", id="top"
            ),
            pytest.param('{\n"objects": []}', 1, "the field 'questions' is missing; add it", id="no_questions"),
            pytest.param('{\n"questions": ["a"]}', 1, "the field 'objects' is missing; add it", id="no_objects"),
            pytest.param('{\n"questions": [],\n"objects": []}', 2, "there are no questions; add those", id="none"),
            pytest.param(
                '{\n"questions": {"a": 1}, "objects": []}', 2, "expected a list of questions, got a JSON obj", id="dict"
            ),
            pytest.param(
                '{\n"questions": "a", "objects": []}', 2, "expected a list of questions, got a text", id="text"
            ),
            pytest.param(
                '{"questions": ["a",\n3], "objects": []}', 2, "questions[1]: expected a text, got 3", id="number"
            ),
            pytest.param('{"questions": ["a",\n" "], "objects": []}', 2, "questions[1]: the text is empty", id="blank"),
            pytest.param(
                '{"questions": ["a", "b",\n"a "], "objects": []}',
                2,
                "questions[2]: 'a' is questions[0] already",
                id="again",
            ),
            pytest.param('{"questions": ["a"],\n"objects": 7}', 2, "expected a list of objects, got 7", id="objects"),
            pytest.param(
                f"{HEAD}{FISH}\n]}}", 3, "field 'objects': expected at least 2 objects, got 1; add some", id="one"
            ),
            pytest.param(
                two_objects('"cat"'), 5, "objects[1]: expected a JSON object with the fields 'name'", id="string"
            ),
            pytest.param(two_objects('{"answers": []}'), 5, "objects[1]: the field 'name' is missing", id="no_name"),
            pytest.param(
                two_objects('{"name": "cat"}'), 5, "objects[1]: the field 'answers' is missing", id="no_answers"
            ),
            pytest.param(
                two_objects('{"name": "cat",\n"answer": []}'),
                6,
                "objects[1]: the field 'answer' is not one of",
                id="typo",
            ),
            pytest.param(
                two_objects('{"name": "cat",\n"name":\n"dog", "answers": []}'), 6, "'name' is given twice", id="twice"
            ),
            pytest.param(
                two_objects('{"answers": ["no", "no"],\n"name": ""}'),
                6,
                "objects[1], field 'name': the text is",
                id="name",
            ),
            pytest.param(
                two_objects('{"name": null, "answers": ["no", "no"]}'),
                5,
                "field 'name': expected a text, got null",
                id="null",
            ),
            pytest.param(
                two_objects('{"name": "cat\\ud83d", "answers": []}'), 5, "\\ud83d is half a character", id="surrogate"
            ),
            pytest.param(
                two_objects('{"answers": ["no", "no"],\n"name": "fish"}'),
                6,
                "objects[1], field 'name': 'fish' is the name of objects[0] already; rename or delete one.",
                id="same_name",
            ),
            pytest.param(
                two_objects('{"name": "cat",\n"category": 4, "answers": ["no", "no"]}'),
                6,
                "objects[1] ('cat'), field 'category': expected a text, got 4",
                id="category",
            ),
            pytest.param(
                answered('["no"]'),
                5,
                "objects[1] ('cat'), field 'answers': 1 answers for 2 questions; give one for each, null if unknown.",
                id="too_few_answers",
            ),
            pytest.param(
                answered('["no", "no", null]'), 5, "3 answers for 2 questions; give one for each", id="too_many"
            ),
            pytest.param(
                answered("true"), 5, "expected a list of answers, or an object {question: answer}, got true", id="bool"
            ),
            pytest.param(
                answered('[\n"no",\n1.5]'),
                7,
                "objects[1] ('cat'), field 'answers', question 'Red?': expected a text, got 1.5",
                id="wrong_type",
            ),
            pytest.param(answered('["no", {}]'), 5, "question 'Red?': expected a text, got a JSON object", id="object"),
            pytest.param(answered('["no", NaN]'), 5, "question 'Red?': expected a text, got NaN", id="nan"),
            pytest.param(answered('["no",\n"\\t"]'), 6, "question 'Red?': the text is empty; fill it in", id="no_text"),
            pytest.param(
                answered('{"Big?": "no",\n"Green?":\n"no"}'),
                6,
                "objects[1] ('cat'), field 'answers': 'Green?' is not one of the questions; correct it, or add it",
                id="unknown_question",
            ),
            pytest.param(
                answered('{"Big?": "no",\n"Big? ": "no"}'), 6, "field 'answers': 'Big?' is answered twice", id="both"
            ),
            pytest.param(
                answered('["no", null]'),
                5,
                "objects[1] ('cat'), field 'answers': 1 of 2 answers known, expected at least 2; add some",
                id="one_known",
            ),
            pytest.param(answered("{}"), 5, "0 of 2 answers known, expected at least 2; add some", id="none_known"),
        ],
    )
    def test_a_fault_is_named_with_its_place(
        self, content: str | bytes, line: int, message: str, tmp_path: Path
    ) -> None:
        path = write(tmp_path, content)
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            load_game(path)
        assert re.match(rf"{re.escape(repr(str(path)))}, line {line}[,:] ", str(refused.value))
        assert str(refused.value).endswith(".")

    @pytest.mark.parametrize(
        ("content", "message"),
        [("[" * 100_000, "recursion"), (f"[{'1' * 5000}]", "4300 digits")],
        ids=["brackets", "digits"],
    )
    def test_json_that_cannot_be_held_is_refused(self, content: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"game\.json': cannot be read as JSON: .*{message}"):
            load_game(write(tmp_path, content))

    def test_only_the_words_that_are_asked_for(self, tmp_path: Path) -> None:
        path = write(tmp_path, answered('{"Big?": "yes",\n"Red?": "Yes"}'))
        assert load_game(path).objects[1].answers == ("yes", "Yes")
        with pytest.raises(
            ValueError,
            match=r"line 6: objects\[1\] \('cat'\), field 'answers', question 'Red\?': 'Yes' is not an answer word; "
            r"the words are 'yes', 'no', and null",
        ):
            load_game(path, answer_words=("yes", "no"))
        assert load_game(path, answer_words=("yes", "no", "Yes")) == load_game(path)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none\.json"):
            load_game(tmp_path / "none.json")


def table(*rows: str, categories: str | None = None) -> Game:
    """A game with a row of one-letter answers for each object, "-" for one that is not known."""
    objects = tuple(
        GameObject(f"o{number}", categories and categories[number], tuple(None if c == "-" else c for c in row))
        for number, row in enumerate(rows)
    )
    return Game(tuple(f"q{number}" for number in range(len(rows[0]))), objects)


def names(game: Game) -> list[str]:
    return [one.name for one in game.objects]


class TestGame:
    def test_an_answer_for_each_question(self) -> None:
        with pytest.raises(ValueError, match="The object 'o' has 1 answers for 2 questions; give one for each"):
            Game(("a", "b"), (GameObject("o", None, ("yes",)),))

    @pytest.mark.parametrize("share", [0.1, 0.2, 0.29, 0.5, 0.9])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_every_category_gives_its_share(self, share: float, seed: int) -> None:
        categories = "a" * 20 + "b" * 7 + "c" * 12 + "d" * 61
        game = table(*["y"] * 100, categories=categories)
        train, held_out = game.split(share, seed)
        assert len(held_out.objects) == round(share * 100)
        assert sorted([*names(train), *names(held_out)]) == sorted(names(game))
        for part in (train, held_out):
            # In the order of the game, with its questions.
            assert part.objects == tuple(one for one in game.objects if one in part.objects)
            assert part.questions == game.questions
        counts = Counter(one.category for one in held_out.objects)
        for category, size in Counter(categories).items():
            assert math.floor(round(share * size, 9)) <= counts[category] <= math.ceil(round(share * size, 9))

    def test_largest_remainders_by_hand(self) -> None:
        # A quarter of 5, 3 and 4 is 1.25, 0.75 and 1: of the three, the one that is left is of the second category.
        _, held_out = table(*["y"] * 12, categories="aaaaabbbcccc").split(0.25, 0)
        assert Counter(one.category for one in held_out.objects) == {"a": 1, "b": 1, "c": 1}

    def test_the_seed_decides_between_equal_remainders(self) -> None:
        game = table(*["y"] * 8, categories="aabbccdd")
        drawn = [{one.category for one in game.split(0.25, seed)[1].objects} for seed in range(20)]
        assert all(len(categories) == 2 for categories in drawn)
        assert set().union(*drawn) == set("abcd")

    def test_the_same_objects_in_whatever_order_they_stand(self) -> None:
        game = table(*["y"] * 30, categories="abc" * 10)
        mixed = Game(game.questions, tuple(random.Random(3).sample(game.objects, 30)))
        assert mixed.objects != game.objects
        assert set(mixed.split(0.3, 5)[1].objects) == set(game.split(0.3, 5)[1].objects)
        assert game.split(0.3, 5) == game.split(0.3, 5)
        assert len({tuple(names(game.split(0.3, seed)[1])) for seed in range(10)}) == 10

    def test_a_split_stays_what_it_was(self) -> None:
        # Runs that are resumed or compared later must hold out the same objects.
        game = table(*["y"] * 12, categories="aaaaaabbbbbb")
        assert names(game.split(0.5, 0)[1]) == ["o1", "o3", "o5", "o6", "o8", "o10"]

    def test_without_categories(self) -> None:
        train, held_out = table(*["y"] * 10).split(0.3, 0)
        assert (len(train.objects), len(held_out.objects)) == (7, 3)

    @pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 0.1, 0.9, math.nan])
    def test_a_share_that_leaves_a_part_empty_is_refused(self, share: float) -> None:
        with pytest.raises(ValueError, match=r"held_out_share must be in \(0, 1\) and leave at least one of the 4 obj"):
            table("y", "n", "y", "n").split(share, 0)


def information_by_loops(game: Game, asked: Sequence[int]) -> float:
    """H(object) - Σ_answers p(answers) H(object | answers), by going through all objects for each answers."""
    size = len(game.objects)
    left = 0.0
    for one in game.objects:
        alike = 0
        for other in game.objects:
            alike += all(one.answers[number] == other.answers[number] for number in asked)
        # Each object stands for 1 / size of its cell, in which each of `alike` objects is as likely.
        left += math.log(alike) / size
    return math.log(size) - left


def random_games() -> Iterable[Game]:
    draw = random.Random(7)
    for _ in range(12):
        num_questions, num_objects = draw.randint(1, 6), draw.randint(1, 12)
        yield table(*["".join(draw.choice("ynns-") for _ in range(num_questions)) for _ in range(num_objects)])


FOUR = table("yyn", "ynn", "nyn", "nnn")
"""The first two questions tell one bit each; the third one nothing."""

BRANCHING = table("yyn", "yyn", "ynn", "ynn", "nny", "nny", "nnn", "nnn")
"""The first question parts 8 into 4 and 4; the second one parts the first half, the third one the second half."""


class TestInformation:
    @pytest.mark.parametrize(
        ("asked", "bits"), [((), 0), ((0,), 1), ((1,), 1), ((2,), 0), ((0, 1), 2), ((1, 0, 2), 2), ((0, 0), 1)]
    )
    def test_by_hand(self, asked: tuple[int, ...], bits: int) -> None:
        assert expected_information_gain(FOUR, asked) == pytest.approx(bits * math.log(2), abs=1e-12)

    def test_uneven_cells_by_hand(self) -> None:
        # Of 4 objects 3 say yes: 3/4 log 4/3 + 1/4 log 4.
        game = table("y", "y", "n", "y")
        assert expected_information_gain(game, [0]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
        assert information_gain(game, game.objects[2], [0]) == pytest.approx(math.log(4))
        assert information_gain(game, game.objects[0], [0]) == pytest.approx(math.log(4 / 3))

    def test_an_unknown_answer_is_a_value_of_its_own(self) -> None:
        game = table("y", "y", "-", "-", "n", "n")
        assert expected_information_gain(game, [0]) == pytest.approx(math.log(3))
        assert information_gain(game, game.objects[2], [0]) == pytest.approx(math.log(3))

    def test_equals_the_slow_reference(self) -> None:
        for game in random_games():
            numbers = range(len(game.questions))
            for asked in itertools.chain.from_iterable(itertools.permutations(numbers, k) for k in (0, 1, 3)):
                expected = information_by_loops(game, asked)
                assert expected_information_gain(game, asked) == pytest.approx(expected, abs=1e-12)
                told = [information_gain(game, one, asked) for one in game.objects]
                assert sum(told) / len(told) == pytest.approx(expected, abs=1e-12)

    def test_is_not_negative_where_all_answer_alike(self) -> None:
        told = [expected_information_gain(table(*["y"] * size), [0]) for size in range(1, 60)]
        assert min(told) == 0.0
        assert max(told) < 1e-12

    @pytest.mark.parametrize("number", [-1, 3])
    def test_an_unknown_question_is_refused(self, number: int) -> None:
        with pytest.raises(ValueError, match=rf"numbers 0 to 2, got {number}"):
            expected_information_gain(FOUR, [0, number])
        with pytest.raises(ValueError, match=rf"numbers 0 to 2, got {number}"):
            information_gain(FOUR, FOUR.objects[0], [number])

    def test_an_empty_game_is_refused(self) -> None:
        empty = Game(("q",), ())
        with pytest.raises(ValueError, match="no object"):
            expected_information_gain(empty, [0])
        with pytest.raises(ValueError, match="no object"):
            information_gain(empty, GameObject("o", None, ("y",)), [0])
        with pytest.raises(ValueError, match="no object"):
            greedy_questions(empty, 1)

    def test_an_object_of_another_game_is_refused(self) -> None:
        with pytest.raises(ValueError, match="No object of the game answers as 'x' does"):
            information_gain(FOUR, GameObject("x", None, ("y", "y", "y")), [2])
        short = GameObject("x", None, ("y",))
        with pytest.raises(ValueError, match="'x' has 1 answers, the game 3 questions"):
            information_gain(FOUR, short, [0])
        with pytest.raises(ValueError, match="'x' has 1 answers, the game 3 questions"):
            play_greedily(FOUR, short)


def first_best(told: dict[int, float]) -> int:
    """The first of those that tell most, to nine digits."""
    return next(number for number in told if told[number] > max(told.values()) - 1e-9)


def greedy_by_loops(game: Game, count: int) -> tuple[int, ...]:
    order: tuple[int, ...] = ()
    for _ in range(count):
        left = [number for number in range(len(game.questions)) if number not in order]
        order += (first_best({number: information_by_loops(game, (*order, number)) for number in left}),)
    return order


def play_by_loops(game: Game, game_object: GameObject, count: int) -> tuple[int, ...]:
    """Each time a game of those alone that answer alike so far."""
    order: tuple[int, ...] = ()
    for _ in range(count):
        alike = tuple(one for one in game.objects if all(one.answers[i] == game_object.answers[i] for i in order))
        left = [number for number in game_object.known_questions() if number not in order]
        among = Game(game.questions, alike)
        order += (first_best({number: information_by_loops(among, (number,)) for number in left}),)
    return order


class TestGreedyPlayers:
    def test_a_fixed_sequence_by_hand(self) -> None:
        # q1 parts 8 into 4 and 4, q2 says the same again, q0 parts each half into 1 and 3, q3 tells nothing.
        game = table("yyyn", "nyyn", "nyyn", "nyyn", "ynnn", "nnnn", "nnnn", "nnnn")
        assert greedy_questions(game, 4) == (1, 0, 2, 3)
        assert greedy_questions(game, 2) == (1, 0)
        assert greedy_questions(game, 0) == ()

    def test_a_player_by_hand(self) -> None:
        yes, no = BRANCHING.objects[0], BRANCHING.objects[4]
        assert play_greedily(BRANCHING, yes) == (0, 1, 2)
        assert play_greedily(BRANCHING, no) == (0, 2, 1)
        assert play_greedily(BRANCHING, no, 1) == (0,)
        # Two questions that depend on the answers find one of two objects, a fixed pair in one half alone.
        played = [information_gain(BRANCHING, one, play_greedily(BRANCHING, one, 2)) for one in BRANCHING.objects]
        assert played == pytest.approx([2 * math.log(2)] * 8)
        fixed = greedy_questions(BRANCHING, 2)
        assert fixed == (0, 1)
        assert expected_information_gain(BRANCHING, fixed) == pytest.approx(1.5 * math.log(2))

    def test_what_is_not_known_is_not_asked(self) -> None:
        game = table("yyn", "yny", "-ny")
        assert play_greedily(game, game.objects[0]) == (0, 1, 2)
        # Asked q1, "n" leaves the second object and the third; q2 tells nothing more.
        assert play_greedily(game, game.objects[2]) == (1, 2)
        with pytest.raises(ValueError, match=r"count must be in \[0, 2\], .* known answer of 'o2', got 3"):
            play_greedily(game, game.objects[2], 3)

    def test_an_object_that_the_table_does_not_hold(self) -> None:
        assert play_greedily(BRANCHING, GameObject("x", None, ("maybe", "n", "y"))) == (0, 1, 2)

    def test_equal_the_slow_references(self) -> None:
        for game in random_games():
            assert greedy_questions(game, len(game.questions)) == greedy_by_loops(game, len(game.questions))
            for one in game.objects:
                known = len(one.known_questions())
                assert play_greedily(game, one) == play_by_loops(game, one, known)
                for count in range(known):
                    assert play_greedily(game, one, count) == play_greedily(game, one)[:count]

    @pytest.mark.parametrize("count", [-1, 4])
    def test_a_count_out_of_range_is_refused(self, count: int) -> None:
        with pytest.raises(ValueError, match=rf"count must be in \[0, 3\], the number of questions, got {count}"):
            greedy_questions(FOUR, count)
        with pytest.raises(ValueError, match=rf"count must be in \[0, 3\], .* known answer of 'o0', got {count}"):
            play_greedily(FOUR, FOUR.objects[0], count)


YES_ENTAILS = """
alive: +grow -made -metal -cloth -wheels -electric -worn -handle -store -inside -children
animal: +alive +grow -plant -made -kitchen -wood -metal -cloth -wheels -inside -sweet -electric -worn -handle -store
animal: -children !food
plant: -animal -made -metal -cloth -wheels -travel -inside -fly -legs -eggs -noise -electric -worn -handle -store
plant: -children -cost
food: -animal -bigger -heavier -wood -metal -cloth -wheels -travel -inside -fly -legs -eggs -noise -electric -worn
food: -sport -store -cost !outdoors
made: -alive -animal -plant -eggs -grow
bigger: -pocket -kitchen !worn
heavier: +bigger -pocket -kitchen -worn -handle !home
pocket: -bigger -heavier -travel -inside
home: -heavier
kitchen: +home -heavier !outdoors -water -travel -inside -fly
outdoors: -kitchen
water: -kitchen -sweet !electric
wood: -food -metal -cloth !soft
metal: -alive -food -wood -cloth -grow !soft
cloth: +made -alive -food -wood -metal -sharp -electric
soft: -heavier -sharp !wood !metal
sharp: -cloth -travel !soft
round: !legs
green: -white
white: -green
wheels: +made -food -kitchen -legs -eggs -grow -water
travel: -plant -food -pocket -kitchen -sharp -sweet -soft
inside: +bigger -animal -food -pocket -worn -handle
fly: -plant -food -kitchen -wood -legs -store
legs: -plant -food -fly -wheels -sweet -worn
eggs: +animal +alive +grow -made
grow: -made -metal -cloth -electric -worn
sweet: +food -animal -metal
noise: -plant -food
electric: +made -alive -plant -food -soft -grow
worn: +made -alive -food -bigger -heavier -inside !travel
sport: -plant -food -kitchen
handle: +made -alive -food -heavier -inside
store: +made -alive -animal -food -fly -sport
children: +made -alive -sharp
cost: -plant -food
"""
"""What a yes to the first question says of others: ``+`` a yes, ``-`` a no, ``!`` anything but a yes."""

CATEGORY_ENTAILS = """
mammal: +animal -eggs
bird: +animal -legs
sea animal: +animal
small animal: +animal
plant: +plant !food
fruit: +food +plant
vegetable: +food
food: +food -animal
clothing: +worn +made
tool: +made -travel
kitchenware: +made +kitchen
appliance: +made !travel
furniture: +made -travel
vehicle: +made -kitchen
building: +made -pocket -kitchen
musical instrument: +made +noise
toy or sport: +made -kitchen
natural thing: -animal -food
everyday thing: +made -travel
"""
"""The same of all objects of a category, with what is food kept out of where nothing can be eaten."""

NOT_EATEN = ("clothing", "tool", "kitchenware", "appliance", "furniture", "vehicle", "building", "musical instrument")

CATEGORIES = {str(one["category"]) for one in build()}


def entailments(text: str) -> list[tuple[str, str, str]]:
    """Premise, sign and short name of each."""
    lines = [line.split(": ") for line in text.strip().splitlines()]
    return [(premise, word[0], word[1:]) for premise, words in lines for word in words.split()]


def holds(sign: str, answer: str) -> bool:
    return {"+": answer == "yes", "-": answer == "no", "!": answer != "yes"}[sign]


@pytest.fixture(scope="module")
def ours() -> Game:
    return load_game(TWENTY_QUESTIONS, answer_words=("yes", "no", "sometimes"))


@pytest.fixture(scope="module")
def answers_by_name(ours: Game) -> dict[str, dict[str, str]]:
    """The answers of each object, by the questions' short names."""
    return {
        one.name: {word: str(answer) for word, answer in zip(QUESTIONS, one.answers, strict=True)}
        for one in ours.objects
    }


class TestTwentyQuestions:
    def test_is_what_its_source_builds(self) -> None:
        assert TWENTY_QUESTIONS.read_text(encoding="utf-8") == as_json()
        assert json.loads(as_json())["objects"] == build()

    def test_is_large_enough(self, ours: Game) -> None:
        sizes = Counter(one.category for one in ours.objects)
        assert len(ours.objects) >= 200
        assert len(sizes) >= 10
        assert min(sizes.values()) >= 8
        assert len(ours.questions) >= 24
        assert all(len(one.known_questions()) == len(ours.questions) for one in ours.objects)

    def test_questions_are_short_ones(self, ours: Game) -> None:
        for question in ours.questions:
            assert re.fullmatch(r"[A-Z][a-z]*( [a-z]+){1,7}\?", question), question

    @pytest.mark.parametrize("word", QUESTIONS)
    def test_every_question_parts_the_objects(self, word: str, answers_by_name: dict[str, dict[str, str]]) -> None:
        counts = Counter(answers[word] for answers in answers_by_name.values())
        (_, _), (_, second) = counts.most_common(2)
        assert second >= 0.05 * len(answers_by_name)

    def test_no_two_objects_have_the_same_answers(self, ours: Game) -> None:
        assert len({one.answers for one in ours.objects}) == len(ours.objects)
        told = expected_information_gain(ours, range(len(ours.questions)))
        assert told == pytest.approx(math.log(len(ours.objects)))

    @pytest.mark.parametrize(("premise", "sign", "word"), entailments(YES_ENTAILS))
    def test_answers_do_not_contradict_each_other(
        self, premise: str, sign: str, word: str, answers_by_name: dict[str, dict[str, str]]
    ) -> None:
        said_yes = {name: answers for name, answers in answers_by_name.items() if answers[premise] == "yes"}
        assert len(said_yes) >= 20
        assert [name for name, answers in said_yes.items() if not holds(sign, answers[word])] == []

    @pytest.mark.parametrize(
        ("category", "sign", "word"),
        [*entailments(CATEGORY_ENTAILS), *((category, "-", "food") for category in NOT_EATEN)],
    )
    def test_answers_do_not_contradict_the_category(
        self, category: str, sign: str, word: str, ours: Game, answers_by_name: dict[str, dict[str, str]]
    ) -> None:
        members = [one.name for one in ours.objects if one.category == category]
        assert members
        assert [name for name in members if not holds(sign, answers_by_name[name][word])] == []

    def test_every_category_has_a_rule(self) -> None:
        assert {category for category, _, _ in entailments(CATEGORY_ENTAILS)} == CATEGORIES

    def test_asking_by_the_answers_tells_more_than_asking_all_alike(self, ours: Game) -> None:
        num_asked = 6
        fixed = greedy_questions(ours, num_asked)
        played = [information_gain(ours, one, play_greedily(ours, one, num_asked)) for one in ours.objects]
        draw = random.Random(0)
        drawn = [draw.sample(range(len(ours.questions)), num_asked) for _ in range(20)]
        by_chance = sum(expected_information_gain(ours, asked) for asked in drawn) / len(drawn)
        assert by_chance + 1 < expected_information_gain(ours, fixed) < sum(played) / len(played) - 0.3


class TestPage:
    PAGE = (Path(__file__).parent.parent.parent / "docs" / "games.md").read_text(encoding="utf-8")

    def test_its_example_is_a_game(self, tmp_path: Path) -> None:
        (example,) = re.findall(r"```json\n(.*?)```", self.PAGE, re.DOTALL)
        game = load_game(write(tmp_path, example))
        assert [one.answers for one in game.objects] == [("yes", "sometimes", None), ("no", None, "to lift things")]

    def test_it_gives_the_counts_of_the_data_set(self, ours: Game) -> None:
        for number, question in enumerate(ours.questions):
            counts = Counter(one.answers[number] for one in ours.objects)
            entropy = expected_information_gain(ours, [number])
            row = f"| {question} | {counts['yes']} | {counts['sometimes']} | {counts['no']} | {entropy:.2f} |"
            assert row in self.PAGE
        sizes = Counter(str(one.category) for one in ours.objects)
        assert ", ".join(f"{category} {size}" for category, size in sizes.items()) in self.PAGE
        assert f"{len(ours.objects)} everyday objects in {len(sizes)} categories" in self.PAGE
        num_rules = len(entailments(YES_ENTAILS) + entailments(CATEGORY_ENTAILS)) + len(NOT_EATEN)
        assert f"{num_rules} rules" in self.PAGE
