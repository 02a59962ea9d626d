"""Hundreds of requests through a router while clients leave and engines are killed: every answer is right.

Environment: ``HANDOFF_SOAK_REQUESTS`` (500), ``HANDOFF_SOAK_KILLS`` (20), ``HANDOFF_SOAK_CLIENTS`` (6),
``HANDOFF_SOAK_SEED`` (1).
"""

from __future__ import annotations

import collections
import http.client
import itertools
import os
import random
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine import wait_until
from pair import ASK, Pair, Reference, own_count, peer, running, settle
from processes import Holdings
from prompts import Prompt, random_tokens
from serving import HttpError, OpenRequest, Reply, VllmServer

REQUESTS = int(os.environ.get("HANDOFF_SOAK_REQUESTS", "500"))
KILLS = int(os.environ.get("HANDOFF_SOAK_KILLS", "20"))
CLIENTS = int(os.environ.get("HANDOFF_SOAK_CLIENTS", "6"))
SEED = int(os.environ.get("HANDOFF_SOAK_SEED", "1"))

NUM_PROMPTS = 40
ANSWER = 8
ABORTED = 0.1
"""Share of requests whose client leaves."""
SALTED = 0.5
"""Share of requests with a salt of their own: neither engine has seen any of it."""
LEASE_S = 5.0
DEADLINE_S = 8.0
RETRY_S = 0.2
ROUND = 50
"""Requests between two looks at whether all engines were killed."""
REPEATS = 4
GROWTH_BYTES = 4 << 20
"""What a repeat may add to all processes of an engine; one leaked page of each request would add more."""
RESTART_S = 300.0
BETWEEN = (5, 15)
"""Handoffs from the start of one engine to the next kill."""

Gone = (OSError, http.client.HTTPException, HttpError)


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    config = {"kvferry": peer(lease_s=LEASE_S, deadline_s=DEADLINE_S)}
    with running(model, tmp_path_factory.mktemp("soak"), config, config) as engines:
        yield engines


@pytest.fixture(scope="module")
def asked(reference: Reference) -> list[Prompt]:
    """Prompts of which most begin like another one, and whose answers are known."""
    rng = random.Random(SEED)
    stems = [random_tokens(rng, rng.randint(20, 500)) for _ in range(8)]
    prompts = [rng.choice(stems) + random_tokens(rng, rng.randint(1, 500)) for _ in range(NUM_PROMPTS)]
    reference.learn(prompts, ANSWER)
    return prompts


class Router:
    """What stands in front of the engines: prefill where it can be had, decode in any case."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    @property
    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def stop(self) -> None:
        """Have requests that wait for an engine give up."""
        self._ended.set()

    def ask(self, prompt: Prompt, leaves_after_s: float | None, body: dict[str, str]) -> Reply | None:
        """Return the answer, or None if the client left."""
        params = self._prefill(prompt, leaves_after_s, body)
        while not self._ended.is_set():
            try:
                request = self._pair.decode.open(prompt, ANSWER, params, **body)
                if leaves_after_s is not None:
                    self._leave(request, leaves_after_s)
                    self._count("left at D")
                    return None
                reply = request.completion()
            except Gone as error:
                if isinstance(error, HttpError) and error.status < 500:
                    raise
                self._count("tries again at D")
                self._ended.wait(RETRY_S)
                continue
            self._count("handed over" if params and reply.cached == len(prompt) else "otherwise")
            return reply
        raise AssertionError("the decode engine did not come back")

    def _prefill(
        self, prompt: Prompt, leaves_after_s: float | None, body: dict[str, str]
    ) -> dict[str, object] | None:
        try:
            request = self._pair.prefill.open(prompt, 1, ASK, **body)
            if leaves_after_s is not None and leaves_after_s < 0.1:
                self._leave(request, leaves_after_s)
                self._count("left at P")
                return None
            return own_count(request.completion().params or {}) or None
        except Gone as error:
            if isinstance(error, HttpError) and error.status < 500:
                raise
            self._count("without P")
            return None

    def _leave(self, request: OpenRequest, after_s: float) -> None:
        self._ended.wait(after_s)
        request.abort()

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


class Killer:
    """Kills one engine after the other, each amid handoffs, and starts it again while requests go on."""

    def __init__(self, pair: Pair, router: Router, kills: int) -> None:
        self._pair = pair
        self._router = router
        self._rng = random.Random(SEED)
        self.left = kills
        self._stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name="killer")
        self.thread.start()

    def stop(self) -> None:
        """Let both live from now on."""
        self._stopping.set()
        self.thread.join(RESTART_S)

    def _run(self) -> None:
        while self.left and self._has_seen(self._rng.randint(*BETWEEN)):
            victim = self._pair.both[self.left % 2]
            victim.kill()
            self.left -= 1
            victim.launch().wait()

    def _has_seen(self, handoffs: int) -> bool:
        """Wait for so many handoffs and a moment; False when it is told to stop."""
        enough = self._router.counts.get("handed over", 0) + handoffs
        while self._router.counts.get("handed over", 0) < enough:
            if self._stopping.wait(0.02):
                return False
        return not self._stopping.wait(self._rng.uniform(0.0, 0.3))


def lives_through(
    router: Router, asked: list[Prompt], reference: Reference, requests: int, seed: int
) -> None:
    """Ask from several clients; every answer that comes is the reference's."""
    rng = random.Random(f"{SEED} {seed}")
    plans = [
        (
            rng.choice(asked),
            rng.uniform(0.0, 0.4) if rng.random() < ABORTED else None,
            {"cache_salt": rng.randbytes(8).hex()} if rng.random() < SALTED else {},
        )
        for _ in range(requests)
    ]

    def client(plan: tuple[Prompt, float | None, dict[str, str]]) -> bool:
        reply = router.ask(*plan)
        return reply is None or reply.tokens == reference(plan[0], ANSWER)

    with ThreadPoolExecutor(CLIENTS, "clients") as clients:
        try:
            right = list(clients.map(client, plans))
        except BaseException:
            router.stop()
            raise
    assert all(right), f"{right.count(False)} wrong answers"


