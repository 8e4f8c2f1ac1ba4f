"""The options: defaults of the design, refusals, and how YAML and command line reach them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import logging
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from tiny import tiny_config

import attention_rl_trainer
from attention_rl_trainer.commands.parsing import CommandParser
from attention_rl_trainer.commands.train import AdapterConfig, DataArguments, parser
from attention_rl_trainer.config import NOT_OPTIONS, OPTION_GROUPS, AttentionGuidedRLConfig
from attention_rl_trainer.inherited import VERDICTS

CONFIGS = Path(attention_rl_trainer.__file__).parent / "configs"

Parsed: TypeAlias = tuple[DataArguments, AttentionGuidedRLConfig, AdapterConfig]
Parse: TypeAlias = Callable[..., Parsed]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    """Parse YAML text and flags as ``attention-rl train`` does."""

    def run(yaml: str = "", *flags: str) -> Parsed:
        path = tmp_path / "config.yaml"
        path.write_text(f"output_dir: {tmp_path / 'run'}\nuse_cpu: true\n{yaml}\n")
        return parser().parse(["--config", str(path), *flags])

    return run


class TestDefaults:
    @pytest.mark.parametrize(
        ("name", "value"),
        {
            "generation_batch_size": 64,
            "training_batch_size": 16,
            "num_kv_pairs": 32,
            "subset_fraction": 0.25,
            "num_steps": None,
            "tokens_per_query": 20,
            "tokens_per_key": 20,
            "tokens_per_value": 20,
            "beta": 0.1,
            "credit": "trajectory",
            "advantage": "centered",
            "filter_threshold": 1.0,
            "warmup_episodes": 15,
            "kl_reference": "previous",
            "query_temperature": 1.0,
            "selection_temperature": 1.0,
            "attention_layer": -1,
            "head_aggregation": "probabilities",
            "window": "start",
            "include_key_in_context": False,
            "num_iterations": 1,
            "epsilon": 0.2,
            "disable_dropout": True,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 1.0,
            "optim": "adamw_bnb_8bit",
            "weight_decay": 0.0,
            "num_episodes": 10000,
            "save_episodes": 100,
            "logging_steps": 1,
            "gradient_accumulation_steps": 1,
            "selector_coef": 0.0,
            "reward_gradient_coef": 0.0,
            "order_coef": 0.0,
            "entropy_coef": 0.0,
            "dataset_text_column": "text",
        }.items(),
    )
    def test_is_that_of_the_design(self, tmp_path: Path, name: str, value: object) -> None:
        assert getattr(AttentionGuidedRLConfig(output_dir=str(tmp_path), use_cpu=True), name) == value

    def test_adapter_is_that_of_the_design(self, parse: Parse) -> None:
        adapter = parse()[2]
        assert (adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout) == (8, 16, 0.05)
        assert adapter.lora_target_modules is None
        assert adapter.use_peft

    def test_the_trainer_takes_the_batch_of_the_rollout(self, tmp_path: Path) -> None:
        config = tiny_config(tmp_path, generation_batch_size=12, gradient_accumulation_steps=3)
        assert (config.train_batch_size, config.episodes_per_step) == (12, 36)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bf16": True}, r"bf16 is not supported: .*model_init_kwargs=\{'dtype': 'bfloat16'\}"),
            ({"fp16": True}, "fp16 is not supported"),
            ({"bf16_full_eval": True}, "bf16_full_eval is not supported"),
            ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported: .*lower generation_batch_size"),
            ({"load_best_model_at_end": True}, "load_best_model_at_end is not supported: .*save_episodes"),
            ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint is not supported: SIGTERM writes a checkpoint"),
            (
                {"metric_for_best_model": "reward", "save_total_limit": 2},
                "save_total_limit is 2 beside metric_for_best_model, .*leave save_total_limit out",
            ),
            ({"torch_compile": True}, "torch_compile is not supported: .*no gain where it was measured"),
            ({"dataloader_num_workers": 2}, "dataloader_num_workers must be 0 or 1, got 2"),
        ],
    )
    def test_options_of_the_trainer_that_cannot_work_are_refused(
        self, options: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            tiny_config(tmp_path, **options)

    def test_making_the_options_again_from_their_values_changes_nothing(self, tmp_path: Path) -> None:
        config = tiny_config(tmp_path, num_steps=2)
        assert dataclasses.replace(config).to_dict() == config.to_dict()


class TestStepsPerTrajectory:
    @pytest.mark.parametrize(
        ("num_kv_pairs", "fraction", "steps"), [(32, 0.25, 8), (8, 0.5, 4), (2, 0.1, 1), (6, 1, 5)]
    )
    def test_is_the_memory_by_default(self, tmp_path: Path, num_kv_pairs: int, fraction: float, steps: int) -> None:
        config = tiny_config(tmp_path, num_kv_pairs=num_kv_pairs, subset_fraction=fraction, num_steps=None)
        assert config.steps_per_trajectory == steps == config.memory_size

    def test_is_num_steps_where_given(self, tmp_path: Path) -> None:
        assert tiny_config(tmp_path, num_steps=2).steps_per_trajectory == 2

    def test_other_lengths_are_those_given(self, tmp_path: Path) -> None:
        config = tiny_config(tmp_path, tokens_per_key=5, tokens_per_value=7, window="random")
        lengths = (config.tokens_per_key, config.tokens_per_value, config.window, config.num_kv_pairs)
        assert lengths == (5, 7, "random", 8)


class TestRefusals:
    @pytest.mark.parametrize("value", [0, -1])
    @pytest.mark.parametrize(
        "name",
        [
            "tokens_per_query",
            "tokens_per_key",
            "tokens_per_value",
            "generation_batch_size",
            "training_batch_size",
            "eval_episodes",
            "eval_epochs",
            "num_episodes",
            "save_episodes",
            "warmup_episodes",
            "num_iterations",
            "logits_chunk_size",
            "embedding_batch_size",
            "shuffle_buffer_size",
        ],
    )
    def test_a_count_below_one(self, tmp_path: Path, name: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}$"):
            tiny_config(tmp_path, **{name: value})

    @pytest.mark.parametrize(
        ("name", "value"), [("tokens_per_key", 3.5), ("num_episodes", True), ("num_kv_pairs", 8.0)]
    )
    def test_a_count_that_is_not_an_integer(self, tmp_path: Path, name: str, value: object) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be an integer, got {value}$"):
            tiny_config(tmp_path, **{name: value})

    @pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
    @pytest.mark.parametrize("name", ["beta", "selector_coef", "reward_gradient_coef", "order_coef", "entropy_coef"])
    def test_a_coefficient_out_of_range(self, tmp_path: Path, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be at least 0 and finite, got {value}$"):
            tiny_config(tmp_path, **{name: value})

    @pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, 2.0])
    @pytest.mark.parametrize("name", ["log_trajectory_steps", "overfit_articles"])
    def test_a_count_or_zero_that_is_not_an_integer(self, tmp_path: Path, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be an integer, got {value}$"):
            tiny_config(tmp_path, **{name: value})

    @pytest.mark.parametrize("name", ["log_trajectory_steps", "overfit_articles"])
    def test_a_count_or_zero_below_zero(self, tmp_path: Path, name: str) -> None:
        assert getattr(tiny_config(tmp_path, **{name: 0}), name) == 0
        with pytest.raises(ValueError, match=f"^{name} must be at least 0, got -1$"):
            tiny_config(tmp_path, **{name: -1})

    @pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
    @pytest.mark.parametrize("name", ["query_temperature", "selection_temperature", "epsilon", "learning_rate"])
    def test_a_positive_number_out_of_range(self, tmp_path: Path, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be above 0 and finite, got {value}$"):
            tiny_config(tmp_path, **{name: value})

    @pytest.mark.parametrize("value", [0.0, -0.5, 1.01, math.nan])
    def test_a_subset_fraction_out_of_range(self, tmp_path: Path, value: float) -> None:
        with pytest.raises(ValueError, match=rf"^subset_fraction must be in \(0, 1\], got {value}$"):
            tiny_config(tmp_path, subset_fraction=value)

    def test_too_few_pairs_to_read_any(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^num_kv_pairs must be at least 2 \(the example and one .*, got 1$"):
            tiny_config(tmp_path, num_kv_pairs=1)

    @pytest.mark.parametrize("value", [0, -1, 5])
    def test_more_steps_than_pairs_or_none(self, tmp_path: Path, value: int) -> None:
        message = rf"^num_steps must be in 1\.\.4, .*subset_fraction 0\.5 of num_kv_pairs 8\), got {value}; raise"
        with pytest.raises(ValueError, match=message):
            tiny_config(tmp_path, num_steps=value)

    def test_steps_that_are_not_an_integer(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^num_steps must be an integer or none, got 2\.5$"):
            tiny_config(tmp_path, num_steps=2.5)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (-1, "at least 0, got -1"),
            (1.5, r"an integer or none, got 1\.5"),
            ("all", "an integer or none, got 'all'"),
        ],
    )
    def test_orders_that_are_not_a_count(self, tmp_path: Path, value: object, message: str) -> None:
        with pytest.raises(ValueError, match=f"^eval_order_episodes must be {message}$"):
            tiny_config(tmp_path, eval_order_episodes=value)

    @pytest.mark.parametrize(
        ("name", "choices"),
        [
            ("window", "start, random"),
            ("head_aggregation", "probabilities, scores"),
            ("advantage", "reward, centered, whitened"),
            ("credit", "trajectory, return_to_go, step"),
            ("kl_reference", "previous, base"),
        ],
    )
    def test_an_unknown_choice(self, tmp_path: Path, name: str, choices: str) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be one of {choices}, got 'other'$"):
            tiny_config(tmp_path, **{name: "other"})

    def test_a_threshold_that_is_not_a_number(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^filter_threshold must be a number, got nan$"):
            tiny_config(tmp_path, filter_threshold=math.nan)

    @pytest.mark.parametrize("value", [None, math.inf, -math.inf, -1.0, 0.0])
    def test_any_other_threshold_is_taken(self, tmp_path: Path, value: float | None) -> None:
        assert tiny_config(tmp_path, filter_threshold=value).filter_threshold == value

    @pytest.mark.parametrize(
        ("name", "value", "instead"),
        [
            ("max_steps", 7, "num_episodes"),
            ("num_train_epochs", 2.0, "num_episodes"),
            ("save_steps", 10, "save_episodes"),
            ("per_device_train_batch_size", 16, "generation_batch_size"),
        ],
    )
    def test_an_option_that_follows_from_another(self, tmp_path: Path, name: str, value: float, instead: str) -> None:
        message = rf"^{name} is {value}, but it follows from {instead} \(\d+\).*Set {instead} alone$"
        with pytest.raises(ValueError, match=message):
            tiny_config(tmp_path, **{name: value})

    @pytest.mark.parametrize(
        ("name", "value", "fixed"),
        [
            ("save_strategy", "epoch", "'no'"),
            ("save_strategy", "steps", "'no'"),
            ("logging_nan_inf_filter", True, "False"),
            ("remove_unused_columns", True, "False"),
            ("ignore_data_skip", False, "True"),
        ],
    )
    def test_an_option_that_must_stay(self, tmp_path: Path, name: str, value: object, fixed: str) -> None:
        message = f"^{name} must stay {fixed}, got {re.escape(repr(value))}: Must stay {fixed.lower()}"
        with pytest.raises(ValueError, match=message):
            tiny_config(tmp_path, **{name: value})


class TestOptimizer:
    @pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
    def test_without_bitsandbytes_is_adamw(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, optim: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with caplog.at_level(logging.WARNING, logger="attention_rl_trainer.config"):
            assert tiny_config(tmp_path, optim=optim).optim == "adamw_torch"
        assert f"optim={optim} needs bitsandbytes, which is not installed; adamw_torch is used" in caplog.text

    def test_without_bitsandbytes_others_stay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        assert tiny_config(tmp_path, optim="sgd").optim == "sgd"
        assert not caplog.records


class TestModelInitKwargs:
    @pytest.mark.parametrize(
        "text", ['{"attn_implementation": "eager", "revision": "1"}', " {}", '{"a": {"b": [1.5]}}']
    )
    def test_json_is_read(self, tmp_path: Path, text: str) -> None:
        assert tiny_config(tmp_path, model_init_kwargs=text).model_init_kwargs == json.loads(text)

    @pytest.mark.parametrize("value", [None, {"dtype": "float32"}])
    def test_what_is_not_text_stays(self, tmp_path: Path, value: dict[str, Any] | None) -> None:
        assert tiny_config(tmp_path, model_init_kwargs=value).model_init_kwargs == value

    @pytest.mark.parametrize("text", ["[1]", "3", "null", "eager", "{eager}", "{'a': 1}", ""])
    def test_what_is_not_an_object_is_refused(self, tmp_path: Path, text: str) -> None:
        message = rf"^model_init_kwargs must be a JSON object such as .*, got {re.escape(repr(text))}$"
        with pytest.raises(ValueError, match=message):
            tiny_config(tmp_path, model_init_kwargs=text)

    def test_secrets_among_them_are_masked_on_disk(self, tmp_path: Path) -> None:
        proxy = "http://user:p@ss@proxy.example:8080/a@b"
        nested = {
            "token": "hf_nestedsecret",
            "proxies": {"password": "deepsecret", "https": proxy},
            "mirrors": [proxy, ("ftp://me@here", 1)],
            "dtype": "float32",
        }
        config = AttentionGuidedRLConfig(
            output_dir=str(tmp_path), model_init_kwargs=nested, hub_token="hf_configsecret", run_name="a@b http://c/d@e"
        )
        config.save_json(tmp_path / "config.json")
        written = json.loads((tmp_path / "config.json").read_text())
        address = "http://<CREDENTIALS>@proxy.example:8080/a@b"
        assert written["model_init_kwargs"] == {
            "token": "<TOKEN>",
            "proxies": {"password": "<PASSWORD>", "https": address},
            "mirrors": [address, ["ftp://<CREDENTIALS>@here", 1]],
            "dtype": "float32",
        }
        assert written["run_name"] == "a@b http://c/d@e"
        assert config.model_init_kwargs == nested

        # What trackers are given, and what is printed.
        @dataclasses.dataclass
        class OwnConfig(AttentionGuidedRLConfig):
            """A user's."""

        own = OwnConfig(output_dir=str(tmp_path), model_init_kwargs=nested, hub_token="hf_configsecret")
        for text in (config.to_json_string(), str(config.to_sanitized_dict()), str(config), repr(config), repr(own)):
            assert "tokens_per_query" in text
            assert "<HUB_TOKEN>" in text
            assert "<INCLUDE" not in text
            assert not [part for part in ("nestedsecret", "deepsecret", "p@ss", "configsecret") if part in text]


