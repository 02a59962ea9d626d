"""The tier protocol: what a place that holds blocks has to do.

A tier is small, synchronous and batch-oriented. kvferry supplies the threads, the bounded queue, the
deadline and the circuit breaker (see ``mover``), composes and verifies the frames (see ``frame``), and
turns every failure into a miss. A tier only moves frames.

Contract for implementers
  * Every method may be called from several threads at once.
  * ``store`` is atomic per block: after a crash at any instant the block is whole or absent.
  * ``load`` fills ``into[i].header`` and as much of ``into[i].body`` as was stored when it reports
    ``OK``. It need not verify them; the caller does. What is longer than ``body`` is not the block.
  * A block that is not there is ``MISSING``, one that found no room is ``NO_ROOM``: both are values.
    Raise ``TierError`` only when the tier as a whole cannot serve.
  * Never touch a buffer after returning.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import msgspec

from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout

if TYPE_CHECKING:
    from kvferry.connector.finding import Finding

__all__ = [
    "DEFAULT_THREADS",
    "Capabilities",
    "Frame",
    "Outcome",
    "Tier",
    "TierContext",
    "TierStats",
    "TierType",
]

DEFAULT_THREADS = 4
"""Threads that call a tier whose type asks for no other number."""


class Outcome(enum.Enum):
    """What became of one block of a batch."""

    OK = "ok"
    MISSING = "missing"
    """``load``: the tier does not hold the block."""
    NO_ROOM = "no_room"
    """``store``: capacity is reached and nothing can be evicted, or the medium is full."""
    FAILED = "failed"
    """This block failed; others of the batch may have succeeded."""


class Frame(msgspec.Struct, frozen=True):
    """One block outside the arena, as two buffers: sources of a ``store``, targets of a ``load``."""

    key: BlockKey
    header: memoryview
    """``frame.HEADER_BYTES`` bytes, writable in a load."""
    payload: memoryview
    """``slot_bytes`` bytes on a ``SLOT_ALIGNMENT_BYTES`` boundary, so it can be handed to O_DIRECT as
    it is. Only ``body`` carries meaning."""
    length: int
    """Bytes of ``payload`` that carry meaning: in a store what the codec made of the block, in a load
    the most that a block can have."""

    @property
    def body(self) -> memoryview:
        """The part of ``payload`` that has to be kept: a tier need not store the padding."""
        return self.payload[: self.length]


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier promises beyond the protocol."""

    is_persistent: bool
    """Blocks survive a restart of this process."""
    is_shared: bool
    """Other processes may add or remove blocks, so ``scan`` is no complete index: kvferry asks
    ``contains`` before it counts on a block, and remembers the answers for a while."""
    is_bounded: bool
    """It holds to a byte capacity and evicts by itself."""


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of a tier's size."""

    blocks: int
    used_bytes: int
    capacity_bytes: int | None
    """None when the tier is not bounded."""
    evictions: int = 0


class TierContext(msgspec.Struct, frozen=True, kw_only=True):
    """What kvferry gives a tier when it is created."""

    name: str
    """The tier's configured name, for messages."""
    layout: BlockLayout
    fingerprint: bytes
    instance: str
    """Distinguishes engines of one deployment that must not share exclusive resources (``dp1``);
    empty when there is only one."""
    kept_instances: int = 0
    """How many instances of one group (what comes before the last ``-``) may leave something behind; the
    longest unused ones are to be removed. 0: all may."""
    on_removed: Callable[[Sequence[BlockKey]], None]
    """Call when the tier drops blocks on its own (eviction, quarantine). Any thread, never blocks."""
    make_eviction_policy: Callable[[str], object]
    """Builds an eviction policy (``policy.EvictionPolicy``) by its registered name."""
    logger: logging.Logger
    threads: int = DEFAULT_THREADS
    """How many threads call the tier, so how many connections it needs."""
    deadline_s: float = 10.0
    """After so long a load or store counts as failed, whatever the tier still does; a good bound for
    its own time-outs."""
    codec: str = "none"
    """What encodes the blocks that the tier gets; with ``none`` every frame's body is a whole payload."""


@runtime_checkable
class Tier(Protocol):
    """A place that can hold blocks. See the module docstring for the contract."""

    @property
    def capabilities(self) -> Capabilities:
        """What this tier promises; constant over its life."""

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Tell for each key whether a load would probably find it. May block."""

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        """Fill the frames' buffers with the blocks named by their keys. Blocks until done.

        Raises:
            TierError: The tier cannot serve at all; no buffer content is meaningful.
        """

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        """Make the frames durable under their keys; a key that is already held is ``OK``.

        Raises:
            TierError: The tier cannot serve at all; none of the frames is visible.
        """

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget the keys; unknown ones are ignored."""

    def scan(self) -> Iterator[BlockKey]:
        """Yield every key held, least recently stored first; empty where that is not possible."""

    def stats(self) -> TierStats:
        """Return the current size. Cheap; never blocks on I/O."""

    def close(self) -> None:
        """Finish and release everything. Idempotent; any later call raises ClosedError."""


class TierType(msgspec.Struct, frozen=True):
    """A kind of tier, as a plugin registers it."""

    name: str
    """The value of ``type`` in a tier's configuration."""
    options: type[msgspec.Struct]
    """Typed options; unknown keys are refused before ``create`` is called."""
    create: Callable[..., Tier]
    """``create(options, context) -> Tier``; may block; raises ConfigError or TierError."""
    summary: str
    """One line for ``kvferry plugins``."""
    check: Callable[..., Iterable[Finding]] | None = None
    """``check(options, name)``: what ``kvferry doctor`` should say about a tier of these options and
    this name, for example whether its server answers; None for nothing. Changes nothing."""
    threads: int = DEFAULT_THREADS
    """Threads that call such a tier where the operator does not say."""


def option_fields(tier_type: TierType) -> Mapping[str, object]:
    """Return the option names of a tier type and their types, for help and error messages."""
    return {field.name: field.type for field in msgspec.structs.fields(tier_type.options)}
