"""What a run leaves beside its adapter, as far as ordering needs it: options, calibration, evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from attention_rl_trainer.episodes import RUN_CONFIG_NAME
from attention_rl_trainer.hub import HubUnreachableError, hub_obstacle
from attention_rl_trainer.models.policy import PolicyOptions
from attention_rl_trainer.options import Options, OptionsT
from attention_rl_trainer.ordering.trust import OrderTrust
from attention_rl_trainer.pages.run import EVALUATIONS
from attention_rl_trainer.probing.calibrated import calibration_beside
from attention_rl_trainer.publishing.published import FIGURES_NAME
from attention_rl_trainer.rollout.calibration import CALIBRATION_NAME, Calibration
from attention_rl_trainer.rollout.environment import SelectionOptions
from attention_rl_trainer.rollout.sampler import RolloutOptions

# Neither checkpoints nor what somebody else may have put beside them.
_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    RUN_CONFIG_NAME,
    CALIBRATION_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    # Of a run that was pushed: what its evaluations measured, without the texts.
    f"{EVALUATIONS}/*/{FIGURES_NAME}",
)


def find_adapter(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Find an adapter's folder: a local one, or a Hub repository, of which what is needed is fetched.

    Args:
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: there is neither.
        HubUnreachableError: it would have to come from the Hub, which cannot be reached.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    obstacle = hub_obstacle()
    try:
        fetched = snapshot_download(
            name, revision=revision, allow_patterns=list(_FILES), local_files_only=obstacle is not None
        )
    except HFValidationError as error:
        raise ValueError(
            f"There is no folder {name}, and no Hub repository can be called so; check the path"
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubUnreachableError(
            f"{name} is neither a folder nor in the local cache, and the Hub cannot be reached: {obstacle or error}"
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(
            f"There is no folder {name}, and the Hub gives no such adapter: {error}. Check the name and, of a private "
            "one, `hf auth login`"
        ) from error
    return Path(fetched)


def read_options(folder: Path) -> dict[str, Any]:
    """Read the options that an adapter was trained with, as its run wrote them.

    Raises:
        ValueError: the folder holds none, or they cannot be read.
    """
    path = folder / RUN_CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {RUN_CONFIG_NAME}, which says how the adapter was trained to read; give the "
            "output_dir of a run, or one of its checkpoints"
        )
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold a JSON object of options, got {type(options).__name__}")
    return options


@dataclass(frozen=True)
class OrderSettings:
    """How an adapter reads: the options that it was trained with, and what was fitted for it."""

    options: Mapping[str, Any]
    """By name, as the run wrote them; of those that are missing the defaults hold."""
    calibration: Calibration | None = None
    trust: OrderTrust = field(default_factory=OrderTrust)

    @classmethod
    def read(cls, folder: Path) -> OrderSettings:
        """Read an adapter's folder.

        Raises:
            ValueError: it holds no options, or they or the calibration cannot be read.
        """
        options = read_options(folder)
        uncalibrated = cls(options)
        calibration = calibration_beside(folder, uncalibrated.policy, uncalibrated.selection)
        return cls(options, calibration, OrderTrust.read(folder, calibration))

    @property
    def policy(self) -> PolicyOptions:
        """How the policy writes."""
        return _taken(PolicyOptions, self.options)

    @property
    def selection(self) -> SelectionOptions:
        """How a query draws."""
        return _taken(SelectionOptions, self.options)

    @property
    def tokens_per_key(self) -> int:
        """K."""
        return self.rollout(1, 1).tokens_per_key

    @property
    def tokens_per_value(self) -> int:
        """V in training; new values may be longer."""
        return self.rollout(1, 1).tokens_per_value

    def rollout(self, num_pairs: int, num_steps: int, **changes: Any) -> RolloutOptions:
        """Lay trajectories of T steps over memories of M pairs out, otherwise as in training."""
        size = {"num_kv_pairs": num_pairs + 1, "subset_fraction": 1.0, "num_steps": num_steps}
        # Nothing is rewarded or trained.
        unpaid = {"order_coef": 0.0, "information_coef": 0.0, "num_queries": 1}
        return _taken(RolloutOptions, self.options, **size | unpaid | changes)


def _taken(kind: type[OptionsT], options: Mapping[str, Any], **changes: Any) -> OptionsT:
    assert issubclass(kind, Options)
    return kind(**{item.name: options[item.name] for item in fields(kind) if item.name in options} | changes)
