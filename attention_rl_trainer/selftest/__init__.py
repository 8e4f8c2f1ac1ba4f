"""Proof that training does what it says, on a task whose best and random policies are known (design §11).

`language` is what a tiny base model is taught (`teaching`), `gap` knows how good its queries can get, `task` lets the
shipped trainer train on it, and `verdict` judges several seeds.
"""

from attention_rl_trainer.selftest.task import SelfTestResult, run_seed
from attention_rl_trainer.selftest.verdict import judge

__all__ = ["SelfTestResult", "judge", "run_seed"]
