"""The command ``attention-rl``.

    attention-rl train --config demo
    attention-rl evaluate out/demo --dataset twenty_questions --dataset_split test

Each command takes its options as flags or from a YAML file (``--config``, a path or the name of one that comes with the
package), as TRL's commands do; ``--help`` explains them. A command is loaded when it is called. How a call ends, and
with which exit code, is in docs/command_line.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from attention_rl_trainer._version import __version__
from attention_rl_trainer.commands import load_command
from attention_rl_trainer.commands.plain import PlainParser

COMMANDS = {
    "train": "train an adapter on articles, a game, or rows of your own",
    "evaluate": "what an adapter's orders and queries are worth",
    "order": "in which order to read texts of your own, by an adapter",
    "report": "a run as a page to look at",
    "calibrate": "which attention heads find what a query names",
    "headroom": "what an order of reading could be worth on some data",
    "plan": "what a run will need: memory, time, cost",
    "selftest": "train on a task whose best policy is known",
    "env": "versions, devices and data, to report a bug with",
}
"""What each command does, by its name, which is also that of its module."""

DONE, FAILED, MISTAKEN, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
"""Exit codes; the last two are those of a shell for Ctrl-C and for an output that nobody reads any more."""

# The Trainer has an option of the name, which takes one of these.
_TRAINERS_DEBUG = ("underflow_overflow", "tpu_metrics_debug")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line; by default the process's own.

    Returns:
        The exit code.
    """
    given, debug = _without_debug(sys.argv[1:] if arguments is None else arguments)
    # What stands before the command is for all of them; what follows is the command's own.
    place = next((number for number, text in enumerate(given) if not text.startswith("-")), len(given))
    parser = _parser()
    try:
        if given[place:] and given[place] not in COMMANDS:
            raise ValueError(f"there is no command {given[place]!r}; the commands are {', '.join(COMMANDS)}")
        command = parser.parse_args(given[: place + 1]).command
    except ValueError as error:
        print(f"attention-rl: {error}", file=sys.stderr)
        return MISTAKEN
    if command is None:
        parser.print_help()
        return MISTAKEN
    with _plain_output():
        return _run(command, given[place + 1 :], debug=debug)


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="attention-rl",
        description="Train a language model to choose what to read next, and use what it learned.",
        epilog="attention-rl COMMAND --help explains a command's options.",
        usage="attention-rl [--debug] COMMAND [OPTIONS]",
    )
    parser.add_argument(
        "--version", action="version", version=f"attention-rl-trainer {__version__}", help="show the version"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND [OPTIONS]")
    for name, meaning in COMMANDS.items():
        commands.add_parser(name, help=meaning, add_help=False)
    return parser


def _without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    following = [*arguments[1:], ""]
    is_ours = [
        text == "--debug" and value not in _TRAINERS_DEBUG for text, value in zip(arguments, following, strict=False)
    ]
    return [text for text, ours in zip(arguments, is_ours, strict=True) if not ours], any(is_ours)


def _run(command: str, flags: Sequence[str], *, debug: bool) -> int:
    """Run a command; a mistake or a failure that explains itself becomes one line and an exit code."""
    try:
        code = load_command(command)(flags)
        sys.stdout.flush()
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"\nattention-rl {command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has ended, as `head` does; without this Python would complain at its own end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except Exception as error:
        ended = None if debug else _exit_code(error)
        if ended is None:
            raise
        print(f"attention-rl {command}: {_in_one_line(error)}", file=sys.stderr)
        return ended
    return code


def _exit_code(error: Exception) -> int | None:
    """Tell a user's mistake from a failure of the run; ``None`` for what is neither, and shown with its traceback."""
    from attention_rl_trainer.durability.guard import RunLockedError
    from attention_rl_trainer.durability.pushes import HubPushError
    from attention_rl_trainer.durability.staging import StagingError
    from attention_rl_trainer.errors import BaseModelError, NonFiniteError
    from attention_rl_trainer.processes import LostProcessError

    if isinstance(error, NonFiniteError | StagingError | HubPushError | LostProcessError | MemoryError):
        return FAILED
    if isinstance(error, ImportError) and str(error.name).startswith("attention_rl_trainer"):
        return None
    if isinstance(error, ValueError | OSError | ImportError | BaseModelError | RunLockedError):
        return MISTAKEN
    # That of a device is a plain RuntimeError in older versions of torch.
    return FAILED if isinstance(error, RuntimeError) and "out of memory" in str(error) else None


def _in_one_line(error: Exception) -> str:
    notes: list[str] = getattr(error, "__notes__", [])
    lines = [line.strip() for text in (str(error), *notes) for line in text.splitlines()]
    text = " ".join(line for line in lines if line) or type(error).__name__
    return text if _is_raised_here(error) else f"{text} ({type(error).__name__}; --debug shows where)"


def _is_raised_here(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] == "attention_rl_trainer"


@contextmanager
def _plain_output() -> Iterator[None]:
    """Print what the package says by its logger, and keep the bars of libraries out of what is no terminal."""
    if not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    # It is imported with peft, whatever is computed, and misses a package that only 4-bit weights on a CPU would use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_of_kernels)
    # Upstream: peft asks transformers for a name that is being renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    handler = _AboveBars(sys.stderr)
    logger = logging.getLogger("attention_rl_trainer")
    level = logger.level
    logger.addHandler(handler)
    # What all processes of a run would say is said once, by the first, as launchers number them.
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _AboveBars(logging.StreamHandler):  # type: ignore[type-arg]  # generic to the checker alone
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def _is_not_of_kernels(record: logging.LogRecord) -> bool:
    return "kernels" not in record.getMessage()
