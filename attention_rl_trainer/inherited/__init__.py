"""Options that come from `transformers.TrainingArguments`: which of them act here, which are refused, which do nothing.

The Trainer's options were made for a loss over labelled batches. Here a step rolls out, judges and updates, so some of
them would do harm, some would be ignored, and a user would not learn of it. `table` has a verdict for each, `checks`
holds a run's options against it, `newer` has those that an older transformers lacks, `optimization` makes the optimizer
and the schedule once to see that they can be made.
"""

from attention_rl_trainer.inherited.checks import check_inherited_options, expect_plain_loaders
from attention_rl_trainer.inherited.newer import NewerOptions, mirror_newer_options, pass_on_newer_options
from attention_rl_trainer.inherited.optimization import expect_optimization
from attention_rl_trainer.inherited.table import VERDICTS, Verdict, must_stay, page

__all__ = [
    "VERDICTS",
    "NewerOptions",
    "Verdict",
    "check_inherited_options",
    "expect_optimization",
    "expect_plain_loaders",
    "mirror_newer_options",
    "must_stay",
    "page",
    "pass_on_newer_options",
]
