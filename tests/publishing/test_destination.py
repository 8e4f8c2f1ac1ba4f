"""The real client of the Hub against a small one on loopback: what arrives, and what is said where it does not."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from loopback_hub import READ_TOKEN, TOKEN, LoopbackHub

from attention_rl_trainer.durability.pushes import Destination, HubPushError

pytestmark = [
    pytest.mark.enable_socket,
    # Upstream: a large file is sent by an argument that httpx renames.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

CARD = "---\nlibrary_name: peft\n---\n\n# An adapter\n"
FILES = ("README.md", "adapter_*", "evaluation/*/evaluation.json", "tokenizer.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, with more than is for others."""
    folder = tmp_path / "my run"
    for name, content in {
        "README.md": CARD,
        "adapter_config.json": "{}",
        "adapter_model.safetensors": "weights " * 1000,
        "evaluation/eval/evaluation.json": "{}",
        "evaluation/eval/evaluation.md": "tables",
        "checkpoint-2/README.md": CARD,
        "checkpoint-2/optimizer.safetensors": "states",
        "trajectories.jsonl": "text of articles",
        "training_args.bin": "pickle",
        "logs/events": "events",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def destination(folder: Path, **changes: Any) -> Destination:
    return Destination(**{"repo_id": "someone/adapter", "folder": folder, "files": FILES, "token": TOKEN, **changes})


def arrived(hub: LoopbackHub, folder: Path) -> bool:
    names = ("README.md", "adapter_config.json", "adapter_model.safetensors", "evaluation/eval/evaluation.json")
    return hub.files("someone/adapter") == {name: (folder / name).read_bytes() for name in names}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part_bytes", [None, 3000], ids=["one_part", "parts"])
def test_what_is_listed_arrives_and_nothing_else(part_bytes: int | None, hub: LoopbackHub, run: Path) -> None:
    hub.part_bytes = part_bytes
    made = destination(run, repo_id="adapter", private=True).create()
    assert made.repo_id == "someone/adapter"
    made.push("First")
    assert arrived(hub, run)
    repository = hub.repositories["someone/adapter"]
    assert repository.is_private
    assert [commit.message for commit in repository.commits] == ["First"]
    # The weights went as a large file, and were checked by their hash.
    oid = hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert set(hub.blobs) == {oid}
    assert sum(request.startswith(f"PUT /blobs/{oid}") for request in hub.requests) == (1 if part_bytes is None else 3)


def test_a_repository_that_is_there_is_pushed_to(hub: LoopbackHub, run: Path) -> None:
    destination(run).create().push("First")
    (run / "README.md").write_text(CARD + "More.\n")
    destination(run, revision="other").create().push("Second")
    commits = hub.repositories["someone/adapter"].commits
    assert [(commit.message, commit.revision) for commit in commits] == [("First", "main"), ("Second", "other")]
    assert arrived(hub, run)


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("POST", "/preupload/", 429),
        ("POST", "/preupload/", 500),
        ("POST", "/objects/batch", 504),
        ("PUT", "/blobs/", 500),
        ("PUT", "/blobs/", "reset"),
        ("POST", "/verify", "reset"),
        ("POST", "/verify", 429),
    ],
)
def test_a_fault_that_passes_is_waited_for(method: str, path: str, what: Any, hub: LoopbackHub, run: Path) -> None:
    made = destination(run).create()
    hub.fail(method, path, what, times=2)
    made.push("First")
    assert arrived(hub, run)


