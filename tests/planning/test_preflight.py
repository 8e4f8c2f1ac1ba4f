"""What is refused before a run, and the facts that are printed."""

from __future__ import annotations

import io
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel
from rich.console import Console
from tiny import adapted, make_environment, tiny_config, tiny_gpt2, tiny_llama, tiny_trainer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from attention_rl_trainer.planning.preflight import (
    expect_double_precision,
    expect_fitting_context,
    expect_fitting_orders,
    expect_fitting_trees,
    expect_fitting_vocabulary,
    expect_log_prob,
    expect_no_mixed_precision,
    expect_one_device,
    expect_plain_accelerator,
    expect_usable_machine,
    expect_writable,
    memory_shortage,
    print_facts,
    run_facts,
)
from attention_rl_trainer.planning.sizes import context_length_of
from attention_rl_trainer.rollout.environment import Selection
from attention_rl_trainer.rollout.layout import Layout, Separators
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
from attention_rl_trainer.types import KeyValuePairs
from attention_rl_trainer.update.losses import LossOptions

SEPARATORS = Separators((1, 2), (3, 4))


def model_of_context(length: int | None) -> PeftModel:
    """A model that was made for so many positions, or does not say for how many."""
    model = tiny_llama()
    model.config.max_position_embeddings = length or 0
    return adapted(model)


