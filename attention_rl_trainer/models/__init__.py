"""From the name of a base model to the two readers of a rollout: the policy and its reference (design §4 to §6).

`choice` picks a base model, `base` and `embedded` load it, `adapters` puts LoRA on it. `attention` finds its heads,
`policy` decodes and scores with it, and `readers` lets policy and reference read one context.
"""

from attention_rl_trainer.models.adapters import add_adapter
from attention_rl_trainer.models.base import load_base_model
from attention_rl_trainer.models.choice import load_named_model, with_tokenizer
from attention_rl_trainer.models.policy import PolicyModel

__all__ = ["PolicyModel", "add_adapter", "load_base_model", "load_named_model", "with_tokenizer"]
