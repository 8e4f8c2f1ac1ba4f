"""``attention-rl order``: in which order an adapter reads texts of your own.

    attention-rl order one.txt two.txt three.txt --adapter out/demo
    attention-rl order passages.jsonl --adapter out/demo --context "Who built the bridge?" --top_k 3 --json
    attention-rl order article.txt --adapter out/demo

Several text files are a passage each; a single one is cut into pieces. A line of JSON Lines is a passage (``text``), or
a key and its value (``key``, ``value``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from attention_rl_trainer.commands.plain import PlainParser
from attention_rl_trainer.memories.articles.files import FileRow, file_rows, is_break
from attention_rl_trainer.memories.articles.formats import format_of
from attention_rl_trainer.ordering.orderer import AttentionGuidedOrderer
from attention_rl_trainer.ordering.pieces import NewMemory

_COLUMNS = ("text", "key", "value")
# As wide as a terminal usually is; what is no terminal has no width of its own.
_WIDTH = 120


def main(flags: Sequence[str], console: Console | None = None) -> int:
    """Parse, read, order, and print a table, or JSON, by default to standard output; returns the exit code.

    Raises:
        ValueError: a file cannot be read, there is nothing to order, or the adapter cannot be used.
    """
    arguments = _parser().parse_args(flags)
    memory, labels = read_memory(arguments.files)
    orderer = AttentionGuidedOrderer.from_pretrained(
        arguments.adapter,
        model=arguments.model_name_or_path,
        dtype=arguments.dtype,
        device="cpu" if arguments.use_cpu else None,
    )
    order = orderer.order(
        memory,
        arguments.context,
        top_k=arguments.top_k,
        greedy=not arguments.sample,
        seed=arguments.seed,
        max_value_tokens=arguments.max_value_tokens,
    )
    if arguments.json:
        print(order.to_json(labels))
        return 0
    console = console or Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(order.to_table(labels))
    console.print(order.trust.describe(), highlight=False, markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(prog="attention-rl order", description="In which order an adapter reads texts of your own.")
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="Text files, a passage each; one alone is cut into pieces. Or one file of JSON Lines, each with a 'text', "
        "or with a 'key' and a 'value'.",
    )
    parser.add_argument(
        "--adapter",
        required=True,
        metavar="FOLDER",
        help="A run's folder, or a Hub repository such as user/adapter.",
    )
    parser.add_argument("--context", metavar="TEXT", help="What was read before, such as a question.")
    parser.add_argument("--top_k", type=int, metavar="N", help="Pieces to read. Default: all.")
    parser.add_argument("--max_value_tokens", type=int, metavar="N", help="Longer pieces are read up to here.")
    parser.add_argument("--sample", action="store_true", help="Draw queries and pieces; else the likeliest are taken.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Seed of the draws. Default: 0.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument(
        "--model_name_or_path", metavar="NAME", help="Base model. Default: the one that the adapter was trained on."
    )
    parser.add_argument("--dtype", default="auto", metavar="NAME", help="Precision of its weights. Default: auto.")
    parser.add_argument("--use_cpu", action="store_true", help="Compute on the CPU even if there is a GPU.")
    return parser


def read_memory(files: Sequence[Path]) -> tuple[NewMemory, list[str] | None]:
    """Read what is to be ordered, and a name for each piece; a text that will be cut has none.

    Raises:
        ValueError: a file is not there or cannot be read, or a line lacks what is expected; names it.
    """
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"there is no file {missing[0]}; check the path")
    tables = [path for path in files if format_of(path) == "json"]
    if tables and len(files) > 1:
        raise ValueError(f"{tables[0]} holds passages by itself; give it alone, or only text files")
    if tables:
        rows = list(file_rows([str(tables[0])], "json"))
        return _pieces_of(rows, tables[0]), [f"row {number}" for number in range(1, len(rows) + 1)]
    texts = [_text_of(path) for path in files]
    return (texts[0], None) if len(texts) == 1 else (texts, [str(path) for path in files])


def _text_of(path: Path) -> str:
    (row,) = file_rows([str(path)], "text")
    if is_break(row):
        raise ValueError(str(row["title"]))
    text = str(row["text"])
    if not text.strip():
        raise ValueError(f"the file {str(path)!r} is empty; leave it out")
    return text


def _pieces_of(rows: Sequence[FileRow], path: Path) -> NewMemory:
    """Take passages, or keys with their values, by the columns of the first row."""
    passages, pairs = list[str](), list[tuple[str, str]]()
    for number, row in enumerate(rows):
        if is_break(row):
            raise ValueError(str(row["title"]))
        text, key, value = (row.get(column) for column in _COLUMNS)
        if isinstance(text, str) and text.strip() and not pairs:
            passages.append(text)
        elif all(isinstance(part, str) and part.strip() for part in (key, value)) and not passages:
            pairs.append((str(key), str(value)))
        else:
            columns = "'text'" if passages else "'key' and 'value'" if pairs else "'text', or 'key' and 'value'"
            there = ", ".join(map(repr, row)) or "no column"
            raise ValueError(f"row {number + 1} of {str(path)!r} has no text in {columns}; it has {there}")
    return passages or pairs
