"""Queries by our rollout against completions by TRL's GRPOTrainer: query tokens per second on growing contexts.

Both sides write T queries of exactly L tokens for B articles, with the same weights, the same adapter and the same
vocabulary, sampled at temperature 1 without top-k or top-p. After each query a value that was fixed beforehand enters
the context:

    context_0     = [" Query:"] key_0 [" Response:"] value_0 [" Query:"]
    context_{t+1} = context_t query_t [" Response:"] value_{t+1} [" Query:"]

Ours reads every token once and keeps its cache from query to query. To GRPOTrainer each context is a new prompt: it
pads and reads the whole of it, with `generate` of transformers (no vLLM).

What each side is spared:

- ours: the reference, the selection and the scores of the values, none of which TRL has. It does read what nothing
  follows in this benchmark, as a rollout must: each query's last token and the last value.
- TRL: dropout (it generates in train mode), activation checkpointing and autocast, all off here; tokenizing, decoding
  and rewards, because only the method that turns prompt ids into completion ids is called; and, in the figure, the
  strided slice of hidden states that `generate` hands to the head after each prefill: a hook makes it contiguous. TRL
  as it comes, without that hook, is timed beside it.

    python tests/benchmarks/peer.py                  # the figure and the page
    python tests/benchmarks/peer.py --check          # tiny model, float32: greedy queries of both sides are equal
    python tests/benchmarks/peer.py --model tiny     # prints, and leaves the page alone
    python tests/benchmarks/peer.py --device cuda    # the same on a GPU
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# TRL's trainers report their construction to the Hub; the constant is read when huggingface_hub is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import trl
from datasets import Dataset
from harness import Report, Timing, time_in_turn
from scene import contiguous_head, lay_out_prompt, offline_batch, offline_policy
from tiny import adapted, article_texts, byte_level_tokenizer, random_batch, tiny_llama
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder, allowed_token_ids
from attention_rl_trainer.models.causal_lm import deterministic_inference
from attention_rl_trainer.models.decoding import make_decoder
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.models.sampling import Purpose, episode_noise
from attention_rl_trainer.rollout.layout import Separators

OURS, TRL, TRL_AS_IT_COMES = "ours", "TRL, contiguous head", "TRL as it comes"
_GENERATION_METHOD = "_generate_single_turn"
_SEED = 0
# Divides the logits by so little that the likeliest token gets all the probability: the argmax, by the code under test.
_GREEDY_TEMPERATURE = 1e-6


# --- what is read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Contexts:
    """The fixed part of B growing contexts.

    Attributes:
        start: context 0, ``[B, S0]`` int64.
        blocks: what follows each query, ``[" Response:"] value [" Query:"]``, T times ``[B, R]`` int64.
        tokens: L, tokens of a query.
    """

    start: Tensor
    blocks: Sequence[Tensor]
    tokens: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of the context before each query."""
        grown_by = self.tokens + self.blocks[0].shape[1]
        return [self.start.shape[1] + step * grown_by for step in range(len(self.blocks))]

    @property
    def query_tokens(self) -> int:
        """Tokens that each side has to write."""
        return self.start.shape[0] * len(self.blocks) * self.tokens

    @property
    def forward_tokens(self) -> dict[str, int]:
        """Tokens that each side has to run through the decoder."""
        rows, steps = self.start.shape[0], len(self.blocks)
        ours = self.lengths[-1] + self.tokens + self.blocks[-1].shape[1]
        theirs = sum(self.lengths) + steps * (self.tokens - 1)
        return {OURS: rows * ours, TRL: rows * theirs, TRL_AS_IT_COMES: rows * theirs}


def build_contexts(batch: MemoryBatch, separators: Separators, steps: int, tokens: int) -> Contexts:
    """Lay a batch's example and its first T values out; the order is fixed, because selection is not measured."""
    rows = len(batch)
    query, response = (torch.tensor(ids).expand(rows, -1) for ids in (separators.query, separators.response))
    blocks = [torch.cat([response, batch.value_tokens[:, step], query], dim=1) for step in range(steps)]
    return Contexts(lay_out_prompt(batch, separators), blocks, tokens)


@dataclass(frozen=True)
class Scene:
    """The model and what both sides read with it."""

    policy: PolicyModel
    tokenizer: PreTrainedTokenizerFast
    contexts: Contexts


