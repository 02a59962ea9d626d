"""What a handoff costs beside the transfer itself: claiming, comparing checksums, and checking the lease.

Two played ranks in one process; side channel, lease table, transport and digests are the real ones. A whole handoff is
timed against the transport alone, which moves the same pages, in turn within one run.
"""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec
import numpy as np

from kvferry.connector.bench.case import BenchCase, BenchContext, BenchSkipped, Figure, Goal
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.config import PeerConfig
from kvferry.connector.errors import HandoffFailed
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.staging import HostStaging
from kvferry.connector.transport import (
    Heads,
    PageMemory,
    PageStaging,
    TransportContext,
    TransportType,
    narrow,
    page_block,
)
from kvferry.engines.handoff.exporting import PageExports, export_pages
from kvferry.engines.handoff.reading import PeerReads
from kvferry.engines.handoff.side_channel import SideChannel
from kvferry.engines.handoff.table import Handed, HandoffTable
from kvferry.engines.jobs import ExportJob, PeerRead, PeerSource

__all__ = ["HANDOFF_CHECKS"]

_MIB = 1 << 20
_BLOCK = BlockLayout(num_layers=32, num_kv_heads=8, block_tokens=16, head_dim=128, itemsize=2)
"""2 MiB: a page of an 8B model."""
_SIZES_MIB = (16, 64)
_REPETITIONS = 15
_PEER = PeerConfig(transport="nixl", lease_s=600.0, deadline_s=60.0)
_DEADLINE_S = 60.0
_SHARD = Shard(0, 0, _BLOCK.num_kv_heads, True)
_FINGERPRINT = bytes(32)
_TOKEN = secrets.token_hex(16)
_GOAL = Goal(0.9, at_least=True)


