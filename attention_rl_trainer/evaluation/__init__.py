"""A policy on held-out memories: rewards, and what its orders and its queries are worth (design §7, §11).

`evaluate` rolls trajectories out and summarizes them as training does. `orders` and `queries` measure each against
baselines, `estimates` puts intervals around means, and `tables` joins them. `reading_gain` is an `evaluate.Metric`.
`headroom` measures data before training: what an order could be worth.
"""

from pathlib import Path

from attention_rl_trainer.evaluation.estimates import Estimate
from attention_rl_trainer.evaluation.evaluate import evaluate_policy
from attention_rl_trainer.evaluation.tables import EvaluationTables, TableBuilder, folder_name

METRIC_PATH = str(Path(__file__).with_name("reading_gain.py"))
"""What `evaluate.load` takes."""

__all__ = ["METRIC_PATH", "Estimate", "EvaluationTables", "TableBuilder", "evaluate_policy", "folder_name"]
