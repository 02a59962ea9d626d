"""The connector's side of every call: who plays which process, how long it took, what it wrote, what it answered."""

from __future__ import annotations

import contextlib
import gc
import pickle
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from standin.failures import ContractBroken, EngineDied
from standin.interface import Interface
from standin.options import EngineOptions
from standin.pool import Pool
from standin.requests import Sequence
from standin.transcript import Report, Transcript

__all__ = ["STREAM", "Calls"]

STREAM = object()
"""The engine's stream. There is only the host here."""


class Calls:
    """Calls a leader and its ranks, and holds them to the contract.

    Args:
        interface: The release line.
        scheduler: The leader's class.
        worker: The ranks' class.
        arguments: The engine's.
        options: What is played.
        pools: Each rank's pages.
    """

    def __init__(
        self,
        interface: Interface,
        scheduler: type[Any],
        worker: type[Any],
        arguments: object,
        options: EngineOptions,
        pools: list[Pool],
    ) -> None:
        self._interface = interface
        self._options = options
        self._pools = pools
        self.transcript = Transcript()
        self.describe: Callable[[int], str] = lambda page: f"page {page}"
        """Says whose a page is."""
        self.loading: list[dict[int, set[int]]] = [{} for _ in pools]
        """For each rank: the pages that the connector may write, by request."""
        self.workers: list[Any] = []
        with self._fatal("__init__"):
            self.leader: Any = scheduler(arguments)
            for rank in range(options.ranks):
                with interface.as_rank(rank):
                    self.workers.append(worker(arguments))
        self._forward_callables: list[Any] = [None] * options.ranks
        for rank, pool in enumerate(pools):
            self._register(rank, pool)
        if hasattr(self.leader, "wait_for_initialization"):
            with self._fatal("wait_for_initialization"):
                self.leader.wait_for_initialization()

    def query(self, sequence: Sequence, computed: int) -> tuple[int, bool]:
        """Ask what the connector has, and check that it may be promised."""
        before = time.monotonic()
        with self._fatal("get_num_new_matched_tokens"):
            answer = self.leader.get_num_new_matched_tokens(sequence.request, computed)
        self._took("get_num_new_matched_tokens", before, self._options.query_limit_s)
        self.transcript.add("query", sequence.id, computed, answer=answer)
        pickle.dumps(answer)
        if not isinstance(answer, tuple) or len(answer) != 2 or type(answer[0]) is not int:
            raise ContractBroken(
                f"the query was answered {answer!r}, not with tokens and whether they come later"
            )
        tokens, is_async = answer
        if tokens < 0 or tokens % self._options.page_tokens:
            raise ContractBroken(f"{tokens} tokens were offered, which is no number of whole pages")
        if is_async and not tokens:
            raise ContractBroken("nothing was offered, asynchronously")
        if tokens and computed % self._options.page_tokens:
            raise ContractBroken(f"{tokens} tokens were offered behind {computed}, which is inside a page")
        if tokens and computed + tokens >= sequence.request.prompt_len:
            raise ContractBroken(
                f"{tokens} tokens were offered behind {computed}: of a prompt of {sequence.request.prompt_len} "
                "nothing is left to compute"
            )
        return tokens, bool(is_async)

    def allocated(self, sequence: Sequence) -> None:
        """Tell of pages."""
        pages = list(sequence.pages)
        with self._fatal("update_state_after_alloc"):
            if self._options.is_v2:
                self.leader.update_state_after_alloc_by_layer_group(sequence.request, [pages])
            else:
                self.leader.update_state_after_alloc(sequence.request, pages)
        self.transcript.add("alloc", sequence.id, tuple(pages))

    def finished(self, sequence: Sequence) -> bool:
        """Tell that a request is over."""
        pages = list(sequence.pages)
        with self._fatal("request_finished"):
            if self._options.is_v2:
                answer = self.leader.request_finished_by_layer_group(sequence.request, [pages])
            else:
                answer = self.leader.request_finished(sequence.request, pages)
        self.transcript.add("finished", sequence.id, tuple(pages), answer=answer)
        if not isinstance(answer, bool):
            raise ContractBroken(f"request_finished was answered {answer!r}")
        return answer

    def start_batch(self, new: list[Any], cached: list[Any]) -> None:
        """Have the leader plan, and each rank take its own copy of the plan and start loads."""
        output = self._interface.scheduler_output(new, cached)
        told = tuple(map(_report, new)), tuple(map(_report, cached))
        with self._fatal("build_connector_meta"):
            metadata = self.leader.build_connector_meta(output)
        self.transcript.add("meta", *told)
        if metadata is None or (isinstance(metadata, bytes | str | list | dict | tuple) and not metadata):
            raise ContractBroken(f"the metadata is {metadata!r}: ranks cannot tell it from nothing")
        try:
            sent = pickle.dumps(metadata)
        except Exception as error:  # boundary: whatever the connector's objects raise
            raise ContractBroken(f"the metadata cannot be pickled: {error!r}") from error
        for rank in range(self._options.ranks):
            received = pickle.loads(sent)  # noqa: S301  # what this process has written above
            self._rank(rank, "bind_connector_meta", received, logged="bind", told=())
        for rank in range(self._options.ranks):
            self._rank(rank, "start_load_kv", STREAM, logged="start", told=())

    def layer(self, rank: int, name: str, layer: int) -> None:
        """Call a layer's hook; what it raises is the forward pass's."""
        self._rank(rank, name, layer, STREAM, logged=name, told=(layer,), is_fatal=False)

    def end_forward(self, rank: int) -> None:
        """Call what comes behind the layers; what it raises is the forward pass's."""
        if self._forward_callables[rank] is not None:
            with self._interface.as_rank(rank):
                self._forward_callables[rank]()
        self._rank(rank, "wait_for_save", STREAM, logged="wait_for_save", told=(), is_fatal=False)

    def poll(self, rank: int, saving: list[int], loading: list[int]) -> tuple[list[int], list[int]]:
        """Ask a rank what is through."""
        before = time.monotonic()
        told = (tuple(saving), tuple(loading))
        answer = self._rank(
            rank, "get_finished", list(saving), list(loading), logged="get_finished", told=told
        )
        self._took("get_finished", before, self._options.poll_limit_s)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ContractBroken(f"get_finished was answered {answer!r}, not with two lists of ids")
        return list(answer[0]), list(answer[1])

    def warm_up(self) -> None:
        """Run the hooks before anything is bound, as the engine's warm-up does."""
        for rank in range(self._options.ranks):
            self._rank(rank, "start_load_kv", STREAM, logged="start", told=())
            for layer in range(self._options.model.layers):
                for name in ("wait_for_layer_load", "save_kv_layer"):
                    self._rank(rank, name, layer, STREAM, logged=name, told=(layer,))
            self._rank(rank, "wait_for_save", STREAM, logged="wait_for_save", told=())
        self.transcript.calls.clear()

    def check_writes(self, rank: int) -> None:
        """Find writes of the connector that it was not asked for."""
        pool = self._pools[rank]
        changed = pool.changed()
        if not changed:
            return
        allowed = set().union(*self.loading[rank].values())
        wrong = sorted(changed - allowed)
        if wrong:
            whose = ", ".join(
                self.describe(page) if page >= 0 else "the room between pages" for page in wrong
            )
            raise ContractBroken(f"rank {rank} wrote where no load of its was under way: {whose}")
        pool.adopt(changed)

    def close(self) -> None:
        """Let go of the connector, which is all the engine does: there is no hook for its end."""
        ended = [weakref.ref(side) for side in (*self.workers, self.leader) if side is not None]
        self.workers.clear()
        self.leader = None
        self._forward_callables.clear()
        if any(side() is not None for side in ended):
            gc.collect()

    def _register(self, rank: int, pool: Pool) -> None:
        with self._interface.as_rank(rank), self._fatal("register_kv_caches"):
            worker = self.workers[rank]
            if hasattr(worker, "register_forward_pass_callable"):
                self._forward_callables[rank] = worker.register_forward_pass_callable()
            if pool.layout is not None:
                worker.register_kv_cache_layout(pool.layout)
            else:
                worker.register_kv_caches(pool.tensor)
        pool.poison(range(pool.num_pages))

    def _rank(
        self, rank: int, name: str, *arguments: Any, logged: str, told: Iterable[Any], is_fatal: bool = True
    ) -> Any:
        with self._interface.as_rank(rank), self._fatal(name) if is_fatal else contextlib.nullcontext():
            answer = getattr(self.workers[rank], name)(*arguments)
        self.transcript.add(logged, *told, answer=answer, rank=rank)
        self.check_writes(rank)
        return answer

    @contextlib.contextmanager
    def _fatal(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # boundary: where the engine has none
            raise EngineDied(f"{name} raised, which nobody catches: {error!r}") from error

    def _took(self, name: str, since: float, limit_s: float) -> None:
        took = time.monotonic() - since
        if took > limit_s:
            raise ContractBroken(f"{name} took {took:.3f} s; more than {limit_s:g} s stand everybody still")


def _report(data: Any) -> Report:
    return Report(
        id=data.request_id,
        tokens=len(data.new_tokens),
        pages=tuple(data.new_block_ids),
        position=data.computed_position,
        scheduled=getattr(data, "num_scheduled_tokens", None),
    )
