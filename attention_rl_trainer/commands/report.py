"""``attention-rl report``: a run as one page to look at, and as plots.

    attention-rl report out/demo
    attention-rl report out/demo --compare out/other

writes ``report/index.html`` into the run's folder, one file that needs no network, and the plots beside it. The run may
be under way, stopped or broken: the page shows what is there, and says what is not.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from attention_rl_trainer.commands.plain import PlainParser
from attention_rl_trainer.durability.staging import staged_files
from attention_rl_trainer.pages.page import write_page
from attention_rl_trainer.pages.run import read_run
from attention_rl_trainer.records.summary import REPORT_FOLDER, draw_plots


def main(flags: Sequence[str]) -> int:
    """Parse, read, write, and print what was written; returns the exit code.

    Raises:
        ValueError: a folder is not that of a run.
        ImportError: jinja2 is not installed.
    """
    parser = PlainParser(
        prog="attention-rl report", description="Write a run as one HTML page that opens anywhere, and its plots."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, its output_dir")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="folder of a second run, drawn beside the first")
    parser.add_argument(
        "--output_dir", type=Path, metavar="FOLDER", help="where page and plots are written (default: RUN/report)"
    )
    parser.add_argument("--no_plots", action="store_true", help="write the page alone, no PNG files")
    arguments = parser.parse_args(flags)
    runs = [read_run(folder) for folder in (arguments.run, arguments.compare) if folder is not None]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=f"{run.name} ({letter})") for run, letter in zip(runs, "AB", strict=True)]
    folder = arguments.output_dir or arguments.run / REPORT_FOLDER
    print(write_page(runs, folder))
    if arguments.no_plots:
        return 0
    if importlib.util.find_spec("matplotlib") is None:
        print('no plots: matplotlib is missing: pip install "attention-rl-trainer[report]"', file=sys.stderr)
        return 0
    with staged_files(folder) as staging:
        plots = draw_plots(runs[0].rows, runs[0].log_history, staging)
    for plot in plots:
        print(folder / plot.name)
    return 0
