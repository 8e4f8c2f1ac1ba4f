"""What a model asked before training and what it asks after it, of the same held-out memories (design §11)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_rl_trainer.durability.staging import staged_files

FILE_NAME = "before_and_after.md"


@dataclass(frozen=True)
class BeforeAndAfter:
    """Two evaluations of a run, as `EvaluationTables.write` wrote them; ``None`` before where there was none."""

    before: Mapping[str, Any] | None
    after: Mapping[str, Any]

    @classmethod
    def read(cls, before: Path, after: Path) -> BeforeAndAfter | None:
        """Read the folders of two evaluations; ``None`` where the second holds no tables."""
        found = [_read(folder) for folder in (before, after)]
        return None if found[1] is None else cls(found[0], found[1])

    def lines(self) -> list[str]:
        """Name the figures of held-out memories that say whether the model learned to ask, one on a line."""
        figures = {
            "over_empty": ("policy_less", "empty query", "nats per token"),
            "names_its_pair": ("parts", "names_its_pair", "of the steps"),
            "different_queries": ("parts", "distinct_queries", f"of {self.after['settings']['T']}"),
        }
        return [
            f"{name}: {self._figure(table, row)} {unit}"
            for name, (table, row, unit) in figures.items()
            if row in self.after[table]
        ]

    def _figure(self, table: str, row: str) -> str:
        after = _with_interval(self.after[table][row])
        if self.before is None or row not in self.before[table]:
            return after
        return f"{after} (before {self.before[table][row]['mean']:+.3f})"

    def to_markdown(self) -> str:
        """Write what was asked side by side, and the figures."""
        parts = ["# What the model asked, before and after training", "\n".join(f"- {line}" for line in self.lines())]
        earlier = [] if self.before is None else self.before["examples"]
        # Both read the same memories in the same order; a title may come again, with another memory.
        for before, item in itertools.zip_longest(earlier[: len(self.after["examples"])], self.after["examples"]):
            is_same = before is not None and before["title"] == item["title"]
            rows = _side_by_side(before["steps"] if is_same else [], item["steps"])
            parts += [f"## {_cell(item['title'])}", rows]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> Path:
        """Write `to_markdown` into a folder."""
        with staged_files(folder) as staging:
            (staging / FILE_NAME).write_text(self.to_markdown(), encoding="utf-8")
        return folder / FILE_NAME


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _with_interval(estimate: Mapping[str, Any]) -> str:
    interval = "" if estimate["low"] is None else f" [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"
    return f"{estimate['mean']:+.3f}{interval}"


def _side_by_side(before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]) -> str:
    lines = ["| step | before it asked | and read | now it asks | and reads |", "| --- | --- | --- | --- | --- |"]
    for number, step in enumerate(after):
        cells = [*(_asked(before[number]) if number < len(before) else ("", "")), *_asked(step)]
        lines.append(f"| {number + 1} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _asked(step: Mapping[str, str]) -> tuple[str, str]:
    return _cell(step["query"]), _cell(f"{step['key'].strip()} → {step['value'].strip()}")


def _cell(text: str) -> str:
    """Make a text one line of a Markdown table; silence is said."""
    line = " ".join(text.split())
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") or "(nothing)"
