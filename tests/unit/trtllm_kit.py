"""An engine of TensorRT-LLM in small: the connector's classes on a played interface, real copies between numpy pages.

The test is the scheduler: it says which requests a step holds and what they are given.
"""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvferry.engines.trtllm as package
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import HostStaging
from kvferry.engines.trtllm import worker as worker_module
from kvferry.engines.trtllm.plan import StepPlan

PAGE = 4
BLOCK = 8
HEADS, HEAD_DIM, LAYERS, NUM_PAGES = 2, 8, 2, 32
DEADLINE_S = 10.0
PROMPT = list(range(100, 100 + 3 * BLOCK + 2))
COVERED = 3 * BLOCK
"""Tokens of the prompt that can be loaded."""
PAGES = list(range(7))
OTHERS = list(range(10, 17))
MODEL = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "hidden_size": HEADS * HEAD_DIM,
    "torch_dtype": "bfloat16",
}
INTERFACE = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"


class Scheduler:
    def __init__(self, llm_args: object) -> None:
        self._llm_args = llm_args


class Worker:
    def __init__(self, llm_args: object) -> None:
        self._metadata: object = None

    def bind_connector_meta(self, metadata: object) -> None:
        self._metadata = metadata

    def register_kv_cache_layout(self, layout: object) -> None: ...


class NumpyPages:
    """One rank's pages, ``[pages, layers, K and V, heads * tokens * dim]`` in bytes."""

    is_on_gpu = False
    layers: Sequence[Any] = ()

    def __init__(self, shard: Shard) -> None:
        self.content = np.zeros((NUM_PAGES, LAYERS, 2, shard.num_heads * PAGE * HEAD_DIM * 2), np.uint8)

    def staging(self, layout: BlockLayout, shard: Shard, *_: object) -> HostStaging:
        page, layer, kv, _ = self.content.strides
        vector = HEAD_DIM * 2
        described = PageLayout(
            num_pages=NUM_PAGES,
            page_tokens=PAGE,
            num_heads=shard.num_heads,
            head_bytes=vector,
            kv_factor=2,
            layer_offsets=tuple(layer * index for index in range(LAYERS)),
            page_stride=page,
            head_stride=vector * PAGE,
            token_stride=vector,
            kv_stride=kv,
        )
        return HostStaging(self.content.reshape(-1), described, layout, shard)


class Request:
    """What a binding shows of a request."""

    def __init__(self, request_id: int, tokens: Sequence[int], **facts: Any) -> None:
        self.request_id = request_id
        self.tokens = list(tokens)
        self.prompt_len = len(tokens)
        self.max_new_tokens = 16
        self.__dict__.update(facts)

    def get_tokens(self, beam: int) -> list[int]:
        return list(self.tokens)


def delta(
    request: Request, tokens: Sequence[int], pages: Sequence[int], computed: int, scheduled: int
) -> Any:
    """Return a ``RequestData``."""
    return SimpleNamespace(
        request_id=request.request_id,
        new_tokens=list(tokens),
        new_block_ids=list(pages),
        computed_position=computed,
        num_scheduled_tokens=scheduled,
    )


