"""Numbers that are not finite stop a run before its optimizer step; memory that runs out makes micro-batches smaller.

Every number is made non-finite by the computation itself: a weight, a hook on a module or a parameter, an option.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama, tiny_trainer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.errors import NonFiniteError
from attention_rl_trainer.models.trial import expect_trainable
from attention_rl_trainer.records.ledger import read_ledger
from attention_rl_trainer.rollout.sampler import TrajectorySampler
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer
from attention_rl_trainer.update.agreement import RolloutAgreement

ALWAYS = -math.inf
NAN, INF = math.nan, math.inf
POLICY_VALUE = "policy logit or log-probability of a value"
BASE_VALUE = "base model logit or log-probability of a value"
NEVER_SAMPLED = 0  # the special token: no query contains it, and no article
TRAINED = 3  # the first step after the warm-up's two, and one update later
B, T, L, V = 8, 3, 4, 6  # of the tiny configuration; micro-batches are of 4
Make = Callable[..., AttentionGuidedRLTrainer]
Inject = Callable[[AttentionGuidedRLTrainer], object]


@pytest.fixture
def make(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Make:
    """Builds trainers that keep every trajectory after the warm-up, each in a folder of its own."""
    numbers = iter(range(100))

    def build(**options: Any) -> AttentionGuidedRLTrainer:
        if options.get("optim") == "adamw_bnb_8bit":
            # Large enough for the LoRA matrices to have 8-bit states.
            options["model"] = tiny_llama(hidden_size=1024, num_attention_heads=8, head_dim=16)
        folder = tmp_path / str(next(numbers))
        return tiny_trainer(folder, texts, tokenizer, **{"filter_threshold": ALWAYS} | options)

    return build


def tensor_bytes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else value.item()
    if isinstance(value, dict):
        return {str(name): tensor_bytes(item) for name, item in value.items()}
    return value


def state_of(trainer: AttentionGuidedRLTrainer) -> dict[str, Any]:
    """Adapter, previous adapter, optimizer, statistics and ledger, to the last byte."""
    parameters = {name: p for name, p in trainer.policy.model.named_parameters() if p.requires_grad}
    ledger = trainer.recorder.ledger.path
    return {
        "adapter": tensor_bytes(parameters),
        "previous adapter": tensor_bytes(trainer.updater.previous_adapter.state_dict()),
        "optimizer": tensor_bytes(trainer.optimizer.state_dict()),
        "run": [trainer.filter.state_dict(), trainer.progress.state_dict(), trainer.updater.num_updates],
        "ledger": ledger.read_bytes() if ledger.exists() else b"",
    }


def everything_of(trainer: AttentionGuidedRLTrainer) -> dict[str, Any]:
    """And what differs between runs that learn the same: sizes of micro-batches, and metrics with their times."""
    parts = {name: copy.deepcopy(part.state_dict()) for name, part in trainer.parts.items()}
    return state_of(trainer) | {"parts": parts}


def micro_batches_of(trainer: AttentionGuidedRLTrainer) -> dict[str, int]:
    state: dict[str, int] = trainer.updater.state_dict()["micro_batches"]
    return state


class AtStep(TrainerCallback):
    """Spoils something before a step, and writes the state down after that."""

    def __init__(self, trainer: AttentionGuidedRLTrainer, global_step: int, inject: Inject) -> None:
        self.trainer, self.global_step, self.inject = trainer, global_step, inject
        self.before: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.global_step:
            self.inject(self.trainer)
            self.before = everything_of(self.trainer)


def error_at(trainer: AttentionGuidedRLTrainer, inject: Inject, global_step: int = TRAINED) -> NonFiniteError:
    """Spoil something before a step; the step must fail, say where, and change nothing."""
    callback = AtStep(trainer, global_step, inject)
    trainer.add_callback(callback)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    after = everything_of(trainer)
    assert {name for name in after if after[name] != callback.before[name]} == set()
    assert all(p.grad is None for p in trainer.policy.model.parameters())
    assert trainer.state.global_step == global_step
    error = caught.value
    assert error.step == global_step + 1
    assert f"of step {global_step + 1}." in str(error)
    assert error.articles
    for article in error.articles:
        assert re.fullmatch(r"article \d+", article.title)
        assert repr(article.title) in str(error)
    return error


def is_outside_the_update() -> bool:
    """Whether the code that asks was called by a rollout or a check; a module's mode does not show it."""
    codes = TrajectorySampler.sample.__code__, RolloutAgreement.expect.__code__, expect_trainable.__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def on_head(rows: int, spoil: Callable[[Tensor], None], *, training: bool, grad: bool = False, call: int = 1) -> Inject:
    """Change the logits of the head's n-th call of so many rows."""

    def inject(trainer: AttentionGuidedRLTrainer) -> None:
        calls = 0

        def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
            nonlocal calls
            if output.shape[0] != rows or is_outside_the_update() == training or torch.is_grad_enabled() != grad:
                return None
            calls += 1
            if calls != call:
                return None
            changed = output.clone()
            spoil(changed)
            return changed

        trainer.policy.head.linear.register_forward_hook(hook)

    return inject


