"""Train a language model to direct its own reading of Wikipedia.

What differs from a textbook fine-tuning script: there are no labels and no fixed inputs. The model writes queries, its
own attention draws the passage that it reads next, and the reward is how much better the passage is predicted than by
the untouched base model.

On any machine, with the embedded model and articles (`make demo-wiki` sets everything up and runs this):

    accelerate launch examples/train_wiki.py --config demo_wiki

With the Hub and a GPU of 16 GB:

    accelerate launch examples/train_wiki.py --config llama3.2_3b

`--config` takes the name of a file in `configs/`, or a path to one of your own. This is `attention-rl train`, which is
there without the repository too; `own_*.py` beside this file show how to exchange its parts.
"""

import sys

from attention_rl_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
