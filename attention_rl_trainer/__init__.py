"""Attention-guided reinforcement learning: a language model learns the order of its own reading.

The public names are loaded when they are first used, so importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from attention_rl_trainer._version import __version__

if TYPE_CHECKING:
    from attention_rl_trainer.config import AttentionGuidedRLConfig as AttentionGuidedRLConfig
