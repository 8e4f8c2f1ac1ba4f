"""Every option of a run, checked when it is made, in the order in which the pipeline uses them.

Extends `transformers.TrainingArguments`, so that the Trainer's own options (``report_to``, ``seed``,
``push_to_hub``, ...) work as everywhere.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from attention_rl_trainer.evaluation.evaluate import EvaluationOptions
from attention_rl_trainer.hub import without_credentials
from attention_rl_trainer.memories.loading import ReadingOptions
from attention_rl_trainer.models.policy import PolicyOptions
from attention_rl_trainer.options import Count, Positive, option
from attention_rl_trainer.records.recorder import RecordOptions
from attention_rl_trainer.rollout.environment import SelectionOptions
from attention_rl_trainer.rollout.sampler import RolloutOptions
from attention_rl_trainer.update.filter import FilterOptions
from attention_rl_trainer.update.updater import UpdateOptions

logger = logging.getLogger(__name__)

_SECRET = re.compile(r"token|password|secret|credential|api_?key", re.IGNORECASE)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return value


def _masked(value: Any) -> Any:
    """Mask what may be a secret: texts by the names of their options, and the credentials in addresses."""
    if isinstance(value, dict):
        return {
            name: f"<{name.upper()}>" if isinstance(item, str) and _SECRET.search(str(name)) else _masked(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


@dataclass
class AttentionGuidedRLConfig(
    RecordOptions,
    EvaluationOptions,
    UpdateOptions,
    FilterOptions,
    RolloutOptions,
    SelectionOptions,
    PolicyOptions,
    ReadingOptions,
    TrainingArguments,
):
    """Options of `AttentionGuidedRLTrainer`: those of every room, those of a run, and the Trainer's.

    The number of optimizer steps follows from ``num_episodes``, and the moments of saving from ``save_episodes``; the
    Trainer's ``max_steps``, ``num_train_epochs``, ``save_steps`` and ``per_device_train_batch_size`` are refused beside
    them. Each field's meaning is in its ``help``.

    Raises:
        ValueError: an option is out of range, or two contradict each other; names the option, its value and the range.
    """

    # Run
    num_episodes: Count = option(10000, "Trajectories in the whole run.", aliases=["--episodes"])
    save_episodes: Count = option(100, "Save a checkpoint at the first step that reaches a multiple of this.")
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for loading the base model when it is given by name, as JSON."
    )

    # Defaults that differ from the Trainer's
    learning_rate: Positive = option(2e-4, "Learning rate.")
    lr_scheduler_type: str = option("constant", "Learning rate schedule; held constant here.")
    optim: str = option("adamw_bnb_8bit", "Optimizer; 'adamw_torch' is taken where bitsandbytes is missing.")
    logging_steps: float = option(1, "Log every so many steps.")
    logging_nan_inf_filter: bool = option(
        False, "Must stay false: a non-finite loss is an error here, not a 0 in the log."
    )
    remove_unused_columns: bool = option(False, "Must stay false: columns are read by name.")
    ignore_data_skip: bool = option(True, "Must stay true: resuming seeks to the stored position instead of replaying.")
    save_strategy: SaveStrategy | str = option(
        "no", "Must stay 'no': save_episodes decides when a checkpoint is written."
    )

    def __post_init__(self) -> None:
        """Check every option and derive the Trainer's own."""
        self.check_options()
        self._refuse_derived_options()
        self._refuse_unsupported_options()
        self._resolve_optimizer()
        self._parse_model_init_kwargs()
        TrainingArguments.__post_init__(self)  # type: ignore[no-untyped-call]  # transformers does not annotate it

    @classmethod
    def for_model(cls, model: str | PreTrainedModel | PeftModel) -> Self:
        """Make the default options, with a folder named after the model."""
        name = model if isinstance(model, str) else model.config.name_or_path
        return cls(output_dir=f"{Path(name or 'model').name}-attention-rl")

    @property
    def train_batch_size(self) -> int:
        """Trajectories per rollout batch; what the Trainer calls the training batch."""
        return self.generation_batch_size

    @property
    def episodes_per_step(self) -> int:
        """Trajectories per Trainer step."""
        return self.generation_batch_size * self.gradient_accumulation_steps

    def save_json(self, path: Path) -> None:
        """Write the options as `to_jsonable` gives them."""
        path.write_text(json.dumps(self.to_jsonable(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def to_jsonable(self) -> dict[str, Any]:
        """Return the options, without what follows from them or says how a process was started.

        Secrets are masked and infinities are spelled.
        """
        options = self.to_dict()
        for name in ("max_steps", "resume_from_checkpoint"):
            del options[name]
        jsonable: dict[str, Any] = _jsonable(options)
        return jsonable

    def to_dict(self) -> dict[str, Any]:
        """Return the options as trackers are given them, with secrets masked at every depth."""
        options: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]  # not annotated there
        # The Trainer masks its own tokens, and counts tokens of other kinds.
        return {name: _masked(value) for name, value in options.items()}

    def __str__(self) -> str:
        """Show one option per line, with secrets masked."""
        lines = (f"{name}={value},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{''.join(lines)})"

    # The dataclass would make one that shows the Hub token, also for a subclass.
    __repr__ = __str__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass that is a dataclass show itself as this class does."""
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = AttentionGuidedRLConfig.__str__  # type: ignore[assignment, method-assign]

    def _refuse_derived_options(self) -> None:
        derived = {
            "max_steps": (-1, "num_episodes"),
            "num_train_epochs": (3.0, "num_episodes"),
            "save_steps": (500, "save_episodes"),
            "per_device_train_batch_size": (8, "generation_batch_size"),
        }
        for name, (default, instead) in derived.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but it follows from {instead} ({getattr(self, instead)}): a run "
                    f"is counted in episodes, not in optimizer steps. Set {instead} alone"
                )
        fixed = {"save_strategy": "no", "logging_nan_inf_filter": False, "remove_unused_columns": False}
        for name, value in {**fixed, "ignore_data_skip": True}.items():
            if getattr(self, name) != value:
                reason = self.__dataclass_fields__[name].metadata["help"]
                raise ValueError(f"{name} must stay {value!r}, got {getattr(self, name)!r}: {reason}")

    def _refuse_unsupported_options(self) -> None:
        own_precision = (
            "the rollout and the update must compute alike, so precision is that of the weights; "
            "set model_init_kwargs={'dtype': 'bfloat16'} instead"
        )
        unsupported = {
            "bf16": own_precision,
            "fp16": own_precision,
            "bf16_full_eval": own_precision,
            "fp16_full_eval": own_precision,
            "auto_find_batch_size": "a retried step would count its episodes twice; lower generation_batch_size",
            "enable_jit_checkpoint": "SIGTERM writes a checkpoint anyway",
            "load_best_model_at_end": "a checkpoint is written by save_episodes, not at evaluations",
            "torch_compile": "the cache's growing length makes it compile again and again, for no gain where it was "
            "measured (docs/benchmarks.md)",
        }
        for name, reason in unsupported.items():
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: {reason}")
        if self.metric_for_best_model is not None and self.save_total_limit is not None:
            raise ValueError(
                f"save_total_limit is {self.save_total_limit} beside metric_for_best_model, but checkpoints are "
                "written by save_episodes, not at the best evaluation, and removed by age; leave save_total_limit out"
            )
        if self.dataloader_num_workers not in (0, 1):
            raise ValueError(
                f"dataloader_num_workers must be 0 or 1, got {self.dataloader_num_workers}: the articles are one "
                "stream in a fixed order"
            )

    def _resolve_optimizer(self) -> None:
        if ("bnb" in self.optim or "8bit" in self.optim) and importlib.util.find_spec("bitsandbytes") is None:
            logger.warning(
                "optim=%s needs bitsandbytes, which is not installed; adamw_torch is used instead. "
                "Install it with: pip install bitsandbytes",
                self.optim,
            )
            self.optim = "adamw_torch"

    def _parse_model_init_kwargs(self) -> None:
        """Read the JSON of the command line."""
        if not isinstance(self.model_init_kwargs, str):
            return
        try:
            parsed = json.loads(self.model_init_kwargs)
        except json.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            raise ValueError(
                'model_init_kwargs must be a JSON object such as \'{"attn_implementation": "eager"}\', '
                f"got {self.model_init_kwargs!r}"
            )
        self.model_init_kwargs = parsed
