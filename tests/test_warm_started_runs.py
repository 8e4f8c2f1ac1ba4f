"""Runs that begin with a supervised phase: on articles and on entries, what is counted, logged, and resumed."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_run import StopAt
from processes import Job, adapter_hash, made_up_entries, run
from tiny import tiny_config, tiny_llama, tiny_trainer
from tiny_families import build
from transformers import PreTrainedTokenizerFast, TrainerCallback

from attention_rl_trainer import trainer as trainer_module
from attention_rl_trainer.errors import NonFiniteError
from attention_rl_trainer.models.projections import UnsupportedArchitectureError
from attention_rl_trainer.records.ledger import read_ledger
from attention_rl_trainer.records.progress import load_parts, load_previous_adapter
from attention_rl_trainer.rollout.information import first_choice_values
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

STEPS_BEFORE = 2
STEPS = 5
# Two steps of warm start, and three of episodes of which the last two train.
OPTIONS: dict[str, Any] = {
    "warm_start_episodes": 16,
    "num_episodes": 24,
    "save_episodes": 8,
    "warmup_episodes": 1,
    "filter_threshold": -math.inf,
}
MEASURED = {"tokens_per_second", "rollout_seconds", "update_seconds", "peak_memory_gib"}
PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"

Make = Callable[..., AttentionGuidedRLTrainer]


@pytest.fixture(params=["articles", "entries"])
def make(request: pytest.FixtureRequest, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Make:
    """Makes a trainer whose run is in a folder of this name."""

    def build(name: str = "one", **changes: Any) -> AttentionGuidedRLTrainer:
        options = OPTIONS | changes
        if request.param == "articles":
            return tiny_trainer(tmp_path / name, texts, tokenizer, **options)
        args = tiny_config(tmp_path / name, **options)
        return AttentionGuidedRLTrainer(tiny_llama(), args, made_up_entries(texts[:12]), processing_class=tokenizer)

    return build


@pytest.fixture
def make_on_articles(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Make:
    def build(name: str = "one", **changes: Any) -> AttentionGuidedRLTrainer:
        return tiny_trainer(tmp_path / name, texts, tokenizer, **OPTIONS | changes)

    return build


@pytest.fixture(scope="module")
def killable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[str]]:
    """A finished job on entries, in a process of its own, and the names of all its writes."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(folder, OPTIONS, entries=True, events_file=folder / "events.txt")
    assert run(job) == 0, (folder / "log.txt").read_text()
    return job, (folder / "events.txt").read_text().splitlines()


def steps_of(trainer: AttentionGuidedRLTrainer) -> list[dict[str, float]]:
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: value for name, value in entry.items() if name not in MEASURED} for entry in entries]


def adapter_of(trainer: AttentionGuidedRLTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters() if p.requires_grad}


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Adapters(TrainerCallback):
    """Keeps the adapter after each step."""

    def __init__(self, trainer: AttentionGuidedRLTrainer) -> None:
        self.trainer = trainer
        self.after: list[dict[str, torch.Tensor]] = []
        trainer.add_callback(self)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.after.append(adapter_of(self.trainer))


def test_the_phase_comes_first_and_is_counted(make: Make) -> None:
    trainer = make()
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == STEPS
    entries = steps_of(trainer)
    assert ["warm_start_query_logprob" in entry for entry in entries] == [True] * STEPS_BEFORE + [False] * 3
    assert ["reward" in entry for entry in entries] == [False] * STEPS_BEFORE + [True] * 3
    assert [entry["updates"] for entry in entries] == [1, 2, 2, 3, 4]
    assert entries[-1]["episodes"] == 24
    rows = read_ledger(trainer.recorder.ledger.path)
    assert [row.episode for row in rows] == list(range(24))
    assert [row.step for row in rows] == [3] * 8 + [4] * 8 + [5] * 8
    progress = trainer.progress
    assert (progress.num_warm_start, progress.num_episodes, progress.num_trajectories) == (16, 24, 40)


def test_no_memory_comes_twice_in_an_epoch_of_both_phases(make_on_articles: Make) -> None:
    """Of 30 articles the phase reads 16, the episodes the 14 that are left, and then all anew."""
    trainer = make_on_articles(num_episodes=32)
    read: list[str] = []
    step = trainer.training_step

    def watched(model: Any, inputs: Any, *more: Any) -> torch.Tensor:
        read.extend(article.title for article in inputs["memories"].articles)
        return step(model, inputs, *more)

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train()
    assert len(set(read[:30])) == 30
    rows = read_ledger(trainer.recorder.ledger.path)
    assert [row.title for row in rows] == read[16:]
    assert [row.epoch for row in rows] == [0] * 14 + [1] * 18


