"""The S3 tier at work: one object per block, header and body as they are in the frame.

A PUT is atomic, so an object is whole or absent; what an object holds is checked by the caller like
every frame. Requests of one call run side by side (see ``requests``); retries are few and end with the
call's deadline. Nothing remembers which objects exist: that is kvferry's business, which asks ``contains``.

Buffers: a load copies out of memory that belongs to the request, so a late answer finds nothing to write
to. A store hands the frame's own memory to obstore, without a copy, and waits until it is let go.

Threading: everything here is called from any thread or from the loop of ``requests``; ``_lock`` guards the
counters and what was reported.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import obstore
from obstore.store import S3Store

from kvferry.connector.errors import short_key
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Capabilities, Frame, Outcome, TierContext, TierStats
from kvferry.plugins.s3.options import Place
from kvferry.plugins.s3.requests import Requests
from kvferry.plugins.s3.trouble import Trouble, WrongLength, raise_if_down

__all__ = ["S3Tier"]

_READ_BYTES = 4 << 20
"""How much of an object is taken out of its stream at once."""
_MOST_REPORTS = 100
_LET_GO_S = 2.0
_LET_GO_POLL_S = 0.0005


class S3Tier:
    """Blocks in a bucket; see the module docstring. Made by ``opening.open_s3_tier``.

    Args:
        context: What kvferry gave the tier.
        store: The data path, with credentials and time-outs.
        place: Bucket and prefix.
        where: The endpoint and bucket, for messages.
        max_in_flight: Most requests at once.
    """

    def __init__(
        self, context: TierContext, store: S3Store, place: Place, where: str, max_in_flight: int
    ) -> None:
        self._context = context
        self._store = store
        self._place = place
        self._where = where
        self._requests = Requests(context.name, max_in_flight)
        self._lock = threading.Lock()
        self._blocks = 0
        self._bytes = 0
        self._reported: set[str] = set()

    @property
    def capabilities(self) -> Capabilities:
        """Persistent, shared with every other engine, and without a bound: the bucket's rules expire."""
        return Capabilities(is_persistent=True, is_shared=True, is_bounded=False)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Ask the store for each key, side by side. Blocks.

        Raises:
            TierError: The store did not answer any of it.
        """
        results = self._run(self._head, keys, keys)
        return [result is Outcome.OK for result in results]

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        """Read objects into the frames' buffers; nothing is verified but their length. Blocks.

        Raises:
            TierError: The store did not answer any of it.
        """
        return self._run(self._get, into, [frame.key for frame in into])

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        """Write each frame as an object, over what may be there. Blocks.

        Raises:
            TierError: The store did not take any of it.
        """
        outcomes = self._run(self._put, frames, [frame.key for frame in frames], is_store=True)
        stored = [frame for frame, outcome in zip(frames, outcomes, strict=True) if outcome is Outcome.OK]
        with self._lock:
            self._blocks += len(stored)
            self._bytes += sum(len(frame.header) + frame.length for frame in stored)
        return outcomes

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Delete objects; those that are not there are ignored. Blocks.

        Raises:
            TierError: The store did not answer any of it.
        """
        self._run(self._delete, keys, keys)

    def scan(self) -> Iterator[BlockKey]:
        """Yield nothing: others change the bucket all the time, and listing millions of names is slow."""
        self._requests.require_open()
        return iter(())

    def stats(self) -> TierStats:
        """Return what this process has stored since it opened the tier; how full a bucket is, S3 can't tell."""
        self._requests.require_open()
        with self._lock:
            return TierStats(blocks=self._blocks, used_bytes=self._bytes, capacity_bytes=None)

    def probe(self, deadline_s: float) -> Trouble | None:
        """Write and delete a small object the way blocks are; return what goes wrong, if anything. Blocks."""

        async def write_and_delete() -> None:
            name = self._place.probe_name()
            await obstore.put_async(self._store, name, b"kvferry", use_multipart=False)
            await obstore.delete_async(self._store, name)

        (result,) = self._requests.run([write_and_delete], deadline_s)
        return result

    def close(self) -> None:
        """Cancel requests under way and end the loop's thread. Idempotent."""
        self._requests.close()

    # ---- a call's requests

    def _run(
        self,
        work: Callable[[Any], Coroutine[Any, Any, Outcome]],
        items: Sequence[object],
        keys: Sequence[BlockKey],
        *,
        is_store: bool = False,
    ) -> list[Outcome]:
        """Do ``work`` for every item; troubles of single blocks become outcomes."""
        requests = [functools.partial(work, item) for item in items]
        results = self._requests.run(requests, self._context.deadline_s, is_store=is_store)
        raise_if_down(self._context.name, self._where, results)
        for key, result in zip(keys, results, strict=True):
            if isinstance(result, Trouble) and result.outcome is not Outcome.MISSING:
                self._report(key, result)
        return [result.outcome if isinstance(result, Trouble) else result for result in results]

    def _name(self, key: BlockKey) -> str:
        return self._place.name(self._context.fingerprint, key)

    async def _head(self, key: BlockKey) -> Outcome:
        await obstore.head_async(self._store, self._name(key))
        return Outcome.OK

    async def _delete(self, key: BlockKey) -> Outcome:
        try:
            await obstore.delete_async(self._store, self._name(key))
        except FileNotFoundError:
            return Outcome.MISSING
        return Outcome.OK

    async def _get(self, frame: Frame) -> Outcome:
        """Read one object, never more than a byte beyond what a block can have."""
        least, most = len(frame.header), len(frame.header) + frame.length
        result = await obstore.get_async(self._store, self._name(frame.key), options={"range": (0, most + 1)})
        size = result.meta["size"]
        if not least <= size <= most:
            raise WrongLength(f"an object of {size} bytes where {least} to {most} are possible")
        filled = 0
        async for part in result.stream(min_chunk_size=_READ_BYTES):
            if filled + len(part) > size:
                raise WrongLength(f"an object of {size} bytes went on after its end")
            _fill(frame, filled, memoryview(part))
            filled += len(part)
        if filled != size:
            raise WrongLength(f"{filled} bytes of an object of {size}")
        return Outcome.OK

    async def _put(self, frame: Frame) -> Outcome:
        """Write one object from the frame's own memory."""
        parts = [frame.header[:], frame.body[:]]
        try:
            await obstore.put_async(self._store, self._name(frame.key), parts, use_multipart=False)
        finally:
            await _let_go(parts)
        return Outcome.OK

    def _report(self, key: BlockKey, trouble: Trouble) -> None:
        """Log the first of each kind of trouble; outcomes count the rest."""
        with self._lock:
            is_new = trouble.why not in self._reported and len(self._reported) < _MOST_REPORTS
            if is_new:
                self._reported.add(trouble.why)
        if is_new:
            name, block = self._context.name, short_key(key)
            self._context.logger.warning(
                "tier %r block %s: %s%s",
                name,
                block,
                trouble.why,
                f"; {trouble.hint}" if trouble.hint else "",
            )


def _fill(frame: Frame, start: int, part: memoryview) -> None:
    """Copy ``part`` to where it belongs: the first bytes of an object are the header."""
    in_header = part[: max(0, len(frame.header) - start)]
    frame.header[start : start + len(in_header)] = in_header
    rest = part[len(in_header) :]
    at = start + len(in_header) - len(frame.header)
    frame.payload[at : at + len(rest)] = rest


async def _let_go(parts: Sequence[memoryview]) -> None:
    """Wait until nobody reads the memory of ``parts`` any more.

    A cancelled request drops its connection at once, but in a thread of its own; a view cannot be released
    while anything still uses it, and that is the test.
    """
    end = asyncio.get_running_loop().time() + _LET_GO_S
    for part in parts:
        while asyncio.get_running_loop().time() < end:
            try:
                part.release()
                break
            except BufferError:
                await asyncio.sleep(_LET_GO_POLL_S)
