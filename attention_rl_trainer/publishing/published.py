"""Which files of a run's folder are for others: what is not named here is not pushed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from attention_rl_trainer.options import Options, option
from attention_rl_trainer.pages.run import EVALUATIONS, OPTIONS_NAME
from attention_rl_trainer.records.ledger import LEDGER_NAME
from attention_rl_trainer.records.summary import REPORT_FOLDER
from attention_rl_trainer.rollout.calibration import CALIBRATION_NAME

CARD_NAME: Final = "README.md"
PICTURE_NAME: Final = "learning_curve.png"
FIGURES_NAME: Final = "figures.json"
"""What an evaluation measured, without the texts of its examples."""

_PUBLISHED: Final = (
    CARD_NAME,
    PICTURE_NAME,
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    OPTIONS_NAME,
    CALIBRATION_NAME,
    # An orderer reads it to say how far it is to be trusted.
    f"{EVALUATIONS}/*/{FIGURES_NAME}",
    # What a fast tokenizer saves.
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
OUTPUTS: Final = (*(name for name in _PUBLISHED if "/" not in name), EVALUATIONS)
"""What is made of a run beside its ledger and its report."""
_RECORDS: Final = (LEDGER_NAME, f"{REPORT_FOLDER}/*")


@dataclass
class PublishingOptions(Options):
    """What a push to the Hub uploads beside the adapter and its card."""

    hub_upload_records: bool = option(
        False,
        f"Push the ledger ({LEDGER_NAME}) and the report too. They hold text of the articles, whose licence must allow "
        "that.",
    )


def published_files(options: PublishingOptions) -> tuple[str, ...]:
    """List the names and patterns of what is pushed of a run's folder."""
    return (*_PUBLISHED, *_RECORDS) if options.hub_upload_records else _PUBLISHED