def test_queries_and_values_become_likelier(make: Make) -> None:
    trainer = make(warm_start_episodes=64, num_episodes=8)
    trainer.train()
    entries = steps_of(trainer)[:8]
    for name in ("warm_start_query_logprob", "warm_start_value_logprob"):
        first, *_, last = [entry[name] for entry in entries]
        assert first + 0.15 < last < 0, name
    assert entries[0]["loss"] > entries[-1]["loss"] + 0.5
    assert all(entry["grad_norm"] > 0 for entry in entries)


def test_its_logged_numbers_are_the_documented_ones(make_on_articles: Make) -> None:
    trainer = make_on_articles()
    trainer.train()
    entry = trainer.state.log_history[0]
    own = {name for name in entry if name.startswith("warm_start")}
    assert own == set(re.findall(r"`(warm_start_\w+_logprob)`", PAGE.read_text()))
    others = {"loss", "grad_norm", "learning_rate", "updates", "update_seconds", "peak_memory_gib", "epoch", "step"}
    assert set(entry) == own | others


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_its_loss_is_what_is_logged_of_queries_and_values(num_iterations: int, make_on_articles: Make) -> None:
    """Also where an update of the episodes has several optimizer steps: one of the phase has one."""
    trainer = make_on_articles(num_iterations=num_iterations)
    trainer.train()
    for entry in steps_of(trainer)[:STEPS_BEFORE]:
        parts = entry["warm_start_query_logprob"] + entry["warm_start_value_logprob"]
        assert entry["loss"] == pytest.approx(-parts, rel=1e-4)
    assert [entry["updates"] for entry in steps_of(trainer)[:STEPS_BEFORE]] == [1, 2]


