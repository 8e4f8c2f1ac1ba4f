"""A run's folder into what a page shows of it, as far as it is there: a run may be under way, broken or an old one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from attention_rl_trainer.durability.staging import list_checkpoints
from attention_rl_trainer.records.ledger import LEDGER_NAME, LedgerRow
from attention_rl_trainer.records.summary import REPORT_FOLDER, SUMMARY_NAME, read_settings

OPTIONS_NAME = "attention_rl_config.json"
"""The trainer's; to import it from there takes seconds."""
LOG_NAME = "trainer_state.json"
"""The Trainer's own."""
EVALUATIONS = "evaluation"
EVALUATION_NAME = "evaluation.json"

Figures: TypeAlias = dict[str, dict[str, object]]
"""Estimates by the table that they are in and by name, as an evaluation writes them."""


@dataclass(frozen=True)
class Run:
    """What is in a run's folder."""

    name: str
    rows: list[LedgerRow]
    """The ledger, by episode."""
    log_history: list[dict[str, float]]
    """Metrics as logged, those that are finite numbers; of the newest checkpoint whose log can be read."""
    options: dict[str, object]
    """As the run wrote them down; empty where it did not."""
    settings: dict[str, str]
    """What the summary of a finished run lists."""
    evaluations: dict[str, Figures]
    """By the name of the evaluation."""
    written: datetime | None
    """When the ledger was written last."""
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged."""

    @property
    def num_episodes(self) -> int:
        """Episodes done, also where the ledger lost some."""
        return self.rows[-1].episode + 1 if self.rows else 0

    @property
    def planned_episodes(self) -> int | None:
        """Episodes that the run was to have, where its options say so."""
        planned = self.options.get("num_episodes")
        return planned if isinstance(planned, int) else None


def read_run(folder: Path) -> Run:
    """Read a run's folder; what is damaged is left out and noted.

    Raises:
        ValueError: there is neither a ledger nor a file of options.
    """
    ledger = folder / LEDGER_NAME
    if not ledger.is_file() and not (folder / OPTIONS_NAME).is_file():
        raise ValueError(
            f"{folder} is not the folder of a run: it holds neither {LEDGER_NAME} nor {OPTIONS_NAME}; give the "
            "output_dir of a run"
        )
    notes: list[str] = []
    rows = _read_rows(ledger, notes)
    options = _read_object(folder / OPTIONS_NAME, notes)
    written = datetime.fromtimestamp(ledger.stat().st_mtime, UTC) if ledger.is_file() else None
    return Run(
        name=folder.resolve().name,
        rows=rows,
        log_history=_read_log(folder, rows, notes),
        options=options,
        settings=read_settings(folder / REPORT_FOLDER / SUMMARY_NAME),
        evaluations=_read_evaluations(folder / EVALUATIONS, notes),
        written=written,
        notes=notes,
    )


def _read_rows(path: Path, notes: list[str]) -> list[LedgerRow]:
    if not path.is_file():
        notes.append(f"There is no {LEDGER_NAME}: nothing was rolled out yet.")
        return []
    rows: dict[int, LedgerRow] = {}
    damaged: list[int] = []
    repeated = number = 0
    line = b""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = LedgerRow.from_json(_object_of(json.loads(line)))
            except (ValueError, OverflowError, RecursionError):
                damaged.append(number)
                continue
            if row.episode in rows:
                repeated += 1
                continue
            rows[row.episode] = row
    if damaged == [number] and not line.endswith(b"\n"):
        notes.append(
            f"The last line of {LEDGER_NAME} is unfinished and left out, as a run leaves it that is under way or was "
            "killed."
        )
    elif damaged:
        listed = ", ".join(map(str, damaged[:5])) + (f", … ({len(damaged)} in all)" if len(damaged) > 5 else "")
        notes.append(f"Left out of {LEDGER_NAME}, because they are not trajectories: lines {listed}.")
    if repeated:
        notes.append(f"Left out of {LEDGER_NAME}, because their episodes are there before: {repeated} lines.")
    ordered = sorted(rows.values(), key=lambda row: row.episode)
    missing = ordered[-1].episode + 1 - len(ordered) if ordered else 0
    if missing:
        notes.append(f"{missing} of the {ordered[-1].episode + 1} episodes are not in {LEDGER_NAME}.")
    return ordered


def _object_of(decoded: object) -> dict[str, object]:
    if not isinstance(decoded, dict):
        raise ValueError(f"expected a JSON object, got {type(decoded).__name__}")
    return decoded


def is_finite(value: object) -> bool:
    """Tell whether something decoded is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_object(path: Path, notes: list[str]) -> dict[str, object]:
    if not path.is_file():
        notes.append(f"There is no {path.name}.")
        return {}
    try:
        return _object_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {error}.")
        return {}


def _read_log(folder: Path, rows: Sequence[LedgerRow], notes: list[str]) -> list[dict[str, float]]:
    """Read the log of the newest checkpoint that has one."""
    places = [folder, *reversed(list_checkpoints(folder))]
    for place in places:
        path = place / LOG_NAME
        if not path.is_file():
            continue
        state = _read_object(path, notes)
        entries = state.get("log_history")
        if not isinstance(entries, list):
            continue
        numbers = [
            {str(name): float(value) for name, value in entry.items() if is_finite(value)}
            for entry in entries
            if isinstance(entry, dict)
        ]
        logged = int(max((entry["episodes"] for entry in numbers if "episodes" in entry), default=0.0))
        if rows and logged <= rows[-1].episode:
            notes.append(
                f"The log is that of {place.name}, up to episode {logged}; the ledger goes on to episode "
                f"{rows[-1].episode + 1}."
            )
        return numbers
    notes.append(
        f"There is no checkpoint with a {LOG_NAME} yet, so what only the log holds is not shown: KL, entropy of the "
        "queries, selection information."
    )
    return []


def _read_evaluations(folder: Path, notes: list[str]) -> dict[str, Figures]:
    found: dict[str, Figures] = {}
    for path in sorted(folder.glob(f"*/{EVALUATION_NAME}")):
        tables = _read_object(path, notes)
        figures = {name: table for name, table in tables.items() if isinstance(table, dict)}
        if figures:
            found[path.parent.name] = figures
    return found
