"""Whether the Hub is there: asked once, within its time, and never in offline mode."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from attention_rl_trainer import hub
from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.models.base import load_base_model


@pytest.fixture(autouse=True)
def asked_afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    hub.forget_hub_answer()
    yield
    hub.forget_hub_answer()
    huggingface_hub.close_session()


class StandIn(ThreadingHTTPServer):
    """A server in the place of the Hub: it waits, answers with one status, and writes down what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StandInHandler)
        self.delay_seconds = 0.0
        self.status = 200
        self.paths: list[str] = []


class StandInHandler(BaseHTTPRequestHandler):
    server: StandIn

    def do_HEAD(self) -> None:
        self.server.paths.append(self.path)
        time.sleep(self.server.delay_seconds)
        self.send_response(self.server.status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Keep the output of the tests clean."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.enable_socket
def test_an_answer_is_asked_for_once_and_remembered(stand_in: StandIn) -> None:
    assert hub.hub_obstacle() is None
    assert hub.hub_obstacle() is None
    assert len(stand_in.paths) == 1
    hub.forget_hub_answer()
    assert hub.hub_obstacle() is None
    assert len(stand_in.paths) == 2


@pytest.mark.enable_socket
@pytest.mark.parametrize(("status", "reachable"), [(204, True), (307, True), (404, True), (503, False)])
def test_an_error_of_the_server_is_no_answer(stand_in: StandIn, status: int, reachable: bool) -> None:
    stand_in.status = status
    assert (hub.hub_obstacle() is None) is reachable
    assert len(stand_in.paths) == 1, "one request, neither retried nor redirected"
    if not reachable:
        assert "HTTP status 503" in str(hub.hub_obstacle())


@pytest.mark.enable_socket
def test_the_offline_mode_asks_nobody_and_is_read_at_every_call(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.hub_obstacle() is not None
    assert "unset HF_HUB_OFFLINE" in str(hub.hub_obstacle())
    assert stand_in.paths == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.hub_obstacle() is None


@pytest.mark.enable_socket
def test_a_refused_connection_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    started = time.monotonic()
    assert hub.hub_obstacle() is not None
    assert time.monotonic() - started < 2
    assert "ConnectError" in str(hub.hub_obstacle())


@pytest.mark.enable_socket
def test_a_silent_server_is_waited_for_no_longer_than_asked(stand_in: StandIn) -> None:
    stand_in.delay_seconds = 1.5
    started = time.monotonic()
    assert hub.hub_obstacle(timeout_seconds=0.2) is not None
    assert time.monotonic() - started < 1.2


@pytest.mark.enable_socket
def test_a_resolver_that_hangs_is_waited_for_no_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hanging(*args: object, **kwargs: object) -> list[object]:
        released.wait(10)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    started = time.monotonic()
    assert hub.hub_obstacle(timeout_seconds=0.2) is not None
    assert time.monotonic() - started < 2
    assert "no answer within 0.2 s" in str(hub.hub_obstacle())
    released.set()


@pytest.mark.parametrize("timeout_seconds", [0.0, -1.0])
def test_a_time_limit_is_positive(timeout_seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout_seconds must be positive"):
        hub.hub_obstacle(timeout_seconds)


def test_an_unreachable_hub_is_a_connection_error() -> None:
    assert issubclass(hub.HubUnreachableError, ConnectionError)


def test_a_file_is_cached_where_a_snapshot_of_the_main_revision_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--someone--things"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "README.md").write_text("hello")
    (repository / ".no_exist" / "abc").mkdir(parents=True)
    (repository / ".no_exist" / "abc" / "things.py").touch()
    assert hub.cached_in_hub_cache("someone/things", "README.md", "dataset")
    assert not hub.cached_in_hub_cache("someone/things", "README.md", "model")
    assert not hub.cached_in_hub_cache("someone/things", "other.json", "dataset")
    assert not hub.cached_in_hub_cache("someone/things", "things.py", "dataset"), "known to be absent is not cached"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:s3cret@mirror.example/x answers", "http://<CREDENTIALS>@mirror.example/x answers"),
        ("at https://u:p@ss@h:1, and ftp://t@h/", "at https://<CREDENTIALS>@h:1, and ftp://<CREDENTIALS>@h/"),
        ("mail me@here, see http://h/a@b", "mail me@here, see http://h/a@b"),
    ],
)
def test_credentials_in_addresses_are_masked(text: str, shown: str) -> None:
    assert hub.without_credentials(text) == shown


@pytest.mark.enable_socket
def test_no_obstacle_shows_credentials(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.status = 503
    address = f"127.0.0.1:{stand_in.server_port}"
    for endpoint in (f"http://user:s3cret@{address}", f"http://user:s3cret@127.0.0.1:{closed_port()}"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        obstacle = str(hub.hub_obstacle())
        assert obstacle != "None"
        assert "s3cret" not in obstacle


def test_a_cache_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    hub.expect_writable_cache(tmp_path / "new" / "cache", "HF_HUB_CACHE")
    assert list((tmp_path / "new" / "cache").iterdir()) == []


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/cache", "link"])
def test_a_cache_that_cannot_be_written_is_refused_with_the_way_out(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "link")
    message = (
        rf"cache folder '.*{folder}' cannot be written: \[Errno .*HF_HOME \(all caches\) or HF_HUB_CACHE \(this one"
    )
    with pytest.raises(hub.UnwritableCacheError, match=message):
        hub.expect_writable_cache(tmp_path / folder, "HF_HUB_CACHE")


@pytest.mark.enable_socket
@pytest.mark.parametrize("load", [load_articles, load_base_model], ids=["articles", "model"])
def test_what_would_come_from_the_hub_is_refused_where_it_cannot_be_kept(
    load: Callable[[str], object], stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(ValueError, match=r"cache folder '.*file/hub' cannot be written: .*HF_HOME.*HF_HUB_CACHE"):
        load("someone/something")
    # It was asked whether the Hub is there, and for nothing else.
    assert stand_in.paths == ["/"]
