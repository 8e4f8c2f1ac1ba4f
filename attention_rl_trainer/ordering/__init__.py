"""From a trained adapter and new text to the order in which to read its pieces (design §4 to §6).

`adapter` reads what a run leaves beside its adapter, `trust` what of that says how good its orders are. `pieces` turns
passages, keys and values, or a text into memories, `orderer` rolls them out as in training, and `result` is what comes
out.
"""

from attention_rl_trainer.ordering.adapter import OrderSettings
from attention_rl_trainer.ordering.orderer import AttentionGuidedOrderer
from attention_rl_trainer.ordering.result import ReadingOrder, ReadingStep
from attention_rl_trainer.ordering.trust import OrderTrust

__all__ = ["AttentionGuidedOrderer", "OrderSettings", "OrderTrust", "ReadingOrder", "ReadingStep"]
