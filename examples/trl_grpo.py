"""TRL's `GRPOTrainer` with a reward from here: what a written query is worth to a frozen reader of a memory.

A prompt shows one pair of an article and ends with " Query:". What the model writes there draws another pair of the
article, by the reader's attention, in a `KVMemoryEnvironment`. The reward is how much better the reader then predicts
the pair's value than it does after no query at all, in nats per token. GRPO compares the queries of one prompt.

    python examples/trl_grpo.py

Trajectories of several queries, the counterfactual and the filter are those of `AttentionGuidedRLTrainer`.
"""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import DynamicCache
from trl import GRPOConfig, GRPOTrainer

from attention_rl_trainer import (
    AttentionGuidedRLConfig,
    AttentionLayer,
    KVMemoryEnvironment,
    Layout,
    MemoryBatch,
    PlainTextEncoder,
    Separators,
    add_embeddings,
    extract_embeddings,
    load_articles,
    load_base_model,
    load_tokenizer,
)
from attention_rl_trainer.memories import MemoryLoader
from attention_rl_trainer.models.kv_cache import cache_argument


class QueryReward:
    """A reward function of TRL over B memories, each the column ``memory`` of the data set.

    Args:
        reader: a causal language model that is not trained.
        memories: what is read.
        options: lengths, and how a query's vector draws a pair.
    """

    __name__ = "query_gain"  # under which TRL logs it

    def __init__(
        self, reader: Any, encoder: PlainTextEncoder, memories: MemoryBatch, options: AttentionGuidedRLConfig
    ) -> None:
        self.reader = reader.eval().requires_grad_(False)
        self.memories = memories
        self.layout = Layout.of(options, Separators.encode(encoder, options))
        self.control_ids = encoder.control_ids
        self.attention = AttentionLayer(reader, options.attention_layer)
        self.environment = KVMemoryEnvironment(options)
        self.noise = torch.Generator().manual_seed(options.seed)

    def prompt(self, memory: int) -> Tensor:
        """Lay out what stands before the query, ``[1, S]``."""
        return self.layout.prompt(self.memories.select_rows([memory]), self.reader.device)

    def __call__(self, completion_ids: list[list[int]], memory: list[int], **columns: Any) -> list[float]:
        """Judge queries one by one, because they differ in length; an empty one is worth nothing."""
        return [self.gain(row, ids) for row, ids in zip(memory, completion_ids, strict=True)]

    @torch.no_grad()
    def gain(self, memory: int, token_ids: list[int]) -> float:
        """Let a query draw a pair, and score its value after the query and after none; nats per token."""
        written = [token_id for token_id in token_ids if token_id not in self.control_ids]
        if not written:
            return 0.0
        query = torch.tensor([written], device=self.reader.device)
        prompt = self.prompt(memory)
        # The argument has another name since transformers 5.24.
        read = {cache_argument(self.reader.base_model, self.reader): DynamicCache(config=self.reader.config)}
        self.reader(prompt, use_cache=True, **read)
        with self.attention.capture_queries() as capture:
            self.reader(query, use_cache=True, **read)
        self.environment.reset(add_embeddings(self.memories.select_rows([memory]), self._embed))
        pair = self.environment.step(capture.mean(), torch.rand(1, generator=self.noise).to(query.device)).pairs
        response = self.layout.response(pair, is_last=True)
        after_query, after_none = (
            self._score(torch.cat([*before, response], dim=1), pair.value_tokens)
            for before in ([prompt, query], [prompt])
        )
        return after_query - after_none

    def _embed(self, keys: Tensor) -> Tensor:
        return extract_embeddings(self.reader.base_model, self.attention, keys.to(self.reader.device))

    def _score(self, token_ids: Tensor, value: Tensor) -> float:
        """Mean log-probability of a value, which stands at the end."""
        logits = self.reader(token_ids).logits[:, -value.shape[1] - 1 : -1].float()
        return float(logits.log_softmax(dim=-1).gather(2, value[..., None]).mean())


def main(
    load_model: Any = lambda: load_base_model("offline"),
    articles: Any = None,
    tokenizer: Any = None,
    num_memories: int = 32,
    options: AttentionGuidedRLConfig | None = None,
    **settings: Any,
) -> GRPOTrainer:
    """Train an adapter with GRPO; ``settings`` are those of `GRPOConfig`."""
    selector = {"head_similarity": "cosine", "head_aggregation": "scores", "selection_temperature": 0.02}
    options = options or AttentionGuidedRLConfig(output_dir="out/trl_grpo", tokens_per_query=12, **selector)
    tokenizer = tokenizer or load_tokenizer("offline")
    encoder = PlainTextEncoder(tokenizer)
    loader = MemoryLoader(options, encoder, options.seed)
    memories = loader.first_memories(articles or load_articles("offline"), num_memories)
    reward = QueryReward(load_model(), encoder, memories, options)
    prompts = [{"prompt": encoder.decode(reward.prompt(row)[0]), "memory": row} for row in range(len(memories))]
    defaults: dict[str, Any] = {
        "output_dir": "out/trl_grpo",
        "max_completion_length": options.tokens_per_query,
        "num_generations": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 20,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "bf16": False,
    }
    trainer = GRPOTrainer(
        model=load_model(),
        reward_funcs=reward,
        args=GRPOConfig(**defaults | settings),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
