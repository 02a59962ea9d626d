"""Engines that die, stop or are cut off at any point of a handoff, and clients that leave.

After each fault: the right answer or a clear error, every page free on both sides, the engine that lived still serving,
and the next handoff taken.
"""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine import wait_until
from pair import ASK, Pair, Reference, free, peer, running
from prompts import Prompt, random_tokens
from proxy import Proxy
from serving import PAGE, HttpError, Json, Reply, free_port

LEASE_S = 10.0
DEADLINE_S = 15.0
SLACK_S = 5.0
"""For a busy machine, beyond what is waited for."""
LENGTH = 40 * PAGE
"""Pages enough to be in the middle of them."""
PAUSE_S = 0.12
"""Per page: all of them take less than a deadline, and more than a fault needs."""
P_PAGES = 128
"""Few, so that freed ones are soon another request's."""


class Reads:
    """Steers how slowly D reads."""

    def __init__(self, told: Path) -> None:
        self.told = told
        self._begun = told.with_suffix(".begun")

    @contextmanager
    def slow(self, pause_s: float = PAUSE_S) -> Iterator[None]:
        self._begun.unlink(missing_ok=True)
        self.told.write_text(str(pause_s))
        try:
            yield
        finally:
            self.told.unlink()

    def wait_until_begun(self, pages: int = 5) -> None:
        def count() -> int:
            return len(self._begun.read_text().splitlines()) if self._begun.exists() else 0

        wait_until("D is reading", lambda: count() >= pages)


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Reads:
    return Reads(tmp_path_factory.mktemp("reads") / "pause")


@pytest.fixture(scope="module", params=["nixl", "socket"])
def pair(
    request: pytest.FixtureRequest, model: Path, reads: Reads, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """P's side channel has the same port in every life."""
    options = {"lease_s": LEASE_S, "deadline_s": DEADLINE_S, "transport": request.param}
    with running(
        model,
        tmp_path_factory.mktemp("faults"),
        {
            "kvferry": peer(listen=f"tcp://127.0.0.1:{free_port()}", **options),
            "arguments": ("--num-gpu-blocks-override", str(P_PAGES)),
        },
        {"kvferry": peer(**options), "module": "slow_reads", "env": {"READS": str(reads.told)}},
    ) as engines:
        yield engines
        engines.settle()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


@pytest.fixture
def prompt(rng: random.Random, reference: Reference) -> Prompt:
    """A prompt whose answer is known before anything breaks."""
    tokens = random_tokens(rng, LENGTH)
    reference(tokens, 8)
    return tokens


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32, "clients") as executor:
        yield executor


@pytest.fixture(autouse=True)
def recovery(pair: Pair, reference: Reference, rng: random.Random) -> Iterator[None]:
    """Whatever a test did, both engines are idle behind it, and handoffs are taken again."""
    yield
    pair.free()
    pair.hands_over_again(reference, rng, 5 * PAGE + 3)
    pair.free()


def soon(reply: Future[Reply]) -> Reply:
    """Return an answer that comes although something was waited for in vain."""
    return reply.result(DEADLINE_S + SLACK_S)


def freed(pair: Pair, within_s: float) -> None:
    wait_until("P's pages are free", lambda: pair.prefill.idle_usage() == 0.0, within_s)


# -- the prefill engine ------------------------------------------------------------------------------


def test_p_killed_before_d_asks_and_started_again_where_it_was(
    pair: Pair, reference: Reference, prompt: Prompt
) -> None:
    params = pair.prefilled(prompt)
    pair.prefill.kill()
    reply = pair.decode.ask(prompt, params=params, deadline_s=DEADLINE_S + SLACK_S)
    assert reply.tokens == reference(prompt)
    assert reply.cached == 0
    pair.decode.reset()
    pair.prefill.launch().wait()
    pair.prefill.ask(prompt, 1, ASK)  # the same prompt's pages in the new life, under another name
    reply = pair.decode.ask(prompt, params=params)
    assert reply.tokens == reference(prompt)
    assert reply.cached == 0, "params of an earlier life mean nothing"


def test_p_killed_while_d_reads(
    pair: Pair, reference: Reference, prompt: Prompt, reads: Reads, thread: ThreadPoolExecutor
) -> None:
    params = pair.prefilled(prompt)
    with reads.slow():
        reply = thread.submit(pair.decode.ask, prompt, 8, params)
        reads.wait_until_begun()
        pair.prefill.kill()
        assert soon(reply).tokens == reference(prompt)
    assert soon(reply).cached == 0
    free(pair.decode)
    pair.prefill.launch().wait()


