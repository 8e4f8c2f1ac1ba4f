"""What was fitted to a base model so that its attention finds what a query asks for (design §5).

Heads, means and temperature are fitted once, before training, with adapters off (`probing`), and then belong to the
run: they are kept beside the adapter, and whoever uses the adapter must select with them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attention_rl_trainer.models.heads import HeadNumber
from attention_rl_trainer.types import expect_tensor

CALIBRATION_NAME = "selector_calibration.safetensors"
_METADATA_KEY = "calibration"
_QUERY_MEANS, _KEY_MEANS = "query_means", "key_means"

Origin: TypeAlias = dict[str, str | int | float | bool | None]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was fitted, on what, and how well it does."""

    temperature: float
    heads: tuple[HeadNumber, ...] | None = None
    """The heads that select, in the order of the means; ``None`` for all of the attention layer."""
    query_means: Tensor | None = None
    """``[H, D]`` float32; ``None`` where vectors are compared as they are."""
    key_means: Tensor | None = None
    """``[G, D]`` float32."""
    origin: Origin = field(default_factory=dict)
    """The base model and the articles that it was fitted to, and how these were read."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """How well it does: probability of the right pair, nats."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"the temperature must be above 0 and finite, got {self.temperature}")
        if (self.query_means is None) != (self.key_means is None):
            raise ValueError("give the means of queries and of keys, or neither")
        if self.query_means is not None and self.key_means is not None:
            # A single row would be subtracted from every head.
            count = None if self.heads is None else len(self.heads)
            expect_tensor("query_means", self.query_means, (count, None), floating=True)
            expect_tensor("key_means", self.key_means, (count, self.query_means.shape[1]), floating=True)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of everything that changes a choice."""
        means = [tensor for tensor in (self.query_means, self.key_means) if tensor is not None]
        facts = [self.temperature, self.heads, [list(tensor.shape) for tensor in means]]
        content = hashlib.sha256(json.dumps(facts).encode("ascii"))
        for tensor in means:
            content.update(tensor.cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    def save(self, folder: Path) -> Path:
        """Write the file `CALIBRATION_NAME` into a folder, with the same bytes every time."""
        tensors = {_QUERY_MEANS: self.query_means, _KEY_MEANS: self.key_means}
        facts = {
            "temperature": self.temperature,
            "heads": None if self.heads is None else list(map(str, self.heads)),
            "origin": self.origin,
            "figures": dict(self.figures),
        }
        path = folder / CALIBRATION_NAME
        present = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
        # One entry, because the order of several differs between processes.
        save_file(present, path, metadata={_METADATA_KEY: json.dumps(facts, allow_nan=False)})
        return path

    @classmethod
    def read(cls, folder: Path) -> Calibration:
        """Read what `save` wrote into a folder.

        Raises:
            ValueError: there is no such file, or it cannot be read; says where one comes from.
        """
        path = folder / CALIBRATION_NAME
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {CALIBRATION_NAME}; a run whose selector is calibrated writes it beside its adapter, "
                "and so does attention-rl calibrate"
            )
        try:
            with safe_open(path, framework="pt") as file:
                facts: dict[str, Any] = json.loads(file.metadata()[_METADATA_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a dict
            heads = facts["heads"]
            return cls(
                temperature=facts["temperature"],
                heads=None if heads is None else tuple(map(HeadNumber.parse, heads)),
                query_means=tensors.get(_QUERY_MEANS),
                key_means=tensors.get(_KEY_MEANS),
                origin=dict(facts["origin"]),
                figures=dict(facts["figures"]),
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a calibration that can be read: {error}; calibrate again") from error

    def describe(self) -> str:
        """Say in a line what was fitted and how well it does."""
        means = "" if self.query_means is None else ", vectors less their means"
        heads = "" if self.heads is None else f"{len(self.heads)} heads ({', '.join(map(str, self.heads))}), "
        text = f"{heads}temperature {self.temperature:.4g}{means}"
        if "p_right" in self.figures:
            text += (
                f"; half a key draws its pair {self.figures['p_right']:.2f} of the time, "
                f"with the literal selector {self.figures['p_right_literal']:.2f}"
            )
        return text
