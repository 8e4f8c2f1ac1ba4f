"""The first third of a series against its last third: means, difference, and the 95% intervals around them.

scipy is imported where it is used: it takes longer to load than a ledger takes to be read.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

MIN_EPISODES_PER_THIRD = 4
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Mean:
    """A sample mean with its standard error."""

    value: float
    standard_error: float
    """Sample standard deviation (ddof 1) over the square root of `count`."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Take the mean of at least two values."""
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))

    @property
    def half_width(self) -> float:
        """Half the width of the 95% interval around the mean (Student's t)."""
        return self.standard_error * _student_quantile(self.count - 1)

    def __str__(self) -> str:
        """Show the mean with its sign and its standard error."""
        return f"{self.value:+.4f} ± {self.standard_error:.4f}"


@dataclass(frozen=True, slots=True)
class Change:
    """The first third of a run's episodes against the last third."""

    first: Mean
    last: Mean
    degrees: float
    """Welch's degrees of freedom of the difference."""

    @classmethod
    def between(cls, first: Sequence[float], last: Sequence[float]) -> Self:
        """Compare two series of at least two independent values each."""
        from scipy import stats

        with warnings.catch_warnings():
            # scipy warns of a series whose values are all the same.
            warnings.simplefilter("ignore", RuntimeWarning)
            welch = stats.ttest_ind(first, last, equal_var=False)
        return cls(Mean.of(first), Mean.of(last), float(welch.df))

    @property
    def difference(self) -> float:
        """Last minus first."""
        return self.last.value - self.first.value

    @property
    def standard_error(self) -> float:
        """Standard error of the difference of two independent means."""
        return math.hypot(self.first.standard_error, self.last.standard_error)

    @property
    def half_width(self) -> float:
        """Half the width of the 95% interval around the difference (Welch's t)."""
        return self.standard_error * _student_quantile(self.degrees)

    @property
    def direction(self) -> int:
        """+1 or -1 where the 95% interval of the difference excludes 0, else 0."""
        if abs(self.difference) <= self.half_width:
            return 0
        return 1 if self.difference > 0.0 else -1


def _student_quantile(degrees: float) -> float:
    """Two-sided 95% quantile of Student's t."""
    from scipy import stats

    return float(stats.t.ppf(0.5 + _CONFIDENCE / 2.0, degrees))


def compare_thirds(values: Sequence[float]) -> Change | None:
    """Compare the first third of a series with its last third.

    Args:
        values: one value per episode, in episode order; taken as independent draws.

    Returns:
        The comparison, or None where a third would hold fewer than four values.
    """
    third = len(values) // 3
    if third < MIN_EPISODES_PER_THIRD:
        return None
    return Change.between(values[:third], values[-third:])
