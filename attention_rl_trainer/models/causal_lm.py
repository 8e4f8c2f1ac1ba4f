"""What a causal language model consists of, and its output head (design §4, §8)."""

from __future__ import annotations

from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention_rl_trainer.models.modes import deterministic_inference
from attention_rl_trainer.models.projections import UnsupportedArchitectureError, described

# In main memory, blocks below 32 MiB are kept by glibc's allocator, which finds no use for freed aligned ones: the heap
# grows to several times what is alive. Above, every new block costs cleared pages, so no larger than need be.
# A GPU would rather read the head's weight less often.
_LOGITS_CHUNK_BYTES_ON_CPU = 40 * 2**20
_LOGITS_CHUNK_BYTES = 64 * 2**20


def base_language_model(model: PeftModel) -> PreTrainedModel:
    """Take the causal language model out of its PEFT wrapper; the LoRA layers stay in it."""
    return cast(PreTrainedModel, model.get_base_model())


def is_loaded_in_4_bits(model: PreTrainedModel) -> bool:
    """Whether bitsandbytes keeps the weights of a model in 4 bits; ``model`` has no PEFT wrapper."""
    # Only the quantizer sets it on the model.
    return bool(getattr(model, "is_loaded_in_4bit", False))


def quantized_bits(model: PreTrainedModel) -> int | None:
    """In how many bits bitsandbytes keeps the weights of a model, 4 or 8; ``None`` where it was not loaded by it."""
    if is_loaded_in_4_bits(model):
        return 4
    return 8 if getattr(model, "is_loaded_in_8bit", False) else None


def input_embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The layer that turns ids into hidden states; ``model`` has no PEFT wrapper."""
    return cast(nn.Embedding, model.get_input_embeddings())


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns hidden states into vocabulary logits; ``model`` has no PEFT wrapper."""
    return cast(nn.Linear, model.get_output_embeddings())  # type: ignore[no-untyped-call]  # not annotated upstream


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part that turns ids into the hidden states that the head is given; ``model`` has no PEFT wrapper."""
    if model.base_model is not model:
        return model.base_model
    # The class does not know the name of its own backbone, which is the child with the embeddings.
    embeddings = input_embeddings(model)
    holding = (child for child in model.children() if embeddings in child.modules())
    return next(holding, cast(nn.Module, model))


class LogitsHead:
    """The output head of a model without a PEFT wrapper, with what the architecture does to the logits after it.

    Raises:
        UnsupportedArchitectureError: head and backbone together do not give the model's own logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.linear = output_head(model)
        options = config.to_dict()
        self._softcap: float | None = options.get("final_logit_softcapping")
        self._scale: float = float(options.get("logit_scale") or 1.0) / float(options.get("logits_scaling") or 1.0)
        self._verify(model)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute logits: ``[..., C]`` to ``[..., vocabulary]`` in float32."""
        logits: Tensor = self.linear(hidden.contiguous()).float()
        if self._scale != 1:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def _verify(self, model: PreTrainedModel) -> None:
        token_ids = torch.arange(4, device=self.linear.weight.device)[None]
        try:
            with deterministic_inference(model):
                own = self(backbone(model)(input_ids=token_ids, use_cache=False).last_hidden_state)
                expected = model(input_ids=token_ids, use_cache=False).logits.float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UnsupportedArchitectureError(
                f"{described(model)} cannot read four tokens: "
                f"{type(error).__name__}: {error}. Use another base model, or another adapter"
            ) from error
        if own.shape != expected.shape or not torch.allclose(own, expected, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise UnsupportedArchitectureError(
                f"{type(model).__name__} does something to its hidden states or logits, before or after the output "
                "head, that is not known here (known: final_logit_softcapping, logit_scale, logits_scaling); use "
                "another base model"
            )


def default_logits_chunk_size(vocabulary_size: int, *, on_cpu: bool) -> int:
    """Positions whose logits take 64 MiB in float32, 40 MiB on a CPU: memory does not grow with the vocabulary."""
    chunk_bytes = _LOGITS_CHUNK_BYTES_ON_CPU if on_cpu else _LOGITS_CHUNK_BYTES
    return max(1, chunk_bytes // (4 * vocabulary_size))
