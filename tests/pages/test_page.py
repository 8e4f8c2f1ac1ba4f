"""The page: what is in it, that nothing in it acts but its own script, and its size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_run import make_row
from run_folder import HOSTILE, make_rows, write_run

from attention_rl_trainer.pages.page import MAX_CHARACTERS, PAGE_NAME, render_page, view_of, write_page
from attention_rl_trainer.pages.run import Run, read_run


class Elements(HTMLParser):
    """Collects the elements of a page, and the texts of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._is_script = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_script = tag == "script"
        if self._is_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_script = False

    def handle_data(self, data: str) -> None:
        if self._is_script:
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def run_of(rows: list[Any], **changes: Any) -> Run:
    given = {"name": "run", "rows": rows, "log_history": [], "options": {}, "settings": {}}
    return Run(**{**given, "evaluations": {}, "written": None} | changes)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "run", make_rows()))


class TestContent:
    def test_says_what_the_summary_says(self, run: Run) -> None:
        page = Elements(render_page([run]))
        assert "Finished: 48 episodes." in page.text
        assert "Both parts rose" in page.text
        assert "attention-rl report" in page.text
        for heading in ("Learning curves", "The filter's ledger", "Trajectories", "Evaluation", "Settings"):
            assert heading in page.texts

    def test_data_is_that_of_the_run(self, run: Run) -> None:
        page = Elements(render_page([run]))
        (drawn,) = json.loads(page.scripts[0])["runs"]
        assert drawn["name"] == "run"
        assert [row["episode"] for row in drawn["trajectories"]] == list(range(48))
        assert drawn["trajectories"][5]["keys"] == list(run.rows[5].keys)
        assert len(drawn["points"]["reward"]) == 48
        assert drawn["meetings"][0]["same"] is True

    def test_a_run_with_nothing_in_it(self) -> None:
        page = Elements(render_page([run_of([])]))
        assert "No trajectory is in the ledger yet" in page.text
        assert "Nothing was evaluated yet." in page.text
        assert "The run left no options behind." in page.text

    def test_a_run_that_is_not_done(self) -> None:
        page = Elements(render_page([run_of(make_rows(20), options={"num_episodes": 100})]))
        assert "Under way, or stopped early: 20 of 100 episodes." in page.text

    def test_a_short_run_is_not_compared(self) -> None:
        page = Elements(render_page([run_of(make_rows(8))]))
        assert "Below 12 episodes first and last third are not compared." in page.text
        assert "First third and last third" not in page.texts

    def test_token_gains_are_in_the_data(self) -> None:
        gains = [[[" of", 0.5]], [[" on", -0.25]], [[" are", 0.0]]]
        drawn = view_of(run_of([make_row(token_gains=gains)]), 10_000)["drawn"]
        assert drawn["trajectories"][0]["tokens"] == [[[" of", 0.5]], [[" on", -0.25]], [[" are", 0.0]]]


class TestTwoRuns:
    def test_are_compared(self, tmp_path: Path) -> None:
        runs = [
            read_run(write_run(tmp_path / "one", make_rows(), options={"beta": 0.1})),
            read_run(write_run(tmp_path / "two", make_rows(rise=0.8, seed=1), options={"beta": 0.4})),
        ]
        html = render_page(runs)
        page = Elements(html)
        assert "two less one" in page.texts
        assert "higher" in page.text
        assert len(json.loads(page.scripts[0])["runs"]) == 2
        (differing,) = re.findall(
            r'<tr class="differs"><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', html
        )
        assert differing == ("beta", "0.1", "0.4")

    def test_a_short_one_is_not(self) -> None:
        runs = [run_of(make_rows(), name="one"), run_of(make_rows(4), name="two")]
        assert "two less one" not in Elements(render_page(runs)).texts


class TestSafety:
    @pytest.fixture
    def html(self, tmp_path: Path) -> str:
        rows = [
            make_row(
                n, step=n, title=HOSTILE, source=HOSTILE, queries=[HOSTILE, "\ud800", "\x00"], values=[HOSTILE] * 3
            )
            for n in range(3)
        ]
        options = {HOSTILE: HOSTILE}
        folder = write_run(tmp_path / "run", [make_row()], options=options)
        (folder / "evaluation" / "<b>").mkdir()
        (folder / "evaluation" / "eval" / "evaluation.json").rename(folder / "evaluation" / "<b>" / "evaluation.json")
        run = read_run(folder)
        return render_page([run_of(rows, name="<i>run</i>", options=run.options, evaluations=run.evaluations)])

    def test_what_a_run_brings_is_text(self, html: str) -> None:
        page = Elements(html)
        assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [
            "application/json",
            "module",
        ]
        assert not {"img", "i>", "iframe", "object", "b"} & {tag for tag, _ in page.tags}
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        (row, *_) = json.loads(page.scripts[0])["runs"][0]["trajectories"]
        assert row["title"] == HOSTILE
        assert row["queries"] == [HOSTILE, "\ud800", "\x00"]
        assert HOSTILE in page.text
        assert "<i>run</i>" in page.text

    def test_data_cannot_end_its_element(self, html: str) -> None:
        data = html.split('id="data">')[1].split("</script>")[0]
        assert data.isascii()
        assert not set("<>&'") & set(data)
        assert json.loads(data)["runs"]

    def test_only_its_own_script_may_run_and_nothing_is_loaded(self, html: str) -> None:
        page = Elements(html)
        policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
        assert policy is not None
        digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none'; ")
        loaded = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
        assert all(address is not None and (address.startswith("#") or address == "data:,") for address in loaded)
        # The name of a vocabulary is not fetched.
        outside = set(re.findall(r"https?://[^\s\"')]+", html)) - {"http://www.w3.org/2000/svg"}
        assert not outside


class TestSize:
    def test_a_large_run_is_thinned_out_and_says_so(self) -> None:
        rows = make_rows(400, batch=4)
        html = render_page([run_of(rows)], trajectory_bytes=60_000)
        page = Elements(html)
        shown = len(json.loads(page.scripts[0])["runs"][0]["trajectories"])
        assert 20 < shown < 200
        assert f"The page holds {shown} of the 400 trajectories" in page.text

    def test_the_room_is_shared(self) -> None:
        rows = make_rows(200, batch=4)
        html = render_page([run_of(rows), run_of(rows, name="other")], trajectory_bytes=60_000)
        data = Elements(html).scripts[0]
        assert [len(json.dumps(run["trajectories"])) < 31_000 for run in json.loads(data)["runs"]] == [True, True]

    def test_long_texts_are_cut(self) -> None:
        row = make_row(values=["x" * 5000, "y", "z"], title="t" * 5000)
        view = view_of(run_of([row]), 10**9)
        (record,) = view["drawn"]["trajectories"]
        assert [len(text) for text in (record["values"][0], record["title"])] == [MAX_CHARACTERS] * 2
        assert f"Texts are cut at {MAX_CHARACTERS} characters." in view["notes"]


def test_two_pages_of_a_run_are_the_same(run: Run, tmp_path: Path) -> None:
    path = write_page([run], tmp_path / "a")
    assert path == tmp_path / "a" / PAGE_NAME
    assert path.read_bytes() == write_page([run], tmp_path / "b").read_bytes()


def test_missing_jinja2_names_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "attention-rl-trainer\[report\]"'):
        render_page([run])


def test_a_page_is_made_without_the_training_stack() -> None:
    slow = ("torch", "transformers", "matplotlib", "trl")
    code = f"import sys, attention_rl_trainer.commands.report; print([name for name in {slow} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
