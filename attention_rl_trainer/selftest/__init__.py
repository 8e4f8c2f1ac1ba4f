"""Proof that training does what it says, on a task whose best and random policies are known (design §11).

`language` is what a tiny base model is taught (`teaching`), `gap` knows how good its queries can get, and `task` lets
the shipped trainer train on it.
"""

from attention_rl_trainer.selftest.task import SelfTestResult, run_seed

__all__ = ["SelfTestResult", "run_seed"]
