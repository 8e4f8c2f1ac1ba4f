"""Options into the parts of a run: the base model by its name, the policy, and the settings of rollout and loss.

Knows nothing about what the trainer does with the parts.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_rl_trainer.base_models import choose_base_model, load_base_model, load_tokenizer
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.health import HealthLimits, expected_kept_fraction, max_selector_entropy
from attention_rl_trainer.policy import PolicyModel, base_language_model, output_head
from attention_rl_trainer.rollout import RolloutSettings
from attention_rl_trainer.tokenization import allowed_token_ids
from attention_rl_trainer.update import LossSettings

logger = logging.getLogger(__name__)

_MODEL_OPTIONS = {"attn_implementation", "dtype", "quantization_config", "revision"}
# Evaluation episodes have streams of their own, far from any training seed.
_EVALUATION_SEED_OFFSET = 2**32


def load_named_model(
    name: str, args: AttentionGuidedRLConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model by its name, and its tokenizer unless another is given.

    Args:
        name: a Hub name, a folder, a .gguf file, ``"offline"`` or ``"auto"``.
        args: the run's options; ``model_init_kwargs`` are those of the loading.
        tokenizer: a tokenizer to use instead of the model's own.

    Raises:
        ValueError: ``model_init_kwargs`` holds an unknown name or dtype.
        BaseModelError: the model cannot be loaded.
        HubUnreachableError: it would have to come from the Hub, which cannot be reached.
    """
    choice = choose_base_model(name, args.device)
    logger.warning("Base model %s: %s", choice.name_or_path, choice.reason)
    # TrainingArguments has parsed the JSON of the command line.
    options = dict(cast(dict[str, Any], args.model_init_kwargs or {}))
    unknown = sorted(set(options) - _MODEL_OPTIONS)
    if unknown:
        raise ValueError(f"model_init_kwargs takes {', '.join(sorted(_MODEL_OPTIONS))}; got {', '.join(unknown)}")
    if isinstance(options.get("dtype"), str):
        options["dtype"] = _parse_dtype(options["dtype"], choice.dtype)
    revision = options.get("revision")
    model = load_base_model(choice, **options)
    return model, tokenizer or load_tokenizer(choice.name_or_path, revision=revision)


def _parse_dtype(name: str, default: torch.dtype) -> torch.dtype:
    if name == "auto":
        return default
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"model_init_kwargs['dtype'] must name a torch dtype such as 'bfloat16', got {name!r}")
    return dtype


def tokenizer_of(model: PreTrainedModel | PeftModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        model: a base model, or one with an adapter.

    Raises:
        ValueError: the model does not say where it was loaded from.
    """
    name = model.config.name_or_path
    if not name:
        raise ValueError("the model does not say where it was loaded from; give its tokenizer as processing_class")
    return load_tokenizer(name)


def build_policy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, args: AttentionGuidedRLConfig) -> PolicyModel:
    """Make the policy of a run.

    Args:
        model: the base model with its adapter.
        tokenizer: the base model's tokenizer.
        args: the run's options.
    """
    vocabulary_size = output_head(base_language_model(model)).weight.shape[0]
    return PolicyModel(
        model,
        allowed_token_ids(tokenizer, vocabulary_size),
        query_temperature=args.query_temperature,
        attention_layer=args.attention_layer,
        logits_chunk_size=args.logits_chunk_size,
        embedding_batch_size=args.embedding_batch_size,
    )


def rollout_settings(args: AttentionGuidedRLConfig, *, evaluation: bool = False) -> RolloutSettings:
    """Read what a rollout does off the options.

    Args:
        args: the run's options.
        evaluation: whether it is for an evaluation: other random streams, and the order gain beside the rest.
    """
    return RolloutSettings(
        num_steps=args.steps_per_trajectory,
        tokens_per_query=args.tokens_per_query,
        seed=args.seed + (_EVALUATION_SEED_OFFSET if evaluation else 0),
        include_key_in_context=args.include_key_in_context,
        compute_order_gain=evaluation or args.order_coef > 0,
        order_coef=args.order_coef,
    )


def loss_settings(args: AttentionGuidedRLConfig) -> LossSettings:
    """Read the weights of the loss's terms off the options.

    Args:
        args: the run's options.
    """
    return LossSettings(
        beta=args.beta,
        kl_reference=args.kl_reference,
        selector_coef=args.selector_coef,
        reward_gradient_coef=args.reward_gradient_coef,
        entropy_coef=args.entropy_coef,
        epsilon=args.epsilon,
        use_importance_ratios=args.num_iterations > 1,
        disable_dropout=args.disable_dropout,
    )


def health_limits(args: AttentionGuidedRLConfig) -> HealthLimits:
    """Derive from the options what would be out of the ordinary.

    Args:
        args: the run's options.
    """
    return HealthLimits(
        max_selector_entropy=max_selector_entropy(args.pair_shape.memory_size, args.steps_per_trajectory),
        expected_kept=expected_kept_fraction(args.filter_threshold),
        has_kl=args.beta > 0 and args.kl_reference == "previous",
    )