def rests(pair: Pair) -> list[Holdings]:
    """Return what both engines hold when they are idle."""
    for server in pair.both:
        settle(server)
    return [_steady(server) for server in pair.both]


def _steady(server: VllmServer) -> Holdings:
    """Threads and descriptors of requests end a moment behind them."""
    seen = [server.holdings()]

    def is_steady() -> bool:
        time.sleep(1.0)  # between two looks
        seen.append(server.holdings())
        return seen[-1][:2] == seen[-2][:2]

    wait_until("an idle engine holds the same", is_steady)
    return seen[-1]


def test_every_answer_is_right_whoever_leaves_or_dies(
    pair: Pair, asked: list[Prompt], reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    router = Router(pair)
    killer = Killer(pair, router, KILLS)
    done = 0
    try:
        # As many requests as were asked for, and on until the last kill.
        while done < REQUESTS or killer.thread.is_alive():
            lives_through(router, asked, reference, ROUND, done)
            done += ROUND
    finally:
        killer.stop()
    assert not killer.left
    storm_s = time.monotonic() - started
    counts = router.counts
    assert counts["handed over"] >= KILLS * BETWEEN[0], counts

    # In the last life of both.
    held = []
    for _ in range(1 + REPEATS):
        hands_over_all(router, asked, reference)
        held.append(rests(pair))
    for name, first, last in zip(("P", "D"), held[0], held[-1], strict=True):
        assert last.descriptors <= first.descriptors + 2, name
        assert last.threads <= first.threads + 1, name
    growth = [least_growth(holdings) for holdings in zip(*held, strict=True)]
    last = router.counts["handed over"] - counts["handed over"]
    with capsys.disabled():
        print(
            f"\nsoak: {done} requests in {storm_s:.0f} s, {KILLS} kills, {counts}; then {last} of "
            f"{len(held) * NUM_PROMPTS} handed over\nP and D grew by {growth} bytes: {held}"
        )
    assert last > len(held) * NUM_PROMPTS * 2 / 3, "most of them, where nobody dies"
    assert max(growth) <= GROWTH_BYTES


def hands_over_all(router: Router, asked: list[Prompt], reference: Reference) -> None:
    """Hand every prompt over, one after the other, none of it known before.

    So a repeat computes as many tokens as the one before: vLLM on CPU keeps memory for every number that is new to it.
    """
    for prompt in asked:
        reply = router.ask(prompt, None, {"cache_salt": secrets.token_hex(8)})
        assert reply is not None
        assert reply.tokens == reference(prompt, ANSWER)


def least_growth(holdings: Sequence[Holdings]) -> int:
    """Return by how many bytes an engine grew in the repeat in which it grew least."""
    return min(new.private_bytes - old.private_bytes for old, new in itertools.pairwise(holdings))
