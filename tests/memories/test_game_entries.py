"""A game's objects as memories: what an answer says in a sentence, templates, and answers that are not known."""

from __future__ import annotations

import re

import pytest

from attention_rl_trainer.memories.games import (
    TWENTY_QUESTIONS,
    Game,
    GameObject,
    game_entries,
    load_game,
    statement,
)
from attention_rl_trainer.memories.stream import Entries

GAME = Game(
    ("Is it alive?", "Can people eat it?", "What is it for?"),
    (
        GameObject("ant", "animal", ("yes", "sometimes", None)),
        GameObject("saw", None, ("no", None, "to cut wood")),
    ),
)


def test_an_object_is_a_memory_of_the_answers_that_are_known() -> None:
    table = game_entries(GAME, "a game")
    assert table.name == "a game"
    assert table.rows == (
        Entries(
            "ant",
            "a game",
            (" Is it alive?", " Can people eat it?"),
            (" Yes, it is alive.", " Sometimes people can eat it."),
        ),
        Entries("saw", "a game", (" Is it alive?", " What is it for?"), (" No, it is not alive.", " to cut wood")),
    )


def test_templates_are_filled_as_they_are() -> None:
    table = game_entries(
        GAME, "a game", key_template="\nQ: {question}", value_template=" {answer} ({question}) {{x}}\n"
    )
    assert table[1].keys == ("\nQ: Is it alive?", "\nQ: What is it for?")
    assert table[1].values == (" no (Is it alive?) {x}\n", " to cut wood (What is it for?) {x}\n")


@pytest.mark.parametrize(
    ("question", "yes", "no", "sometimes"),
    [
        ("Is it soft?", "Yes, it is soft.", "No, it is not soft.", "Sometimes it is soft."),
        (
            "Is it usually green?",
            "Yes, it is usually green.",
            "No, it is not usually green.",
            "Sometimes it is green.",
        ),
        ("Can it fly?", "Yes, it can fly.", "No, it cannot fly.", "Sometimes it can fly."),
        ("Does it grow?", "Yes, it does grow.", "No, it does not grow.", "Sometimes it does grow."),
        (
            " do  people usually wear it ?",
            "Yes, people do usually wear it.",
            "No, people do not usually wear it.",
            "Sometimes people do wear it.",
        ),
        ("Were They old?", "Yes, they were old.", "No, they were not old.", "Sometimes they were old."),
    ],
)
def test_an_answer_repeats_the_property(question: str, yes: str, no: str, sometimes: str) -> None:
    assert [statement(question, answer) for answer in ("yes", "NO", "Sometimes")] == [yes, no, sometimes]


@pytest.mark.parametrize("question", ["Is the tail long?", "Is it", "What is it?", "It is soft?", "Isn't it soft?"])
@pytest.mark.parametrize("answer", ["yes", "no", "sometimes"])
def test_a_question_of_another_kind_leaves_its_answer(question: str, answer: str) -> None:
    assert statement(question, answer) == answer


@pytest.mark.parametrize("answer", ["unknown", "of wood", "yes, often"])
def test_another_answer_is_left_as_it_is(answer: str) -> None:
    assert statement("Is it soft?", answer) == answer


def test_every_answer_of_our_own_game_is_a_sentence_of_its_own() -> None:
    table = game_entries(load_game(TWENTY_QUESTIONS), "twenty_questions")
    assert (len(table), table.num_pairs) == (514, 18_504)
    for one in table:
        # Who reads a value alone knows what it is about.
        assert len(set(one.values)) == len(one.values)
        for key, value in zip(one.keys, one.values, strict=True):
            assert re.fullmatch(r" (Is|Does|Do|Can) (it|people|you) [a-z ]+\?", key)
            assert re.fullmatch(r" (Yes,|No,|Sometimes) (it|people|you) (is|does|do|can|cannot) [a-z ]+\.", value)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (
            {"key_template": "Question"},
            "key_template is 'Question', the same text for every entry; put {question} into",
        ),
        ({"value_template": " {question}"}, "the same text for every entry; put {statement} or {answer} into it"),
        ({"key_template": "{answer}"}, "key_template is '{answer}', which holds {answer}; it may hold {question}."),
        ({"value_template": "{0}"}, "value_template is '{0}', which holds {0}; it may hold {statement}, {answer}, {q"),
        ({"key_template": "{question!r:>9}"}, "which holds {question!r:>9}; it may hold {question}"),
        ({"key_template": "{question.title}"}, "which holds {question.title}; it may hold {question}"),
        ({"key_template": "{question"}, "key_template is '{question', which cannot be read: expected '}' before end"),
        ({"value_template": "{answer}}"}, "which cannot be read: Single '}' encountered in format string. It may hold"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(templates: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        game_entries(GAME, "a game", **templates)