class TestYamlAndCommandLine:
    @pytest.mark.parametrize(
        ("yaml", "name", "value"),
        [
            # YAML 1.1 reads the first as text.
            ("learning_rate: 1e-4", "learning_rate", 1e-4),
            ("learning_rate: 0.0001", "learning_rate", 1e-4),
            ("filter_threshold: null", "filter_threshold", None),
            ("filter_threshold: .inf", "filter_threshold", math.inf),
            ("filter_threshold: -.inf", "filter_threshold", -math.inf),
            ("filter_threshold: -inf", "filter_threshold", -math.inf),
            ("num_steps: 3", "num_steps", 3),
            ("num_steps: null", "num_steps", None),
            ("shuffle: false", "shuffle", False),
            ("window: random", "window", "random"),
            ("model_init_kwargs: {attn_implementation: eager}", "model_init_kwargs", {"attn_implementation": "eager"}),
        ],
    )
    def test_yaml_values_get_their_type(self, parse: Parse, yaml: str, name: str, value: object) -> None:
        parsed = getattr(parse(yaml)[1], name)
        assert parsed == value
        assert type(parsed) is type(value)

    @pytest.mark.parametrize(
        ("flags", "value"),
        [
            (["--filter_threshold=-inf"], -math.inf),
            (["--filter_threshold", "inf"], math.inf),
            (["--filter_threshold", "none"], None),
            (["--filter_threshold", "-1.5"], -1.5),
        ],
    )
    def test_threshold_on_the_command_line(self, parse: Parse, flags: list[str], value: float | None) -> None:
        assert parse("filter_threshold: 2.0", *flags)[1].filter_threshold == value

    def test_an_unknown_key_is_named(self, parse: Parse) -> None:
        with pytest.raises(
            ValueError, match=r"config\.yaml: there is no option tokens_per_quary; did you mean tokens_per"
        ):
            parse("tokens_per_quary: 5")

    def test_an_unknown_flag_is_named(self, parse: Parse) -> None:
        with pytest.raises(
            ValueError, match=r"^there is no option --tokens_per_quary; did you mean --tokens_per_query\?"
        ):
            parse("", "--tokens_per_quary", "5")

    def test_a_yaml_value_out_of_range_is_named(self, parse: Parse) -> None:
        with pytest.raises(ValueError, match=r"^tokens_per_value must be an integer, got 2\.5$"):
            parse("tokens_per_value: 2.5")

    def test_command_line_overrides_yaml(self, parse: Parse) -> None:
        data, args, model = parse(
            "beta: 0.3\nseed: 5\ndataset_name: there\nlora_r: 4",
            "--beta",
            "0.5",
            "--dataset_name",
            "here",
            "--lora_r=2",
        )
        assert (args.beta, args.seed, data.dataset_name, model.lora_r) == (0.5, 5, "here", 2)

    def test_seeds_flags(self, parse: Parse) -> None:
        flags = ["--batch-size", "4", "--episodes", "9", "--dataset", "articles.jsonl", "--resume"]
        data, args, _ = parse("generation_batch_size: 32\nnum_episodes: 99", *flags)
        assert (args.generation_batch_size, args.num_episodes, data.dataset_name) == (4, 9, "articles.jsonl")
        assert args.train_batch_size == 4
        assert data.resume

    def test_without_resume_a_run_starts_anew(self, parse: Parse) -> None:
        assert not parse()[0].resume


