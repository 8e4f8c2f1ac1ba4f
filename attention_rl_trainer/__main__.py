"""``python -m attention_rl_trainer``, and ``accelerate launch -m attention_rl_trainer``: the command `attention-rl`."""

import sys

from attention_rl_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
