"""Models, adapters and tokenizers that a user gives as objects: trained as they are saved, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from tiny import adapted, article_texts, byte_level_tokenizer, save_tiny_llama, tiny_config, write_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from attention_rl_trainer.commands.evaluate import main as evaluate
from attention_rl_trainer.commands.train import main as train
from attention_rl_trainer.durability.weights import save_adapter
from attention_rl_trainer.errors import BaseModelError
from attention_rl_trainer.models import add_adapter, take_model
from attention_rl_trainer.models.adapters import AdapterLayers
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

TEXTS = article_texts(12)
IDS = torch.arange(1, 25).view(2, 12)


def other_adapter() -> LoraConfig:
    """Make a config, because PEFT writes the base model's name into it."""
    return LoraConfig(target_modules=["up_proj"], init_lora_weights=False)


class Folders:
    """A base model and an adapter that was trained on it, as they lie on a disk."""

    def __init__(self, folder: Path) -> None:
        self.base_folder, self.adapter_folder = folder / "base", folder / "adapter"
        save_tiny_llama(self.base_folder, TEXTS)
        adapted(self.base(), 0.05).save_pretrained(self.adapter_folder)

    def base(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.base_folder)
        return model

    def peft(self, name: str = "default", *, is_trainable: bool = True) -> PeftModel:
        return PeftModel.from_pretrained(self.base(), self.adapter_folder, adapter_name=name, is_trainable=is_trainable)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(TEXTS)


def make_trainer(folder: Path, model: Any, tokenizer: Any = None, **options: Any) -> AttentionGuidedRLTrainer:
    changes = {"num_episodes": 8, "generation_batch_size": 4, "warmup_episodes": 1, "filter_threshold": None}
    args = tiny_config(folder, **changes | options.pop("changes", {}))
    rows = [{"text": text} for text in TEXTS]
    return AttentionGuidedRLTrainer(model, args, rows, processing_class=tokenizer, **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        values: Tensor = model.eval()(IDS).logits
    return values


def train_and_reload(folder: Path, folders: Folders, model: Any) -> AttentionGuidedRLTrainer:
    """Train one update, and compare the policy and the reference with what the saved adapter and its base give."""
    trainer = make_trainer(folder, model)
    before = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.policy.model.named_parameters())
    assert any(not torch.equal(values, after[name]) for name, values in before.items())
    trainer.save_model(str(folder / "saved"))
    expect_the_same(trainer.policy.model, folder / "saved", folders)
    return trainer


def change_and_reload(folder: Path, folders: Folders, model: PeftModel) -> None:
    """Change what would be trained, and compare as `train_and_reload` does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(folder, model)
    expect_the_same(model, folder, folders)


def expect_the_same(model: PeftModel, adapter: Path, folders: Folders) -> None:
    policy, base = logits(model), logits(folders.base())
    assert torch.equal(policy, logits(PeftModel.from_pretrained(folders.base(), adapter)))
    assert not torch.equal(policy, base)
    with AdapterLayers(model).disabled():
        assert torch.equal(logits(model), base)


# ---- Adapters inside a model that is not a PEFT model ----


def of_its_folder(folders: Folders) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folders.adapter_folder)
    return model


def loaded(folders: Folders) -> PreTrainedModel:
    model = folders.base()
    model.load_adapter(str(folders.adapter_folder))
    return model


def loaded_to_be_trained(folders: Folders) -> PreTrainedModel:
    model = folders.base()
    model.load_adapter(str(folders.adapter_folder), is_trainable=True)
    return model


def loaded_by_another_name(folders: Folders) -> PreTrainedModel:
    model = folders.base()
    model.load_adapter(str(folders.adapter_folder), adapter_name="mine")
    return model


def need_adapters_of_transformers() -> None:
    """Skip the test where transformers' own `add_adapter` asks for a newer PEFT than is installed."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


def added(folders: Folders) -> PreTrainedModel:
    need_adapters_of_transformers()
    model = folders.base()
    model.add_adapter(other_adapter())
    return model


def added_and_switched_off(folders: Folders) -> PreTrainedModel:
    model = added(folders)
    model.disable_adapters()
    return model


def deleted(folders: Folders) -> PreTrainedModel:
    need_adapters_of_transformers()
    model = loaded(folders)
    model.delete_adapter("default")
    return model


def inside_a_peft_model(folders: Folders) -> PreTrainedModel:
    model = folders.base()
    get_peft_model(model, other_adapter())
    return model


@pytest.mark.parametrize(
    "make",
    [
        of_its_folder,
        loaded,
        loaded_to_be_trained,
        loaded_by_another_name,
        added,
        added_and_switched_off,
        deleted,
        inside_a_peft_model,
    ],
)
def test_a_model_with_adapter_layers_that_is_not_a_peft_model_is_refused(
    make: Callable[[Folders], PreTrainedModel], folders: Folders, tmp_path: Path
) -> None:
    model = make(folders)
    before = logits(model)
    with pytest.raises(ValueError, match=r"(?s)adapter layers .*PeftModel\.from_pretrained.*is_trainable=True"):
        make_trainer(tmp_path, model)
    assert torch.equal(logits(model), before)