def _measure(context: BenchContext) -> Sequence[Figure]:
    sizes = _SIZES_MIB[:1] if context.quick else _SIZES_MIB
    transport = PluginRegistry().transports().get("nixl")
    why_not = transport.unusable(_memory(1)) if transport is not None else "no plugin offers it"
    if transport is None or why_not:
        raise BenchSkipped(f"the nixl transport cannot be used: {why_not}")
    figures: list[Figure] = []
    for index, size in enumerate(sizes):

        def progress(part: float, done: int = index) -> None:
            context.progress((done + part) / len(sizes))

        with _two_ranks(transport, size * _MIB // _BLOCK.payload_bytes) as ranks:
            sides = {"alone": ranks.transfer, "checked": ranks.checked, "unchecked": ranks.unchecked}
            seconds = interleaved(sides, 2 if context.quick else _REPETITIONS, progress)
        figures += [
            Figure(
                name=f"handoff of {size} MiB, {what}",
                value=size * _MIB / seconds[side] / 1e9,
                unit="GB/s",
                raw=size * _MIB / seconds["alone"] / 1e9,
                raw_name="the transport alone",
                goal=_GOAL,
                note="claim, read, check of the lease",
            )
            for side, what in (("unchecked", "without checksums"), ("checked", "with checksums"))
        ]
    return figures


class _Ranks:
    """A rank that hands over, and two that take: with checksums and without.

    Args:
        memory: Pages that are read into.
        source: Where the other rank's are.
        reads: The rank that compares checksums, and the one that does not.
        exports: What is read.
        transport: Moves them.
    """

    def __init__(
        self,
        memory: PageMemory,
        source: PeerSource,
        reads: tuple[PeerReads, PeerReads],
        exports: PageExports,
        transport: TransportType,
    ) -> None:
        self._pages = np.arange(memory.layout.num_pages, dtype=np.int32)
        self._source = source
        self._checked, self._unchecked = reads
        deadline = time.monotonic() + _DEADLINE_S
        offer = exports.pages.offers[transport.name]
        self.reader = transport.connect(exports.pages, offer, memory, _context("alone"), deadline)

    def transfer(self, repetition: int) -> None:
        """Move the pages, and nothing else."""
        self.reader.read(self._pages, self._pages, time.monotonic() + _DEADLINE_S)

    def checked(self, repetition: int) -> None:
        """A whole handoff."""
        self._hand_over(self._checked)

    def unchecked(self, repetition: int) -> None:
        """A whole handoff but for the checksums."""
        self._hand_over(self._unchecked)

    def _hand_over(self, reads: PeerReads) -> None:
        answers: queue.SimpleQueue[HandoffFailed | None] = queue.SimpleQueue()
        tokens = self._source.num_tokens
        pages = tuple(self._pages.tolist())
        read = PeerRead(self._source, "bench", tokens, _FINGERPRINT, _content(tokens), 0, pages)
        reads.submit(read, lambda failure, moved, seconds: answers.put(failure))
        failure = answers.get(timeout=_DEADLINE_S)
        if failure is not None:
            raise failure


@contextmanager
def _two_ranks(transport: TransportType, num_pages: int) -> Iterator[_Ranks]:
    with ExitStack() as stack:
        given, taken = _memory(num_pages), _memory(num_pages)
        exports = export_pages(given, [transport], _context("giver"), is_digested=True)
        if exports is None:
            raise BenchSkipped("the nixl transport cannot export; see the log")
        stack.callback(exports.close)
        table = HandoffTable(_PEER.lease_s)
        channel = SideChannel(_PEER, _TOKEN, _FINGERPRINT, "giver", table)
        channel.set_ranks([exports.pages])
        channel.start()
        stack.callback(channel.close, 1.0)
        host, port = channel.address
        tokens, pages = num_pages * _BLOCK.block_tokens, tuple(range(num_pages))
        seq = table.hand_over(Handed("request", pages, tokens, _content), time.monotonic())
        exports.submit([ExportJob(seq, pages)])
        _publish(exports, table)
        readers = [
            PeerReads(
                taken,
                {transport.name: transport},
                _context(f"taker-{verify}"),
                msgspec.structs.replace(_PEER, verify=verify),
            )
            for verify in (True, False)
        ]
        for reads in readers:
            stack.callback(reads.close)
        source = PeerSource(host, port, "giver", "request", tokens)
        ranks = _Ranks(taken, source, (readers[0], readers[1]), exports, transport)
        stack.callback(ranks.reader.close)
        yield ranks


def _publish(exports: PageExports, table: HandoffTable) -> None:
    """Wait for the digests and put them where readers ask."""
    end = time.monotonic() + _DEADLINE_S
    while not (digests := exports.take_digests()):
        if time.monotonic() > end:
            raise TimeoutError("the pages were not digested in time")
        time.sleep(0.001)
    for seq, by_rank in digests.items():
        for rank, data in by_rank.items():
            table.set_digests(seq, rank, data)


def _memory(num_pages: int) -> PageMemory:
    """Return pages ``[layer][page][head][token][k_or_v]``, as vLLM keeps them."""
    pages = np.full(num_pages * _BLOCK.payload_bytes, 7, np.uint8)
    head_bytes = _BLOCK.head_dim * _BLOCK.itemsize
    page_stride = _BLOCK.num_kv_heads * _BLOCK.run_bytes
    layout = PageLayout(
        num_pages=num_pages,
        page_tokens=_BLOCK.block_tokens,
        num_heads=_BLOCK.num_kv_heads,
        head_bytes=head_bytes,
        kv_factor=_BLOCK.kv_factor,
        layer_offsets=tuple(layer * num_pages * page_stride for layer in range(_BLOCK.num_layers)),
        page_stride=page_stride,
        head_stride=_BLOCK.run_bytes,
        token_stride=_BLOCK.token_bytes,
        kv_stride=head_bytes,
    )

    def stage(heads: Heads) -> PageStaging:
        one_page = page_block(_BLOCK, layout.page_tokens, heads)
        return HostStaging(pages, narrow(layout, _SHARD, heads), one_page, Shard(0, 0, heads.count, True))

    return PageMemory(
        address=pages.ctypes.data,
        nbytes=pages.nbytes,
        device="cpu",
        device_id=0,
        layout=layout,
        block=_BLOCK,
        shard=_SHARD,
        stage=stage,
    )


def _context(name: str) -> TransportContext:
    return TransportContext(host="127.0.0.1", advertised="127.0.0.1", token=_TOKEN, name=f"bench-{name}")


def _content(num_tokens: int) -> bytes:
    return num_tokens.to_bytes(32, "little")


HANDOFF_CHECKS = BenchCase(
    "handoff-checks", "a whole handoff between engines, checks included, against its transfer alone", _measure
)
