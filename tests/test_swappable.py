"""The parts that a user can exchange, each by the example that shows it, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import own_articles
import own_environment
import own_filter
import own_loss
import own_reward
import pytest
import torch
from tiny import tiny_config, tiny_llama, tiny_trainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer import (
    ArticleSource,
    AttentionGuidedRLTrainer,
    DifferentiableEnvironment,
    KeyValuePairs,
    KVMemoryEnvironment,
    RewardFilter,
    TrajectoryFilter,
)
from attention_rl_trainer.records.ledger import read_ledger

EXAMPLES = Path(__file__).parents[1] / "examples"


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """The options of a run that takes a second, as an example's `main` takes them."""
    config = tiny_config(folder, **{"warmup_episodes": 8, "filter_threshold": 0.0} | changes)
    names = [
        *("output_dir", "num_episodes", "generation_batch_size", "training_batch_size", "num_kv_pairs"),
        *("subset_fraction", "num_steps", "tokens_per_query", "tokens_per_key", "tokens_per_value", "learning_rate"),
        *("optim", "use_cpu", "save_episodes", "log_trajectory_steps", "report_at_end", "disable_tqdm"),
        *("warmup_episodes", "filter_threshold"),
    ]
    return {name: getattr(config, name) for name in names}


@pytest.fixture
def rows(texts: list[str]) -> list[dict[str, str]]:
    return [{"title": f"article {number}", "text": text} for number, text in enumerate(texts)]


