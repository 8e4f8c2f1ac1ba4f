"""The sizes that a plan counts from: those of a model, read off its config, and those of a run, read off its options.

Letters are those of `attention_rl_trainer.types`; besides, C is the hidden size, I the intermediate size of the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedConfig
from transformers.training_args import OptimizerNames

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.models.causal_lm import default_logits_chunk_size
from attention_rl_trainer.models.policy import PolicyOptions
from attention_rl_trainer.options import Count, option, take_options
from attention_rl_trainer.rollout.layout import Layout, Separators
from attention_rl_trainer.rollout.sampler import RolloutOptions
from attention_rl_trainer.update.updater import UpdateOptions

MLP = Literal["gated", "plain"]
Norm = Literal["rms", "layer"]
WeightBits = Literal[4, 16, 32]

# Architectures by their config's model_type: gate and up beside one another, or one matrix and an activation.
_GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "phi3")
_PLAIN = ("gpt2", "gpt_neox")
_FUSED = ("gpt2", "gpt_neox", "phi3")
_CONFIG_NAMES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
# How architectures name the number of positions that they were made for.
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
# bitsandbytes packs two weights into a byte and keeps one float32 scale for each block of 64.
_BITS_OF_A_QUANTIZED_WEIGHT = 4 + 32 / 64
# " Query:" and " Response:" have two tokens each in the vocabularies of GPT-2 and Llama; here only the number matters.
_USUAL_SEPARATORS = Separators((0, 0), (0, 0))


def context_length_of(config: PreTrainedConfig) -> int | None:
    """Read how many positions a model was made for, or ``None`` where its config does not say."""
    options = config.get_text_config().to_dict()
    return next((int(options[name]) for name in _CONTEXT_NAMES if options.get(name)), None)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder.

    Raises:
        ValueError: a size is not positive, the heads cannot be shared, or a kind is unknown.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int
    vocabulary_size: int
    tied_embeddings: bool = True
    """Whether the output head is the embedding matrix."""
    mlp: MLP = "gated"
    """``"gated"``, three matrices, or ``"plain"``, two."""
    norm: Norm = "rms"
    """``"rms"``, or ``"layer"``, which has a bias, as have all linear layers beside it (GPT-2, GPT-NeoX)."""
    fused_projections: bool = False
    """Whether one matrix gives queries, keys and values."""
    learned_positions: int = 0
    """Rows of a position embedding; 0 for rotary positions."""
    context_length: int | None = None
    """Positions that the model was made for; ``None`` if unknown."""

    def __post_init__(self) -> None:
        names = ("num_layers", "hidden_size", "intermediate_size", "num_query_heads", "num_key_value_heads")
        for name in (*names, "head_dim", "vocabulary_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_query_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_query_heads must be a multiple of num_key_value_heads, got {self.num_query_heads} and "
                f"{self.num_key_value_heads}"
            )
        for name, choices in (("mlp", get_args(MLP)), ("norm", get_args(Norm))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelShape:
        """Read the sizes off the config of a causal language model.

        Exact for Llama and GPT-2. Norms of queries and keys and biases of single projections, which some of the others
        have, are left out: less than a thousandth of the weights.

        Raises:
            ValueError: the architecture is not known here, or its config lacks a name.
        """
        text = config.get_text_config()
        kind = text.model_type
        if kind not in _GATED + _PLAIN:
            raise ValueError(f"no plan for the architecture {kind!r}; known are {', '.join(_GATED + _PLAIN)}")
        # GPT-2 calls them n_embd, n_layer, ...; the config answers to both.
        missing = [name for name in _CONFIG_NAMES if not hasattr(text, name)]
        if missing:
            raise ValueError(f"the config of {kind!r} has no {', '.join(missing)}, from which a plan is made")
        options = text.to_dict()
        heads, hidden_size = text.num_attention_heads, text.hidden_size
        return cls(
            num_layers=text.num_hidden_layers,
            hidden_size=hidden_size,
            intermediate_size=options.get("intermediate_size") or options.get("n_inner") or 4 * hidden_size,
            num_query_heads=heads,
            num_key_value_heads=options.get("num_key_value_heads") or heads,
            head_dim=options.get("head_dim") or hidden_size // heads,
            vocabulary_size=text.vocab_size,
            tied_embeddings=bool(options.get("tie_word_embeddings")),
            mlp="gated" if kind in _GATED else "plain",
            norm="rms" if kind in _GATED else "layer",
            fused_projections=kind in _FUSED,
            learned_positions=options.get("n_positions", 0),
            context_length=context_length_of(config),
        )

    @property
    def query_width(self) -> int:
        """Features of all query heads, H · D."""
        return self.num_query_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Features of all keys of a token, G · D; as many of its values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a layer's attention projections, which the default adapter targets."""
        out = (self.query_width, self.hidden_size)
        if self.fused_projections:
            return ((self.hidden_size, self.query_width + 2 * self.key_width), out)
        key = (self.hidden_size, self.key_width)
        return ((self.hidden_size, self.query_width), key, key, out)

    @property
    def mlp_matrices(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the matrices of a layer's MLP."""
        up = (self.hidden_size, self.intermediate_size)
        down = (self.intermediate_size, self.hidden_size)
        return (up, up, down) if self.mlp == "gated" else (up, down)

    @property
    def linear_parameters(self) -> int:
        """Weights of the matrices of all decoder layers, which a token is multiplied with and which are quantized."""
        return self.num_layers * sum(a * b for a, b in (*self.projections, *self.mlp_matrices))

    @property
    def head_parameters(self) -> int:
        """Weights of the output head."""
        return self.vocabulary_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights of the base model."""
        vectors = self.hidden_size * (1 if self.norm == "rms" else 2)
        biases = 0
        if self.norm == "layer":
            biases = self.num_layers * sum(b for _, b in (self.projections[0], self.projections[-1]))
            biases += self.num_layers * sum(b for _, b in self.mlp_matrices)
        embeddings = self.head_parameters * (1 if self.tied_embeddings else 2)
        positions = self.learned_positions * self.hidden_size
        return self.linear_parameters + (2 * self.num_layers + 1) * vectors + biases + embeddings + positions

    def adapter_parameters(self, rank: int) -> int:
        """Count the weights of LoRA of rank r on all attention projections."""
        return self.num_layers * rank * sum(a + b for a, b in self.projections)

    def weight_bytes(self, bits: WeightBits) -> int:
        """Count the bytes of the base model's weights: with 4 bits, all but the decoder's matrices have 16."""
        if bits != 4:
            return self.parameters * bits // 8
        quantized = self.linear_parameters * _BITS_OF_A_QUANTIZED_WEIGHT / 8
        return int(quantized) + 2 * (self.parameters - self.linear_parameters)


LLAMA_3_2_3B = ModelShape(
    num_layers=28,
    hidden_size=3072,
    intermediate_size=8192,
    num_query_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    vocabulary_size=128256,
    tied_embeddings=True,
    context_length=131072,
)
"""Written out, because its repository is gated."""


@dataclass
class RunShape(RolloutOptions, PolicyOptions, UpdateOptions):
    """The sizes of a run: the options that matter for memory and time, and what is known of its model and device."""

    weight_bits: WeightBits = option(16, "Of the base model: 32, 16 (bfloat16) or 4 (computing in bfloat16).")
    lora_rank: Count = option(8, "r")
    activation_checkpointing: bool = option(False, "Whether the update computes activations again in its backward.")
    optimizer_bytes_per_parameter: Count = option(2, "8 for Adam, 2 for Adam in 8 bits.")
    joint: bool = option(True, "Whether policy and reference are rows of one batch; so for plain LoRA.")
    on_cpu: bool = option(False, "Whether a CPU computes; its attention reads keys once for each group.")
    query_separator_tokens: Count = option(len(_USUAL_SEPARATORS.query), 'Tokens of " Query:".')
    response_separator_tokens: Count = option(len(_USUAL_SEPARATORS.response), 'Tokens of " Response:".')
    key_frame_tokens: Count = option(4, "Tokens around a key that stands before the prompt, rounded up.")

    @classmethod
    def from_config(
        cls,
        config: AttentionGuidedRLConfig,
        *,
        weight_bits: WeightBits,
        lora_rank: int = 8,
        joint: bool = True,
        on_cpu: bool = False,
        separators: Separators = _USUAL_SEPARATORS,
    ) -> RunShape:
        """Read the sizes off a run's options; the other arguments are what the options do not say."""
        framed = {}
        if separators.around_keys:
            tokens = sum(map(len, separators.around_keys))
            framed["key_frame_tokens"] = max(1, math.ceil(tokens / (len(separators.around_keys) - 1)))
        return take_options(
            cls,
            config,
            weight_bits=weight_bits,
            lora_rank=lora_rank,
            activation_checkpointing=bool(config.activation_checkpointing),
            optimizer_bytes_per_parameter=2 if "8bit" in OptimizerNames(config.optim).value else 8,
            joint=joint,
            on_cpu=on_cpu,
            query_separator_tokens=len(separators.query),
            response_separator_tokens=len(separators.response),
            **framed,
        )

    @property
    def layout(self) -> Layout:
        """Where each token of a trajectory stands."""
        around_keys: tuple[tuple[int, ...], ...] = ()
        if self.show_keys != "none":
            around_keys = ((0,) * self.key_frame_tokens,) * self.memory_size + ((),)
        query, response = (0,) * self.query_separator_tokens, (0,) * self.response_separator_tokens
        return Layout.of(self, Separators(query, response, around_keys))

    @property
    def compute_order_gain(self) -> bool:
        """Whether the rollout computes the order gain."""
        return self.order_coef > 0

    @property
    def has_kl(self) -> bool:
        """Whether the update needs the previous adapter's distribution."""
        return self.beta > 0

    @property
    def bytes_per_number(self) -> int:
        """Bytes of a number in activations and caches: 4 in float32, else 2."""
        return 4 if self.weight_bits == 32 else 2

    @property
    def micro_batch_size(self) -> int:
        """Trajectories in the largest micro-batch that can occur."""
        return min(self.training_batch_size, self.generation_batch_size)

    def logits_positions(self, vocabulary_size: int) -> int:
        """Count the positions whose logits are held at once."""
        return self.logits_chunk_size or default_logits_chunk_size(vocabulary_size, on_cpu=self.on_cpu)
