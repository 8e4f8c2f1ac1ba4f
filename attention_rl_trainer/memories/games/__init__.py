"""From the file of a game to its questions, objects and answers, and what a question tells about the object.

A game asks the same questions of every object: an object is a memory, its questions are the keys, its answers the
values. Nothing here knows of tokens or of models.
"""

from attention_rl_trainer.memories.games.entries import game_entries, statement
from attention_rl_trainer.memories.games.game import Game, GameObject
from attention_rl_trainer.memories.games.information import (
    expected_information_gain,
    greedy_questions,
    information_gain,
    play_greedily,
)
from attention_rl_trainer.memories.games.loading import TWENTY_QUESTIONS, load_game

__all__ = [
    "TWENTY_QUESTIONS",
    "Game",
    "GameObject",
    "expected_information_gain",
    "game_entries",
    "greedy_questions",
    "information_gain",
    "load_game",
    "play_greedily",
    "statement",
]
