"""A game from its file, with every fault named by file, line, object and field."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Final

from attention_rl_trainer.memories.games.game import Game, GameObject
from attention_rl_trainer.memories.games.placed_json import Placed, PlacedJson, kind

TWENTY_QUESTIONS: Final = Path(__file__).with_name("twenty_questions.json")
"""The package's own game: everyday objects, answered "yes", "no" or "sometimes" (docs/games.md)."""

_MIN_OBJECTS = 2
_MIN_KNOWN_ANSWERS = 2


def load_game(path: str | PathLike[str], *, answer_words: Sequence[str] | None = None) -> Game:
    """Read a game from JSON; white space around a text is not part of it.

    Args:
        path: a file of ``{"questions": [...], "objects": [{"name": ..., "category": ..., "answers": ...}, ...]}``. The
            category may be missing. Answers are a list in the order of the questions, with ``null`` where one is not
            known, or an object ``{question: answer}``, from which those that are not known may be missing.
        answer_words: the only answers that are allowed, such as ``("yes", "no", "sometimes", "unknown")``; ``None``
            allows any text.

    Raises:
        ValueError: the file is not UTF-8, not JSON, or not such a game; names the file, the line, the object and the
            field, and what to do.
        OSError: the file cannot be opened.
    """
    file = PlacedJson.read(fspath(path))
    fields = file.fields(file.root(), "", required=("questions", "objects"))
    questions = _questions(file, fields["questions"])
    return Game(questions, _objects(file, fields["objects"], questions, answer_words))


def _questions(file: PlacedJson, placed: Placed) -> tuple[str, ...]:
    where = "field 'questions'"
    if not isinstance(placed.value, list):
        raise file.fault(placed.position, where, f"expected a list of questions, got {kind(placed.value)}.")
    if not placed.value:
        raise file.fault(placed.position, where, "there are no questions; add those that the objects answer.")
    numbers: dict[str, int] = {}
    for number, element in enumerate(file.elements(placed)):
        question = file.text_of(element, f"questions[{number}]")
        if question in numbers:
            message = f"{question!r} is questions[{numbers[question]}] already; delete one."
            raise file.fault(element.position, f"questions[{number}]", message)
        numbers[question] = number
    return tuple(numbers)


def _objects(
    file: PlacedJson, placed: Placed, questions: tuple[str, ...], answer_words: Sequence[str] | None
) -> tuple[GameObject, ...]:
    where = "field 'objects'"
    if not isinstance(placed.value, list):
        raise file.fault(placed.position, where, f"expected a list of objects, got {kind(placed.value)}.")
    if len(placed.value) < _MIN_OBJECTS:
        message = f"expected at least {_MIN_OBJECTS} objects, got {len(placed.value)}; add some."
        raise file.fault(placed.position, where, message)
    numbers: dict[str, int] = {}
    objects: list[GameObject] = []
    for number, element in enumerate(file.elements(placed)):
        where = f"objects[{number}]"
        fields = file.fields(element, where, required=("name", "answers"), optional=("category",))
        name = file.text_of(fields["name"], f"{where}, field 'name'")
        if name in numbers:
            message = f"{name!r} is the name of objects[{numbers[name]}] already; rename or delete one."
            raise file.fault(fields["name"].position, f"{where}, field 'name'", message)
        numbers[name] = number
        where = f"{where} ({name!r})"
        category = _known_text(file, fields.get("category"), f"{where}, field 'category'")
        answers = _answers(file, fields["answers"], f"{where}, field 'answers'", questions, answer_words)
        objects.append(GameObject(name, category, answers))
    return tuple(objects)


def _answers(
    file: PlacedJson, placed: Placed, where: str, questions: tuple[str, ...], answer_words: Sequence[str] | None
) -> tuple[str | None, ...]:
    if isinstance(placed.value, list):
        if len(placed.value) != len(questions):
            message = f"{len(placed.value)} answers for {len(questions)} questions; give one for each, null if unknown."
            raise file.fault(placed.position, where, message)
        given = dict(zip(questions, file.elements(placed), strict=True))
    elif isinstance(placed.value, dict):
        given = _answers_by_question(file, placed, where, questions)
    else:
        message = f"expected a list of answers, or an object {{question: answer}}, got {kind(placed.value)}."
        raise file.fault(placed.position, where, message)
    answers: list[str | None] = []
    for question in questions:
        answer = _known_text(file, given.get(question), f"{where}, question {question!r}")
        if answer is not None and answer_words is not None and answer not in answer_words:
            allowed = ", ".join(repr(word) for word in answer_words)
            message = f"{answer!r} is not an answer word; the words are {allowed}, and null for what is not known."
            raise file.fault(given[question].position, f"{where}, question {question!r}", message)
        answers.append(answer)
    num_known = len(answers) - answers.count(None)
    if num_known < _MIN_KNOWN_ANSWERS:
        message = (
            f"{num_known} of {len(questions)} answers known, expected at least {_MIN_KNOWN_ANSWERS}; "
            "add some, or delete the object."
        )
        raise file.fault(placed.position, where, message)
    return tuple(answers)


def _answers_by_question(file: PlacedJson, placed: Placed, where: str, questions: tuple[str, ...]) -> dict[str, Placed]:
    given: dict[str, Placed] = {}
    for position, name, answer in file.members(placed):
        question = name.strip()
        if question not in questions:
            message = f"{question!r} is not one of the questions; correct it, or add it to the field 'questions'."
            raise file.fault(position, where, message)
        if question in given:
            raise file.fault(position, where, f"{question!r} is answered twice; delete one.")
        given[question] = answer
    return given


def _known_text(file: PlacedJson, placed: Placed | None, where: str) -> str | None:
    """A text, or None for what is null or missing."""
    return None if placed is None or placed.value is None else file.text_of(placed, where)
