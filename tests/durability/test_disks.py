"""Disks that are full or protected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from processes import Job, adapter_hash

from attention_rl_trainer.durability.staging import StagingError, staged_files, staged_folder

# Trains, and spoils the run's disk after the first checkpoint.
DISK = """
import hashlib
import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = {path!r}
from processes import Job, build_trainer
from finished_run import OPTIONS
from transformers import TrainerCallback

from attention_rl_trainer.durability.manifest import find_damage
from attention_rl_trainer.durability.staging import list_checkpoints

folder = Path({folder!r})


def fill(left=0):
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - left)


def fill_nearly():
    fill(left=49152)


def protect():
    (folder / "run" / "trajectories.jsonl").chmod(0o666)  # it is the checkpoint that cannot be written
    (folder / "run").chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)  # whom permissions bind


class Spoil(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            {spoil}()


if {spoil!r} != "protect":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
trainer = build_trainer(Job(folder, OPTIONS))
trainer.add_callback(Spoil())
try:
    trainer.train()
except OSError as error:
    results = [f"{{type(error).__name__}} {{error}}"]
if os.getuid() == 0:
    os.seteuid(0)
results.append(str([(path.name, find_damage(path)) for path in list_checkpoints(folder / "run")]))
(folder / "filler").unlink(missing_ok=True)
(folder / "run").chmod(0o755)
again = build_trainer(Job(folder, OPTIONS))
again.train(resume_from_checkpoint=True)
weights = (folder / "run" / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
print(*results, hashlib.sha256(weights).hexdigest(), sep="\\n")
"""


def train_on_a_disk(folder: Path, spoil: str, *before: str) -> list[str]:
    """Return the error of the run, what checkpoints there are, and the adapter's hash once it could resume."""
    script = DISK.format(path=sys.path, folder=str(folder), spoil=spoil)
    done = subprocess.run(
        [*before, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-3:]


def can_mount() -> bool:
    probe = ["unshare", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return sys.platform == "linux" and subprocess.run(probe, capture_output=True, check=False).returncode == 0


class TestDisks:
    @pytest.mark.skipif(not can_mount(), reason="needs a namespace in which a small disk can be mounted")
    @pytest.mark.parametrize(
        ("spoil", "path"),
        [("fill_nearly", "checkpoint-4"), pytest.param("fill", "trajectories.jsonl", marks=pytest.mark.slow)],
    )
    def test_a_full_disk(self, spoil: str, path: str, finished: Path, tmp_path: Path) -> None:
        error, checkpoints, learned = train_on_a_disk(tmp_path, spoil, "unshare", "--map-root-user", "--mount")
        assert learned == adapter_hash(Job(finished))
        assert "No space left on device" in error
        assert str(tmp_path / "run" / path) in error
        assert checkpoints == "[('checkpoint-2', [])]"

    @pytest.mark.slow
    def test_no_permission(self, finished: Path) -> None:
        # pytest's own folders cannot be entered by others than their owner.
        with TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o755)
            error, checkpoints, learned = train_on_a_disk(folder, "protect")
        assert learned == adapter_hash(Job(finished))
        assert "Permission denied" in error
        assert str(folder / "run" / "checkpoint-4") in error
        assert checkpoints == "[('checkpoint-2', [])]"

    def test_a_refused_write_names_path_and_reason(self, tmp_path: Path) -> None:
        message = r"checkpoint-3 could not be written: .*Is a directory.*Nothing that was"
        with pytest.raises(StagingError, match=message), staged_folder(tmp_path / "checkpoint-3") as folder:
            folder.write_text("not a file")
        assert not list(tmp_path.iterdir())
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "a").write_text("a")
        with pytest.raises(StagingError, match=f"{tmp_path} could not be written"), staged_files(tmp_path) as folder:
            (folder / "taken").write_text("a file where there is a folder")
