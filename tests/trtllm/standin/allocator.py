"""Which pages are whose: allocation, and the engine's own block reuse.

Pages of finished requests stay findable by the digest of the prefix that they end, until somebody needs the room:
least recently used first. A page may belong to several requests that share a prefix, never to be written then.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

__all__ = ["Allocator"]


class Allocator:
    """Args:
    num_pages: How many there are.
    reuses: Whether freed pages are kept for requests with the same prefix.
    """

    def __init__(self, num_pages: int, *, reuses: bool) -> None:
        self._free = deque(range(num_pages))
        """Those freed last come first, so that whoever still uses them is found."""
        self._users = [0] * num_pages
        self._reuses = reuses
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pages that only reuse holds, the least recently used first."""
        self.dirty: set[int] = set(range(num_pages))
        """Pages that were given out since the engine last poisoned some: whoever reads them for others errs."""

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    def is_owned(self, page: int) -> bool:
        """Tell whether a request has it."""
        return self._users[page] > 0

    def is_reusable(self, page: int) -> bool:
        return page in self._digest_of

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """Return the pages that hold the longest of the prefixes that full pages end with."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Make reused pages somebody's."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def take(self, count: int) -> list[int]:
        """Return pages that were nobody's."""
        pages = []
        for _ in range(count):
            if not self._free:
                self.evict(1)
            page = self._free.popleft()
            self._users[page] = 1
            self.dirty.add(page)
            pages.append(page)
        return pages

    def store(self, page: int, digest: bytes) -> None:
        """Make a full page findable, unless another one holds the same already."""
        if self._reuses and digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Take pages from a request."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self._free.appendleft(page)

    def evict(self, count: int) -> None:
        """Forget pages that only reuse holds."""
        for _ in range(min(count, len(self._idle))):
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
            self._free.appendleft(page)
