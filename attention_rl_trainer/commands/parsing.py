"""A command line, and the options file that it names, into options: TRL's parser, with help by topic and plain errors.

Options stand in groups, the method's own before the Trainer's; of the latter those that cannot act here are taken, so
that they are refused with their reason, but not listed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import Field
from enum import Enum
from inspect import isclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import TrlParser  # type: ignore[attr-defined]  # trl's lazy names are not declared

from attention_rl_trainer.commands.plain import PlainParser
from attention_rl_trainer.config import NAMES_OF_TRL, NOT_OPTIONS, OPTION_GROUPS, AttentionGuidedRLConfig
from attention_rl_trainer.configs import shipped_configs, with_config_path
from attention_rl_trainer.inherited import VERDICTS
from attention_rl_trainer.options import meaning_of, options_by_heading

_TRAINERS = "Trainer (options of transformers.TrainingArguments that act here; all are in docs/training_arguments.md)"
_METAVARS: dict[Any, str] = {dict: "JSON", int: "N", float: "X", str: "TEXT"}


class CommandParser(PlainParser, TrlParser):
    """The options of one command.

    Args:
        command: its name.
        purpose: what it does, in a sentence or two.
        kinds: the dataclasses that are filled. Those other than `AttentionGuidedRLConfig` may name the heading of their
            options in ``_argument_group_name``, as for the Trainer's own parser.
        positional: the option that may stand first without its flag.
        takes_any_file: the options file may be that of another command; what it has beyond ``kinds`` is passed over.
    """

    def __init__(
        self,
        command: str,
        purpose: str,
        kinds: Sequence[type[Any]],
        positional: str | None = None,
        *,
        takes_any_file: bool = False,
    ) -> None:
        self._kinds = tuple(kinds)
        self._positional = positional
        self._takes_any_file = takes_any_file
        self._file = ""
        first = "" if positional is None else f" {positional.upper()}"
        super().__init__(
            _parts(self._kinds),  # type: ignore[arg-type]  # trl annotates what it makes of them
            prog=f"attention-rl {command}",
            usage=f"attention-rl {command}{first} [--config NAME|FILE] [--OPTION VALUE ...] [--debug]",
            description=purpose,
            formatter_class=argparse.HelpFormatter,
        )
        self.add_argument(
            "--config",
            metavar="NAME|FILE",
            default=argparse.SUPPRESS,
            help="Options file (YAML): a path" + _shipped(self._kinds),
        )

    @property
    def _names(self) -> dict[str, str]:
        """Every option by each of its names."""
        names = {}
        for part in self.dataclass_types:
            for item in dataclasses.fields(part):
                names[item.name] = item.name
                names |= {_plain(alias): item.name for alias in item.metadata.get("aliases", ())}
        return names

    def parse(self, flags: Sequence[str]) -> tuple[Any, ...]:
        """Fill the dataclasses, in the order in which they were given.

        Raises:
            ValueError: an option is unknown, lacks its value or is out of range, or the file cannot be read.
        """
        given = with_config_path(flags)
        if self._positional is not None and given and not given[0].startswith("-"):
            given = [f"--{self._positional}", *given]
        if given.count("--config") > 1:
            raise ValueError("--config is given more than once; give one file, and change its options by flags")
        self._file = given[given.index("--config") + 1] if "--config" in given else ""
        try:
            parts = self.parse_args_and_config(given, fail_with_unknown_args=False)
        except yaml.YAMLError as error:
            raise ValueError(f"{self._file} is not valid YAML: {_place_and_problem(error)}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._file} is not a text file in UTF-8: {error}") from error
        values = {name: value for part in parts for name, value in vars(part).items()}
        return tuple(
            kind(**{item.name: values[item.name] for item in dataclasses.fields(kind) if item.init})
            for kind in self._kinds
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        """Parse, and refuse what is unknown.

        Raises:
            ValueError: names the first of it, and what may have been meant.
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [text for text in unknown if text.startswith("-")]
            if not flags:
                raise ValueError(f"{unknown[0]!r} belongs to no option; write --OPTION before a value")
            raise ValueError(self._unknown(flags[0].partition("=")[0], f"{self.prog} --help lists the options"))
        return found, unknown

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take the values of the options file, by any name of an option.

        Raises:
            ValueError: a key is unknown or stands there twice; names it, and what may have been meant.
        """
        names = self._names
        values: dict[str, Any] = {}
        for key, value in config.items():
            name = names.get(_plain(key))
            if name in values:
                raise ValueError(f"{self._file}: {key} is another name of {name}, which is there too; keep one of them")
            if name is not None:
                values[name] = value
            elif not self._takes_any_file:
                raise ValueError(f"{self._file}: {self._unknown(key, 'correct the name, or remove the line')}")
        return list(super().set_defaults_with_config(**values))

    def _unknown(self, name: str, way_out: str) -> str:
        plain, dashes = _plain(name), "--" if name.startswith("-") else ""
        if plain in NOT_OPTIONS:
            return f"there is no option {name}: {NOT_OPTIONS[plain]}"
        close = difflib.get_close_matches(plain, self._names, n=1, cutoff=0.75)
        hint = f"did you mean {dashes}{close[0]}? Otherwise {way_out}" if close else way_out
        return f"there is no option {name}; {hint}"


def _shipped(kinds: Sequence[type[Any]]) -> str:
    """Name the files that come with the package, which are those of a training run."""
    if AttentionGuidedRLConfig not in kinds:
        return "."
    return ", or one that comes with the package: " + ", ".join(shipped_configs())


def _plain(name: object) -> str:
    return str(name).lstrip("-").replace("-", "_")


def _place_and_problem(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _parts(kinds: Sequence[type[Any]]) -> list[type]:
    """Sort the fields into a dataclass for each heading, in the order of help."""
    headed: dict[str, list[Field[Any]]] = {}
    hints: dict[str, Any] = {}
    trainers: list[Field[Any]] = []
    for kind in kinds:
        hints |= get_type_hints(kind)
        if not issubclass(kind, TrainingArguments):
            heading = getattr(kind, "_argument_group_name", "what is asked for")
            headed.setdefault(heading, []).extend(dataclasses.fields(kind))
            continue
        for heading, items in options_by_heading(kind, OPTION_GROUPS).items():
            headed.setdefault(heading, []).extend(items)
        inherited = {item.name for item in dataclasses.fields(TrainingArguments)} | VERDICTS.keys()
        trainers = [item for item in dataclasses.fields(kind) if item.init and item.name in inherited]
    parts = [_part(_titled(heading, kinds), items, hints) for heading, items in headed.items()]
    return [*parts, _part(_TRAINERS, trainers, hints)] if trainers else parts


def _titled(heading: str, kinds: Sequence[type[Any]]) -> str:
    if AttentionGuidedRLConfig not in kinds or heading not in OPTION_GROUPS:
        return heading
    # A colon follows it.
    return f"{heading} ({meaning_of(OPTION_GROUPS[heading]).rstrip('.')})"


def _part(title: str, items: Sequence[Field[Any]], hints: Mapping[str, Any]) -> type:
    others: dict[str, list[str]] = {}
    for alias, name in NAMES_OF_TRL.items():
        others.setdefault(name, []).append(alias)
    parsed = [
        (
            item.name,
            hints[item.name],
            dataclasses.field(
                default=item.default,
                default_factory=item.default_factory,
                metadata=_for_argparse(item, hints[item.name], others.get(item.name, ())),
            ),
        )
        for item in items
    ]
    return dataclasses.make_dataclass("Part", parsed, kw_only=True, namespace={"_argument_group_name": title})


def _for_argparse(item: Field[Any], hint: Any, other_names: Sequence[str]) -> dict[str, Any]:
    metadata = dict(item.metadata)
    named = [f"--{name}" for name in other_names]
    metadata["aliases"] = [*metadata.get("aliases", ()), *named, *(name.replace("_", "-") for name in named)]
    if (metavar := _metavar(hint)) is not None:
        metadata.setdefault("metavar", metavar)
    metadata["help"] = _help(item)
    return metadata


def _metavar(hint: Any) -> str | None:
    arms = [arm for arm in get_args(hint) or (hint,) if arm is not type(None)]
    arms = [get_origin(arm) or arm for arm in arms]
    # A choice shows what there is, and a flag takes no such word.
    if get_origin(hint) is Literal or bool in arms or any(issubclass(arm, Enum) for arm in arms if isclass(arm)):
        return None
    return next((metavar for kind, metavar in _METAVARS.items() if kind in arms), None)


def _help(item: Field[Any]) -> str:
    verdict = VERDICTS.get(item.name)
    if verdict is not None and verdict.kind != "honoured":
        return argparse.SUPPRESS
    text: str = item.metadata.get("help", "")
    if item.default in (None, dataclasses.MISSING, "") or "default" in text.lower():
        return text
    default = getattr(item.default, "value", item.default)
    return f"{text} (default: {str(default).lower() if isinstance(default, bool) else default})"
