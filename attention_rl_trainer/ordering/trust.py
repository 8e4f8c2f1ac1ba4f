"""How much an adapter's orders are to be trusted: what was measured of them on memories that it was not trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from attention_rl_trainer.evaluation.estimates import Estimate
from attention_rl_trainer.evaluation.orders import BEST, ORACLE, RANDOM, WORST
from attention_rl_trainer.evaluation.tables import LEARNED
from attention_rl_trainer.pages.run import EVALUATION_NAME, EVALUATIONS
from attention_rl_trainer.publishing.published import FIGURES_NAME
from attention_rl_trainer.rollout.calibration import Calibration

logger = logging.getLogger(__name__)

# Of a run that was pushed there are the former alone; of others the latter are newer.
_FIGURES = (FIGURES_NAME, EVALUATION_NAME)
# Orders that nobody can choose without having read all, or that are not fixed.
_NO_RULES = (LEARNED, ORACLE, BEST, WORST, RANDOM, "untrained attention")


@dataclass(frozen=True)
class OrderTrust:
    """What an adapter's folder says of its orders."""

    order_gains: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """By the name of the evaluation and the rule, ``"learned"`` among them: log-probability of the values in the rule's
    order less that in random ones, nats per token."""
    calibration: Mapping[str, float] = field(default_factory=dict)
    """Figures of the selector's calibration, such as ``p_right``: how often half of a key draws its pair."""

    @classmethod
    def read(cls, folder: Path, calibration: Calibration | None) -> OrderTrust:
        """Read the evaluations in an adapter's folder; one that cannot be read is named in the log."""
        gains = {}
        by_place = {path.parent: path for name in _FIGURES for path in folder.glob(f"{EVALUATIONS}/*/{name}")}
        for _, path in sorted(by_place.items()):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))["order_gains"]
                estimates = {rule: Estimate(**gain) for rule, gain in found.items()}
                if LEARNED in estimates:
                    gains[unquote(path.parent.name)] = estimates
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("%s is not an evaluation that can be read, and is left out: %s", path, error)
        return cls(gains, {} if calibration is None else dict(calibration.figures))

    def describe(self) -> str:
        """Say it in a few sentences."""
        sentences = [_sentence(name, gains) for name, gains in self.order_gains.items()] or [
            "How good these orders are was not measured; `attention-rl evaluate` on the adapter's folder does."
        ]
        if "p_right" in self.calibration:
            sentences.append(f"Half of a key drew its pair {self.calibration['p_right']:.2f} of the time.")
        return " ".join(sentences)

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        gains = {
            name: {rule: asdict(gain) for rule, gain in by_rule.items()} for name, by_rule in self.order_gains.items()
        }
        return {"order_gains": gains, "calibration": dict(self.calibration), "summary": self.describe()}


def _sentence(name: str, gains: Mapping[str, Estimate]) -> str:
    gain = gains[LEARNED]
    of = f"Evaluation {name!r}, {gain.num_values} held-out memories of {gain.num_clusters} articles"
    verdict = ""
    if gain.low is None or gain.high is None:
        verdict = ", from a single article"
    elif gain.low <= 0 <= gain.high:
        verdict = ", which cannot be told from 0"
    text = f"{of}: learned orders, drawn as in training, less random ones {gain} nats per token{verdict}"
    rules = {rule: other for rule, other in gains.items() if rule not in _NO_RULES}
    if rules:
        best = max(rules, key=lambda rule: rules[rule].mean)
        text += f"; the best fixed rule there ({best}) {rules[best]}"
    return f"{text}."
