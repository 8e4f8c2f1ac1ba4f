"""Whole runs of the trainer on tiny models: what moves, what does not, what is logged, what is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import adapted, article_texts, save_tiny_llama, tiny_config, tiny_gpt2, tiny_llama, tiny_trainer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.errors import NonFiniteError
from attention_rl_trainer.records.ledger import read_ledger
from attention_rl_trainer.records.progress import CheckpointError
from attention_rl_trainer.rollout.environment import Selection
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
from attention_rl_trainer.types import KeyValuePairs

NEVER = 1e9  # a threshold that no reward exceeds
ALWAYS = -math.inf


def steps_of(trainer: AttentionGuidedRLTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def states(trainer: AttentionGuidedRLTrainer) -> dict[str, Any]:
    """The state of every part of a run, as a checkpoint keeps it."""
    return {name: part.state_dict() for name, part in trainer.parts.items()}


def adapter_bytes(trainer: AttentionGuidedRLTrainer) -> dict[str, bytes]:
    parameters = trainer.policy.model.named_parameters()
    return {name: p.detach().numpy().tobytes() for name, p in parameters if p.requires_grad}


def base_bytes(trainer: AttentionGuidedRLTrainer) -> dict[str, bytes]:
    parameters = trainer.policy.model.named_parameters()
    return {name: p.detach().numpy().tobytes() for name, p in parameters if not p.requires_grad}


class Recorder(TrainerCallback):
    """Writes down the adapter and the optimizer's state after every step."""

    def __init__(self) -> None:
        self.trainer: AttentionGuidedRLTrainer | None = None
        self.adapters: list[dict[str, bytes]] = []
        self.optimizers: list[str] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.adapters.append(adapter_bytes(self.trainer))
        self.optimizers.append(repr(flat_state(self.trainer.optimizer.state_dict())))


def flat_state(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): flat_state(item) for key, item in value.items()}
    return value


def recorded(trainer: AttentionGuidedRLTrainer) -> Recorder:
    recorder = Recorder()
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    return recorder


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_only_the_adapter_changes(
    build: Any, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, model=build())
    adapter, base = adapter_bytes(trainer), base_bytes(trainer)
    trainer.train()
    assert steps_of(trainer)[-1]["updates"] >= 2
    assert base_bytes(trainer) == base
    assert adapter_bytes(trainer) != adapter
    assert all(".lora_" in name for name in adapter)


