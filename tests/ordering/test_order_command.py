"""An adapter from its folder or the Hub's cache, and ``attention-rl order`` on files of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from model_builders import put_in_hub_cache
from tiny import article_texts, byte_level_tokenizer, save_tiny_llama, tiny_trainer

from attention_rl_trainer import AttentionGuidedOrderer
from attention_rl_trainer.cli import main
from attention_rl_trainer.hub import HubUnreachableError
from attention_rl_trainer.models.heads import ChosenHeads
from attention_rl_trainer.ordering.adapter import find_adapter
from attention_rl_trainer.probing.calibrated import CALIBRATED
from attention_rl_trainer.rollout import Calibration

FITTED = CALIBRATED | {"probe_heads": 3, "calibration_memories": 6}
PASSAGES = ["the river flows from a mountain lake", "kings once met bishops judges farmers", "letters about weather"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter with a calibrated selector, as a run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    texts = article_texts(20)
    base = save_tiny_llama(folder / "base", texts)
    trainer = tiny_trainer(folder, texts, byte_level_tokenizer(texts), model=base, **FITTED)
    trainer.calibrate()
    trainer.save_model()
    return folder / "run"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.txt" for number in range(len(PASSAGES))]
    for path, text in zip(paths, PASSAGES, strict=True):
        path.write_text(text, encoding="utf-8")
    return [str(path) for path in paths]


def ordered(adapter: Path, files: list[str], capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["order", *files, "--adapter", str(adapter), "--use_cpu", "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_an_adapter_brings_its_settings_and_its_calibration(adapter: Path) -> None:
    orderer = AttentionGuidedOrderer.from_pretrained(adapter, device="cpu")
    calibration = Calibration.read(adapter)
    assert isinstance(orderer.policy.attention, ChosenHeads)
    assert orderer.policy.attention.numbers == calibration.heads
    assert orderer.settings.calibration is not None
    assert orderer.settings.calibration.digest == calibration.digest
    assert (orderer.settings.tokens_per_key, orderer.settings.rollout(5, 2).tokens_per_query) == (6, 4)
    assert len(orderer.order(PASSAGES).steps) == 3


def test_text_files_are_a_passage_each(adapter: Path, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = ordered(adapter, files, capsys)
    own = AttentionGuidedOrderer.from_pretrained(adapter, device="cpu").order(PASSAGES)
    assert found == json.loads(own.to_json(labels=files))
    assert [step["label"] for step in found["steps"]] == [files[index] for index in found["order"]]


def test_flags_reach_the_order(adapter: Path, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--context", "who met", "--top_k", "2", "--sample", "--seed", "3", "--max_value_tokens", "2"]
    found = ordered(adapter, files, capsys, *flags)
    own = AttentionGuidedOrderer.from_pretrained(adapter, device="cpu")
    expected = own.order(PASSAGES, "who met", top_k=2, greedy=False, seed=3, max_value_tokens=2)
    assert found == json.loads(expected.to_json(labels=files))


def test_a_single_text_is_cut_into_pieces(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "article.md").write_text(" ".join(PASSAGES), encoding="utf-8")
    found = ordered(adapter, [str(tmp_path / "article.md")], capsys)
    assert PASSAGES[0].startswith(found["context"][:10])
    assert sorted(found["order"]) == list(range(1, len(found["order"]) + 1))
    assert "label" not in found["steps"][0]


@pytest.mark.parametrize(
    "rows",
    [[{"text": text} for text in PASSAGES], [{"key": text[:9], "value": text[9:]} for text in PASSAGES]],
    ids=["passages", "keys and values"],
)
def test_a_line_of_json_is_a_piece(
    rows: list[dict[str, str]], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pieces.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = ordered(adapter, [str(path)], capsys)
    assert [step["label"] for step in found["steps"]] == [f"row {index + 1}" for index in found["order"]]
    assert sorted(found["order"]) == [0, 1, 2]


def test_a_table_ends_with_how_far_to_trust_it(
    adapter: Path, files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Short names, which a cell of the table holds in one line.
    monkeypatch.chdir(Path(files[0]).parent)
    names = [Path(file).name for file in files]
    assert main(["order", *names, "--adapter", str(adapter.absolute()), "--use_cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Order of reading")
    assert all(name in printed for name in names)
    assert "How good these orders are was not measured" in printed


@pytest.mark.parametrize(
    ("names", "content", "message"),
    [
        (["nowhere.txt"], None, "there is no file nowhere.txt"),
        (["a.txt", "b.jsonl"], '{"text": "a"}', "b.jsonl holds passages by itself"),
        (["b.jsonl"], '{"title": "a"}', "has no text in 'text', or 'key' and 'value'; it has 'title'"),
        (["b.jsonl"], '{"text": "a"}\n{"key": "a", "value": "b"}', "row 2 of 'b.jsonl' has no text in 'text'; it has"),
        (["b.jsonl"], '{"text": "a"}\n{', "line 2 of 'b.jsonl' cannot be read"),
        (["a.txt", "b.txt"], " \n", "the file 'a.txt' is empty"),
        (["a.txt"], b"\xff\xfe\xfa", "the file 'a.txt' cannot be read"),
    ],
    ids=["missing", "mixed", "columns", "changing", "broken", "empty", "binary"],
)
def test_what_cannot_be_read_is_one_line(
    names: list[str],
    content: str | bytes | None,
    message: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in names if content is not None else []:
        Path(name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
    assert main(["order", *names, "--adapter", str(adapter)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("attention-rl order: ")
    assert message in line


def test_an_adapter_is_a_folder_or_a_repository(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    contents = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    put_in_hub_cache(tmp_path / "hub", "acme/adapter", contents)
    fetched = AttentionGuidedOrderer.from_pretrained("acme/adapter", device="cpu").order(PASSAGES)
    local = AttentionGuidedOrderer.from_pretrained(str(adapter), device="cpu").order(PASSAGES)
    assert fetched.to_dict() == local.to_dict()
    with pytest.raises(HubUnreachableError, match="acme/none is neither a folder nor in the local cache"):
        find_adapter("acme/none")
    with pytest.raises(
        ValueError, match=r"There is no folder /no/such/adapter, and no Hub repository can be called so"
    ):
        find_adapter("/no/such/adapter")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("attention_rl_config.json", None, "holds no attention_rl_config.json, which says how"),
        ("attention_rl_config.json", "{", "is not valid JSON"),
        ("attention_rl_config.json", "[]", "must hold a JSON object of options, got list"),
        ("selector_calibration.safetensors", None, "its folder has no selector_calibration.safetensors"),
        ("selector_calibration.safetensors", "", "is not a calibration that can be read"),
    ],
    ids=["no options", "broken options", "a list", "no calibration", "broken calibration"],
)
def test_an_incomplete_adapter_is_refused(
    name: str, content: str | None, message: str, adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        AttentionGuidedOrderer.from_pretrained(folder, device="cpu")
