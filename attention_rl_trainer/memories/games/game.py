"""A game: questions, objects with their answers, and its split by object."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

from attention_rl_trainer.memories.tables.draws import draw

_DIGITS_OF_TIES = 9


@dataclass(frozen=True)
class GameObject:
    """What is asked about."""

    name: str
    category: str | None
    answers: tuple[str | None, ...]
    """One for each question of the game, in their order; ``None`` where it is not known."""

    def known_questions(self) -> tuple[int, ...]:
        """The numbers of the questions whose answer is known, from 0 on."""
        return tuple(number for number, answer in enumerate(self.answers) if answer is not None)


@dataclass(frozen=True)
class Game:
    """Questions, and objects with their answers; a part of a game, such as its held-out objects, is one too.

    Raises:
        ValueError: an object has more or fewer answers than there are questions.
    """

    questions: tuple[str, ...]
    objects: tuple[GameObject, ...]

    def __post_init__(self) -> None:
        for game_object in self.objects:
            if len(game_object.answers) != len(self.questions):
                raise ValueError(
                    f"The object {game_object.name!r} has {len(game_object.answers)} answers for "
                    f"{len(self.questions)} questions; give one for each, None where it is not known."
                )

    def split(self, held_out_share: float, seed: int) -> tuple[Game, Game]:
        """Part the objects into those to train on and those held out, both in the game's order.

        Each category gives its share, to within one object; objects without a category are one together. Which objects
        are held out depends on the seed, the names and the categories, and not on the order in the file.

        Args:
            held_out_share: in (0, 1); this share of all objects, to the nearest one, is held out.
            seed: another one holds out others.

        Raises:
            ValueError: the share is out of its range, or leaves one of the parts empty.
        """
        num_objects = len(self.objects)
        num_held_out = math.floor(held_out_share * num_objects + 0.5) if 0 < held_out_share < 1 else 0
        if not 0 < num_held_out < num_objects:
            raise ValueError(
                f"held_out_share must be in (0, 1) and leave at least one of the {num_objects} objects in each part, "
                f"got {held_out_share!r}."
            )
        groups: dict[str | None, list[GameObject]] = {}
        for game_object in self.objects:
            groups.setdefault(game_object.category, []).append(game_object)
        shares = {category: held_out_share * len(group) for category, group in groups.items()}
        sizes = _whole_numbers(shares, num_held_out, seed)
        held_out = {
            game_object.name
            for category, group in groups.items()
            for game_object in sorted(group, key=lambda one: draw(seed, one.name))[: sizes[category]]
        }
        return self._part({one.name for one in self.objects} - held_out), self._part(held_out)

    def _part(self, names: Container[str]) -> Game:
        return Game(self.questions, tuple(one for one in self.objects if one.name in names))


def _whole_numbers(shares: dict[str | None, float], total: int, seed: int) -> dict[str | None, int]:
    """Round shares to a total: the largest remainders up, the seed decides between equal ones."""
    sizes = {category: math.floor(share) for category, share in shares.items()}

    def rank(category: str | None) -> tuple[float, float]:
        return round(sizes[category] - shares[category], _DIGITS_OF_TIES), draw(seed, f"category {category}")

    for category in sorted(shares, key=rank)[: total - sum(sizes.values())]:
        sizes[category] += 1
    return sizes
