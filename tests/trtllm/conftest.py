"""What the tests on the stand-in for TensorRT-LLM share: engines that are ended whatever the test does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the stand-in's pages are tensors")

from ferry import Ferry
from small_connector import StartSmall, Store, small_connector
from standin.executor import Engine
from standin.interface import Dialect, Interface, played
from standin.options import EngineOptions


@pytest.fixture
def start_small() -> Iterator[StartSmall]:
    """Return what starts an engine with the small connector, or with what a test makes of it."""
    with contextlib.ExitStack() as stack:
        interfaces: dict[Dialect, Interface] = {}

        def start(
            options: EngineOptions | None = None,
            *,
            dialect: Dialect = "v2",
            store: Store | None = None,
            change: Callable[[type[Any], type[Any]], tuple[type[Any], type[Any]]] = lambda *both: both,
        ) -> Engine:
            options = options or EngineOptions()
            if dialect not in interfaces:
                interfaces[dialect] = stack.enter_context(played(dialect))
            store = store or Store(options.ranks, options.page_tokens)
            both = change(*small_connector(interfaces[dialect], store))
            return Engine(interfaces[dialect], *both, options)

        yield start


@pytest.fixture
def ferry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ferry]:
    """Return what starts engines with kvferry."""
    ferry = Ferry(tmp_path, monkeypatch)
    yield ferry
    ferry.close()
