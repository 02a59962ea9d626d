"""Whatever a router says of a handoff, the answer is the prompt's, it comes soon, and the engine goes on."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import wait_until
from pair import ASK, Pair, Reference, peer, running
from prompts import random_tokens
from serving import HttpError, free_port

DEADLINE_S = 10.0
"""Of a transfer at D."""
LEASE_S = 8.0
SOON_S = 2 * DEADLINE_S + 6.0
"""What an answer may take on a busy machine after a transfer was given up."""
LENGTH = 150

HUGE = "x" * 100_000
FIELDS = (
    "do_remote_prefill",
    "do_remote_decode",
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "tp_size",
    "dcp_size",
    "pp_size",
    "remote_num_tokens",
    "remote_blocks_expiry_time",
    "transfer_mode",
)
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**64, 1.5, 1e308, "", "x", HUGE, "\0", "ü\u2028"),
    *([], [[]], [[-1]], [[2**40]], [["a"]], [[0] * 10_000], {}, {"a": {"b": [1]}}),
)


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    times = {"lease_s": LEASE_S, "deadline_s": DEADLINE_S}
    config = {"kvferry": peer(**times)}
    with running(model, tmp_path_factory.mktemp("hostile"), config, config) as engines:
        yield engines
        engines.settle()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def check(pair: Pair, reference: Reference, prompt: tuple[int, ...], params: Any) -> int:
    """Ask D with these params; return how many tokens it did not compute. An error must be the request's own."""
    started = time.monotonic()
    try:
        reply = pair.decode.ask(prompt, params=params, deadline_s=SOON_S)
    except HttpError as error:
        if error.status in (400, 422):
            return 0
        raise
    assert time.monotonic() - started < SOON_S
    assert reply.tokens == reference(prompt)
    return reply.cached


def goes_on(pair: Pair, reference: Reference, rng: random.Random) -> None:
    """Handoffs are taken as before, and nothing of the ones before is left."""
    pair.hands_over_again(reference, rng, LENGTH)
    pair.free()


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_field(pair: Pair, reference: Reference, rng: random.Random, field: str) -> None:
    params = pair.prefilled(random_tokens(rng, LENGTH))
    for wrong in WRONG:
        check(pair, reference, random_tokens(rng, LENGTH), params | {field: wrong})
    missing = dict(params)
    del missing[field]
    check(pair, reference, random_tokens(rng, LENGTH), missing)
    goes_on(pair, reference, rng)


@pytest.mark.parametrize("params", [{}, {"a": 1}, {"do_remote_prefill": True}, {"": None}, {HUGE: HUGE}])
def test_other_params_altogether(
    pair: Pair, reference: Reference, rng: random.Random, params: dict[str, Any]
) -> None:
    assert check(pair, reference, random_tokens(rng, LENGTH), params) == 0
    prompt = random_tokens(rng, LENGTH)
    assert pair.prefill.ask(prompt, params=params).tokens == reference(prompt)
    goes_on(pair, reference, rng)


@pytest.mark.parametrize("params", ["text", 7, [1, 2], [["do_remote_prefill", True]]])
def test_params_that_are_no_mapping_are_the_requests_own_error(
    pair: Pair, reference: Reference, rng: random.Random, params: Any
) -> None:
    with pytest.raises(HttpError) as refused:
        pair.decode.ask(random_tokens(rng, LENGTH), params=params)
    assert refused.value.status in (400, 422)
    goes_on(pair, reference, rng)


def test_another_prompts_pages_are_refused(pair: Pair, reference: Reference, rng: random.Random) -> None:
    """And they are taken, as the control, for the prompt they are of."""
    mine, other = random_tokens(rng, LENGTH), random_tokens(rng, LENGTH)
    params = pair.prefilled(other)
    before = pair.taken()
    assert check(pair, reference, mine, params) == 0
    assert pair.taken().since(before).failures == {"content": 1}
    last_differs = (*other[:-1], (other[-1] + 1 - 2) % 510 + 2)
    check(pair, reference, last_differs, pair.prefilled(other))
    assert check(pair, reference, other, pair.prefilled(other)) == LENGTH
    goes_on(pair, reference, rng)


