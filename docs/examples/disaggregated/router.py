"""A router for disaggregated serving: one engine reads the prompt, another one writes the answer.

Clients talk to it as to one OpenAI-compatible server. For each request it asks a prefill engine for a single
token, which makes that engine compute the prompt's KV cache and hold it; its answer says where the pages are. A
decode engine gets the client's request together with that, fetches the pages from the prefill engine, and its
answer is passed on as it comes.

Whatever goes wrong on the way costs time, not the answer: without a usable prefill the decode engine computes
the prompt itself, and a decode engine that fails before it has said anything is replaced. Engines that fail are
left alone for a few seconds and then tried with one request.

Everything runs in one event loop, and an application made by create_app shares nothing with another one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

CONNECT_S = 2.0
ANSWER_LIMIT = 8 << 20  # bytes of a prefill engine's answer, of an error's body, of one event in a stream
START, BODY = "http.response.start", "http.response.body"
EVENTS = "text/event-stream"
PASSED_ON = ("authorization", "traceparent", "tracestate")
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
HOLD_THE_PAGES = {"do_remote_decode": True, "do_remote_prefill": False} | dict.fromkeys(
    ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
)
log = logging.getLogger("router")


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes at which patience ends."""

    prefill_s: float = 60.0  # for a prefill; then the prompt is left to the decode engine
    silence_s: float = 300.0  # without a byte from a decode engine
    rest_s: float = 5.0  # for which an engine that failed is left alone
    body_s: float = 30.0  # for a client's request to arrive
    body_bytes: int = 16 << 20  # that it may have


@dataclass(eq=False)
class Engine:
    """What the router knows of an engine. Times are the monotonic clock's."""

    url: str
    in_flight: int = 0
    asked_at: float = 0.0
    rests_until: float = 0.0  # 0 while it is well


@dataclass
class Trip:
    """A client's request on its way, and what its line in the log will say."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    facts: dict[str, object] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def elapsed_ms(self) -> str:
        return f"{(time.monotonic() - self.started) * 1e3:.1f}"


class EngineError(Exception):
    """An engine did not answer as it must; with what it said instead, if anything."""

    def __init__(self, why: str, status: int = 503, body: bytes = b"") -> None:
        super().__init__(why)
        self.status, self.body = status, body or NOBODY.body


def error_response(status: int, message: str) -> Response:
    kind = "invalid_request_error" if status < 500 else "engine_unavailable"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)


NOBODY = error_response(503, "no decode engine answered; try again")


def why_alone(body: dict[str, Any]) -> str | None:
    """Tell why a request is left to a decode engine alone; None if the work can be shared.

    Pages are handed over once, for one sequence: several prompts or answers would each want them. And what is asked
    about the prompt's own tokens comes out only where the prompt is computed.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) != 1 and not all(isinstance(item, int) for item in prompt):
        return "several-prompts"
    if any(body.get(name) not in (None, 1) for name in ("n", "best_of")) or body.get("use_beam_search"):
        return "several-answers"
    if body.get("echo") or any(body.get(name) is not None for name in ("prompt_logprobs", "prompt_embeds")):
        return "asks-about-the-prompt"
    return None


def prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    """Return what a prefill engine is asked: the same prompt, one token, at once, and to hold the pages."""
    asked = {name: value for name, value in body.items() if name not in ("stream_options", "min_tokens")}
    limits = {name: 1 for name in ("max_tokens", "max_completion_tokens") if name in body} | {"max_tokens": 1}
    return asked | limits | {"stream": False, "kv_transfer_params": HOLD_THE_PAGES}


async def read(chunks: AsyncIterator[bytes], limit: int) -> bytes:
    """Read everything; an EngineError says that it is more than ``limit`` bytes."""
    whole = bytearray()
    async for chunk in chunks:
        whole += chunk
        if len(whole) > limit:
            raise EngineError(f"more than {limit} bytes")
    return bytes(whole)


