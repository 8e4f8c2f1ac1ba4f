"""Train a language model to ask the questions of a game, and to read the answers that it gets.

An object's questions are the keys of a memory, their answers the values. The model sees which questions there are and
writes one, its own attention draws the pair, and the reward is how much better the answer is predicted than by the
untouched base model after a question of its own. First comes a short supervised phase, in which each query is one of
the questions (`warm_start_episodes`, docs/method.md): reinforcement finds which question, not what a question is.

Offline, on two CPU cores, with the embedded model and the package's own game of 514 objects and 36 questions:

    accelerate launch examples/train_twenty_questions.py --config twenty_questions

The same on 256 countries and territories and what a fact book says of them, which needs the extra `factbook`:

    accelerate launch examples/train_twenty_questions.py --config factbook

`--dataset my_game.json` plays a game of your own (docs/games.md). This is `attention-rl train`, as `train_wiki.py` is:
the options file says what is read.
"""

import sys

from attention_rl_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