class TestShippedConfigs:
    def test_there_are_those_that_the_documents_name(self) -> None:
        assert {path.name for path in CONFIGS.glob("*.yaml")} >= {
            "demo.yaml",
            "seed.yaml",
            "llama3.2_3b.yaml",
            "gpt2.yaml",
        }

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_parses(self, path: Path, tmp_path: Path) -> None:
        data, args, _ = parser().parse(["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true"])
        assert data.dataset_name
        assert args.steps_per_trajectory >= 1


class TestNamesOfTrl:
    @pytest.mark.parametrize("name", ["dataset_text_field", "dataset-text-field"])
    def test_the_text_column_has_two_names(self, parse: Parse, name: str) -> None:
        assert parse("", f"--{name}", "body")[1].dataset_text_column == "body"
        assert parse(f"{name}: body")[1].dataset_text_column == "body"

    def test_so_it_has_in_python(self, tmp_path: Path) -> None:
        assert tiny_config(tmp_path, dataset_text_field="body").dataset_text_column == "body"
        with pytest.raises(ValueError, match=r"^dataset_text_field is another name of dataset_text_column; give one"):
            tiny_config(tmp_path, dataset_text_field="body", dataset_text_column="text")

    def test_a_file_with_both_names_is_refused(self, parse: Parse) -> None:
        with pytest.raises(
            ValueError, match=r"dataset_text_field is another name of dataset_text_column, which is there"
        ):
            parse("dataset_text_column: text\ndataset_text_field: body")

    def test_the_split_to_test_on(self, parse: Parse) -> None:
        assert parse("", "--dataset_test_split", "test")[0].dataset_eval_split == "test"
        assert parse("dataset_test_split: test")[0].dataset_eval_split == "test"

    def test_short_names_are_taken_from_a_file_too(self, parse: Parse) -> None:
        data, args, _ = parse("batch-size: 4\nepisodes: 9\ndataset: there")
        assert (args.generation_batch_size, args.num_episodes, data.dataset_name) == (4, 9, "there")

    @pytest.mark.parametrize("name", ["quantization_config", "reward_funcs", "temperature", "num_generations"])
    def test_what_is_no_option_says_what_is(self, parse: Parse, tmp_path: Path, name: str) -> None:
        said = re.escape(NOT_OPTIONS[name])
        with pytest.raises(ValueError, match=f"^AttentionGuidedRLConfig takes no {name}: {said}$"):
            tiny_config(tmp_path, **{name: 1})
        with pytest.raises(ValueError, match=f"^there is no option --{name}: {said}$"):
            parse("", f"--{name}", "1")
        with pytest.raises(ValueError, match=f"config.yaml: there is no option {name}: {said}$"):
            parse(f"{name}: 1")

    @pytest.mark.parametrize(
        ("flags", "instead"),
        [
            (["--per_device_train_batch_size", "4"], "Set generation_batch_size alone"),
            (["--max_steps", "7"], "Set num_episodes alone"),
            (["--bf16"], "model_init_kwargs={'dtype': 'bfloat16'}"),
        ],
    )
    def test_an_option_that_does_not_act_is_not_in_the_help_but_says_what_to_set(
        self, parse: Parse, flags: list[str], instead: str
    ) -> None:
        assert f"{flags[0]} " not in parser().format_help()
        with pytest.raises(ValueError, match=re.escape(instead)):
            parse("", *flags)

    def test_any_other_name_is_an_error_as_ever(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="unexpected keyword argument 'tokens_per_quary'"):
            tiny_config(tmp_path, tokens_per_quary=4)

    def test_a_path_is_as_good_as_text(self, tmp_path: Path) -> None:
        config = tiny_config(tmp_path, output_dir=tmp_path / "run", resume_from_checkpoint=tmp_path)
        assert (config.output_dir, config.resume_from_checkpoint) == (str(tmp_path / "run"), str(tmp_path))


