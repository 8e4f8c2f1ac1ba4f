"""From a game to memories: an object's questions are its keys, what its answers say are its values."""

from __future__ import annotations

import re
from typing import Final

from attention_rl_trainer.memories.games.game import Game, GameObject
from attention_rl_trainer.memories.stream import Entries
from attention_rl_trainer.memories.tables.entries_table import EntriesTable
from attention_rl_trainer.memories.tables.templates import expect_template

KEY_TEMPLATE: Final = " {question}"
VALUE_TEMPLATE: Final = " {statement}"

# A subject of one word, after which the rest of the question begins.
_QUESTION = re.compile(
    r"(?P<auxiliary>is|are|was|were|do|does|did|can|could|will|would|should) "
    r"(?P<subject>it|they|he|she|you|we|people|there) (?P<rest>.+)\?",
    re.IGNORECASE,
)
# "Sometimes it is usually green" would contradict itself.
_FREQUENCY = re.compile(r"\A(?:always|usually|often|normally|generally|commonly|typically) ", re.IGNORECASE)


def game_entries(
    game: Game, source: str, *, key_template: str = KEY_TEMPLATE, value_template: str = VALUE_TEMPLATE
) -> EntriesTable:
    """Make a memory of each object, in the game's order; answers that are not known are left out.

    Keys and values are the filled templates as they are: by default each begins with one space, so that it is tokenized
    as in running text. Questions and answers themselves have no white space around them.

    Args:
        source: name or path of the game.
        key_template: holds ``{question}``.
        value_template: holds ``{statement}`` (see `statement`) or ``{answer}``, and may hold ``{question}``.

    Raises:
        ValueError: a template cannot be filled, or gives the same text for every entry.
    """
    expect_template(key_template, "key_template", fields=("question",), needed=("question",))
    expect_template(
        value_template, "value_template", fields=("statement", "answer", "question"), needed=("statement", "answer")
    )

    def entries(one: GameObject) -> Entries:
        known = [
            (question, answer)
            for question, answer in zip(game.questions, one.answers, strict=True)
            if answer is not None
        ]
        keys = (key_template.format(question=question) for question, _ in known)
        values = (
            value_template.format(question=question, answer=answer, statement=statement(question, answer))
            for question, answer in known
        )
        return Entries(one.name, source, tuple(keys), tuple(values))

    return EntriesTable(source, tuple(entries(one) for one in game.objects))


def statement(question: str, answer: str) -> str:
    """Say in a sentence what an answer says, so that a value names its property by itself.

    "Is it soft?" answered "no" is "No, it is not soft.", "yes" is "Yes, it is soft.", "sometimes" is "Sometimes it is
    soft.". Other answers, and questions that do not begin with an auxiliary and a subject of one word ("Does it …?",
    "Can people …?"), leave the answer as it is.
    """
    parts = _QUESTION.fullmatch(" ".join(question.split()))
    if parts is None or answer.lower() not in ("yes", "no", "sometimes"):
        return answer
    auxiliary, subject, rest = parts["auxiliary"].lower(), parts["subject"].lower(), parts["rest"].rstrip()
    if answer.lower() == "yes":
        return f"Yes, {subject} {auxiliary} {rest}."
    if answer.lower() == "no":
        negated = "cannot" if auxiliary == "can" else f"{auxiliary} not"
        return f"No, {subject} {negated} {rest}."
    return f"Sometimes {subject} {auxiliary} {_FREQUENCY.sub('', rest)}."