def test_the_same_model_object_in_a_second_trainer_is_refused_until_its_adapter_is_taken_off(
    folders: Folders, tmp_path: Path
) -> None:
    model = folders.base()
    first = train_and_reload(tmp_path / "first", folders, model)
    with pytest.raises(ValueError, match=r"adapter layers .*an earlier trainer.*\.unload\(\)"):
        make_trainer(tmp_path, model)
    goes_on = logits(first.policy.model)
    second = train_and_reload(tmp_path / "second", folders, first.policy.model)
    assert not torch.equal(logits(second.policy.model), goes_on)
    taken_off = second.policy.model.unload()
    assert torch.equal(logits(taken_off), logits(folders.base()))
    third = make_trainer(tmp_path / "third", taken_off)
    assert torch.equal(logits(third.policy.model), logits(folders.base()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_config": LoraConfig(target_modules=["q_proj", "norm"])}, "not supported"),
        ({"peft_config": LoraConfig(target_modules=["q_proj"], inference_mode=True)}, "nothing to train"),
        ({"changes": {"attention_layer": 9}}, "attention_layer must be in"),
        ({"changes": {"num_steps": 60, "num_kv_pairs": 200}}, "positions|context"),
    ],
    ids=["layers", "inference", "attention-layer", "context"],
)
def test_a_start_that_fails_leaves_the_model_as_it_was(
    changes: dict[str, Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    model = folders.base()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, **changes)
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(logits(model), logits(folders.base()))
    make_trainer(tmp_path, model)


# ---- PEFT models ----


def merged(folders: Folders) -> PeftModel:
    model = folders.peft()
    model.merge_adapter()
    return model


def switched_off(folders: Folders) -> PeftModel:
    model = folders.peft()
    model.base_model.disable_adapter_layers()
    return model


def two_adapters(folders: Folders) -> PeftModel:
    model = folders.peft()
    model.load_adapter(str(folders.adapter_folder), "second")
    return model


def none_active(folders: Folders) -> PeftModel:
    model = folders.peft()
    model.base_model.set_adapter([])
    return model


def unloaded(folders: Folders) -> PeftModel:
    model = folders.peft()
    model.unload()
    return model


def merged_and_unloaded(folders: Folders) -> PeftModel:
    model = folders.peft()
    model.merge_and_unload()
    return model


def with_a_layer_that_is_trainable(folders: Folders) -> PeftModel:
    model = folders.peft()
    model.get_base_model().model.layers[0].mlp.requires_grad_(True)
    return model


def with_a_trainable_bias_below_the_adapter(folders: Folders) -> PeftModel:
    model = folders.peft()
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.requires_grad_(True)
    return model


def on_a_model_with_another(folders: Folders) -> PeftModel:
    return get_peft_model(added(folders), LoraConfig(target_modules=["q_proj"]))


def in_another_peft_model(folders: Folders) -> PeftModel:
    return get_peft_model(folders.peft(), LoraConfig(target_modules=["q_proj"]))


def mixed(folders: Folders) -> nn.Module:
    model: nn.Module = get_peft_model(folders.base(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    return model


def scaled(folders: Folders) -> PeftModel:
    model = folders.peft()
    model.get_base_model().model.layers[1].self_attn.k_proj.scale_layer(2.0)
    return model


def in_half_precision(folders: Folders) -> PeftModel:
    return folders.peft().to(torch.bfloat16)


def on_meta(folders: Folders) -> PeftModel:
    return get_peft_model(folders.base(), LoraConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folders: folders.peft(is_trainable=False), "nothing to train.*is_trainable=True"),
        (lambda folders: folders.peft("mine"), "adapters named 'mine'"),
        (two_adapters, "adapters named 'default', 'second'"),
        (none_active, "not active"),
        (merged, "merged into the base model"),
        (switched_off, r"switched off.*enable_adapter_layers\(\)"),
        (unloaded, "no adapter layers"),
        (merged_and_unloaded, "no adapter layers"),
        (with_a_layer_that_is_trainable, r"trainable.*layers\.0\.mlp\.gate_proj\.weight.*not saved"),
        (with_a_trainable_bias_below_the_adapter, r"trainable.*q_proj\.base_layer\.weight.*not saved"),
        (on_a_model_with_another, r"layers of another adapter.*layers\.0\.mlp\.up_proj"),
        (in_another_peft_model, "around PeftModel"),
        (mixed, "got PeftMixedModel"),
        (scaled, r"scaled.*layers\.1\.self_attn\.k_proj"),
        (in_half_precision, "bfloat16"),
        (on_meta, "meta device"),
    ],
    ids=[
        "inference",
        "named",
        "several",
        "inactive",
        "merged",
        "off",
        "unloaded",
        "merged-unloaded",
        "unfrozen",
        "unfrozen-below",
        "on-another",
        "nested",
        "mixed",
        "scaled",
        "half",
        "meta",
    ],
)
def test_a_peft_model_that_would_not_be_trained_as_it_is_saved_is_refused(
    make: Callable[[Folders], nn.Module], message: str, folders: Folders, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_trainer(tmp_path, make(folders), byte_level_tokenizer(TEXTS))


def after_a_second_was_deleted(folders: Folders) -> PeftModel:
    model = folders.peft()
    model.add_adapter("second", other_adapter())
    model.set_adapter("second")
    model.delete_adapter("second")
    return model


def merged_and_unmerged_without_rounding(folders: Folders) -> PeftModel:
    model = get_peft_model(folders.base(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def with_a_frozen_layer(folders: Folders) -> PeftModel:
    model = folders.peft()
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_(False)
    return model


def with_all_of_the_base_trainable_before(folders: Folders) -> PreTrainedModel:
    return folders.base().requires_grad_(True).train()


@pytest.mark.parametrize("make", [Folders.peft, with_a_frozen_layer], ids=["whole", "part-frozen"])
def test_an_adapter_that_is_trained_further_is_saved_as_it_is_trained(
    make: Callable[[Folders], nn.Module], folders: Folders, tmp_path: Path
) -> None:
    train_and_reload(tmp_path, folders, make(folders))


@pytest.mark.filterwarnings("ignore:Adapter second was active")
@pytest.mark.parametrize(
    "make",
    [
        with_all_of_the_base_trainable_before,
        after_a_second_was_deleted,
        merged_and_unmerged_without_rounding,
        lambda folders: folders.peft().unload(),
    ],
    ids=["base-trainable", "second-deleted", "unmerged", "unload"],
)
def test_what_is_accepted_would_be_saved_as_it_is_trained(
    make: Callable[[Folders], nn.Module], folders: Folders, tmp_path: Path
) -> None:
    given = make(folders)
    take_model(given, None, None)
    change_and_reload(tmp_path, folders, add_adapter(given, None))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(use_dora=True, target_modules=["q_proj"]),
        LoraConfig(use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 5}),
        LoraConfig(target_modules="all-linear", exclude_modules=["k_proj"]),
        LoraConfig(target_modules=["q_proj"], task_type="FEATURE_EXTRACTION"),
        LoraConfig(target_parameters=["mlp.gate_proj.weight"], target_modules=["q_proj"]),
        LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=["q_proj"]),
        OFTConfig(target_modules=["q_proj"]),
        VeraConfig(target_modules=["q_proj"]),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    ],
    ids=[
        "dora",
        "patterns",
        "all-linear",
        "other-task",
        "parameters",
        "one-layer",
        "ia3",
        "loha",
        "oft",
        "vera",
        "adalora",
    ],
)
def test_adapters_of_every_kind_would_be_saved_as_they_are_trained(
    config: PeftConfig, folders: Folders, tmp_path: Path
) -> None:
    change_and_reload(tmp_path, folders, add_adapter(folders.base(), config))


