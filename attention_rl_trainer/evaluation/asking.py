"""What the questions that a policy asked tell about the object that it asked of, beside other players (design §11).

Where all memories answer the same questions, as the objects of a game do, the drawn pairs are questions asked, and the
table of all answers says how far their answers narrow down which object it is: log(n / c) nats, if c of n objects
answer alike. The other players ask as many questions of the same memory:

* random ones, the mean over several draws;
* the fixed best sequence: those that tell most of all objects, one after the other, whatever the answers;
* the greedy player, who asks what best parts the objects that the answers so far have left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from attention_rl_trainer.memories.games import Game, GameObject, greedy_questions, information_gain, play_greedily
from attention_rl_trainer.memories.stream import Articles, Entries
from attention_rl_trainer.memories.tables import EntriesTable

ASKED, RANDOM_QUESTIONS, FIXED, GREEDY = "policy", "random questions", "fixed best sequence", "greedy player"
_NUM_DRAWS = 32
# Of the objects that must answer a question for the memories to be those of a game.
_SHARE_OF_OBJECTS = 0.5


class AskedQuestions:
    """The questions of a game, its objects' answers, and what those that were asked of an object tell.

    Args:
        table: the memories that are evaluated, by their numbers.
    """

    def __init__(self, table: Sequence[Entries]) -> None:
        self._table = table
        questions = list(dict.fromkeys(key for row in table for key in row.keys))
        self._numbers = {question: number for number, question in enumerate(questions)}
        objects = []
        for row in table:
            answers = dict(zip(row.keys, row.values, strict=True))
            objects.append(GameObject(row.title, None, tuple(answers.get(question) for question in questions)))
        self._game = Game(tuple(questions), tuple(objects))
        self._fixed = greedy_questions(self._game, len(questions))

    @classmethod
    def of(cls, memories: Articles) -> AskedQuestions | None:
        """Take a source's memories; ``None`` where they do not answer the same questions."""
        if not isinstance(memories, EntriesTable):
            return None
        counts = Counter(key for row in memories for key in row.keys)
        are_shared = all(count >= _SHARE_OF_OBJECTS * len(memories) for count in counts.values())
        return cls(memories) if are_shared else None

    def gains(self, row: int, memory: Sequence[int], asked: Sequence[int], seed: Sequence[int]) -> dict[str, float]:
        """Measure what was asked of an object, and what other players would have asked, nats.

        Args:
            row: the object's number.
            memory: numbers of the pairs that there were to draw.
            asked: numbers of those that were drawn.
            seed: of the random questions.
        """
        keys, one = self._table[row].keys, self._game.objects[row]
        there, drawn = ([self._numbers[keys[number]] for number in numbers] for numbers in (memory, asked))
        known = replace(
            one, answers=tuple(answer if number in there else None for number, answer in enumerate(one.answers))
        )
        generator = np.random.default_rng(list(seed))
        draws = [generator.choice(there, size=len(drawn), replace=False).tolist() for _ in range(_NUM_DRAWS)]
        return {
            ASKED: self._gain(one, drawn),
            RANDOM_QUESTIONS: sum(self._gain(one, draw) for draw in draws) / _NUM_DRAWS,
            FIXED: self._gain(one, [number for number in self._fixed if number in there][: len(drawn)]),
            GREEDY: self._gain(one, play_greedily(self._game, known, len(drawn))),
        }

    def _gain(self, one: GameObject, asked: Sequence[int]) -> float:
        return information_gain(self._game, one, asked)
