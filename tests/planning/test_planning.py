"""What a run will need, against hand-worked cases, real models, real rollouts and measured peaks."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.planning_peaks import SETTINGS, measure_in_process
from peft import PeftModel
from rich.console import Console
from tiny import VOCABULARY_SIZE, adapted, make_sampler, random_batch, tiny_config, tiny_gpt2, tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from attention_rl_trainer.models.causal_lm import dropout_disabled
from attention_rl_trainer.planning.command import main
from attention_rl_trainer.planning.footprint import (
    GIBIBYTE,
    MemoryPlan,
    Phase,
    largest_batch,
    largest_num_steps,
    memory_warning,
    plan_memory,
    saved_bytes_per_token,
)
from attention_rl_trainer.planning.sizes import LLAMA_3_2_3B, ModelShape, RunShape
from attention_rl_trainer.planning.timing import Accelerator, Forward, plan_time, rollout_forwards, update_flops

# C = 4, I = 6, H = 2, G = 1, D = 2, so Q = 4 and G · D = 2.
SMALL = ModelShape(
    num_layers=3,
    hidden_size=4,
    intermediate_size=6,
    num_query_heads=2,
    num_key_value_heads=1,
    head_dim=2,
    vocabulary_size=10,
)
# Prompt 1+3+1+4+1 = 10 tokens, a step 2+1+4+1 = 8; a trajectory 9 + 2 · 8 = 25.
SHORT = RunShape(
    num_steps=2,
    num_pairs=3,
    tokens_per_query=2,
    tokens_per_key=3,
    tokens_per_value=4,
    generation_batch_size=5,
    training_batch_size=2,
    weight_bits=32,
    lora_rank=1,
    embedding_batch_size=15,
    on_cpu=True,
    query_separator_tokens=1,
    response_separator_tokens=1,
)


def count_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def part_bytes(plan: MemoryPlan, name: str) -> int:
    (part,) = [part for part in plan.parts if part.name == name]
    return part.num_bytes


class TestModelShape:
    @pytest.mark.parametrize(
        "model",
        [
            pytest.param(tiny_llama(), id="llama"),
            pytest.param(tiny_llama(tie_word_embeddings=True), id="llama-tied"),
            pytest.param(tiny_llama(head_dim=6), id="llama-head-dim"),
            pytest.param(tiny_gpt2(), id="gpt2"),
            pytest.param(tiny_gpt2(n_inner=48), id="gpt2-n-inner"),
        ],
    )
    def test_counts_the_parameters_of_a_real_model_and_its_adapter(self, model: PreTrainedModel) -> None:
        shape = ModelShape.from_config(model.config)
        assert shape.parameters == count_parameters(model)
        trainable = sum(p.numel() for p in adapted(model).parameters() if p.requires_grad)
        assert shape.adapter_parameters(8) == trainable

    def test_llama_3_2_3b(self) -> None:
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
        )
        assert ModelShape.from_config(config) == LLAMA_3_2_3B
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        assert LLAMA_3_2_3B.parameters == count_parameters(model) == 3_212_749_824

    def test_weight_bytes(self) -> None:
        # A layer: 4·4 + 2 · 4·2 + 4·4 of attention and 3 · 4·6 of MLP, 120; besides 10·4 embeddings and 7 norms of 4.
        assert SMALL.linear_parameters == 360
        assert SMALL.parameters == 360 + 40 + 28
        assert SMALL.weight_bytes(32) == 4 * 428
        assert SMALL.weight_bytes(16) == 2 * 428
        # Four bits, and a float32 scale for 64 weights.
        assert SMALL.weight_bytes(4) == int(360 * 4.5 / 8) + 2 * 68

    def test_unknown_architecture(self) -> None:
        with pytest.raises(ValueError, match=r"^no plan for the architecture 'bert'; known are llama, mistral"):
            ModelShape.from_config(BertConfig())

    def test_config_without_a_name(self) -> None:
        class Nameless(PreTrainedConfig):
            model_type = "llama"
            hidden_size = 4

        wanted = r"^the config of 'llama' has no num_hidden_layers, num_attention_heads, vocab_size, from which"
        with pytest.raises(ValueError, match=wanted):
            ModelShape.from_config(Nameless())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
            ({"num_query_heads": 3, "num_key_value_heads": 2}, "multiple of num_key_value_heads, got 3 and 2"),
            ({"mlp": "round"}, "mlp must be one of gated, plain, got 'round'"),
            ({"norm": "batch"}, "norm must be one of rms, layer, got 'batch'"),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **changes)


class TestRunShape:
    def test_lengths_by_hand(self) -> None:
        assert SHORT.prompt_tokens == 10
        assert SHORT.trajectory_tokens == 25
        assert SHORT.cached_tokens == 26
        assert [SHORT.context_tokens(step) for step in range(2)] == [10, 18]
        assert [SHORT.block_tokens(step) for step in range(2)] == [6, 5]
        assert replace(SHORT, include_key_in_context=True).trajectory_tokens == 25 + 2 * 3

    def test_reads_the_options(self, tmp_path: Path) -> None:
        config = tiny_config(tmp_path, activation_checkpointing=True, order_coef=0.5, beta=0.0, tokens_per_query=9)
        run = RunShape.from_config(config, weight_bits=32, lora_rank=4, on_cpu=True)
        assert (run.num_steps, run.num_pairs, run.tokens_per_query) == (3, 4, 9)
        assert (run.generation_batch_size, run.training_batch_size, run.lora_rank) == (8, 4, 4)
        assert (run.activation_checkpointing, run.compute_order_gain, run.has_kl) == (True, True, False)
        assert run.optimizer_bytes_per_parameter == 8
        eight_bits = RunShape.from_config(tiny_config(tmp_path, optim="adamw_bnb_8bit"), weight_bits=4)
        assert eight_bits.optimizer_bytes_per_parameter == 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens_per_query": 0}, "tokens_per_query must be at least 1, got 0"),
            ({"logits_chunk_size": 0}, "logits_chunk_size must be at least 1 or none, got 0"),
            ({"num_steps": 4}, r"num_steps must be at most num_pairs \(3\), got 4"),
            ({"weight_bits": 8}, r"weight_bits must be one of \(4, 16, 32\), got 8"),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(SHORT, **changes)


def saved_bytes(model: PeftModel, token_ids: torch.Tensor) -> int:
    """Sum what the decoder's forward really keeps for its backward, without the weights themselves."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with dropout_disabled(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
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

    def test_scores_of_a_few_rows_lie_in_memory_where_attention_is_two_products(self) -> None:
        run = replace(SHORT, weight_bits=16, num_steps=200, num_pairs=200)
        cached = 10 + 200 * 8
        assert run.cached_tokens == cached
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
        plan = plan_memory(SMALL, replace(SHORT, compute_order_gain=True))
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
        assert largest > run.num_pairs
        longer = replace(run, num_steps=largest, num_pairs=largest)
        assert plan_memory(LLAMA_3_2_3B, longer).peak_bytes <= budget
        longer = replace(run, num_steps=largest + 1, num_pairs=largest + 1)
        assert plan_memory(LLAMA_3_2_3B, longer).peak_bytes > budget

    def test_num_steps_stays_within_the_context(self) -> None:
        # 9 + 8 T tokens.
        assert largest_num_steps(replace(SMALL, context_length=64), SHORT, GIBIBYTE) == 6
        assert largest_num_steps(replace(SMALL, context_length=65), SHORT, GIBIBYTE) == 7

    def test_fewer_steps_leave_the_pairs_as_they_are(self) -> None:
        # The keys of ten pairs dominate here, so that steps cannot make room.
        run = replace(SHORT, num_pairs=10, tokens_per_key=40, tokens_per_value=1, embedding_batch_size=1000)
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