def offline_scene(rows: int, steps: int, tokens: int) -> Scene:
    """SmolLM2-135M in bfloat16 with an adapter, and embedded articles in the order of their data set."""
    policy, tokenizer = offline_policy()
    batch = offline_batch(tokenizer, rows, steps, tokens)
    return Scene(
        policy, tokenizer, build_contexts(batch, Separators.encode(PlainTextEncoder(tokenizer)), steps, tokens)
    )


def tiny_scene(rows: int, steps: int, tokens: int, temperature: float = 1.0) -> Scene:
    """A tiny Llama in float32 with an adapter that matters, and random tokens."""
    tokenizer = byte_level_tokenizer(article_texts(30))
    # By default a Llama's end of text is id 2, here an ordinary token.
    model = adapted(tiny_llama(max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id))
    allowed = allowed_token_ids(tokenizer, model.config.vocab_size)
    batch = random_batch(rows, num_pairs=steps, key_length=tokens, value_length=tokens)
    separators = Separators.encode(PlainTextEncoder(tokenizer))
    policy = PolicyModel(model, allowed, PolicyOptions(query_temperature=temperature))
    return Scene(policy, tokenizer, build_contexts(batch, separators, steps, tokens))


def on_device(scene: Scene, device: torch.device) -> Scene:
    """Move a scene; the model itself is moved, and a new policy made of it."""
    policy, contexts = scene.policy, scene.contexts
    if policy.device == device:
        return scene
    options = PolicyOptions(query_temperature=policy.query_temperature)
    blocks = [block.to(device) for block in contexts.blocks]
    return replace(
        scene,
        policy=PolicyModel(policy.model.to(device), policy.allowed_ids.to(device), options),
        contexts=replace(contexts, start=contexts.start.to(device), blocks=blocks),
    )


# --- who reads it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What one side did.

    Attributes:
        queries: token ids, T lists of B queries.
        context_lengths: tokens of each row's context before each query, T lists of B.
        forward_tokens: tokens that passed through the decoder.
    """

    queries: list[list[list[int]]]
    context_lengths: list[list[int]]
    forward_tokens: int


@contextmanager
def counting_forward_tokens(policy: PolicyModel) -> Iterator[list[int]]:
    """Collect how many tokens each forward of the decoder has, padding included."""
    counts: list[int] = []
    handle = policy.backbone.register_forward_hook(
        lambda module, args, output: counts.append(output.last_hidden_state.shape[:2].numel())
    )
    try:
        yield counts
    finally:
        handle.remove()


def read_by_ours(policy: PolicyModel, contexts: Contexts) -> Reading:
    """Write the queries as a rollout's policy does, through one cache."""
    rows, steps = contexts.start.shape[0], len(contexts.blocks)
    queries: list[list[list[int]]] = []
    lengths: list[list[int]] = []
    with policy.inference(), counting_forward_tokens(policy) as counts:
        noise = episode_noise(_SEED, range(rows), Purpose.POLICY, (steps, contexts.tokens)).to(policy.device)
        cache = policy.new_cache(
            rows, contexts.start.shape[1] + sum(contexts.tokens + block.shape[1] for block in contexts.blocks)
        )
        decoder = make_decoder(policy, policy.device, replay=policy.can_replay)
        last_hidden = policy.forward(contexts.start, cache)[:, -1]
        for step, block in enumerate(contexts.blocks):
            lengths.append([cache.get_seq_length()] * rows)
            query = decoder.decode(cache, last_hidden, noise[:, step], read_last=True)
            last_hidden = policy.forward(block, cache)[:, -1]
            queries.append(query.token_ids.tolist())
    return Reading(queries, lengths, sum(counts))


def read_by_trl(policy: PolicyModel, trainer: trl.GRPOTrainer, contexts: Contexts) -> Reading:
    """Write the queries as completions of GRPOTrainer, each context a prompt of its own."""
    queries: list[list[list[int]]] = []
    lengths: list[list[int]] = []
    prompts = contexts.start.tolist()
    with deterministic_inference(policy.model), counting_forward_tokens(policy) as counts:
        for block in contexts.blocks:
            lengths.append([len(prompt) for prompt in prompts])
            queries.append(generate_completions(trainer, prompts))
            followed = zip(prompts, queries[-1], block.tolist(), strict=True)
            prompts = [prompt + query + response for prompt, query, response in followed]
    return Reading(queries, lengths, sum(counts))


