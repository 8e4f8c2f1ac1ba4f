"""From the name of a base model to the two readers of a rollout: the policy and its reference (design §4 to §6).

`given` checks what a user gives as an object. `choice` picks a base model, `base` and `embedded` load it, `adapters`
puts LoRA on it. `attention` finds its heads, `policy` decodes and scores with it, and `readers` lets policy and
reference read one context.
"""

from attention_rl_trainer.models.adapters import add_adapter, left_bare_on_failure
from attention_rl_trainer.models.base import load_base_model
from attention_rl_trainer.models.choice import load_named_model, with_tokenizer
from attention_rl_trainer.models.given import take_model
from attention_rl_trainer.models.policy import PolicyModel

__all__ = [
    "PolicyModel",
    "add_adapter",
    "left_bare_on_failure",
    "load_base_model",
    "load_named_model",
    "take_model",
    "with_tokenizer",
]
