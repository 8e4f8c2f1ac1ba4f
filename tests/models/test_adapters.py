"""Adapters that leave the base model as it is, disabled or used by a part of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import adapted
from transformers import PreTrainedModel

from attention_rl_trainer.models import given
from attention_rl_trainer.models.adapters import AdapterLayers, add_adapter


class TestBaseModelStays:
    @pytest.mark.parametrize(
        "options",
        [
            {"init_lora_weights": "pissa"},
            {"init_lora_weights": "pissa_niter_4"},
            {"init_lora_weights": "olora"},
            {"layer_replication": [[0, 2], [1, 2]]},
        ],
    )
    def test_adapters_that_change_it_are_refused(self, options: dict[str, Any], llama: PreTrainedModel) -> None:
        with pytest.raises(ValueError, match=rf"the adapter has {next(iter(options))}.*untouched base model"):
            add_adapter(llama, LoraConfig(**options))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lora_alpha": 0}, "lora_alpha=0, which multiplies all that it learns by 0"),
            ({"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens, behind which alone"),
            ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'.*untouched base model"),
            ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS'.*untouched base model"),
        ],
    )
    def test_adapters_that_would_do_nothing_or_have_a_head_are_refused(
        self, options: dict[str, Any], message: str, llama: PreTrainedModel
    ) -> None:
        with pytest.raises(ValueError, match=f"the adapter has {message}"):
            add_adapter(llama, LoraConfig(**options))

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_those_that_are_not_known_by_name_too(
        self, init: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(given, "HARMLESS_INITS", (init,))
        with pytest.raises(ValueError, match=r"LoraConfig has changed the weights .*q_proj\.weight\)"):
            add_adapter(llama, LoraConfig(init_lora_weights=init))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"init_lora_weights": "gaussian"},
            {"init_lora_weights": "orthogonal"},
            {"use_dora": True},
            {"use_rslora": True, "rank_pattern": {"q_proj": 4}},
            {"target_parameters": ["mlp.gate_proj.weight", "mlp.up_proj.weight"], "target_modules": []},
        ],
    )
    def test_switched_off_the_others_leave_it_as_it_was(self, options: dict[str, Any], llama: PreTrainedModel) -> None:
        ids = torch.randint(1, 380, (2, 5))
        with torch.no_grad():
            before = llama.eval()(input_ids=ids).logits
            model = add_adapter(llama, LoraConfig(**options)).eval()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05)
            with model.disable_adapter():
                assert torch.equal(model(input_ids=ids).logits, before)
            assert not torch.equal(model(input_ids=ids).logits, before)


class TestLayers:
    def test_disabled_they_compute_as_the_base_model_nested_too(self, model: PreTrainedModel) -> None:
        ids = torch.randint(1, 380, (2, 5))
        with torch.no_grad():
            base = model(input_ids=ids).logits
            peft_model = adapted(model).eval()
            layers, before = AdapterLayers(peft_model), peft_model(input_ids=ids).logits
            with layers.disabled():
                with layers.disabled():
                    assert torch.equal(peft_model(input_ids=ids).logits, base)
                assert torch.equal(peft_model(input_ids=ids).logits, base)
            assert torch.equal(peft_model(input_ids=ids).logits, before)
        assert not torch.equal(before, base)

    def test_on_the_first_rows_the_others_compute_as_the_base_model(self, model: PreTrainedModel) -> None:
        ids = torch.randint(1, 380, (5, 6))
        peft_model = adapted(model).eval()
        layers = AdapterLayers(peft_model)
        with torch.no_grad():
            before = peft_model(input_ids=ids).logits
            with layers.disabled():
                base = peft_model(input_ids=ids).logits
            with layers.on_first_rows(2):
                mixed = peft_model(input_ids=ids).logits
            torch.testing.assert_close(mixed, torch.cat([before[:2], base[2:]]), atol=1e-5, rtol=0)
            assert torch.equal(peft_model(input_ids=ids).logits, before)

    @pytest.mark.parametrize(
        ("options", "expected"), [({}, True), ({"use_rslora": True}, True), ({"use_dora": True}, False)]
    )
    def test_plain_lora_is_distinguished(self, options: dict[str, Any], expected: bool, llama: PreTrainedModel) -> None:
        peft_model = add_adapter(llama, LoraConfig(**options))
        layers = AdapterLayers(peft_model)
        assert layers.are_plain_lora == expected
        peft_model.merge_adapter()
        assert not layers.are_plain_lora
