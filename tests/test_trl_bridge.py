"""A reward of this library in TRL's GRPOTrainer, by the example that shows it, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl_grpo
from tiny import random_batch, tiny_config, tiny_llama
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.tokenization import PlainTextEncoder


@pytest.fixture
def reward(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> trl_grpo.QueryReward:
    options = tiny_config(tmp_path, selection_temperature=0.1)
    return trl_grpo.QueryReward(tiny_llama(), PlainTextEncoder(tokenizer), random_batch(3, value_length=6), options)


def test_a_query_is_worth_what_it_adds_to_silence(
    reward: trl_grpo.QueryReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    step = reward.environment.step
    monkeypatch.setattr(reward.environment, "step", lambda *given: drawn.append(step(*given)) or drawn[-1])
    query = [5, 9, 11]
    (gain,) = reward([query], [2], prompts=["unused"])
    # By hand: the value's log-probability after " Query:" query " Response:", less that after " Query: Response:".
    separators, pair = reward.layout.separators, drawn[0].pairs
    prompt, value = reward.prompt(2)[0].tolist(), pair.value_tokens[0].tolist()

    def log_probability(before: list[int]) -> float:
        ids = [*before, *separators.response, *value]
        with torch.no_grad():
            logits = reward.reader(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        places = range(len(ids) - len(value), len(ids))
        return sum(logits[place - 1, ids[place]].item() for place in places) / len(value)

    assert gain == pytest.approx(log_probability(prompt + query) - log_probability(prompt), abs=1e-5)
    assert abs(gain) > 1e-3
    assert value in reward.memories.value_tokens[2].tolist()


def test_what_was_written_draws_the_pair(reward: trl_grpo.QueryReward, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    step = reward.environment.step
    monkeypatch.setattr(reward.environment, "step", lambda *given: drawn.append(step(*given)) or drawn[-1])
    reward([[5, 9], [5, 9], [300, 301]], [0, 0, 0])
    same, again, other = (selection.probabilities for selection in drawn)
    torch.testing.assert_close(same, again)
    assert not torch.allclose(same, other, atol=1e-3)


def test_an_empty_query_and_control_tokens_are_worth_nothing(
    reward: trl_grpo.QueryReward, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert reward([[], [tokenizer.eos_token_id]], [0, 1]) == [0.0, 0.0]


# Of TRL and the tiny tokenizer, which has no padding token of its own.
@pytest.mark.filterwarnings("ignore")
def test_grpo_trains_with_it(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = trl_grpo.main(
        tiny_llama,
        [{"text": text} for text in texts],
        tokenizer,
        num_memories=4,
        options=tiny_config(tmp_path),
        output_dir=str(tmp_path / "grpo"),
        num_generations=4,
        per_device_train_batch_size=4,
        max_steps=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    logged = [entry for entry in trainer.state.log_history if "rewards/query_gain/mean" in entry]
    assert len(logged) == 2
    assert all(entry["reward"] == entry["rewards/query_gain/mean"] for entry in logged)
    assert any(entry["grad_norm"] > 0 for entry in logged)
    assert any(bool(p.any()) for name, p in trainer.model.named_parameters() if "lora_B" in name)