def test_p_killed_after_d_has_read(
    pair: Pair, reference: Reference, prompt: Prompt, thread: ThreadPoolExecutor
) -> None:
    reference(prompt, 200)
    params = pair.prefilled(prompt)
    reply = thread.submit(pair.decode.ask, prompt, 200, params)
    wait_until("D decodes", lambda: pair.decode.metrics().value("vllm:generation_tokens_total") > 0)
    freed(pair, LEASE_S + SLACK_S)
    pair.prefill.kill()
    assert reply.result(60).tokens == reference(prompt, 200)
    assert reply.result().cached == LENGTH
    pair.prefill.launch().wait()


def test_p_stopped_before_d_asks_for_longer_than_the_deadline(
    pair: Pair, reference: Reference, prompt: Prompt, thread: ThreadPoolExecutor
) -> None:
    params = pair.prefilled(prompt)
    with pair.prefill.frozen():
        assert soon(thread.submit(pair.decode.ask, prompt, 8, params)).tokens == reference(prompt)
    freed(pair, LEASE_S + SLACK_S)


def test_p_stopped_while_d_reads(
    pair: Pair, reference: Reference, prompt: Prompt, reads: Reads, thread: ThreadPoolExecutor
) -> None:
    params = pair.prefilled(prompt)
    with reads.slow():
        reply = thread.submit(pair.decode.ask, prompt, 8, params)
        reads.wait_until_begun()
        with pair.prefill.frozen():
            assert soon(reply).tokens == reference(prompt)
            assert soon(reply).cached == 0, "without the last check nothing is believed"


# -- the decode engine -------------------------------------------------------------------------------


def test_d_killed_while_it_reads(
    pair: Pair, prompt: Prompt, reads: Reads, thread: ThreadPoolExecutor
) -> None:
    params = pair.prefilled(prompt)
    with reads.slow():
        reply = thread.submit(pair.decode.ask, prompt, 8, params)
        reads.wait_until_begun()
        pair.decode.kill()
    try:
        assert isinstance(reply.exception(60), OSError | http.client.HTTPException)
        freed(pair, LEASE_S + SLACK_S)
    finally:
        pair.decode.launch().wait()


