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
from dataclasses import dataclass, fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final, Self

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from attention_rl_trainer.evaluation.evaluate import EvaluationOptions
from attention_rl_trainer.hub import without_credentials
from attention_rl_trainer.inherited import (
    NewerOptions,
    check_inherited_options,
    expect_optimization,
    expect_plain_loaders,
    mirror_newer_options,
    must_stay,
    pass_on_newer_options,
)
from attention_rl_trainer.memories.loading import ReadingOptions
from attention_rl_trainer.memories.pairs import PairOptions
from attention_rl_trainer.models.policy import PolicyOptions
from attention_rl_trainer.options import Count, Groups, Options, Positive, documented, option, takes_names
from attention_rl_trainer.publishing.published import PublishingOptions
from attention_rl_trainer.records.recorder import RecordOptions
from attention_rl_trainer.rollout.environment import SelectionOptions
from attention_rl_trainer.rollout.layout import LayoutOptions
from attention_rl_trainer.rollout.reward import RewardOptions
from attention_rl_trainer.rollout.sampler import RolloutOptions
from attention_rl_trainer.update.filter import FilterOptions
from attention_rl_trainer.update.losses import LossOptions
from attention_rl_trainer.update.updater import UpdateOptions
from attention_rl_trainer.update.warm_start import WarmStartOptions

logger = logging.getLogger(__name__)


@dataclass
class RunOptions(Options):
    """How long a run is, and when it is saved."""

    num_episodes: Count = option(10000, "Trajectories in the whole run.", aliases=["--episodes"])
    save_episodes: Count = option(100, "Save a checkpoint at the first step that reaches a multiple of this.")
    num_processes: Count | None = option(
        None, "Refuse to run in another number of processes than this. Default: in as many as are launched."
    )
    num_threads: Count | None = option(
        None,
        "CPU threads of each process. Default: the cores divided by the processes on the machine, unless "
        "OMP_NUM_THREADS says otherwise.",
    )
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for loading the base model when it is given by name, as JSON."
    )


OPTION_GROUPS: Final[Groups] = {
    "data": (ReadingOptions,),
    "memory": (PairOptions,),
    "policy": (PolicyOptions,),
    "selector": (SelectionOptions,),
    "rollout": (RolloutOptions, LayoutOptions),
    "reward": (RewardOptions,),
    "filter": (FilterOptions,),
    "loss": (LossOptions,),
    "update": (UpdateOptions, WarmStartOptions),
    "evaluation": (EvaluationOptions,),
    "run": (RunOptions, RecordOptions, PublishingOptions),
}
"""The method's options by heading, in the order of the pipeline; what is in none of them is the Trainer's."""

NAMES_OF_TRL: Final = {"dataset_text_field": "dataset_text_column", "log_completions": "log_trajectories"}
"""Options of TRL's trainers that are here by another name."""

NOT_OPTIONS: Final = {
    "quantization_config": "the base model is loaded with it: load_in_4bit or load_in_8bit on the command line, "
    "model_init_kwargs={'quantization_config': ...} in Python",
    "reward_funcs": "a reward of your own is a function of a step, AttentionGuidedRLTrainer(reward_fn=...); see "
    "examples/own_reward.py",
    "temperature": "set query_temperature for the tokens of queries, selection_temperature for the choice of a pair",
    "max_completion_length": "a query has tokens_per_query tokens; set that",
    "num_generations": "a trajectory is judged by the history of all rewards, not in a group; generation_batch_size "
    "says how many are rolled out at once",
}
"""Options of TRL's trainers that are none here, and what to set instead."""

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


@takes_names(NAMES_OF_TRL, NOT_OPTIONS)
@documented(OPTION_GROUPS)
@dataclass
class AttentionGuidedRLConfig(
    RunOptions,
    RecordOptions,
    PublishingOptions,
    EvaluationOptions,
    UpdateOptions,
    FilterOptions,
    RolloutOptions,
    SelectionOptions,
    PolicyOptions,
    ReadingOptions,
    NewerOptions,
    TrainingArguments,
):
    """Options of `AttentionGuidedRLTrainer`: those of every room, those of a run, and the Trainer's.

    The number of optimizer steps follows from ``num_episodes``, and the moments of saving from ``save_episodes``; the
    Trainer's ``max_steps``, ``num_train_epochs``, ``save_steps`` and ``per_device_train_batch_size`` are refused beside
    them. What becomes of the options inherited from `TrainingArguments` is in docs/training_arguments.md; those of the
    method follow.

    Raises:
        ValueError: an option is out of range, or two contradict each other; names the option, its value and the range.
    """

    # Defaults that differ from the Trainer's
    learning_rate: Positive = option(2e-4, "Learning rate.")
    lr_scheduler_type: str = option("constant", "Learning rate schedule; held constant here.")
    optim: str = option("adamw_bnb_8bit", "Optimizer; 'adamw_torch' is taken where bitsandbytes is missing.")
    logging_steps: float = option(1, "Log every so many steps.")
    logging_nan_inf_filter: bool = option(False, must_stay("logging_nan_inf_filter"))
    remove_unused_columns: bool = option(False, must_stay("remove_unused_columns"))
    ignore_data_skip: bool = option(True, must_stay("ignore_data_skip"))
    save_strategy: SaveStrategy | str = option("no", must_stay("save_strategy"))

    def __post_init__(self) -> None:
        """Check every option and derive the Trainer's own."""
        self._read_paths()
        self.check_options()
        check_inherited_options(self)
        self._resolve_optimizer()
        self._parse_model_init_kwargs()
        pass_on_newer_options(self)
        TrainingArguments.__post_init__(self)  # type: ignore[no-untyped-call]  # transformers does not annotate it
        mirror_newer_options(self)
        expect_plain_loaders(self)
        expect_optimization(self, math.ceil((self.warm_start_episodes + self.num_episodes) / self.episodes_per_step))
        if self.num_queries > 1 and (self.credit != "step" or self.advantage == "reward"):
            raise ValueError(
                f"num_queries is {self.num_queries}: each query is judged by its own step, against the mean of the "
                f"others there, so credit must be 'step' and advantage 'centered' or 'whitened'; got {self.credit!r} "
                f"and {self.advantage!r}"
            )
        if self.num_queries > 1 and (self.order_coef > 0 or self.information_coef > 0):
            raise ValueError(
                f"num_queries is {self.num_queries}, and order_coef or information_coef above 0: what a step brings or "
                "tells is the same for every query of its context, which are compared with one another, so it would "
                "count for nothing; set num_queries to 1, or both coefficients to 0"
            )
        if self.warm_start_order == "listed" and self.show_keys == "none":
            raise ValueError(
                "warm_start_order is listed, but show_keys is none, so no key is listed; set show_keys, or the order "
                "to random or article"
            )
        if self.warm_start_episodes % self.episodes_per_step != 0:
            raise ValueError(
                f"warm_start_episodes must be a multiple of the trajectories of a step, {self.episodes_per_step} "
                "(generation_batch_size · gradient_accumulation_steps · processes), because a step is one or the "
                f"other; got {self.warm_start_episodes}"
            )

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
        """Trajectories per Trainer step, of all processes."""
        return self.generation_batch_size * self.gradient_accumulation_steps * int(self.world_size)

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

    def _read_paths(self) -> None:
        """Take paths as text, as which the Trainer keeps them."""
        for item in fields(self):
            if isinstance(value := getattr(self, item.name), PathLike):
                setattr(self, item.name, fspath(value))

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
