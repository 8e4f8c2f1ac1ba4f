"""The ledger of a run: one row per trajectory, with its reward, threshold and verdict (design §8).

JSON Lines, so that a run that was cut off leaves every row but perhaps the last readable.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias

LEDGER_NAME = "trajectories.jsonl"

# A mean of float32 softmaxes can exceed 1 by rounding.
_LARGEST_PROBABILITY = 1.0 + 1e-4

VerdictName = Literal["kept", "below_threshold", "warmup"]
TokenGains: TypeAlias = tuple[tuple[tuple[str, float], ...], ...]

_STEP_FIELDS = (
    "step_rewards",
    "query_gains",
    "model_gains",
    "selection_probabilities",
    "queries",
    "keys",
    "values",
)


class LedgerError(ValueError):
    """A ledger line that is not a trajectory."""


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One trajectory as the ledger stores it."""

    episode: int
    """Number of the trajectory in the run."""
    step: int
    """Trainer step that rolled it out, from 1."""
    epoch: int
    """Pass over the articles."""
    article_index: int
    """Row of the article in its source."""
    title: str
    source: str
    """Name of the data set."""
    pair_numbers: tuple[int, ...]
    """The M pairs of the subset, as numbers in the article."""
    order: tuple[int, ...]
    """The T pair numbers chosen, in order."""
    reward: float
    """Mean of `step_rewards`, nats per value token."""
    step_rewards: tuple[float, ...]
    """T rewards, nats per value token; so are the gains."""
    query_gains: tuple[float, ...]
    """T gains of the policy's query over the counterfactual, both scored by the base model."""
    model_gains: tuple[float, ...]
    """T gains of the policy over the base model, both given the policy's query."""
    order_gains: tuple[float, ...] | None
    """T gains of the context over pair 0 alone, or None where not computed."""
    history_mean: float | None
    """Mean reward of the history that judged it, None for an empty history."""
    history_std: float | None
    threshold: float | None
    """Reward above which a trajectory was kept, None during warm-up."""
    verdict: VerdictName
    selection_probabilities: tuple[tuple[float, ...], ...]
    """T rows of M, columns in the order of `pair_numbers`, 0 for pairs already used."""
    queries: tuple[str, ...]
    """T texts; so are the chosen keys and values."""
    keys: tuple[str, ...]
    values: tuple[str, ...]
    token_gains: TokenGains | None = None
    """T lists of the value's tokens, as text, each with its share of the reward, nats; None where not kept."""
    information_gains: tuple[float, ...] | None = None
    """T gains of the values that were unread after the step, or None where not computed."""

    def __post_init__(self) -> None:
        """Check that the lists fit each other.

        Raises:
            LedgerError: a list of the wrong length, a pair chosen twice or not in the subset, or a probability
                outside [0, 1].
        """
        num_steps = len(self.order)
        for name in _STEP_FIELDS:
            _check_length(name, getattr(self, name), num_steps, "one for each step of 'order'")
        for name in ("token_gains", "order_gains", "information_gains"):
            if getattr(self, name) is not None:
                _check_length(name, getattr(self, name), num_steps, "one for each step of 'order'")
        if len(set(self.pair_numbers)) != len(self.pair_numbers):
            raise LedgerError(f"'pair_numbers' must be distinct, got {list(self.pair_numbers)}")
        if not num_steps or len(set(self.order)) != num_steps or not set(self.order) <= set(self.pair_numbers):
            raise LedgerError(
                f"'order' must be one or more distinct pairs of 'pair_numbers' {list(self.pair_numbers)}, "
                f"got {list(self.order)}"
            )
        for probabilities in self.selection_probabilities:
            _check_length("selection_probabilities", probabilities, len(self.pair_numbers), "one for each pair")
            if not all(0.0 <= probability <= _LARGEST_PROBABILITY for probability in probabilities):
                raise LedgerError(f"'selection_probabilities' must be in [0, 1], got {list(probabilities)}")

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> Self:
        """Build a row from a decoded JSON object; keys that are not fields are ignored.

        Raises:
            LedgerError: a key is missing, or a value has the wrong type, length or range.
        """
        needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        missing = sorted(needed - set(record))
        if missing:
            raise LedgerError(f"missing keys: {', '.join(missing)}")
        return cls(
            episode=_integer(record["episode"], "episode"),
            step=_integer(record["step"], "step"),
            epoch=_integer(record["epoch"], "epoch"),
            article_index=_integer(record["article_index"], "article_index"),
            title=_text(record["title"], "title"),
            source=_text(record["source"], "source"),
            pair_numbers=_integers(record["pair_numbers"], "pair_numbers"),
            order=_integers(record["order"], "order"),
            reward=_number(record["reward"], "reward"),
            step_rewards=_numbers(record["step_rewards"], "step_rewards"),
            query_gains=_numbers(record["query_gains"], "query_gains"),
            model_gains=_numbers(record["model_gains"], "model_gains"),
            order_gains=_optional_numbers(record["order_gains"], "order_gains"),
            history_mean=_optional_number(record["history_mean"], "history_mean"),
            history_std=_optional_number(record["history_std"], "history_std"),
            threshold=_optional_number(record["threshold"], "threshold"),
            verdict=_verdict(record["verdict"]),
            selection_probabilities=tuple(
                _numbers(row, "selection_probabilities")
                for row in _list(record["selection_probabilities"], "selection_probabilities")
            ),
            queries=_texts(record["queries"], "queries"),
            keys=_texts(record["keys"], "keys"),
            values=_texts(record["values"], "values"),
            token_gains=_token_gains(record.get("token_gains")),
            information_gains=_optional_numbers(record.get("information_gains"), "information_gains"),
        )

    def to_json(self) -> dict[str, object]:
        """Return the row as a mapping that `json.dumps` writes and `from_json` reads back."""
        return dataclasses.asdict(self)

    @property
    def chosen_probabilities(self) -> tuple[float, ...]:
        """The probability with which each chosen pair was drawn, T values."""
        columns = [self.pair_numbers.index(number) for number in self.order]
        return tuple(row[column] for row, column in zip(self.selection_probabilities, columns, strict=True))

    @property
    def query_gain(self) -> float:
        """Mean query gain of the trajectory, nats per value token."""
        return statistics.fmean(self.query_gains)

    @property
    def model_gain(self) -> float:
        """Mean model gain of the trajectory, nats per value token."""
        return statistics.fmean(self.model_gains)

    @property
    def is_reward_their_sum(self) -> bool:
        """Whether nothing but both gains is in the reward, as in a plain run."""
        return math.isclose(self.reward, self.query_gain + self.model_gain, rel_tol=1e-4, abs_tol=1e-4)


