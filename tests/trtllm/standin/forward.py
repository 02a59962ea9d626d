"""The forward pass: what the model reads from pages, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from standin.calls import Calls
from standin.failures import ContractBroken
from standin.model import Bytes
from standin.options import EngineOptions
from standin.pool import Pool
from standin.requests import Sequence

__all__ = ["Forward", "Run"]


@dataclass(frozen=True)
class Run:
    """What one request does in one pass."""

    sequence: Sequence
    start: int
    """The first token that is computed."""
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class Forward:
    """Runs the model over all ranks' pages, with the connector's hooks around each layer."""

    def __init__(self, options: EngineOptions, pools: list[Pool], calls: Calls) -> None:
        self._options = options
        self._pools = pools
        self._calls = calls

    def __call__(self, runs: list[Run]) -> dict[int, int]:
        """Run a batch.

        Returns:
            What was sampled, by request: of those that computed all their tokens.
        """
        expected = {run.sequence.id: self._expected(run.sequence, run.end) for run in runs}
        for rank, pool in enumerate(self._pools):
            for layer in range(self._options.model.layers):
                self._calls.layer(rank, "wait_for_layer_load", layer)
                if layer == self._options.model.layers - 1:
                    self._end_sync_loads(rank, runs)
                for run in runs:
                    self._check(rank, layer, run, expected[run.sequence.id])
                    self._write(pool, layer, run, expected[run.sequence.id])
                self._calls.layer(rank, "save_kv_layer", layer)
            self._calls.end_forward(rank)
        return {
            run.sequence.id: self._options.model.next_token(run.sequence.tokens, self._attended(run))
            for run in runs
            if run.end == len(run.sequence.tokens)
        }

    def check_loaded(self, rank: int, sequence: Sequence) -> None:
        """Hold what a rank says is loaded against the model."""
        expected = self._expected(sequence, sequence.computed)
        run = Run(sequence, sequence.computed, 0)
        for layer in range(self._options.model.layers):
            self._check(rank, layer, run, expected)

    def _end_sync_loads(self, rank: int, runs: list[Run]) -> None:
        for run in runs:
            if not run.sequence.is_async:
                self._calls.loading[rank].pop(run.sequence.id, None)

    def _expected(self, sequence: Sequence, count: int) -> Bytes:
        """Return the KV of the first tokens: ``[tokens, layers, kv_factor, heads, bytes]``."""
        return self._options.model.kv(sequence.scope, sequence.tokens[:count])

    def _check(self, rank: int, layer: int, run: Run, expected: Bytes) -> None:
        pool, sequence = self._pools[rank], run.sequence
        bound = sequence.local - sequence.local % self._options.page_tokens
        first = bound if run.start == sequence.local != bound else run.start
        if not self._options.checks_bytes or not first:
            return
        held = pool.read(layer, sequence.pages, first)
        right = expected[:first, layer, :, pool.heads.start : pool.heads.stop]
        if np.array_equal(held, right):
            return
        wrong = np.flatnonzero((held != right).any(axis=(1, 2, 3)))
        token = int(wrong[0])
        source = "reused" if token < sequence.local else "loaded or computed"
        raise ContractBroken(
            f"rank {rank}, layer {layer}: request {sequence.id} reads wrong bytes of {len(wrong)} of {first} {source} "
            f"tokens, from token {token} on, in page {sequence.pages[token // self._options.page_tokens]}"
        )

    def _write(self, pool: Pool, layer: int, run: Run, expected: Bytes) -> None:
        page_tokens = self._options.page_tokens
        start = run.start
        if start == run.sequence.local:
            start -= start % page_tokens  # a device match that ended inside a page was copied into this one
        for token in range(start, run.end):
            page = run.sequence.pages[token // page_tokens]
            pool.write(layer, page, token % page_tokens, expected[token, layer])

    def _attended(self, run: Run) -> Bytes:
        """Return all KV bytes up to the last token, as they lie in the pages of all ranks."""
        model = self._options.model
        shape = (run.end, model.layers, model.kv_factor, model.kv_heads, model.head_dim * model.itemsize)
        attended = np.empty(shape, np.uint8)
        for pool in self._pools:
            for layer in range(model.layers):
                read = pool.read(layer, run.sequence.pages, run.end)
                attended[:, layer, :, pool.heads.start : pool.heads.stop] = read
        return attended