COMMIT, CREATE = "/commit/", "/repos/create"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "path", "what", "said"),
    [
        ("POST", CREATE, 401, r"HTTP status 401 .*log in with `hf auth login`"),
        ("POST", CREATE, 403, r"HTTP status 403 .*use a token that may write there"),
        pytest.param("POST", CREATE, 429, r"HTTP status 429 .*wait some minutes", marks=SLOW),
        pytest.param("POST", CREATE, 500, r"HTTP status 500 .*the fault is the Hub's", marks=SLOW),
        pytest.param(
            "POST", CREATE, "reset", r"(ReadError|RemoteProtocolError|WriteError|ConnectionResetError)", marks=SLOW
        ),
        ("POST", CREATE, "html", r"what answers there is not a Hub; check HF_ENDPOINT"),
        pytest.param("POST", "/validate-yaml", 504, r"HTTP status 504 .*the fault is the Hub's", marks=SLOW),
        ("POST", "/preupload/", 404, r"HTTP status 404 .*check hub_model_id, hub_revision"),
        pytest.param("POST", "/preupload/", 500, r"HTTP status 500", marks=SLOW),
        pytest.param("POST", "/objects/batch", 403, r"HTTP status 403", marks=SLOW),
        ("PUT", "/blobs/", "reset", r"(ReadError|RemoteProtocolError|WriteError|ConnectionResetError)"),
        ("PUT", "/blobs/", 500, r"HTTP status 500"),
        ("POST", COMMIT, 409, r"HTTP status 409 .*somebody else writes there"),
        ("POST", COMMIT, 429, r"HTTP status 429"),
        ("POST", COMMIT, 500, r"HTTP status 500"),
        ("POST", COMMIT, 504, r"HTTP status 504"),
        ("POST", COMMIT, "reset", r"(ReadError|RemoteProtocolError|WriteError|ConnectionResetError)"),
        pytest.param("POST", COMMIT, "html", r"what answers there is not a Hub; check HF_ENDPOINT", marks=SLOW),
    ],
)
def test_a_fault_that_stays_is_said_with_the_command(
    method: str, path: str, what: Any, said: str, hub: LoopbackHub, run: Path
) -> None:
    before = contents(run)
    hub.fail(method, path, what)
    with pytest.raises(HubPushError, match=said) as raised:
        destination(run).create().push("First")
    message = str(raised.value)
    assert f"was not pushed to someone/adapter at {hub.endpoint}: " in message
    assert message.endswith(f"push it later with: {destination(run).command}")
    assert TOKEN not in message
    assert "\n" not in message
    assert contents(run) == before
    assert not hub.repositories or hub.files("someone/adapter") == {}
    # Once it is over, nothing stands in the way.
    hub.faults.clear()
    destination(run).create().push("Second")
    assert arrived(hub, run)


@pytest.mark.parametrize(("token", "status"), [("hf_nobody", 401), (READ_TOKEN, 403)])
def test_a_token_that_may_not_write(token: str, status: int, hub: LoopbackHub, run: Path) -> None:
    with pytest.raises(HubPushError, match=f"HTTP status {status} ") as raised:
        destination(run, token=token).create()
    assert token not in str(raised.value)
    assert hub.repositories == {}


def test_a_head_that_the_hub_refuses(hub: LoopbackHub, run: Path) -> None:
    (run / "README.md").write_text("---\nbase_model: /home/me/model\n---\n")
    with pytest.raises(HubPushError, match=r"HTTP status 400.*push it later"):
        destination(run).create().push("First")


def test_a_wrong_endpoint_is_named(hub: LoopbackHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:s3cret@127.0.0.1:9")
    with pytest.raises(
        HubPushError, match=r"at http://<CREDENTIALS>@127\.0\.0\.1:9: the Hub cannot be reached"
    ) as raised:
        destination(run).create()
    assert "s3cret" not in str(raised.value)
    monkeypatch.setattr(constants, "ENDPOINT", f"{hub.endpoint}/nothing")
    with pytest.raises(HubPushError, match=r"HTTP status 404"):
        destination(run).create()


def test_the_offline_mode_is_said_before_anything_is_asked(
    hub: LoopbackHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubPushError, match=r"the offline mode is on; unset HF_HUB_OFFLINE.*hf upload someone/adapter"):
        destination(run).push("First")
    assert hub.requests == []


def test_a_push_in_the_background_says_what_went_wrong(
    hub: LoopbackHub, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = destination(run).create()
    hub.fail("POST", COMMIT, 500, times=1)
    with caplog.at_level(logging.WARNING, logger="attention_rl_trainer"):
        assert made.begin_push("Step 2").exception(timeout=20) is not None
        made.begin_push("Step 4").result(timeout=20)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("attention_rl")] == [
        "'Step 2' was not pushed to someone/adapter: HTTP status 500 (status 500 was asked for); the fault is the "
        "Hub's. The run is not affected"
    ]
    assert arrived(hub, run)


def test_the_command_that_is_said_pushes_the_same(hub: LoopbackHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shell, as a person would."""
    hub.fail("POST", COMMIT, 504, times=1)
    with pytest.raises(HubPushError) as raised:
        destination(run, private=True).create().push("First")
    command = str(raised.value).partition("push it later with: ")[2]
    assert shlex.split(command)[:6] == ["hf", "upload", "someone/adapter", str(run), ".", "--private"]
    assert "tokenizer.json" not in command, "it is not there"
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert arrived(hub, run)
