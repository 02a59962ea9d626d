"""What the tests on two engines share: a checkpoint and what a single engine answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pair import Reference
from speaking import speaking_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose output depends strongly on its KV, and whose every token is a word."""
    return speaking_llama(tmp_path_factory.mktemp("checkpoints") / "speaking")


@pytest.fixture(scope="session")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    with Reference(model, tmp_path_factory.mktemp("reference") / "engine.log") as single:
        yield single
