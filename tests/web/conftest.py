"""Chromium for this folder: Debian's packages `chromium` and `chromium-driver`, which are of one version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser, start_chromium


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # The driver is spoken to on this machine's own interface.
            item.add_marker(pytest.mark.allow_hosts(["127.0.0.1", "::1", "localhost"]))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    driver = start_chromium()
    try:
        yield Browser(driver)
    finally:
        driver.quit()