async def whole_events(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield a body as it comes; of a stream of events only whole ones, so that another can follow at any time."""
    is_stream, held = response.headers.get("content-type", "").startswith(EVENTS), b""
    async for chunk in response.aiter_raw():
        held += chunk
        end = held.rfind(b"\n\n") + 2 if is_stream else len(held)
        if end > 1:
            yield held[:end]
            held = held[end:]
        if len(held) > ANSWER_LIMIT:
            raise EngineError(f"an event of more than {ANSWER_LIMIT} bytes")
    yield held


class Router:
    """Chooses engines, asks them, and remembers which of them failed."""

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], limits: Limits) -> None:
        self.prefill = [Engine(url.rstrip("/")) for url in prefill]
        self.decode = [Engine(url.rstrip("/")) for url in decode]
        self.limits = limits
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(limits.silence_s, connect=CONNECT_S),
            headers={"Accept-Encoding": "identity"},  # bytes are passed on as they are
            # vLLM closes idle connections after 5 s; none may be used again in that very moment.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
            trust_env=False,
        )

    def pick(self, engines: list[Engine], but: Engine | None = None) -> Engine | None:
        """Choose the engine with the fewest requests; one that failed and has rested gets one, as its trial."""
        now = time.monotonic()
        awake = [engine for engine in engines if engine is not but and engine.rests_until <= now]
        engine = min(awake, key=lambda engine: (engine.in_flight, engine.asked_at), default=None)
        if engine is not None and engine.rests_until:
            engine.rests_until = now + self.limits.rest_s
        return engine

    def attempts(self, params: dict[str, Any] | None) -> Iterator[tuple[Engine, dict[str, Any] | None]]:
        """Yield decode engines to ask, one after the other, and what to tell them about the pages."""
        first = self.pick(self.decode) or min(self.decode, key=lambda engine: engine.rests_until)
        yield first, params
        if other := self.pick(self.decode, but=first):
            yield other, params
        elif params is not None:
            yield first, None

    @contextlib.asynccontextmanager
    async def ask(
        self, engine: Engine, trip: Trip, body: dict[str, Any], deadline_s: float | None = None
    ) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[bytes]]]:
        """Post to an engine; leaving the block early closes the connection, at which the engine aborts.

        Raises:
            EngineError: It could not be reached, fell silent, broke off, or is in trouble by its own account.
        """
        engine.in_flight, engine.asked_at = engine.in_flight + 1, time.monotonic()
        url, content = engine.url + trip.path, json.dumps(body).encode()
        post = self.client.stream("POST", url, content=content, headers=trip.headers)
        try:
            async with asyncio.timeout(deadline_s), post as response:
                chunks = whole_events(response)
                if (status := response.status_code) >= 500:
                    raise EngineError(f"status {status}", status, await read(chunks, ANSWER_LIMIT))
                yield response, chunks
            engine.rests_until = 0.0
        except (httpx.HTTPError, EngineError, TimeoutError) as failure:
            log.warning("engine=%s failed: %r; left alone for %g s", engine.url, failure, self.limits.rest_s)
            engine.rests_until = time.monotonic() + self.limits.rest_s
            raise failure if isinstance(failure, EngineError) else EngineError(repr(failure)) from failure
        finally:
            engine.in_flight -= 1

    async def prompt(self, trip: Trip) -> dict[str, Any] | None:
        """Have the prompt computed; return what is said about its pages. None: the decode engine is on its own."""
        engine = None if (why := why_alone(trip.body)) else self.pick(self.prefill)
        if engine is None:
            trip.facts["handoff"] = why or "no-prefill-engine"
            return None
        trip.facts |= {"prefill": engine.url, "handoff": "prefill-failed"}
        params = None
        with contextlib.suppress(EngineError, ValueError, RecursionError, AttributeError):
            body = prefill_body(trip.body)
            async with self.ask(engine, trip, body, self.limits.prefill_s) as (_, chunks):
                answer = await read(chunks, ANSWER_LIMIT)
            trip.facts |= {"prefill_ms": trip.elapsed_ms(), "handoff": "no-params"}
            params = json.loads(answer).get("kv_transfer_params")  # a refusal has none
        if not isinstance(params, dict) or not params:
            return None
        trip.facts["handoff"] = "yes"
        return params

    async def answer(self, trip: Trip, send: Send) -> Response | None:
        """Carry a request to the engines and the answer to the client; cancelling it closes what is open.

        Returns:
            What to answer instead where no engine did; None when the answer was sent, or has begun and broke off.
        """
        params, failure = await self.prompt(trip), EngineError("no decode engine")
        for engine, pages in self.attempts(params):
            trip.facts |= {"decode": engine.url} | ({} if pages is params else {"handoff": "given-up"})
            body = trip.body if pages is None else {**trip.body, "kv_transfer_params": pages}
            kind = None
            try:
                async with self.ask(engine, trip, body) as (response, chunks):
                    first = await anext(chunks, b"")
                    kind = response.headers.get("content-type", "")
                    trip.facts["ttft_ms"] = trip.elapsed_ms()
                    head = {"content-type": kind, "x-request-id": trip.headers["X-Request-Id"]}
                    raw = [(name.encode(), value.encode()) for name, value in head.items()]
                    await send({"type": START, "status": response.status_code, "headers": raw})
                    await send({"type": BODY, "body": first, "more_body": True})
                    async for chunk in chunks:
                        await send({"type": BODY, "body": chunk, "more_body": True})
                trip.facts["outcome"] = "ok"
                return await send({"type": BODY})
            except EngineError as error:
                failure = error
            if kind is not None:  # too late for another engine
                trip.facts["outcome"] = "broken-off"
                if kind.startswith(EVENTS):
                    event = error_response(502, "the decode engine broke off").body
                    return await send({"type": BODY, "body": b"data: %b\n\n" % bytes(event)})
                return None  # without an end, so that nobody takes it for whole
        trip.facts["outcome"] = "failed"
        return Response(failure.body, failure.status, media_type="application/json")


class Ferried(Response):
    """A response that ends with its client: when that is gone, the requests to engines are closed at once."""

    def __init__(self, router: Router, trip: Trip) -> None:
        super().__init__()
        self.router, self.trip = router, trip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def client_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        trip = self.trip
        work, gone = asyncio.create_task(self.router.answer(trip, send)), asyncio.create_task(client_gone())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                trip.facts["outcome"] = "client-gone"
            elif instead := work.result():
                await instead(scope, receive, send)
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.wait((work, gone))
            facts = " ".join(f"{name}={value}" for name, value in trip.facts.items())
            log.info("request=%s path=%s %s", trip.headers["X-Request-Id"], trip.path, facts)


def create_app(prefill: Sequence[str], decode: Sequence[str], limits: Limits = Limits()) -> FastAPI:
    """Make the router's application.

    Args:
        prefill: URLs of the engines that read prompts; without any, the decode engines do everything.
        decode: URLs of the engines that answer; at least one.
    """
    router = Router(prefill, decode, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with router.client:
            yield

    app = FastAPI(title="kvferry example router", lifespan=lifespan)

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            async with asyncio.timeout(limits.body_s):
                body = json.loads(await read(request.stream(), limits.body_bytes))
        except EngineError as failure:
            return error_response(413, str(failure))
        except TimeoutError:
            return error_response(408, f"the body was not there after {limits.body_s:g} s")
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            return error_response(400, "the body is not a JSON object")
        body.pop("kv_transfer_params", None)  # only an engine may say from where pages are read
        return Ferried(router, Trip(request.url.path, headers_for_engines(request), body))

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        for engine in sorted(router.decode, key=lambda engine: engine.rests_until):
            with contextlib.suppress(httpx.HTTPError):
                url = f"{engine.url}/v1/models"
                said = await router.client.get(url, headers=headers_for_engines(request), timeout=CONNECT_S)
                return Response(said.content, said.status_code, media_type="application/json")
        return NOBODY

    @app.get("/healthz")
    async def healthz() -> Response:
        now = time.monotonic()
        engines = {
            role: [dict(url=e.url, in_flight=e.in_flight, resting=e.rests_until > now) for e in engines]
            for role, engines in (("prefill", router.prefill), ("decode", router.decode))
        }
        return JSONResponse(engines, 503 if all(engine["resting"] for engine in engines["decode"]) else 200)

    return app


def headers_for_engines(request: Request) -> dict[str, str]:
    asked_id = request.headers.get("x-request-id", "")
    given = {name: request.headers.get(name, "") for name in PASSED_ON}
    return {
        "Content-Type": "application/json",
        "X-Request-Id": asked_id if REQUEST_ID.fullmatch(asked_id) else uuid.uuid4().hex,
        **{name: value for name, value in given.items() if value.isascii() and value.isprintable() and value},
    }


def engine_url(text: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+/?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like http://127.0.0.1:8100")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\nEverything")[0],
        epilog="One line per request is logged: which engines, milliseconds until the prefill and the first byte, "
        "whether\npages were handed over or why not, and how it ended. GET /healthz tells about every engine.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, usual = parser.add_argument, Limits()
    urls = {"nargs": "+", "type": engine_url, "metavar": "URL"}
    add("--prefill", default=[], help="engines that read prompts", **urls)
    add("--decode", required=True, help="engines that write answers", **urls)
    add("--host", default="127.0.0.1", help="where to listen (%(default)s); it asks nobody who they are")
    add("--port", type=int, default=8000, help="(%(default)s)")
    for name, seconds, what in (
        ("--prefill-s", usual.prefill_s, "until a prompt is left to the decode engine"),
        ("--silence-s", usual.silence_s, "until a decode engine without a word has failed"),
        ("--rest-s", usual.rest_s, "for which an engine that failed is left alone"),
    ):
        add(name, type=float, default=seconds, metavar="SECONDS", help=f"{what} (%(default)g)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    app = create_app(args.prefill, args.decode, Limits(args.prefill_s, args.silence_s, args.rest_s))
    serving = {"access_log": False, "log_config": None, "ws": "none", "timeout_graceful_shutdown": 10}
    uvicorn.run(app, host=args.host, port=args.port, **serving)


if __name__ == "__main__":
    main()