class Runtime:
    """The leader and its ranks.

    Args:
        connector: The module with the classes.
        llm_args: The engine's arguments.
        pages: Where each rank's, when it registers them, are appended.
        set_rank: Told which rank acts.
    """

    def __init__(
        self, connector: Any, llm_args: object, pages: list[NumpyPages], set_rank: Callable[[int], None]
    ) -> None:
        before = len(pages)
        self.leader = connector.KVFerryScheduler(llm_args)
        self.workers = []
        for rank in range(llm_args.tensor_parallel_size):  # type: ignore[attr-defined]
            set_rank(rank)
            self.workers.append(connector.KVFerryWorker(llm_args))
            self.workers[-1].register_kv_caches(None)
        self.pages = pages[before:]
        self.side = self.leader._side
        self.plan = StepPlan()

    def step(self, *new: Any, cached: Sequence[Any] = (), forward: Callable[[], None] | None = None) -> None:
        """Run one iteration but its poll. Without new or cached requests there is no forward pass."""
        output = SimpleNamespace(new_requests=list(new), cached_requests=list(cached))
        self.plan = self.leader.build_connector_meta(output)
        for worker in self.workers:
            worker.bind_connector_meta(pickle.loads(pickle.dumps(self.plan)))  # noqa: S301  # as the engine does
            worker.start_load_kv(None)
        if new or cached:
            if forward is not None:
                forward()
            for worker in self.workers:
                worker.wait_for_layer_load(0, None)
                worker.save_kv_layer(0, None)
                worker.wait_for_save(None)

    def poll(
        self, saved: Sequence[int] = (), loading: Sequence[int] = ()
    ) -> list[tuple[list[int], list[int]]]:
        """Poll every rank once, in turn; return what each answers."""
        return [worker.get_finished(list(saved), list(loading)) for worker in self.workers]

    def poll_until(self, saved: Sequence[int] = (), loading: Sequence[int] = ()) -> None:
        """Hand ids out and poll until every rank has answered each once."""
        open_ids = [(set(saved), set(loading)) for _ in self.workers]
        handed: tuple[Sequence[int], Sequence[int]] = (saved, loading)
        end = time.monotonic() + DEADLINE_S
        while any(kind for of_rank in open_ids for kind in of_rank):
            assert time.monotonic() < end, open_ids
            for of_rank, answers in zip(open_ids, self.poll(*handed), strict=True):
                for kind, answer in zip(of_rank, answers, strict=True):
                    for answered in answer:
                        kind.remove(answered)
            handed = ((), ())

    def poll_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end
            assert all(answer == ([], []) for answer in self.poll())

    def warm_up(self) -> None:
        """Have every rank report that it is there, and the leader take it in."""
        self.step()
        self.poll()
        self.poll()

    def write(self, pages: Sequence[int], seed: int) -> None:
        """Let a forward pass fill pages."""
        for rank, of_rank in enumerate(self.pages):
            for index, page in enumerate(pages):
                random = np.random.default_rng([seed, rank, index])
                of_rank.content[page] = random.integers(0, 256, of_rank.content[page].shape, np.uint8)

    def holds(self, pages: Sequence[int], seed: int) -> bool:
        """Tell whether pages hold what ``write`` with this seed put into as many."""
        for rank, of_rank in enumerate(self.pages):
            for index, page in enumerate(pages):
                random = np.random.default_rng([seed, rank, index])
                expected = random.integers(0, 256, of_rank.content[page].shape, np.uint8)
                if not np.array_equal(of_rank.content[page], expected):
                    return False
        return True

    def cold(self, request: Request, pages: Sequence[int], seed: int) -> None:
        """Compute a request's prompt, save it, and end the request."""
        assert self.leader.get_num_new_matched_tokens(request, 0) == (0, False)
        self.leader.update_state_after_alloc(request, list(pages))
        count = request.prompt_len
        self.step(delta(request, request.tokens, pages, 0, count), forward=lambda: self.write(pages, seed))
        self.end(request, pages)

    def end(self, request: Request, pages: Sequence[int]) -> None:
        if self.leader.request_finished(request, list(pages)):
            self.poll_until(saved=[request.request_id])
        else:
            self.poll()

    def close(self) -> None:
        for worker in self.workers:
            if worker._side is not None:
                worker._side.close()
        if self.side is not None:
            self.side.close()


def play_interface(monkeypatch: pytest.MonkeyPatch, set_to: dict[str, int]) -> Any:
    """Play ``tensorrt_llm`` and return the connector's module, imported upon it."""
    names = INTERFACE.split(".")
    for end in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:end]), ModuleType(".".join(names[:end])))
    root: Any = sys.modules["tensorrt_llm"]
    root.mpi_rank = lambda: set_to["rank"]
    root.__version__ = "1.3.0"
    module: Any = sys.modules[INTERFACE]
    module.KvCacheConnectorScheduler, module.KvCacheConnectorWorker = Scheduler, Worker
    monkeypatch.delitem(sys.modules, "kvferry.engines.trtllm.connector", raising=False)
    return importlib.import_module("kvferry.engines.trtllm.connector")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Runtime]]:
    """Yield what makes engines: ``make(ranks, config text, **llm_args)``."""
    rank = {"rank": 0}
    connector = play_interface(monkeypatch, rank)
    pages: list[NumpyPages] = []

    def pool(_: object, layout: BlockLayout, shard: Shard, tokens: int) -> NumpyPages:
        pages.append(NumpyPages(shard))
        return pages[-1]

    monkeypatch.setattr(worker_module, "pool_pages", pool)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    made: list[Runtime] = []

    def make(ranks: int = 1, config: str = "", **llm_args: Any) -> Runtime:
        file = tmp_path / f"kvferry{len(made)}.toml"
        always = f"block_tokens = {BLOCK}\nself_test = false\n"
        file.write_text(
            f"{always}{config}\n[host]\ncapacity = '1MiB'\n[explain]\ndirectory = '{tmp_path}/explain'\n"
        )
        monkeypatch.setenv("TLLM_KVFERRY_CONFIG", str(file))
        args = SimpleNamespace(
            model=str(tmp_path),
            tensor_parallel_size=ranks,
            kv_cache_config=SimpleNamespace(tokens_per_block=PAGE, enable_block_reuse=True),
            disable_overlap_scheduler=True,
        )
        args.__dict__.update(llm_args)
        runtime = Runtime(connector, args, pages, lambda number: rank.update(rank=number))
        rank["rank"] = 0
        made.append(runtime)
        return runtime

    yield make
    for runtime in made:
        runtime.close()
    del sys.modules[connector.__name__], package.connector
