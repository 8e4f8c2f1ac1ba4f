"""Runs into one HTML file: numbers and texts as JSON, tables and pictures of intervals as HTML, curves by its scripts.

All that a run brings, titles and model text above all, is escaped: by jinja2 where it is HTML, and as JSON that holds
no character that could end its element. The page's policy lets no other script run than its own, and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attention_rl_trainer.durability.staging import staged_files
from attention_rl_trainer.pages.curves import log_columns, point_columns, rounded, step_columns
from attention_rl_trainer.pages.intervals import (
    Picture,
    picture_of_differences,
    picture_of_thirds,
    pictures_of_evaluation,
)
from attention_rl_trainer.pages.picks import choose_episodes, find_meetings
from attention_rl_trainer.pages.run import Run
from attention_rl_trainer.records.ledger import LedgerRow
from attention_rl_trainer.records.summary import measure_changes, verdict_sentences
from attention_rl_trainer.records.thirds import MIN_EPISODES_PER_THIRD, Change, Mean

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE_NAME = "index.html"
TRAJECTORY_BYTES = 12_000_000
"""Room for the trajectories of a page, all its runs together."""
MAX_CHARACTERS = 600
_SCRIPTS = ("base", "curves", "filter", "heat", "trajectories", "main")


def write_page(runs: Sequence[Run], folder: Path) -> Path:
    """Write the page of a run, or of two that are compared, into a folder, which is made if it is missing.

    Raises:
        ImportError: jinja2 is not installed.
        StagingError: the system refused a write.
    """
    html = render_page(runs)
    with staged_files(folder) as staging:
        (staging / PAGE_NAME).write_text(html, encoding="utf-8")
    return folder / PAGE_NAME


def render_page(runs: Sequence[Run], trajectory_bytes: int = TRAJECTORY_BYTES) -> str:
    """Make the page of a run, or of two that are compared.

    Args:
        runs: one or two.
        trajectory_bytes: room for their trajectories; of those that do not fit a part is shown, and the page says so.
    """
    environment = _environment()
    views = [view_of(run, trajectory_bytes // len(runs)) for run in runs]
    script = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    return environment.get_template("report.html").render(
        runs=runs,
        views=views,
        comparison=_comparison(runs),
        evaluations=_evaluations(runs),
        options=_option_rows([run.options for run in runs]),
        settings=_option_rows([run.settings for run in runs]),
        style=_asset("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        drawn={"runs": [view["drawn"] for view in views]},
    )


def _environment() -> Environment:
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise ImportError('a page needs jinja2: pip install "attention-rl-trainer[report]"') from error
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    # Escapes all that is not ASCII, line separators and lone surrogates too; the filter itself escapes <, >, & and '.
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": True,
        "separators": (",", ":"),
        "allow_nan": False,
    }
    return environment


def _asset(name: str) -> str:
    return files("attention_rl_trainer.pages").joinpath("assets", name).read_text(encoding="utf-8")


# ---- A run ----


def view_of(run: Run, trajectory_bytes: int) -> dict[str, Any]:
    """Prepare what a page says and draws of a run."""
    changes = measure_changes(run.rows)
    meetings = find_meetings(run.rows)
    shown = {row.episode: trajectory_record(row) for row in run.rows}
    sizes = [len(json.dumps(record)) for record in shown.values()]
    chosen = choose_episodes(run.rows, sizes, meetings, trajectory_bytes)
    drawn = {
        "name": run.name,
        "steps": step_columns(run.rows),
        "log": log_columns(run.log_history),
        "points": point_columns(run.rows),
        "trajectories": [record for episode, record in shown.items() if episode in chosen],
        "meetings": [
            {"first": meeting.first.episode, "last": meeting.last.episode, "same": meeting.is_same_memory}
            for meeting in meetings
            if {meeting.first.episode, meeting.last.episode} <= chosen
        ],
    }
    return {
        "verdict": _verdict(run.rows, changes),
        "pictures": [picture_of_thirds(changes), _differences(changes)] if changes else [],
        "tiles": _tiles(run, changes),
        "status": _status(run),
        "notes": [*run.notes, *_notes_on_size(run, drawn, len(chosen))],
        "drawn": drawn,
    }


def trajectory_record(row: LedgerRow) -> dict[str, object]:
    """Write a trajectory down for the page's scripts, texts shortened and numbers rounded."""
    record: dict[str, object] = {
        "episode": row.episode,
        "step": row.step,
        "epoch": row.epoch,
        "article": row.article_index,
        "title": shortened(row.title),
        "source": shortened(row.source),
        "pairs": row.pair_numbers,
        "order": row.order,
        "reward": rounded(row.reward),
        "rewards": [rounded(value) for value in row.step_rewards],
        "query_gains": [rounded(value) for value in row.query_gains],
        "model_gains": [rounded(value) for value in row.model_gains],
        "threshold": None if row.threshold is None else rounded(row.threshold),
        "verdict": row.verdict,
        "probabilities": [[round(value, 4) for value in step] for step in row.selection_probabilities],
        "queries": [shortened(text) for text in row.queries],
        "keys": [shortened(text) for text in row.keys],
        "values": [shortened(text) for text in row.values],
    }
    if row.token_gains is not None:
        record["tokens"] = [[[shortened(text), rounded(gain)] for text, gain in step] for step in row.token_gains]
    return record