def test_weights_of_an_adapter_that_are_trained_and_not_saved_are_refused(folders: Folders) -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    base = folders.base().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"PEFT does not save .*q_proj.*of AdaLoraConfig"):
        add_adapter(base, config)


# ---- On the command line ----


def test_the_folder_of_an_adapter_is_refused_as_the_model_of_a_run(folders: Folders, tmp_path: Path) -> None:
    articles = write_rows(tmp_path / "articles.jsonl", [{"text": text} for text in TEXTS])
    flags = ["--dataset", str(articles), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    with pytest.raises(BaseModelError, match=r"holds an adapter, not a base model.*base"):
        train([*flags, "--model_name_or_path", str(folders.adapter_folder)])


def test_the_folder_of_an_adapter_is_refused_as_the_base_model_of_an_evaluation(
    folders: Folders, tmp_path: Path
) -> None:
    folders.peft().save_pretrained(tmp_path / "adapter")
    tiny_config(tmp_path).save_json(tmp_path / "adapter" / "attention_rl_config.json")
    articles = write_rows(tmp_path / "articles.jsonl", [{"text": text} for text in TEXTS])
    flags = [str(tmp_path / "adapter"), "--dataset", str(articles)]
    with pytest.raises(BaseModelError, match=r"holds an adapter, not a base model"):
        evaluate([*flags, "--model_name_or_path", str(folders.adapter_folder)])


def test_a_folder_that_holds_a_model_and_an_adapter_is_refused(folders: Folders, tmp_path: Path) -> None:
    folders.base().save_pretrained(tmp_path / "both")
    folders.peft().save_pretrained(tmp_path / "both")
    with pytest.raises(BaseModelError, match=r"holds an adapter, not a base model"):
        make_trainer(tmp_path, tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text(json.dumps([]))
    with pytest.raises(BaseModelError, match=r"holds an adapter, not a base model"):
        make_trainer(tmp_path, tmp_path / "both")
