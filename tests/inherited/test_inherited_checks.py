"""Inherited options that are wrong, that would do harm, or that would be passed over without a word."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import transformers
from packaging.version import Version
from tiny import tiny_config
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import TrlParser

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.inherited import VERDICTS, NewerOptions
from attention_rl_trainer.inherited import checks as inherited_checks

FIELDS = {item.name for item in dataclasses.fields(TrainingArguments)}

# A value of each refused option that is not its default.
REFUSED: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "num_train_epochs": 2.0,
    "max_steps": 7,
    "save_steps": 10,
    "per_device_eval_batch_size": 4,
    "data_seed": 0,
    "debug": "tpu_metrics_debug",
    "auto_find_batch_size": True,
    "optim_target_modules": "all-linear",
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "bf16": True,
    "fp16": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "logging_nan_inf_filter": True,
    "include_num_input_tokens_seen": "all",
    "load_best_model_at_end": True,
    "save_strategy": "epoch",
    "enable_jit_checkpoint": True,
    "ignore_data_skip": False,
    "remove_unused_columns": True,
    "train_sampling_strategy": "group_by_length",
    "accelerator_config": {"split_batches": True},
    "parallelism_config": object(),
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2},
    "deepspeed": {},
}
# A value of each option without effect that is not its default, and asks for something.
IDLE: dict[str, Any] = {
    "do_predict": True,
    "average_tokens_across_devices": False,
    "torch_empty_cache_steps": 2,
    "use_cache": True,
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "save_on_each_node": True,
    "label_names": ["labels"],
    "length_column_name": "size",
    "dataloader_drop_last": True,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "ddp_find_unused_parameters": False,
    "ddp_bucket_cap_mb": 5,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "local_rank": 1,
}
# What asks for nothing, whatever it is.
SILENT = {"do_train": True, "do_eval": True, "dataloader_pin_memory": False}
LOGGER = "attention_rl_trainer.inherited.checks"


def test_every_verdict_is_tried() -> None:
    assert {name for name, verdict in VERDICTS.items() if verdict.kind == "refused"} == REFUSED.keys()
    assert {
        name for name, verdict in VERDICTS.items() if verdict.kind == "without effect"
    } == IDLE.keys() | SILENT.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_act_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{name} ") as caught:
        tiny_config(tmp_path, **{name: REFUSED[name]})
    assert VERDICTS[name].text in str(caught.value)
    if (instead := VERDICTS[name].instead) is not None:
        assert str(caught.value).endswith(f". Set {instead} alone")


@pytest.mark.parametrize("name", IDLE)
def test_what_does_nothing_is_named(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workers = 1 if name == "dataloader_prefetch_factor" else 0
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        tiny_config(tmp_path, **{name: IDLE[name]}, dataloader_num_workers=workers)
    messages = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert messages == [f"{name} is {IDLE[name]!r}, which has no effect here: {VERDICTS[name].text}"]


class TestSilence:
    def test_defaults_say_nothing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tiny_config(tmp_path)
        tiny_config(tmp_path, **SILENT)
        AttentionGuidedRLConfig(output_dir=str(tmp_path))
        assert [record for record in caplog.records if record.name == LOGGER] == []

    @pytest.mark.parametrize("evaluates", [False, True])
    def test_nor_do_copies_of_finished_options(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, evaluates: bool
    ) -> None:
        options = {"eval_strategy": "steps", "eval_steps": 3, "debug": "underflow_overflow"} if evaluates else {}
        config = tiny_config(tmp_path, **options)
        again = dataclasses.replace(config)
        from_values = AttentionGuidedRLConfig(**config.to_dict() | {"hub_token": None})
        assert again.to_dict() == config.to_dict() == from_values.to_dict()
        assert [record for record in caplog.records if record.name == LOGGER] == []

    def test_each_default_given_by_name_passes(self, tmp_path: Path) -> None:
        """Also the Trainer's own, where this package's differs, unless it must stay."""
        for item in dataclasses.fields(TrainingArguments):
            if item.name == "output_dir" or VERDICTS[item.name].fixed is not None:
                continue
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            tiny_config(tmp_path, **{item.name: default})


WRONG: dict[str, list[tuple[Any, str]]] = {
    "gradient_accumulation_steps": [
        (0, "at least 1, got 0"),
        (-2, "at least 1, got -2"),
        (1.5, "an integer, got 1.5"),
        (True, "an integer, got True"),
        ("2", "an integer, got '2'"),
        (math.nan, "an integer, got nan"),
        (None, "an integer, got None"),
    ],
    "max_grad_norm": [(-1.0, "at least 0 and finite, got -1.0"), (math.nan, "at least 0 and finite, got nan")],
    "weight_decay": [(-0.1, "at least 0 and finite, got -0.1"), (math.inf, "at least 0 and finite, got inf")],
    "adam_beta1": [(1.0, "in [0, 1), got 1.0"), (-0.1, "in [0, 1), got -0.1"), (math.nan, "in [0, 1), got nan")],
    "adam_beta2": [(1.5, "in [0, 1), got 1.5")],
    "adam_epsilon": [(-1e-8, "at least 0 and finite, got -1e-08")],
    "warmup_steps": [(-1, "at least 0 and finite, got -1"), (math.nan, "at least 0 and finite, got nan")],
    "logging_steps": [(0, "above 0 and finite, got 0"), (-1, "above 0 and finite, got -1")],
    "eval_steps": [(-0.5, "at least 0 and finite, got -0.5"), ("5", "a number or none, got '5'")],
    "eval_delay": [(-3, "at least 0 and finite, got -3")],
    "save_total_limit": [(0, "at least 1, got 0"), (-1, "at least 1, got -1"), (2.0, "an integer or none, got 2.0")],
    "seed": [
        (-1, "in [0, 4294967296), got -1"),
        (2**32, "in [0, 4294967296), got 4294967296"),
        (1.0, "an integer, got 1.0"),
    ],
    "dataloader_num_workers": [
        (-1, "at least 0, got -1"),
        (1.0, "an integer, got 1.0"),
        (True, "an integer, got True"),
    ],
    "push_to_hub": [("false", "true or false, got 'false'"), (1, "true or false, got 1")],
    "use_cpu": [("yes", "true or false, got 'yes'")],
    "save_only_model": [(0, "true or false, got 0")],
    "full_determinism": [(None, "true or false, got None")],
    "hub_model_id": [(3, "text or none, got 3")],
    "log_level": [("loud", "one of detail, debug, info, warning, error, critical, passive, got 'loud'")],
    "log_level_replica": [(30, "one of detail, debug, info, warning, error, critical, passive, got 30")],
    "eval_strategy": [("often", "one of no, steps, epoch, got 'often'"), (None, "one of no, steps, epoch, got None")],
    "logging_strategy": [(True, "one of no, steps, epoch, got True")],
    "hub_strategy": [("never", "one of end, every_save, checkpoint, all_checkpoints, got 'never'")],
}


class TestWrongValues:
    @pytest.mark.parametrize(
        ("name", "case"), [(name, case) for name, cases in WRONG.items() for case in range(len(cases))]
    )
    def test_are_named_with_what_is_expected(self, name: str, case: int, tmp_path: Path) -> None:
        value, expected = WRONG[name][case]
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
            tiny_config(tmp_path, **{name: value})
        assert str(caught.value) == f"{name} must be {expected}"

    @pytest.mark.parametrize("name", ["lr_scheduler_type", "optim"])
    def test_an_unknown_choice_lists_the_known_ones(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"^{name} must be one of (linear|adamw_torch), .*, got 'adamV'$"):
            tiny_config(tmp_path, **{name: "adamV"})

    def test_numbers_of_numpy_are_not_integers_but_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^gradient_accumulation_steps must be an integer, got "):
            tiny_config(tmp_path, gradient_accumulation_steps=np.int64(2))


class TestDependence:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"eval_strategy": "epoch"}, "eval_strategy is 'epoch', which means once, at the end"),
            ({"logging_strategy": "epoch"}, "logging_strategy is 'epoch', which means once, at the end"),
            ({"eval_steps": 5}, "eval_steps is 5, which has no effect while eval_strategy is 'no'"),
            ({"eval_delay": 5}, "eval_delay is 5, which has no effect while eval_strategy is 'no'"),
            (
                {"metric_for_best_model": "reward"},
                "metric_for_best_model is reward, which has no effect while eval_strategy is 'no'",
            ),
            (
                {"activation_checkpointing_kwargs": {"use_reentrant": False}},
                "activation_checkpointing_kwargs has no effect while activation_checkpointing is off",
            ),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )
    def test_what_another_option_switches_off_is_said(
        self, options: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tiny_config(tmp_path, **options)
        (message,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        assert message.startswith(said)

    @pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
    @pytest.mark.parametrize("metric", [None, "loss", "eval_loss"])
    def test_a_schedule_that_reads_a_loss_is_refused(self, schedule: str, metric: str | None, tmp_path: Path) -> None:
        options = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "metric_for_best_model": metric}
        with pytest.raises(ValueError, match=rf"^metric_for_best_model is {metric!r}, .* loss, .*such as 'reward'$"):
            tiny_config(tmp_path, **options)


class TestAcceleratorConfig:
    @pytest.mark.parametrize(
        "settings",
        [
            {"split_batches": True},
            {"dispatch_batches": True},
            {"even_batches": False},
            {"use_seedable_sampler": False},
            {"non_blocking": True},
            {"gradient_accumulation_kwargs": {"num_steps": 2}},
            {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        ],
        ids=lambda settings: "-".join(settings) + "-".join(map(str, settings.values())).replace(" ", ""),
    )
    @pytest.mark.parametrize("form", ["dict", "object", "json", "file"])
    def test_is_refused_in_every_form(self, settings: dict[str, Any], form: str, tmp_path: Path) -> None:
        path = tmp_path / "accelerator.json"
        path.write_text(json.dumps(settings))
        forms = {
            "dict": settings,
            "object": AcceleratorConfig(**settings),
            "json": json.dumps(settings),
            "file": str(path),
        }
        with pytest.raises(ValueError, match=rf"^accelerator_config sets {re.escape(str(settings))}, which is not"):
            tiny_config(tmp_path, accelerator_config=forms[form])

    @pytest.mark.parametrize("settings", [None, {}, {"split_batches": False}, {"dispatch_batches": None}], ids=str)
    def test_its_defaults_pass(self, settings: dict[str, Any] | None, tmp_path: Path) -> None:
        tiny_config(tmp_path, accelerator_config=settings)


class TestEnvironment:
    @pytest.mark.parametrize(
        "name", ["USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "DYNAMO_BACKEND"]
    )
    def test_what_accelerate_switches_on_past_the_options_is_refused(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(f"ACCELERATE_{name}", "INDUCTOR" if name == "DYNAMO_BACKEND" else "true")
        with pytest.raises(ValueError, match=rf"^ACCELERATE_{name} is .*; launch .*, or unset ACCELERATE_{name}$"):
            tiny_config(tmp_path)

    def test_what_the_launcher_always_sets_passes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
            monkeypatch.setenv(f"ACCELERATE_USE_{name}", "false")
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
        tiny_config(tmp_path, gradient_accumulation_steps=3)
        assert [record for record in caplog.records if record.name == LOGGER] == []

    def test_an_accumulation_that_the_trainer_passes_over_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        tiny_config(tmp_path)
        assert "GRADIENT_ACCUMULATION_STEPS is 4, which has no effect here: set gradient_accumulation" in caplog.text


def test_an_option_that_is_newer_than_the_table_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As seen by a table that lacks one."""
    monkeypatch.delitem(inherited_checks.VERDICTS, "neftune_noise_alpha")
    tiny_config(tmp_path)
    assert not [record for record in caplog.records if record.name == LOGGER]
    tiny_config(tmp_path, neftune_noise_alpha=5.0)
    assert f"neftune_noise_alpha is 5.0: transformers {Version(transformers.__version__)} has this" in caplog.text


