"""Objects that are no base model, no tokenizer or no adapter: each refused by name when the trainer is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import adapted, article_texts, byte_level_tokenizer, save_tiny_llama, tiny_config, tiny_gpt2, tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    ByT5Tokenizer,
    CLIPImageProcessor,
    EncoderDecoderModel,
    GPT2Config,
    GPT2DoubleHeadsModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from attention_rl_trainer.errors import BaseModelError
from attention_rl_trainer.models.given import expect_language_model
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

TEXTS = article_texts(12)
SIZES: dict[str, Any] = {"vocab_size": 420, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(TEXTS)


def make_trainer(folder: Path, model: Any, tokenizer: Any = None, **options: Any) -> AttentionGuidedRLTrainer:
    args = options.pop("args", None) or tiny_config(folder, num_episodes=8)
    return AttentionGuidedRLTrainer(model, args, [{"text": text} for text in TEXTS], None, tokenizer, **options)


def llama_config() -> LlamaConfig:
    return LlamaConfig(**SIZES, intermediate_size=8, pad_token_id=0)


class Wrapper(nn.Module):
    """As accelerators and parallel wrappers of other libraries hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled_in_place() -> nn.Module:
    model = tiny_llama()
    model.compile()
    return model


def with_a_compiled_layer() -> nn.Module:
    model = tiny_llama()
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


def with_a_compiled_forward() -> nn.Module:
    model = tiny_llama()
    model.forward = torch.compile(model.forward)
    return model


def peft_of_a_compiled_layer() -> nn.Module:
    model = tiny_llama()
    model.model.layers[1].compile()
    return adapted(model)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny_llama()


def with_a_layer_on_meta() -> nn.Module:
    model = tiny_llama()
    model.model.layers[0].mlp.to("meta")
    return model


def bart() -> nn.Module:
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, vocab_size=420, max_position_embeddings=64))


def bert_and_bert() -> nn.Module:
    config = BertConfig(**SIZES, intermediate_size=8)
    decoder = BertConfig(**SIZES, intermediate_size=8, is_decoder=True, add_cross_attention=True)
    from transformers import BertLMHeadModel, BertModel

    return EncoderDecoderModel(encoder=BertModel(config), decoder=BertLMHeadModel(decoder))


class OwnClassifier(LlamaForSequenceClassification):
    """A class that transformers does not know."""


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "got None; 'auto' picks a model"),
    "number": (lambda: 3, "got int; load one with"),
    "bytes": (lambda: b"offline", "got bytes; load one with"),
    "pair": (lambda: (tiny_llama(), None), "got tuple; load one with"),
    "state": (lambda: tiny_llama().state_dict(), "got OrderedDict; load one with"),
    "config": (llama_config, "got LlamaConfig; load one with"),
    "class": (lambda: LlamaForCausalLM, r"got the class LlamaForCausalLM; .*LlamaForCausalLM\.from_pretrained"),
    "auto-class": (lambda: AutoModelForCausalLM, r"the class AutoModelForCausalLM; .*\.from_pretrained"),
    "module": (lambda: nn.Linear(2, 2), "got Linear; load one with"),
    "parallel": (lambda: nn.DataParallel(tiny_llama()), "got DataParallel around a model; .*`model.module`"),
    "wrapper": (lambda: Wrapper(tiny_llama()), "got Wrapper around a model; .*`model.module`"),
    "parallel-peft": (lambda: nn.DataParallel(adapted(tiny_llama())), "got DataParallel around a model"),
    "compiled": (lambda: torch.compile(tiny_llama()), r"got OptimizedModule, a compiled model; .*`model\._orig_mod`"),
    "compiled-peft": (
        lambda: torch.compile(adapted(tiny_llama())),
        r"got OptimizedModule, a compiled model; .*`model\._orig_mod`",
    ),
    "peft-of-compiled": (lambda: adapted(tiny_llama()).__class__, "got the class PeftModel"),
    "compiled-in-place": (compiled_in_place, "LlamaForCausalLM is compiled"),
    "compiled-layer": (with_a_compiled_layer, r"LlamaForCausalLM is compiled .*layers\.1"),
    "compiled-forward": (with_a_compiled_forward, "LlamaForCausalLM is compiled"),
    "peft-of-compiled-layer": (peft_of_a_compiled_layer, r"LlamaForCausalLM is compiled .*layers\.1"),
    "encoder-decoder": (bart, "BartForConditionalGeneration cannot be .* an encoder-decoder"),
    "t5": (
        lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        "T5ForConditionalGeneration cannot be .* an encoder-decoder",
    ),
    "two-berts": (bert_and_bert, "EncoderDecoderModel cannot be .* an encoder-decoder"),
    "peft-of-encoder-decoder": (
        lambda: get_peft_model(bart(), LoraConfig(target_modules=["q_proj"])),
        "BartForConditionalGeneration cannot be .* an encoder-decoder",
    ),
    "masked": (lambda: BertForMaskedLM(BertConfig(**SIZES, intermediate_size=8)), "a masked language model"),
    "masked-decoder": (
        lambda: BertForMaskedLM(BertConfig(**SIZES, intermediate_size=8, is_decoder=True)),
        "not a BertLMHeadModel",
    ),
    "classifier": (lambda: LlamaForSequenceClassification(llama_config()), "not a LlamaForCausalLM"),
    "token-classifier": (lambda: LlamaForTokenClassification(llama_config()), "not a LlamaForCausalLM"),
    "own-classifier": (lambda: OwnClassifier(llama_config()), "OwnClassifier cannot be .* without an output head"),
    "two-heads": (
        lambda: GPT2DoubleHeadsModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=420, num_labels=1)),
        "not a GPT2LMHeadModel",
    ),
    "backbone": (lambda: LlamaModel(llama_config()), "LlamaModel cannot be .* not a LlamaForCausalLM"),
    "meta": (on_meta, r"weights are on the meta device"),
    "part-on-meta": (with_a_layer_on_meta, r"3 weights are on the meta device.*layers\.0\.mlp\.gate_proj"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Config of the encoder", "ignore:.*Decoder.*")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_is_refused_by_name(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_trainer(tmp_path, make(), tokenizer)
    with pytest.raises(ValueError, match=f"(?s){message}"):  # the default options are named after the model
        AttentionGuidedRLTrainer(make(), processing_class=tokenizer)
    assert not any(tmp_path.iterdir())


def test_a_pipeline_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    generate = pipeline("text-generation", model=tiny_llama(), tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match="got TextGenerationPipeline"):
        make_trainer(tmp_path, generate, tokenizer)


def test_a_model_whose_quantization_trains_no_adapter_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_higgs import HiggsHfQuantizer
    from transformers.utils.quantization_config import HiggsConfig

    for adapt in (lambda model: model, adapted):
        model = tiny_llama()
        model.hf_quantizer = HiggsHfQuantizer(HiggsConfig())
        with pytest.raises(ValueError, match=r"is quantized with HiggsConfig, below which .*load_in_4bit"):
            make_trainer(tmp_path, adapt(model), tokenizer)
    model = tiny_llama()
    model.hf_quantizer = Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True))
    expect_language_model(model)


