"""Runs in processes of their own, forked from a server that holds the imports, so that each takes a second.

A process can be told to die at a certain write: every file that Python opens for writing, removes or renames in the
run's folder is an event (from the interpreter's audit hook), and so is every safetensors file, every text and every
append to the ledger, which are torn in half.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import safetensors.torch
from datasets import Dataset
from tiny import article_texts, byte_level_tokenizer, tiny_config, tiny_llama

from attention_rl_trainer.memories.stream import Articles, Entries
from attention_rl_trainer.records.ledger import Ledger
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

_REMOVALS = {"os.remove", "os.rmdir"}


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes"])
    # Python 3.11's server does not take over the path, and then passes silently over what it cannot import.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    return context


@dataclass(frozen=True)
class Job:
    """One training process.

    Attributes:
        folder: where the run's folder ``run`` is.
        options: of the config, beside those of `tiny_config`.
        resume: as `train` takes it.
        streaming: whether the articles are streamed.
        entries: whether there are memories of keys and values of different lengths in place of articles.
        wide: a model whose adapter is large enough for 8-bit optimizer states.
        die_at: number of the write at which the process kills itself; -1 for never.
        tear: whether the file of a checkpoint that was written last is left in half then.
        events_file: where the names of all writes go, if anywhere.
        texts: seed of the articles.
    """

    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    resume: str | bool | None = None
    streaming: bool = False
    entries: bool = False
    wide: bool = False
    die_at: int = -1
    tear: bool = False
    events_file: Path | None = None
    texts: int = 0

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"


def adapter_hash(job: Job) -> str:
    """Hash the adapter that a job saved at its end."""
    return hashlib.sha256((job.run / "adapter_model.safetensors").read_bytes()).hexdigest()


def made_up_entries(texts: Sequence[str], num_pairs: int = 7) -> list[Entries]:
    """Make a memory of each text: keys of one to three words, and values of one to five."""
    rows = []
    for number, text in enumerate(texts):
        words = text.split()
        keys = [" " + " ".join(words[10 * pair : 10 * pair + 1 + pair % 3]) for pair in range(num_pairs)]
        values = [
            " " + " ".join(words[10 * pair + 3 : 10 * pair + 4 + (number + pair) % 5]) for pair in range(num_pairs)
        ]
        rows.append(Entries(f"thing {number}", "tests", tuple(keys), tuple(values)))
    return rows


def build_trainer(job: Job) -> AttentionGuidedRLTrainer:
    """Build the trainer of a job; where it evaluates, on articles of its own."""
    texts = article_texts(30, seed=job.texts)
    rows = Dataset.from_dict({"title": [f"article {number}" for number in range(len(texts))], "text": texts})
    articles: Articles = rows.to_iterable_dataset(num_shards=3) if job.streaming else rows
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "head_dim": 16} if job.wide else {}
    return AttentionGuidedRLTrainer(
        model=tiny_llama(**sizes),
        args=tiny_config(job.folder, **job.options),
        train_dataset=made_up_entries(texts) if job.entries else articles,
        eval_dataset=[{"text": text} for text in article_texts(6, seed=99)] if "eval_strategy" in job.options else None,
        processing_class=byte_level_tokenizer(texts),
    )


def train(job: Job) -> None:
    """Train, and save the adapter; what was logged up to the end goes to ``<folder>/logged.json``."""
    trainer = build_trainer(job)
    if job.die_at >= 0 or job.events_file is not None:
        watch_writes(job)
    trainer.train(resume_from_checkpoint=job.resume)
    trainer.save_model()
    (job.folder / "logged.json").write_text(json.dumps(trainer.state.log_history))


def start(job: Job, function: Callable[[Job], None] = train) -> ForkServerProcess:
    """Start a job without waiting for it; what it prints goes to ``<folder>/log.txt``."""
    process = _context().Process(target=_run, args=(function, job))
    process.start()
    return process


def run(job: Job, function: Callable[[Job], None] = train) -> int:
    """Run a job to its end, and return its exit code; negative for a signal."""
    process = start(job, function)
    process.join(timeout=240)
    assert process.exitcode is not None, "the process did not end"
    return process.exitcode


def _run(function: Callable[[Job], None], job: Job) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "log.txt").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    function(job)


def _tear_newest(folder: Path) -> None:
    """Cut the file of an unfinished checkpoint in half that was written last, also by a library in Rust."""
    files = [path for path in folder.glob("_staging-checkpoint-*/**/*") if path.is_file() and path.stat().st_size > 1]
    if files:
        newest = max(files, key=lambda path: path.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size // 2)


def watch_writes(job: Job) -> None:
    folder = str(job.run)
    count = 0

    def happen(name: str, path: str) -> bool:
        """Count an event; tell whether it is the one to die at."""
        nonlocal count
        if job.events_file is not None:
            descriptor = os.open(job.events_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{name} {os.path.relpath(path, folder)}\n".encode())
            os.close(descriptor)
        count += 1
        return count - 1 == job.die_at

    def observe(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in ("os.rename", "shutil.rmtree", *_REMOVALS):
            path = arguments[0]
            if event in _REMOVALS and arguments[1] != -1:
                path = f"{folder}/{path}"  # a name in a folder that is being removed
        else:
            return
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        # The lock is opened for writing too; nothing is written into it.
        if path.startswith(folder) and not path.endswith("_run.lock") and happen(event, path):
            if job.tear:
                _tear_newest(job.run)
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(write: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
        def tear(*arguments: Any, **options: Any) -> Any:
            path = os.fspath(path_of(*arguments, **options))
            before = os.path.getsize(path) if os.path.exists(path) and "trajectories" in path else 0
            result = write(*arguments, **options)
            if path.startswith(folder) and happen("torn", path):
                os.truncate(path, (before + os.path.getsize(path)) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return tear

    safetensors.torch.serialize_file = torn(safetensors.torch.serialize_file, lambda tensors, path, *_, **__: path)
    Path.write_text = torn(Path.write_text, lambda path, *_, **__: path)  # type: ignore[method-assign]
    Ledger.append = torn(Ledger.append, lambda ledger, *_, **__: ledger.path)  # type: ignore[method-assign]
    sys.addaudithook(observe)
