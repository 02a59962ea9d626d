"""What an S3 tier does when the store dies, hangs, is full, or answers nonsense: it says so in time, and goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from s3_server import LAYOUT, OpenS3, Weed, make_context, running_weed
from s3_stand_in import Answer, error, reply, stand_in
from test_s3_tier import empty_frame, key_of, load_verified, sealed_frame

from kvferry.connector.errors import ClosedError, TierError, TierTimeout, TierUnavailable
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.layout import BlockLayout
from kvferry.connector.tier import Outcome
from kvferry.plugins.s3.tier import S3Tier

LARGE = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=64, head_dim=16384, itemsize=2)
"""4 MiB."""
FRAME_BYTES = HEADER_BYTES + LAYOUT.payload_bytes
DEADLINE_S = 1.0
LATE_S = 1.0
"""How much later than its deadline a call may end, on a busy machine."""


@contextlib.contextmanager
def in_time(limit_s: float = DEADLINE_S + LATE_S) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < limit_s


def wait_until(holds: Callable[[], bool], limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.05)


def serves(tier: S3Tier, number: int) -> bool:
    try:
        return load_verified(tier, [key_of(number)]) == [Outcome.OK]
    except TierError:
        return False


# ---- a real server that dies and hangs


def test_killed_and_started_again_its_blocks_are_hits_again(own_weed: Weed, open_s3: OpenS3) -> None:
    tier = open_s3(own_weed, make_context(deadline_s=DEADLINE_S))
    tier.store([sealed_frame(key_of(1))])
    own_weed.kill()
    for call in (
        lambda: tier.load([empty_frame(key_of(1))]),
        lambda: tier.store([sealed_frame(key_of(2))]),
        lambda: tier.contains([key_of(1)]),
        lambda: tier.delete([key_of(1)]),
    ):
        with in_time(), pytest.raises(TierUnavailable, match="no connection"):
            call()
    own_weed.start()
    wait_until(lambda: serves(tier, 1))
    assert tier.store([sealed_frame(key_of(2))]) == [Outcome.OK]


def test_killed_in_the_middle_of_loads(own_weed: Weed, open_s3: OpenS3) -> None:
    """Every load ends, with whole blocks or none, and what is reported OK is right."""
    tier = open_s3(own_weed, make_context(layout=LARGE, deadline_s=5.0), max_in_flight=8)
    keys = [key_of(number) for number in range(16)]
    assert tier.store([sealed_frame(key, LARGE) for key in keys]) == [Outcome.OK] * 16
    outcomes: list[set[Outcome]] = []
    has_loaded = threading.Event()

    def load_until_it_fails() -> None:
        with contextlib.suppress(TierError):
            while len(outcomes) < 1000:
                found = set(load_verified(tier, keys, LARGE))
                outcomes.append(found)
                has_loaded.set()
                if found != {Outcome.OK}:
                    return

    loader = threading.Thread(target=load_until_it_fails)
    loader.start()
    assert has_loaded.wait(30)
    own_weed.kill()
    loader.join(15)
    assert not loader.is_alive()
    assert set().union(*outcomes) <= {Outcome.OK, Outcome.FAILED}
    assert len(outcomes) < 1000


def test_frozen_no_call_waits_past_its_deadline_and_hits_resume(own_weed: Weed, open_s3: OpenS3) -> None:
    tier = open_s3(own_weed, make_context(deadline_s=DEADLINE_S))
    keys = [key_of(number) for number in range(40)]
    tier.store([sealed_frame(key) for key in keys])
    own_weed.freeze()
    targets = [empty_frame(key) for key in keys]
    with in_time(), pytest.raises(TierTimeout, match="no answer in time"):
        tier.load(targets)
    with in_time(), pytest.raises(TierTimeout):
        tier.store([sealed_frame(key_of(99))])
    with in_time(), pytest.raises(TierTimeout):
        tier.contains(keys)
    own_weed.thaw()
    wait_until(lambda: serves(tier, 1))
    assert load_verified(tier, keys) == [Outcome.OK] * 40
    assert all(set(target.payload) == {0xEE} for target in targets), "a late answer was written"


def test_closing_does_not_wait_for_a_frozen_store(own_weed: Weed, open_s3: OpenS3) -> None:
    tier = open_s3(own_weed, make_context(deadline_s=60.0))
    raised: list[BaseException] = []

    def load() -> None:
        try:
            tier.load([empty_frame(key_of(1))])
        except TierError as error:
            raised.append(error)
        except ClosedError as error:
            raised.append(error)

    own_weed.freeze()
    loader = threading.Thread(target=load)
    loader.start()
    wait_until(lambda: tier._requests.under_way() > 0)
    with in_time(5.0):
        tier.close()
    loader.join(5)
    assert not loader.is_alive()
    assert len(raised) == 1


def test_a_full_store_fails_stores_and_still_serves_loads(tmp_path: Path, open_s3: OpenS3) -> None:
    with running_weed(tmp_path / "weed", volume_mb=8, volumes=8) as weed:
        tier = open_s3(weed, make_context(layout=LARGE))
        stored: list[int] = []
        outcome, number = Outcome.OK, 0
        while outcome is Outcome.OK and number < 60:
            (outcome,) = tier.store([sealed_frame(key_of(number), LARGE)])
            stored += [number] if outcome is Outcome.OK else []
            number += 1
        assert outcome in (Outcome.FAILED, Outcome.NO_ROOM), "the server was to be full by now"
        assert stored
        keys = [key_of(number) for number in stored]
        assert load_verified(tier, keys, LARGE) == [Outcome.OK] * len(keys)
        assert load_verified(tier, [key_of(number - 1)], LARGE) == [Outcome.MISSING]


# ---- answers that a real server cannot be made to give


@pytest.fixture
def answered(open_s3: OpenS3, weed: Weed) -> Iterator[Callable[[Answer], tuple[S3Tier, list[str]]]]:
    """Opens a tier on a stand-in."""
    with contextlib.ExitStack() as stack:

        def make(answer: Answer) -> tuple[S3Tier, list[str]]:
            endpoint, seen = stack.enter_context(stand_in(answer))
            return open_s3(weed, make_context(deadline_s=DEADLINE_S), endpoint_url=endpoint), seen

        yield make


Answered = Callable[[Answer], tuple[S3Tier, list[str]]]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (507, "XMinioStorageFull"),
        (507, ""),
        (403, "QuotaExceeded"),
        (400, "XMinioAdminBucketQuotaExceeded"),
    ],
)
def test_a_full_store_that_says_so_has_no_room(status: int, code: str, answered: Answered) -> None:
    tier, _ = answered(error(status, code))
    assert tier.store([sealed_frame(key_of(1))]) == [Outcome.NO_ROOM]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (429, "TooManyRequests"),
        (502, ""),
        (403, "AccessDenied"),
        (404, "NoSuchBucket"),
        (301, "PermanentRedirect"),
    ],
)
def test_a_store_that_serves_nobody_is_unavailable(status: int, code: str, answered: Answered) -> None:
    tier, _ = answered(error(status, code))
    for call in (
        lambda: tier.load([empty_frame(key_of(1)), empty_frame(key_of(2))]),
        lambda: tier.store([sealed_frame(key_of(1))]),
    ):
        with in_time(), pytest.raises(TierUnavailable, match=r"tier 's3': http"):
            call()


def test_an_internal_error_is_one_blocks_trouble(answered: Answered) -> None:
    tier, seen = answered(error(500, "InternalError"))
    with in_time():
        assert tier.load([empty_frame(key_of(1))]) == [Outcome.FAILED]
    assert 1 <= len(seen) <= 3, "a few quick retries, no more"


def test_part_of_a_batch_that_fails_leaves_the_rest(answered: Answered) -> None:
    good, bad = sealed_frame(key_of(1)), key_of(2)

    def answer(request: BaseHTTPRequestHandler) -> None:
        if bad.hex() in request.path:
            return error(503, "SlowDown")(request)
        return serve_block(request, bytes(good.header) + bytes(good.body))

    tier, _ = answered(answer)
    assert load_verified(tier, [key_of(1), bad]) == [Outcome.OK, Outcome.FAILED]


def serve_block(request: BaseHTTPRequestHandler, body: bytes, *, total: int | None = None) -> None:
    size = len(body) if total is None else total
    reply(
        request,
        206,
        body,
        Content_Range=f"bytes 0-{size - 1}/{size}",
        ETag='"0"',
        Last_Modified="Tue, 24 Nov 2026 00:00:00 GMT",
    )


def test_a_body_that_ends_early_fails(answered: Answered) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(206)
        request.send_header("Content-Range", f"bytes 0-{FRAME_BYTES - 1}/{FRAME_BYTES}")
        request.send_header("Content-Length", str(FRAME_BYTES))
        request.send_header("ETag", '"0"')
        request.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
        request.end_headers()
        request.wfile.write(bytes(1000))
        request.close_connection = True

    tier, _ = answered(answer)
    with in_time():
        assert outcomes_of(lambda: tier.load([empty_frame(key_of(1))])) == [Outcome.FAILED]


def outcomes_of(call: Callable[[], list[Outcome]]) -> list[Outcome]:
    """A batch of one: that it failed may be said of the block or of the tier."""
    try:
        return call()
    except TierError:
        return [Outcome.FAILED]


def test_a_body_shorter_than_announced_fails(answered: Answered) -> None:
    tier, _ = answered(lambda request: serve_block(request, bytes(FRAME_BYTES - 10), total=FRAME_BYTES))
    assert outcomes_of(lambda: tier.load([empty_frame(key_of(1))])) == [Outcome.FAILED]


def test_a_body_that_goes_on_after_the_object_is_cut_off(answered: Answered) -> None:
    parts, sent = 400, []

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(206)
        request.send_header("Content-Range", f"bytes 0-{FRAME_BYTES - 1}/{FRAME_BYTES}")
        request.send_header("Content-Length", str(parts << 20))
        request.send_header("ETag", '"0"')
        request.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
        request.end_headers()
        for _ in range(parts):
            request.wfile.write(bytes(1 << 20))
            sent.append(1)

    tier, _ = answered(answer)
    target = empty_frame(key_of(1))
    with in_time():
        assert tier.load([target]) == [Outcome.FAILED]
    assert len(sent) < parts // 4, "it was read to the end"
    assert set(target.payload) == {0xEE}


def test_an_answer_of_no_known_length_fails(answered: Answered) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(206)
        request.send_header("Content-Range", f"bytes 0-{FRAME_BYTES - 1}/{FRAME_BYTES}")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.wfile.write(b"5\r\nhello\r\n0\r\n\r\n")

    tier, _ = answered(answer)
    assert tier.load([empty_frame(key_of(1))]) == [Outcome.FAILED]


def test_what_a_store_says_does_not_reach_a_message(answered: Answered) -> None:
    """A store may repeat what was signed, or anything else."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        body = b"<Error><Code>SignatureDoesNotMatch</Code><StringToSign>hush-hush</StringToSign></Error>"
        reply(request, 403, body)

    tier, _ = answered(answer)
    with pytest.raises(TierUnavailable) as raised:
        tier.load([empty_frame(key_of(1))])
    assert "403 SignatureDoesNotMatch" in str(raised.value)
    assert "hush-hush" not in str(raised.value)