# ---- Paths and names ----


def test_a_path_is_taken_as_that_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "offline"
    save_tiny_llama(folder, TEXTS)
    monkeypatch.chdir(tmp_path)
    for path in (folder, Path("offline")):  # the name means the embedded model
        trainer = make_trainer(tmp_path / "run", path)
        assert trainer.policy.model.peft_config["default"].base_model_name_or_path == str(folder)
    assert AttentionGuidedRLTrainer(Path("offline")).args.output_dir == "offline-attention-rl"


@pytest.mark.parametrize("path", ["absent", "meta-llama/Llama-3.2-3B", "~/absent", "absent.gguf"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(path: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"There is no folder or file .*a Hub name is given as a str"):
        make_trainer(tmp_path, Path(path))


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_llama(tmp_path, TEXTS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match="The name of the base model is empty"):
        make_trainer(tmp_path / "run", "")


def test_loading_options_beside_a_loaded_model_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    args = tiny_config(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    for model in (tiny_llama(), adapted(tiny_llama())):
        with pytest.raises(ValueError, match=r"model_init_kwargs \(dtype\) are for a model that is given by its name"):
            make_trainer(tmp_path, model, tokenizer, args=args)


# ---- Tokenizers and adapters ----


class OwnProcessor(ProcessorMixin):
    """A tokenizer beside the reader of images."""

    attributes = ["tokenizer"]  # noqa: RUF012  # transformers reads a list
    tokenizer_class = "AutoTokenizer"


class Empty(PreTrainedTokenizerFast):
    """A tokenizer that counts as false."""

    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ByT5Tokenizer, "got ByT5Tokenizer; load it with AutoTokenizer"),
        (lambda: OwnProcessor(tokenizer=byte_level_tokenizer(TEXTS)), "got OwnProcessor; .*`processor.tokenizer`"),
        (CLIPImageProcessor, "got CLIPImageProcessor.*; load one with AutoTokenizer"),
        (lambda: byte_level_tokenizer(TEXTS).backend_tokenizer, "got Tokenizer; load one with AutoTokenizer"),
        (lambda: "gpt2", "got str; load one with AutoTokenizer"),
        (lambda: "", "got str; load one with AutoTokenizer"),
        (lambda: PreTrainedTokenizerFast, "got the class .*; load one"),
        (lambda: False, "got bool; load one with AutoTokenizer"),
    ],
    ids=["slow", "processor", "images", "backend", "name", "empty-name", "class", "false"],
)
@pytest.mark.parametrize("model", [tiny_llama, lambda: "acme/absent"], ids=["object", "name"])
def test_a_wrong_tokenizer_is_refused_before_the_model_is_touched(
    model: Callable[[], Any], make: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"processing_class must be a fast tokenizer .*{message}"):
        make_trainer(tmp_path, model(), make())


def test_a_tokenizer_that_counts_as_false_is_taken(tmp_path: Path) -> None:
    tokenizer = Empty(tokenizer_object=byte_level_tokenizer(TEXTS).backend_tokenizer, eos_token="<|endoftext|>")
    assert make_trainer(tmp_path, tiny_gpt2(), tokenizer).processing_class is tokenizer


def test_a_model_without_its_tokenizer_names_the_argument(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="give its tokenizer as processing_class"):
        make_trainer(tmp_path, model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(BaseModelError, match=r"Or give the model's tokenizer as processing_class"):
        make_trainer(tmp_path, LlamaForCausalLM.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4}, r"got dict; LoraConfig\(\*\*peft_config\)"),
        (LoraConfig, "got type"),
        (True, "got bool"),
        ("lora", "got str"),
    ],
    ids=["dict", "class", "true", "name"],
)
@pytest.mark.parametrize("model", [tiny_llama, lambda: "acme/absent"], ids=["object", "name"])
def test_a_wrong_adapter_configuration_is_refused_before_the_model_is_touched(
    model: Callable[[], Any], config: Any, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=f"peft_config must be a PeftConfig .*{message}"):
        make_trainer(tmp_path, model(), tokenizer, peft_config=config)


def test_an_adapter_configuration_is_not_written_into(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = LoraConfig(r=2)
    before = config.to_dict()
    for model in (tiny_llama(), tiny_gpt2()):
        make_trainer(tmp_path, model, tokenizer, peft_config=config)
        assert config.to_dict() == before
