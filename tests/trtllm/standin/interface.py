"""The packages that a connector imports, as each release line has them, played by modules of this test."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

__all__ = ["DIALECTS", "Dialect", "Interface", "played"]

Dialect = Literal["1.1", "1.2", "1.3", "v2"]
DIALECTS: tuple[Dialect, ...] = ("1.1", "1.2", "1.3", "v2")

_OLD = "tensorrt_llm._torch.pyexecutor.kv_cache_connector"
_NEW = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"
_VERSIONS = {"1.1": "1.1.0", "1.2": "1.2.1", "1.3": "1.3.0rc29", "v2": "1.4.0rc1"}


class Interface:
    """A release line's connector interface.

    Args:
        dialect: Which.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.rank = 0
        """Which rank's process the code that runs now plays."""
        self.scheduler, self.worker = _base_classes(dialect)
        self._data = _data_classes(dialect)
        self.has_salt_text = dialect in ("1.3", "v2")
        self.has_scheduled_tokens = dialect != "1.1"
        self.includes_matched = dialect == "1.1"
        """Whether a first report's position counts what the connector loads before the pass."""

    def request_data(self, **fields: Any) -> Any:
        """Return a ``RequestData`` of what this line has of the fields."""
        known = self._data["RequestData"].__dataclass_fields__
        return self._data["RequestData"](**{name: value for name, value in fields.items() if name in known})

    def scheduler_output(self, new: list[Any], cached: list[Any]) -> Any:
        return self._data["SchedulerOutput"](new, cached)

    @contextlib.contextmanager
    def as_rank(self, rank: int) -> Iterator[None]:
        """Play a rank's process."""
        before, self.rank = self.rank, rank
        try:
            yield
        finally:
            self.rank = before

    def modules(self) -> dict[str, ModuleType]:
        """Return the packages by name."""
        name = _NEW if self.dialect in ("1.3", "v2") else _OLD
        parts = name.split(".")
        made = {
            ".".join(parts[:count]): ModuleType(".".join(parts[:count])) for count in range(1, len(parts) + 1)
        }
        for module in made.values():
            module.__path__ = []
        root, leaf = made["tensorrt_llm"], made[name]
        root.__dict__.update(__version__=_VERSIONS[self.dialect], mpi_rank=lambda: self.rank)
        leaf.__dict__.update(
            KvCacheConnectorScheduler=self.scheduler, KvCacheConnectorWorker=self.worker, **self._data
        )
        for full, module in made.items():
            parent, _, child = full.rpartition(".")
            if parent:
                setattr(made[parent], child, module)
        return made


@contextlib.contextmanager
def played(dialect: Dialect) -> Iterator[Interface]:
    """Have ``tensorrt_llm`` be importable."""
    interface = Interface(dialect)
    modules = interface.modules()
    assert not sys.modules.keys() & modules.keys(), "one TensorRT-LLM at a time"
    sys.modules.update(modules)
    try:
        yield interface
    finally:
        for name in modules:
            del sys.modules[name]


def _data_classes(dialect: Dialect) -> dict[str, Any]:
    @dataclass
    class OldRequestData:
        request_id: int
        new_tokens: list[int]
        new_block_ids: list[int]
        computed_position: int

    @dataclass
    class CountingRequestData(OldRequestData):
        num_scheduled_tokens: int = 0

    @dataclass
    class SaltedRequestData(CountingRequestData):
        block_hashes: list[int] = field(default_factory=list)
        priorities: list[int] | None = None
        cache_salt: str | None = None

    @dataclass
    class GroupedRequestData(SaltedRequestData):
        new_block_ids_by_layer_group: list[list[int]] = field(default_factory=list)

    @dataclass
    class SchedulerOutput:
        new_requests: list[Any] = field(default_factory=list)
        cached_requests: list[Any] = field(default_factory=list)

    by_dialect = {
        "1.1": OldRequestData,
        "1.2": CountingRequestData,
        "1.3": SaltedRequestData,
        "v2": GroupedRequestData,
    }
    return {"RequestData": by_dialect[dialect], "SchedulerOutput": SchedulerOutput}


def _base_classes(dialect: Dialect) -> tuple[type[Any], type[Any]]:
    class Scheduler(ABC):
        def __init__(self, llm_args: object) -> None:
            self._llm_args = llm_args
            super().__init__()

        @abstractmethod
        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]: ...

        @abstractmethod
        def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None: ...

        @abstractmethod
        def build_connector_meta(self, scheduler_output: Any) -> object: ...

        @abstractmethod
        def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool: ...

    class Worker(ABC):
        def __init__(self, llm_args: object) -> None:
            self._llm_args = llm_args
            self._metadata: object = None
            super().__init__()

        def bind_connector_meta(self, metadata: object) -> None:
            self._metadata = metadata

        def get_connector_meta(self) -> object:
            return self._metadata

        def _clear_connector_meta(self) -> None:
            self._metadata = None

        @abstractmethod
        def register_kv_caches(self, kv_cache_tensor: Any) -> None: ...

        @abstractmethod
        def start_load_kv(self, stream: Any) -> None: ...

        @abstractmethod
        def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None: ...

        @abstractmethod
        def save_kv_layer(self, layer_idx: int, stream: Any) -> None: ...

        @abstractmethod
        def wait_for_save(self, stream: Any) -> None: ...

        @abstractmethod
        def get_finished(
            self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
        ) -> tuple[list[int], list[int]]: ...

    if dialect == "1.1":
        return Scheduler, Worker
    return _since_1_2(Scheduler, Worker, dialect)


def _since_1_2(scheduler: type[Any], worker: type[Any], dialect: Dialect) -> tuple[type[Any], type[Any]]:
    class WaitingScheduler(scheduler):  # type: ignore[misc]
        def wait_for_initialization(self) -> None:
            return

    class CallableWorker(worker):  # type: ignore[misc]
        def register_forward_pass_callable(self) -> Any:
            return None

    if dialect != "v2":
        return WaitingScheduler, CallableWorker

    class GroupedScheduler(WaitingScheduler):
        def update_state_after_alloc_by_layer_group(self, request: Any, block_ids: list[list[int]]) -> None:
            self.update_state_after_alloc(request, _only(block_ids))

        def request_finished_by_layer_group(self, request: Any, block_ids: list[list[int]]) -> bool:
            return bool(self.request_finished(request, _only(block_ids)))

    class LayoutWorker(CallableWorker):
        def register_kv_cache_layout(self, layout: Any) -> None:
            self.register_kv_caches(layout.as_single_pool_tensor())

    return GroupedScheduler, LayoutWorker


def _only(groups: list[list[int]]) -> list[int]:
    if len(groups) != 1:
        raise ValueError("this connector does not know layer groups")
    return groups[0]
