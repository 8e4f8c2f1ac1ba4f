"""A run's ledger and logged metrics into ``report/``: a Markdown summary and plots.

Compares the first third of the episodes with the last third (reward, query gain, model gain: design §7) and says in
plain words what changed and what did not.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attention_rl_trainer.durability.discovery import Fact
from attention_rl_trainer.durability.staging import staged_files
from attention_rl_trainer.records.heat_maps import plot_selection
from attention_rl_trainer.records.ledger import LEDGER_NAME, LedgerRow, read_ledger
from attention_rl_trainer.records.plots import plot_gains, plot_kl, plot_rewards
from attention_rl_trainer.records.thirds import MIN_EPISODES_PER_THIRD, Change, Mean, compare_thirds

REPORT_FOLDER = "report"
SUMMARY_NAME = "summary.md"

_NOT_LOGGED = "not logged"
_SETTINGS = "## Settings\n\n| | |\n| --- | --- |"


@dataclass(frozen=True)
class RunCounts:
    """What a run's state has counted; a ledger may have lost rows, and the last steps may not have been logged."""

    num_episodes: int
    num_updates: int
    """Optimizer steps of the episodes that moved weights."""
    num_warm_start: int = 0
    """Trajectories of the warm start, which has optimizer steps of its own."""


def summarize_run(
    rows: Sequence[LedgerRow],
    log_history: Sequence[Mapping[str, float]],
    run: Mapping[str, Fact],
    *,
    counts: RunCounts | None = None,
) -> str:
    """Say in Markdown what a run changed, with the uncertainty of each figure.

    Args:
        rows: the run's ledger, in any order.
        log_history: metrics as logged, one mapping per log; a metric absent everywhere is reported as not logged.
        run: names and values to list as they are (model, data set, commit, seed, settings).
        counts: of the run's state; without them, what ledger and log say.

    Returns:
        A Markdown document that ends in a newline. Rewards and gains are in nats per value token.
    """
    ordered = sorted(rows, key=lambda row: row.episode)
    parts = ["# What this run changed", ""]
    if not ordered:
        parts += [_nothing_sentence(counts), ""]
        return "\n".join([*parts, *_settings_section(run)])
    changes = measure_changes(ordered)
    parts += [" ".join(verdict_sentences(ordered, changes, counts)), ""]
    if changes:
        parts += [*_changes_section(ordered, changes), ""]
    parts += [*_run_section(ordered, log_history, counts), ""]
    parts += [*_best_section(ordered), ""]
    return "\n".join([*parts, *_settings_section(run)])


def write_report(
    output_dir: Path,
    log_history: Sequence[Mapping[str, float]],
    run: Mapping[str, Fact] | None = None,
    *,
    counts: RunCounts | None = None,
    with_plots: bool = True,
) -> list[Path]:
    """Write `summary.md` and plots of a run into `output_dir/report/`.

    Args:
        output_dir: folder of the run, which holds its ledger.
        log_history: metrics as logged, one mapping per log.
        run: see `summarize_run`, also for ``counts``; by default the settings of the summary that is there.
        with_plots: whether to draw, which needs matplotlib.

    Returns:
        The files written, `summary.md` first.

    Raises:
        FileNotFoundError: the run has no ledger.
        LedgerError: a line of the ledger is not a trajectory.
        ImportError: matplotlib is not installed.
    """
    rows = read_ledger(output_dir / LEDGER_NAME)
    folder = output_dir / REPORT_FOLDER
    settings = read_settings(folder / SUMMARY_NAME) if run is None else run
    text = summarize_run(rows, log_history, settings, counts=counts)
    with staged_files(folder) as staging:
        plots = draw_plots(rows, log_history, staging) if with_plots else []
        if plots:
            text = "\n".join([text, "## Plots\n", *(f"![{plot.stem}]({plot.name})\n" for plot in plots)])
        (staging / SUMMARY_NAME).write_text(text, encoding="utf-8")
    return [folder / name for name in (SUMMARY_NAME, *(plot.name for plot in plots))]


def draw_plots(rows: Sequence[LedgerRow], log_history: Sequence[Mapping[str, float]], folder: Path) -> list[Path]:
    """Draw the plots of a report into a folder that is there; raises an `ImportError` without matplotlib."""
    return [
        plot_rewards(log_history, folder / "rewards.png"),
        plot_gains(rows, folder / "gains.png"),
        plot_kl(log_history, folder / "kl.png"),
        plot_selection(rows, folder / "selection.png"),
    ]


