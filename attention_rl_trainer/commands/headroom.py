"""``attention-rl headroom``: what an order of reading could be worth on some data, and whether keys can tell it.

    attention-rl headroom my_rows.jsonl --dataset_key_column title --dataset_value_column text
    attention-rl headroom --config twenty_questions

Nothing is trained. The untouched base model reads memories of the data, as `evaluation.headroom` says; the figures are
those of memories that nothing was fitted to, and are written to ``output_dir`` as JSON too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attention_rl_trainer.commands.measured import Measured, MeasuredData, MeasuredModel
from attention_rl_trainer.commands.parsing import CommandParser
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.evaluation.headroom import (
    Headroom,
    articles_of,
    expect_measurable,
    measure_headroom,
    read_tables,
)
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.planning.preflight import expect_tokens

FILE_NAME = "headroom.json"


@dataclass
class HeadroomData(MeasuredData):
    """What is read."""

    dataset_eval_name: str | None = field(
        default=None, metadata={"help": "What to measure on. Default: every third article, which is not fitted to."}
    )

    headroom_memories: int = field(
        default=300, metadata={"help": "Memories that readers of keys are fitted to; half as many are measured on."}
    )

    def __post_init__(self) -> None:
        """Check the number."""
        if self.headroom_memories < 10:
            raise ValueError(f"headroom_memories must be 10 or more, got {self.headroom_memories}")


def parser() -> CommandParser:
    """Make the parser of the command line."""
    kinds = (HeadroomData, AttentionGuidedRLConfig, MeasuredModel)
    purpose = "What an order of reading could be worth on some data, and whether keys can tell it; nothing is trained."
    # The file is that of a training run, which has more options than matter here.
    return CommandParser("headroom", purpose, kinds, positional="dataset", takes_any_file=True)


def main(flags: Sequence[str], console: Console | None = None) -> int:
    """Parse, read, fit, write and print, by default to standard output; returns the exit code."""
    data, config, model = parser().parse(flags)
    measured, count = Measured(config, model), data.headroom_memories
    expect_tokens(measured.model, measured.layout.told_tokens(0, 2), "a value is read after another one")
    fitted_to: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    if data.dataset_eval_name is None:
        _, every, _ = measured.memories(data, count + count // 2, 0)
        memories, others = _by_article(every)
    else:
        _, memories, others = measured.memories(data, count, count // 2)
        # Articles are numbered in each split.
        fitted_to = data.dataset_name, data.dataset_train_split
        held_out = data.dataset_eval_name, data.dataset_eval_split
    parts = [(memories, articles_of(memories, *fitted_to)), (others, articles_of(others, *held_out))]
    expect_measurable(*(articles for _, articles in parts))
    tables = [
        read_tables(measured.policy, measured.layout, *part, show_progress=not config.disable_tqdm) for part in parts
    ]
    found = measure_headroom(*tables)
    folder = Path(str(config.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(found.to_json() + "\n", encoding="utf-8")
    console = console or Console()
    console.print(readers_table(found))
    where = data.dataset_eval_name or "a third of the articles, which were not fitted to"
    console.print(
        f"Best less blind choice of what to read first, nats per token of the other values, on {len(others)} memories "
        f"({where}); written to {folder / FILE_NAME}"
    )
    console.print(f"headroom: {found.headroom}", highlight=False, markup=False)
    console.print(f"keys_tell: {found.best.share}", highlight=False, markup=False)
    return 0


def _by_article(memories: MemoryBatch) -> tuple[MemoryBatch, MemoryBatch]:
    """Keep the memories of every third article to measure on: where there are few articles, they come again."""
    numbers = {number: place for place, number in enumerate(dict.fromkeys(a.article_index for a in memories.articles))}
    is_held_out = [numbers[article.article_index] % 3 == 2 for article in memories.articles]
    fitted_to, held_out = ([row for row, held in enumerate(is_held_out) if held is wanted] for wanted in (False, True))
    return memories.select_rows(fitted_to), memories.select_rows(held_out)


def readers_table(found: Headroom) -> Table:
    """List the readers of keys and what each earned, the one that is reported marked."""
    title = f"What keys tell, fitted to {found.num_fitted} memories"
    table = Table(title=title, title_justify="left")
    table.add_column("reader")
    for name in ("earns, nats per token", "share of the headroom", "reported"):
        table.add_column(name, justify="right")
    for reader in found.readers:
        mark = "yes" if reader is found.best else ""
        table.add_row(reader.name, Text(str(reader.gain)), Text(str(reader.share)), mark)
    return table
