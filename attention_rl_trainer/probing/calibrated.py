"""A run's calibration: given, kept in a checkpoint, or fitted when it is first needed (design §5)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attention_rl_trainer.durability.discovery import CheckpointError
from attention_rl_trainer.memories.loading import MemoryLoader
from attention_rl_trainer.memories.stream import Articles
from attention_rl_trainer.models.adapters import WEIGHTS
from attention_rl_trainer.models.heads import HeadNumber
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.probing.calibrate import Probe, selection_facts
from attention_rl_trainer.processes import ALONE, Processes
from attention_rl_trainer.rollout.calibration import CALIBRATION_NAME, Calibration, Origin
from attention_rl_trainer.rollout.environment import CalibratedEnvironment, MemoryEnvironment, SelectionOptions
from attention_rl_trainer.rollout.layout import Layout

logger = logging.getLogger(__name__)

_ARTICLES, _WEIGHTS = "articles.sample", "model.weights"


CALIBRATED: dict[str, Any] = {
    "attention_heads": "probe",
    "head_similarity": "cosine",
    "head_aggregation": "scores",
    "center_vectors": True,
    "selection_temperature": "auto",
}
"""The options of the selector that the recipes calibrate."""


def is_calibrated(heads: PolicyOptions, selection: SelectionOptions) -> bool:
    """Whether anything of the selector is fitted before training."""
    return selection.is_fitted or heads.attention_heads == "probe"


def calibration_beside(adapter: Path, heads: PolicyOptions, selection: SelectionOptions) -> Calibration | None:
    """Read what was fitted for an adapter, from its folder; ``None`` where its options use none, or none is there."""
    is_there = is_calibrated(heads, selection) and (adapter / CALIBRATION_NAME).is_file()
    return Calibration.read(adapter) if is_there else None


class CalibratedSelector:
    """Sees to it that policy and environment select as they were calibrated; does nothing where nothing is fitted.

    Args:
        heads: which heads select.
        selection: how they are compared; ``calibration_memories`` of the training articles are fitted to.
        given: a calibration, or the folder of one.
        show_progress: whether a bar is shown on standard error.
        processes: of which the first one fits, for all.

    Raises:
        ValueError: something is to be fitted that the environment does not take, or the given folder has none.
    """

    def __init__(
        self,
        policy: PolicyModel,
        environment: MemoryEnvironment,
        layout: Layout,
        loader: MemoryLoader,
        heads: PolicyOptions,
        selection: SelectionOptions,
        given: Calibration | str | Path | None = None,
        *,
        show_progress: bool = True,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self._policy = policy
        self._environment = environment
        self._layout = layout
        self._loader = loader
        self._heads = heads
        self._selection = selection
        self._show_progress = show_progress
        self.is_needed = is_calibrated(heads, selection)
        if selection.is_fitted and not isinstance(environment, CalibratedEnvironment):
            raise ValueError(
                f"center_vectors or selection_temperature 'auto' is set, but the environment "
                f"{type(environment).__name__} has no calibrate(calibration); give it one, or set a temperature and "
                "leave center_vectors out"
            )
        self._given = Calibration.read(Path(given)) if isinstance(given, str | Path) else given
        if self._given is not None and not self.is_needed:
            raise ValueError(
                "a calibration is given, but nothing of it is used: set attention_heads to 'probe', center_vectors to "
                "true or selection_temperature to 'auto', as in the run that made it; or leave calibration out"
            )
        self.calibration: Calibration | None = None

    @property
    def digest(self) -> str | None:
        """What distinguishes the calibration from others; ``None`` where there is none."""
        known = self.calibration or self._given
        return None if known is None else known.digest

    def ensure(self, articles: Articles | None, origin: Callable[[], Origin]) -> bool:
        """Take the calibration that was given, or fit one to training articles, unless there is one.

        Args:
            origin: facts of base model and articles, which a given calibration is held against.

        Returns:
            Whether there is a new one.

        Raises:
            ValueError: there is nothing to fit to, or the given one was fitted to another base model.
        """
        if not self.is_needed or self.calibration is not None:
            return False
        if self._given is not None:
            facts = origin() | selection_facts(self._policy, self._heads, self._selection)
            self._expect_fitting(self._given, facts)
            self._take(self._given)
            return True
        if articles is None:
            raise ValueError(
                "the selector is calibrated (attention_heads 'probe', center_vectors or selection_temperature 'auto'), "
                "but there is neither a train_dataset to fit it to nor a calibration; give the folder of the adapter "
                "that was trained with it as calibration"
            )
        self._take(self._processes.on_main(lambda: self._fit(articles, origin())))
        return True

    def _fit(self, articles: Articles, origin: Origin) -> Calibration:
        probe = Probe(self._policy, self._layout, self._heads, self._selection, show_progress=self._show_progress)
        memories = self._loader.first_memories(articles, self._selection.calibration_memories)
        return probe.fit(memories, origin).calibration

    def restore(self, folder: Path) -> None:
        """Take the calibration that a checkpoint holds, where one is used and none was given.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        if not self.is_needed or self._given is not None:
            return
        try:
            self._take(Calibration.read(folder))
        except ValueError as error:
            raise CheckpointError(f"a run whose selector is calibrated cannot resume from {folder}: {error}") from error

    def save(self, folder: Path) -> None:
        """Write the calibration, where there is one."""
        if self.calibration is not None:
            self.calibration.save(folder)

    def describe(self) -> str | None:
        """Say in a line what was fitted; ``None`` where nothing was."""
        return None if self.calibration is None else self.calibration.describe()

    def _take(self, calibration: Calibration) -> None:
        if self._heads.attention_heads == "probe":
            self._policy.choose_heads(_expect_heads(calibration))
        if isinstance(self._environment, CalibratedEnvironment):
            self._environment.calibrate(calibration)
        self.calibration = calibration

    def _expect_fitting(self, calibration: Calibration, facts: Origin) -> None:
        """Refuse a calibration of another base model or another way to select, and say if the articles are others."""
        there = calibration.origin
        if self._heads.head_numbers is not None and calibration.heads != self._heads.head_numbers:
            raise ValueError(
                f"the calibration is of the heads {', '.join(map(str, calibration.heads or ())) or 'of a layer'}, but "
                f"attention_heads is {self._heads.attention_heads}; set it to 'probe' to take those of the calibration"
            )
        differing = [name for name in facts if name != _ARTICLES and there.get(name) != facts[name]]
        if _WEIGHTS in differing and not _are_comparable(there.get(_WEIGHTS), facts[_WEIGHTS]):
            differing.remove(_WEIGHTS)
            logger.warning(
                "The calibration was fitted to weights of another precision than these (4 or 8 bits): whether they are "
                "of the same base model cannot be told; it is used"
            )
        if differing:
            listed = "".join(f"\n  {name}: {there.get(name)!r} there, {facts[name]!r} here" for name in differing)
            raise ValueError(
                "the calibration was fitted to another base model or another way to select; give the base model and "
                f"the options that it belongs to, or leave calibration out to fit it anew:{listed}"
            )
        if facts.get(_ARTICLES) not in (None, there.get(_ARTICLES)):
            logger.warning("The calibration was fitted to other articles than those that are trained on; it is used")


def _are_comparable(*weights: object) -> bool:
    """Whether both are digests that do not depend on the precision, or neither is."""
    return len({str(digest).startswith(WEIGHTS) for digest in weights}) == 1


def _expect_heads(calibration: Calibration) -> tuple[HeadNumber, ...]:
    if calibration.heads is None:
        raise ValueError(
            "attention_heads is 'probe', but the calibration names no heads; use the attention_heads that it was "
            "fitted with"
        )
    return calibration.heads
