"""Tests of one device, which the environment variable names: ``cuda``, or ``cpu`` to rehearse them.

    ATTENTION_RL_TEST_DEVICE=cuda python -m pytest tests/gpu

Without it the default suite collects none of them: a CPU has been tested by then. `make gpu` sets it, and with
ATTENTION_RL_TEST_RECORDS the file that each outcome is appended to as it comes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

_NAME = os.environ.get("ATTENTION_RL_TEST_DEVICE")
collect_ignore_glob = [] if _NAME else ["test_*_on_device.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    assert _NAME, "set ATTENTION_RL_TEST_DEVICE to cuda or cpu"
    return torch.device(_NAME, 0) if _NAME == "cuda" else torch.device(_NAME)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, where it is a CUDA one."""
    if device.type != "cuda":
        pytest.skip("only CUDA tells when the host waits for it")
    return device


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of the base model's weights."""
    found: torch.dtype = getattr(torch, request.param)
    return found


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a test's outcome, its time and what it recorded."""
    if report.when == "call" or report.outcome != "passed":
        _append(report, seconds=round(report.duration, 2), recorded=dict(report.user_properties))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Append a file that was skipped as a whole, or could not be imported."""
    if report.outcome != "passed":
        _append(report)


def _append(report: pytest.TestReport | pytest.CollectReport, **facts: object) -> None:
    path = os.environ.get("ATTENTION_RL_TEST_RECORDS")
    if path is None:
        return
    entry = {"name": report.nodeid.removeprefix("tests/gpu/"), "outcome": report.outcome, **facts}
    if report.longrepr is not None:
        entry["message"] = str(report.longrepr)[-2000:]
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, default=str) + "\n")