def escape_control_characters(text: str) -> str:
    r"""Show control, formatting and unpaired characters as escapes, so that text cannot act on a terminal or page.

    Returns:
        The text with every unprintable character as `\n`, `\x1b` or `\u202e`; a no-break space becomes a space.
    """
    spaced = text.replace("\N{NO-BREAK SPACE}", " ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in spaced)


def measure_changes(ordered: Sequence[LedgerRow]) -> dict[str, Change]:
    """Compare thirds of the episodes, in their order, for each reward term; empty where the run is too short."""
    series = {
        "reward": [row.reward for row in ordered],
        "query gain": [row.query_gain for row in ordered],
        "model gain": [row.model_gain for row in ordered],
    }
    for name in ("order_gains", "information_gains"):
        gains = [statistics.fmean(values) for row in ordered if (values := getattr(row, name)) is not None]
        if len(gains) == len(ordered):
            series[name.removesuffix("s").replace("_", " ")] = gains
    compared = {name: compare_thirds(values) for name, values in series.items()}
    return {name: change for name, change in compared.items() if change is not None}


def _nothing_sentence(counts: RunCounts | None) -> str:
    if counts is not None and counts.num_episodes > 0:
        return f"The ledger holds none of the {counts.num_episodes} trajectories, so there is nothing to compare."
    return "The ledger holds no trajectories: nothing was rolled out, so there is nothing to compare."


def verdict_sentences(
    rows: Sequence[LedgerRow], changes: Mapping[str, Change], counts: RunCounts | None = None
) -> list[str]:
    """Say in Markdown what changed, a sentence each.

    Args:
        rows: the run's ledger, at least one row.
        changes: of it, from `measure_changes`.
        counts: see `summarize_run`.
    """
    sentences = []
    has_kept = any(row.verdict == "kept" for row in rows)
    if not (has_kept if counts is None else counts.num_updates):
        started = "that the warm start left" if counts is not None and counts.num_warm_start else "the run started with"
        sentences.append(
            f"**No optimizer update was made**: the weights are the ones {started}, and any difference below is chance "
            "or a difference between articles."
        )
    if not changes:
        sentences.append(
            f"**Too short to tell**: {len(rows)} episodes; a comparison of the first with the last third needs at "
            f"least {3 * MIN_EPISODES_PER_THIRD}."
        )
        return sentences
    parts = _parts_sentence(changes["query gain"], changes["model gain"])
    if not all(row.is_reward_their_sum for row in rows):
        parts = f"There are other terms in it than query and model gain. Of these two: {parts}"
    sentences += [_reward_sentence(changes["reward"]), parts]
    sentences.append(_level_sentence(changes["query gain"].last))
    return sentences


def _reward_sentence(change: Change) -> str:
    amount = f"{change.difference:+.4f} ± {change.standard_error:.4f} nats per token"
    outcome = "**fell**" if change.direction < 0 else _moved(change)
    return f"From the first to the last third of the episodes the reward {outcome} ({amount})."


def _parts_sentence(query: Change, model: Change) -> str:
    judged = "the queries got better by the frozen base model's judgement"
    match query.direction, model.direction:
        case 1, 1:
            return f"Both parts rose: {judged}, and so did the reader."
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
    if abs(query_gain.value) <= query_gain.half_width:
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


def _run_section(
    rows: Sequence[LedgerRow], log_history: Sequence[Mapping[str, float]], counts: RunCounts | None
) -> list[str]:
    kept_by_step: dict[int, int] = {}
    for row in rows:
        kept_by_step[row.step] = kept_by_step.get(row.step, 0) + (row.verdict == "kept")
    num_kept, num_warmup = sum(kept_by_step.values()), sum(row.verdict == "warmup" for row in rows)
    judged = len(rows) - num_warmup
    figures = {
        "episodes": _episodes_figure(len(rows), num_warmup, counts),
        "optimizer updates": _updates_figure(len(rows), log_history, counts),
        "steps skipped because nothing was kept": f"{list(kept_by_step.values()).count(0)} of {len(kept_by_step)}",
        "kept after warm-up": f"{num_kept} of {judged} ({num_kept / judged:.1%})" if judged else "nothing was judged",
        "selector entropy": _selector_figure(rows),
        "time": _time_figure(log_history),
        "tokens per second, mean of the logged steps": _speed_figure(log_history),
        "peak memory": _logged_peak(log_history, "peak_memory_gib"),
    }
    return ["## The run", "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in figures.items())]


def _episodes_figure(num_rows: int, num_warmup: int, counts: RunCounts | None) -> str:
    if counts is None or counts.num_episodes == num_rows:
        return f"{num_rows}, of which {num_warmup} in warm-up"
    missing = counts.num_episodes - num_rows
    return f"{counts.num_episodes}, of which {missing} are not in the ledger; of the others {num_warmup} in warm-up"


def _updates_figure(num_rows: int, log_history: Sequence[Mapping[str, float]], counts: RunCounts | None) -> str:
    if counts is not None:
        return str(counts.num_updates)
    logged = [entry for entry in log_history if "updates" in entry]
    if not logged:
        return _NOT_LOGGED
    updates, episodes = int(logged[-1]["updates"]), int(logged[-1].get("episodes", 0))
    if episodes < num_rows:
        return f"at least {updates}, as of episode {episodes}; later steps were not logged"
    return str(updates)


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
            f"{total / len(part):.3f} of at most {limit / len(part):.3f} nats per trajectory ({total / limit:.1%}) "
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


def _speed_figure(log_history: Sequence[Mapping[str, float]]) -> str:
    logged = [entry for entry in log_history if "tokens_per_second" in entry]
    seconds = math.fsum(entry["rollout_seconds"] for entry in logged)
    if seconds <= 0.0:
        return _NOT_LOGGED
    tokens = math.fsum(entry["tokens_per_second"] * entry["rollout_seconds"] for entry in logged)
    return f"{tokens / seconds:.1f}"


def _logged_peak(log_history: Sequence[Mapping[str, float]], name: str) -> str:
    values = _logged(log_history, name)
    return f"{max(values):.2f} GiB" if values else _NOT_LOGGED


def _best_section(rows: Sequence[LedgerRow]) -> list[str]:
    best = max(rows, key=lambda row: row.reward)
    steps = zip(best.order, best.chosen_probabilities, best.step_rewards, best.queries, best.values, strict=True)
    lines = [
        f"{escape_control_characters(best.title)} (episode {best.episode}, {best.verdict.replace('_', ' ')}): "
        f"reward {best.reward:+.4f}{_its_parts(best)}"
    ]
    for number, (pair, probability, reward, query, value) in enumerate(steps, start=1):
        lines += [
            "",
            f"step {number}: pair {pair}, probability {probability:.3f}, reward {reward:+.4f}",
            f"  query: {escape_control_characters(query)}",
            f"  value: {escape_control_characters(value)}",
        ]
    return ["## Best trajectory", "", "The highest reward of all: one draw, not a typical one.", "", *_fenced(lines)]


def _its_parts(row: LedgerRow) -> str:
    gains = f"query gain {row.query_gain:+.4f}", f"model gain {row.model_gain:+.4f}"
    if row.is_reward_their_sum:
        return f" = {gains[0]} + {gains[1]}"
    others = {"order gain": row.order_gains, "information gain": row.information_gains}
    named = [f"{name} {statistics.fmean(found):+.4f}" for name, found in others.items() if found is not None]
    return f", with other terms than its {' and '.join(gains)}{''.join(f', {text}' for text in named)}"


def _fenced(lines: Sequence[str]) -> list[str]:
    # A fence ends at the first run of backticks as long as itself, and model text may hold any run.
    runs = [len(run) for line in lines for run in re.findall("`+", line)]
    fence = "`" * max(3, max(runs, default=0) + 1)
    return [f"{fence}text", *lines, fence]


def _settings_section(run: Mapping[str, Fact]) -> list[str]:
    if not run:
        return []
    rows = [f"| {_table_cell(name)} | {_table_cell(str(value))} |" for name, value in run.items()]
    return [_SETTINGS, *rows, ""]


def read_settings(summary: Path) -> dict[str, str]:
    """Read the settings that a summary lists, as they were given; empty where there is no summary or it lists none."""
    if not summary.is_file():
        return {}
    _, heading, section = summary.read_text(encoding="utf-8").rpartition(f"\n{_SETTINGS}\n")
    if not heading:
        return {}
    rows = re.findall(r"^\| ((?:\\.|[^\\|\n])+) \| ((?:\\.|[^\\|\n])*) \|$", section, re.MULTILINE)
    return {_from_cell(name): _from_cell(value) for name, value in rows}


def _from_cell(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _table_cell(text: str) -> str:
    """Keep a text from being read as Markdown or HTML inside a table."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", escape_control_characters(text))