def generate_completions(trainer: trl.GRPOTrainer, prompts: list[list[int]]) -> list[list[int]]:
    """Let GRPOTrainer turn prompt ids into completion ids.

    The method is private: in public, GRPOTrainer generates only within a training step, and from text.

    Raises:
        RuntimeError: the installed TRL has no such method.
    """
    if not hasattr(trainer, _GENERATION_METHOD):
        raise RuntimeError(
            f"trl {trl.__version__} has no GRPOTrainer.{_GENERATION_METHOD} (trl 1.16 has); install that version, or "
            "call here what its training step now calls to turn prompt ids into completion ids"
        )
    generate = getattr(trainer, _GENERATION_METHOD)
    completions, _ = generate(
        prompt_ids=prompts, images=None, multimodal_fields={}, num_generations=trainer.num_generations
    )
    return [list(completion) for completion in completions]


def grpo_trainer(scene: Scene, folder: str, **generation: Any) -> trl.GRPOTrainer:
    """A GRPOTrainer over the same model.

    Args:
        scene: the model and its contexts.
        folder: where the trainer may write.
        generation: further options of `generate`.

    Raises:
        RuntimeError: a completion could end before its L tokens.
    """
    rows, policy = scene.contexts.start.shape[0], scene.policy
    args = trl.GRPOConfig(
        output_dir=folder,
        use_cpu=policy.device.type == "cpu",
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=rows,
        num_generations=rows,
        max_completion_length=scene.contexts.tokens,
        use_vllm=False,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        # What our queries cannot contain: the end-of-text tokens, which would end a completion early, are among it.
        generation_kwargs={"suppress_tokens": suppressed_ids(policy)} | generation,
        # The weights are in the precision that both sides compute in.
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = trl.GRPOTrainer(
        model=policy.model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["unused"] * rows}),
        processing_class=scene.tokenizer,
    )
    if not set(trainer.eos_token_ids) <= set(suppressed_ids(policy)):
        raise RuntimeError(
            f"the model declares the end-of-text ids {trainer.eos_token_ids}, the tokenizer's control tokens are "
            f"{suppressed_ids(policy)}: a completion could end early. Give the model the tokenizer's eos_token_id"
        )
    return trainer


def suppressed_ids(policy: PolicyModel) -> list[int]:
    """List the ids that a query may not contain."""
    vocabulary = set(range(policy.causal_lm.get_output_embeddings().weight.shape[0]))
    return sorted(vocabulary - set(policy.allowed_ids.tolist()))


# --- checks ---------------------------------------------------------------------------------------------------------


def verify(name: str, reading: Reading, contexts: Contexts) -> None:
    """Refuse a figure of a side that did not do the same work.

    Raises:
        RuntimeError: a number of tokens is not what it must be.
    """
    rows, steps = contexts.start.shape[0], len(contexts.blocks)
    expectations: dict[str, tuple[object, object]] = {
        "tokens of the queries": (
            [[len(query) for query in queries] for queries in reading.queries],
            [[contexts.tokens] * rows] * steps,
        ),
        "tokens of the contexts": (reading.context_lengths, [[length] * rows for length in contexts.lengths]),
        "tokens through the decoder": (reading.forward_tokens, contexts.forward_tokens[name]),
    }
    for what, (got, expected) in expectations.items():
        if got != expected:
            raise RuntimeError(f"{name}: {what}: expected {expected}, got {got}")


