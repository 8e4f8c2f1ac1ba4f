"""Estimates with their intervals as pictures: a row per quantity, on an axis that they share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from attention_rl_trainer.pages.run import Figures, is_finite
from attention_rl_trainer.records.thirds import Change, Mean

_NATS = "nats per value token"
# As the evaluation's own tables say it.
_LABELS = {
    "names_its_pair": "query names its pair",
    "control_names_its_pair": "content control names it, by chance",
    "another key of the article": "another key of the article (form control)",
    "distinct_queries": "different queries of a trajectory",
    "selection_information": "selection information, nats per draw",
    "query_bound": "bound of the query gain: selection information / V",
    "chosen_ease": "how much easier the chosen values are than all",
}
_REWARDS = ("reward", "query_gain", "model_gain")
_SHARES = ("names_its_pair", "control_names_its_pair")
_OWN = {"policy", "learned"}


@dataclass(frozen=True)
class Mark:
    """An estimate."""

    mean: float
    low: float | None = None
    high: float | None = None
    """95% interval, where there is one."""
    kind: str = "a"
    """How it is drawn: ``a`` and ``b`` for two runs, ``early`` for what it is compared with."""
    label: str = ""
    """What distinguishes it in its row."""
    note: str = ""

    @property
    def text(self) -> str:
        """The estimate in figures."""
        if self.low is None or self.high is None:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def holds_zero(self) -> bool:
        """Whether it is not distinguishable from 0."""
        return self.low is not None and self.high is not None and self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Line:
    """A row of a picture."""

    label: str
    marks: tuple[Mark, ...]
    is_own: bool = False
    """Whether it is the policy's, among others that it is compared with."""


@dataclass(frozen=True)
class Picture:
    """Rows on one axis, which has 0 on it."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    about: str = ""
    is_drawn: bool = True
    """Whether it is drawn, or written alone, as where rows have units of their own."""

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Kinds of marks with what distinguishes them; empty where there is one kind."""
        kinds = {mark.kind: mark.label for line in self.lines for mark in line.marks if mark.label}
        return list(kinds.items()) if len(kinds) > 1 else []

    @property
    def axis(self) -> Axis:
        """The axis that all marks are on."""
        ends = [
            end
            for line in self.lines
            for mark in line.marks
            for end in (mark.mean, mark.low, mark.high)
            if end is not None
        ]
        return Axis.around([0.0, *ends])


@dataclass(frozen=True)
class Axis:
    """A range of numbers with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def around(cls, values: Iterable[float], num_ticks: int = 5) -> Axis:
        """Span finite values, with about so many ticks at multiples of 1, 2 or 5 times a power of ten."""
        listed = list(values)
        low, high = min(listed), max(listed)
        if high - low <= 0.0:
            low, high = low - 0.5, high + 0.5
        pad = 0.04 * (high - low)
        low, high = low - pad, high + pad
        raw = (high - low) / num_ticks
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
        first, last = math.ceil(low / step), math.floor(high / step)
        return cls(low, high, tuple(number * step for number in range(first, last + 1)))

    def place(self, value: float) -> float:
        """Return where a value is on the axis, percent from its left end."""
        return round(100.0 * (value - self.low) / (self.high - self.low), 3)

    def tick_text(self, tick: float) -> str:
        """Write a tick with as many digits as the distance to the next one needs."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        text = f"{tick:.{digits}f}"
        return text.removeprefix("-") if float(text) == 0.0 else text


def mark_of(mean: Mean, kind: str, label: str = "") -> Mark:
    """Draw a mean with its 95% interval."""
    return Mark(mean.value, mean.value - mean.half_width, mean.value + mean.half_width, kind, label)


def picture_of_thirds(changes: Mapping[str, Change]) -> Picture:
    """Draw the first third of the episodes beside the last third."""
    return Picture(
        "First third and last third",
        _NATS,
        tuple(
            Line(name, (mark_of(change.first, "early", "first third"), mark_of(change.last, "a", "last third")))
            for name, change in changes.items()
        ),
        "Means over all trajectories, kept or not, with 95% intervals; episodes taken as independent.",
    )


def picture_of_differences(changes: Mapping[str, Change], title: str, about: str) -> Picture:
    """Draw what changed between two sets of episodes, and say where it is not distinguishable from nothing."""
    lines = []
    for name, change in changes.items():
        low, high = change.difference - change.half_width, change.difference + change.half_width
        outcome = {1: "higher", 0: "not distinguishable from 0", -1: "lower"}[change.direction]
        lines.append(Line(name, (Mark(change.difference, low, high, note=outcome),)))
    return Picture(title, _NATS, tuple(lines), about)


def pictures_of_evaluation(evaluations: Sequence[Figures | None], names: Sequence[str]) -> list[Picture]:
    """Draw the tables of an evaluation; of two runs, side by side on the same axis.

    Args:
        evaluations: of each run the evaluation of one name, ``None`` where a run has none.
        names: of the runs.
    """
    drawn = [
        _picture(evaluations, names, "order_gains", "Orders, less the random one", _NATS, share="share_closed"),
        _picture(evaluations, names, "queries", "Queries: gain over what the base model samples", _NATS),
        _picture(evaluations, names, "policy_less", "The policy's query less another", _NATS, prefix="less "),
        _picture(evaluations, names, "parts", "Reward of the trajectories and its parts", _NATS, only=_REWARDS),
        _picture(evaluations, names, "parts", "What the queries say", "share of the steps", only=_SHARES),
        _picture(evaluations, names, "asked", "What the answers tell", "nats a trajectory", share="asked_share"),
    ]
    measured = {name for figures in evaluations if figures is not None for name in figures.get("parts", {})}
    rest = sorted(measured - {*_REWARDS, *_SHARES})
    drawn.append(replace(_picture(evaluations, names, "parts", "More figures", "", only=rest), is_drawn=False))
    return [picture for picture in drawn if picture.lines]


def _picture(
    evaluations: Sequence[Figures | None],
    names: Sequence[str],
    table: str,
    title: str,
    unit: str,
    *,
    only: Sequence[str] | None = None,
    share: str = "",
    prefix: str = "",
) -> Picture:
    marks: dict[str, list[Mark]] = {}
    size = ""
    for figures, kind, run in zip(evaluations, "ab", names, strict=False):
        if figures is None:
            continue
        shares = figures.get(share, {})
        for name, estimate in figures.get(table, {}).items():
            if only is not None and name not in only:
                continue
            mark = _mark(estimate, kind, run if len(names) > 1 else "", shares.get(name))
            if mark is not None:
                marks.setdefault(name, []).append(mark)
                size = size or _size(estimate)
    lines = [
        Line(prefix + _LABELS.get(name, name.replace("_", " ")), tuple(found), name in _OWN)
        for name, found in marks.items()
    ]
    if only is None:
        lines.sort(key=lambda line: -line.marks[0].mean)
    return Picture(title, unit, tuple(lines), size)


def _mark(estimate: object, kind: str, label: str, share: object) -> Mark | None:
    if not isinstance(estimate, dict) or not is_finite(estimate.get("mean")):
        return None
    low, high = (estimate[end] if is_finite(estimate.get(end)) else None for end in ("low", "high"))
    closed = share.get("mean") if isinstance(share, dict) else None
    note = f"{closed:.0%} of the gap" if isinstance(closed, float) and is_finite(closed) else ""
    return Mark(float(estimate["mean"]), low, high, kind, label, note)


def _size(estimate: object) -> str:
    if not isinstance(estimate, dict) or "num_values" not in estimate:
        return ""
    return f"{estimate['num_values']} memories of {estimate.get('num_clusters')} articles"
