"""Memory by part, against hand-worked cases, what autograd keeps and measured peaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.planning_peaks import SETTINGS, measure_in_process
from by_hand import SHORT, SMALL, part_bytes
from peft import PeftModel
from tiny import adapted, tiny_gpt2, tiny_llama

from attention_rl_trainer.models.modes import update_mode
from attention_rl_trainer.planning.footprint import (
    GIBIBYTE,
    Phase,
    largest_batch,
    largest_num_steps,
    memory_warning,
    plan_memory,
    saved_bytes_per_token,
)
from attention_rl_trainer.planning.sizes import LLAMA_3_2_3B, ModelShape, RunShape


def saved_bytes(model: PeftModel, token_ids: torch.Tensor) -> int:
    """Sum what the decoder's forward really keeps for its backward, without the weights themselves."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with update_mode(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.get_base_model().base_model(input_ids=token_ids, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


class TestSavedBytes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_are_those_that_autograd_keeps(self, architecture: str, dtype: torch.dtype) -> None:
        sizes = {"llama": {"hidden_size": 64, "intermediate_size": 176}, "gpt2": {"n_embd": 64}}[architecture]
        base = tiny_llama(**sizes) if architecture == "llama" else tiny_gpt2(**sizes)
        model = adapted(base.to(dtype))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        model.train()
        rows, length = 2, 50
        shape = ModelShape.from_config(base.config)
        run = RunShape(weight_bits=32 if dtype == torch.float32 else 16)
        planned = rows * length * shape.num_layers * saved_bytes_per_token(shape, run)
        # Sine and cosine of the rotary positions are kept once for all layers and rows.
        rotary = 2 * length * shape.head_dim * dtype.itemsize if architecture == "llama" else 0
        assert saved_bytes(model, torch.ones(rows, length, dtype=torch.int64)) == planned + rotary


