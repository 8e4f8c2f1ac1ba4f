"""Builders of tiny models, tokenizers, articles and trainers for the tests."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder, allowed_token_ids
from attention_rl_trainer.models.adapters import default_lora_config
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, MemoryEnvironment, SelectionOptions
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.reward import RewardFunction
from attention_rl_trainer.rollout.sampler import RolloutOptions, TrajectorySampler
from attention_rl_trainer.rollout.selector import HeadAggregation
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
from attention_rl_trainer.types import ArticleReference, KeyValuePairs, StreamPosition
from attention_rl_trainer.update.kept import KeptTrajectories

VOCABULARY_SIZE = 420  # larger than the tokenizer's, so that there are padding ids
PROSE = """
the river flows from a mountain lake to the northern sea and its valley was settled early by people who kept sheep built
stone bridges traded salt wool and iron wrote letters that still exist in libraries of several old towns where kings
once met bishops judges farmers sailors all of them left records about weather harvest war peace law music
"""
WORDS = PROSE.split()
OPTIONS = """\
training_batch_size: 4
num_kv_pairs: 8
subset_fraction: 0.5
num_steps: 3
tokens_per_query: 4
tokens_per_key: 6
tokens_per_value: 6
learning_rate: 1e-2
warmup_episodes: 8
filter_threshold: null
save_episodes: 16
use_cpu: true
disable_tqdm: true
"""
"""The options file of a run that takes seconds."""


def article_texts(count: int, num_words: int = 400, seed: int = 0) -> list[str]:
    """Make articles of random words."""
    source = random.Random(seed)
    return [" ".join(source.choice(WORDS) for _ in range(num_words)) for _ in range(count)]


def byte_level_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that has a special and an added token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*texts, " Query: Response:"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    tokenizer.add_tokens(["<tool_call>"])
    return tokenizer


def tiny_llama(**changes: Any) -> PreTrainedModel:
    """A Llama of 2 layers, 4 query heads, 2 key-value groups of 8."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": 512,
        "attention_dropout": 0.1,
        # Larger than the default, so that the tiny model's predictions are far from uniform.
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**options | changes)).eval()


def tiny_gpt2(**changes: Any) -> PreTrainedModel:
    """A GPT-2 of 2 layers and 4 heads of 8."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": VOCABULARY_SIZE,
        "n_positions": 512,
        "initializer_range": 0.1,
    }
    return GPT2LMHeadModel(GPT2Config(**options | changes)).eval()


def save_tiny_llama(folder: Path, texts: list[str]) -> PreTrainedModel:
    """Save a tiny Llama with a tokenizer of some texts, as one that is loaded by its folder's name."""
    model = tiny_llama()
    model.save_pretrained(folder)
    byte_level_tokenizer(texts).save_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def adapted(model: PreTrainedModel, scale: float = 0.1) -> PeftModel:
    """Put the default adapter on a model, with weights that make it differ from the base."""
    peft_model = get_peft_model(model, default_lora_config(model))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=scale)
    return peft_model


def checkpoint_activations(model: PreTrainedModel | PeftModel, *, reentrant: bool = False) -> None:
    """Switch activation checkpointing on, which transformers renamed in 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def make_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any) -> PolicyModel:
    """An adapted policy over a tiny model."""
    return PolicyModel(adapted(model), allowed_token_ids(tokenizer, VOCABULARY_SIZE), PolicyOptions(**options))


def make_environment(
    temperature: float = 1.0, head_aggregation: HeadAggregation = "probabilities"
) -> KVMemoryEnvironment:
    """An environment by its options' values."""
    return KVMemoryEnvironment(SelectionOptions(temperature, head_aggregation))


def make_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    environment: MemoryEnvironment | None = None,
    policy_options: dict[str, Any] | None = None,
    joint: bool | None = None,
    compute_order_gain: bool | None = None,
    reward_fn: RewardFunction | None = None,
    **options: Any,
) -> TrajectorySampler:
    """A sampler of 3 steps with queries of 4 tokens."""
    policy = make_policy(model, tokenizer, **policy_options or {})
    defaults: dict[str, Any] = {"num_steps": 3, "tokens_per_query": 4, "subset_fraction": 1.0}
    seed = options.pop("seed", 7)
    rollout = RolloutOptions(**defaults | options)
    return TrajectorySampler(
        policy,
        environment or make_environment(temperature=0.2),
        Separators.encode(PlainTextEncoder(tokenizer), rollout),
        rollout,
        seed,
        joint=joint,
        compute_order_gain=compute_order_gain,
        reward_fn=reward_fn,
    )


def random_batch(
    rows: int, num_pairs: int = 5, key_length: int = 6, value_length: int = 5, seed: int = 3
) -> MemoryBatch:
    """Articles of random ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(1, 380, shape, generator=generator)

    return MemoryBatch(
        example_keys=draw(rows, key_length),
        example_values=draw(rows, value_length),
        key_tokens=draw(rows, num_pairs, key_length),
        value_tokens=draw(rows, num_pairs, value_length),
        pair_numbers=torch.arange(1, num_pairs + 1).expand(rows, -1).clone(),
        articles=[
            ArticleReference(f"title {row}", "made up", 0, row, StreamPosition(0, row + 1)) for row in range(rows)
        ],
    )


def made_up_kept(
    token_ids: torch.Tensor,
    query_starts: Sequence[int],
    value_starts: Sequence[int],
    query_length: int,
    value_length: int,
) -> KeptTrajectories:
    """Kept trajectories over given tokens; their memory is not looked at unless the draws are reinforced."""
    rows, steps = len(token_ids), len(query_starts)
    tokens = torch.zeros(rows, steps, value_length, dtype=torch.int64)
    index = torch.zeros(rows, steps, dtype=torch.int64)
    return KeptTrajectories(
        token_ids=token_ids,
        query_starts=tuple(query_starts),
        value_starts=tuple(value_starts),
        query_length=query_length,
        value_length=value_length,
        rollout_logprobs=torch.zeros(rows, steps, query_length),
        selected_index=index,
        memory=KeyValuePairs(tokens, tokens, torch.zeros(rows, steps, 1, 1), index),
        advantages=torch.linspace(0.1, 1, rows)[:, None].expand(-1, steps),
        weights=torch.full((rows,), 1 / rows),
    )


def tiny_config(folder: Path, **changes: Any) -> AttentionGuidedRLConfig:
    """Options of a run that takes a second."""
    options: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "num_episodes": 48,
        "generation_batch_size": 8,
        "training_batch_size": 4,
        "num_kv_pairs": 8,
        "subset_fraction": 0.5,
        "num_steps": 3,
        "tokens_per_query": 4,
        "tokens_per_key": 6,
        "tokens_per_value": 6,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "use_cpu": True,
        "save_episodes": 1000,
        "log_trajectory_steps": 0,
        "report_at_end": False,
        "disable_tqdm": True,
    }
    return AttentionGuidedRLConfig(**options | changes)


def tiny_trainer(
    folder: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel | PeftModel | None = None,
    trainer_options: dict[str, Any] | None = None,
    **changes: Any,
) -> AttentionGuidedRLTrainer:
    """A trainer over a tiny Llama and made-up articles."""
    rows = [{"title": f"article {number}", "text": text} for number, text in enumerate(texts)]
    return AttentionGuidedRLTrainer(
        model=tiny_llama() if model is None else model,
        args=tiny_config(folder, **changes),
        train_dataset=rows,
        processing_class=tokenizer,
        **trainer_options or {},
    )
