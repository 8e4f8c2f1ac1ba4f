"""The gain in log-probability as an `evaluate.Metric`, with an interval over articles (design §11).

    metric = evaluate.load(attention_rl_trainer.evaluation.METRIC_PATH)
    metric.compute(predictions=after_query, references=after_baseline, articles=titles)

`evaluate` copies this file before it imports it and reads its imports line by line, so each is on a line of its own.
"""

from __future__ import annotations

import datasets
import evaluate

from attention_rl_trainer.evaluation.estimates import clustered_mean

_DESCRIPTION = "Mean gain in the log-probability of values, nats per token, with a 95% interval over articles."
_INPUTS = """
Args:
    predictions: log-probability of each trajectory's values after what is measured, nats per token.
    references: the same after the baseline.
    articles: the article of each trajectory.
Returns:
    gain: mean of predictions - references.
    low: lower end of its 95% interval, bootstrapped over articles; None for a single article.
    high: upper end.
"""


class ReadingGain(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """Mean gain of one log-probability over another, paired."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Value("float64"),
            "references": datasets.Value("float64"),
            "articles": datasets.Value("string"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: list[float], references: list[float], articles: list[str]
    ) -> dict[str, float | None]:
        gains = [ours - theirs for ours, theirs in zip(predictions, references, strict=True)]
        estimate = clustered_mean(gains, articles)
        return {"gain": estimate.mean, "low": estimate.low, "high": estimate.high}