def test_its_trajectories_are_numbered_through(make_on_articles: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers seed the draws, so that no step repeats those of another."""
    trainer, numbers = make_on_articles(generation_batch_size=4, gradient_accumulation_steps=2), []
    lay_out = trainer_module.lay_out_lessons

    def watched(*arguments: Any) -> Any:
        numbers.append(list(arguments[3]))
        return lay_out(*arguments)

    monkeypatch.setattr(trainer_module, "lay_out_lessons", watched)
    trainer.train()
    assert numbers == [list(range(first, first + 4)) for first in (0, 4, 8, 12)]


def test_queries_may_name_other_pairs(make_on_articles: Make) -> None:
    options: dict[str, Any] = {"warm_start_episodes": 8, "num_episodes": 8}
    plain, other = make_on_articles("plain", **options), make_on_articles("other", warm_start_mismatch=1.0, **options)
    plain.train()
    other.train()
    first, second = (steps_of(trainer)[0]["warm_start_query_logprob"] for trainer in (plain, other))
    assert first != second


def test_a_step_of_two_batches_is_that_of_one_of_their_size(make_on_articles: Make) -> None:
    options: dict[str, Any] = {"optim": "sgd", "warm_start_episodes": 32, "num_episodes": 16}
    halves = make_on_articles("halves", gradient_accumulation_steps=2, **options)
    whole = make_on_articles("whole", generation_batch_size=16, **options)
    halves.train()
    whole.train()
    assert halves.state.global_step == whole.state.global_step == 3
    for name in ("loss", "grad_norm", "warm_start_query_logprob", "warm_start_value_logprob"):
        found, expected = ([entry[name] for entry in steps_of(trainer)[:2]] for trainer in (halves, whole))
        assert found == pytest.approx(expected, rel=1e-3), name


def test_micro_batches_that_are_halved_are_logged_once(make_on_articles: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"warm_start_episodes": 8, "num_episodes": 8}
    expected = make_on_articles("small", training_batch_size=2, **options)
    expected.train()
    trainer = make_on_articles("halved", training_batch_size=4, **options)
    forward, calls = trainer.policy.training_forward, 0

    def runs_out(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*arguments, **more)

    monkeypatch.setattr(trainer.policy, "training_forward", runs_out)
    trainer.train()
    for name in ("loss", "warm_start_query_logprob", "warm_start_value_logprob"):
        assert steps_of(trainer)[0][name] == pytest.approx(steps_of(expected)[0][name], rel=1e-5), name


def test_the_kl_begins_at_the_adapter_after_the_phase(make: Make) -> None:
    trainer = make()
    adapters = Adapters(trainer)
    trainer.train()
    assert not are_equal(adapters.after[0], adapters.after[STEPS_BEFORE - 1])
    run = Path(str(trainer.args.output_dir))
    # The first batch of episodes is judged by nothing, so that the second trains first.
    for step in (STEPS_BEFORE + 1, STEPS_BEFORE + 2):
        previous = load_previous_adapter(run / f"checkpoint-{step}")
        assert are_equal(previous, adapters.after[STEPS_BEFORE - 1])
    kl = [entry.get("kl") for entry in steps_of(trainer)]
    assert kl[: STEPS_BEFORE + 1] == [None] * (STEPS_BEFORE + 1)
    assert kl[STEPS_BEFORE + 1] == 0
    assert kl[STEPS_BEFORE + 2] > 0


def test_without_the_phase_nothing_of_it_is_left(make_on_articles: Make) -> None:
    trainer = make_on_articles(warm_start_episodes=0)
    trainer.train()
    assert trainer.state.global_step == 3
    assert not [name for entry in steps_of(trainer) for name in entry if "warm_start" in name]
    assert [entry["updates"] for entry in steps_of(trainer)] == [0, 1, 2]


@pytest.mark.parametrize("number", [1, 12])
def test_part_of_a_step_is_refused(number: int, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"warm_start_episodes must be a multiple of the trajectories of a step, 8.*; got {number}$"
    ):
        tiny_config(tmp_path, warm_start_episodes=number)
    with pytest.raises(ValueError, match="a step, 16 "):
        tiny_config(tmp_path, warm_start_episodes=8, gradient_accumulation_steps=2)


def test_a_run_has_an_episode(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_episodes must be at least 1, got 0"):
        tiny_config(tmp_path, num_episodes=0, warm_start_episodes=8)


@pytest.mark.parametrize(("every", "steps"), [(16, [2, 4, 5]), (12, [2, 3, 5])])
def test_checkpoints_count_both_phases(every: int, steps: list[int], make_on_articles: Make) -> None:
    trainer = make_on_articles(save_episodes=every)
    trainer.train()
    found = sorted(int(path.name.partition("-")[2]) for path in trainer.output_dir.glob("checkpoint-*"))
    assert found == steps
    done = load_parts(trainer.output_dir / f"checkpoint-{steps[0]}")["progress"]
    assert done["num_warm_start"] + done["num_episodes"] == 8 * steps[0]


def test_a_list_that_is_not_shown_has_no_order(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="warm_start_order is listed, but show_keys is none"):
        tiny_config(tmp_path, warm_start_episodes=8, warm_start_order="listed")
    tiny_config(tmp_path, warm_start_episodes=8, warm_start_order="listed", show_keys="plain")


def test_pairs_that_tell_most_come_first(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a low temperature the lessons read what `first_choice_values` puts first, in its order."""
    trainer = make(warm_start_temperature=1e-6, num_episodes=8)
    lay_out, batches, orders = trainer_module.lay_out_lessons, [], []

    def note(batch: Any, *arguments: Any) -> Any:
        lessons = lay_out(batch, *arguments)
        batches.append(batch)
        orders.append(lessons.selected_index)
        return lessons

    monkeypatch.setattr(trainer_module, "lay_out_lessons", note)
    trainer.train()
    assert len(orders) == STEPS_BEFORE
    for batch, order in zip(batches, orders, strict=True):
        told = first_choice_values(trainer.policy, trainer.layout, batch)
        assert torch.equal(order, told.argsort(dim=1, descending=True)[:, : order.shape[1]])


def test_lessons_read_in_the_order_of_the_article(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(warm_start_order="article", num_episodes=8)
    lay_out, orders = trainer_module.lay_out_lessons, []

    def note(batch: Any, *arguments: Any) -> Any:
        lessons = lay_out(batch, *arguments)
        steps = lessons.selected_index.shape[1]
        orders.append((lessons.selected_index, batch.pair_numbers.argsort(dim=1)[:, :steps]))
        return lessons

    monkeypatch.setattr(trainer_module, "lay_out_lessons", note)
    trainer.train()
    assert len(orders) == STEPS_BEFORE
    assert all(torch.equal(order, expected) for order, expected in orders)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("warm_start_temperature", 0.5, 0.4),
        ("warm_start_order", "article", "random"),
        ("warm_start_order", "random", "article"),
    ],
)
def test_a_run_resumes_with_the_same_order_alone(name: str, before: Any, after: Any, make_on_articles: Make) -> None:
    make_on_articles(**{name: before}).train()
    with pytest.raises(ValueError, match=name):
        make_on_articles(**{name: after}, num_episodes=32).train(resume_from_checkpoint=True)


def test_the_identity_of_a_run_in_random_order_is_as_before_there_were_others(make_on_articles: Make) -> None:
    assert "warm_start_order" not in make_on_articles().run_identity()
    assert make_on_articles(warm_start_order="article").run_identity()["warm_start_order"] == "article"


def test_without_a_phase_its_other_options_do_not_make_another_run(make_on_articles: Make) -> None:
    """So a recipe's file can be used with ``--warm_start_episodes 0``."""
    plain, given = (make_on_articles(warm_start_episodes=0, warm_start_mismatch=share) for share in (None, 0.3))
    assert plain.run_identity() == given.run_identity()