def without_blanks(text: str) -> str:
    """Without what wrapping adds, hyphens of wrapped words included."""
    return re.sub(r"[\s-]", "", text)


def method_options() -> dict[str, str]:
    """The heading of each option of the method."""
    inherited = VERDICTS.keys() | {"activation_checkpointing", "activation_checkpointing_kwargs"}
    headings = {owner: heading for heading, owners in OPTION_GROUPS.items() for owner in owners}
    return {
        item.name: headings[next(kind for kind in AttentionGuidedRLConfig.__mro__ if item.name in vars(kind))]
        for item in dataclasses.fields(AttentionGuidedRLConfig)
        if item.init and item.name not in inherited
    }


@pytest.mark.parametrize("command", ["train", "calibrate", "plan"])
class TestHelp:
    def help_of(self, command: str) -> str:
        made: CommandParser = importlib.import_module(f"attention_rl_trainer.commands.{command}").parser()
        return made.format_help()

    def test_every_option_is_explained_under_its_heading_before_those_of_the_trainer(self, command: str) -> None:
        text = self.help_of(command)
        fields = AttentionGuidedRLConfig.__dataclass_fields__
        sections = dict(re.findall(r"^(\w+)[^\n]*:\n((?: .*\n|\n(?= ))+)", text, flags=re.MULTILINE))
        for name, heading in method_options().items():
            assert f"--{name}" in sections[heading], name
            assert without_blanks(fields[name].metadata["help"]) in without_blanks(sections[heading]), name
        order = [heading for heading in sections if heading in {*OPTION_GROUPS, "Trainer"}]
        assert order == [*OPTION_GROUPS, "Trainer"]
        assert list(sections)[-1] == "Trainer"

    def test_of_the_trainers_options_those_that_act_are_listed(self, command: str) -> None:
        trainers = self.help_of(command).partition("\nTrainer ")[2]
        for item in dataclasses.fields(AttentionGuidedRLConfig):
            if item.init and item.name in VERDICTS:
                assert (f"  --{item.name} " in trainers) is (VERDICTS[item.name].kind == "honoured"), item.name

    def test_the_files_that_come_with_the_package_are_named(self, command: str) -> None:
        assert "--config NAME|FILE" in self.help_of(command)
        assert "recommended" in self.help_of(command)


@pytest.mark.parametrize("flag", ["--batch-size", "--episodes", "--dataset", "--resume"])
def test_seeds_flags_are_listed(flag: str) -> None:
    assert re.search(rf"{flag}\b", parser().format_help())


def test_help_in_python_explains_every_option_of_the_method() -> None:
    text = AttentionGuidedRLConfig.__doc__ or ""
    assert len(method_options()) > 40
    for name in method_options():
        option = AttentionGuidedRLConfig.__dataclass_fields__[name]
        assert f"\n{name} = {option.default!r}\n    " in text
        assert without_blanks(option.metadata["help"]) in without_blanks(text), name


def test_a_signature_still_shows_the_options() -> None:
    assert "num_kv_pairs" in inspect.signature(AttentionGuidedRLConfig).parameters
