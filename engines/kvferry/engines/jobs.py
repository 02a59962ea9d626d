"""What the scheduler side asks the workers to copy, and what they report back.

Plain values that travel over the engine's own channel, the same for every rank; each rank copies the
shard it owns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvferry.connector.arena import ArenaHandle
from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.staging import PageIds, SlotIds

__all__ = [
    "BlockCopy",
    "CopyBatch",
    "ExportJob",
    "LoadJob",
    "PeerCounts",
    "PeerRead",
    "PeerSource",
    "SaveJob",
    "StepJobs",
    "WorkerReport",
    "copy_batches",
]

MOST_BLOCKS = 64
"""In one batch: what is copied before anybody looks again whether it is still wanted."""


class BlockCopy(NamedTuple):
    """One block between an arena slot and some pages."""

    slot: int
    generation: int
    """The arena's generation of the slot for as long as the copy is allowed."""
    first_page: int
    """Which page of the block ``pages[0]`` is."""
    pages: tuple[int, ...]


class CopyBatch(NamedTuple):
    """Some blocks' copies, as staging takes them (``kvferry.connector.staging.Staging``)."""

    copies: Sequence[BlockCopy]
    page_ids: PageIds
    """``[blocks, pages_per_block]``; -1 where a block's page is not copied."""
    slots: SlotIds


def copy_batches(copies: Sequence[BlockCopy], pages_per_block: int) -> Iterator[CopyBatch]:
    """Yield all copies in their order, at most ``MOST_BLOCKS`` at a time.

    Raises:
        LayoutError: A copy has pages in front of its block or behind it, or negative ones.
    """
    for start in range(0, len(copies), MOST_BLOCKS):
        some = copies[start : start + MOST_BLOCKS]
        page_ids = np.full((len(some), pages_per_block), -1, np.int32)
        for row, copy in zip(page_ids, some, strict=True):
            end = copy.first_page + len(copy.pages)
            if copy.first_page < 0 or end > pages_per_block:
                raise LayoutError(
                    f"pages {copy.first_page} to {end} are outside a block of {pages_per_block}"
                )
            if min(copy.pages, default=0) < 0:
                raise LayoutError(f"page {min(copy.pages)} is no page: it would be left out without a word")
            row[copy.first_page : end] = copy.pages
        yield CopyBatch(some, page_ids, np.array([copy.slot for copy in some], np.int64))


class PeerSource(NamedTuple):
    """Where another engine holds a request's pages for this one. Validated: see ``handoff.params``."""

    host: str
    port: int
    engine_id: str
    request_id: str
    """The other engine's name for the request."""
    num_tokens: int
    """Tokens whose KV it holds, from the first one on."""


class PeerRead(NamedTuple):
    """Read pages of another engine into a request's own."""

    source: PeerSource
    reader: str
    """What this engine calls itself and the request towards the other."""
    num_tokens: int
    """Tokens of the request's prompt that the pages must stand for, counted from its first."""
    fingerprint: bytes
    """Of the model; the other engine's must be the same."""
    content: bytes
    """Digest of everything that determines their KV (``keys.content_digest``)."""
    first_page: int
    """Which page of the request ``pages[0]`` is."""
    pages: tuple[int, ...]


class LoadJob(NamedTuple):
    """Scatter leased slots into a request's pages, and read others from a peer. Succeeds or fails as a whole."""

    request_id: str
    copies: tuple[BlockCopy, ...]
    """With ``peer`` None, empty when the load is already known to fail."""
    peer: PeerRead | None = None


class SaveJob(NamedTuple):
    """Gather a request's filled pages into reserved slots. Without copies it is known to fail."""

    id: int
    request_id: str
    copies: tuple[BlockCopy, ...]


class ExportJob(NamedTuple):
    """Digest pages that are handed over, so that whoever reads them can compare."""

    seq: int
    """Of the lease (``handoff.table``)."""
    pages: tuple[int, ...]


@dataclass
class StepJobs:
    """Everything for one engine step."""

    arena: ArenaHandle | None = None
    """What the copies are planned for; None while there is none, then every load and save fails."""
    layout: BlockLayout | None = None
    page_encoding: str = "plain"
    """What a block is keyed as (``keys.ModelIdentity``); ranks whose pages give other blocks copy nothing."""
    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    fences: list[int] = field(default_factory=list)
    """Saves of earlier steps whose pages this step overwrites: wait for them first."""
    releases: list[str] = field(default_factory=list)
    """Finished requests whose pages wait for their saves: report them when those are through."""
    exports: list[ExportJob] = field(default_factory=list)
    is_awaited: bool = False
    """Whether the step may end only when its saves are through: somebody is told of them as soon as it has ended."""

    def void(self) -> None:
        """Have every load and save fail: slot numbers mean nothing in another arena."""
        self.loads = [LoadJob(load.request_id, ()) for load in self.loads]
        self.saves = [SaveJob(save.id, save.request_id, ()) for save in self.saves]


@dataclass
class PeerCounts:
    """What a rank read from peers since the last report."""

    bytes: int = 0
    """Of the reads that were found good."""
    seconds: list[float] = field(default_factory=list)
    """How long each of them took, from the first message to the last check."""
    failed: dict[str, str] = field(default_factory=dict)
    """Request -> why its handoff failed, as ``HandoffFailed.reason``."""

    def merge(self, other: PeerCounts) -> None:
        """Add another rank's counts."""
        self.bytes += other.bytes
        self.seconds += other.seconds
        self.failed = {**other.failed, **self.failed}


@dataclass
class WorkerReport:
    """What one rank, or after ``merge`` several, finished since the last report."""

    saved: dict[int, int] = field(default_factory=dict)
    """Save job -> number of ranks that are through with it, well or badly."""
    failed_saves: set[int] = field(default_factory=set)
    """Save jobs of which some rank's part is not usable."""
    bytes_loaded: int = 0
    bytes_saved: int = 0
    load_seconds: float = 0.0
    save_seconds: float = 0.0
    digests: dict[int, dict[int, bytes]] = field(default_factory=dict)
    """Lease -> rank -> digests of its pages (``handoff.digest``)."""
    peer: PeerCounts = field(default_factory=PeerCounts)
    problem: str = ""
    """Why this rank can neither load nor save; empty when all is well."""

    def is_empty(self) -> bool:
        """Tell whether there is nothing to report."""
        return self == WorkerReport()

    def merge(self, other: WorkerReport) -> None:
        """Add another rank's report to this one."""
        for job_id, ranks in other.saved.items():
            self.saved[job_id] = self.saved.get(job_id, 0) + ranks
        self.failed_saves |= other.failed_saves
        self.bytes_loaded += other.bytes_loaded
        self.bytes_saved += other.bytes_saved
        self.load_seconds = max(self.load_seconds, other.load_seconds)
        self.save_seconds = max(self.save_seconds, other.save_seconds)
        for seq, by_rank in other.digests.items():
            self.digests.setdefault(seq, {}).update(by_rank)
        self.peer.merge(other.peer)
        self.problem = self.problem or other.problem
