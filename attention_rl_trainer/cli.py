"""The command ``attention-rl``.

    attention-rl train --config demo
    attention-rl evaluate out/demo --dataset offline

Each command takes its options as flags or from a YAML file (``--config``, a path or the name of one that comes with the
package), as TRL's commands do; ``--help`` explains them. A command is loaded when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def _train(flags: Sequence[str]) -> int:
    from attention_rl_trainer.commands.train import main as train

    return train(flags)


def _evaluate(flags: Sequence[str]) -> int:
    from attention_rl_trainer.commands.evaluate import main as evaluate

    return evaluate(flags)


def _calibrate(flags: Sequence[str]) -> int:
    from attention_rl_trainer.commands.calibrate import main as calibrate

    return calibrate(flags)


def _plan(flags: Sequence[str]) -> int:
    from attention_rl_trainer.commands.plan import main as plan

    return plan(flags)


def _selftest(flags: Sequence[str]) -> int:
    from attention_rl_trainer.commands.selftest import main as selftest

    return selftest(flags)


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (_train, "train an adapter on articles"),
    "evaluate": (_evaluate, "what an adapter's orders and queries are worth on held-out articles"),
    "calibrate": (_calibrate, "which attention heads find what a query names, and how well"),
    "plan": (_plan, "what a run will need: memory, time, cost"),
    "selftest": (_selftest, "train on a task whose best policy is known, and say how close training gets"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line; by default the process's own.

    Returns:
        The exit code; 2 where the command line cannot be understood.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in _COMMANDS:
        command, _ = _COMMANDS[given[0]]
        try:
            return command(given[1:])
        except ValueError as error:
            print(f"attention-rl {given[0]}: {error}", file=sys.stderr)
            return 2
    is_help = given in (["-h"], ["--help"])
    if given and not is_help:
        print(
            f"attention-rl: there is no command {given[0]!r}; the commands are {', '.join(_COMMANDS)}", file=sys.stderr
        )
    print("usage: attention-rl COMMAND [--help]\n")
    for name, (_, meaning) in _COMMANDS.items():
        print(f"  {name:10} {meaning}")
    return 0 if is_help else 2