def test_a_run_that_would_resume_with_part_of_a_step_left_of_the_phase_is_refused(make_on_articles: Make) -> None:
    first = make_on_articles(warm_start_episodes=16, save_episodes=8)
    first.train()
    for step in range(STEPS_BEFORE, STEPS + 1):
        shutil.rmtree(first.output_dir / f"checkpoint-{step}")
    resumed = make_on_articles(warm_start_episodes=16, gradient_accumulation_steps=2, num_episodes=32)
    with pytest.raises(ValueError, match=r"checkpoint-1 stands in the warm start with 8 .* of 16 "):
        resumed.train(resume_from_checkpoint=True)


def test_a_model_that_does_not_leave_out_padding_is_refused_before_the_first_lesson(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    args = tiny_config(tmp_path, **OPTIONS)
    trainer = AttentionGuidedRLTrainer(
        build("llama4_text"), args, made_up_entries(texts[:12]), processing_class=tokenizer
    )
    with pytest.raises(UnsupportedArchitectureError, match="does not leave out padding"):
        trainer.train()
    assert trainer.updater.num_updates == 0


def test_a_resumed_run_ends_like_the_whole_one(make: Make) -> None:
    """From inside of the phase, where some numbers are not logged yet, from its end, and after it."""
    whole = make("whole", logging_steps=2)
    whole.train()
    for step in (1, STEPS_BEFORE, STEPS_BEFORE + 2):
        resumed = make(f"from {step}", logging_steps=2)
        shutil.copytree(whole.output_dir / f"checkpoint-{step}", resumed.output_dir / f"checkpoint-{step}")
        ledger = whole.recorder.ledger.path
        shutil.copy(ledger, resumed.output_dir)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == STEPS
        assert are_equal(adapter_of(resumed), adapter_of(whole))
        assert (resumed.output_dir / ledger.name).read_bytes() == ledger.read_bytes()
        for name in ("optimizer.safetensors", "previous_adapter.safetensors", "random_states.safetensors"):
            last = Path(f"checkpoint-{STEPS}", name)
            assert (resumed.output_dir / last).read_bytes() == (whole.output_dir / last).read_bytes(), name
        assert steps_of(resumed) == steps_of(whole)


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_the_phase_resumes_by_itself(make: Make) -> None:
    whole, stopped, resumed = make("whole"), make("stopped"), make("stopped")
    whole.train()
    stopped.add_callback(StopAt(2))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert read_ledger(stopped.recorder.ledger.path) == []
    resumed.train(resume_from_checkpoint=True)
    assert are_equal(adapter_of(resumed), adapter_of(whole))
    assert resumed.recorder.ledger.path.read_bytes() == whole.recorder.ledger.path.read_bytes()


@pytest.mark.parametrize(
    "event",
    [
        "os.rename _staging-checkpoint-1",
        pytest.param("torn _staging-checkpoint-2/optimizer.safetensors", marks=pytest.mark.slow),
    ],
    ids=["between two checkpoints", "in the middle of one"],
)
def test_a_run_on_entries_that_is_killed_in_the_phase_ends_like_the_whole_one(
    event: str, killable: tuple[Job, list[str]], tmp_path: Path
) -> None:
    whole, events = killable
    job = replace(whole, folder=tmp_path, die_at=events.index(event), events_file=None)
    assert run(job) == -signal.SIGKILL
    assert run(replace(job, resume=True, die_at=-1)) == 0, (tmp_path / "log.txt").read_text()
    assert adapter_hash(job) == adapter_hash(whole)
    assert (job.run / "trajectories.jsonl").read_bytes() == (whole.run / "trajectories.jsonl").read_bytes()


def test_a_number_that_is_not_finite_stops_the_phase_and_undoes_its_step(make_on_articles: Make) -> None:
    trainer = make_on_articles()

    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                with torch.no_grad():
                    trainer.policy.head.linear.weight[5] = torch.nan

    trainer.add_callback(Break())
    with pytest.raises(NonFiniteError, match=r"policy logit.*article \d+"):
        trainer.train()
    assert trainer.progress.num_warm_start == 8
    assert trainer.updater.num_updates == 1


def test_a_report_is_that_of_the_episodes(make_on_articles: Make) -> None:
    trainer = make_on_articles(report_at_end=True, log_trajectory_steps=1)
    trainer.train()
    summary = (trainer.output_dir / "report" / "summary.md").read_text()
    assert "| 24" in summary
    state = json.loads((trainer.output_dir / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert "warm_start_value_logprob" in state["log_history"][0]
