"""A pytest plugin for processes on the host driver: every test must use it rightly and give everything back.

The driver's refusals alone would not show that: what destroys streams and events has nobody to raise to.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from host_driver import HostDriver

DELAY_BYTES = 4 << 10
"""Copied by ``tests/gpu`` before an engine's bytes are: here nothing is late, so it need not take long."""


@pytest.fixture(scope="session")
def host_driver() -> HostDriver:
    return HostDriver()


@pytest.fixture(autouse=True)
def is_used_rightly(host_driver: HostDriver) -> Iterator[None]:
    before = host_driver.left()
    yield
    if host_driver.left() != before:
        gc.collect()
    assert host_driver.take_misuses() == []
    assert host_driver.left() == before, "not everything was given back"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert isinstance(item, pytest.Function)
        if hasattr(item.module, "DELAY_BYTES"):
            item.module.DELAY_BYTES = DELAY_BYTES
