"""States come back from a file to the last bit, without pickle; random states too."""

from __future__ import annotations

import pickle
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_rl_trainer.durability.states import (
    TreeError,
    capture_random_states,
    load_tree,
    restore_random_states,
    save_tree,
)

CPU = torch.device("cpu")


def equal_trees(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and one.equal(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal_trees(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal_trees, one, other))
    return repr(one) == repr(other)


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


class TestTensorTree:
    @given(trees)
    def test_gives_back_what_it_was_given(self, tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
        path = tmp_path_factory.getbasetemp() / "tree.safetensors"
        save_tree(path, tree)
        assert equal_trees(load_tree(path), tree)

    def test_tensors_come_back_to_the_last_bit(self, tmp_path: Path) -> None:
        shared = torch.arange(256, dtype=torch.uint8)
        weights = torch.tensor([0.1, -0.0, float("inf"), float("nan")])
        tree = {
            "state": {0: {"exp_avg": weights, "map": shared}, 1: {"map": shared, "part": weights[1:3]}},
            "transposed": torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3).T,
            "empty": torch.empty(0, 4),
            "scalar": torch.tensor(7),
        }
        save_tree(tmp_path / "tree.safetensors", tree)
        found = load_tree(tmp_path / "tree.safetensors")
        assert found["state"][0]["exp_avg"].numpy().tobytes() == weights.numpy().tobytes()
        for name in ("transposed", "empty", "scalar"):
            assert equal_trees(found[name], tree[name]), name
        assert found["state"][1]["part"].equal(weights[1:3])
        # The quantization map that all 8-bit states share is stored once.
        assert found["state"][0]["map"].data_ptr() == found["state"][1]["map"].data_ptr()

    @pytest.mark.parametrize("thing", [{1, 2}, np.float32(1), signal.SIGINT, object(), {(1, 2): 3}, b"bytes"])
    def test_what_needs_pickle_is_refused_by_name(self, thing: Any, tmp_path: Path) -> None:
        with pytest.raises(TreeError, match=r"\.outer\.0 is a .*, which cannot be saved without pickle"):
            save_tree(tmp_path / "tree.safetensors", {"outer": [thing]})

    def test_places_that_are_spelled_alike_stay_apart(self, tmp_path: Path) -> None:
        tree = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
        save_tree(tmp_path / "tree.safetensors", tree)
        assert equal_trees(load_tree(tmp_path / "tree.safetensors"), tree)

    @pytest.mark.parametrize("content", [b"", b"\x00" * 100, pickle.dumps({"a": 1})], ids=["empty", "zeros", "pickle"])
    def test_other_files_are_refused(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "tree.safetensors").write_bytes(content)
        with pytest.raises(TreeError, match=r"tree\.safetensors does not hold a state that this library wrote"):
            load_tree(tmp_path / "tree.safetensors")


def test_random_states_come_back_from_a_file(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.normal()), torch.rand(1).item()]

    random.gauss(0, 1)  # leaves a second value behind, which is state too
    np.random.normal()
    save_tree(tmp_path / "states", capture_random_states(CPU))
    expected = [draw() for _ in range(3)]
    restore_random_states(load_tree(tmp_path / "states"), CPU)
    assert [draw() for _ in range(3)] == expected
