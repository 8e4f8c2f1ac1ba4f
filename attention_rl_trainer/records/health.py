"""The logged numbers of a run's steps into warnings: what goes wrong without an error.

Each kind of warning has a paragraph in `docs/health.md` that says what it means and what to change. A warning is given
when its condition begins to hold, and again only after it has ceased in between.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from attention_rl_trainer.rollout.layout import LayoutOptions
from attention_rl_trainer.update.filter import FilterOptions
from attention_rl_trainer.update.losses import LossOptions


class Ailment(StrEnum):
    """Kinds of warnings; each is a heading of `docs/health.md`."""

    SELECTOR_UNIFORM = "selector-uniform"
    SELECTOR_COLLAPSED = "selector-collapsed"
    SELECTOR_DEAF = "selector-deaf"
    QUERIES_CERTAIN = "queries-certain"
    QUERIES_REPEAT = "queries-repeat"
    QUERIES_SAME = "queries-same"
    KEPT_TOO_MANY = "kept-too-many"
    KEPT_TOO_FEW = "kept-too-few"
    KL_ZERO = "kl-zero"
    QUERIES_LOSE = "queries-lose"
    READER_DRIFTS = "reader-drifts"


@dataclass(frozen=True)
class HealthWarning:
    """One warning."""

    ailment: Ailment
    message: str
    """What was seen, and what to try."""

    def __str__(self) -> str:
        """Format with its kind, under which the documentation explains it."""
        return f"[{self.ailment}] {self.message}"


@dataclass(frozen=True)
class HealthLimits:
    """What is out of the ordinary."""

    max_selector_entropy: float
    """Entropy of a uniform selector, nats, mean over the steps."""
    expected_kept: float | None
    """Share of the trajectories that the filter keeps of a steady normal distribution; ``None`` where all are kept."""
    has_kl: bool
    """Whether the loss has a KL to the adapter before the last update."""
    window: int = 20
    """Steps that are looked at together; as many before them are compared with them."""
    num_steps: int = 1
    """T, the queries of a trajectory."""

    @classmethod
    def of(cls, layout: LayoutOptions, verdicts: FilterOptions, loss: LossOptions) -> HealthLimits:
        """Derive from the options what is out of the ordinary."""
        return cls(
            max_selector_entropy=max_selector_entropy(layout.memory_size, layout.steps_per_trajectory),
            expected_kept=expected_kept_fraction(verdicts.filter_threshold),
            has_kl=loss.beta > 0 and loss.kl_reference == "previous",
            num_steps=layout.steps_per_trajectory,
        )

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window must be at least 2, got {self.window}")


def max_selector_entropy(num_pairs: int, num_steps: int) -> float:
    """Compute the entropy of a uniform selector: the mean over T steps of log(pairs left of M)."""
    return sum(math.log(num_pairs - step) for step in range(num_steps)) / num_steps


def expected_kept_fraction(filter_threshold: float | None) -> float | None:
    """Compute the share of a normal distribution above mean + ``filter_threshold`` · SD.

    ``None`` where every trajectory is kept: for ``None`` and -inf.
    """
    if filter_threshold is None or math.isinf(filter_threshold):
        return None
    return 1 - statistics.NormalDist().cdf(filter_threshold)


_CALIBRATE = (
    "calibrate it (attention_heads='probe', head_similarity='cosine', head_aggregation='scores', center_vectors=True, "
    "selection_temperature='auto')"
)
_WATCHED = frozenset(
    {
        *("reward", "query_gain", "model_gain", "history_mean", "kept_fraction", "kl"),
        *("query_entropy", "query_repetition", "query_diversity", "distinct_queries"),
        *("selector_entropy", "selection_information"),
    }
)


class HealthMonitor:
    """Looks at the metrics of the last steps."""

    def __init__(self, limits: HealthLimits) -> None:
        self._limits = limits
        self._values: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=2 * limits.window))
        self._present: set[Ailment] = set()
        self._checks: dict[Ailment, Callable[[], str | None]] = {
            Ailment.SELECTOR_UNIFORM: self._selector_uniform,
            Ailment.SELECTOR_COLLAPSED: self._selector_collapsed,
            Ailment.SELECTOR_DEAF: self._selector_deaf,
            Ailment.QUERIES_CERTAIN: self._queries_certain,
            Ailment.QUERIES_REPEAT: self._queries_repeat,
            Ailment.QUERIES_SAME: self._queries_same,
            Ailment.KEPT_TOO_MANY: self._kept_too_many,
            Ailment.KEPT_TOO_FEW: self._kept_too_few,
            Ailment.KL_ZERO: self._kl_zero,
            Ailment.QUERIES_LOSE: self._queries_lose,
            Ailment.READER_DRIFTS: self._reader_drifts,
        }

    def observe(self, metrics: Mapping[str, float]) -> list[HealthWarning]:
        """Take in what a step logged, and return the warnings whose condition began to hold with it."""
        for name in _WATCHED & metrics.keys():
            self._values[name].append(metrics[name])
        found = {ailment: check() for ailment, check in self._checks.items()}
        begun = [
            HealthWarning(ailment, message)
            for ailment, message in found.items()
            if message is not None and ailment not in self._present
        ]
        self._present = {ailment for ailment, message in found.items() if message is not None}
        return begun

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as a JSON-able mapping."""
        return {
            "values": {name: list(self._values[name]) for name in sorted(self._values)},
            "present": sorted(ailment.value for ailment in self._present),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned; an empty mapping is a monitor that has seen nothing."""
        self._values.clear()
        for name, values in state.get("values", {}).items():
            self._values[name].extend(values)
        self._present = {Ailment(name) for name in state.get("present", ())}

    def _recent(self, name: str) -> list[float] | None:
        """The last values of a metric, if there are enough."""
        values = list(self._values[name])
        return values[-self._limits.window :] if len(values) >= self._limits.window else None

    def _change(self, name: str) -> tuple[float, float] | None:
        """How much a metric's mean changed from the window before to the last one, and the standard error of that."""
        values, window = list(self._values[name]), self._limits.window
        if len(values) < 2 * window:
            return None
        before, after = values[:window], values[window:]
        error = math.sqrt((statistics.variance(before) + statistics.variance(after)) / window)
        return statistics.fmean(after) - statistics.fmean(before), error

    def _mean(self, name: str) -> float | None:
        recent = self._recent(name)
        return None if recent is None else statistics.fmean(recent)

    def _selector_uniform(self) -> str | None:
        entropy, limit = self._mean("selector_entropy"), self._limits.max_selector_entropy
        if entropy is None or limit == 0 or entropy < 0.97 * limit:
            return None
        return (
            f"the selector draws almost uniformly (entropy {entropy:.3f} of {limit:.3f} nats), so what the model asks "
            f"hardly changes what it reads; {_CALIBRATE}, or lower selection_temperature or choose another "
            "attention_layer"
        )

    def _selector_collapsed(self) -> str | None:
        entropy, limit = self._mean("selector_entropy"), self._limits.max_selector_entropy
        if entropy is None or limit == 0 or entropy > 0.02 * limit:
            return None
        return (
            f"the selector is certain of every draw (entropy {entropy:.4f} of {limit:.3f} nats): only another query "
            "draws another pair; raise selection_temperature if the orders read no longer differ"
        )

    def _selector_deaf(self) -> str | None:
        entropy, heard = self._mean("selector_entropy"), self._mean("selection_information")
        asked, limit = self._mean("query_diversity"), self._limits.max_selector_entropy
        if entropy is None or heard is None or asked is None:
            return None
        # Nothing more can be heard than how sharp the draws are, nor than how much the queries differ.
        sharpness = limit - entropy
        if sharpness < max(0.3, 0.1 * limit) or heard >= min(sharpness, asked) / 2:
            return None
        return (
            f"the selector is sharp but hardly hears the query: its draws are {sharpness:.2f} nats from uniform ones, "
            f"of which {heard:.2f} depend on what is asked; the rest are the same favourites after any query; "
            f"{_CALIBRATE}"
        )

    def _queries_certain(self) -> str | None:
        entropy = self._mean("query_entropy")
        if entropy is None or entropy > 0.1:
            return None
        return (
            f"query tokens are almost certain (entropy {entropy:.3f} nats), so there is nothing left to learn from "
            "sampling; lower learning_rate, or set entropy_coef or a larger beta"
        )

    def _queries_repeat(self) -> str | None:
        repetition = self._mean("query_repetition")
        if repetition is None or repetition < 0.6:
            return None
        return (
            f"{repetition:.0%} of the tokens of a query repeat earlier ones of it; lower learning_rate, raise beta, or "
            "use kl_reference='base'"
        )

    def _queries_same(self) -> str | None:
        distinct, num_steps = self._mean("distinct_queries"), self._limits.num_steps
        # A single query is always above.
        if distinct is None or distinct > num_steps / 2:
            return None
        return (
            f"the queries of a trajectory repeat one another: {distinct:.1f} of {num_steps} are different, and a query "
            "that is asked again can only draw the next favourite; set show_keys, so that a query can name what is "
            "unread, or entropy_coef, or lower learning_rate"
        )

    def _kept_too_many(self) -> str | None:
        kept, expected = self._mean("kept_fraction"), self._limits.expected_kept
        if kept is None or expected is None or kept < 2 * expected:
            return None
        message = f"{kept:.0%} of the trajectories are kept where about {expected:.0%} would be of a steady reward"
        reward, mean = self._mean("reward"), self._mean("history_mean")
        if reward is not None and mean is not None and reward > mean:
            message += (
                f": the threshold is stale, the history's mean is {mean:.3f} while rewards are about {reward:.3f}; "
                "mediocre trajectories are reinforced too"
            )
        return message + "; raise filter_threshold"

    def _kept_too_few(self) -> str | None:
        kept, expected = self._mean("kept_fraction"), self._limits.expected_kept
        if kept is None or expected is None or kept > expected / 5:
            return None
        return (
            f"{kept:.1%} of the trajectories are kept where about {expected:.0%} would be of a steady reward; rewards "
            "fell, or the first ones were exceptional. Lower filter_threshold or learning_rate"
        )

    def _kl_zero(self) -> str | None:
        # Only steps that updated have a KL; at the first of a run it is 0 by construction.
        values = list(self._values["kl"])[1:]
        if not self._limits.has_kl or len(values) < 3 or any(values[-3:]):
            return None
        return (
            "the KL to the previous adapter is exactly 0 at three updates after the first: the weights do not move. Is "
            "learning_rate too small, or the adapter frozen?"
        )

    def _queries_lose(self) -> str | None:
        changes = {name: self._change(name) for name in ("reward", "model_gain", "query_gain")}
        by, error = ({name: found[part] for name, found in changes.items() if found} for part in (0, 1))
        if len(by) < len(changes) or not all(by[name] > 3 * error[name] for name in ("reward", "model_gain")):
            return None
        if by["query_gain"] >= -3 * error["query_gain"]:
            return None
        return (
            f"reward and model gain rise ({by['reward']:+.3f} and {by['model_gain']:+.3f} nats per token) while the "
            f"query gain falls ({by['query_gain']:+.3f}): "
            "the reader improves and the queries get worse; lower reward_gradient_coef or use kl_reference='base'"
        )

    def _reader_drifts(self) -> str | None:
        change = self._change("model_gain")
        level = self._mean("model_gain")
        if change is None or level is None or not (change[0] < -3 * change[1] and level < 0):
            return None
        return (
            f"the adapted reader gets worse (model gain {level:+.3f} nats per token, {change[0]:+.3f} since the steps "
            "before): training queries wears it down; lower learning_rate, raise beta, or set reward_gradient_coef"
        )
