"""Which requests a pass is for, the pages that they get, and what the connector is told of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from standin.allocator import Allocator
from standin.calls import Calls
from standin.forward import Run
from standin.interface import Interface
from standin.options import EngineOptions
from standin.requests import Phase, Sequence, State

__all__ = ["Batches"]


class Batches:
    """Forms batches by the engine's rules: nothing is begun that could not be ended for want of pages."""

    def __init__(
        self, interface: Interface, options: EngineOptions, allocator: Allocator, calls: Calls
    ) -> None:
        self._interface = interface
        self._options = options
        self._allocator = allocator
        self._calls = calls

    def choose(self, active: Iterable[Sequence], waiting: list[Sequence]) -> list[Sequence]:
        """Return the requests that the next pass is for; those that begin are taken out of ``waiting``."""
        active = list(active)
        chosen = [
            sequence
            for sequence in active
            if sequence.phase is Phase.CONTEXT
            or (sequence.phase is Phase.GENERATION and sequence.sampled < sequence.wanted)
        ]
        room = self._allocator.available - sum(
            self._needed(sequence) - len(sequence.pages) for sequence in active
        )
        while waiting and len(active) < self._options.max_batch:
            needed = self._needed(waiting[0])
            if needed > room or waiting[0].is_cancelled:
                break
            room -= needed
            active.append(waiting[0])
            chosen.append(waiting.pop(0))
        return chosen

    def prepare(self, batch: list[Sequence]) -> None:
        """Give pages to a batch, with the connector asked about those that begin."""
        begun = [sequence for sequence in batch if sequence.phase is Phase.WAITING]
        for sequence in begun:
            self._query(sequence)
            if not self._options.is_batched:
                self._allocate(sequence)
        if self._options.is_batched:
            for sequence in begun:
                self._allocate(sequence)
        for sequence in batch:
            if sequence not in begun:
                self._grow(sequence, sequence.computed + self._count(sequence))

    def start(self, batch: list[Sequence]) -> list[Run]:
        """Tell the connector of a batch and have it start loads.

        Returns:
            What the pass computes: nothing of requests that are parked.
        """
        new: list[Any] = []
        cached: list[Any] = []
        runs: list[Run] = []
        for sequence in batch:
            if sequence.phase is Phase.LOADING:
                continue
            (cached if sequence.was_reported else new).append(self._report(sequence))
            runs.append(Run(sequence, sequence.computed, self._count(sequence)))
        self._calls.start_batch(new, cached)
        return runs

    def _query(self, sequence: Sequence) -> None:
        page_tokens = self._options.page_tokens
        request = sequence.request
        if self._options.reuse:
            most = (request.prompt_len - 1) // page_tokens
            ends = sequence.digests()[page_tokens - 1 :: page_tokens][:most]
            sequence.pages = self._allocator.match(ends)
            self._allocator.share(sequence.pages)
        sequence.local = len(sequence.pages) * page_tokens
        if self._options.partial_reuse and sequence.local + 1 < request.prompt_len:
            sequence.local += 1
        offered, sequence.is_async = self._calls.query(sequence, sequence.local)
        sequence.honoured = offered
        if self._options.is_v2 and self._options.honour is not None and offered:
            honoured = min(offered, self._options.honour(sequence.id, offered))
            sequence.honoured = honoured // page_tokens * page_tokens
        sequence.computed = sequence.local + sequence.honoured

    def _allocate(self, sequence: Sequence) -> None:
        request = sequence.request
        request.prepopulated_prompt_len = request.context_current_position = sequence.computed
        if self._interface.dialect == "v2":
            request.py_num_connector_matched_tokens = sequence.honoured
        elif self._interface.dialect == "1.3":
            request.num_connector_matched_tokens = sequence.honoured
        end = request.prompt_len
        if self._options.is_v2:
            end = min(end, sequence.computed + self._count(sequence))
        self._grow(sequence, end)
        sequence.phase = Phase.LOADING if sequence.is_async else Phase.CONTEXT
        if sequence.is_async:
            request.state = State.DISAGG_GENERATION_TRANS_IN_PROGRESS
        self._calls.allocated(sequence)
        first = -(-sequence.local // self._options.page_tokens)
        pages = set(sequence.pages[first : sequence.computed // self._options.page_tokens])
        if sequence.is_async or pages:
            for loading in self._calls.loading:
                loading[sequence.id] = set(pages)

    def _grow(self, sequence: Sequence, tokens: int) -> None:
        missing = -(-tokens // self._options.page_tokens) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self._allocator.take(missing)

    def _count(self, sequence: Sequence) -> int:
        """Return how many tokens the next pass computes of a request."""
        left = len(sequence.tokens) - sequence.computed
        return min(left, self._options.chunk_tokens or left)

    def _needed(self, sequence: Sequence) -> int:
        """Return how many pages a request has at its end."""
        tokens = len(sequence.tokens) + sequence.wanted - sequence.sampled
        return -(-tokens // self._options.page_tokens)

    def _report(self, sequence: Sequence) -> Any:
        request = sequence.request
        tokens = request.get_tokens(0)
        if sequence.phase is Phase.GENERATION:
            position = len(tokens) - 1
        elif sequence.was_reported or sequence.is_async or self._interface.includes_matched:
            position = sequence.computed
        else:
            position = sequence.local
        pages = sequence.pages[sequence.pages_reported :]
        salt = sequence.scope.salt
        data = self._interface.request_data(
            request_id=sequence.id,
            new_tokens=tokens[sequence.tokens_reported :],
            new_block_ids=list(pages),
            computed_position=position,
            num_scheduled_tokens=self._count(sequence),
            cache_salt=salt or None,
            new_block_ids_by_layer_group=[list(pages)] if self._options.is_v2 else [],
        )
        request.context_chunk_size = self._count(sequence)
        request.is_first_context_chunk = not sequence.was_reported
        sequence.was_reported = True
        sequence.tokens_reported, sequence.pages_reported = len(tokens), len(sequence.pages)
        return data
