"""The first third of a series against the last: intervals by hand, and how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attention_rl_trainer.records.thirds import Change, Mean, compare_thirds


class TestThirds:
    def test_by_hand(self) -> None:
        change = compare_thirds([1.0, 2.0, 3.0, 4.0, 99.0, 99.0, 99.0, 99.0, 99.0, 6.0, 7.0, 8.0, 9.0])
        assert change is not None
        assert change.first.value == 2.5
        assert change.last.value == 7.5
        assert change.difference == 5.0
        # Both thirds have a sample variance of 5/3, so each mean has sqrt(5/3/4), and t has 6 degrees of freedom.
        assert change.standard_error == pytest.approx(math.sqrt(2 * 5 / 12))
        assert change.half_width == pytest.approx(2.44691 * change.standard_error, rel=1e-5)
        assert change.direction == 1

    @pytest.mark.parametrize(("degrees", "quantile"), [(3, 3.1824), (6, 2.4469), (30, 2.0423), (1e6, 1.95996)])
    def test_interval_is_students(self, degrees: float, quantile: float) -> None:
        mean = Mean(0.0, 1.0, int(degrees) + 1)
        assert mean.half_width == pytest.approx(quantile, rel=1e-4)
        assert Change(mean, Mean(0.0, 0.0, 5), degrees).half_width == pytest.approx(quantile, rel=1e-4)

    def test_degrees_of_freedom_are_welchs(self) -> None:
        first, last = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 4.0, 8.0]
        # Squared standard errors of 2.5/5 and 16/3.
        a, b = 0.5, 16 / 3
        assert Change.between(first, last).degrees == pytest.approx((a + b) ** 2 / (a**2 / 4 + b**2 / 2))

    def test_with_all_the_uncertainty_in_one_mean_its_degrees_are_those_of_the_difference(self) -> None:
        assert Change.between([1.0, 2.0, 4.0, 7.0], [0.1] * 7).degrees == pytest.approx(3)
        assert Change.between([0.1] * 7, [1.0, 2.0, 4.0, 7.0]).degrees == pytest.approx(3)

    def test_too_few_values_are_not_compared(self) -> None:
        assert compare_thirds([0.0] * 11) is None
        assert compare_thirds([0.0] * 12) is not None

    def test_direction_is_zero_within_the_interval_and_signed_outside(self) -> None:
        noise = [0.01, -0.01, 0.02, -0.02]
        assert [
            Change.between(noise, [value + shift for value in noise]).direction
            for shift in (-1.0, -0.001, 0.0, 0.001, 1.0)
        ] == [-1, 0, 0, 0, 1]

    def test_constant_values_need_no_interval(self) -> None:
        assert Change.between([1.0, 1.0], [1.0, 1.0]).direction == 0
        assert Change.between([1.0, 1.0], [2.0, 2.0]).direction == 1
        assert Change.between([0.1] * 7, [0.3] * 7).direction == 1

    def test_false_alarms_are_one_in_twenty(self) -> None:
        generator = np.random.default_rng(1)
        alarms = [compare_thirds(generator.normal(size=18).tolist()) for _ in range(2000)]
        rate = np.mean([change is not None and change.direction != 0 for change in alarms])
        assert 0.035 < rate < 0.065
