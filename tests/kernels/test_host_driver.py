"""The staging path on NVIDIA's real bindings over the host driver: every call is made as CUDA's driver would take it.

The tests themselves are ``tests/gpu``, as on a GPU, and ``on_host_driver.py``; see host_driver.cpp for what this shows
and what it does not.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from host_driver import build_driver, run_tests

TORCH_TESTS = 3
"""Of ``tests/gpu``: skipped, for torch would take the host driver for a GPU."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a host driver is."""
    made = tmp_path_factory.mktemp("host-driver")
    build_driver(made)
    return made


def counts(output: str) -> dict[str, int]:
    """Return pytest's last line as numbers by word."""
    return {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", output.splitlines()[-1])}


def test_the_gpus_tests_pass_on_it(directory: Path) -> None:
    done = run_tests(directory, "tests/gpu", "-k", "not torch")
    assert done.returncode == 0, done.stdout + done.stderr
    found = counts(done.stdout)
    assert found["passed"] > 500
    assert found["deselected"] == TORCH_TESTS
    assert "skipped" not in found


def test_refusals_and_misuse(directory: Path) -> None:
    done = run_tests(directory, "tests/kernels/on_host_driver.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_is_never_taken_for_anothers_driver(tmp_path: Path) -> None:
    """Without the host driver in its path, a process runs no test at all."""
    done = run_tests(tmp_path, "tests/kernels/on_host_driver.py", "-x")
    assert done.returncode == 1
    assert "this process does not run on the host driver" in done.stdout