def test_d_stopped_while_it_reads_until_the_pages_are_anothers(
    pair: Pair,
    reference: Reference,
    prompt: Prompt,
    reads: Reads,
    thread: ThreadPoolExecutor,
    rng: random.Random,
) -> None:
    params = pair.prefilled(prompt)
    with reads.slow():
        reply = thread.submit(pair.decode.ask, prompt, 8, params)
        reads.wait_until_begun()
        with pair.decode.frozen():
            freed(pair, LEASE_S + SLACK_S)
            for _ in range(3):
                pair.prefill.ask(random_tokens(rng, P_PAGES * PAGE // 3), 1)
        assert soon(reply).tokens == reference(prompt)
    assert soon(reply).cached == 0
    failures = pair.taken().failures
    assert failures.keys() & {"gone", "expired", "timeout"}, failures


def test_d_rejects_the_request(pair: Pair, prompt: Prompt) -> None:
    expired = pair.prefill.value("kvferry_handoff_expired_total")
    params = pair.prefilled(prompt)
    with pytest.raises(HttpError) as rejected:
        pair.decode.ask(prompt, 5000, params)
    assert rejected.value.status == 400
    freed(pair, LEASE_S + SLACK_S)
    assert pair.prefill.value("kvferry_handoff_expired_total") == expired, "released, as vLLM tells of it"


def test_d_is_never_asked(pair: Pair, prompt: Prompt) -> None:
    expired = pair.prefill.value("kvferry_handoff_expired_total")
    pair.prefilled(prompt)
    assert pair.prefill.idle_usage() > 0
    freed(pair, LEASE_S + SLACK_S)
    assert pair.prefill.value("kvferry_handoff_expired_total") == expired + 1


# -- clients -----------------------------------------------------------------------------------------


def test_clients_leave_p_amid_the_prefill(pair: Pair, rng: random.Random) -> None:
    for pause_s in (0.0, 0.02, 0.05, 0.1, 0.2):
        requests = [pair.prefill.open(random_tokens(rng, 1200), 1, ASK) for _ in range(3)]
        time.sleep(pause_s)  # a moment like any other: the outcome is the same for each
        for request in requests:
            request.abort()
    freed(pair, LEASE_S + SLACK_S)


def test_a_client_leaves_d_amid_the_transfer(pair: Pair, prompt: Prompt, reads: Reads) -> None:
    params = pair.prefilled(prompt)
    with reads.slow():
        request = pair.decode.open(prompt, 8, params)
        reads.wait_until_begun()
        request.abort()
        freed(pair, DEADLINE_S + SLACK_S)


@pytest.fixture
def busy(pair: Pair, rng: random.Random) -> Iterator[Callable[[], None]]:
    """D decodes as many requests as it may at once; call to end that."""
    requests = [pair.decode.open(random_tokens(rng, 40), 2000) for _ in range(16)]

    def end() -> None:
        for request in requests:
            request.abort()

    try:
        running_ = "vllm:num_requests_running"
        wait_until("D is full", lambda: pair.decode.metrics().value(running_) == len(requests))
        yield end
    finally:
        end()


def waits(pair: Pair) -> None:
    """Wait until a request has been in D's queue for longer than a lease lives without being renewed."""
    waiting = "vllm:num_requests_waiting"
    wait_until("D has a request in its queue", lambda: pair.decode.metrics().value(waiting) == 1)
    end = time.monotonic() + 1.5 * LEASE_S
    while time.monotonic() < end:
        assert pair.prefill.idle_usage() > 0, "the lease is renewed"
        assert pair.decode.metrics().value(waiting) == 1
        time.sleep(0.1)


def test_a_request_may_wait_at_d_for_longer_than_a_lease(
    pair: Pair,
    reference: Reference,
    prompt: Prompt,
    busy: Callable[[], None],
    thread: ThreadPoolExecutor,
) -> None:
    reply = thread.submit(pair.decode.ask, prompt, 8, pair.prefilled(prompt))
    waits(pair)
    busy()
    assert soon(reply).tokens == reference(prompt)
    assert soon(reply).cached == LENGTH


def test_a_client_leaves_d_before_its_request_was_scheduled(
    pair: Pair, prompt: Prompt, busy: Callable[[], None]
) -> None:
    request = pair.decode.open(prompt, 8, pair.prefilled(prompt))
    waits(pair)
    request.abort()
    freed(pair, LEASE_S + SLACK_S)


def test_a_router_tries_again_with_the_same_params(
    pair: Pair, reference: Reference, prompt: Prompt, reads: Reads
) -> None:
    params = pair.prefilled(prompt)
    with reads.slow():
        first = pair.decode.open(prompt, 8, params)
        reads.wait_until_begun()
        second = pair.decode.open(prompt, 8, params)
        first.abort()
        assert second.completion().tokens == reference(prompt)
    assert pair.decode.ask(prompt, params=params).tokens == reference(prompt)


# -- the way between them ----------------------------------------------------------------------------


@pytest.fixture
def proxy(pair: Pair, prompt: Prompt) -> Iterator[tuple[Proxy, dict[str, Json]]]:
    """The side channel through a proxy, and the params of a prefill that lead there."""
    params = pair.prefilled(prompt)
    with Proxy(params["remote_port"]) as way:
        yield way, params | {"remote_port": way.port}


def test_the_side_channel_works_through_a_proxy(
    pair: Pair, reference: Reference, prompt: Prompt, proxy: tuple[Proxy, dict[str, Json]]
) -> None:
    """The control."""
    way, params = proxy
    reply = pair.decode.ask(prompt, params=params)
    assert reply.tokens == reference(prompt)
    assert reply.cached == LENGTH
    assert way.forwarded_bytes > 0


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_the_side_channel_is_gone_before_d_asks(
    pair: Pair,
    reference: Reference,
    prompt: Prompt,
    proxy: tuple[Proxy, dict[str, Json]],
    thread: ThreadPoolExecutor,
    fault: str,
) -> None:
    way, params = proxy
    getattr(way, fault)()
    assert soon(thread.submit(pair.decode.ask, prompt, 8, params)).tokens == reference(prompt)
    way.mend()
    freed(pair, LEASE_S + SLACK_S)
    again = pair.prefilled(prompt) | {"remote_port": way.port}
    pair.decode.reset()
    reply = soon(thread.submit(pair.decode.ask, prompt, 8, again))
    assert (reply.tokens, reply.cached) == (reference(prompt), LENGTH)


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_the_side_channel_is_gone_while_d_reads(
    pair: Pair,
    reference: Reference,
    prompt: Prompt,
    proxy: tuple[Proxy, dict[str, Json]],
    reads: Reads,
    thread: ThreadPoolExecutor,
    fault: str,
) -> None:
    way, params = proxy
    with reads.slow():
        reply = thread.submit(pair.decode.ask, prompt, 8, params)
        reads.wait_until_begun()
        getattr(way, fault)()
        assert soon(reply).tokens == reference(prompt)
    assert soon(reply).cached == 0
    freed(pair, LEASE_S + SLACK_S)