class TestPlanMemory:
    def test_by_hand(self) -> None:
        plan = plan_memory(SMALL, SHORT)
        # LoRA of rank 1 on 4→4, 4→2, 4→2, 4→4: 28 weights in each of 3 layers.
        assert part_bytes(plan, "adapter") == part_bytes(plan, "previous adapter") == 4 * 84
        assert part_bytes(plan, "optimizer") == 2 * 84
        # Two models, five rows, 26 tokens, keys and values of 2 numbers in 3 layers.
        assert part_bytes(plan, "caches of policy and reference") == 2 * 5 * 26 * (2 * 3 * 2 * 4)
        # 15 keys of 3 tokens: 3·4 + 4 numbers and three float32 of 4 in a projection, 4·4 + 3·6 in the MLP.
        assert part_bytes(plan, "keys in a layer") == 45 * max(4 * 34, 4 * 16 + 3 * 4 * 4)
        assert part_bytes(plan, "prompts in a layer") == 100 * 4 * 34
        # Ten rows of ten logits, six copies; 20 value tokens, two copies.
        assert part_bytes(plan, "logits of the next token") == 6 * 10 * 10 * 4
        assert part_bytes(plan, "logits of values") == 2 * 20 * 10 * 4
        # Both read 6 tokens in 10 rows; one mask of bytes and of float32 for two heads of a group, 26 tokens each.
        assert part_bytes(plan, "responses in a layer") == max(60 * 4 * 34, 60 * (64 + 48) + 6 * 26 * 2 * 5)
        # Two trajectories of 25 tokens: norms 2·(16+4), inputs of A 4·(4+4), A's outputs 16, attention 4·8+8, MLP 72.
        layer = 50 * (40 + 32 + 16 + 40 + 72)
        assert part_bytes(plan, "activations") == 3 * layer
        assert part_bytes(plan, "a layer's backward") == 50 * 4 * (3 * 6 + 4)
        assert part_bytes(plan, "logits of queries") == 5 * 8 * 10 * 4
        assert part_bytes(plan, "last states") == 4 * 4 * (50 + 4 * 8)
        assert plan.loaded_bytes == 4 * 428 + 2 * 4 * 84
        decoding = plan.loaded_bytes + 2 * 84 + 2 * 5 * 26 * 48 + 2400
        assert plan.phase_bytes(Phase.DECODE) == decoding
        checkpointed = plan_memory(SMALL, replace(SHORT, activation_checkpointing=True))
        assert part_bytes(checkpointed, "activations") == 3 * 50 * 4 * 4
        assert part_bytes(checkpointed, "a layer's backward") == layer + 50 * 4 * 22

    def test_a_graph_keeps_what_a_token_needs_as_long_as_the_caches(self) -> None:
        on_gpu = replace(SHORT, on_cpu=False)
        plan, without = plan_memory(SMALL, on_gpu), plan_memory(SMALL, replace(on_gpu, cuda_graphs=False))
        graph = part_bytes(plan, "graph of a decoded token")
        assert graph == part_bytes(plan, "logits of the next token") > 0
        for phase in Phase:
            is_there = phase in (Phase.PREFILL, Phase.DECODE, Phase.READ, Phase.SCORE)
            assert plan.phase_bytes(phase) - without.phase_bytes(phase) == (graph if is_there else 0)
        assert "graph of a decoded token" not in [part.name for part in plan_memory(SMALL, SHORT).parts]

    def test_scores_of_a_few_rows_are_in_memory_where_attention_is_two_products(self) -> None:
        run = replace(SHORT, weight_bits=16, num_steps=200, num_kv_pairs=201)
        cached = 10 + 200 * 8
        assert run.layout.cached_tokens == cached
        # 10 rows of 2 heads, 6 queries each, 2 bytes a score, are fewer than 4 MiB; a mask of bytes and of bfloat16.
        read = 60 * (2 * 16 + 3 * 4 * 4 + 4 * 4) + 6 * cached * 2 * 3 + 2 * 10 * (2 * 6 * cached * 2)
        assert part_bytes(plan_memory(SMALL, run), "responses in a layer") == read
        # 2,000 of them are more.
        more = replace(run, generation_batch_size=1000)
        rows = 4 * 2**20 // (2 * 6 * cached * 2)
        read = 12000 * (2 * 16 + 3 * 4 * 4 + 4 * 4) + 6 * cached * 2 * 3 + 2 * rows * (2 * 6 * cached * 2)
        assert part_bytes(plan_memory(SMALL, more), "responses in a layer") == read

    def test_peak_is_the_largest_phase(self) -> None:
        plan = plan_memory(LLAMA_3_2_3B, RunShape())
        assert plan.peak_bytes == max(plan.phase_bytes(phase) for phase in Phase)
        assert plan.peak_phase is Phase.LOSS
        assert plan_memory(LLAMA_3_2_3B, RunShape(activation_checkpointing=True)).peak_phase is Phase.READ

    def test_four_bits_need_room_for_a_matrix(self) -> None:
        plan = plan_memory(SMALL, replace(SHORT, weight_bits=4))
        assert part_bytes(plan, "one matrix dequantized") == 2 * 4 * 6

    def test_order_gain_has_a_cache_of_its_own(self) -> None:
        plan = plan_memory(SMALL, replace(SHORT, order_coef=0.5))
        assert part_bytes(plan, "cache of the order gain") == 5 * (10 + 2 + 5) * 48

    def test_a_chunk_bounds_the_logits(self) -> None:
        tight = plan_memory(SMALL, replace(SHORT, logits_chunk_size=3))
        assert part_bytes(tight, "logits of values") == 2 * 3 * 10 * 4
        assert part_bytes(tight, "logits of queries") == 5 * 3 * 10 * 4
        # The library's own chunk: 64 MiB in float32.
        wide = plan_memory(LLAMA_3_2_3B, RunShape())
        assert part_bytes(wide, "logits of values") == 2 * (64 * 2**20 // (4 * 128256)) * 4 * 128256

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_a_micro_batch_is_no_larger_than_the_batch(self, batch_size: int) -> None:
        plan = plan_memory(SMALL, replace(SHORT, generation_batch_size=batch_size))
        assert part_bytes(plan, "activations") == min(batch_size, 2) * 25 * 3 * 200

    @pytest.mark.slow
    # Where the processor has no bfloat16 of its own, it takes minutes.
    @pytest.mark.timeout(1200)
    @pytest.mark.parametrize("name", SETTINGS)
    def test_measured_peak(self, name: str) -> None:
        figures = measure_in_process(name)
        assert figures["planned_mib"] == pytest.approx(figures["measured_mib"], rel=0.15)


class TestLargest:
    @pytest.mark.parametrize("bits", [4, 16])
    def test_batch_is_maximal(self, bits: Any) -> None:
        run, budget = RunShape(weight_bits=bits, training_batch_size=1), 15 * GIBIBYTE
        largest = largest_batch(LLAMA_3_2_3B, run, budget)
        assert largest > 1
        assert plan_memory(LLAMA_3_2_3B, replace(run, generation_batch_size=largest)).peak_bytes <= budget
        assert plan_memory(LLAMA_3_2_3B, replace(run, generation_batch_size=largest + 1)).peak_bytes > budget

    def test_num_steps_is_maximal(self) -> None:
        run, budget = RunShape(generation_batch_size=32, training_batch_size=1), 15 * GIBIBYTE
        largest = largest_num_steps(LLAMA_3_2_3B, run, budget)
        assert largest > run.memory_size
        longer = replace(run, num_steps=largest, num_kv_pairs=largest + 1, subset_fraction=1.0)
        assert longer.memory_size == largest
        assert plan_memory(LLAMA_3_2_3B, longer).peak_bytes <= budget
        longer = replace(run, num_steps=largest + 1, num_kv_pairs=largest + 2, subset_fraction=1.0)
        assert plan_memory(LLAMA_3_2_3B, longer).peak_bytes > budget

    def test_num_steps_stays_within_the_context(self) -> None:
        # 9 + 8 T tokens.
        assert largest_num_steps(replace(SMALL, context_length=64), SHORT, GIBIBYTE) == 6
        assert largest_num_steps(replace(SMALL, context_length=65), SHORT, GIBIBYTE) == 7

    def test_fewer_steps_leave_the_pairs_as_they_are(self) -> None:
        # The keys of ten pairs dominate here, so that steps cannot make room.
        run = replace(SHORT, num_kv_pairs=11, tokens_per_key=40, tokens_per_value=1, embedding_batch_size=1000)
        keys = plan_memory(SMALL, replace(run, num_steps=1)).phase_bytes(Phase.KEYS)
        assert largest_num_steps(SMALL, run, keys - 1) == 0
        assert largest_num_steps(SMALL, run, keys) > 0

    def test_nothing_fits(self) -> None:
        assert largest_batch(LLAMA_3_2_3B, RunShape(), GIBIBYTE) == 0
        assert largest_num_steps(LLAMA_3_2_3B, RunShape(), GIBIBYTE) == 0


class TestMemoryWarning:
    def test_names_the_largest_part_and_what_to_lower(self) -> None:
        plan = plan_memory(LLAMA_3_2_3B, RunShape())
        needed, activations = plan.peak_bytes / GIBIBYTE, part_bytes(plan, "activations") / GIBIBYTE
        assert memory_warning(plan, 15 * GIBIBYTE) == (
            f"this run will probably not fit: its loss needs {needed:.2f} GiB, but 15.00 GiB are free. The largest "
            f"part is the activations, {activations:.2f} GiB: lower training_batch_size, or set "
            "activation_checkpointing"
        )

    def test_beside_a_loaded_model(self) -> None:
        plan = plan_memory(LLAMA_3_2_3B, RunShape(activation_checkpointing=True))
        needed = plan.peak_bytes - plan.loaded_bytes
        assert memory_warning(plan, needed, model_is_loaded=True) is None
        warning = memory_warning(plan, needed - 1, model_is_loaded=True)
        assert warning is not None
        assert "its reading needs" in warning
        assert "GiB beside the model, but" in warning
        # The weights are larger, but are there already.
        assert part_bytes(plan, "weights") > part_bytes(plan, "caches of policy and reference")
        assert "largest part is the caches of policy and reference" in warning

    def test_silent_where_it_fits(self) -> None:
        plan = plan_memory(LLAMA_3_2_3B, RunShape())
        assert memory_warning(plan, plan.peak_bytes) is None
        assert memory_warning(plan, plan.peak_bytes - 1) is not None
