"""The event loop, one iteration at a time: the test is the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from standin.allocator import Allocator
from standin.batch import Batches
from standin.calls import Calls
from standin.failures import ContractBroken, EngineDied
from standin.forward import Forward, Run
from standin.interface import Interface
from standin.manager import Waiting
from standin.model import HashModel, Scope
from standin.options import EngineOptions, llm_args
from standin.pool import Pool
from standin.requests import LlmRequest, Phase, Sequence, State

__all__ = ["Engine", "Outcome"]

_IDLE_S = 0.0005


@dataclass(frozen=True)
class Outcome:
    """How a request ended: ``finished``, ``cancelled`` or ``failed``."""

    status: str
    tokens: list[int]


class Engine:
    """An engine with a connector.

    Args:
        interface: The release line.
        scheduler: The connector's class for the leader.
        worker: Its class for ranks.
        options: What is played.
        arguments: The engine's; made from ``options`` if left out.
    """

    def __init__(
        self,
        interface: Interface,
        scheduler: type[Any],
        worker: type[Any],
        options: EngineOptions,
        arguments: object = None,
    ) -> None:
        if options.is_v2 and interface.dialect != "v2":
            raise ValueError("only the newest dialect has the second cache manager")
        self._interface = interface
        self.options = options
        self.pools = [
            Pool(
                options.model,
                options.heads(rank),
                options.num_pages,
                options.page_tokens,
                is_v2=options.is_v2,
            )
            for rank in range(options.ranks)
        ]
        self.allocator = Allocator(options.num_pages, reuses=options.reuse)
        self._calls = Calls(interface, scheduler, worker, arguments or llm_args(options), options, self.pools)
        self._calls.describe = self._whose
        self.transcript = self._calls.transcript
        self._forward = Forward(options, self.pools, self._calls)
        self._batches = Batches(interface, options, self.allocator, self._calls)
        self._loads = Waiting("loaded", options.ranks)
        self._saves = Waiting("saved", options.ranks)
        self.sequences: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._in_flight: list[tuple[Sequence, int]] = []
        """In the overlap loop: what was sampled in the pass before, and the host does not know."""
        self.outcomes: dict[int, Outcome] = {}
        self.died: EngineDied | None = None
        self.failures: list[Exception] = []
        """What a forward pass ended with; the engine went on."""
        self._calls.warm_up()

    @property
    def leader(self) -> Any:
        return self._calls.leader

    @property
    def workers(self) -> list[Any]:
        return self._calls.workers

    def submit(
        self, prompt: list[int], wanted: int = 2, scope: Scope | None = None, request_id: int | None = None
    ) -> int:
        """Queue a request and return its id."""
        scope = scope or Scope()
        request_id = len(self.sequences) + 1 if request_id is None else request_id
        request = LlmRequest(request_id, prompt, wanted, scope)
        if self._interface.has_salt_text:
            request.cache_salt = scope.salt or None
        elif scope.salt:
            request.cache_salt_id = int.from_bytes(scope.salt.encode(), "big")
        else:
            request.cache_salt_id = None
        sequence = Sequence(request, scope, list(prompt), wanted)
        self.sequences[request_id] = sequence
        self._waiting.append(sequence)
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request in the next iteration, wherever it is then."""
        self.sequences[request_id].is_cancelled = True

    def replay(self, request_id: int) -> None:
        """Take a running request's pages at the next iteration and begin it anew, as the second manager does."""
        assert self.options.is_v2
        self.sequences[request_id].wants_replay = True

    def step(self) -> bool:
        """Run one iteration; tell whether there was anything to compute.

        Raises:
            EngineDied: The loop ended, now or before.
            ContractBroken: The connector broke a rule.
        """
        if self.died is not None:
            raise self.died
        try:
            return self._iterate()
        except EngineDied as error:
            self.died = error
            raise

    def run_until(self, condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
        """Iterate until something holds."""
        end = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() >= end:
                phases = {request_id: one.phase.name for request_id, one in self.sequences.items()}
                raise AssertionError(f"after {deadline_s:g} s it does not hold yet; requests: {phases}")
            if not self.step():
                time.sleep(_IDLE_S)

    def run(self, deadline_s: float = 20.0) -> None:
        """Iterate until every request has ended and no page is held for one."""
        self.run_until(self.is_idle, deadline_s)

    def is_idle(self) -> bool:
        return not self._in_flight and all(one.phase is Phase.OVER for one in self.sequences.values())

    def answer(self, prompt: list[int], wanted: int = 2, scope: Scope | None = None) -> list[int]:
        """Run one request to its end and return its tokens."""
        request_id = self.submit(prompt, wanted, scope)
        self.run()
        assert self.outcomes[request_id].status == "finished", self.failures
        return self.outcomes[request_id].tokens

    def expected(self, request_id: int) -> list[int]:
        """Return what a request's answer must be, if the model is one by hashes."""
        sequence, model = self.sequences[request_id], self.options.model
        assert isinstance(model, HashModel)
        prompt = sequence.tokens[: len(sequence.tokens) - sequence.sampled]
        return model.output(sequence.scope, prompt, sequence.wanted)

    def close(self) -> None:
        self._calls.close()

    def _iterate(self) -> bool:
        self.transcript.iteration += 1
        self._replay()
        batch = self._batches.choose(self._active(), self._waiting)
        runs: list[Run] = []
        if batch:
            self._batches.prepare(batch)
            for sequence in batch:
                if sequence.phase is Phase.LOADING:
                    self._loads.add(sequence.id)
            runs = self._batches.start(batch)
            self._poison()
        sampled = self._run(runs) if runs else []
        if self.options.overlap:
            sampled, self._in_flight = self._in_flight, sampled
        self._land(sampled)
        for sequence in list(self.sequences.values()):
            if sequence.is_cancelled:
                self._cancel(sequence)
        self._poll()
        return bool(runs)

    def _active(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences.values() if sequence.is_active]

    def _poison(self) -> None:
        """Make the pages that changed hands hold nothing, as soon as the engine may write to them."""
        dirty, self.allocator.dirty = self.allocator.dirty, set()
        for pool, loading in zip(self.pools, self._calls.loading, strict=True):
            pool.poison(dirty.difference(*loading.values()))

    def _run(self, runs: list[Run]) -> list[tuple[Sequence, int]]:
        try:
            tokens = self._forward(runs)
        except ContractBroken:
            raise
        except Exception as error:  # noqa: BLE001  # boundary: the forward pass survives what hooks raise
            self.failures.append(error)
            self._fail_all()
            return []
        for run in runs:
            sequence = run.sequence
            sequence.computed = run.end
            sequence.request.context_current_position = min(run.end, sequence.request.prompt_len)
            if self.options.is_v2:
                self._store(sequence, run.end)
            if sequence.id in tokens:
                sequence.phase = Phase.GENERATION
                sequence.request.state = State.GENERATION_IN_PROGRESS
                sequence.tokens.append(tokens[sequence.id])
                sequence.sampled += 1
        return [(run.sequence, tokens[run.sequence.id]) for run in runs if run.sequence.id in tokens]

    def _land(self, sampled: list[tuple[Sequence, int]]) -> None:
        """Tell the host what was sampled, and end who is through."""
        for sequence, token in sampled:
            if not sequence.is_active:
                continue
            sequence.request.append(token)
            sequence.generated.append(token)
            if len(sequence.generated) == sequence.wanted:
                self._end(sequence, "finished")

    def _cancel(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
            sequence.phase = Phase.OVER
            self.outcomes[sequence.id] = Outcome("cancelled", sequence.generated)
        elif sequence.is_active:
            self._end(sequence, "cancelled")

    def _end(self, sequence: Sequence, status: str) -> None:
        self.outcomes[sequence.id] = Outcome(status, sequence.generated)
        sequence.request.state = State.GENERATION_COMPLETE
        if self._calls.finished(sequence):
            sequence.phase = Phase.SAVING
            sequence.request.state = State.DISAGG_CONTEXT_TRANS_IN_PROGRESS
            self._saves.add(sequence.id)
        else:
            self._release(sequence)

    def _fail_all(self) -> None:
        for sequence in self._active():
            if self.options.tells_finish_of_failed:
                self._end(sequence, "failed")
                continue
            self.outcomes[sequence.id] = Outcome("failed", sequence.generated)
            loading = [(of_rank, of_rank.get(sequence.id)) for of_rank in self._calls.loading]
            is_parked = sequence.phase is Phase.LOADING
            self._release(sequence)
            for of_rank, pages in loading:
                if is_parked and pages is not None:
                    # The engine hands the pages out again under the load, which goes on until a rank answers it.
                    of_rank[sequence.id] = pages

    def _release(self, sequence: Sequence) -> None:
        """Take a request's pages. The first cache manager keeps those that count as computed, as it is told."""
        for loading in self._calls.loading:
            loading.pop(sequence.id, None)
        if not self.options.is_v2:
            is_prefill = sequence.computed < sequence.request.prompt_len
            known = sequence.request.get_num_tokens(0) - 1
            self._store(sequence, max(0, min(sequence.computed - is_prefill, known)))
        sequence.phase = Phase.OVER
        self.allocator.release(sequence.pages)

    def _store(self, sequence: Sequence, tokens: int) -> None:
        page_tokens = self.options.page_tokens
        digests = sequence.digests()
        for index in range(tokens // page_tokens):
            self.allocator.store(sequence.pages[index], digests[(index + 1) * page_tokens - 1])

    def _replay(self) -> None:
        asked = [
            one for one in self.sequences.values() if one.wants_replay and one.phase is not Phase.LOADING
        ]
        if asked:
            sampled, self._in_flight = self._in_flight, []
            self._land(sampled)
        again: list[Sequence] = []
        for sequence in asked:
            sequence.wants_replay = False
            if sequence.phase not in (Phase.CONTEXT, Phase.GENERATION):
                continue
            self.allocator.release(sequence.pages)
            request = sequence.request
            request.prompt_len = request.get_num_tokens(0)
            request.context_current_position = 0
            request.state = State.CONTEXT_INIT
            sequence.pages, sequence.local, sequence.computed, sequence.honoured = [], 0, 0, 0
            sequence.was_reported, sequence.pages_reported, sequence.tokens_reported = False, 0, 0
            sequence.phase = Phase.WAITING
            again.append(sequence)
        self._waiting[:0] = again

    def _poll(self) -> None:
        saving, loading = self._saves.hand_out(), self._loads.hand_out()
        for rank in range(self.options.ranks):
            saved, loaded = self._calls.poll(rank, saving, loading)
            self._saves.answered(rank, saved)
            self._loads.answered(rank, loaded)
            for request_id in loaded:
                self._calls.loading[rank].pop(request_id, None)
                sequence = self.sequences[request_id]
                if sequence.phase is Phase.LOADING or (
                    sequence.phase is Phase.SAVING and not self.options.is_v2
                ):
                    self._forward.check_loaded(rank, sequence)
        for request_id in self._loads.done():
            sequence = self.sequences[request_id]
            if sequence.phase is Phase.LOADING:
                sequence.phase = Phase.CONTEXT
                sequence.request.state = State.CONTEXT_INIT
        for request_id in self._saves.done():
            self._release(self.sequences[request_id])

    def _whose(self, page: int) -> str:
        owners = [
            f"request {one.id} ({one.phase.name.lower()}, {one.local} tokens reused)"
            for one in self.sequences.values()
            if page in one.pages and one.phase is not Phase.OVER
        ]
        if owners:
            return f"page {page} of {' and '.join(owners)}"
        return (
            f"page {page}, kept for reuse"
            if self.allocator.is_reusable(page)
            else f"page {page}, which is free"
        )
