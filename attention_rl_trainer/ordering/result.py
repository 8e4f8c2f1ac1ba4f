"""An order of reading: which piece comes when, what was asked before it, and what that was worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from attention_rl_trainer.ordering.trust import OrderTrust

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class ReadingStep:
    """One step; log-probabilities are of the piece's value, nats per token (docs/method.md)."""

    index: int
    """The piece's number among those that were given, from 0."""
    query: str
    """What the policy wrote before it chose."""
    probability: float
    """With which the selector chooses the piece after that query."""
    probabilities: tuple[float, ...]
    """Of all pieces that were given; 0 for those read before."""
    value_logprob: float
    """By the adapted model, in its context."""
    query_gain: float
    """What the query brought to the base model, over one of its own."""
    model_gain: float
    """What the adapter brought, after the same query."""
    order_gain: float
    """What the pieces read before brought to the base model; 0 at the first step."""


@dataclass(frozen=True)
class ReadingOrder:
    """The order of one memory."""

    steps: Sequence[ReadingStep]
    pieces: Sequence[str]
    """As they were given, or as a text was cut."""
    context: str
    """What was read before; of a text that was given without one, its piece 0, which is in no step."""
    is_greedy: bool
    trust: OrderTrust

    @property
    def order(self) -> list[int]:
        """The numbers of the pieces in the order of reading."""
        return [step.index for step in self.steps]

    @property
    def queries(self) -> list[str]:
        """What was asked at each step."""
        return [step.query for step in self.steps]

    @property
    def texts(self) -> list[str]:
        """The pieces in the order of reading."""
        return [self.pieces[step.index] for step in self.steps]

    @property
    def order_gain(self) -> float:
        """Mean over the steps of what the pieces read before brought, nats per token."""
        return sum(step.order_gain for step in self.steps) / len(self.steps)

    def to_dict(self, labels: Sequence[str] | None = None) -> dict[str, Any]:
        """Return it as a JSON object.

        Args:
            labels: a name for each piece that was given, such as that of its file, to be in its step.
        """
        steps: list[dict[str, Any]] = []
        for step in self.steps:
            label = {} if labels is None else {"label": labels[step.index]}
            steps.append({**asdict(step), "text": self.pieces[step.index], **label})
        return {
            "order": self.order,
            "order_gain": self.order_gain,
            "steps": steps,
            "context": self.context,
            "is_greedy": self.is_greedy,
            "trust": self.trust.to_dict(),
        }

    def to_json(self, labels: Sequence[str] | None = None) -> str:
        """Return `to_dict` as text."""
        return json.dumps(self.to_dict(labels), indent=2, ensure_ascii=False, allow_nan=False)

    def to_table(self, labels: Sequence[str] | None = None) -> Table:
        """Make a table of the steps, to print with rich.

        Args:
            labels: as in `to_dict`; by default the pieces' numbers.
        """
        names = labels or [str(number) for number in range(len(self.pieces))]
        table = Table(title="Order of reading", title_justify="left")
        table.add_column("", justify="right")
        for name in ("piece", "text", "query before it"):
            table.add_column(name, overflow="fold")
        for name in ("probability", "order gain", "query gain"):
            table.add_column(name, justify="right")
        for rank, step in enumerate(self.steps, 1):
            # Text, because what is read may hold brackets, which a plain string would give as markup.
            shown = (names[step.index], _short(self.pieces[step.index]), _short(step.query))
            figures = (f"{step.probability:.2f}", f"{step.order_gain:+.3f}", f"{step.query_gain:+.3f}")
            table.add_row(str(rank), *map(Text, shown), *figures)
        return table


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 1]}…"
