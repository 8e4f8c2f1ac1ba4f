"""Turn a run's ledger and logged metrics into a Markdown summary and a folder of plots.

Reads back `trajectories.jsonl`, the ledger of the design's section 8, as typed rows; compares the first third of the
episodes with the last third (reward, query gain, model gain: section 7) and says in plain words what changed and what
did not; writes `report/` with the summary and the plots.

Knows nothing about trainers, models or tokenizers: everything comes from the files of a run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from attention_rl_trainer.report.plots import plot_gains, plot_kl, plot_rewards, plot_selection

__all__ = [
    "LEDGER_NAME",
    "Change",
    "LedgerError",
    "LedgerRow",
    "Mean",
    "Verdict",
    "compare_thirds",
    "escape_control_characters",
    "read_ledger",
    "summarize_run",
    "write_report",
]

LEDGER_NAME = "trajectories.jsonl"
REPORT_FOLDER = "report"

Verdict = Literal["kept", "below_threshold", "warmup"]

_STEP_FIELDS = (
    "step_rewards",
    "query_gains",
    "model_gains",
    "selection_probabilities",
    "queries",
    "keys",
    "values",
)
# A mean of float32 softmaxes can exceed 1 by rounding.
_LARGEST_PROBABILITY = 1.0 + 1e-4
_MIN_EPISODES_PER_THIRD = 4
_CONFIDENCE = 0.95
_NOT_LOGGED = "not logged"


class LedgerError(ValueError):
    """A ledger line that is not a trajectory."""


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One trajectory as the ledger stores it.

    Attributes:
        episode: number of the trajectory in the run.
        step: Trainer step that rolled it out, from 1.
        epoch: pass over the articles.
        article_index: row of the article in its source.
        title: title of the article.
        source: name of the data set.
        pair_numbers: the M pairs of the subset, as numbers in the article.
        order: the T pair numbers chosen, in order.
        reward: mean of `step_rewards`, nats per value token.
        step_rewards: T rewards, nats per value token.
        query_gains: T gains of the policy's query over the counterfactual, both scored by the base model.
        model_gains: T gains of the policy over the base model, both given the policy's query.
        order_gains: T gains of the context over pair 0 alone, or None where not computed.
        history_mean: mean reward of the history that judged it, None for an empty history.
        history_std: standard deviation of that history.
        threshold: reward above which a trajectory was kept, None during warm-up.
        verdict: what the filter decided.
        selection_probabilities: T rows of M, columns in the order of `pair_numbers`, 0 for pairs already used.
        queries: T query texts.
        keys: T chosen key texts.
        values: T chosen value texts.
    """

    episode: int
    step: int
    epoch: int
    article_index: int
    title: str
    source: str
    pair_numbers: tuple[int, ...]
    order: tuple[int, ...]
    reward: float
    step_rewards: tuple[float, ...]
    query_gains: tuple[float, ...]
    model_gains: tuple[float, ...]
    order_gains: tuple[float, ...] | None
    history_mean: float | None
    history_std: float | None
    threshold: float | None
    verdict: Verdict
    selection_probabilities: tuple[tuple[float, ...], ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that the lists fit each other.

        Raises:
            LedgerError: a list of the wrong length, a pair chosen twice or not in the subset, or a probability
                outside [0, 1].
        """
        num_steps = len(self.order)
        for name in _STEP_FIELDS:
            _check_length(name, getattr(self, name), num_steps, "one for each step of 'order'")
        if self.order_gains is not None:
            _check_length("order_gains", self.order_gains, num_steps, "one for each step of 'order'")
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
                raise LedgerError(f"'selection_probabilities' must lie in [0, 1], got {list(probabilities)}")

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> Self:
        """Build a row from a decoded JSON object; keys that are not fields are ignored.

        Args:
            record: one object of the ledger.

        Returns:
            The row.

        Raises:
            LedgerError: a key is missing, or a value has the wrong type, length or range.
        """
        missing = sorted({field.name for field in dataclasses.fields(cls)} - set(record))
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


def read_ledger(path: Path) -> list[LedgerRow]:
    """Read a run's ledger, one trajectory a line.

    Args:
        path: the `trajectories.jsonl` of a run.

    Returns:
        The rows in file order; an empty file gives an empty list.

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


@dataclass(frozen=True, slots=True)
class Mean:
    """A sample mean with its standard error.

    Attributes:
        value: the mean.
        standard_error: sample standard deviation (ddof 1) over the square root of `count`.
        count: number of values.
    """

    value: float
    standard_error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Take the mean of at least two values."""
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))

    def __str__(self) -> str:
        """Show the mean with its sign and its standard error."""
        return f"{self.value:+.4f} ± {self.standard_error:.4f}"


@dataclass(frozen=True, slots=True)
class Change:
    """The first third of a run's episodes against the last third.

    Attributes:
        first: mean over the first third.
        last: mean over the last third.
    """

    first: Mean
    last: Mean

    @property
    def difference(self) -> float:
        """Last minus first."""
        return self.last.value - self.first.value

    @property
    def standard_error(self) -> float:
        """Standard error of the difference of two independent means."""
        return math.hypot(self.first.standard_error, self.last.standard_error)

    @property
    def half_width(self) -> float:
        """Half the width of the 95% interval around the difference (Welch's t)."""
        if self.standard_error == 0.0:
            return 0.0
        return self.standard_error * _student_quantile(_welch_degrees(self.first, self.last))

    @property
    def direction(self) -> int:
        """+1 or -1 where the 95% interval of the difference excludes 0, else 0."""
        if abs(self.difference) <= self.half_width:
            return 0
        return 1 if self.difference > 0.0 else -1


def compare_thirds(values: Sequence[float]) -> Change | None:
    """Compare the first third of a series with its last third.

    Args:
        values: one value for each episode, in episode order; taken as independent draws.

    Returns:
        The comparison, or None where a third would hold fewer than four values.
    """
    third = len(values) // 3
    if third < _MIN_EPISODES_PER_THIRD:
        return None
    return Change(Mean.of(values[:third]), Mean.of(values[-third:]))


def summarize_run(
    rows: Sequence[LedgerRow],
    log_history: Sequence[Mapping[str, float]],
    run: Mapping[str, str | int | float | bool | None],
) -> str:
    """Say in Markdown what a run changed, with the uncertainty of each figure.

    Args:
        rows: the run's ledger.
        log_history: metrics as logged, one mapping a step; a metric absent everywhere is reported as not logged.
        run: names and values to list beside the figures (model, data set, commit, seed, settings).

    Returns:
        A Markdown document that ends in a newline. Rewards and gains are in nats per value token.
    """
    ordered = sorted(rows, key=lambda row: row.episode)
    parts = ["# What this run changed", ""]
    if not ordered:
        parts += ["The ledger holds no trajectories: nothing was rolled out, so there is nothing to compare.", ""]
        parts += [*_settings_section(run)]
        return "\n".join(parts)
    changes = _measure_changes(ordered)
    parts += [" ".join(_verdict_section(ordered, changes, _num_updates(log_history))), ""]
    if changes:
        parts += [*_changes_section(ordered, changes), ""]
    parts += [*_run_section(ordered, log_history), ""]
    parts += [*_best_section(ordered), ""]
    parts += [*_settings_section(run)]
    return "\n".join(parts)


def write_report(
    output_dir: Path,
    log_history: Sequence[Mapping[str, float]],
    run: Mapping[str, str | int | float | bool | None] | None = None,
) -> list[Path]:
    """Write plots and `summary.md` of a run into `output_dir/report/`.

    Args:
        output_dir: folder of the run, which holds its ledger.
        log_history: metrics as logged, one mapping a step.
        run: names and values for the summary's list of settings.

    Returns:
        The files written, `summary.md` first.

    Raises:
        FileNotFoundError: the run has no ledger.
        LedgerError: a line of the ledger is not a trajectory.
        ImportError: matplotlib is not installed.
    """
    rows = read_ledger(output_dir / LEDGER_NAME)
    folder = output_dir / REPORT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    plots = [
        plot_rewards(log_history, folder / "rewards.png"),
        plot_gains(log_history, folder / "gains.png"),
        plot_kl(log_history, folder / "kl.png"),
        plot_selection(rows, folder / "selection.png"),
    ]
    images = [f"![{plot.stem}]({plot.name})\n" for plot in plots]
    summary = folder / "summary.md"
    text = summarize_run(rows, log_history, run or {})
    summary.write_text("\n".join([text, "## Plots\n", *images]), encoding="utf-8")
    return [summary, *plots]


def escape_control_characters(text: str) -> str:
    r"""Show control, formatting and unpaired characters as escapes, so that text cannot act on a terminal or page.

    Args:
        text: any text, such as a decoded query.

    Returns:
        The text with every unprintable character as `\n`, `\x1b` or `\u202e`; a no-break space becomes a space.
    """
    spaced = text.replace("\N{NO-BREAK SPACE}", " ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in spaced)


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


def _verdict(value: object) -> Verdict:
    match value:
        case "kept" | "below_threshold" | "warmup":
            return value
    raise LedgerError(f"'verdict' must be kept, below_threshold or warmup, got {value!r}")


def _welch_degrees(first: Mean, last: Mean) -> float:
    a, b = first.standard_error**2, last.standard_error**2
    return (a + b) ** 2 / (a**2 / (first.count - 1) + b**2 / (last.count - 1))


def _student_quantile(degrees: float) -> float:
    """Two-sided 95% quantile of Student's t by its expansion around the normal one (within 1% from 3 degrees up)."""
    z = statistics.NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2.0)
    first = (z**3 + z) / 4.0
    second = (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / 96.0
    third = (3.0 * z**7 + 19.0 * z**5 + 17.0 * z**3 - 15.0 * z) / 384.0
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _measure_changes(ordered: Sequence[LedgerRow]) -> dict[str, Change]:
    """Compare thirds for each reward term; empty where the run is too short."""
    series = {
        "reward": [row.reward for row in ordered],
        "query gain": [row.query_gain for row in ordered],
        "model gain": [row.model_gain for row in ordered],
    }
    gains = [row.order_gains for row in ordered]
    order_gains = [statistics.fmean(values) for values in gains if values is not None]
    if len(order_gains) == len(ordered):
        series["order gain"] = order_gains
    compared = {name: compare_thirds(values) for name, values in series.items()}
    return {name: change for name, change in compared.items() if change is not None}


def _num_updates(log_history: Sequence[Mapping[str, float]]) -> int | None:
    """Optimizer updates so far at the last step that logged them."""
    logged = [entry["updates"] for entry in log_history if "updates" in entry]
    return int(logged[-1]) if logged else None


def _verdict_section(rows: Sequence[LedgerRow], changes: Mapping[str, Change], updates: int | None) -> list[str]:
    sentences = []
    if updates == 0 or not any(row.verdict == "kept" for row in rows):
        sentences.append(
            "**No optimizer update was made**: the weights are the ones the run started with, and any difference "
            "below is chance or a difference between articles."
        )
    if not changes:
        sentences.append(
            f"**Too short to tell**: {len(rows)} episodes; a comparison of the first with the last third needs at "
            f"least {3 * _MIN_EPISODES_PER_THIRD}."
        )
        return sentences
    sentences += [_reward_sentence(changes["reward"]), _parts_sentence(changes["query gain"], changes["model gain"])]
    sentences.append(_level_sentence(changes["query gain"].last))
    return sentences


def _reward_sentence(change: Change) -> str:
    amount = f"{change.difference:+.4f} ± {change.standard_error:.4f} nats per token"
    outcome = {1: "rose", 0: "did not change distinguishably", -1: "**fell**"}[change.direction]
    return f"From the first to the last third of the episodes the reward {outcome} ({amount})."


def _parts_sentence(query: Change, model: Change) -> str:
    judged = "the queries got better by the frozen base model's judgement"
    match query.direction, model.direction:
        case 1, 1:
            return f"Both of its parts rose: {judged}, and so did the reader."
        case 1, _:
            return f"**Only the query gain rose**: {judged}; the model gain {_moved(model)}."
        case _, 1:
            return (
                "**Only the model gain rose**: the model predicts the values better after the same queries, and "
                f"nothing here shows that it asks better ones (the query gain {_moved(query)})."
            )
        case _:
            return f"Neither part rose: the query gain {_moved(query)}, the model gain {_moved(model)}."


def _moved(change: Change) -> str:
    return {1: "rose", 0: "did not change distinguishably", -1: "fell"}[change.direction]


def _level_sentence(query_gain: Mean) -> str:
    half_width = query_gain.standard_error * _student_quantile(query_gain.count - 1)
    if abs(query_gain.value) <= half_width:
        standing = "not distinguishable from those the base model samples for itself"
    else:
        standing = f"{'better' if query_gain.value > 0.0 else 'worse'} than those the base model samples for itself"
    return (
        f"In the last third the policy's queries are {standing} (query gain {query_gain}); whether they beat an empty "
        "query is for the evaluation to say."
    )


def _changes_section(rows: Sequence[LedgerRow], changes: Mapping[str, Change]) -> list[str]:
    third = len(rows) // 3
    lines = [
        "## First third against last third",
        "",
        f"Episodes {rows[0].episode} to {rows[third - 1].episode} against {rows[-third].episode} to "
        f"{rows[-1].episode}, every trajectory counted, kept or not; nats per value token, mean ± standard error, "
        "episodes taken as independent.",
        "",
        "| | first third | last third | difference | 95% interval of the difference | distinguishable from 0 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, change in changes.items():
        low, high = change.difference - change.half_width, change.difference + change.half_width
        lines.append(
            f"| {name} | {change.first} | {change.last} | {change.difference:+.4f} ± {change.standard_error:.4f} "
            f"| {low:+.4f} to {high:+.4f} | {'yes' if change.direction else 'no'} |"
        )
    return lines


def _run_section(rows: Sequence[LedgerRow], log_history: Sequence[Mapping[str, float]]) -> list[str]:
    kept_by_step: dict[int, int] = {}
    for row in rows:
        kept_by_step[row.step] = kept_by_step.get(row.step, 0) + (row.verdict == "kept")
    updates = _num_updates(log_history)
    num_kept, num_warmup = sum(kept_by_step.values()), sum(row.verdict == "warmup" for row in rows)
    judged = len(rows) - num_warmup
    figures = {
        "episodes": f"{len(rows)}, of which {num_warmup} in warm-up",
        "optimizer updates": _NOT_LOGGED if updates is None else str(updates),
        "steps skipped because nothing was kept": f"{list(kept_by_step.values()).count(0)} of {len(kept_by_step)}",
        "kept after warm-up": f"{num_kept} of {judged} ({num_kept / judged:.1%})" if judged else "nothing was judged",
        "selector entropy": _selector_figure(rows),
        "time": _time_figure(log_history),
        "tokens per second, mean of the logged steps": _logged_mean(log_history, "tokens_per_second"),
        "peak memory": _logged_peak(log_history, "peak_memory_gib"),
    }
    return ["## The run", "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in figures.items())]


def _selector_figure(rows: Sequence[LedgerRow]) -> str:
    """Entropy of the selections of a trajectory, beside that of uniform choices among the pairs left."""
    third = max(1, len(rows) // 3)
    parts = []
    for name, part in (("first", rows[:third]), ("last", rows[-third:])):
        entropies, largest = zip(*(_selector_entropies(row) for row in part), strict=True)
        total, limit = math.fsum(entropies), math.fsum(largest)
        if limit == 0.0:
            return "nothing to choose: every step had a single pair left"
        parts.append(
            f"{total / len(part):.3f} of at most {limit / len(part):.3f} nats a trajectory ({total / limit:.1%}) "
            f"in the {name} third"
        )
    return ", ".join(parts)


def _selector_entropies(row: LedgerRow) -> tuple[float, float]:
    """Sum over steps of the selection's entropy, and of the largest it could have, in nats."""
    entropy = -math.fsum(p * math.log(p) for step in row.selection_probabilities for p in step if p > 0.0)
    largest = math.fsum(math.log(len(row.pair_numbers) - used) for used in range(len(row.order)))
    return entropy, largest


def _logged(log_history: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [entry[name] for entry in log_history if name in entry]


def _time_figure(log_history: Sequence[Mapping[str, float]]) -> str:
    rollout = math.fsum(_logged(log_history, "rollout_seconds"))
    update = math.fsum(_logged(log_history, "update_seconds"))
    if rollout + update <= 0.0:
        return _NOT_LOGGED
    share = rollout / (rollout + update)
    return f"rollout {share:.0%} ({rollout:.1f} s), update {1.0 - share:.0%} ({update:.1f} s), over the logged steps"


def _logged_mean(log_history: Sequence[Mapping[str, float]], name: str) -> str:
    values = _logged(log_history, name)
    return f"{statistics.fmean(values):.1f}" if values else _NOT_LOGGED


def _logged_peak(log_history: Sequence[Mapping[str, float]], name: str) -> str:
    values = _logged(log_history, name)
    return f"{max(values):.2f} GiB" if values else _NOT_LOGGED


def _best_section(rows: Sequence[LedgerRow]) -> list[str]:
    best = max(rows, key=lambda row: row.reward)
    steps = zip(best.order, best.chosen_probabilities, best.step_rewards, best.queries, best.values, strict=True)
    lines = [
        f"{escape_control_characters(best.title)} (episode {best.episode}, {best.verdict.replace('_', ' ')}): "
        f"reward {best.reward:+.4f} = query gain {best.query_gain:+.4f} + model gain {best.model_gain:+.4f}"
    ]
    for number, (pair, probability, reward, query, value) in enumerate(steps, start=1):
        lines += [
            "",
            f"step {number}: pair {pair}, probability {probability:.3f}, reward {reward:+.4f}",
            f"  query: {escape_control_characters(query)}",
            f"  value: {escape_control_characters(value)}",
        ]
    return ["## Best trajectory", "", "The highest reward of all: one draw, not a typical one.", "", *_fenced(lines)]


def _fenced(lines: Sequence[str]) -> list[str]:
    # A fence ends at the first run of backticks as long as itself, and model text may hold any run.
    runs = [len(run) for line in lines for run in re.findall("`+", line)]
    fence = "`" * max(3, max(runs, default=0) + 1)
    return [f"{fence}text", *lines, fence]


def _settings_section(run: Mapping[str, str | int | float | bool | None]) -> list[str]:
    if not run:
        return []
    rows = [f"| {_table_cell(name)} | {_table_cell(str(value))} |" for name, value in run.items()]
    return ["## Settings", "", "| | |", "| --- | --- |", *rows, ""]


def _table_cell(text: str) -> str:
    """Keep a text from being read as Markdown or HTML inside a table."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", escape_control_characters(text))