def moved(trainer: AttentionGuidedRLTrainer) -> bool:
    """Whether any update moved the adapter, which begins with B = 0."""
    return any(bool(p.any()) for name, p in trainer.model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("own_*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def test_environment(tmp_path: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = own_environment.main(tiny_llama(), rows, tokenizer, **options(tmp_path))
    assert isinstance(trainer.environment, own_environment.CosineEnvironment)
    assert isinstance(trainer.environment, DifferentiableEnvironment)
    assert trainer.args.selector_coef == 1
    assert trainer.updater.num_updates > 0
    assert moved(trainer)
    ledger = read_ledger(tmp_path / "run" / "trajectories.jsonl")
    # Cosines at this temperature are far from uniform.
    assert max(max(probabilities) for row in ledger for probabilities in row.selection_probabilities[:1]) > 0.5


def test_log_prob_of_the_environment_is_that_of_its_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    memory = KeyValuePairs(
        torch.zeros(3, 5, 2, dtype=torch.int64),
        torch.zeros(3, 5, 2, dtype=torch.int64),
        torch.randn(3, 5, 2, 8, generator=generator),
        torch.arange(5).expand(3, -1),
    )
    environment = own_environment.CosineEnvironment(temperature=0.5)
    environment.reset(memory)
    vectors = torch.randn(3, 4, 4, 8, generator=generator)
    selections = [environment.step(vectors[:, step], torch.rand(3, generator=generator)) for step in range(4)]
    index = torch.stack([selection.index for selection in selections], dim=1)
    drawn = [item.probabilities.gather(1, item.index[:, None]).squeeze(1) for item in selections]
    assert torch.allclose(environment.log_prob(memory, vectors, index), torch.stack(drawn, dim=1).log(), atol=1e-6)


class CountingEnvironment(KVMemoryEnvironment):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def reset(self, pairs: KeyValuePairs) -> None:
        self.calls.append("reset")
        super().reset(pairs)

    def log_prob(self, *arguments: Any) -> torch.Tensor:
        self.calls.append("log_prob")
        return super().log_prob(*arguments)


def test_the_loss_leaves_the_environment_alone(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    environment = CountingEnvironment()
    trainer = tiny_trainer(
        *(tmp_path, texts, tokenizer),
        trainer_options={"environment": environment},
        num_episodes=32,
        warmup_episodes=1,
        filter_threshold=None,
        selector_coef=1.0,
    )
    trainer.train()
    # Four rollouts of eight; in the three after the warm-up, two micro-batches of four each.
    assert environment.calls.count("reset") == 4
    assert environment.calls.count("log_prob") == 6


def test_parts_that_are_empty_containers_are_taken(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Such as an environment that keeps a list of what was read, and has its length."""

    class Listed(KVMemoryEnvironment):
        def __len__(self) -> int:
            return 0

    class Counted(RewardFilter):
        def __len__(self) -> int:
            return 0

    environment, reward_filter = Listed(), Counted()
    parts = {"environment": environment, "reward_filter": reward_filter}
    trainer = tiny_trainer(tmp_path, texts, tokenizer, trainer_options=parts)
    assert trainer.environment is trainer.sampler.environment is environment
    assert trainer.filter is reward_filter


def test_reward(tmp_path: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = own_reward.main(tiny_llama(), rows, tokenizer, **options(tmp_path))
    assert moved(trainer)
    ledger = read_ledger(tmp_path / "run" / "trajectories.jsonl")
    prices = [gain - reward for row in ledger for gain, reward in zip(row.query_gains, row.step_rewards, strict=True)]
    # A quarter of the price for each of four tokens that occurred before.
    shares = torch.tensor(prices) / own_reward.PRICE * 4
    assert torch.allclose(shares, shares.round(), atol=1e-3)
    assert shares.max() > 0.5
    # What is judged is that reward: a kept trajectory exceeds the threshold by it.
    kept = [row for row in ledger if row.verdict == "kept"]
    assert kept
    assert all(row.reward > row.threshold for row in kept if row.threshold is not None)


def test_filter(tmp_path: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = own_filter.main(tiny_llama(), rows, tokenizer, **options(tmp_path))
    assert isinstance(trainer.filter, TrajectoryFilter)
    assert moved(trainer)
    ledger = read_ledger(tmp_path / "run" / "trajectories.jsonl")
    for step in range(2, 7):
        batch = sorted((row for row in ledger if row.step == step), key=lambda row: -row.reward)
        assert [row.verdict for row in batch] == ["kept"] * 2 + ["below_threshold"] * 6


def test_articles(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    notes = tmp_path / "notes"
    (notes / "deeper").mkdir(parents=True)
    for number, text in enumerate(texts):
        path = notes / ("deeper" if number % 2 else "") / f"note {number}.{'md' if number % 3 else 'txt'}"
        path.write_text(text, encoding="utf-8")
    (notes / "picture.png").write_bytes(b"\x89PNG")
    (notes / "short.txt").write_text("the river", encoding="utf-8")
    trainer = own_articles.main(notes, tiny_llama(), tokenizer, **options(tmp_path))
    assert isinstance(trainer.train_dataset, ArticleSource)
    assert len(trainer.train_dataset) == len(texts) + 1
    ledger = read_ledger(tmp_path / "run" / "trajectories.jsonl")
    assert {row.title for row in ledger} == {f"note {number}" for number in range(len(texts))}
    assert trainer.progress.skipped["too_short"] >= 1


def test_a_folder_without_articles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file that ends in \.md, \.txt"):
        own_articles.Folder(tmp_path)


def pulled(folder: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast, pull: float) -> own_loss.PulledTrainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_loss.PulledTrainer, "pull", pull)
        trainer: own_loss.PulledTrainer = own_loss.main(tiny_llama(), rows, tokenizer, **options(folder))
    return trainer


def squares(model: PreTrainedModel) -> float:
    return sum(p.square().sum().item() for name, p in model.named_parameters() if "lora_B" in name)


def test_loss(tmp_path: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast) -> None:
    free, held = (pulled(tmp_path / str(pull), rows, tokenizer, pull) for pull in (0.0, 100.0))
    assert squares(held.model) < 0.5 * squares(free.model)
    logged = [entry for entry in held.state.log_history if "policy_loss" in entry]
    assert logged
    assert all("kl" in entry for entry in logged)


def test_a_loss_from_scratch_has_no_parts(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    class Scratch(AttentionGuidedRLTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **unused: Any) -> Any:
            kept = inputs["trajectories"]
            logits = model(input_ids=kept.token_ids).logits
            return (logits.float().square().mean(), None) if return_outputs else logits.float().square().mean()

    trainer = Scratch(
        model=tiny_llama(),
        args=tiny_config(tmp_path, num_episodes=24, warmup_episodes=1, filter_threshold=None),
        train_dataset=[{"text": text} for text in texts],
        processing_class=tokenizer,
    )
    trainer.train()
    assert moved(trainer)
    assert not any("policy_loss" in entry or "kl" in entry for entry in trainer.state.log_history)