def put(*index: Any, value: float) -> Callable[[Tensor], None]:
    def spoil(logits: Tensor) -> None:
        logits[index] = value

    return spoil


def in_weight(name: str, value: float) -> Inject:
    """Spoil one number of the first parameter whose name contains ``name``."""

    def inject(trainer: AttentionGuidedRLTrainer) -> None:
        parameter = next(p for key, p in trainer.policy.model.named_parameters() if name in key)
        with torch.no_grad():
            parameter.view(-1)[parameter.numel() // 2] = value

    return inject


def in_query_projection(condition: Callable[[AttentionGuidedRLTrainer, Tensor], Any]) -> Inject:
    """Make a number of the selecting layer's query projection infinite; the condition says where."""

    def inject(trainer: AttentionGuidedRLTrainer) -> None:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
            index = condition(trainer, output)
            if index is None:
                return None
            changed = output.clone()
            changed[index] = INF
            return changed

        trainer.policy.backbone.layers[-1].self_attn.q_proj.register_forward_hook(hook)

    return inject


def statistics(**values: float) -> Inject:
    def inject(trainer: AttentionGuidedRLTrainer) -> None:
        for name, value in values.items():
            setattr(trainer.filter.statistics, name, value)

    return inject


def nothing(trainer: AttentionGuidedRLTrainer) -> None:
    pass


class LastQueryToken:
    """True at the single token that ends the query of a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.tokens = 0

    def __call__(self, trainer: AttentionGuidedRLTrainer, output: Tensor) -> Any:
        if not is_outside_the_update() or output.shape[1] != 1:
            return None
        self.tokens += 1
        return (2, 0, 5) if self.tokens == self.step * L else None


class TestRollout:
    @pytest.mark.parametrize(
        ("inject", "quantity", "step"),
        [
            (in_weight("lm_head", NAN), "policy logit", 1),
            (in_weight("model.norm", INF), "policy logit", 1),
            (in_weight("layers.0.mlp.down_proj", INF), "key vector", 0),
            (in_weight("lora_B", INF), "policy logit", 1),
            # One logit of one row, which the draw would not notice. Policy and base model are rows of one batch.
            (on_head(2 * B, put(3, 300, value=-INF), training=False, call=L + 2), "policy logit", 2),
            (on_head(2 * B, put(B + 3, 300, value=-INF), training=False, call=L + 2), "base model logit", 2),
            (on_head(2 * B, put(B + 3, 300, value=INF), training=False, call=2), "base model logit", 1),
            # A value is scored by the policy, by the base model after its own query and after the policy's.
            (
                on_head(B * V, put(3 * V, NEVER_SAMPLED, value=-INF), training=False),
                POLICY_VALUE,
                1,
            ),
            (
                on_head(B * V, put(3 * V, NEVER_SAMPLED, value=-INF), training=False, call=5),
                f"{BASE_VALUE} after its own query",
                2,
            ),
            (
                on_head(B * V, put(3 * V, NEVER_SAMPLED, value=-INF), training=False, call=9),
                BASE_VALUE,
                3,
            ),
            (in_weight("layers.1.self_attn.k_proj.base_layer", NAN), "key vector", 0),
            (in_query_projection(LastQueryToken(2)), "query vector", 2),
        ],
    )
    def test_logits_and_vectors(self, make: Make, inject: Inject, quantity: str, step: int) -> None:
        error = error_at(make(), inject)
        assert error.quantity == quantity
        assert f"at step {step} of the trajectory" in str(error)
        assert "in the rollout of step 4." in str(error)

    def test_one_bad_row_is_the_one_that_is_named(self, make: Make) -> None:
        trainer = make()
        error = error_at(trainer, on_head(2 * B, put(5, 300, value=NAN), training=False))
        assert len(error.articles) == 1
        assert "row 5" in str(error)

    def test_policy_and_base_model_one_after_the_other(self, make: Make) -> None:
        trainer = make()
        trainer.sampler.joint = False
        error = error_at(trainer, on_head(B, put(2, 300, value=-INF), training=False, call=L + 1))
        assert error.quantity == "base model logit"

    @pytest.mark.parametrize(
        ("options", "quantity"),
        [
            # Beyond float32's range: attention scores, a reward, and the sum of four that are within it.
            ({"selection_temperature": 1e-39}, "selection probability"),
            ({"order_coef": 3e39}, "reward"),
            ({"order_coef": 1.1e37, "num_steps": 4, "num_kv_pairs": 12, "model": "certain"}, "total reward"),
        ],
    )
    def test_probabilities_and_rewards(self, make: Make, options: dict[str, Any], quantity: str) -> None:
        if options.get("model") == "certain":
            options = options | {"model": tiny_llama()}
            with torch.no_grad():
                options["model"].lm_head.weight.mul_(80)  # an order is worth tens of nats then
        error = error_at(make(**options), nothing, global_step=0)
        assert error.quantity == quantity

    def test_a_vector_that_was_not_finite_is_not_remembered(self, make: Make) -> None:
        trainer = make()
        before = len(trainer.policy.key_cache)
        error_at(trainer, in_weight("layers.1.self_attn.k_proj.base_layer", NAN), global_step=0)
        assert len(trainer.policy.key_cache) == before == 0


class TestStatistics:
    @pytest.mark.parametrize(
        ("inject", "options", "quantity"),
        [
            (statistics(mean=1e200), {}, "the SD of the reward history"),
            (statistics(mean=INF), {}, "the mean of the reward history"),
            (statistics(mean=NAN), {"filter_threshold": None}, "the mean of the reward history"),
            (statistics(sum_of_squares=INF), {}, "the SD of the reward history"),
            (statistics(sum_of_squares=1e300), {"filter_threshold": 1e300}, "the threshold of the reward history"),
            (statistics(sum_of_squares=1e-300), {"advantage": "whitened"}, "advantage"),
        ],
    )
    def test_history(self, make: Make, inject: Inject, options: dict[str, Any], quantity: str) -> None:
        error = error_at(make(**options), inject)
        assert error.quantity == quantity
        assert len(error.articles) == B


def in_reference(trainer: AttentionGuidedRLTrainer) -> None:
    """Spoil the base model's forward in the update."""

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        return output * NAN if module.disable_adapters and not is_outside_the_update() else None

    trainer.policy.adapter.layers[-1].register_forward_hook(hook)


def in_previous_adapter(trainer: AttentionGuidedRLTrainer) -> None:
    next(iter(trainer.updater.previous_adapter.state_dict().values())).view(-1)[3] = NAN


def in_selector(trainer: AttentionGuidedRLTrainer) -> None:
    """A temperature that overflows, from the update on."""

    def hook(module: nn.Module, arguments: Any) -> None:
        if not is_outside_the_update():
            trainer.args.selection_temperature = 1e-39

    trainer.policy.backbone.register_forward_pre_hook(hook)


def spread(logits: Tensor) -> None:
    """Two finite logits, the ratio of whose probabilities overflows."""
    logits[L + 1, 300], logits[L + 1, 301] = 3e38, -3e38


def last_query_token_of_update(trainer: AttentionGuidedRLTrainer, output: Tensor) -> Any:
    """No logit of a query token is computed from the query vector of the very last one."""
    if not torch.is_grad_enabled():
        return None
    return (1, trainer.layout.query_starts[-1] + L - 1, 5)


class TestUpdate:
    NUM_TOKENS = 4 * T * L

    @pytest.mark.parametrize(
        ("inject", "options", "quantity", "place"),
        [
            (
                on_head(NUM_TOKENS, put(L + 1, 300, value=-INF), training=True, grad=True, call=2),
                {"beta": 0.0},
                "policy logit",
                "at step 2 of the trajectory .* in micro-batch 2 of iteration 1",
            ),
            (
                on_head(NUM_TOKENS, put(2 * L, 300, value=-INF), training=True),
                {},
                "previous adapter's logit",
                "at step 3 of the trajectory .* in micro-batch 1 of iteration 1",
            ),
            (in_previous_adapter, {}, "previous adapter's logit", "at step 1 of the trajectory .* micro-batch 1"),
            (in_reference, {"kl_reference": "base"}, "base model logit", "at step 1 .* micro-batch 1"),
            (on_head(NUM_TOKENS, spread, training=True, grad=True), {}, "KL", "at step 2 .* micro-batch 1"),
            (
                nothing,
                {"reward_gradient_coef": 3e38},
                "the loss",
                r"\(policy .*, KL .*\) .* micro-batch 1 of iteration 1",
            ),
            (
                in_query_projection(last_query_token_of_update),
                {"selector_coef": 1.0},
                "query vector",
                "at step 3 .* micro-batch 1",
            ),
            (in_selector, {"selector_coef": 1.0}, "log-probability of a drawn pair", "at step 1 .* micro-batch 1"),
            (
                on_head(4 * T * V, put(V, NEVER_SAMPLED, value=-INF), training=True, grad=True, call=2),
                {"reward_gradient_coef": 1.0},
                POLICY_VALUE,
                "at step 2 .* micro-batch 2",
            ),
        ],
    )
    def test_logits_kl_and_loss(
        self, make: Make, inject: Inject, options: dict[str, Any], quantity: str, place: str
    ) -> None:
        # The first step that trains fails where nothing but the option is to blame.
        error = error_at(make(**options), inject, global_step=2 if inject is nothing else TRAINED)
        assert error.quantity == quantity
        assert re.search(place + ".* in the update of step", str(error))

    @pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
    @pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "num_episodes": 96}])
    @pytest.mark.parametrize("spoil", [lambda g: g.index_fill(0, torch.tensor([0]), NAN), lambda g: g * 1e30])
    def test_gradient(self, make: Make, optim: str, options: dict[str, Any], spoil: Any) -> None:
        trainer = make(optim=optim, **options)
        # In the update's last rollout batch: those before it must be taken back too.
        last = 2 * options.get("gradient_accumulation_steps", 1)
        error = error_at(trainer, in_gradient(spoil, call=last))
        overflow = error.quantity == "the norm of the gradient"
        assert overflow or re.fullmatch(r"the gradient of .*lora_A.*", error.quantity)
        assert overflow == bool(torch.ones(1).mul(1e30).allclose(spoil(torch.ones(1))))
        assert len(error.articles) == 4
        assert "in micro-batch 2 of iteration 1, in the update of step 4." in str(error)

    @pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
    @pytest.mark.parametrize(
        "options", [{"num_iterations": 2}, {"num_iterations": 3, "gradient_accumulation_steps": 2, "num_episodes": 96}]
    )
    @pytest.mark.parametrize("global_step", [TRAINED, 2])
    def test_gradient_of_a_later_iteration(
        self, make: Make, optim: str, options: dict[str, Any], global_step: int
    ) -> None:
        """The optimizer steps of the iterations before are taken back, the very first of a run too."""
        trainer = make(optim=optim, **options)
        batches = options.get("gradient_accumulation_steps", 1)
        iteration = options["num_iterations"]
        first_trained = global_step if batches == 1 else global_step - 1
        call = 2 * batches * (iteration - 1) + 1
        error = error_at(trainer, in_gradient(lambda g: g * NAN, call=call), global_step=first_trained)
        assert f"in micro-batch 1 of iteration {iteration}, in the update of step {first_trained + 1}." in str(error)

    def test_weights_that_overflow_between_two_iterations(self, make: Make) -> None:
        error = error_at(make(num_iterations=2, learning_rate=1e30), nothing, global_step=2)
        assert error.quantity == "policy logit"
        assert "in micro-batch 1 of iteration 2, in the update of step 3." in str(error)

    def test_a_gradient_that_is_spoilt_after_the_update(self, make: Make) -> None:
        class Spoil(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == TRAINED:
                    next(p for p in kwargs["model"].parameters() if p.grad is not None).grad.fill_(INF)

        error = error_at(make(trainer_options={"callbacks": [Spoil()]}), nothing)
        assert "in the optimizer step of step 4." in str(error)
        assert len(error.articles) == B

    def test_a_run_can_be_started_again(self, make: Make) -> None:
        """Nothing is left of a failed step, gradients included, that a run after it would meet."""
        trainer, fresh = make(num_iterations=2), make(num_iterations=2)
        handles: list[Any] = []
        error_at(trainer, lambda t: handles.append(in_gradient(lambda g: g * NAN, call=3)(t)), global_step=2)
        handles[0].remove()
        trainer.pop_callback(AtStep)
        trainer.train()
        fresh.train()
        assert state_of(trainer) == state_of(fresh)


def in_gradient(spoil: Callable[[Tensor], Tensor], call: int) -> Inject:
    """Change the gradient of one parameter in the n-th backward from here on."""

    def inject(trainer: AttentionGuidedRLTrainer) -> Any:
        calls = 0

        def hook(gradient: Tensor) -> Tensor | None:
            nonlocal calls
            calls += 1
            return spoil(gradient) if calls == call else None

        return next(p for p in trainer.policy.model.parameters() if p.requires_grad).register_hook(hook)

    return inject


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_false_alarm_in_a_thousand_steps(make: Make) -> None:
    trainer = make(
        num_episodes=4000,
        generation_batch_size=2,
        gradient_accumulation_steps=2,
        training_batch_size=1,
        num_iterations=2,
        num_steps=2,
        tokens_per_query=2,
        learning_rate=1e-3,
        filter_threshold=0.0,
        advantage="whitened",
        credit="return_to_go",
        selector_coef=1.0,
        reward_gradient_coef=0.1,
        order_coef=0.5,
        entropy_coef=0.01,
        query_temperature=0.8,
        selection_temperature=0.1,
        disable_dropout=False,
        activation_checkpointing=True,
        include_key_in_context=True,
        window="random",
        logits_chunk_size=3,
        logging_steps=100,
    )
    trainer.train()
    assert trainer.state.global_step == 1000
    assert trainer.updater.num_updates > 1000
    assert len(read_ledger(trainer.recorder.ledger.path)) == 4000


# ---- Memory ----


def cuda_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu_error() -> None:
    torch.empty(2**50, dtype=torch.uint8)


class Exhausted:
    """Raises in the update's forward, or in the middle of its backward, for micro-batches of too many trajectories.

    Args:
        max_rows: what still fits.
        spare: micro-batches that fit although they are larger, before the first that does not.
        in_backward: whether memory runs out in the backward.
        fail: raises.
    """

    def __init__(
        self,
        trainer: AttentionGuidedRLTrainer,
        max_rows: int,
        *,
        spare: int = 0,
        in_backward: bool = False,
        fail: Callable[[], None] = cuda_error,
    ) -> None:
        self.trainer, self.max_rows, self.spare, self.in_backward, self.fail = (
            trainer,
            max_rows,
            spare,
            in_backward,
            fail,
        )
        self.tried: list[int] = []
        # The first layer's backward comes last: the gradients of the others are there by then.
        trainer.policy.backbone.layers[0].register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if is_outside_the_update() or not torch.is_grad_enabled():
            return
        rows = output.shape[0]
        self.tried.append(rows)
        if rows <= self.max_rows:
            return
        self.spare -= 1
        if self.spare >= 0:
            return
        if self.in_backward:
            output.register_hook(lambda gradient: self.fail())
        else:
            self.fail()


def logged_updates(trainer: AttentionGuidedRLTrainer) -> list[tuple[float | None, ...]]:
    names = ("loss", "grad_norm", "policy_loss", "kl", "reward")
    return [tuple(entry.get(name) for name in names) for entry in trainer.state.log_history]


def warnings_about_memory(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Memory ran out")]


class TestMemoryInTheUpdate:
    @pytest.mark.parametrize("fail", [cuda_error, pytest.param(cpu_error, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("in_backward", [pytest.param(False, marks=pytest.mark.slow), True])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            pytest.param({"num_iterations": 2, "optim": "adamw_bnb_8bit", "num_episodes": 32}, marks=pytest.mark.slow),
            {"disable_dropout": False, "activation_checkpointing": True},
        ],
    )
    def test_equals_a_run_with_smaller_micro_batches(
        self,
        make: Make,
        caplog: pytest.LogCaptureFixture,
        fail: Callable[[], None],
        in_backward: bool,
        options: dict[str, Any],
    ) -> None:
        # One after the other: a trainer's seed is set when it is made, and dropout draws from there on.
        plain = make(**options)
        plain.train()
        small = make(training_batch_size=2, **options)
        small.train()
        halved = make(**options)
        # The first micro-batch of the attempt fits, so its gradient is there when the second does not.
        exhausted = Exhausted(halved, 2, spare=1, in_backward=in_backward, fail=fail)
        halved.train()
        assert exhausted.tried[:4] == [4, 4, 2, 2]
        assert max(exhausted.tried[2:]) == 2
        assert state_of(halved) == state_of(small)
        assert logged_updates(halved) == logged_updates(small)
        # The step in which it happened reads what it would have read.
        rows, expected = read_ledger(halved.recorder.ledger.path), read_ledger(plain.recorder.ledger.path)
        assert rows[: 3 * B] == expected[: 3 * B]
        assert len(rows) == len(expected)
        (warning,) = warnings_about_memory(caplog)
        assert re.search(r"step 3; .* 2 trajectories instead of 4\. .*training_batch_size$", warning)

    def test_a_resumed_run_knows_what_fitted(self, make: Make, tmp_path: Path) -> None:
        """The sums of gradients round by the size of the micro-batches."""
        options = {"save_episodes": 4 * B}
        whole = make(**options)
        Exhausted(whole, 1)
        whole.train()
        assert micro_batches_of(whole)["size"] == 1
        for resumed, size in ((make(**options), 1), (make(training_batch_size=8, **options), 8)):
            resumed.train(resume_from_checkpoint=str(tmp_path / "0" / "run" / "checkpoint-4"))
            # Another size that is asked for acts.
            found = micro_batches_of(resumed)
            assert (found["size"], found["num_halvings"]) == (size, 2 * (size == 1))
            assert (state_of(resumed) == state_of(whole)) == (size == 1)

    def test_gradients_of_earlier_rollout_batches_stay(self, make: Make) -> None:
        options: dict[str, Any] = {"gradient_accumulation_steps": 2, "num_episodes": 32}

        class SmallerFromTheSecondBatch(TrainerCallback):
            def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 1:
                    smaller = micro_batches_of(expected) | {"size": 2}
                    expected.updater.load_state_dict(expected.updater.state_dict() | {"micro_batches": smaller})

        halved, expected = make(**options), make(**options)
        # Both micro-batches of the update's first rollout batch fit, and one of its second.
        exhausted = Exhausted(halved, 2, spare=3)
        expected.add_callback(SmallerFromTheSecondBatch())
        halved.train()
        expected.train()
        assert exhausted.tried == [4, 4, 4, 4, 2, 2, 2, 2]
        assert state_of(halved) == state_of(expected)

    def test_fewer_kept_than_the_size(self, make: Make) -> None:
        """What is halved is what did not fit."""
        trainer = make(training_batch_size=64)
        exhausted = Exhausted(trainer, 4)
        trainer.train()
        assert exhausted.tried[:3] == [8, 4, 4]

    @pytest.mark.parametrize("in_backward", [False, True])
    def test_three_halvings_at_most(self, make: Make, in_backward: bool, caplog: pytest.LogCaptureFixture) -> None:
        trainer = make(generation_batch_size=32, training_batch_size=32, num_episodes=96, num_iterations=2)
        exhausted = Exhausted(trainer, 0, in_backward=in_backward)
        callback = AtStep(trainer, 1, nothing)
        trainer.add_callback(callback)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            trainer.train()
        assert exhausted.tried == [32, 16, 8, 4]
        assert everything_of(trainer) == callback.before
        (note,) = caught.value.__notes__
        assert note.startswith("In the update of step 2 (trajectories per micro-batch 4, trajectories 32, ")
        assert note.endswith("If memory ran out, lower training_batch_size or logits_chunk_size.")
        assert options_in(note) == {"training_batch_size", "logits_chunk_size"}
        assert warnings_about_memory(caplog) == []

    def test_in_a_later_iteration_the_whole_update_is_taken_back(self, make: Make) -> None:
        trainer = make(num_iterations=2, training_batch_size=1)
        Exhausted(trainer, 0, spare=B)
        callback = AtStep(trainer, 2, nothing)
        trainer.add_callback(callback)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train()
        assert everything_of(trainer) == callback.before

    def test_other_errors_are_not_tried_again(self, make: Make) -> None:
        def fail() -> None:
            torch.ones(2, 3) @ torch.ones(2, 3)

        trainer = make()
        exhausted = Exhausted(trainer, 0, fail=fail)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            trainer.train()
        assert exhausted.tried == [4]

    def test_nothing_of_a_failed_attempt_is_alive_at_the_next(self, make: Make) -> None:
        trainer = make()
        held: list[weakref.ref[Tensor]] = []
        alive: list[int] = []

        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if torch.is_grad_enabled():
                alive.append(sum(reference() is not None for reference in held))
                if output.shape[0] > 2:
                    held.append(weakref.ref(output))
                    cuda_error()

        trainer.policy.backbone.layers[-1].register_forward_hook(hook)
        trainer.train()
        assert len(held) == 1
        assert set(alive) == {0}


def options_in(note: str) -> set[str]:
    """Words after "lower" that look like options; each must be one."""
    names = set(re.findall(r"\w+_\w+", note.split("lower ")[1]))
    assert names <= {field.name for field in dataclasses.fields(AttentionGuidedRLConfig)}
    return names


@pytest.mark.parametrize("fail", [cuda_error, cpu_error])
@pytest.mark.parametrize("call", [1, 5])
def test_memory_in_the_rollout(make: Make, fail: Callable[[], None], call: int) -> None:
    trainer = make()

    def inject(trainer: AttentionGuidedRLTrainer) -> None:
        calls = 0

        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            nonlocal calls
            calls += is_outside_the_update()
            if calls == call:
                fail()

        trainer.policy.backbone.register_forward_hook(hook)

    callback = AtStep(trainer, TRAINED, inject)
    trainer.add_callback(callback)
    with pytest.raises(RuntimeError, match="memory") as caught:
        trainer.train()
    assert everything_of(trainer) == callback.before
    (note,) = caught.value.__notes__
    assert note.startswith("In the rollout of step 4 (trajectories 8, ")
    assert options_in(note) == {"generation_batch_size", "num_steps", "tokens_per_query", "tokens_per_value"}
