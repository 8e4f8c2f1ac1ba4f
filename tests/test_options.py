"""Options: what each kind of annotation admits, and that every option has one owner."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import HfArgumentParser
from trl import TrlParser

import attention_rl_trainer
from attention_rl_trainer.config import OPTION_GROUPS, AttentionGuidedRLConfig
from attention_rl_trainer.options import (
    Above,
    AtLeast,
    Coefficient,
    Count,
    CountOrZero,
    Options,
    Positive,
    Share,
    declaring_class,
    documented,
    option,
    options_by_heading,
    take_options,
    takes_names,
)
from attention_rl_trainer.planning.sizes import RunShape


@dataclass
class Kinds(Options):
    """One option of each kind."""

    count: Count = option(3, "A count.")
    count_or_zero: CountOrZero = option(0, "A count that may be none.")
    coefficient: Coefficient = option(0.0, "A weight.")
    positive: Positive = option(1.0, "A scale.")
    share: Share = option(0.5, "A part.")
    mode: Literal["start", "random"] = option("start", "A choice.")
    bits: Literal[4, 16] = option(4, "A choice of numbers.")
    whole: int = option(-1, "Any integer.")
    real: float = option(0.0, "Any number.")
    flag: bool = option(False, "Yes or no.")
    text: str = option("text", "Words.")
    count_or_none: Count | None = option(None, "A count, or nothing.")
    real_or_none: float | None = option(None, "A number, or nothing.")
    mode_or_none: Literal["start", "random"] | None = option(None, "A choice, or nothing.")
    loading: dict[str, Any] | str | None = option(None, "Of several types.")


ADMITTED: dict[str, list[Any]] = {
    "count": [1, 10**9],
    "count_or_zero": [0, 1],
    "coefficient": [0, 0.0, 2, 1e300],
    "positive": [1e-300, 1, 1e300],
    "share": [1e-9, 0.5, 1, 1.0],
    "mode": ["start", "random"],
    "bits": [4, 16],
    "whole": [-5, 0, 5],
    "real": [-math.inf, -1.5, 0, math.inf],
    "flag": [True, False],
    "text": ["", "words"],
    "count_or_none": [None, 1],
    "real_or_none": [None, -math.inf, 2],
    "mode_or_none": [None, "random"],
    "loading": [None, "{}", {"dtype": "float32"}],
}
REFUSED: dict[str, list[tuple[Any, str]]] = {
    "count": [
        (0, "at least 1, got 0"),
        (1.0, "an integer, got 1.0"),
        (True, "an integer, got True"),
        ("3", "an integer, got '3'"),
        (None, "an integer, got None"),
        (math.nan, "an integer, got nan"),
    ],
    "count_or_zero": [(-1, "at least 0, got -1"), (0.0, "an integer, got 0.0"), (False, "an integer, got False")],
    "coefficient": [
        (-0.1, "at least 0 and finite, got -0.1"),
        (math.inf, "at least 0 and finite, got inf"),
        (math.nan, "at least 0 and finite, got nan"),
        (True, "a number, got True"),
        ("0.1", "a number, got '0.1'"),
        (None, "a number, got None"),
    ],
    "positive": [
        (0, "above 0 and finite, got 0"),
        (-math.inf, "above 0 and finite, got -inf"),
        (math.inf, "above 0 and finite, got inf"),
        (math.nan, "above 0 and finite, got nan"),
    ],
    "share": [
        (0.0, "in (0, 1], got 0.0"),
        (1.01, "in (0, 1], got 1.01"),
        (math.inf, "in (0, 1], got inf"),
        (math.nan, "in (0, 1], got nan"),
    ],
    "mode": [
        ("other", "one of start, random, got 'other'"),
        (None, "one of start, random, got None"),
        ([], "one of start, random, got []"),
    ],
    "bits": [(8, "one of 4, 16, got 8"), ("4", "one of 4, 16, got '4'")],
    "whole": [(0.0, "an integer, got 0.0"), (False, "an integer, got False"), (math.inf, "an integer, got inf")],
    "real": [
        (math.nan, "a number, got nan"),
        (True, "a number, got True"),
        ("1", "a number, got '1'"),
        (None, "a number, got None"),
    ],
    "flag": [(1, "true or false, got 1"), ("no", "true or false, got 'no'"), (None, "true or false, got None")],
    "text": [(1, "text, got 1"), (None, "text, got None")],
    "count_or_none": [
        (0, "at least 1, got 0"),
        (1.5, "an integer or none, got 1.5"),
        ("all", "an integer or none, got 'all'"),
        (True, "an integer or none, got True"),
    ],
    "real_or_none": [
        (math.nan, "a number, got nan"),
        ("inf", "a number or none, got 'inf'"),
        (False, "a number or none, got False"),
    ],
    "mode_or_none": [("other", "one of start, random or none, got 'other'")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ADMITTED.items() for value in values])
def test_what_an_annotation_admits(name: str, value: Any) -> None:
    assert getattr(Kinds(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "message"), [(name, *case) for name, cases in REFUSED.items() for case in cases]
)
def test_what_an_annotation_refuses(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        Kinds(**{name: value})
    assert str(caught.value) == f"{name} must be {message}"


def test_every_kind_is_tried() -> None:
    names = {item.name for item in fields(Kinds)}
    assert names == ADMITTED.keys() == REFUSED.keys() | {"loading"}


def test_a_range_says_itself() -> None:
    assert str(AtLeast(2)) == "at least 2"
    assert str(Above(0.5)) == "above 0.5"
    assert str(Above(0, 1)) == "in (0, 1]"
    assert [AtLeast(2).admits(value) for value in (1, 2, math.inf, math.nan)] == [False, True, False, False]
    assert [Above(0, 1).admits(value) for value in (0, 0.1, 1, 2, math.nan)] == [False, True, True, False, False]


@dataclass
class Room(Options):
    """What a room has."""

    size: Count = option(1, "How many.")


@dataclass
class Bound(Room):
    """Two options that depend on each other."""

    limit: Count = option(10, "At most how many.")

    def check_options(self) -> None:
        super().check_options()
        if self.size > self.limit:
            raise ValueError(f"size must be at most limit ({self.limit}), got {self.size}")


@dataclass
class Unchecked:
    """Fields that are no options, as those of the Trainer."""

    other: Count = 0


@dataclass
class House(Bound, Unchecked):
    """What a run has."""

    share: Share = option(1.0, "A part.")


class TestInheritance:
    def test_inherited_options_are_checked(self) -> None:
        with pytest.raises(ValueError, match=r"^size must be at least 1, got 0$"):
            House(size=0)
        with pytest.raises(ValueError, match=r"^share must be in \(0, 1\], got 0$"):
            House(share=0)

    def test_so_are_those_that_depend_on_each_other_after_their_ranges(self) -> None:
        with pytest.raises(ValueError, match=r"^size must be at most limit \(2\), got 3$"):
            House(size=3, limit=2)
        with pytest.raises(ValueError, match=r"^limit must be an integer, got 2\.5$"):
            House(size=3, limit=2.5)

    def test_what_is_not_an_option_is_left_to_its_class(self) -> None:
        assert House(other=0).other == 0

    def test_an_option_declared_anew_has_the_new_range(self) -> None:
        @dataclass
        class Wider(Room):
            size: CountOrZero = option(0, "How many, or none.")

        assert Wider().size == 0
        with pytest.raises(ValueError, match=r"^size must be at least 0, got -1$"):
            Wider(size=-1)


class TestTakeOptions:
    def test_takes_what_both_have(self) -> None:
        house = House(size=4, limit=5, share=0.5)
        assert take_options(Bound, house) == Bound(size=4, limit=5)
        assert take_options(Room, house) == Room(size=4)

    def test_changes_come_first_and_the_rest_has_its_default(self) -> None:
        assert take_options(House, Bound(size=4, limit=5), limit=6) == House(size=4, limit=6, share=1.0)

    def test_what_is_made_is_checked(self) -> None:
        with pytest.raises(ValueError, match=r"^size must be at most limit \(3\), got 4$"):
            take_options(Bound, House(size=4, limit=5), limit=3)

    def test_an_unknown_change_is_an_error(self) -> None:
        with pytest.raises(TypeError, match="width"):
            take_options(Room, House(), width=1)


GROUPS = {"size": (Room, Bound), "rest": (House,)}


class TestHeadings:
    def test_a_field_belongs_to_the_class_that_declares_it_first(self) -> None:
        @dataclass
        class Large(House):
            size: Count = option(5, "How many.")

        assert declaring_class(Large, "size") is Room
        assert declaring_class(Large, "limit") is Bound
        assert declaring_class(Large, "other") is Unchecked

    def test_fields_are_sorted_by_heading_and_others_left_out(self) -> None:
        named = {heading: [item.name for item in items] for heading, items in options_by_heading(House, GROUPS).items()}
        assert named == {"size": ["size", "limit"], "rest": ["share"]}

    def test_the_docstring_gets_every_option_with_its_help(self) -> None:
        @documented(GROUPS)
        @dataclass
        class Told(House):
            """What is told.

            At length.
            """

        assert Told.__doc__ == (
            "What is told.\n\nAt length.\n\n"
            f"**Size.** {(Room.__doc__ or '').strip()} Two options that depend on each other.\n\n"
            "size = 1\n    How many.\n\nlimit = 10\n    At most how many.\n\n"
            "**Rest.** What a run has.\n\nshare = 1.0\n    A part.\n"
        )

    def test_every_class_of_the_config_has_one_heading(self) -> None:
        headed = [owner for owners in OPTION_GROUPS.values() for owner in owners]
        declaring = [
            kind
            for kind in AttentionGuidedRLConfig.__mro__
            if issubclass(kind, Options) and inspect.get_annotations(kind) and kind is not AttentionGuidedRLConfig
        ]
        assert sorted(headed, key=str) == sorted(declaring, key=str)


class TestOtherNames:
    @takes_names({"count": "size"}, {"colour": "paint it"})
    @dataclass
    class Named(Room):
        """A room with names."""

    def test_an_alias_is_the_option(self) -> None:
        assert self.Named(count=3).size == 3
        assert self.Named(3).size == self.Named(size=3).size == 3

    def test_two_names_at_once_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^count is another name of size; give one of them$"):
            self.Named(count=3, size=3)

    def test_what_is_elsewhere_says_so(self) -> None:
        with pytest.raises(ValueError, match=r"^Named takes no colour: paint it$"):
            self.Named(colour="red")

    def test_a_copy_and_the_signature_are_as_without(self) -> None:
        assert replace(self.Named(count=3), size=4).size == 4
        assert list(inspect.signature(self.Named).parameters) == ["size"]


def options_of_the_package() -> list[type[Options]]:
    """List every options class that any module of the package declares."""
    for module in pkgutil.walk_packages(attention_rl_trainer.__path__, "attention_rl_trainer."):
        importlib.import_module(module.name)
    found: list[type[Options]] = []
    pending = Options.__subclasses__()
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__.startswith("attention_rl_trainer.") and kind not in found:
            found.append(kind)
    return found


def test_no_option_is_declared_in_two_rooms() -> None:
    rooms = options_of_the_package()
    assert len(rooms) > 10
    owners: dict[str, set[str]] = defaultdict(set)
    for room in rooms:
        for name in inspect.get_annotations(room):
            owners[name].add(f"{room.__module__}.{room.__name__}")
    assert {"tokens_per_key", "beta", "lora_rank", "num_episodes"} <= owners.keys()
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}


def test_the_config_has_the_options_of_every_room() -> None:
    """Apart from what a plan alone asks for: the facts of a machine."""
    elsewhere = {"RunShape", "DeviceOptions", "AttentionGuidedRLConfig"}
    config = {item.name for item in fields(AttentionGuidedRLConfig)}
    for room in options_of_the_package():
        if room.__name__ not in elsewhere:
            assert issubclass(AttentionGuidedRLConfig, room)
            assert inspect.get_annotations(room).keys() <= config
    own = inspect.get_annotations(RunShape).keys() & config
    assert own == {"activation_checkpointing"}  # the Trainer's, as a fact of the run


PARSERS = [HfArgumentParser, TrlParser]


@pytest.mark.parametrize("parser", PARSERS)
class TestCommandLine:
    def parse(self, parser: type[HfArgumentParser], *flags: str) -> AttentionGuidedRLConfig:
        made = parser((AttentionGuidedRLConfig,))
        (config,) = made.parse_args_into_dataclasses(["--output_dir", "run", "--use_cpu", "true", *flags])
        return config

    @pytest.mark.parametrize(
        ("flag", "given", "value"),
        [
            ("tokens_per_key", "7", 7),
            ("beta", "0.25", 0.25),
            ("subset_fraction", "1", 1.0),
            ("logits_chunk_size", "64", 64),
            ("num_steps", "2", 2),
            ("shuffle", "false", False),
            ("window", "random", "random"),
            ("dataset_text_column", "body", "body"),
            ("attention_layer", "-2", -2),
        ],
    )
    def test_values_get_their_type(self, parser: type[HfArgumentParser], flag: str, given: str, value: object) -> None:
        parsed = getattr(self.parse(parser, f"--{flag}={given}"), flag)
        assert parsed == value
        assert type(parsed) is type(value)

    def test_ranges_are_checked(self, parser: type[HfArgumentParser]) -> None:
        with pytest.raises(ValueError, match=r"^tokens_per_key must be at least 1, got 0$"):
            self.parse(parser, "--tokens_per_key", "0")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--window", "middle"], r"argument --window: invalid choice: 'middle' \(choose from .*start.*random"),
            (["--tokens_per_key", "many"], r"argument --tokens_per_key\S*: invalid int value: 'many'"),
        ],
    )
    def test_types_and_choices_are_known_to_the_parser(
        self, parser: type[HfArgumentParser], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            self.parse(parser, *flags)
        assert re.search(message, capsys.readouterr().err)

    def test_aliases(self, parser: type[HfArgumentParser]) -> None:
        config = self.parse(parser, "--batch-size", "6", "--episodes", "18")
        assert (config.generation_batch_size, config.num_episodes) == (6, 18)

    def test_help_names_the_aliases_and_says_what_each_option_means(self, parser: type[HfArgumentParser]) -> None:
        # Lines are wrapped and hyphenated by argparse, so the texts are compared without their blanks.
        text = "".join(parser((AttentionGuidedRLConfig,)).format_help().split())
        for alias in ("--batch-size", "--episodes"):
            assert alias in text
        for room in AttentionGuidedRLConfig.__mro__:
            if issubclass(room, Options):
                for name in inspect.get_annotations(room):
                    said = AttentionGuidedRLConfig.__dataclass_fields__[name].metadata["help"]
                    assert "".join(said.split()) in text, name


def test_options_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("output_dir: run\nuse_cpu: true\ntokens_per_key: 5\nfilter_threshold: null\n")
    (config,) = TrlParser((AttentionGuidedRLConfig,)).parse_args_and_config(["--config", str(path)])
    assert (config.tokens_per_key, config.filter_threshold) == (5, None)
