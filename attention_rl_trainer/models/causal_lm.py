"""What a causal language model consists of, its output head, and the modes in which it computes (design §4, §8)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention_rl_trainer.models.attention import UnsupportedArchitectureError

# In main memory, blocks below 32 MiB are kept by glibc's allocator, which finds no use for freed aligned ones: the heap
# grows to several times what is alive. Above, every new block costs cleared pages, so no larger than need be.
# A GPU would rather read the head's weight less often.
_LOGITS_CHUNK_BYTES_ON_CPU = 40 * 2**20
_LOGITS_CHUNK_BYTES = 64 * 2**20


@contextmanager
def deterministic_inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and back.

    In train mode a rollout would apply dropout, and activation checkpointing would drop the cache.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def dropout_disabled(model: nn.Module) -> Iterator[None]:
    """Set every dropout probability to 0, and back: ``nn.Dropout.p`` and floats such as ``attention_dropout``.

    ``model.eval()`` would do it too, but silently switches activation checkpointing off.
    """
    saved = []
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        names += [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
        saved += [(module, name, getattr(module, name)) for name in names]
    try:
        for module, name, _ in saved:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, probability in saved:
            setattr(module, name, probability)


def base_language_model(model: PeftModel) -> PreTrainedModel:
    """Take the causal language model out of its PEFT wrapper; the LoRA layers stay in it."""
    return cast(PreTrainedModel, model.get_base_model())


def input_embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The layer that turns ids into hidden states; ``model`` has no PEFT wrapper."""
    return cast(nn.Embedding, model.get_input_embeddings())


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns hidden states into vocabulary logits; ``model`` has no PEFT wrapper."""
    return cast(nn.Linear, model.get_output_embeddings())  # type: ignore[no-untyped-call]  # not annotated upstream


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
        with deterministic_inference(model):
            own = self(model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state)
            expected = model(input_ids=token_ids, use_cache=False).logits.float()
        if own.shape != expected.shape or not torch.allclose(own, expected, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise UnsupportedArchitectureError(
                f"{type(model).__name__} does something to its logits after the output head that is not known here "
                "(known: final_logit_softcapping, logit_scale, logits_scaling); use another base model"
            )


def default_logits_chunk_size(vocabulary_size: int, *, on_cpu: bool) -> int:
    """Positions whose logits take 64 MiB in float32, 40 MiB on a CPU: memory does not grow with the vocabulary."""
    chunk_bytes = _LOGITS_CHUNK_BYTES_ON_CPU if on_cpu else _LOGITS_CHUNK_BYTES
    return max(1, chunk_bytes // (4 * vocabulary_size))
