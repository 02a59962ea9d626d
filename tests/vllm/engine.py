"""Real vLLM engines for the tests, one at a time, each in a process group of its own."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

HERE = Path(__file__).parent
START_DEADLINE_S = 600.0
ANSWER_DEADLINE_S = 300.0
SETTLE_DEADLINE_S = 60.0
STOP_DEADLINE_S = 60.0

TOKEN_BYTES = 4096
"""KV of one token of the tiny checkpoint in float32."""

Json = Any
T = TypeVar("T")


class EngineRefused(Exception):
    """The engine did not start; the text is its log."""


@dataclass(frozen=True)
class Answer:
    """What a model said: comparing two answers compares every bit."""

    tokens: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...], ...]
    """For each position the best tokens and their log-probabilities, by token."""
    cached: int
    """Prompt tokens that were not computed."""
    finish: str

    @property
    def lead(self) -> float:
        """The smallest lead that a chosen token had over the next best."""
        best = [sorted((value for _, value in place), reverse=True) for place in self.logprobs]
        return min(first - second for first, second, *_ in best)

    @classmethod
    def of(cls, answer: Json) -> Self:
        logprobs = tuple(tuple((token, value) for token, value in place) for place in answer["logprobs"])
        return cls(tuple(answer["tokens"]), logprobs, answer["cached"], answer["finish"])


def wait_until(what: str, probe: Callable[[], T], deadline_s: float = SETTLE_DEADLINE_S) -> T:
    """Return the first true value of ``probe``; fail with its last one after the deadline."""
    deadline = time.monotonic() + deadline_s
    while not (value := probe()):
        assert time.monotonic() < deadline, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.05)
    return value


def connector(extra: dict[str, Json], **changes: Json) -> dict[str, Json]:
    """Return the value of ``kv_transfer_config`` that selects kvferry."""
    return {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.engines.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    } | changes


class Engine:
    """One engine. Use it as a context manager.

    Args:
        model: Checkpoint directory.
        log: File that takes everything the engine prints.
        kvferry: kvferry's configuration; None runs without connector.
        kv_transfer: Further keys of ``kv_transfer_config``.
        env: Further environment variables.
        arguments: vLLM's engine arguments.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        kvferry: dict[str, Json] | None = None,
        kv_transfer: dict[str, Json] | None = None,
        env: dict[str, str] | None = None,
        **arguments: Json,
    ) -> None:
        self._log = log
        given = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 4096,
            "seed": 0,
        } | arguments
        if kvferry is not None:
            given["kv_transfer_config"] = connector(kvferry, **(kv_transfer or {}))
        command = [sys.executable, str(HERE / "driver.py"), json.dumps(given)]
        self._process = spawn(command, log, env or {}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="engine-answers", daemon=True)
        self._reader.start()
        try:
            self._next(START_DEADLINE_S)
        except EngineRefused:
            self.kill()
            raise

    def generate(self, requests: Sequence[dict[str, Json]], together: bool = False) -> list[Answer]:
        """Complete requests one after another, or all at once."""
        answers = self._ask({"op": "generate", "requests": list(requests), "together": together})
        return [Answer.of(answer) for answer in answers]

    def generate_aborting(self, requests: Sequence[dict[str, Json]]) -> int:
        """Run requests at once, some with ``abort_s``; return how many were aborted before their end."""
        answers = self._ask({"op": "generate", "requests": list(requests), "together": True})
        return sum(answer is None for answer in answers)

    def reset(self) -> None:
        """Empty vLLM's own prefix cache; impossible while a single page is still in use."""
        wait_until("every page is free", lambda: self._ask({"op": "reset"}))

    def clear(self) -> None:
        """Empty vLLM's own prefix cache and make kvferry forget everything."""
        wait_until("every page is free", lambda: self._ask({"op": "clear"}))

    def metrics(self) -> dict[str, float]:
        """Return vLLM's and kvferry's counters and gauges by name and labels."""
        found: dict[str, float] = self._ask({"op": "metrics"})
        return found

    def metric(self, name: str) -> float:
        """Return one metric; 0 while it was never set."""
        return self.metrics().get(name, 0.0)

    def wait_for_metric(self, name: str, above: float = 0.0) -> None:
        """Wait until a metric of kvferry's is over a value: the engine sends them once a second, while it works."""

        def is_above() -> bool:
            self.generate([{"tokens": [2, 3], "max_tokens": 1}])
            return self.metric(name) > above

        wait_until(f"{name} is over {above:g}", is_above)

    def settle(self, block_tokens: int = 128) -> None:
        """Wait until nothing is under way in kvferry, and check that no page, lease or slot leaked."""
        self.reset()
        done = self._finished_requests()
        probe = {"tokens": [2, 3], "max_tokens": 1}

        def is_settled() -> bool:
            """Requests counted since ``done`` prove that the gauges are younger."""
            self.generate([probe])
            metrics = self.metrics()
            used_slots = round(metrics["kvferry_tier_used_bytes{tier=host}"] / (block_tokens * TOKEN_BYTES))
            return (
                self._finished_requests() >= done + 2
                and metrics["kvferry_leases"] == metrics["kvferry_reservations"] == 0
                and used_slots == metrics["kvferry_tier_blocks{tier=host}"]
            )

        wait_until("no lease, reservation or slot is left over", is_settled)

    def _finished_requests(self) -> float:
        return sum(
            value for name, value in self.metrics().items() if name.startswith("kvferry_requests_total")
        )

    @property
    def log(self) -> str:
        """Everything the engine has printed."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """Send SIGKILL to every process of the engine."""
        kill_group(self._process)
        self._reader.join(STOP_DEADLINE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # a command that nobody read any more

    def close(self) -> None:
        """Shut down in order; kill what does not go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_DEADLINE_S)
            wait_until("the last process is gone", lambda: not _members(self._process.pid), 10.0)
        except (subprocess.TimeoutExpired, AssertionError):
            pass
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, command: dict[str, Json]) -> Json:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._next(ANSWER_DEADLINE_S)["answer"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _next(self, deadline_s: float) -> dict[str, Json]:
        try:
            line = self._lines.get(timeout=deadline_s)
        except queue.Empty:
            raise EngineRefused(f"no answer within {deadline_s:g} s\n{self.log}") from None
        if not line:
            raise EngineRefused(self.log)
        answer: dict[str, Json] = json.loads(line)
        return answer


class Engines:
    """Runs one engine at a time: starting the next one closes the one before."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._engine: Engine | None = None

    def start(self, name: str, model: Path, **arguments: Any) -> Engine:
        """Return a new engine; ``name`` names its log."""
        self.close()
        self._engine = Engine(model, self._logs / f"{name}.log", **arguments)
        return self._engine

    def close(self) -> None:
        """Close the engine that runs; no error of kvferry's own may have been contained in it."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
            assert "kvferry failed in" not in engine.log, engine.log


def spawn(command: list[str], log: Path, env: dict[str, str], **pipes: int) -> subprocess.Popen[str]:
    """Start a process in a group of its own, with the tests' plugins importable."""
    paths = [str(HERE), str(HERE.parent / "unit"), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONHASHSEED": "random",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as stream:
        return subprocess.Popen(
            command, stderr=stream, env=environ | env, start_new_session=True, text=True, **pipes
        )


def kill_group(process: subprocess.Popen[str]) -> set[str]:
    """Send SIGKILL to a group made by ``spawn`` and wait until none of its processes is left.

    Returns:
        Names of shared memory that the group left behind in ``/dev/shm``; now removed.
    """
    mapped = {path for pid in _members(process.pid) for path in _mapped_shared_memory(pid)}
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(STOP_DEADLINE_S)
    wait_until("the engine's processes are gone", lambda: not _members(process.pid))
    left = {path for path in mapped if path.exists()}
    for path in left:
        path.unlink()
    return {path.name for path in left}


def _members(group: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _mapped_shared_memory(pid: int) -> set[Path]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {Path(line.split(maxsplit=5)[5]) for line in lines if " /dev/shm/" in line}