def shortened(text: str) -> str:
    """Cut a text that no one would read to its end, with an ellipsis."""
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _verdict(rows: Sequence[LedgerRow], changes: Mapping[str, Change]) -> list[list[tuple[str, bool]]]:
    """Say what changed: sentences as pieces of text, each with whether it is emphasized."""
    if not rows:
        return []
    return [
        [(piece, number % 2 == 1) for number, piece in enumerate(sentence.split("**")) if piece]
        for sentence in verdict_sentences(rows, changes)
    ]


def _differences(changes: Mapping[str, Change]) -> Picture:
    return picture_of_differences(changes, "Last third less first third", "95% intervals of the difference.")


def _tiles(run: Run, changes: Mapping[str, Change]) -> list[tuple[str, str, str]]:
    """The main figures: name, figure, and what it is or how sure it is."""
    planned = "" if run.planned_episodes is None else f"of {run.planned_episodes:,}"
    tiles = [("episodes", f"{run.num_episodes:,}", planned)]
    updates = [entry for entry in run.log_history if "updates" in entry]
    if updates:
        tiles.append(("optimizer updates", f"{updates[-1]['updates']:,.0f}", "as logged"))
    judged = [row for row in run.rows if row.verdict != "warmup"]
    if judged:
        num_kept = sum(row.verdict == "kept" for row in judged)
        tiles.append(("kept", f"{num_kept / len(judged):.0%}", f"of {len(judged):,} judged"))
    names = {"reward": "reward", "query gain": "query gain", "model gain": "model gain"}
    for name, shown in names.items():
        if name in changes:
            tiles.append((shown, f"{changes[name].last.value:+.3f}", _surety(changes[name].last)))
    return tiles


def _surety(mean: Mean) -> str:
    return f"± {mean.half_width:.3f} nats per token, last third"


def _status(run: Run) -> str:
    written = "" if run.written is None else f" Ledger last written {run.written:%Y-%m-%d %H:%M} UTC."
    planned = run.planned_episodes
    if planned is None:
        return written.strip()
    if run.num_episodes >= planned:
        return f"Finished: {run.num_episodes:,} episodes.{written}"
    return f"Under way, or stopped early: {run.num_episodes:,} of {planned:,} episodes.{written}"


def _notes_on_size(run: Run, drawn: Mapping[str, Any], num_chosen: int) -> list[str]:
    notes = []
    if num_chosen < len(run.rows):
        notes.append(
            f"The page holds {num_chosen:,} of the {len(run.rows):,} trajectories: those of the first and of the last "
            "step, the best and the worst, memories that were read early and late, and a part of the rest, evenly. "
            "Curves, shares and comparisons are of all."
        )
    num_points = len(drawn["points"]["episode"])
    if num_points < len(run.rows):
        notes.append(f"The filter's picture shows {num_points:,} of the {len(run.rows):,} trajectories, evenly.")
    num_steps, num_groups = len({row.step for row in run.rows}), len(drawn["steps"]["step"])
    if num_groups < num_steps:
        notes.append(f"Curves are of {num_groups:,} groups of the {num_steps:,} steps, each with all its trajectories.")
    if any(len(text) > MAX_CHARACTERS for row in run.rows for text in (*row.queries, *row.keys, *row.values)):
        notes.append(f"Texts are cut at {MAX_CHARACTERS} characters.")
    if run.rows and len(run.rows) < 3 * MIN_EPISODES_PER_THIRD:
        notes.append(f"Below {3 * MIN_EPISODES_PER_THIRD} episodes first and last third are not compared.")
    return notes


# ---- Beside one another ----


def _comparison(runs: Sequence[Run]) -> Picture | None:
    """Draw the second run's last third less that of the first."""
    if len(runs) < 2:
        return None
    changes = [measure_changes(run.rows) for run in runs]
    if not all(changes):
        return None
    thirds = [
        {"reward": [row.reward for row in part], "query gain": [row.query_gain for row in part]}
        | {"model gain": [row.model_gain for row in part]}
        for part in (run.rows[-(len(run.rows) // 3) :] for run in runs)
    ]
    between = {name: Change.between(thirds[0][name], thirds[1][name]) for name in thirds[0]}
    return picture_of_differences(
        between,
        f"{runs[1].name} less {runs[0].name}",
        "Last third of each; 95% intervals (Welch), episodes taken as independent.",
    )


def _evaluations(runs: Sequence[Run]) -> dict[str, list[Picture]]:
    names = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    labels = [run.name for run in runs]
    return {name: pictures_of_evaluation([run.evaluations.get(name) for run in runs], labels) for name in names}


def _option_rows(tables: Sequence[Mapping[str, object]]) -> list[tuple[str, list[str], bool]]:
    """Write options beside one another: name, the value in each run, and whether they differ."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = []
    for name in names:
        values = [_written(table[name]) if name in table else "" for table in tables]
        rows.append((name, values, len(set(values)) > 1))
    return rows


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
