"""Guards: what stands between kvferry and a plugin's code that runs all the time.

A policy of a plugin is asked for every block, deep inside the manager or a tier. When it raises, or does
not do what it promised, its guard hands over to the core's own policy for good and blames the plugin.
The core's own policies need no guard and get none.

A guard has the threading rules of the policy in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TypeVar

from kvferry.connector.admission import AdmissionPolicy, Always
from kvferry.connector.keys import BlockKey
from kvferry.connector.policy import LRU, EvictionPolicy

__all__ = ["Blame", "boundary", "guarded_admission", "guarded_eviction"]

T = TypeVar("T")

Blame = Callable[[str, BaseException], None]
"""Takes what was being done and what was raised; switches the plugin off."""


@contextmanager
def boundary(failed: Callable[[BaseException], None]) -> Iterator[None]:
    """Run a plugin's code: what it raises goes to ``failed``, all but an interrupt from the keyboard."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # boundary: a plugin's code, SystemExit included
        failed(error)


def guarded_eviction(make: Callable[[], EvictionPolicy], blame: Blame) -> EvictionPolicy:
    """Return a plugin's eviction policy behind a guard; LRU takes over when it fails."""
    return _GuardedEviction(make, blame)


def guarded_admission(make: Callable[[], AdmissionPolicy], blame: Blame) -> AdmissionPolicy:
    """Return a plugin's admission policy behind a guard; ``always`` takes over when it fails."""
    return _GuardedAdmission(make, blame)


class _GuardedEviction:
    """Keeps an LRU order beside the policy, so that it can take over at any time without loss."""

    def __init__(self, make: Callable[[], EvictionPolicy], blame: Blame) -> None:
        self._reserve = LRU()
        self._blame = blame
        self._policy: EvictionPolicy | None = None
        with self._guard("making an eviction policy"):
            self._policy = _complete(make(), ("insert", "touch", "remove", "victims"))

    def insert(self, key: BlockKey) -> None:
        self._reserve.insert(key)
        if self._policy is not None:
            with self._guard("insert"):
                self._policy.insert(key)

    def touch(self, key: BlockKey) -> None:
        self._reserve.touch(key)
        if self._policy is not None:
            with self._guard("touch"):
                self._policy.touch(key)

    def remove(self, key: BlockKey) -> None:
        self._reserve.remove(key)
        if self._policy is not None:
            with self._guard("remove"):
                self._policy.remove(key)

    def victims(self, count: int, is_evictable: Callable[[BlockKey], bool]) -> list[BlockKey]:
        """Return what the policy proposes and may go; a proposal that is too short is filled up, and blamed."""
        chosen: list[BlockKey] = []
        if self._policy is not None:
            with self._guard("victims"):
                proposed = dict.fromkeys(self._policy.victims(count, is_evictable))
                chosen = [key for key in proposed if is_evictable(key)][:count]
        if len(chosen) == count:
            return chosen
        taken = frozenset(chosen)
        missed = self._reserve.victims(
            count - len(chosen), lambda key: key not in taken and is_evictable(key)
        )
        if missed and self._policy is not None:
            what = f"proposed {len(chosen)} blocks of {count}, though {len(missed)} more could go"
            self._failed("victims", RuntimeError(what))
        return chosen + missed

    def __len__(self) -> int:
        return len(self._reserve)

    def _guard(self, method: str) -> AbstractContextManager[None]:
        return boundary(partial(self._failed, method))

    def _failed(self, method: str, error: BaseException) -> None:
        self._policy = None
        self._blame(f"eviction policy, {method}", error)


class _GuardedAdmission:
    """Asks the policy until it fails once, and admits everything from then on."""

    def __init__(self, make: Callable[[], AdmissionPolicy], blame: Blame) -> None:
        self._blame = blame
        self._policy: AdmissionPolicy = Always()
        with boundary(partial(self._failed, "making an admission policy")):
            self._policy = _complete(make(), ("admits", "hit", "stored", "removed"))

    def admits(self, key: BlockKey) -> bool:
        admitted: object = True
        with boundary(partial(self._failed, "admits")):
            admitted = self._policy.admits(key)
            if not isinstance(admitted, bool):
                raise TypeError(f"returned {type(admitted).__name__}, expected True or False")
        return admitted is not False

    def hit(self, key: BlockKey) -> None:
        with boundary(partial(self._failed, "hit")):
            self._policy.hit(key)

    def stored(self, key: BlockKey) -> None:
        with boundary(partial(self._failed, "stored")):
            self._policy.stored(key)

    def removed(self, key: BlockKey) -> None:
        with boundary(partial(self._failed, "removed")):
            self._policy.removed(key)

    def _failed(self, method: str, error: BaseException) -> None:
        self._policy = Always()
        self._blame(f"admission policy, {method}", error)


def _complete(policy: T, methods: tuple[str, ...]) -> T:
    for method in methods:
        if not callable(getattr(policy, method, None)):
            raise TypeError(f"a {type(policy).__name__} has no method {method!r}")
    return policy