def test_the_same_seed_gives_the_same_numbers(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    timing = {"tokens_per_second", "rollout_seconds", "update_seconds", "peak_memory_gib"}

    def run(name: str, seed: int) -> tuple[list[dict[str, float]], dict[str, bytes]]:
        model = tiny_llama()
        torch.seed()  # whatever was drawn before: the adapter's first weights depend on the seed alone
        trainer = tiny_trainer(tmp_path / name, texts, tokenizer, model=model, seed=seed)
        trainer.train()
        logs = [{k: v for k, v in entry.items() if k not in timing} for entry in steps_of(trainer)]
        return logs, adapter_bytes(trainer)

    first, again, other = run("first", 1), run("again", 1), run("other", 2)
    assert first == again
    assert first[0] != other[0]


def test_kl_is_zero_at_the_first_update_and_positive_from_the_second(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, filter_threshold=ALWAYS)
    trainer.train()
    updates = [entry for entry in steps_of(trainer) if "kl" in entry]
    assert len(updates) == 4  # two of six batches of eight are warm-up
    assert updates[0]["kl"] == 0.0
    assert all(entry["kl"] > 0 for entry in updates[1:])


def test_kl_survives_a_skipped_batch(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """After an update, a skipped batch and an update, the previous adapter is still the one before the last step."""
    trainer = tiny_trainer(tmp_path, texts, tokenizer, filter_threshold=ALWAYS)

    class SkipFourth(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.args.filter_threshold = NEVER if state.global_step == 3 else ALWAYS

    trainer.add_callback(SkipFourth())
    trainer.train()
    entries = steps_of(trainer)
    assert [entry["kept_trajectories"] for entry in entries] == [0, 0, 8, 0, 8, 8]
    assert [entry["updates"] for entry in entries] == [0, 0, 1, 1, 2, 3]
    assert entries[2]["kl"] == 0.0
    assert "kl" not in entries[3]
    assert entries[4]["kl"] > 0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_batch_without_a_kept_trajectory_changes_no_byte(
    optim: str, steps: int, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    # Hidden size 1024 makes the LoRA matrices large enough for the 8-bit states of bitsandbytes.
    model = tiny_llama(hidden_size=1024, num_attention_heads=8, head_dim=16) if "bnb" in optim else tiny_llama()
    trainer = tiny_trainer(
        tmp_path, texts, tokenizer, model=model, filter_threshold=ALWAYS, optim=optim, weight_decay=0.1,
        gradient_accumulation_steps=steps, num_episodes=48 * steps,
    )  # fmt: skip

    class SkipLater(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.args.filter_threshold = ALWAYS if state.global_step == 3 else NEVER

    recorder = recorded(trainer)
    trainer.add_callback(SkipLater())
    trainer.train()
    assert len(recorder.adapters) == 6
    changed = [recorder.adapters[i] != recorder.adapters[i - 1] for i in range(1, 6)]
    assert changed == [False, False, True, False, False]
    assert recorder.optimizers[3] == recorder.optimizers[4] == recorder.optimizers[5]
    assert recorder.optimizers[2] != recorder.optimizers[3]
    if "bnb" in optim:
        states = [s for s in trainer.optimizer.state.values() if s.get("state1") is not None]
        assert any(state["state1"].dtype == torch.uint8 for state in states)


def test_warm_up_trains_nothing(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = tiny_trainer(
        tmp_path, texts, tokenizer, filter_threshold=ALWAYS, generation_batch_size=5, num_episodes=20
    )
    trainer.train()
    # Batches begin after 0, 5, 10 and 15 episodes: only the last one has 15 rewards before it.
    assert [entry["kept_trajectories"] for entry in steps_of(trainer)] == [0, 0, 0, 5]
    assert [row.verdict for row in read_ledger(trainer.recorder.ledger.path)] == ["warmup"] * 15 + ["kept"] * 5


def test_verdicts_follow_the_history_before_the_batch(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=64)
    trainer.train()
    rows = read_ledger(trainer.recorder.ledger.path)
    assert [row.episode for row in rows] == list(range(64))
    for number, row in enumerate(rows):
        before = torch.tensor([r.reward for r in rows[: number // 8 * 8]], dtype=torch.float64)
        if len(before) < 15:
            assert (row.verdict, row.threshold) == ("warmup", None)
            continue
        threshold = (before.mean() + before.std(correction=0)).item()
        assert row.threshold == pytest.approx(threshold, abs=1e-9)
        assert (row.verdict == "kept") == (row.reward > threshold)
    assert {row.verdict for row in rows} == {"warmup", "kept", "below_threshold"}


def test_exactly_num_episodes_run(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=21)
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(read_ledger(trainer.recorder.ledger.path)) == 21
    assert steps_of(trainer)[-1]["episodes"] == 21
    accumulating = tiny_trainer(tmp_path / "g", texts, tokenizer, num_episodes=17, gradient_accumulation_steps=2)
    accumulating.train()
    assert accumulating.state.global_step == 2  # ceil(17 / 16); its last batch of eight has one row, the next none
    assert len(read_ledger(accumulating.recorder.ledger.path)) == 17


def test_no_article_is_read_twice_in_an_epoch(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=90)
    trainer.train()
    rows = read_ledger(trainer.recorder.ledger.path)
    for epoch in range(3):
        assert sorted(row.article_index for row in rows if row.epoch == epoch) == list(range(30))
    assert [row.article_index for row in rows[:30]] != [row.article_index for row in rows[30:60]]


def test_accumulating_two_batches_is_one_update_over_both(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    # 44 episodes: 16 of warm-up, an update over 16, and a last one over the 12 that are left.
    options: dict[str, Any] = {"filter_threshold": ALWAYS, "advantage": "reward", "warmup_episodes": 16, "optim": "sgd"}
    options |= {"max_grad_norm": 1000.0, "learning_rate": 1.0, "num_episodes": 44}
    halves = tiny_trainer(tmp_path / "a", texts, tokenizer, **options, gradient_accumulation_steps=2)
    whole = tiny_trainer(tmp_path / "b", texts, tokenizer, **options, generation_batch_size=16)
    halves.train()
    whole.train()
    assert [e["updates"] for e in steps_of(halves)] == [e["updates"] for e in steps_of(whole)] == [0, 1, 2]
    for entry, expected in zip(steps_of(halves), steps_of(whole), strict=True):
        assert entry["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert entry["kept_trajectories"] == expected["kept_trajectories"]


def test_several_iterations_are_several_updates(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, num_iterations=3, filter_threshold=ALWAYS)
    trainer.train()
    assert [entry["updates"] for entry in steps_of(trainer)] == [0, 0, 3, 6, 9, 12]
    assert trainer.state.global_step == 6
    # 40 episodes in windows of 16: the last window's second batch is empty.
    accumulating = tiny_trainer(
        tmp_path / "g", texts, tokenizer, num_iterations=3, filter_threshold=ALWAYS, gradient_accumulation_steps=2,
        num_episodes=40,
    )  # fmt: skip
    accumulating.train()
    assert [entry["updates"] for entry in steps_of(accumulating)] == [0, 3, 6]


def test_micro_batches_do_not_change_the_update(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    norms = []
    for size in (1, 3, 8):
        trainer = tiny_trainer(
            tmp_path / str(size), texts, tokenizer, filter_threshold=ALWAYS, training_batch_size=size, num_episodes=24
        )
        trainer.train()
        norms.append(steps_of(trainer)[-1]["grad_norm"])
    assert norms[0] == pytest.approx(norms[2], rel=1e-4)
    assert norms[1] == pytest.approx(norms[2], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"credit": "return_to_go", "advantage": "whitened"},
        {"credit": "step", "advantage": "reward", "head_aggregation": "scores"},
        {"selector_coef": 1.0, "reward_gradient_coef": 0.5, "order_coef": 0.5, "entropy_coef": 0.01},
        {"kl_reference": "base", "include_key_in_context": True, "window": "random"},
        {"attention_layer": 0, "selection_temperature": 0.1, "query_temperature": 0.8, "beta": 0.0},
        {"disable_dropout": False, "activation_checkpointing": True},
        {"dataloader_num_workers": 1},
        {"information_coef": 1.0, "selector_coef": 1.0, "selector_gradient": "expected"},
        {"num_queries": 3, "credit": "step", "advantage": "whitened"},
    ],
)
def test_every_option_runs(
    options: dict[str, Any], tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=32, filter_threshold=0.0, **options)
    before = adapter_bytes(trainer)
    trainer.train()
    assert adapter_bytes(trainer) != before
    assert all(math.isfinite(value) for entry in steps_of(trainer) for value in entry.values())


def test_activation_checkpointing_gives_the_same_run(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    runs = []
    for switch in (False, True):
        trainer = tiny_trainer(tmp_path / str(switch), texts, tokenizer, activation_checkpointing=switch)
        trainer.train()
        runs.append([(e["loss"], e["grad_norm"], e["reward"]) for e in steps_of(trainer)])
    for plain, checkpointed in zip(*runs, strict=True):
        assert checkpointed == pytest.approx(plain, rel=1e-4, abs=1e-6)


def test_logged_metrics_are_the_documented_ones(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, order_coef=0.1, information_coef=0.1, filter_threshold=0.0)
    trainer.train()
    logged = {name for entry in steps_of(trainer) for name in entry}
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert logged == {name for name in documented if not name.startswith("eval_")}
    trainer.eval_dataset = [{"text": text} for text in texts[:4]]
    evaluated = {name for name in trainer.evaluate() if name.startswith("eval_")}
    assert evaluated == set(re.findall(r"`(eval_\w+)`", page)) - {"eval_tables"}


def test_metrics_between_two_logs_are_joined(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    every = tiny_trainer(tmp_path / "1", texts, tokenizer)
    every.train()
    third = tiny_trainer(tmp_path / "3", texts, tokenizer, logging_steps=3)
    third.train()
    single, joined = steps_of(every), steps_of(third)
    assert len(joined) == 2
    assert joined[1]["reward"] == pytest.approx(sum(entry["reward"] for entry in single[3:]) / 3, abs=1e-7)
    assert joined[1]["reward_max"] == max(entry["reward_max"] for entry in single[3:])
    assert joined[1]["kept_trajectories"] == sum(entry["kept_trajectories"] for entry in single[3:])
    assert joined[1]["episodes"] == 48


def test_evaluation_trains_nothing_and_repeats_itself(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    held_out = [{"text": text} for text in article_texts(12, seed=9)]
    trainer = tiny_trainer(
        tmp_path, texts, tokenizer, model=adapted(tiny_llama()), eval_episodes=10,
        trainer_options={"eval_dataset": held_out},
    )  # fmt: skip
    adapter, state = adapter_bytes(trainer), states(trainer)
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first == again
    assert first["eval_episodes"] == 10
    assert first["eval_reward"] == pytest.approx(first["eval_query_gain"] + first["eval_model_gain"], abs=1e-5)
    assert adapter_bytes(trainer) == adapter
    assert states(trainer) == state
    few = trainer.evaluate(held_out[:3], metric_key_prefix="few")
    assert few["few_episodes"] == 3


def test_evaluation_articles_are_read_more_than_once_if_asked(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    # Long enough that a random window of them differs from reading to reading.
    held_out = [{"text": " ".join(article_texts(6, seed=seed))} for seed in (9, 10)]
    options = {"eval_episodes": 6, "eval_order_episodes": 2, "window": "random"}
    trainer = tiny_trainer(tmp_path, texts, tokenizer, eval_epochs=4, **options)
    read = []
    trainer.environment.reset = spy(trainer.environment.reset, read)  # type: ignore[method-assign]
    assert trainer.evaluate(held_out)["eval_episodes"] == 6
    stored = json.loads((Path(trainer.args.output_dir) / "evaluation" / "eval" / "evaluation.json").read_text())
    assert (stored["queries"]["policy"]["num_values"], stored["queries"]["policy"]["num_clusters"]) == (6, 2)
    assert (stored["orders"]["learned"]["num_values"], stored["orders"]["learned"]["num_clusters"]) == (2, 2)
    assert len({tuple(row) for memory in read for row in memory.key_tokens.flatten(1).tolist()}) == 6
    once = tiny_trainer(tmp_path / "once", texts, tokenizer, **options)
    assert once.evaluate(held_out)["eval_episodes"] == 2


def spy(method: Callable[[Any], Any], seen: list[Any]) -> Callable[[Any], Any]:
    """Call a method, and keep what it was given."""

    def call(argument: Any) -> Any:
        seen.append(argument)
        return method(argument)

    return call


def test_the_best_evaluation_is_remembered(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(
        tmp_path, texts, tokenizer, num_episodes=32, eval_strategy="steps", eval_steps=1, eval_episodes=4,
        metric_for_best_model="query_over_empty", greater_is_better=True,
        filter_threshold=float("-inf"), warmup_episodes=1, learning_rate=1e-2,
        trainer_options={"eval_dataset": [{"text": text} for text in article_texts(4, seed=9)]},
    )  # fmt: skip
    trainer.train()
    values = [entry["eval_query_over_empty"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(set(values)) == 4
    assert trainer.state.best_metric == max(values)


def test_a_context_that_holds_a_trajectory_but_no_whole_memory(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    held_out = [{"text": text} for text in article_texts(3, seed=9)]
    longest = tiny_trainer(tmp_path / "longer", texts, tokenizer, num_steps=1).layout.trajectory_tokens

    def short_trainer(**options: Any) -> AttentionGuidedRLTrainer:
        model = tiny_llama()
        model.config.max_position_embeddings = longest
        return tiny_trainer(tmp_path, texts, tokenizer, model=model, num_steps=1, trainer_options=options)

    message = (
        rf"reads all 4 pairs of a memory to score orders, which takes \d+ tokens, .* holds {longest}\. Set eval_order"
    )
    with pytest.raises(ValueError, match=message):
        short_trainer(eval_dataset=held_out)
    trainer = short_trainer()
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(held_out)
    trainer.args.eval_order_episodes = 0
    metrics = trainer.evaluate(held_out)
    assert "eval_query_over_empty" in metrics
    assert "eval_order_over_random" not in metrics


def test_an_unadapted_policy_has_no_model_gain(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer)
    metrics = trainer.evaluate([{"text": text} for text in texts])
    assert metrics["eval_model_gain"] == pytest.approx(0.0, abs=1e-6)


def test_checkpoints_come_at_multiples_of_save_episodes_and_at_the_end(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, save_episodes=20, num_episodes=60)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    # Steps of eight pass 20 at step 3, 40 at step 5, and 60 at the last, the eighth.
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5", "checkpoint-8"]
    names = {path.name for path in (folder / "checkpoint-3").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "attention_rl_state.json",
        "previous_adapter.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
        "random_states.safetensors",
        "run_state.safetensors",
        "run_identity.json",
        "attention_rl_config.json",
        "manifest.json",
    } <= names
    assert not [name for name in names if Path(name).suffix in {".pt", ".pth", ".bin", ".pkl"}]
    state = json.loads((folder / "checkpoint-3" / "attention_rl_state.json").read_text())
    assert state["progress"]["num_episodes"] == state["filter"]["count"] == 24


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(
    streaming: bool, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"title": [f"article {i}" for i in range(30)], "text": texts})
    articles = rows.to_iterable_dataset(num_shards=3) if streaming else rows

    def build(name: str, **options: Any) -> AttentionGuidedRLTrainer:
        return AttentionGuidedRLTrainer(
            model=tiny_llama(),
            args=tiny_config(tmp_path / name, num_episodes=64, filter_threshold=0.0, shuffle_buffer_size=7, **options),
            train_dataset=articles,
            processing_class=tokenizer,
        )

    whole = build("whole")
    whole.train()
    broken = build("broken", save_episodes=32)
    broken.train()
    resumed = build("broken", save_episodes=32)
    resumed.train(resume_from_checkpoint=str(Path(broken.args.output_dir) / "checkpoint-4"))
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert states(resumed) == states(whole)
    timing = {"tokens_per_second", "rollout_seconds", "update_seconds", "peak_memory_gib"}
    for entry, expected in zip(steps_of(resumed)[4:], steps_of(whole)[4:], strict=True):
        assert {k: v for k, v in entry.items() if k not in timing} == {
            k: v for k, v in expected.items() if k not in timing
        }
    assert read_ledger(resumed.recorder.ledger.path) == read_ledger(whole.recorder.ledger.path)


@pytest.mark.parametrize(("first", "batch_size", "second"), [(20, 8, 40), (20, 4, 40), (32, 16, 50)])
def test_a_resumed_run_has_as_many_episodes_as_asked_for(
    first: int, batch_size: int, second: int, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_trainer(tmp_path, texts, tokenizer, num_episodes=first).train()
    resumed = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=second, generation_batch_size=batch_size)
    resumed.train(resume_from_checkpoint=True)
    assert [row.episode for row in read_ledger(resumed.recorder.ledger.path)] == list(range(second))
    assert steps_of(resumed)[-1]["episodes"] == second
    assert resumed.args.max_steps == -1


def test_a_finished_run_is_not_run_again(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, filter_threshold=ALWAYS)
    trainer.train()
    folder = Path(trainer.args.output_dir)

    def written() -> dict[Path, int]:
        # Some releases of filelock truncate the lock's file, which is empty, whenever they take it.
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "_run.lock"}

    files = written()
    again = tiny_trainer(tmp_path, texts, tokenizer, filter_threshold=ALWAYS)
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert written() == files
    assert adapter_bytes(again) == adapter_bytes(trainer)  # so that saving it now loses nothing
    assert states(again) == states(trainer)


def test_resuming_without_a_checkpoint_is_refused(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint nowhere"):
        trainer.train(resume_from_checkpoint="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "empty"))


def test_training_again_starts_a_run_of_its_own(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, filter_threshold=ALWAYS)
    trainer.train()
    learned = adapter_bytes(trainer)
    trainer.train()
    assert steps_of(trainer)[-1]["episodes"] == 48
    assert [entry["kept_trajectories"] for entry in steps_of(trainer)] == [0, 0, 8, 8, 8, 8]
    assert steps_of(trainer)[2]["kl"] == 0.0
    assert adapter_bytes(trainer) != learned
    assert len(read_ledger(trainer.recorder.ledger.path)) == 48


def test_skipped_articles_are_counted_and_survive_a_checkpoint(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    mixed = [text for pair in zip(texts, ["too short"] * 15, strict=False) for text in pair] + [""]
    options: dict[str, Any] = {"shuffle": False, "save_episodes": 8}
    whole = tiny_trainer(tmp_path / "a", mixed, tokenizer, num_episodes=16, **options)
    whole.train()
    assert [entry["skipped_articles"] for entry in steps_of(whole)] == [7, 16]
    assert whole.progress.skipped == {"too_short": 15, "empty": 1}
    resumed = tiny_trainer(tmp_path / "a", mixed, tokenizer, num_episodes=16, **options)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-1"))
    assert resumed.progress.skipped == whole.progress.skipped


def test_a_second_run_in_the_same_folder_sets_the_old_ledger_aside(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    for _ in range(2):
        trainer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=8)
        trainer.train()
    folder = Path(trainer.args.output_dir)
    assert len(read_ledger(folder / "trajectories.jsonl")) == 8
    assert len(read_ledger(folder / "_earlier-1" / "trajectories.jsonl")) == 8


def test_the_saved_adapter_is_the_trained_one(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, filter_threshold=ALWAYS)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_llama(), trainer.args.output_dir)
    ids = torch.randint(1, 380, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.policy.model.eval()(input_ids=ids).logits)
        assert not torch.allclose(loaded(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)


def test_report_and_config_are_written(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("matplotlib")
    trainer = tiny_trainer(tmp_path, texts, tokenizer, report_at_end=True, hub_token="hf_secret")
    trainer.train()
    folder = Path(trainer.args.output_dir)
    names = {path.name for path in (folder / "report").iterdir()}
    assert names == {"summary.md", "rewards.png", "gains.png", "kl.png", "selection.png"}
    saved = json.loads((folder / "attention_rl_config.json").read_text())
    assert saved["num_episodes"] == 48
    assert "max_steps" not in saved
    trainer.save_model()
    assert not list(folder.rglob("training_args.bin"))  # a pickle with the token in it
    for path in folder.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path
    assert "articles skipped" in (folder / "report" / "summary.md").read_text()


def test_without_matplotlib_the_summary_is_still_written(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trainer = tiny_trainer(tmp_path, texts, tokenizer, report_at_end=True, num_episodes=8)
    trainer.train()
    assert [path.name for path in (Path(trainer.args.output_dir) / "report").iterdir()] == ["summary.md"]


def test_callbacks_are_the_ones_to_expect(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Own(ProgressCallback):
        pass

    def names(**changes: Any) -> set[str]:
        trainer = tiny_trainer(tmp_path, texts, tokenizer, trainer_options={"callbacks": [Own()]}, **changes)
        return {type(callback).__name__ for callback in trainer.callback_handler.callbacks}

    with_bar, without = names(disable_tqdm=False), names(disable_tqdm=True)
    assert {"Own", "EpisodeProgressCallback"} <= with_bar & without
    assert ProgressCallback.__name__ not in with_bar | without
    assert PrinterCallback.__name__ in without - with_bar


def test_adapters_that_change_the_base_are_refused(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    from peft import PromptTuningConfig

    for config, message in [
        (LoraConfig(modules_to_save=["lm_head"]), "modules_to_save"),
        (LoraConfig(bias="all"), "bias='all'"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prompt learning"),
    ]:
        with pytest.raises(ValueError, match=f"the adapter has {message}.*untouched base model"):
            tiny_trainer(tmp_path, texts, tokenizer, trainer_options={"peft_config": config})
    given = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        tiny_trainer(tmp_path, texts, tokenizer, model=given)


def test_a_tokenizer_that_does_not_fit_is_refused(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"ids go up to 399, but the model embeds 300"):
        tiny_trainer(tmp_path, texts, tokenizer, model=tiny_llama(vocab_size=300))
    with pytest.raises(ValueError, match="give its tokenizer as processing_class"):
        AttentionGuidedRLTrainer(tiny_llama(), args=tiny_config(tmp_path))


def test_model_tags_and_mixed_precision(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "attention-guided-rl" in tiny_trainer(tmp_path, texts, tokenizer).model.model_tags
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(ValueError, match=r"mixed precision is 'bf16'.*--mixed_precision no"):
            tiny_trainer(tmp_path, texts, tokenizer)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_evaluating_several_sets(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    sets = {"first": [{"text": text} for text in texts[:3]], "second": [{"text": text} for text in texts[3:5]]}
    trainer = tiny_trainer(tmp_path, texts, tokenizer, trainer_options={"eval_dataset": sets})
    metrics = trainer.evaluate()
    assert metrics["eval_first_episodes"] == 3
    assert metrics["eval_second_episodes"] == 2
    with pytest.raises(NotImplementedError, match="use evaluate"):
        trainer.predict(sets["first"])


def test_a_model_can_be_given_by_name(tmp_path: Path, texts: list[str]) -> None:
    save_tiny_llama(tmp_path / "model", texts)
    trainer = AttentionGuidedRLTrainer(
        model=str(tmp_path / "model"),
        args=tiny_config(tmp_path, num_episodes=8, model_init_kwargs={"dtype": "float32"}),
        train_dataset=[{"text": text} for text in texts],
    )
    trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(ValueError, match=r"model_init_kwargs\['dtype'\].*'float33'"):
        AttentionGuidedRLTrainer(
            str(tmp_path / "model"), args=tiny_config(tmp_path, model_init_kwargs={"dtype": "float33"})
        )


def test_a_users_own_environment_is_used(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    class InOrder:
        """Reads the pairs in the order in which they lie in the memory."""

        def reset(self, pairs: KeyValuePairs) -> None:
            self.pairs, self.next = pairs, 0

        def step(self, query_vectors: Tensor, noise: Tensor) -> Selection:
            index = torch.full((query_vectors.shape[0],), self.next)
            self.next += 1
            chosen = torch.nn.functional.one_hot(index, self.pairs.pair_numbers.shape[1]).float()
            return Selection(self.pairs.gather(index), index, chosen)

    trainer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=8, trainer_options={"environment": InOrder()})
    trainer.train()
    assert all(row.order == row.pair_numbers[:3] for row in read_ledger(trainer.recorder.ledger.path))
    with pytest.raises(ValueError, match=r"selector_coef is 1.0, but the environment InOrder has no log_prob"):
        tiny_trainer(tmp_path, texts, tokenizer, selector_coef=1.0, trainer_options={"environment": InOrder()})


def test_adapters_given_in_three_ways(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    def targets(trainer: AttentionGuidedRLTrainer) -> set[str]:
        return {name.split(".lora_")[0].split(".")[-1] for name in adapter_bytes(trainer)}

    default = tiny_trainer(tmp_path, texts, tokenizer)
    assert targets(default) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    config = default.policy.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
    untargeted = tiny_trainer(tmp_path, texts, tokenizer, trainer_options={"peft_config": LoraConfig(r=2)})
    assert targets(untargeted) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    given = tiny_trainer(tmp_path, texts, tokenizer, model=adapted(tiny_llama()))
    assert targets(given) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ValueError, match="has an adapter already"):
        tiny_trainer(
            tmp_path, texts, tokenizer, model=adapted(tiny_llama()), trainer_options={"peft_config": LoraConfig()}
        )


def test_a_nan_in_the_model_stops_before_statistics_and_weights(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, filter_threshold=ALWAYS)

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                self.before = adapter_bytes(trainer), states(trainer)
                with torch.no_grad():
                    trainer.model.get_base_model().lm_head.weight[3] = float("nan")

    poison = Poison()
    trainer.add_callback(poison)
    with pytest.raises(NonFiniteError, match=r"not finite at step 1 .* articles 'article \d+'"):
        trainer.train()
    assert (adapter_bytes(trainer), states(trainer)) == poison.before
    assert len(read_ledger(trainer.recorder.ledger.path)) == 24
    assert all(not module._forward_hooks for module in trainer.policy.model.modules())


def test_a_nan_gradient_stops_before_the_optimizer(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer, filter_threshold=ALWAYS)
    before = adapter_bytes(trainer)
    poisoned = next(p for p in trainer.policy.model.parameters() if p.requires_grad)
    poisoned.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match=r"the gradient of .*lora_A.* is not finite .* in the update of step 3"):
        trainer.train()
    assert adapter_bytes(trainer) == before


def test_a_runtime_error_carries_the_state_of_the_run(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = tiny_trainer(tmp_path, texts, tokenizer)

    def exhausted(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    handle = trainer.policy.backbone.register_forward_hook(exhausted)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train()
    handle.remove()
    (note,) = error.value.__notes__
    for part in ("rollout of step 1", "trajectories 8", "steps 3", "GiB", "lower generation_batch_size"):
        assert part in note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_kv_pairs": 60, "subset_fraction": 1.0, "num_steps": 59},
            r"a trajectory has \d+ tokens.*holds 512.*59 steps",
        ),
        ({"attention_layer": 7}, r"attention_layer must be in -2\.\.1"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(
    options: dict[str, Any], message: str, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, texts, tokenizer, **options)


def test_training_without_articles_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = AttentionGuidedRLTrainer(tiny_llama(), args=tiny_config(tmp_path), processing_class=tokenizer)
    with pytest.raises(ValueError, match="needs a train_dataset"):
        trainer.train()
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        trainer.evaluate()


def test_articles_that_are_too_short_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = tiny_trainer(tmp_path, ["too short", "also too short"], tokenizer)
    with pytest.raises(ValueError, match=r"2 were too short.*\(6 \+ 6\) · 8 = 96 tokens"):
        trainer.train()


def test_unwritable_output_dir_is_refused(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir '.*file/run' cannot be written: Not a directory"):
        tiny_trainer(tmp_path / "file", texts, tokenizer)


def test_rows_without_the_text_column_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no column 'text'; its columns are 'body'"):
        AttentionGuidedRLTrainer(
            tiny_llama(), args=tiny_config(tmp_path), processing_class=tokenizer, train_dataset=[{"body": "words"}]
        )


def test_the_parts_of_upstream_that_are_leant_on() -> None:
    """Fails when transformers moves what the trainer overrides or reads."""
    import inspect

    from transformers import Trainer

    parameters = {
        name: list(inspect.signature(getattr(Trainer, name)).parameters)
        for name in ("training_step", "compute_loss", "log", "_save_rng_state", "_load_optimizer_and_scheduler")
    }
    assert parameters == {
        "training_step": ["self", "model", "inputs", "num_items_in_batch"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "log": ["self", "logs", "start_time"],
        "_save_rng_state": ["self", "output_dir"],
        "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    }
    source = inspect.getsource(Trainer._save_checkpoint)
    assert source.index("_save_rng_state") < source.index("_push_from_checkpoint") < source.index("rotate_checkpoints")
    loop = inspect.getsource(Trainer._run_epoch)
    order = ["training_step(", "_clip_grad_norm", "on_pre_optimizer_step", "optimizer.step()", "global_step += 1"]
    assert [loop.index(part) for part in order] == sorted(loop.index(part) for part in order)
    assert AttentionGuidedRLConfig.__dataclass_fields__["save_strategy"].default == "no"


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "phi3", "gpt_neox"])
def test_other_architectures_train(
    name: str, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Whatever splits into query heads and key groups, sliding windows and soft caps included, with every term on."""
    changes: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": 24},
        "gemma2": {"sliding_window": 24, "final_logit_softcapping": 5.0},
        "gpt_neox": {"num_key_value_heads": None},
    }
    sizes: dict[str, Any] = {
        "vocab_size": 420,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.1,
    } | ({"head_dim": 8} if name not in ("phi3", "gpt_neox", "olmo2") else {})
    options = {key: value for key, value in (sizes | changes.get(name, {})).items() if value is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options))
    trainer = tiny_trainer(
        tmp_path, texts, tokenizer, model=model, num_episodes=24, filter_threshold=ALWAYS, selector_coef=1.0,
        reward_gradient_coef=0.1, activation_checkpointing=True,
    )  # fmt: skip
    before = adapter_bytes(trainer)
    trainer.train()
    assert steps_of(trainer)[-1]["kl"] == 0.0  # the first update: both forwards of the same adapter agree exactly
    assert steps_of(trainer)[-1]["grad_norm"] > 0
    assert adapter_bytes(trainer) != before


def test_one_article_is_learned_by_heart(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = tiny_trainer(
        tmp_path,
        ["too short", *texts],
        tokenizer,
        overfit_articles=1,
        num_episodes=240,
        filter_threshold=None,
        reward_gradient_coef=1.0,
    )
    trainer.train()
    rows = read_ledger(trainer.recorder.ledger.path)
    assert {row.title for row in rows} == {"article 1"}
    # One memory of four pairs, in every epoch.
    assert len({frozenset(row.pair_numbers) for row in rows}) == 1
    rewards = [row.reward for row in rows]
    assert sum(rewards[-40:]) / 40 > sum(rewards[:40]) / 40 + 0.5


def test_remote_code_cannot_be_asked_for(tmp_path: Path, texts: list[str]) -> None:
    save_tiny_llama(tmp_path / "model", texts)
    args = tiny_config(tmp_path, model_init_kwargs={"trust_remote_code": True})
    with pytest.raises(ValueError, match=r"model_init_kwargs takes .*; got trust_remote_code"):
        AttentionGuidedRLTrainer(str(tmp_path / "model"), args=args, train_dataset=[{"text": text} for text in texts])


HOSTILE_TITLES = [
    "half a pair \ud83d",
    "two\nlines\r\n",
    "[bold red]markup[/bold red]",
    "| a | table |",
    "<script>alert(1)</script>",
    "nul\x00",
    "\u202eright to left",
    "---\nlicense: mit\n---",
    "../../escape",
    "x" * 10_000,
]


@pytest.mark.parametrize("kind", ["list", "map", "stream"])
def test_titles_may_be_anything(
    kind: str, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    titles = HOSTILE_TITLES if kind != "map" else HOSTILE_TITLES[1:]  # Arrow holds no half of a pair
    rows = [{"title": title, "text": text} for title, text in zip(titles, texts, strict=False)]

    def generate() -> Iterator[dict[str, str]]:
        yield from rows

    sources = {"list": lambda: rows, "map": lambda: Dataset.from_list(rows)}
    trainer = AttentionGuidedRLTrainer(
        tiny_llama(),
        args=tiny_config(
            tmp_path, num_episodes=len(rows), log_trajectory_steps=1, report_at_end=True, disable_tqdm=False
        ),
        processing_class=tokenizer,
        train_dataset=sources.get(kind, lambda: IterableDataset.from_generator(generate))(),
    )
    trainer.train()
    trainer.save_model()
    read = {row.title for row in read_ledger(trainer.recorder.ledger.path)}
    assert read == {title.encode("utf-8", "replace").decode() for title in titles}
    assert (tmp_path / "run" / "report" / "summary.md").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