class TestYaml:
    def parse(self, tmp_path: Path, yaml: str, *flags: str) -> AttentionGuidedRLConfig:
        path = tmp_path / "options.yaml"
        path.write_text(f"output_dir: {tmp_path / 'run'}\nuse_cpu: true\noptim: adamw_torch\n{yaml}\n")
        (config,) = TrlParser((AttentionGuidedRLConfig,)).parse_args_and_config(["--config", str(path), *flags])
        assert isinstance(config, AttentionGuidedRLConfig)
        return config

    @pytest.mark.parametrize(
        ("yaml", "message"),
        [
            ("neftune_noise_alpha: 5", r"^neftune_noise_alpha is not supported: noise"),
            ("data_seed: 3", r"^data_seed is not supported: the order"),
            ("warmup_steps: 10", r"^warmup_steps is 10\.?0?, but the schedule 'constant' has no warm-up"),
            ("per_device_eval_batch_size: 2", r"^per_device_eval_batch_size is 2, but it follows from generation_b"),
            ("gradient_accumulation_steps: 0", r"^gradient_accumulation_steps must be at least 1, got 0$"),
            ("max_grad_norm: .nan", r"^max_grad_norm must be at least 0 and finite, got nan$"),
            ("accelerator_config: {split_batches: true}", r"^accelerator_config sets \{'split_batches': True\}"),
            ("torch_compile_backend: eager", r"^torch_compile_backend is not supported"),
        ],
    )
    def test_refuses_alike(self, yaml: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            self.parse(tmp_path, yaml)

    def test_command_line_refuses_alike(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^label_smoothing_factor is not supported: .*\(got 0\.1\)$"):
            self.parse(tmp_path, "", "--label_smoothing_factor", "0.1")

    def test_a_bare_no_is_the_choice_of_that_name(self, tmp_path: Path) -> None:
        config = self.parse(tmp_path, "eval_strategy: no\nsave_strategy: no\nlogging_strategy: no")
        assert (config.eval_strategy, config.save_strategy, config.logging_strategy) == ("no", "no", "no")

    def test_numbers_in_either_spelling_pass(self, tmp_path: Path) -> None:
        config = self.parse(tmp_path, "weight_decay: 1e-2\nmax_grad_norm: 1\nadam_beta2: 0.95\nlogging_steps: 2")
        assert (config.weight_decay, config.max_grad_norm, config.adam_beta2, config.logging_steps) == (
            0.01,
            1,
            0.95,
            2,
        )


class TestNamesOfToday:
    """Also under a transformers that knows activation checkpointing by its older name alone."""

    @pytest.mark.parametrize("value", [True, False, None])
    def test_reach_the_trainer(self, value: bool | None, tmp_path: Path) -> None:
        config = tiny_config(tmp_path, activation_checkpointing=value)
        assert config.activation_checkpointing is bool(value)
        assert config.gradient_checkpointing is bool(value)
        assert dataclasses.replace(config).to_dict() == config.to_dict()

    def test_as_does_their_json(self, tmp_path: Path) -> None:
        given = '{"use_reentrant": false}'
        config = tiny_config(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs=given)
        assert (
            config.activation_checkpointing_kwargs == config.gradient_checkpointing_kwargs == {"use_reentrant": False}
        )

    def test_they_have_the_types_and_defaults_of_transformers(self) -> None:
        ours = {item.name: (item.type, item.default) for item in dataclasses.fields(NewerOptions)}
        assert ours.keys() == {name for name, verdict in VERDICTS.items() if verdict.since > (5, 18)}
        for name in ours.keys() & FIELDS:
            own, upstream = (get_type_hints(kind)[name] for kind in (NewerOptions, TrainingArguments))
            assert own == upstream
            assert ours[name][1] == TrainingArguments.__dataclass_fields__[name].default