def check(rows: int, steps: int, tokens: int, device: torch.device) -> None:
    """Compare the greedy queries of both sides on the tiny model in float32.

    Raises:
        RuntimeError: they differ, or are so alike that equality would mean nothing.
    """
    scene = on_device(tiny_scene(rows, steps, tokens, temperature=_GREEDY_TEMPERATURE), device)
    ours = read_by_ours(scene.policy, scene.contexts)
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo_trainer(scene, folder, do_sample=False, top_k=None)
        as_it_comes = read_by_trl(scene.policy, trainer, scene.contexts)
        with contiguous_head(scene.policy):
            theirs = read_by_trl(scene.policy, trainer, scene.contexts)
    for name, reading in {OURS: ours, TRL: theirs, TRL_AS_IT_COMES: as_it_comes}.items():
        verify(name, reading, scene.contexts)
        differing = [
            (step, row)
            for step, queries in enumerate(reading.queries)
            for row, query in enumerate(queries)
            if query != ours.queries[step][row]
        ]
        if differing:
            step, row = differing[0]
            raise RuntimeError(
                f"{name} differs from ours in {len(differing)} of {rows * steps} greedy queries, first at step {step}, "
                f"row {row}: {reading.queries[step][row]} against {ours.queries[step][row]}"
            )
    distinct = len({tuple(query) for queries in ours.queries for query in queries})
    if distinct < rows:
        raise RuntimeError(f"only {distinct} of {rows * steps} greedy queries are distinct: it says nothing")
    print(f"check: {rows * steps} greedy queries of {tokens} tokens are equal, {distinct} of them distinct")


# --- the figure -----------------------------------------------------------------------------------------------------


def measure(scene: Scene, repeats: int) -> dict[str, Timing]:
    """Time the contenders in turn, and verify what each of them did in its last round."""
    policy, contexts = scene.policy, scene.contexts
    readings: dict[str, Reading] = {}

    def keep(name: str, read: Callable[[], Reading]) -> Callable[[], None]:
        return lambda: readings.update({name: read()})

    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo_trainer(scene, folder)

        def read_with_contiguous_head() -> Reading:
            with contiguous_head(policy):
                return read_by_trl(policy, trainer, contexts)

        contenders: dict[str, Callable[[], Reading]] = {
            OURS: lambda: read_by_ours(policy, contexts),
            TRL: read_with_contiguous_head,
            TRL_AS_IT_COMES: lambda: read_by_trl(policy, trainer, contexts),
        }
        # One completion a row warms both up.
        generate_completions(trainer, contexts.start.tolist())
        timings = time_in_turn(
            {name: keep(name, read) for name, read in contenders.items()},
            repeats,
            warm_up=False,
            once={TRL_AS_IT_COMES},
        )
    for name, reading in readings.items():
        verify(name, reading, contexts)
    return timings


def report_on(timings: dict[str, Timing], contexts: Contexts, report: Report) -> None:
    """Add the figure and the table to a report."""
    speed = {name: contexts.query_tokens / timing.median for name, timing in timings.items()}
    report.figure("peer.trl_speedup", speed[OURS] / speed[TRL])
    report.table(
        ["reader", "time", "query tokens / s", "forward tokens", "ours is faster by"],
        [
            [name, timing, f"{speed[name]:.1f}", contexts.forward_tokens[name], f"{speed[OURS] / speed[name]:.2f}"]
            for name, timing in timings.items()
        ],
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Query tokens per second: our rollout and TRL's GRPOTrainer.")
    parser.add_argument("--rows", type=int, default=16, help="B, articles read at once; at least 2, as GRPO asks for")
    parser.add_argument("--steps", type=int, default=8, help="T, queries for each article")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a query, of a key and of a value")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--model", choices=["offline", "tiny"], default="offline", help="tiny writes nothing")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, or cuda")
    parser.add_argument("--check", action="store_true", help="compare greedy queries on the tiny model, and stop")
    arguments = parser.parse_args()
    if arguments.rows < 2:
        parser.error(f"--rows must be at least 2, got {arguments.rows}: GRPO compares the completions of a group")
    return arguments


def main() -> None:
    """Check, or time and report."""
    arguments = parse_arguments()
    shape = (arguments.rows, arguments.steps, arguments.tokens)
    if arguments.check:
        check(*shape, arguments.device)
        return
    scene = offline_scene(*shape) if arguments.model == "offline" else tiny_scene(*shape)
    scene = on_device(scene, arguments.device)
    settings = {name: getattr(arguments, name) for name in ("model", "rows", "steps", "tokens", "repeats")}
    settings["weights"] = str(scene.policy.causal_lm.dtype).removeprefix("torch.")
    report = Report("peer", "python tests/benchmarks/peer.py", settings)
    report_on(measure(scene, arguments.repeats), scene.contexts, report)
    # The page is of a CPU.
    if arguments.model == "offline" and arguments.device.type == "cpu":
        report.write()
    else:
        print("\n\n".join([*report.blocks, *(f"{name}: {value:.4g}" for name, value in report.figures.items())]))


if __name__ == "__main__":
    main()
