"""``attention-rl selftest``: train on a task whose best policy is known, and say how close training gets."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attention_rl_trainer.commands.parsing import CommandParser
from attention_rl_trainer.selftest.verdict import judge


@dataclass
class SelfTestArguments:
    """How often, and what beside the shipped settings."""

    _argument_group_name = "how often, and what beside the shipped settings"

    seeds: int = field(default=5, metadata={"help": "Seeds 0, 1, ..., one run each."})
    ablate: bool = field(
        default=False, metadata={"help": "Also run with one option changed at a time, and say what each is worth."}
    )
    calibrated: bool = field(default=False, metadata={"help": "Fit the selector before training, as the recipes do."})
    output_dir: str | None = field(default=None, metadata={"help": "Where runs write. Default: a temporary folder."})


def parser() -> CommandParser:
    """Make the parser of the command line."""
    purpose = "Train on a task whose best policy is known, and say how much of the gap to it training closes."
    return CommandParser("selftest", purpose, (SelfTestArguments,))


def main(flags: Sequence[str]) -> int:
    """Run the self-test; the exit code is 1 where it does not pass."""
    (parsed,) = parser().parse(flags)
    how = {"ablate": parsed.ablate, "calibrated": parsed.calibrated}
    if parsed.output_dir is not None:
        return 0 if judge(parsed.seeds, Path(parsed.output_dir), **how) else 1
    with tempfile.TemporaryDirectory() as folder:
        return 0 if judge(parsed.seeds, Path(folder), **how) else 1