class TestExpectWritable:
    def test_makes_the_folder_and_leaves_it_empty(self, tmp_path: Path) -> None:
        expect_writable(tmp_path / "a" / "b")
        assert not list((tmp_path / "a" / "b").iterdir())

    def test_a_folder_that_is_there_keeps_its_files(self, tmp_path: Path) -> None:
        (tmp_path / "kept").touch()
        expect_writable(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]

    def test_a_name_that_is_not_text_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^output_dir '.*\\udcff' is not valid UTF-8"):
            expect_writable(tmp_path / "run\udcff")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("below", ["run", "deep/run", "."])
    def test_a_path_below_a_file_is_refused(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("text")
        folder = tmp_path / "file" / below
        message = rf"^output_dir '{re.escape(str(folder))}' cannot be written: \w.*Choose a folder that you own$"
        with pytest.raises(ValueError, match=message):
            expect_writable(folder)
        assert (tmp_path / "file").read_text() == "text"

    def test_the_trainer_asks_before_it_touches_the_model(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (tmp_path / "file").touch()
        model = tiny_llama()
        with pytest.raises(ValueError, match="cannot be written"):
            tiny_trainer(tmp_path, texts, tokenizer, model, output_dir=str(tmp_path / "file" / "run"))
        assert not any("lora" in name for name, _ in model.named_parameters())


def test_several_gpus_of_one_process_are_refused_and_none_is_not() -> None:
    expect_one_device(0)
    expect_one_device(1)
    with pytest.raises(ValueError, match=r"^the process sees 2 GPUs .*--num_processes 2, or one with CUDA_VIS.*=0$"):
        expect_one_device(2)


class TestContext:
    def test_length_is_read_from_either_architecture(self) -> None:
        assert context_length_of(tiny_llama(max_position_embeddings=300).config) == 300
        assert context_length_of(tiny_gpt2(n_positions=200).config) == 200
        assert context_length_of(PreTrainedConfig()) is None

    def test_the_limit_is_exact_and_an_unknown_one_is_none(self, tmp_path: Path) -> None:
        # (4 + 6 + 6) + 3 · (4 + 4 + 6) tokens.
        layout = Layout.of(tiny_config(tmp_path), SEPARATORS)
        for available in (58, 59, None):
            expect_fitting_context(layout, model_of_context(available))
        with pytest.raises(ValueError, match="58 tokens, but the model's context holds 57"):
            expect_fitting_context(layout, model_of_context(57))

    @pytest.mark.parametrize(("include_key", "response"), [(False, 6), (True, 12)])
    def test_arithmetic_is_said_and_right(self, tmp_path: Path, include_key: bool, response: int) -> None:
        config = tiny_config(tmp_path, include_key_in_context=include_key)
        needed = (4 + 6 + 6) + 3 * (4 + 4 + response)
        with pytest.raises(ValueError, match="Lower num_steps") as caught:
            expect_fitting_context(Layout.of(config, SEPARATORS), model_of_context(needed - 1))
        expected = (
            f"a trajectory has {needed} tokens, but the model's context holds {needed - 1}: "
            f"example 4 + 6 + 6, and 3 steps of 4 + 4 + {response}."
        )
        assert str(caught.value).startswith(expected)

    def test_the_trainer_counts_the_same_tokens(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        small = tiny_llama(max_position_embeddings=40)
        with pytest.raises(ValueError, match="the model's context holds 40") as caught:
            tiny_trainer(tmp_path, texts, tokenizer, small)
        needed, _, *parts = [int(number) for number in re.findall(r"\d+", str(caught.value))]
        example, (steps, *of_step) = parts[:3], parts[3:7]
        assert needed == sum(example) + steps * sum(of_step)

    # (4 + 6 + 6) and a separator of 2, then steps of 4 + 4 + 6; a value is a separator and 6 tokens, two are 8 + 2 + 8.
    @pytest.mark.parametrize(
        ("changes", "needed"),
        [
            ({"information_coef": 1.0}, 18 + 3 * 14 + 8),
            ({"information_coef": 1.0, "num_steps": 4}, 18 + 3 * 14 + 8),
            ({"selector_coef": 1.0, "selector_gradient": "expected"}, 18 + 2 * 14 + 18),
            ({"selector_coef": 1.0, "selector_gradient": "expected", "num_steps": 4}, 18 + 3 * 14 + 8),
            ({"warm_start_episodes": 8, "warm_start_temperature": 0.1}, 18 + 18),
        ],
    )
    def test_unread_values_are_read_beyond_a_trajectory(
        self, tmp_path: Path, changes: dict[str, Any], needed: int
    ) -> None:
        config = tiny_config(tmp_path, **changes)
        layout = Layout.of(config, SEPARATORS)
        for available in (needed, None):
            expect_fitting_trees(layout, model_of_context(available), config)
        message = (
            rf"^{next(name for name in reversed(changes) if name != 'num_steps')} scores .* takes {needed} tokens, "
        )
        with pytest.raises(ValueError, match=message):
            expect_fitting_trees(layout, model_of_context(needed - 1), config)

    def test_orders_read_all_pairs_and_may_be_left_out(self, tmp_path: Path) -> None:
        # Four pairs, where a trajectory reads three: 16 + 4 · 14 tokens.
        config, small = tiny_config(tmp_path), model_of_context(71)
        layout = Layout.of(config, SEPARATORS)
        for available in (72, None):
            expect_fitting_orders(layout, model_of_context(available), config)
        message = (
            r"reads all 4 pairs .* takes 72 tokens, but the model's context holds 71\. Set eval_order_episodes to 0"
        )
        with pytest.raises(ValueError, match=message):
            expect_fitting_orders(layout, small, config)
        for changes in ({"eval_tables": False}, {"eval_order_episodes": 0}):
            expect_fitting_orders(layout, small, tiny_config(tmp_path, **changes))


class Drawing:
    """An environment that only draws."""

    def reset(self, pairs: KeyValuePairs) -> None: ...

    def step(self, query_vectors: torch.Tensor, noise: torch.Tensor) -> Selection:
        raise NotImplementedError


class TestWhatCannotWork:
    def test_a_device_without_float64(self) -> None:
        expect_double_precision(torch.device("cpu"))
        with pytest.raises(ValueError, match=r"^Apple GPUs have no float64, .*set use_cpu=True$"):
            expect_double_precision(torch.device("mps"))

    def test_draws_without_a_probability_where_they_are_trained(self) -> None:
        expect_log_prob(Drawing(), LossOptions())
        expect_log_prob(make_environment(), LossOptions(selector_coef=0.5, selector_gradient="expected"))
        message = (
            r"^selector_coef is 0\.5, but the environment Drawing has no log_prob\(memory, query_vectors, index\);"
        )
        with pytest.raises(ValueError, match=message):
            expect_log_prob(Drawing(), LossOptions(selector_coef=0.5))

    def test_draws_without_all_probabilities_where_all_choices_are_trained(self) -> None:
        class Probable(Drawing):
            def log_prob(self, memory: KeyValuePairs, query_vectors: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
                raise NotImplementedError

        expect_log_prob(Probable(), LossOptions(selector_coef=0.5))
        message = r"^selector_gradient is 'distilled', but the environment Probable has no log_probabilities\(memory, "
        with pytest.raises(ValueError, match=message):
            expect_log_prob(Probable(), LossOptions(selector_coef=0.5, selector_gradient="distilled"))

    def test_mixed_precision(self) -> None:
        expect_no_mixed_precision("no")
        with pytest.raises(ValueError, match=r"^accelerate's mixed precision is 'bf16', .*--mixed_precision no"):
            expect_no_mixed_precision("bf16")

    @pytest.mark.parametrize("kind", ["fp8", "fp16"])
    def test_mixed_precision_of_the_launcher_is_refused_before_accelerate_asks_for_its_packages(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", kind)
        with pytest.raises(ValueError, match=rf"^accelerate's mixed precision is '{kind}', .*--mixed_precision no"):
            expect_usable_machine(tiny_config(tmp_path))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"mixed_precision": "bf16"}, "^accelerate's mixed precision is 'bf16'"),
            ({"dynamo_backend": "EAGER"}, "^accelerate compiles the model with EAGER, .*--dynamo_backend no"),
            ({"dynamo_backend": "INDUCTOR"}, "^accelerate compiles the model with INDUCTOR"),
        ],
        ids=["bf16", "eager", "inductor"],
    )
    def test_what_an_accelerator_does_to_the_update_alone(self, settings: dict[str, Any], message: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            with pytest.raises(ValueError, match=message):
                expect_plain_accelerator(Accelerator(cpu=True, **settings))
            AcceleratorState._reset_state(reset_partial_state=True)
            expect_plain_accelerator(Accelerator(cpu=True))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    @pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
    def test_a_model_that_accelerate_shares(self, kind: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            accelerator = Accelerator(cpu=True)
            # As the plugin would set it, which needs several processes or packages.
            accelerator.state.distributed_type = DistributedType(kind)
            with pytest.raises(ValueError, match=rf"^accelerate shares the model over processes \({kind}\)"):
                expect_plain_accelerator(accelerator)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    def test_an_accelerator_that_was_made_before_the_trainer(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """Its state is the trainer's too."""
        config = tiny_config(tmp_path)
        try:
            Accelerator(cpu=True, dynamo_backend="EAGER")
            with pytest.raises(ValueError, match=r"^accelerate compiles the model with EAGER"):
                AttentionGuidedRLTrainer(tiny_llama(), config, processing_class=tokenizer)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    def test_ids_that_the_model_cannot_embed(self) -> None:
        embeddings = torch.nn.Embedding(10, 2)
        expect_fitting_vocabulary(9, embeddings)
        with pytest.raises(ValueError, match=r"^the tokenizer's ids go up to 10, but the model embeds 10; give"):
            expect_fitting_vocabulary(10, embeddings)


@pytest.fixture
def trainer(
    tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> AttentionGuidedRLTrainer:
    return tiny_trainer(tmp_path, texts, tokenizer, model, seed=9)


def facts_of(trainer: AttentionGuidedRLTrainer) -> dict[str, Any]:
    """What a trainer shows before its first step."""
    return run_facts(trainer.args, trainer.policy, trainer.layout)


class TestFacts:
    def test_say_what_was_found(self, trainer: AttentionGuidedRLTrainer) -> None:
        facts = facts_of(trainer)
        name = type(trainer.policy.model.get_base_model()).__name__
        groups = 2 if "Llama" in name else 4
        assert facts["architecture"] == f"{name}, 2 layers"
        assert facts["attention"] == f"layer 1: 4 query heads, {groups} key-value groups of 8"
        assert facts["precision"] == "weights float32, adapter float32"
        assert str(facts["device"]).startswith("cpu (")
        assert str(facts["processes"]).startswith(f"1, each of {torch.get_num_threads()} thread")
        assert re.fullmatch(r"\d+\.\d GiB|unknown", str(facts["memory free"]))

    def test_say_what_is_trained(self, trainer: AttentionGuidedRLTrainer) -> None:
        parameters = list(trainer.model.parameters())
        trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in parameters)
        assert 0 < trainable < total
        assert facts_of(trainer)["parameters"] == f"{trainable:,} trainable of {total:,}"

    def test_say_what_will_run(self, trainer: AttentionGuidedRLTrainer) -> None:
        facts = facts_of(trainer)
        assert facts["run"] == "48 episodes in 6 steps of 8"
        assert facts["pairs"] == "8 per article, each of 6 + 6 tokens, 4 in a memory, 3 read"
        assert facts["trajectory"] == f"{trainer.layout.trajectory_tokens} tokens of a context of 512"
        assert facts["optimizer"] == "adamw_torch, learning rate 0.01"
        assert facts["selection"] == "temperature 1, heads averaged as probabilities"
        assert facts["seed"] == 9

    def test_say_the_versions(self, trainer: AttentionGuidedRLTrainer) -> None:
        versions = str(facts_of(trainer)["versions"])
        assert versions.startswith(f"python {platform.python_version()}, torch ")
        assert f"transformers {transformers.__version__}" in versions
        for name in ("trl", "peft", "accelerate", "datasets"):
            assert re.search(rf"\b{name} \d", versions)

    def test_precision_is_that_of_the_weights(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        trainer = tiny_trainer(tmp_path, texts, tokenizer, tiny_llama().to(torch.bfloat16))
        assert facts_of(trainer)["precision"] == "weights bfloat16, adapter float32"

    @pytest.mark.parametrize(("given", "shown"), [("", "LlamaForCausalLM"), ("someone/model", "someone/model")])
    def test_model_is_named_by_where_it_came_from(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, given: str, shown: str
    ) -> None:
        model = tiny_llama()
        model.config.name_or_path = given
        assert facts_of(tiny_trainer(tmp_path, texts, tokenizer, model))["model"] == shown

    def test_a_model_folder_is_named_without_its_parents(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model = tiny_llama()
        model.config.name_or_path = str(tmp_path / "my-model")
        (tmp_path / "my-model").mkdir()
        assert facts_of(tiny_trainer(tmp_path, texts, tokenizer, model))["model"] == "my-model"

    def test_table_shows_each_fact_in_full(self) -> None:
        written = io.StringIO()
        facts = {"model": "[bold]name[/]", "seed": 3, "memory free": None, "versions": "torch 2 " * 30}
        print_facts(facts, Console(file=written, width=60))
        text = written.getvalue()
        assert "What will run" in text
        assert text.count("torch 2") == 30
        assert "[bold]name[/]" in text
        assert re.search(r"seed\s*│ 3", text)

    def test_table_goes_to_standard_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_facts({"model": "here"})
        printed = capsys.readouterr()
        assert "here" in printed.err
        assert printed.out == ""


class TestMemoryShortage:
    def test_a_tiny_run_fits(self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
        trainer = tiny_trainer(tmp_path, texts, tokenizer)
        assert memory_shortage(trainer.args, trainer.policy, trainer.separators) is None

    def test_too_large_a_batch_names_the_part_and_the_option(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        trainer = tiny_trainer(tmp_path, texts, tokenizer, generation_batch_size=10**9, num_episodes=10**9)
        shortage = memory_shortage(trainer.args, trainer.policy, trainer.separators)
        assert shortage is not None
        assert re.search(r"will probably not fit: .* needs [\d.]+ GiB beside the model", shortage)
        assert "lower generation_batch_size" in shortage

    def test_an_unknown_architecture_is_said_and_not_refused(
        self, tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        trainer = tiny_trainer(tmp_path, texts, tokenizer)
        trainer.policy.causal_lm.config = PreTrainedConfig()
        shortage = memory_shortage(trainer.args, trainer.policy, trainer.separators)
        assert shortage is not None
        assert shortage.startswith("the run's memory cannot be planned: ")

    def test_it_is_said_at_the_start_of_a_run(
        self,
        tmp_path: Path,
        texts: list[str],
        tokenizer: PreTrainedTokenizerFast,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        trainer = tiny_trainer(tmp_path, texts, tokenizer, num_episodes=8)
        monkeypatch.setattr("attention_rl_trainer.planning.preflight.free_memory_gib", lambda device: 1e-6)
        trainer.train()
        assert [record for record in caplog.records if "will probably not fit" in record.message]