class TestTime:
    @pytest.mark.parametrize("joint", [True, False])
    @pytest.mark.parametrize(
        ("num_steps", "query_length", "changes"),
        [(1, 1, {}), (3, 4, {}), (2, 5, {"include_key_in_context": True}), (4, 2, {"compute_order_gain": True})],
    )
    def test_forward_tokens_are_those_of_a_rollout(
        self,
        tokenizer: PreTrainedTokenizerFast,
        num_steps: int,
        query_length: int,
        changes: dict[str, bool],
        joint: bool,
    ) -> None:
        sampler = make_sampler(
            tiny_llama(), tokenizer, num_steps=num_steps, tokens_per_query=query_length, joint=joint, **changes
        )
        trajectory = sampler.sample(random_batch(3, num_pairs=5, key_length=6, value_length=5), range(3))
        run = RunShape(
            num_steps=num_steps,
            num_pairs=5,
            tokens_per_query=query_length,
            tokens_per_key=6,
            tokens_per_value=5,
            generation_batch_size=3,
            embedding_batch_size=4,
            query_separator_tokens=len(sampler._query_separator),
            response_separator_tokens=len(sampler._response_separator),
            joint=joint,
            **changes,
        )
        assert sum(forward.count * forward.num_tokens for forward in rollout_forwards(run)) == trajectory.forward_tokens
        time = plan_time(SMALL, run, Accelerator(1.0, 1.0))
        assert time.forward_tokens == pytest.approx(trajectory.forward_tokens / 3)
        assert run.trajectory_tokens == trajectory.token_ids.shape[1]

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
        matrices = sum(
            count
            for operation, count in counter.get_flop_counts()["Global"].items()
            if "dot_product" not in str(operation)
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
        without_kl = replace(SHORT, has_kl=False, activation_checkpointing=True)
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
            ((1.0, 1.0, 1.5), r"attained must lie in \(0, 1\], got 1.5"),
        ],
    )
    def test_accelerator_refuses(self, figures: tuple[float, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Accelerator(*figures)

    def test_kept_fraction_is_a_share(self) -> None:
        with pytest.raises(ValueError, match=r"^kept_fraction must lie in \[0, 1\], got 2$"):
            plan_time(SMALL, SHORT, Accelerator(1.0, 1.0), kept_fraction=2)


def printed(*arguments: str) -> str:
    stream = StringIO()
    main(list(arguments), Console(file=stream, width=160))
    return stream.getvalue()


class TestCommand:
    RECIPE = str(Path(__file__).parents[2] / "examples" / "configs" / "llama3.2_3b.yaml")

    def test_the_recipe_fits_into_16_gb(self) -> None:
        text = printed("--config", self.RECIPE)
        assert "3,212,749,824" in text
        assert "10,000 episodes" in text
        assert "fits: " in text
        run = RunShape(generation_batch_size=32, training_batch_size=4, activation_checkpointing=True)
        assert f"{largest_batch(LLAMA_3_2_3B, run, 15 * GIBIBYTE)}" in text

    def test_warns_where_it_does_not_fit(self) -> None:
        text = printed("--config", self.RECIPE, "--gpu_memory_gib", "8", "--price_per_hour", "0.5")
        assert "this run will probably not fit: its reading needs" in text
        assert "price of it" in text
        assert "fits: " in printed("--config", self.RECIPE, "--gpu_memory_gib", "8", "--load_in_4bit")

    def test_a_local_model(self, tmp_path: Path) -> None:
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY_SIZE).save_pretrained(tmp_path)
        text = printed("--model_name_or_path", str(tmp_path), "--dtype", "float32")
        expected = ModelShape.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY_SIZE))
        assert f"{expected.parameters:,}" in text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--load_in_8bit"], "no plan for load_in_8bit; take load_in_4bit"),
            (["--dtype", "float8"], "dtype must be one of float32, float16, bfloat16, auto, got 'float8'"),
            (["--model_name_or_path", "auto"], "model_name_or_path is 'auto', which depends on the machine"),
        ],
    )
    def test_refuses(self, arguments: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            printed(*arguments)
