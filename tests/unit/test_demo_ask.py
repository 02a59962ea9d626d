"""The demo's client: what it reads out of a stream and out of /metrics, and what it says when it can't."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import click
import pytest

from kvferry.engines.vllm.demo import ask

PAGE = """\
# HELP kvferry_loaded_bytes_total Bytes brought from a tier and verified.
# TYPE kvferry_loaded_bytes_total counter
kvferry_loaded_bytes_total{engine="0",model_name="a \\"b\\"",tier="disk"} 7.6677120e+07
kvferry_loaded_bytes_total{engine="0",model_name="demo",tier="s3"} 5.0
kvferry_requests_total{engine="0",model_name="demo",outcome="hit"} 2.0
kvferry_requests_total{engine="0",model_name="demo",outcome="miss"} 3.0
process_start_time_seconds 1.79e+09
"""


def test_metrics_are_told_apart_by_tier_and_summed_over_other_labels() -> None:
    metrics = ask.parse_metrics(PAGE)
    assert metrics.total("kvferry_loaded_bytes_total", tier="disk") == 76_677_120
    assert metrics.total("kvferry_loaded_bytes_total", tier="s3") == 5
    assert metrics.total("kvferry_requests_total") == 5
    assert metrics.total("process_start_time_seconds") == 1.79e9


def test_a_metric_that_was_never_counted_is_zero() -> None:
    assert ask.parse_metrics(PAGE).total("kvferry_refusals_total", tier="disk") == 0


def test_the_document_comes_with_the_package_and_holds_the_answers() -> None:
    text = ask.document()
    for fact in ("harbour master", "two thousand books", "fourteen times a day"):
        assert fact in text


class ScriptedServer(ThreadingHTTPServer):
    """Answers as vLLM does, but with what the test wrote; each GET of /metrics takes the next page."""

    daemon_threads = True
    events: list[dict[str, object]]
    pages: list[str]
    asked: list[dict[str, object]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200 if self.server.events else 500)
        self.end_headers()
        for event in self.server.events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def do_GET(self) -> None:
        page = self.server.pages.pop(0) if len(self.server.pages) > 1 else self.server.pages[0]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(page.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def chunk(token_ids: list[int], content: str = "") -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "token_ids": token_ids}]}


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.pages = [], [""]
        server.events = [
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
            chunk([5], "Pa"),
            chunk([6, 7], "ris. "),
            {
                "choices": [],
                "usage": {"prompt_tokens": 1700, "prompt_tokens_details": {"cached_tokens": 1664}},
            },
        ]
        thread = threading.Thread(target=server.serve_forever, name="scripted-server")
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_answer_is_read_from_the_stream(server: ScriptedServer) -> None:
    answer = ask.Client(server.url).ask("What is the capital of France?")
    assert (answer.text, answer.tokens) == ("Paris.", (5, 6, 7))
    assert (answer.prompt_tokens, answer.reused_tokens) == (1700, 1664)
    assert answer.first_token_s > 0


def test_the_document_comes_first_and_the_question_last(server: ScriptedServer) -> None:
    ask.Client(server.url).ask("What is the capital of France?")
    (request,) = server.asked
    (message,) = request["messages"]  # type: ignore[misc]
    assert message["content"].startswith(ask.document())
    assert message["content"].endswith("What is the capital of France?")
    assert request["temperature"] == 0


def test_no_cached_tokens_in_the_usage_means_none(server: ScriptedServer) -> None:
    server.events[-1] = {"choices": [], "usage": {"prompt_tokens": 1700, "prompt_tokens_details": None}}
    assert ask.Client(server.url).ask("?").reused_tokens == 0


def test_what_moved_is_read_from_metrics_once_they_show_the_question(server: ScriptedServer) -> None:
    page = 'kvferry_lookup_tokens_total{{engine="0"}} {}\nkvferry_scattered_bytes_total{{engine="0"}} {}\n'
    disk = 'kvferry_loaded_bytes_total{{engine="0",tier="disk"}} {}\n'
    server.pages = [
        page.format(1000, 10) + disk.format(2),
        page.format(1040, 10) + disk.format(2),  # not yet
        page.format(2740, 110) + disk.format(52),
    ]
    answer = ask.Client(server.url).ask_kvferry("?")
    assert (answer.engine_bytes, answer.disk_bytes) == (100, 50)


def test_metrics_that_never_show_it_are_an_error_after_a_while(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "SETTLE_DEADLINE_S", 0.5)
    with pytest.raises(click.ClickException, match="in vain for kvferry counting the question"):
        ask.Client(server.url).ask_kvferry("?")


def test_a_server_that_fails_is_an_error(server: ScriptedServer) -> None:
    server.events = []
    with pytest.raises(click.ClickException, match="the server did not answer: HTTP Error 500"):
        ask.Client(server.url).ask("?")


def test_an_error_in_the_stream_is_an_error(server: ScriptedServer) -> None:
    server.events = [chunk([5], "Pa"), {"error": {"message": "EngineCore encountered an issue"}}]
    with pytest.raises(click.ClickException, match=r"broke off: .*EngineCore"):
        ask.Client(server.url).ask("?")


def test_a_stream_that_ends_early_is_an_error(server: ScriptedServer) -> None:
    del server.events[-1]
    with pytest.raises(click.ClickException, match="broke off without an answer"):
        ask.Client(server.url).ask("?")


def test_a_server_that_is_gone_is_an_error(server: ScriptedServer) -> None:
    url = server.url.rsplit(":", 1)[0]
    with pytest.raises(click.ClickException, match="the server did not answer"):
        ask.Client(f"{url}:1").ask("?")