def test_more_or_fewer_tokens_than_there_are(pair: Pair, reference: Reference, rng: random.Random) -> None:
    for length in (1, 40, LENGTH - 1, LENGTH + 1, 400, 10**6):
        prompt = random_tokens(rng, LENGTH)
        check(pair, reference, prompt, pair.prefilled(prompt) | {"remote_num_tokens": length})
    prompt = random_tokens(rng, 400)
    check(pair, reference, prompt, pair.prefilled(prompt[:LENGTH]) | {"remote_num_tokens": 400})
    check(pair, reference, prompt[: LENGTH - 30], pair.prefilled(prompt[:LENGTH]))
    goes_on(pair, reference, rng)


def test_a_longer_prompt_that_begins_with_what_is_held_takes_the_begin(
    pair: Pair, reference: Reference, rng: random.Random
) -> None:
    prompt = random_tokens(rng, 2 * LENGTH)
    assert check(pair, reference, prompt, pair.prefilled(prompt[:LENGTH])) > 0
    goes_on(pair, reference, rng)


def test_another_requests_and_another_engines_name(
    pair: Pair, reference: Reference, rng: random.Random
) -> None:
    first, second = random_tokens(rng, LENGTH), random_tokens(rng, LENGTH)
    one, other = pair.prefilled(first), pair.prefilled(second)
    for wrong in (
        {"remote_request_id": other["remote_request_id"]},
        {"remote_request_id": "cmpl-nobody"},
        {"remote_engine_id": "nobody"},
        {"remote_engine_id": one["remote_request_id"], "remote_request_id": one["remote_engine_id"]},
    ):
        assert check(pair, reference, first, one | wrong) == 0
        pair.decode.reset()
    goes_on(pair, reference, rng)


@pytest.mark.parametrize(
    "host",
    ["192.0.2.1", "example.com", "169.254.169.254", "::ffff:192.0.2.1", "0.0.0.0", "localhost.example.com"],
)
def test_a_host_that_is_not_allowed_is_not_dialled(
    pair: Pair, reference: Reference, rng: random.Random, host: str
) -> None:
    prompt = random_tokens(rng, LENGTH)
    before = pair.taken()
    assert check(pair, reference, prompt, pair.prefilled(prompt) | {"remote_host": host}) == 0
    assert pair.taken().since(before).failures.keys() <= {"params"}
    assert "is not allowed" in pair.decode.log
    goes_on(pair, reference, rng)


def test_ports_where_nobody_or_somebody_else_listens(
    pair: Pair, reference: Reference, rng: random.Random
) -> None:
    for port in (free_port(), pair.prefill.port, pair.decode.port):
        prompt = random_tokens(rng, LENGTH)
        assert check(pair, reference, prompt, pair.prefilled(prompt) | {"remote_port": port}) == 0
    goes_on(pair, reference, rng)


def test_a_lease_that_has_expired(pair: Pair, reference: Reference, rng: random.Random) -> None:
    prompt = random_tokens(rng, LENGTH)
    params = pair.prefilled(prompt)
    assert pair.prefill.idle_usage() > 0, "the control: they are held"
    wait_until("the pages are freed", lambda: pair.prefill.idle_usage() == 0.0, 3 * LEASE_S)
    assert check(pair, reference, prompt, params) == 0
    counted = pair.prefill.counted()
    assert counted.value("kvferry_handoff_expired_total") > 0
    goes_on(pair, reference, rng)


def test_params_used_twice(pair: Pair, reference: Reference, rng: random.Random) -> None:
    prompt = random_tokens(rng, LENGTH)
    params = pair.prefilled(prompt)
    assert check(pair, reference, prompt, params) == LENGTH
    pair.decode.reset()
    check(pair, reference, prompt, params)
    goes_on(pair, reference, rng)


def test_the_answers_would_differ(reference: Reference) -> None:
    """The control for all of the above: different prompts have different answers."""
    rng = random.Random(0)
    answers = {reference(random_tokens(rng, LENGTH)) for _ in range(20)}
    assert len(answers) == 20


def test_both_halves_at_an_engine_that_does_only_one(
    pair: Pair, reference: Reference, rng: random.Random
) -> None:
    prompt = random_tokens(rng, LENGTH)
    params = pair.prefilled(prompt)
    assert check(pair, reference, prompt, params | ASK | {"do_remote_prefill": True}) == 0
    assert check(pair, reference, prompt, params | {"do_remote_decode": True}) == LENGTH
    goes_on(pair, reference, rng)
