"""Every option of a run, checked when it is made, in the order in which the pipeline uses them.

Extends `transformers.TrainingArguments`, so that the Trainer's own options (``report_to``, ``seed``,
``push_to_hub``, ...) work as everywhere. Where a default differs from the Trainer's, the field says so here. Knows
nothing about models.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from attention_rl_trainer.hub import without_credentials
from attention_rl_trainer.losses import Advantage, Credit, KLReference
from attention_rl_trainer.pairs import PairShape, Window
from attention_rl_trainer.selector import HeadAggregation

logger = logging.getLogger(__name__)

_SECRET = re.compile(r"token|password|secret|credential|api_?key", re.IGNORECASE)
_CHOICES = {
    "window": get_args(Window),
    "head_aggregation": get_args(HeadAggregation),
    "advantage": get_args(Advantage),
    "credit": get_args(Credit),
    "kl_reference": get_args(KLReference),
}
_AT_LEAST_ONE = (
    "tokens_per_query",
    "tokens_per_key",
    "tokens_per_value",
    "generation_batch_size",
    "training_batch_size",
    "eval_episodes",
    "eval_epochs",
    "num_episodes",
    "save_episodes",
    "warmup_episodes",
    "num_iterations",
    "logits_chunk_size",
    "embedding_batch_size",
    "shuffle_buffer_size",
)
_AT_LEAST_ZERO = (
    "beta",
    "selector_coef",
    "reward_gradient_coef",
    "order_coef",
    "entropy_coef",
    "log_trajectory_steps",
    "overfit_articles",
)
_ABOVE_ZERO = ("query_temperature", "selection_temperature", "epsilon", "learning_rate")


def _help(text: str, **metadata: Any) -> dict[str, Any]:
    return {"help": text, **metadata}


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
class AttentionGuidedRLConfig(TrainingArguments):
    """Options of `AttentionGuidedRLTrainer`.

    The number of optimizer steps follows from ``num_episodes``, and the moments of saving from ``save_episodes``; the
    Trainer's ``max_steps``, ``num_train_epochs``, ``save_steps`` and ``per_device_train_batch_size`` are refused beside
    them. Each field's meaning is in its ``help``.

    Raises:
        ValueError: an option is out of range, or two contradict each other; names the option, its value and the range.
    """

    # Articles and pairs
    dataset_text_column: str = field(default="text", metadata=_help("Column of the data set that holds the articles."))
    shuffle: bool = field(default=True, metadata=_help("Shuffle the articles, anew in every epoch."))
    shuffle_buffer_size: int = field(
        default=1000, metadata=_help("Articles held in memory to shuffle a streamed data set.")
    )
    num_kv_pairs: int = field(
        default=32, metadata=_help("N: pairs of an article that take part, the in-context example counted.")
    )
    subset_fraction: float = field(
        default=0.25, metadata=_help("Share of the N pairs that make a trajectory's memory of M pairs; in (0, 1].")
    )
    num_steps: int | None = field(
        default=None, metadata=_help("T: pairs read in a trajectory, at most M. Default: all M.")
    )
    tokens_per_query: int = field(default=20, metadata=_help("L: tokens of a query."))
    tokens_per_key: int = field(default=20, metadata=_help("K: tokens of a key."))
    tokens_per_value: int = field(default=20, metadata=_help("V: tokens of a value."))
    window: Window = field(
        default="start",
        metadata=_help(
            "Which pairs of an article take part: its first N ('start') or a random run of as many ('random')."
        ),
    )
    overfit_articles: int = field(
        default=0,
        metadata=_help(
            "Train on the first so many usable articles alone, each with one and the same memory in every epoch: what "
            "cannot even be learned by heart is broken. 0 for all articles."
        ),
    )
    include_key_in_context: bool = field(
        default=False, metadata=_help("Put the drawn key before its value in the context: ' Response:' key value.")
    )

    # Selection
    attention_layer: int = field(
        default=-1, metadata=_help("Layer whose attention selects; negative numbers count from the last.")
    )
    selection_temperature: float = field(
        default=1.0, metadata=_help("Divides the attention scores of the selector; below 1 sharpens.")
    )
    head_aggregation: HeadAggregation = field(
        default="probabilities",
        metadata=_help("Average the heads' probabilities, or their scores before one softmax."),
    )

    # Rollout
    query_temperature: float = field(default=1.0, metadata=_help("Divides the logits of query tokens, everywhere."))
    generation_batch_size: int = field(
        default=64, metadata=_help("B: trajectories rolled out per process and step.", aliases=["--batch-size"])
    )
    embedding_batch_size: int = field(default=32, metadata=_help("Keys embedded in one forward."))

    # Filter
    warmup_episodes: int = field(
        default=15, metadata=_help("Nothing is trained until this many rewards are in the history.")
    )
    filter_threshold: float | None = field(
        default=1.0,
        metadata=_help("Keep trajectories above the historical mean + this many SD; none keeps every trajectory."),
    )

    # Loss
    advantage: Advantage = field(
        default="centered",
        metadata=_help(
            "What weighs a query: its 'reward', the reward less the historical mean ('centered'), or that divided by "
            "the historical SD ('whitened')."
        ),
    )
    credit: Credit = field(
        default="trajectory",
        metadata=_help(
            "Which rewards weigh a step's query: the 'trajectory' mean, this and later steps ('return_to_go'), or its "
            "own ('step')."
        ),
    )
    beta: float = field(default=0.1, metadata=_help("Weight of the KL penalty."))
    kl_reference: KLReference = field(
        default="previous",
        metadata=_help("KL to the adapter before the last update ('previous') or to the base model ('base')."),
    )
    selector_coef: float = field(default=0.0, metadata=_help("Weight of REINFORCE on the draws of pairs."))
    reward_gradient_coef: float = field(
        default=0.0, metadata=_help("Weight of the gradient through log p_θ(value): the model also learns to read.")
    )
    order_coef: float = field(default=0.0, metadata=_help("Weight of the order gain in the reward."))
    entropy_coef: float = field(default=0.0, metadata=_help("Weight of an entropy bonus on query tokens."))

    # Update
    training_batch_size: int = field(
        default=16,
        metadata=_help("Trajectories in a micro-batch of the update; halved up to three times if memory runs out."),
    )
    num_iterations: int = field(
        default=1, metadata=_help("Optimizer steps on each rollout batch; above 1 with clipped importance ratios.")
    )
    epsilon: float = field(default=0.2, metadata=_help("Clip of the importance ratio when num_iterations > 1."))
    disable_dropout: bool = field(
        default=True, metadata=_help("Switch dropout off in the update too; it is always off in the rollout.")
    )
    logits_chunk_size: int | None = field(
        default=None,
        metadata=_help(
            "Positions whose vocabulary logits are held at once. Default: as many as take 64 MiB (CPU: 40) in float32."
        ),
    )

    # Run
    num_episodes: int = field(default=10000, metadata=_help("Trajectories in the whole run.", aliases=["--episodes"]))
    save_episodes: int = field(
        default=100, metadata=_help("Save a checkpoint at the first step that reaches a multiple of this.")
    )
    eval_episodes: int = field(default=64, metadata=_help("Trajectories rolled out by an evaluation."))
    eval_tables: bool = field(
        default=True,
        metadata=_help(
            "Measure orders and queries against baselines in evaluations too; takes several times as long as the "
            "trajectories alone."
        ),
    )
    eval_order_episodes: int | None = field(
        default=None,
        metadata=_help(
            "With eval_tables, score orders for so many of an evaluation's trajectories alone, the first ones; this "
            "takes most of the time. 0 for none. Default: for all."
        ),
    )
    eval_epochs: int = field(
        default=1,
        metadata=_help(
            "How often the evaluation articles are read, each time with another memory; above 1 where they are fewer "
            "than eval_episodes."
        ),
    )
    log_trajectory_steps: int = field(
        default=10, metadata=_help("Print a table of one trajectory every so many steps; 0 for never.")
    )
    report_at_end: bool = field(
        default=True, metadata=_help("Write plots and a summary into output_dir/report when training ends.")
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata=_help("Keyword arguments for loading the base model when it is given by name, as JSON."),
    )

    # Defaults that differ from the Trainer's
    learning_rate: float = field(default=2e-4, metadata=_help("Learning rate."))
    lr_scheduler_type: str = field(default="constant", metadata=_help("Learning rate schedule; held constant here."))
    optim: str = field(
        default="adamw_bnb_8bit", metadata=_help("Optimizer; 'adamw_torch' is taken where bitsandbytes is missing.")
    )
    logging_steps: float = field(default=1, metadata=_help("Log every so many steps."))
    logging_nan_inf_filter: bool = field(
        default=False, metadata=_help("Must stay false: a non-finite loss is an error here, not a 0 in the log.")
    )
    remove_unused_columns: bool = field(default=False, metadata=_help("Must stay false: columns are read by name."))
    ignore_data_skip: bool = field(
        default=True, metadata=_help("Must stay true: resuming seeks to the stored position instead of replaying.")
    )
    save_strategy: SaveStrategy | str = field(
        default="no", metadata=_help("Must stay 'no': save_episodes decides when a checkpoint is written.")
    )

    def __post_init__(self) -> None:
        """Check every option and derive the Trainer's own."""
        self._check_ranges()
        self._refuse_derived_options()
        self._refuse_unsupported_options()
        self._resolve_optimizer()
        self._parse_model_init_kwargs()
        super().__post_init__()  # type: ignore[no-untyped-call]  # transformers does not annotate it

    @property
    def train_batch_size(self) -> int:
        """Trajectories of a rollout batch; what the Trainer calls the training batch."""
        return self.generation_batch_size

    @property
    def episodes_per_step(self) -> int:
        """Trajectories of one Trainer step."""
        return self.generation_batch_size * self.gradient_accumulation_steps

    def save_json(self, path: Path) -> None:
        """Write the options as `to_jsonable` gives them.

        Args:
            path: the file.
        """
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
        """Show the options one a line, with secrets masked."""
        lines = (f"{name}={value},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{''.join(lines)})"

    # The dataclass would make one that shows the Hub token, also for a subclass.
    __repr__ = __str__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass that is a dataclass show itself as this class does."""
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = AttentionGuidedRLConfig.__str__  # type: ignore[assignment, method-assign]

    @property
    def pair_shape(self) -> PairShape:
        """The lengths and counts that cut an article into pairs."""
        return PairShape(
            num_kv_pairs=self.num_kv_pairs,
            subset_fraction=self.subset_fraction,
            tokens_per_key=self.tokens_per_key,
            tokens_per_value=self.tokens_per_value,
            window=self.window,
        )

    @property
    def steps_per_trajectory(self) -> int:
        """T, with the default resolved."""
        return self.pair_shape.memory_size if self.num_steps is None else self.num_steps

    def _check_ranges(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        # `None` stands for a size that follows from the model.
        counts = [name for name in _AT_LEAST_ONE if name != "logits_chunk_size" or self.logits_chunk_size is not None]
        for name in (*counts, "num_kv_pairs"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be an integer, got {getattr(self, name)!r}")
        for name in counts:
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in _AT_LEAST_ZERO:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        for name in _ABOVE_ZERO:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if self.num_kv_pairs < 2:
            raise ValueError(f"num_kv_pairs must be at least 2 (the example and one to read), got {self.num_kv_pairs}")
        if not 0 < self.subset_fraction <= 1:
            raise ValueError(f"subset_fraction must lie in (0, 1], got {self.subset_fraction}")
        if self.filter_threshold is not None and math.isnan(self.filter_threshold):
            raise ValueError("filter_threshold must be a number, got nan")
        orders = self.eval_order_episodes
        if orders is not None and (type(orders) is not int or orders < 0):
            raise ValueError(f"eval_order_episodes must be an integer of at least 0, or none, got {orders!r}")
        self._check_steps()

    def _check_steps(self) -> None:
        memory_size = self.pair_shape.memory_size
        if self.num_steps is not None and type(self.num_steps) is not int:
            raise ValueError(f"num_steps must be an integer or none, got {self.num_steps!r}")
        if self.num_steps is not None and not 1 <= self.num_steps <= memory_size:
            raise ValueError(
                f"num_steps must lie in 1..{memory_size}, the pairs of a memory "
                f"(subset_fraction {self.subset_fraction} of num_kv_pairs {self.num_kv_pairs}), got {self.num_steps}; "
                "raise subset_fraction or num_kv_pairs, or lower num_steps"
            )

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
                raise ValueError(f"{name} must stay {value!r}, got {getattr(self, name)!r}: {self._help_of(name)}")

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
            "enable_jit_checkpoint": "SIGTERM writes a checkpoint as it is",
            "load_best_model_at_end": "a checkpoint is written by save_episodes, not at evaluations",
            "torch_compile": "the cache's growing length makes it compile again and again, for no gain where it was "
            "measured (docs/benchmarks.md)",
        }
        for name, reason in unsupported.items():
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: {reason}")
        if self.metric_for_best_model is not None and self.save_total_limit is not None:
            raise ValueError(
                f"save_total_limit is {self.save_total_limit} beside metric_for_best_model, but checkpoints come "
                "by save_episodes, not at the best evaluation, and removed by age; leave save_total_limit out"
            )
        if self.dataloader_num_workers not in (0, 1):
            raise ValueError(
                f"dataloader_num_workers must be 0 or 1, got {self.dataloader_num_workers}: the articles are one "
                "stream in a fixed order"
            )

    @classmethod
    def _help_of(cls, name: str) -> str:
        return str(cls.__dataclass_fields__[name].metadata["help"])

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
