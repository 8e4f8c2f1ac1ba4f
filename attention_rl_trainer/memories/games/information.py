"""What questions tell about the object of a game, from its table of answers, in nats.

Every object of the game is as likely as any other, and who asks knows the table. An answer that is not known (``None``)
is a value of its own: hearing that there is none leaves the objects without one. So the answers are a function of the
object, they tell the entropy of the cells into which they part the objects, and more questions never tell less. In a
table with many gaps, part of it is what the gaps tell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from attention_rl_trainer.memories.games.game import Game, GameObject


def expected_information_gain(game: Game, asked: Sequence[int]) -> float:
    """I(object; answers) = log n - (1/n) Σ_cells c log c, nats, for n objects in cells of c that answer alike.

    Args:
        game: at least one object.
        asked: numbers of questions, from 0 on; their order does not matter, and one asked again tells nothing more.

    Raises:
        ValueError: a number is not that of a question, or the game has no object.
    """
    _expect_objects(game)
    _expect_questions(game, asked)
    return _entropy(tuple(one.answers[number] for number in asked) for one in game.objects)


def information_gain(game: Game, game_object: GameObject, asked: Sequence[int]) -> float:
    """log(n / c), nats: what one object's answers tell, if c of the n objects of the game answer as it does.

    Its mean over the objects is `expected_information_gain`, where all are asked the same questions; it is also defined
    where questions depend on the answers before.

    Args:
        game: at least one object.
        game_object: one of the game's, or one that answers as one of them.
        asked: numbers of questions, from 0 on.

    Raises:
        ValueError: as `expected_information_gain`, or no object of the game answers like this one.
    """
    _expect_objects(game)
    _expect_questions(game, asked)
    _expect_answers(game, game_object)
    num_alike = sum(all(one.answers[i] == game_object.answers[i] for i in asked) for one in game.objects)
    if num_alike == 0:
        raise ValueError(f"No object of the game answers as {game_object.name!r} does; give the game that it is in.")
    return math.log(len(game.objects) / num_alike)


def greedy_questions(game: Game, count: int) -> tuple[int, ...]:
    """Choose a fixed sequence for all objects: each question tells most beside those before it, ties by table order.

    Args:
        game: at least one object.
        count: questions to choose, from 0 to all.

    Raises:
        ValueError: the count is out of its range, or the game has no object.
    """
    _expect_objects(game)
    _expect_count(count, len(game.questions), "questions")
    cells: list[Hashable] = [()] * len(game.objects)
    order: list[int] = []
    for _ in range(count):
        told = {
            number: _entropy((cell, one.answers[number]) for cell, one in zip(cells, game.objects, strict=True))
            for number in range(len(game.questions))
            if number not in order
        }
        best = max(told, key=told.__getitem__)
        cells = [(cell, one.answers[best]) for cell, one in zip(cells, game.objects, strict=True)]
        order.append(best)
    return tuple(order)


def play_greedily(game: Game, game_object: GameObject, count: int | None = None) -> tuple[int, ...]:
    """Question one object: each question parts best what the answers so far have left, ties by table order.

    Only questions whose answer is known are asked, since the object's memory holds no other pairs.

    Args:
        game: the table that the player knows.
        game_object: usually one of the game's. Where none of them answers like it, what is left is asked in the table's
            order.
        count: questions to ask; ``None`` means all whose answer is known.

    Raises:
        ValueError: the count is out of its range, or the object does not answer the game's questions.
    """
    _expect_answers(game, game_object)
    left = list(game_object.known_questions())
    count = len(left) if count is None else count
    _expect_count(count, len(left), f"questions with a known answer of {game_object.name!r}")
    candidates: Sequence[GameObject] = game.objects
    order: list[int] = []
    for _ in range(count):
        told = {number: _entropy(one.answers[number] for one in candidates) for number in left}
        best = max(left, key=told.__getitem__)
        candidates = [one for one in candidates if one.answers[best] == game_object.answers[best]]
        left.remove(best)
        order.append(best)
    return tuple(order)


def _entropy(values: Iterable[Hashable]) -> float:
    """Entropy of the values' frequencies, nats; 0 of none."""
    counts = Counter(values).values()
    total = sum(counts)
    if total == 0:
        return 0.0
    # The sum is exact, so that counts in another order tie; where all are alike, the difference may be just below 0.
    return max(0.0, math.log(total) - math.fsum(count * math.log(count) for count in counts) / total)


def _expect_objects(game: Game) -> None:
    if not game.objects:
        raise ValueError("The game has no object; give one with at least one.")


def _expect_questions(game: Game, asked: Sequence[int]) -> None:
    for number in asked:
        if not 0 <= number < len(game.questions):
            raise ValueError(f"Questions have the numbers 0 to {len(game.questions) - 1}, got {number}.")


def _expect_answers(game: Game, game_object: GameObject) -> None:
    if len(game_object.answers) != len(game.questions):
        raise ValueError(
            f"{game_object.name!r} has {len(game_object.answers)} answers, the game {len(game.questions)} questions; "
            "give an object of this game."
        )


def _expect_count(count: int, most: int, what: str) -> None:
    if not 0 <= count <= most:
        raise ValueError(f"count must be in [0, {most}], the number of {what}, got {count}.")