def read_ledger(path: Path) -> list[LedgerRow]:
    """Read the `trajectories.jsonl` of a run, in file order.

    Raises:
        FileNotFoundError: there is no such file.
        LedgerError: a line is not a trajectory; the message names the file and the line number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no ledger here; expected the {LEDGER_NAME} of a run's output_dir")
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(LedgerRow.from_json(_decode_object(line)))
            except (ValueError, OverflowError, RecursionError) as error:
                raise LedgerError(
                    f"{path}, line {number}: {error}. A run that was killed can leave its last line unfinished: "
                    "resume it, or remove the line"
                ) from error
    return rows


def _decode_object(line: bytes) -> Mapping[str, object]:
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise LedgerError(f"expected a JSON object, got {type(record).__name__}")
    return record


def _check_length(name: str, values: Sequence[object], expected: int, meaning: str) -> None:
    if len(values) != expected:
        raise LedgerError(f"{name!r} must have {expected} entries ({meaning}), got {len(values)}")


def _number(value: object, key: str) -> float:
    # bool is an int to Python, but `true` in a ledger is not a number.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LedgerError(f"{key!r} must be a finite number, got {value!r}")
    return float(value)


def _token_gains(value: object) -> TokenGains | None:
    if value is None:
        return None
    steps = []
    for step in _list(value, "token_gains"):
        pairs = [_list(pair, "token_gains") for pair in _list(step, "token_gains")]
        if any(len(pair) != 2 for pair in pairs):
            raise LedgerError(f"'token_gains' must hold a text and a number for each token, got {step!r}")
        steps.append(tuple((_text(text, "token_gains"), _number(gain, "token_gains")) for text, gain in pairs))
    return tuple(steps)


def _optional_number(value: object, key: str) -> float | None:
    return None if value is None else _number(value, key)


def _integer(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise LedgerError(f"{key!r} must be an integer, got {value!r}")
    return value


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise LedgerError(f"{key!r} must be a string, got {value!r}")
    return value


def _list(value: object, key: str) -> list[object]:
    if not isinstance(value, list | tuple):
        raise LedgerError(f"{key!r} must be a list, got {value!r}")
    return list(value)


def _numbers(value: object, key: str) -> tuple[float, ...]:
    return tuple(_number(item, key) for item in _list(value, key))


def _optional_numbers(value: object, key: str) -> tuple[float, ...] | None:
    return None if value is None else _numbers(value, key)


def _integers(value: object, key: str) -> tuple[int, ...]:
    return tuple(_integer(item, key) for item in _list(value, key))


def _texts(value: object, key: str) -> tuple[str, ...]:
    return tuple(_text(item, key) for item in _list(value, key))


def _verdict(value: object) -> VerdictName:
    match value:
        case "kept" | "below_threshold" | "warmup":
            return value
    raise LedgerError(f"'verdict' must be kept, below_threshold or warmup, got {value!r}")


@dataclass(frozen=True, slots=True)
class LedgerGaps:
    """What a ledger lacks up to a checkpoint."""

    missing: int
    """Rows that are not there."""
    copy: Path | None
    """The ledger as it was, where lines of it were left out because they were damaged or repeated."""


class Ledger:
    """The ledger file in a run's output_dir, written row by row."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_NAME

    def append(self, rows: Sequence[LedgerRow]) -> None:
        """Write rows, in the order of their episodes, and hand them to the operating system.

        Raises:
            OSError: the system refused; names the file.
        """
        lines = [json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            # A refused write names no file, unlike a refused opening.
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def sync(self) -> None:
        """Have the system write all rows to the disk."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def cut(self, num_episodes: int) -> LedgerGaps:
        """Remove the rows past a checkpoint, so that a resumed run does not write them twice.

        Lines that are not rows, and repeated rows, are left out too; the file as it was stays beside it.

        Args:
            num_episodes: rows of this and later episodes go, and so does a last line that a kill left unfinished.
        """
        episodes: set[int] = set()
        spoilt = 0
        staged = self.path.with_name(f"_staging-{self.path.name}")
        if not self.path.is_file():
            return LedgerGaps(num_episodes, None)
        with self.path.open("rb") as source, staged.open("wb") as target:
            for line in source:
                episode = _episode_of(line)
                if episode is None or episode in episodes:
                    # A line without an end is the last one: what a kill leaves.
                    spoilt += line.endswith(b"\n")
                elif episode < num_episodes:
                    target.write(line)
                    episodes.add(episode)
            target.flush()
            os.fsync(target.fileno())
        copy = self.path.with_name(f"_damaged-{self.path.name}") if spoilt else None
        if copy is not None:
            shutil.copy2(self.path, copy)
        os.replace(staged, self.path)
        return LedgerGaps(num_episodes - len(episodes), copy)


def _episode_of(line: bytes) -> int | None:
    """Read the episode of a ledger's line, or ``None`` where it is not a row."""
    try:
        return LedgerRow.from_json(_decode_object(line)).episode if line.endswith(b"\n") else None
    except (ValueError, OverflowError, RecursionError):
        return None
