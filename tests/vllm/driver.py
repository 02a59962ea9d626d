"""A vLLM engine in a process of its own, driven by lines of JSON on stdin; ``engine.Engine`` starts it.

One argument: vLLM's engine arguments as JSON. Every command is one line, every answer is one line on the
descriptor that was stdout at the start; everything that vLLM prints goes to stderr instead.

    {"op": "generate", "requests": [...], "together": bool}   -> list of answers
    {"op": "reset"}                                             -> did vLLM's own prefix cache become empty?
    {"op": "clear"}                                             -> the same, and the connector forgets everything
    {"op": "metrics"}                                           -> {"name{label=value,...}": value}
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

Json = Any

SHUTDOWN_S = 20.0
"""vLLM's default kills the scheduler's process after 5 seconds, most of which its workers may take."""


class Driver:
    """Answers commands with one ``AsyncLLM``."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._serial = 0

    async def answer(self, command: dict[str, Json]) -> Json:
        """Carry out one command."""
        match command["op"]:
            case "generate":
                return await self._generate(command["requests"], command["together"])
            case "reset":
                return await self._engine.reset_prefix_cache()
            case "clear":
                return await self._engine.reset_prefix_cache(reset_connector=True)
            case "metrics":
                return _metrics()
        raise ValueError(f"unknown command {command}")

    async def _generate(self, requests: list[dict[str, Json]], together: bool) -> list[Json]:
        if together:
            return list(await asyncio.gather(*(self._complete(request) for request in requests)))
        return [await self._complete(request) for request in requests]

    async def _complete(self, request: dict[str, Json]) -> Json:
        """Run one request to its end, or drop it after ``abort_s`` seconds."""
        try:
            async with asyncio.timeout(request.get("abort_s")):
                return _answer(await self._last_output(request))
        except TimeoutError:
            return None

    async def _last_output(self, request: dict[str, Json]) -> Any:
        from vllm import SamplingParams

        self._serial += 1
        sampling = SamplingParams(
            max_tokens=request.get("max_tokens", 8),
            temperature=0,
            logprobs=request.get("logprobs", 3),
            detokenize=False,
            ignore_eos=True,
        )
        await asyncio.sleep(request.get("start_s", 0))
        outputs = self._engine.generate(
            _prompt(request), sampling, f"request-{self._serial}", lora_request=_adapter(request)
        )
        return [output async for output in outputs][-1]


def _prompt(request: dict[str, Json]) -> Json:
    if "embeds" in request:
        import torch

        rows, columns, seed = request["embeds"]
        generator = torch.Generator().manual_seed(seed)
        return {"prompt_embeds": torch.randn(rows, columns, generator=generator)}
    prompt: dict[str, Json] = {"prompt_token_ids": request["tokens"]}
    if "salt" in request:
        prompt["cache_salt"] = request["salt"]
    return prompt


def _adapter(request: dict[str, Json]) -> Any:
    if "adapter" not in request:
        return None
    from vllm.lora.request import LoRARequest

    name, number, path = request["adapter"]
    return LoRARequest(name, number, path)


def _answer(output: Any) -> Json:
    completion = output.outputs[0]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [
            sorted((token, entry.logprob) for token, entry in position.items())
            for position in completion.logprobs or []
        ],
        "cached": output.num_cached_tokens,
        "finish": completion.finish_reason,
    }


def _metrics() -> dict[str, float]:
    from prometheus_client import REGISTRY

    found = {}
    for metric in REGISTRY.collect():
        if metric.name.startswith(("vllm:", "kvferry")) and metric.type in ("counter", "gauge"):
            for sample in metric.samples:
                labels = [
                    f"{name}={value}"
                    for name, value in sorted(sample.labels.items())
                    if name not in ("engine", "model_name")
                ]
                found[sample.name + ("{" + ",".join(labels) + "}" if labels else "")] = sample.value
    return found


async def serve(arguments: dict[str, Json], answers: Any) -> None:
    """Start the engine, say so, and answer until stdin ends."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    def say(answer: Json) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        driver = Driver(engine)
        say({"ready": True})
        while line := await asyncio.to_thread(sys.stdin.readline):
            say({"answer": await driver.answer(json.loads(line))})
    finally:
        engine.shutdown(timeout=SHUTDOWN_S)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    asyncio.run(serve(json.loads(sys.argv[1]), answers))
