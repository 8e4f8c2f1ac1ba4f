"""Tokens, operations and seconds, against hand-worked cases and real rollouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from by_hand import SHORT, SMALL
from tiny import make_sampler, random_batch, tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.planning.sizes import LLAMA_3_2_3B, ModelShape, RunShape
from attention_rl_trainer.planning.timing import (
    Accelerator,
    Forward,
    MeasuredSpeed,
    choice_flops,
    plan_time,
    rollout_forwards,
    update_flops,
    warm_start_seconds,
)
from attention_rl_trainer.rollout.information import choice_tokens


class TestTime:
    @pytest.mark.parametrize("joint", [True, False])
    @pytest.mark.parametrize(
        ("num_steps", "query_length", "changes"),
        [
            (1, 1, {}),
            (3, 4, {}),
            (2, 5, {"include_key_in_context": True}),
            (4, 2, {"order_coef": 0.5}),
            (5, 3, {"information_coef": 0.5}),
            (2, 3, {"num_queries": 3}),
        ],
    )
    def test_forward_tokens_are_those_of_a_rollout(
        self,
        tokenizer: PreTrainedTokenizerFast,
        num_steps: int,
        query_length: int,
        changes: dict[str, Any],
        joint: bool,
    ) -> None:
        sampler = make_sampler(
            tiny_llama(), tokenizer, num_steps=num_steps, tokens_per_query=query_length, joint=joint, **changes
        )
        trajectory = sampler.sample(random_batch(3, num_pairs=5, key_length=6, value_length=5), range(3))
        run = RunShape(
            num_steps=num_steps,
            num_kv_pairs=6,
            subset_fraction=1.0,
            tokens_per_query=query_length,
            tokens_per_key=6,
            tokens_per_value=5,
            generation_batch_size=3,
            embedding_batch_size=4,
            query_separator_tokens=len(sampler.layout.separators.query),
            response_separator_tokens=len(sampler.layout.separators.response),
            joint=joint,
            **changes,
        )
        assert sum(forward.count * forward.num_tokens for forward in rollout_forwards(run)) == trajectory.forward_tokens
        time = plan_time(SMALL, run, Accelerator(1.0, 1.0))
        assert time.forward_tokens == pytest.approx(trajectory.forward_tokens / 3)
        assert run.layout.trajectory_tokens == trajectory.token_ids.shape[1]

    @pytest.mark.parametrize("device", [Accelerator(1e9, 1e9), MeasuredSpeed(1e3, 1e3, 1e3)])
    def test_a_lesson_takes_one_update_and_what_its_temperature_asks_for(
        self, device: Accelerator | MeasuredSpeed
    ) -> None:
        several = replace(SHORT, num_iterations=3, num_queries=2)
        lesson = plan_time(SMALL, SHORT, device, 1.0).update_seconds
        assert warm_start_seconds(SMALL, several, device) == pytest.approx(lesson)
        scored = (
            warm_start_seconds(SMALL, replace(several, warm_start_episodes=8, warm_start_temperature=0.1), device)
            - lesson
        )
        tokens = choice_tokens(SHORT.layout, 0, SHORT.memory_size)
        if isinstance(device, MeasuredSpeed):
            assert scored == pytest.approx(tokens / 1e3)
        else:
            assert scored == pytest.approx(choice_flops(SMALL, SHORT, 0) / 1e9)
            assert choice_flops(SMALL, SHORT, 0) > 2 * tokens * SMALL.linear_parameters

    @pytest.mark.parametrize("changes", [{"num_queries": 3}, {"selector_coef": 1.0, "selector_gradient": "expected"}])
    def test_an_update_for_orders_takes_more(self, changes: dict[str, Any]) -> None:
        plain, more = update_flops(SMALL, SHORT), update_flops(SMALL, replace(SHORT, **changes))
        if "num_queries" in changes:
            # Two further queries of each step: their tokens, seen by all, and their logits.
            assert more > plain * (1 + 2 * 2 * 2 / SHORT.layout.trajectory_tokens)
        else:
            assert more - plain == pytest.approx(sum(choice_flops(SMALL, SHORT, step) for step in range(2)))

    def test_forwards_by_hand(self) -> None:
        assert list(rollout_forwards(replace(SHORT, embedding_batch_size=10))) == [
            Forward("keys", 1, 30, 10, 0, 2.0),
            Forward("keys", 1, 15, 5, 0, 2.0),
            Forward("prefill", 1, 100, 10, 0, 5.5),
            # The first of two query tokens finds 10 in the cache and attends to 11.
            Forward("decode", 2, 10, 10, 10.5, 11.5, positions=10),
            Forward("read", 1, 60, 10, 12, 15.5, positions=40),
            Forward("follow", 1, 40, 5, 10, 14.5, positions=20),
            Forward("decode", 2, 10, 10, 18.5, 19.5, positions=10),
            Forward("read", 1, 50, 10, 20, 23.0, positions=40),
            Forward("follow", 1, 35, 5, 18, 22.0, positions=20),
        ]

    def test_operations_are_those_of_the_matrices(self) -> None:
        model = tiny_llama()
        shape = ModelShape.from_config(model.config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.base_model(input_ids=torch.ones(2, 10, dtype=torch.int64), use_cache=False)
        # Older releases of transformers multiply the rotary embedding's angles as matrices, a pair for each row.
        no_weights = ("dot_product", "bmm")
        matrices = sum(
            count
            for operation, count in counter.get_flop_counts()["Global"].items()
            if not any(name in str(operation) for name in no_weights)
        )
        forward = Forward("prefill", 1, num_tokens=20, num_rows=2, cached=0, context=0)
        without_adapter = forward.flops(shape, lora_rank=0)
        assert matrices == without_adapter == 2 * 20 * shape.linear_parameters

    def test_operations_by_hand(self) -> None:
        # 10 tokens: 360 weights and half of 84; 4 · 3 layers · 4 · 7 tokens attended to; 5 positions of 4 · 10 logits.
        forward = Forward("read", 1, num_tokens=10, num_rows=5, cached=6, context=7, positions=5)
        assert forward.flops(SMALL, lora_rank=1) == 20 * (360 + 42) + 10 * 4 * 3 * 4 * 7 + 5 * 2 * 40
        assert forward.bytes_read(SMALL, SHORT) == 4 * 428 + 5 * 6 * 48
        # 25 tokens: both adapters' forwards and one backward; attention's backward twice; 4 query tokens, 3 heads.
        linear, attention = 2 * 25 * (360 + 84), 4 * 3 * 4 * 25 * 13
        assert update_flops(SMALL, SHORT) == 3 * linear + 4 * attention + 3 * 2 * 4 * 40
        without_kl = replace(SHORT, beta=0.0, activation_checkpointing=True)
        assert update_flops(SMALL, without_kl) == 3 * linear + 4 * attention + 2 * 2 * 4 * 40

    def test_seconds_are_those_of_the_slower_need(self) -> None:
        accelerator = Accelerator(bandwidth=10.0, flops=100.0, attained=0.5)
        assert accelerator.seconds(flops=400.0, num_bytes=10.0) == 8.0
        assert accelerator.seconds(flops=100.0, num_bytes=30.0) == 6.0

    def test_decoding_waits_for_the_memory_and_the_update_for_the_arithmetic(self) -> None:
        run = RunShape(generation_batch_size=8)
        slow = plan_time(LLAMA_3_2_3B, run, Accelerator(448e9, 76.7e12))
        arithmetic = plan_time(LLAMA_3_2_3B, run, Accelerator(448e9, 2 * 76.7e12))
        memory = plan_time(LLAMA_3_2_3B, run, Accelerator(2 * 448e9, 76.7e12))
        assert arithmetic.decode_seconds == slow.decode_seconds
        assert memory.decode_seconds == pytest.approx(slow.decode_seconds / 2)
        assert arithmetic.update_seconds == pytest.approx(slow.update_seconds / 2)
        assert memory.update_seconds == slow.update_seconds

    def test_a_larger_batch_decodes_cheaper(self) -> None:
        device = Accelerator(448e9, 76.7e12)
        small, large = (plan_time(LLAMA_3_2_3B, RunShape(generation_batch_size=size), device) for size in (8, 32))
        assert large.decode_seconds < small.decode_seconds / 3
        assert large.forward_tokens == small.forward_tokens

    def test_hours(self) -> None:
        time = plan_time(SMALL, SHORT, Accelerator(1e3, 1e3), kept_fraction=0.0)
        assert time.update_flops == time.update_seconds == 0
        assert time.flops == time.rollout_flops
        assert time.hours(7200) == pytest.approx(2 * time.rollout_seconds)

    @pytest.mark.parametrize(
        ("figures", "message"),
        [
            ((0.0, 1.0), "bandwidth must be above 0, got 0.0"),
            ((1.0, -1.0), "flops must be above 0, got -1.0"),
            ((1.0, 1.0, 1.5), r"attained must be in \(0, 1\], got 1.5"),
        ],
    )
    def test_accelerator_refuses(self, figures: tuple[float, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Accelerator(*figures)

    def test_kept_fraction_is_a_share(self) -> None:
        with pytest.raises(ValueError, match=r"^kept_fraction must be in \[0, 1\], got 2$"):
            plan_time(SMALL, SHORT, Accelerator(1.0, 1.0), kept_fraction=2)
