"""What differs between TensorRT-LLM releases, with played modules, and what doctor says about the one installed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvferry.engines import diagnosis as of_engines
from kvferry.engines.trtllm import compat, diagnosis, plugin
from kvferry.engines.trtllm.compat import RequestDelta
from kvferry.engines.vllm import diagnosis as of_vllm

OLD = "tensorrt_llm._torch.pyexecutor.kv_cache_connector"
NEW = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"


@dataclasses.dataclass
class First:
    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int


@dataclasses.dataclass
class Later(First):
    num_scheduled_tokens: int = 0


class Worker:
    pass


class LayoutWorker:
    def register_kv_cache_layout(self, layout: object) -> None:
        pass


def play(monkeypatch: pytest.MonkeyPatch, name: str, data: type, worker: type) -> ModuleType:
    """Install a TensorRT-LLM that has nothing but the interface's module."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:count]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    root: Any = sys.modules["tensorrt_llm"]
    root.__version__, root.mpi_rank = "1.9.9", lambda: 3
    played: Any = sys.modules[name]
    played.RequestData, played.KvCacheConnectorWorker = data, worker
    return module


@pytest.mark.parametrize(
    ("name", "data", "worker", "dialect"),
    [
        (OLD, First, Worker, "1.1"),
        (OLD, Later, Worker, "1.2"),
        (NEW, Later, Worker, "1.3"),
        (NEW, Later, LayoutWorker, "v2"),
    ],
)
def test_a_dialect_is_told_by_what_the_interface_has(
    monkeypatch: pytest.MonkeyPatch, name: str, data: type, worker: type, dialect: str
) -> None:
    module = play(monkeypatch, name, data, worker)
    assert compat.interface() is module
    assert compat.installed() == ("1.9.9", dialect)
    assert compat.mpi_rank() == 3


def test_the_newer_place_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, OLD, Later, Worker)
    module = play(monkeypatch, NEW, Later, Worker)
    assert compat.interface() is module


def test_without_an_interface_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"1\.1 or newer"):
        compat.interface()
    play(monkeypatch, "tensorrt_llm._torch", First, Worker)
    with pytest.raises(ImportError, match=r"1\.1 or newer"):
        compat.interface()


def test_what_the_interface_itself_misses_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ModuleNotFoundError('no tensorrt', name='tensorrt')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no tensorrt"):
        compat.interface()


def test_a_step_is_told_in_one_form_for_all_dialects() -> None:
    new = First(7, [1, 2, 3], [4, 5], 32)
    cached = Later(8, [9], [], 40, num_scheduled_tokens=1)
    deltas = list(compat.request_deltas(SimpleNamespace(new_requests=[new], cached_requests=[cached])))
    assert deltas == [
        RequestDelta(7, True, [1, 2, 3], [4, 5], 32, 0),
        RequestDelta(8, False, [9], (), 40, 1),
    ]
    assert list(compat.request_deltas(SimpleNamespace())) == []


@pytest.mark.parametrize(
    ("groups", "pages"), [([[6, 7]], [6, 7]), ({0: [6, 7]}, [6, 7]), ([[6], [7]], []), ([], [])]
)
def test_pages_of_the_one_layer_group_count(groups: object, pages: list[int]) -> None:
    data = SimpleNamespace(
        request_id=1,
        new_tokens=None,
        new_block_ids=[],
        computed_position=0,
        new_block_ids_by_layer_group=groups,
    )
    (delta,) = compat.request_deltas(SimpleNamespace(new_requests=[data]))
    assert (list(delta.pages), list(delta.tokens)) == (pages, [])


def test_salts_are_kept_as_they_are_and_numbers_are_nobody_elses() -> None:
    text, number, other = (
        SimpleNamespace(cache_salt="7"),
        SimpleNamespace(cache_salt_id=7),
        SimpleNamespace(cache_salt=None, cache_salt_id=0),
    )
    assert compat.cache_salt(text) == "7"
    assert compat.cache_salt(SimpleNamespace()) == ""
    assert compat.cache_salt(SimpleNamespace(cache_salt=None, cache_salt_id=None)) == ""
    assert len({compat.cache_salt(request) for request in (text, number, other)}) == 3


@pytest.mark.parametrize(
    ("request_", "honoured"),
    [
        (SimpleNamespace(), 64),
        (SimpleNamespace(py_num_connector_matched_tokens=32), 32),
        (SimpleNamespace(num_connector_matched_tokens=32), 32),
        (SimpleNamespace(num_connector_matched_tokens=lambda: 32), 32),
        (SimpleNamespace(py_num_connector_matched_tokens=None, num_connector_matched_tokens=0), 0),
        (SimpleNamespace(py_num_connector_matched_tokens=128), 64),
        (SimpleNamespace(py_num_connector_matched_tokens=-1), 0),
    ],
)
def test_no_more_is_honoured_than_was_offered(request_: object, honoured: int) -> None:
    assert compat.honoured_tokens(request_, 64) == honoured


def test_a_fact_may_be_a_property_or_a_method() -> None:
    class Bound:
        is_dummy_request = False

        def is_generation_only_request(self) -> bool:
            return True

    assert compat.fact(Bound(), "is_generation_only_request") is True
    assert compat.fact(Bound(), "is_dummy_request") is False
    assert compat.fact(Bound(), "prompt_len") is None


SOURCES = {
    "1.1": (OLD, "class RequestData: ...\nclass KvCacheConnectorWorker: ..."),
    "1.2": (OLD, "class RequestData:\n    num_scheduled_tokens: int"),
    "1.3": (NEW, "class RequestData:\n    num_scheduled_tokens: int"),
    "v2": (NEW, "class KvCacheConnectorWorker:\n    def register_kv_cache_layout(self, layout): ..."),
    "": ("tensorrt_llm.other", ""),
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Put the files of a TensorRT-LLM where they are found; importing any of them fails."""
    version = metadata.version

    def put(dialect: str) -> None:
        name, source = SOURCES[dialect]
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True)
        (tmp_path / "tensorrt_llm" / "__init__.py").write_text("raise SystemExit('imported')")
        path.write_text(f"raise SystemExit('imported')\n{source}")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(
            metadata, "version", lambda name: "1.2.1" if name == "tensorrt_llm" else version(name)
        )

    return put


@pytest.mark.parametrize("dialect", ["1.1", "1.2", "1.3", "v2"])
def test_doctor_names_version_and_dialect_without_importing(
    install: Callable[[str], None], dialect: str
) -> None:
    install(dialect)
    first, *others = plugin.kvferry_doctor_findings()
    assert (first.level, first.topic) == ("warn", "tensorrt-llm")
    assert f"TensorRT-LLM 1.2.1, connector interface {dialect};" in first.text
    assert {finding.topic for finding in others} == {"not cached"}
    assert "tensorrt_llm" not in sys.modules


def test_doctor_minds_a_release_without_the_interface(install: Callable[[str], None]) -> None:
    install("")
    (finding,) = diagnosis.findings()
    assert (finding.level, finding.hint) == ("error", "use TensorRT-LLM 1.1 or newer")


def test_doctor_misses_an_engine_only_where_there_is_none(install: Callable[[str], None]) -> None:
    (without,) = of_engines.findings()
    assert (without.level, without.topic) == ("warn", "engine")
    install("1.3")
    assert {finding.topic for finding in of_engines.findings()} == {"cuda"}


def test_doctor_says_nothing_where_there_is_none() -> None:
    assert diagnosis.findings() == of_vllm.findings() == []
