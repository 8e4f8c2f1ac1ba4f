"""``attention-rl calibrate``: which heads of a model hear a query, and how well they find what it names.

    attention-rl calibrate --config recommended

takes the options of a run, fits the selector to its training articles as the run itself would, measures it on others,
and writes the calibration and a picture of the heads into ``output_dir``, or, where a run is there, into its folder
``calibration``. Nothing is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from attention_rl_trainer.commands.measured import Measured, MeasuredData, MeasuredModel
from attention_rl_trainer.commands.parsing import CommandParser
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.episodes import RUN_CONFIG_NAME
from attention_rl_trainer.probing.calibrate import Fitted, Probe
from attention_rl_trainer.probing.calibrated import CALIBRATED, is_calibrated
from attention_rl_trainer.probing.picture import plot_heads
from attention_rl_trainer.records.identity import calibration_origin

logger = logging.getLogger(__name__)

PICTURE_NAME = "heads.png"


def parser() -> CommandParser:
    """Make the parser of the command line."""
    kinds = (MeasuredData, AttentionGuidedRLConfig, MeasuredModel)
    purpose = "Fit the selector to training articles as a run would, and measure it on others; nothing is trained."
    # The file is that of a training run, which has more options than matter here.
    return CommandParser("calibrate", purpose, kinds, takes_any_file=True)


def main(flags: Sequence[str], console: Console | None = None) -> int:
    """Parse, fit, measure, write and print, by default to standard output; returns the exit code."""
    data, config, model = parser().parse(flags)
    if not is_calibrated(config, config):
        logger.info("The options fit nothing; measured is the calibrated selector: %s", CALIBRATED)
        config = replace(config, **CALIBRATED)
    folder = _beside_a_run(Path(str(config.output_dir)))
    measured, count = Measured(config, model), config.calibration_memories
    probe = Probe(measured.policy, measured.layout, config, config, show_progress=not config.disable_tqdm)
    articles, memories, held_out = measured.memories(data, count, count)
    fitted = probe.fit(memories, calibration_origin(measured.model, measured.tokenizer, articles, config))
    figures = probe.figures(fitted.calibration, held_out)
    folder.mkdir(parents=True, exist_ok=True)
    written = fitted.calibration.save(folder)
    console = console or Console()
    console.print(heads_table(fitted, len(memories) // 2))
    console.print(f"temperature {fitted.calibration.temperature:.4g}; written to {written}")
    try:
        picture = plot_heads(fitted.heads, fitted.calibration.heads, folder / PICTURE_NAME)
        console.print(f"heads in {picture}")
    except ImportError:
        console.print('no picture: matplotlib is missing: pip install "attention-rl-trainer[report]"', markup=False)
    where = data.dataset_eval_name or "memories of training that were not fitted to"
    console.print(f"Half of a key on {len(held_out)} memories ({where}), chance {figures['chance']:.3f}:")
    for name in ("p_right", "p_right_literal", "selection_information"):
        console.print(f"{name}: {figures[name]:.3f}", highlight=False)
    return 0


def _beside_a_run(folder: Path) -> Path:
    """Return where to write: in the folder of a run, apart from what its adapter was trained with."""
    return folder / "calibration" if (folder / RUN_CONFIG_NAME).is_file() else folder


def heads_table(fitted: Fitted, num_memories: int, num_rows: int = 20) -> Table:
    """List the best heads, those that select marked."""
    chosen = fitted.calibration.heads or ()
    scores = fitted.heads
    count = min(num_rows, sum(len(values) for values in scores.accuracy.values()))
    table = Table(title=f"Heads that find a pair by half of its key, on {num_memories} memories", title_justify="left")
    for name in ("layer.head", "finds it first", "selects"):
        table.add_column(name, justify="right")
    for number in scores.best(count):
        accuracy = float(scores.accuracy[number.layer][number.head])
        table.add_row(str(number), f"{accuracy:.3f}", "yes" if number in chosen else "")
    return table
