"""The manifest finds every kind of damage, also to itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attention_rl_trainer.durability.manifest import MANIFEST_NAME, find_damage, write_manifest


def test_names_a_file_outside_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    write_manifest(folder)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0" * 64}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert "is outside of the checkpoint" in str(find_damage(folder)[0])


def test_a_folder_by_a_path_that_leads_up_and_down(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("a")
    folder = tmp_path / "other" / ".." / "one"
    write_manifest(folder)
    assert find_damage(folder) == []
    manifest = (folder / MANIFEST_NAME).read_text()
    for outside in ("../other/file", str(tmp_path / "other" / "file")):
        (folder / MANIFEST_NAME).write_text(manifest.replace('"file"', json.dumps(outside)))
        assert "is outside of the checkpoint" in str(find_damage(folder)[0])


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b"])
def test_names_that_no_system_takes(name: str, tmp_path: Path) -> None:
    manifest = {"format": 1, "files": {name: {"bytes": 1, "sha256": "0" * 64}}}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    (damage,) = find_damage(tmp_path)
    assert damage.path.name == name


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"format": 1}', '{"format": 2, "files": {}}', "\x00", "[" * 100_000),
        '{"format": 1, "files": {"a": {"bytes": Infinity, "sha256": ""}}}',
        '{"format": 1, "files": {"a": {"bytes": "", "sha256": ""}}}',
    ],
    ids=lambda content: ascii(content[:40]),
)
def test_what_is_not_a_manifest(content: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    (damage,) = find_damage(tmp_path)
    assert damage.path == tmp_path / MANIFEST_NAME
