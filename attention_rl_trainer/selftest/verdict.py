"""The self-test's verdict over several seeds, and what single options are worth on its task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attention_rl_trainer.selftest.task import CALIBRATED_RUN, SelfTestResult, run_seed
from attention_rl_trainer.selftest.teaching import teach

REQUIRED_GAP_CLOSED = 0.95
ABLATIONS: tuple[dict[str, Any], ...] = (
    {"reward_gradient_coef": 0.0},
    {"kl_reference": "base"},
    {"beta": 0.0},
    {"advantage": "reward"},
    {"advantage": "whitened"},
    {"credit": "return_to_go"},
    {"credit": "step"},
    {"selector_coef": 1.0},
    {"order_coef": 1.0},
    {"information_coef": 1.0},
    {"num_queries": 4, "credit": "step"},
    {"selector_coef": 1.0, "selector_gradient": "expected"},
    {"selector_coef": 1.0, "selector_gradient": "distilled"},
)


# Steps between two measurements of the gap.
_MEASURE_EVERY = 10


def judge(num_seeds: int, folder: Path, *, ablate: bool = False, calibrated: bool = False) -> bool:
    """Run the self-test, and print ``gap_closed: <share>`` for each seed and, last of all, their minimum.

    With ``ablate`` it also runs with one option changed at a time, and says what each is worth; with ``calibrated`` the
    selector is fitted before training.

    Returns:
        Whether every seed closed enough of the gap.

    Raises:
        ValueError: there is no seed.
    """
    if num_seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {num_seeds}")
    shares: list[float] = []
    ablated: dict[str, list[float]] = {}
    for seed in range(num_seeds):
        base = teach(seed) if ablate else None
        settings = CALIBRATED_RUN if calibrated else {}
        result = run_seed(seed, folder / f"seed_{seed}", base=base, measure_every=_MEASURE_EVERY, **settings)
        print(describe(result))
        print(f"gap_closed: {result.gap_closed:.3f}", flush=True)
        shares.append(result.gap_closed)
        for changes in ABLATIONS if ablate else ():
            name = ", ".join(f"{option}={value}" for option, value in changes.items())
            share = run_seed(seed, folder / f"seed_{seed}_{name}", base=base, **settings | changes).gap_closed
            ablated.setdefault(name, []).append(share)
            print(f"  with {name}: {share:.3f}", flush=True)
    if ablated:
        print(f"\nGap closed, mean over {num_seeds} seeds:")
        for name, values in {"as shipped": shares, **ablated}.items():
            print(f"  {name:24} {sum(values) / len(values):.3f}  (lowest {min(values):.3f})")
    print(f"\nLowest of {num_seeds} seeds; {REQUIRED_GAP_CLOSED} is required:")
    print(f"gap_closed: {min(shares):.3f}")
    return min(shares) >= REQUIRED_GAP_CLOSED


def describe(result: SelfTestResult) -> str:
    """Put one run of the self-test into words."""
    plans = ", ".join(f"{'-'.join(map(str, plan))} {share:.0%}" for plan, share in result.plans.items())
    needed = result.episodes_needed(REQUIRED_GAP_CLOSED)
    episodes = "never" if needed is None else f"after {needed} episodes"
    return (
        f"seed {result.seed}: query gain {result.untrained:+.3f} before training, {result.trained:+.3f} after it; "
        f"random {result.known.random:+.3f}, best {result.known.best:+.3f} nats per token "
        f"(topics {'-'.join(map(str, result.known.best_plan))}). Read after training: {plans}. "
        f"Model gain {result.model_gain:+.3f}. {REQUIRED_GAP_CLOSED:.0%} of the gap first closed {episodes}. "
        f"{result.seconds:.0f} s"
    )
