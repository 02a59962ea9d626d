"""The example router, between engines that do what is written down: what each is asked, in which order, and what
the client gets when one of them is down, late, wrong, or breaks off."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from fake_openai import FakeEngine, Turn, broken, drop, events, hang, reply, serving

ROUTER = Path(__file__).parents[2] / "docs/examples/disaggregated/router.py"
DEADLINE_S = 10.0
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PAGES = {
    "do_remote_prefill": True,
    "remote_block_ids": [[3, 4]],
    "remote_engine_id": "p",
    "remote_port": 5600,
}
PREFILLED = {"id": "1", "choices": [{"text": "x"}], "kv_transfer_params": PAGES}
ANSWER = {"id": "2", "choices": [{"text": "forty-two"}]}
STREAM = [
    b'data: {"choices": [{"delta": {"content": "h\xc3\xa9"}}]}\n\n',
    b"data: {}\n\n",
    b"data: [DONE]\n\n",
]
ASKED = {"model": "m", "prompt": "Why?", "max_tokens": 9, "min_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def router() -> ModuleType:
    spec = importlib.util.spec_from_file_location("router", ROUTER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["router"] = module
    spec.loader.exec_module(module)
    return module


class Stage(NamedTuple):
    """Two prefill and two decode engines, of which a router is told those that the test needs."""

    router: ModuleType
    prefill: tuple[FakeEngine, FakeEngine]
    decode: tuple[FakeEngine, FakeEngine]
    order: list[str]
    log: pytest.LogCaptureFixture

    @contextlib.contextmanager
    def client(self, prefills: int = 1, decodes: int = 1, **limits: float) -> Iterator[Client]:
        app = self.router.create_app(
            [engine.url for engine in self.prefill[:prefills]],
            [engine.url for engine in self.decode[:decodes]],
            self.router.Limits(**limits),
        )
        with serving(app) as port:
            yield Client(port)

    def line(self) -> str:
        """Wait for the log's line about a request, and return it."""
        wait_for(lambda: any("path=" in record.getMessage() for record in self.log.records))
        return next(record.getMessage() for record in self.log.records if "path=" in record.getMessage())


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    @contextlib.contextmanager
    def post(
        self, body: object, path: str = COMPLETIONS, headers: dict[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        with contextlib.closing(self.posted(body, path, headers)) as connection:
            yield connection.getresponse()

    def posted(
        self, body: object, path: str = COMPLETIONS, headers: dict[str, str] | None = None
    ) -> http.client.HTTPConnection:
        """Send a request and return without waiting for an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, headers or {})
        return connection

    def ask(self, body: object, path: str = COMPLETIONS, **headers: str) -> tuple[int, bytes]:
        with self.post(
            body, path, {name.replace("_", "-"): value for name, value in headers.items()}
        ) as response:
            return response.status, response.read()

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def stage(router: ModuleType, caplog: pytest.LogCaptureFixture) -> Iterator[Stage]:
    caplog.set_level(logging.INFO, "router")
    order: list[str] = []
    engines = [
        FakeEngine(reply(PREFILLED if name[0] == "p" else ANSWER), name, order)
        for name in ("p0", "p1", "d0", "d1")
    ]
    with contextlib.ExitStack() as stack:
        p0, p1, d0, d1 = (stack.enter_context(engine.running()) for engine in engines)
        yield Stage(router, (p0, p1), (d0, d1), order, caplog)


# What each engine is asked


def test_the_prompt_is_computed_first_and_the_decode_engine_is_told_where_its_pages_are(stage: Stage) -> None:
    with stage.client() as client:
        status, answer = client.ask(ASKED)
    assert (status, json.loads(answer)) == (200, ANSWER)
    assert stage.order == ["p0", "d0"]
    (prefill,), (decode,) = stage.prefill[0].seen, stage.decode[0].seen
    assert (prefill.path, decode.path) == (COMPLETIONS, COMPLETIONS)
    assert decode.body == {**ASKED, "kv_transfer_params": PAGES}
    assert prefill.body == {
        "model": "m",
        "prompt": "Why?",
        "temperature": 0,
        "max_tokens": 1,
        "stream": False,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        },
    }


def test_a_chat_is_asked_for_one_token_by_both_of_its_names_and_not_as_a_stream(stage: Stage) -> None:
    chat = {
        "messages": [{"role": "user", "content": "Why?"}],
        "max_completion_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stage.decode[0].usual = events(STREAM)
    with stage.client() as client:
        client.ask(chat, CHAT)
    (prefill,), (decode,) = stage.prefill[0].seen, stage.decode[0].seen
    assert prefill.path == decode.path == CHAT
    assert decode.body == {**chat, "kv_transfer_params": PAGES}
    assert (prefill.body["max_tokens"], prefill.body["max_completion_tokens"]) == (1, 1)
    assert prefill.body["stream"] is False
    assert "stream_options" not in prefill.body


def test_both_engines_and_the_client_see_the_same_request_id_and_credentials(stage: Stage) -> None:
    headers = {"X-Request-Id": "abc-1", "Authorization": "Bearer s", "Cookie": "c"}
    with stage.client() as client, client.post(ASKED, headers=headers) as response:
        assert response.headers["X-Request-Id"] == "abc-1"
    for engine in (stage.prefill[0], stage.decode[0]):
        seen = engine.seen[0].headers
        assert (seen["x-request-id"], seen["authorization"]) == ("abc-1", "Bearer s")
        assert "cookie" not in seen
    assert stage.line().startswith("request=abc-1 ")


@pytest.mark.parametrize("hostile", ["", "a b", "x" * 129, "a=1 outcome=ok"])
def test_a_request_id_that_could_not_stand_in_a_log_is_replaced(stage: Stage, hostile: str) -> None:
    with stage.client() as client:
        client.ask(ASKED, X_Request_Id=hostile)
    made = stage.decode[0].seen[0].headers["x-request-id"]
    assert len(made) == 32
    assert made == stage.prefill[0].seen[0].headers["x-request-id"]


def test_a_client_can_not_say_from_where_pages_are_read(stage: Stage) -> None:
    hostile = {**ASKED, "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "192.0.2.1"}}
    stage.prefill[0].usual = reply({"choices": []})
    with stage.client() as client:
        client.ask(hostile)
    assert stage.decode[0].bodies == [ASKED]
    assert "192.0.2.1" not in json.dumps(stage.prefill[0].bodies)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"n": 2}, "several-answers"),
        ({"best_of": 3}, "several-answers"),
        ({"use_beam_search": True}, "several-answers"),
        ({"prompt": ["a", "b"]}, "several-prompts"),
        ({"prompt": [[1, 2], [3]]}, "several-prompts"),
        ({"prompt": []}, None),
        ({"prompt": ["a"]}, None),
        ({"prompt": [[1, 2]]}, None),
        ({"prompt": [1, 2, 3]}, None),
        ({"n": 1}, None),
        ({"echo": True}, "asks-about-the-prompt"),
        ({"prompt_logprobs": 0}, "asks-about-the-prompt"),
    ],
)
def test_only_what_is_one_sequence_is_shared(stage: Stage, more: dict[str, Any], why: str | None) -> None:
    with stage.client() as client:
        client.ask({**ASKED, **more})
    assert stage.order == (["d0"] if why else ["p0", "d0"])
    assert f"handoff={why or 'yes'} " in stage.line()


# What the client gets


def test_a_stream_is_passed_on_byte_for_byte_while_it_is_made(stage: Stage) -> None:
    proceed = threading.Event()
    stage.decode[0].usual = events(STREAM, proceed)
    with stage.client() as client, client.post({**ASKED, "stream": True}) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        first = response.read1(len(STREAM[0]))
        assert first == STREAM[0]  # and the engine has not said more yet
        proceed.set()
        assert first + response.read() == b"".join(STREAM)


def test_events_cut_anywhere_by_the_network_arrive_whole(stage: Stage) -> None:
    whole = b"".join(STREAM)
    stage.decode[0].usual = events([whole[at : at + 5] for at in range(0, len(whole), 5)])
    with stage.client() as client:
        assert client.ask({**ASKED, "stream": True}) == (200, whole)


def test_what_a_decode_engine_refuses_is_refused_and_nobody_else_is_asked(stage: Stage) -> None:
    refusal = {"error": {"message": "the prompt is too long"}}
    stage.prefill[0].usual = stage.decode[0].usual = reply(refusal, 400)
    with stage.client(decodes=2) as client:
        status, answer = client.ask(ASKED)
        assert (status, json.loads(answer)) == (400, refusal)
        client.ask(ASKED)
    assert len(stage.prefill[0].seen) == 2, "a refusal is not a failure: the engine is asked again"
    assert stage.decode[0].bodies == [ASKED]


# Prefill fails


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (reply({"error": "out of memory"}, 500), "prefill-failed"),
        (drop, "prefill-failed"),
        (hang(), "prefill-failed"),
        (broken([b'{"kv_transfer'], "application/json"), "prefill-failed"),
        (reply({"choices": []}), "no-params"),
        (reply({"kv_transfer_params": {}}), "no-params"),
        (reply({"kv_transfer_params": [1]}), "no-params"),
        (reply([]), "no-params"),
        (reply(b"<html>"), "no-params"),
        (reply(b'{"a":' * 100_000), "no-params"),
        (reply({"detail": "no such model"}, 404), "no-params"),
    ],
)
def test_without_a_usable_prefill_the_decode_engine_is_on_its_own(
    stage: Stage, turn: Turn, reason: str
) -> None:
    stage.prefill[0].usual = turn
    with stage.client(prefill_s=0.5) as client:
        status, answer = client.ask(ASKED)
    assert (status, json.loads(answer)) == (200, ANSWER)
    assert stage.decode[0].bodies == [ASKED]
    assert f" handoff={reason} " in stage.line()
    assert " outcome=ok" in stage.line()


def test_a_prefill_that_is_late_is_aborted(stage: Stage) -> None:
    stage.prefill[0].usual = hang()
    with stage.client(prefill_s=0.2) as client:
        client.ask(ASKED)
        assert stage.prefill[0].left.wait(DEADLINE_S)


def test_an_endless_answer_of_a_prefill_engine_is_cut_off(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.router, "ANSWER_LIMIT", 1000)
    stage.prefill[0].usual = reply({**PREFILLED, "more": "x" * 2000})
    with stage.client() as client:
        assert client.ask(ASKED)[0] == 200
    assert stage.decode[0].bodies == [ASKED]


def test_a_prefill_engine_that_is_down_costs_one_request_a_moment_and_the_next_ones_nothing(
    stage: Stage,
) -> None:
    stage.prefill[0].usual = drop
    with stage.client() as client:
        for _ in range(3):
            assert client.ask(ASKED)[0] == 200
    assert stage.order == ["p0", "d0", "d0", "d0"]


def test_another_prefill_engine_does_the_work_of_a_failed_one(stage: Stage) -> None:
    stage.prefill[0].usual = drop
    with stage.client(prefills=2) as client:
        for _ in range(3):
            client.ask(ASKED)
    assert stage.order == ["p0", "d0", "p1", "d0", "p1", "d0"]


# Decode fails


@pytest.mark.parametrize("turn", [drop, reply({"error": 1}, 500), broken([]), hang()])
def test_a_decode_engine_that_fails_before_its_first_byte_is_replaced(stage: Stage, turn: Turn) -> None:
    stage.decode[0].usual = turn
    with stage.client(decodes=2, silence_s=0.5) as client:
        status, answer = client.ask(ASKED)
    assert (status, json.loads(answer)) == (200, ANSWER)
    assert stage.order == ["p0", "d0", "d1"]
    assert stage.decode[1].bodies == [{**ASKED, "kv_transfer_params": PAGES}]


@pytest.mark.parametrize("turn", [drop, reply({"error": 1}, 500)])
def test_the_only_decode_engine_is_asked_once_more_without_pages(stage: Stage, turn: Turn) -> None:
    stage.decode[0].turns = [turn]
    with stage.client() as client:
        assert client.ask(ASKED)[0] == 200
    assert stage.decode[0].bodies == [{**ASKED, "kv_transfer_params": PAGES}, ASKED]
    assert " handoff=given-up " in stage.line()


def test_what_the_last_failing_engine_said_is_said_to_the_client(stage: Stage) -> None:
    stage.decode[0].usual = reply({"error": "out of memory"}, 500)
    with stage.client() as client:
        status, answer = client.ask(ASKED)
    assert (status, json.loads(answer)) == (500, {"error": "out of memory"})
    assert " outcome=failed" in stage.line()


def test_where_nobody_answers_the_client_is_told_to_try_again(stage: Stage) -> None:
    stage.decode[0].usual = drop
    with stage.client() as client:
        status, answer = client.ask(ASKED)
        assert status == 503
        assert "try again" in json.loads(answer)["error"]["message"]
        stage.decode[0].usual = reply(ANSWER)
        assert client.ask(ASKED)[0] == 200, "where all have failed, one is asked all the same"


def test_a_stream_that_has_begun_ends_with_an_error_event(stage: Stage) -> None:
    stage.decode[0].usual = broken([STREAM[0], STREAM[1] + b"data: {half of", b" an eve"])
    with stage.client(decodes=2) as client:
        status, answer = client.ask({**ASKED, "stream": True})
    assert status == 200
    *said, last, end = answer.split(b"\n\n")
    assert [event + b"\n\n" for event in said] == STREAM[:2]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 502
    assert end == b""
    assert "d1" not in stage.order
    assert " outcome=broken-off" in stage.line()


def test_an_answer_that_has_begun_and_is_no_stream_is_seen_to_be_incomplete(stage: Stage) -> None:
    stage.decode[0].usual = broken([b'{"choices": ['], "application/json")
    with stage.client() as client, pytest.raises(http.client.IncompleteRead):
        client.ask(ASKED)


# The client leaves


def test_a_client_that_leaves_during_the_prefill_ends_it(stage: Stage) -> None:
    stage.prefill[0].usual = hang()
    with stage.client() as client:
        connection = client.posted(ASKED)
        assert stage.prefill[0].asked.wait(DEADLINE_S)
        connection.close()
        assert stage.prefill[0].left.wait(DEADLINE_S)
        assert " outcome=client-gone" in stage.line()
    assert stage.order == ["p0"]


@pytest.mark.parametrize("first", [[], [STREAM[0]]], ids=["before-the-first-byte", "in-the-stream"])
def test_a_client_that_leaves_during_the_decode_ends_it(stage: Stage, first: list[bytes]) -> None:
    stage.decode[0].usual = hang(first)
    with stage.client(decodes=2) as client:
        connection = client.posted({**ASKED, "stream": True})
        assert stage.decode[0].asked.wait(DEADLINE_S)
        if first:
            response = connection.getresponse()
            assert response.read1(len(first[0])) == first[0]
            response.close()
        connection.close()
        assert stage.decode[0].left.wait(DEADLINE_S)
        assert " outcome=client-gone" in stage.line()
        status, engines = client.get("/healthz")
    assert status == 200
    assert engines["decode"][0] == {"url": stage.decode[0].url, "in_flight": 0, "resting": False}
    assert stage.order == ["p0", "d0"]


# Which engine


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(router: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(router, "time", clock)
    return clock


@pytest.fixture
def chooser(router: ModuleType) -> Any:
    return router.Router(["http://p0", "http://p1"], ["http://d0"], router.Limits(rest_s=5.0))


def test_the_engine_with_the_fewest_requests_is_chosen(chooser: Any, clock: Clock) -> None:
    first, second = chooser.prefill
    first.in_flight = 2
    second.in_flight = 1
    second.asked_at = 10.0
    assert chooser.pick(chooser.prefill) is second
    assert chooser.pick(chooser.prefill, but=second) is first


def test_among_equals_the_one_asked_longest_ago_is_chosen(chooser: Any, clock: Clock) -> None:
    first, second = chooser.prefill
    first.asked_at, second.asked_at = 20.0, 10.0
    assert chooser.pick(chooser.prefill) is second


def test_a_failed_engine_is_left_alone_and_then_tried_with_one_request_at_a_time(
    chooser: Any, clock: Clock
) -> None:
    first, second = chooser.prefill
    first.rests_until = clock.now + 5.0
    second.in_flight = 50
    assert chooser.pick(chooser.prefill) is second
    clock.now += 5.0
    assert chooser.pick(chooser.prefill) is first
    assert chooser.pick(chooser.prefill) is second, "the trial is not over"
    clock.now += 5.0
    assert chooser.pick(chooser.prefill) is first


def test_nobody_is_chosen_while_all_rest(chooser: Any, clock: Clock) -> None:
    for engine in chooser.prefill:
        engine.rests_until = clock.now + 1.0
    assert chooser.pick(chooser.prefill) is None


def test_an_engine_that_answers_again_is_well(stage: Stage) -> None:
    stage.prefill[0].turns = [drop]
    with stage.client(rest_s=0.05) as client:
        client.ask(ASKED)
        wait_for(lambda: not client.get("/healthz")[1]["prefill"][0]["resting"])
        client.ask(ASKED)
        client.ask(ASKED)
    assert stage.order == ["p0", "d0", "p0", "d0", "p0", "d0"]


# Everything else


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"])
def test_what_is_not_a_json_object_is_refused(stage: Stage, body: bytes) -> None:
    with stage.client() as client:
        status, answer = client.ask(body)
    assert (status, json.loads(answer)["error"]["type"]) == (400, "invalid_request_error")
    assert stage.order == []


def test_a_body_that_is_too_long_is_refused(stage: Stage) -> None:
    with stage.client(body_bytes=1000) as client:
        status, answer = client.ask({**ASKED, "prompt": "x" * 2000})
    assert (status, json.loads(answer)["error"]["message"]) == (413, "more than 1000 bytes")
    assert stage.order == []


def test_a_body_that_does_not_come_is_not_waited_for(stage: Stage) -> None:
    with stage.client(body_s=0.2) as client:
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.putrequest("POST", COMPLETIONS)
            connection.putheader("Content-Length", "100")
            connection.endheaders()
            assert connection.getresponse().status == 408
    assert stage.order == []


def test_models_are_those_of_the_decode_engines(stage: Stage) -> None:
    with stage.client() as client:
        assert client.get("/v1/models") == (200, {"object": "list", "path": "/v1/models"})


def test_the_router_is_not_well_without_anybody_to_decode(stage: Stage) -> None:
    stage.decode[0].usual = drop
    with stage.client() as client:
        assert client.get("/healthz")[0] == 200
        client.ask(ASKED)
        status, engines = client.get("/healthz")
    assert (status, engines["decode"][0]["resting"]) == (503, True)


def test_the_line_about_a_request_tells_who_did_what_and_how_long_it_took(stage: Stage) -> None:
    with stage.client() as client:
        client.ask(ASKED)
    facts = dict(fact.split("=", 1) for fact in stage.line().split())
    assert facts.keys() >= {
        "request",
        "path",
        "prefill",
        "prefill_ms",
        "decode",
        "ttft_ms",
        "handoff",
        "outcome",
    }
    assert 0 < float(facts["prefill_ms"]) <= float(facts["ttft_ms"])
    assert "Why?" not in stage.log.text, "prompts are not logged"


def test_only_urls_of_engines_are_taken(
    router: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["router.py", "--decode", "127.0.0.1:8200"])
    with pytest.raises(SystemExit):
        router.main()
    assert "is not like http://127.0.0.1:8100" in capsys.readouterr().err
