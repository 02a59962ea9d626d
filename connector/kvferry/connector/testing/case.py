"""What every group of the kit stands on: what the author provides, and calls that check themselves.

One instance per test (pytest makes it). Tiers that a test opens through ``TierCase.open`` are closed
after it. Threads that a test starts are named ``kit-<n>`` and waited for with a deadline.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.testing.blocks import Blocks, key_of
from kvferry.connector.testing.process import open_configured
from kvferry.connector.tier import Outcome, Tier, TierContext

__all__ = ["Damage", "TierCase"]

FINGERPRINT = bytes(range(32))


class Damage(enum.Enum):
    """What a back door does to the stored bytes of a block."""

    TRUNCATE = "truncate"
    """The second half is gone."""
    EMPTY = "empty"
    """Nothing is left, but the block is still listed."""
    EXTEND = "extend"
    """More bytes follow."""
    FLIP = "flip"
    """One bit of the payload differs."""
    FLIP_HEADER = "flip_header"
    """One bit of the header differs."""
    REPLACE = "replace"
    """Another block's whole frame."""


class TierCase:
    """What the author of a tier provides, all but ``make_tier`` optional.

    A test that needs something which the tier does not claim, or a back door that is not provided, is
    skipped and says what it wanted.
    """

    layout: ClassVar[BlockLayout] = BlockLayout(
        num_layers=3, num_kv_heads=1, block_tokens=7, head_dim=2013, kv_factor=1, itemsize=1
    )
    """Geometry of the blocks; the default's payload has an odd length, 42273 bytes."""
    capacity_bytes: ClassVar[int] = 64 << 20
    """What ``make_tier`` is asked for where capacity is not the subject."""
    small_capacity_bytes: ClassVar[int] = 1 << 20
    """What it is asked for where capacity is: room for between 4 and 100 blocks."""
    plugins: ClassVar[Sequence[str]] = ()
    """Modules that register the tier type, for ``configuration``, if it has no entry point."""
    deadline_s: ClassVar[float] = 10.0
    """``TierContext.deadline_s`` as long as the outside is well."""
    outage_deadline_s: ClassVar[float] = 1.0
    """The same when it is not."""
    grace_s: ClassVar[float] = 2.0
    """What a call may take longer than its deadline when the outside is not well."""

    # ---- what the author provides

    def make_tier(self, context: TierContext, place: Path, capacity_bytes: int) -> Tier:
        """Return an open tier. Required, unless ``configuration`` is given: then that is opened.

        Called several times in some tests. The same ``place`` means the same storage: after ``close``
        a call with it is a restart. Another ``place`` is other storage.

        Args:
            context: What kvferry would give the tier.
            place: An empty directory of this test's own. Its last component is unique in the world: a
                tier on a server takes ``place.name`` as its prefix.
            capacity_bytes: What a bounded tier shall hold to; unbounded ones ignore it.
        """
        if type(self).configuration is TierCase.configuration:
            raise NotImplementedError(f"{type(self).__name__}.make_tier: return an open tier")
        return open_configured(self.configuration(place, capacity_bytes), self.plugins, context)

    def configuration(self, place: Path, capacity_bytes: int) -> dict[str, object]:
        """Return the entry under ``tiers`` that opens the same tier: ``{"type": ..., ...}``.

        With it the kit also opens the tier in other processes, and kills them.
        """
        pytest.skip("needs configuration()")

    def damage(self, tier: Tier, place: Path, key: BlockKey, how: Damage) -> None:
        """Back door: change the stored bytes of ``key`` behind the tier's back.

        ``damaged`` makes the new bytes of header and body from the old ones. Call ``pytest.skip``
        for a kind of damage that the storage cannot have.
        """
        pytest.skip("needs the back door damage()")

    def suspend(self) -> None:
        """Back door: freeze what the tier talks to (SIGSTOP); connections stay open, nothing answers."""
        pytest.skip("needs the back door suspend() and resume()")

    def resume(self) -> None:
        """Back door: undo ``suspend``."""

    def kill(self) -> None:
        """Back door: end what the tier talks to, without warning (SIGKILL)."""
        pytest.skip("needs the back door kill() and revive()")

    def revive(self) -> None:
        """Back door: start it again at the same address."""

    def exhaust(self, tier: Tier, place: Path) -> None:
        """Back door: take away all room that is left on the medium."""
        pytest.skip("needs the back door exhaust() and relieve()")

    def relieve(self, tier: Tier, place: Path) -> None:
        """Back door: undo ``exhaust``."""

    # ---- what the tests use

    blocks: Blocks
    """Makes and checks frames of ``layout``."""
    place: Path
    """Where tiers are opened unless a test says otherwise."""

    removed: list[BlockKey]
    """What ``on_removed`` reported, of all tiers that the test opened."""

    @pytest.fixture(autouse=True)
    def _kit(self, tmp_path: Path) -> Iterator[None]:
        with self.prepared(tmp_path):
            yield

    @contextlib.contextmanager
    def prepared(self, root: Path) -> Iterator[None]:
        """Around every test: what it uses is there, and what it opened is closed.

        Args:
            root: An empty directory.
        """
        self._root = root
        self._opened: list[Tier] = []
        self.removed = []
        self.place = self.make_place()
        self.blocks = Blocks(self.layout, FINGERPRINT)
        yield
        for tier in self._opened:
            tier.close()

    @pytest.fixture
    def tier(self, _kit: None) -> Tier:
        """An open tier in ``self.place``."""
        return self.open()

    def make_place(self) -> Path:
        """Return storage of its own: an empty directory with a name that is unique in the world."""
        place = self._root / f"kit-{uuid.uuid4().hex}"
        place.mkdir()
        return place

    def open(
        self,
        place: Path | None = None,
        *,
        capacity_bytes: int | None = None,
        deadline_s: float | None = None,
        name: str = "kit",
        fingerprint: bytes = FINGERPRINT,
        layout: BlockLayout | None = None,
    ) -> Tier:
        """Open a tier, by default in ``self.place``; it is closed after the test."""
        context = TierContext(
            name=name,
            layout=layout or self.layout,
            fingerprint=fingerprint,
            instance="",
            on_removed=self.removed.extend,
            make_eviction_policy=PluginRegistry(use_entry_points=False).eviction_policy,
            logger=logging.getLogger("kvferry.kit"),
            deadline_s=deadline_s or self.deadline_s,
        )
        tier = self.make_tier(context, place or self.place, capacity_bytes or self.capacity_bytes)
        self._opened.append(tier)
        return tier

    def require(self, tier: Tier, **claims: bool) -> None:
        """Skip the test unless the tier's capabilities are as named: ``is_bounded=True``."""
        for claim, wanted in claims.items():
            if getattr(tier.capabilities, claim) is not wanted:
                pytest.skip(f"needs a tier with {claim}={wanted}")

    def keys(self, count: int, salt: str = "") -> list[BlockKey]:
        """Return keys, the same in every call."""
        return [key_of(number, salt) for number in range(count)]

    def store(self, tier: Tier, keys: Sequence[BlockKey], length: int | None = None) -> list[Outcome]:
        """Store the blocks of ``keys``; the buffers must come through unchanged."""
        batch = self.blocks.sealed(keys, length)
        before = batch.image()
        outcomes = _checked(tier.store(batch.sources()), len(keys))
        assert batch.image() == before, "store changed a buffer"
        return outcomes

    def store_all(self, tier: Tier, keys: Sequence[BlockKey], length: int | None = None) -> None:
        """Store blocks one by one, all of which must be ``OK``."""
        for key in keys:
            assert self.store(tier, [key], length) == [Outcome.OK]

    def load(self, tier: Tier, keys: Sequence[BlockKey], length: int | None = None) -> list[Outcome]:
        """Load blocks into dirty buffers; each that is ``OK`` must be right, every byte of it."""
        batch = self.blocks.empty(keys)
        outcomes = _checked(tier.load(batch.frames), len(keys))
        batch.check_guards()
        for frame, outcome in zip(batch.frames, outcomes, strict=True):
            if outcome is Outcome.OK:
                self.blocks.verify(frame, length)
        return outcomes

    def damaged(self, raw: bytes, how: Damage) -> bytes:
        """Return what ``damage`` shall leave in place of ``raw``, a frame's header and body."""
        middle = len(raw) // 2
        if how is Damage.TRUNCATE:
            return raw[:middle]
        if how is Damage.EMPTY:
            return b""
        if how is Damage.EXTEND:
            return raw + b"more than was stored"
        if how is Damage.REPLACE:
            return self.blocks.raw(key_of(0, "another block"))
        position = middle if how is Damage.FLIP else 20
        return raw[:position] + bytes([raw[position] ^ 0x10]) + raw[position + 1 :]

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait for a condition; fail when it does not come true within ``deadline_s``."""
        end = time.monotonic() + self.deadline_s
        while not holds():
            assert time.monotonic() < end, f"within {self.deadline_s:g} s it did not come true that {what}"
            time.sleep(0.002)

    def together(self, *actions: Callable[[], object], deadline_s: float = 60.0) -> None:
        """Run actions at the same time, each in a thread; raise the first error of any."""
        errors: list[BaseException] = []
        start = threading.Barrier(len(actions))

        def run(action: Callable[[], object]) -> None:
            try:
                start.wait(deadline_s)
                action()
            except BaseException as error:  # noqa: BLE001  # boundary: a test's thread, raised below
                errors.append(error)

        threads = [
            threading.Thread(target=run, args=(action,), name=f"kit-{index}", daemon=True)
            for index, action in enumerate(actions)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + deadline_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if errors:
            raise errors[0]
        stuck = [thread.name for thread in threads if thread.is_alive()]
        assert not stuck, f"still running after {deadline_s:g} s: {stuck}"


def _checked(outcomes: object, count: int) -> list[Outcome]:
    assert isinstance(outcomes, list | tuple), f"outcomes are a list, not {type(outcomes).__name__}"
    assert len(outcomes) == count, f"{len(outcomes)} outcomes for {count} blocks"
    assert all(isinstance(outcome, Outcome) for outcome in outcomes), outcomes
    return list(outcomes)
