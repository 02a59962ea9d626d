"""What the peer plugin does about NIXL itself: where it is missing, broken, or another than the known one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from nixl_kit import Pages, Spec, Target, connect, context

from kvferry.connector.bench.run import run_case
from kvferry.connector.errors import HandoffFailed
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.transport import MAX_OFFER_BYTES
from kvferry.plugins.peer import agent as agent_module
from kvferry.plugins.peer import kvferry_bench_cases, kvferry_doctor_findings, kvferry_transports
from kvferry.plugins.peer.agent import Agent
from kvferry.plugins.peer.nixl_offer import pack, unpack
from kvferry.plugins.peer.nixl_transport import NIXL

pytest.importorskip("nixl")


@pytest.fixture
def pages() -> Pages:
    return Pages(Spec(pages=4))


@pytest.fixture
def without_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package were not installed."""
    monkeypatch.setattr(agent_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "nixl", None)


def idle_cores(seconds: float = 0.5) -> float:
    before, started = time.process_time(), time.monotonic()
    time.sleep(seconds)
    return (time.process_time() - before) / (time.monotonic() - started)


def listening() -> Iterator[str]:
    """Yield the hexadecimal addresses that sockets of this process listen on."""
    targets = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    own = {int(name[:-1].rpartition("[")[2]) for name in targets if "socket:[" in name}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and int(columns[9]) in own:
                yield columns[1].split(":")[0]


def test_nixl_comes_before_the_socket(pages: Pages) -> None:
    by_name = {transport.name: transport for transport in kvferry_transports()}
    assert set(by_name) == {"nixl", "socket"}
    assert by_name["nixl"].priority > by_name["socket"].priority
    assert by_name["nixl"].unusable(pages.memory) == ""
    assert "nixl" in {transport.name for transport in PluginRegistry().transports().values()}


def test_without_nixl_it_says_what_to_install(pages: Pages, without_nixl: None) -> None:
    assert "pip install 'kvferry[nixl]'" in NIXL.unusable(pages.memory)
    with pytest.raises(HandoffFailed, match="cannot be imported"):
        NIXL.export(pages.memory, context())
    (finding,) = kvferry_doctor_findings()
    assert finding.level == "ok"
    assert "socket" in finding.text
    assert "kvferry[nixl]" in finding.hint


def test_memory_of_other_devices_is_not_its_business(pages: Pages) -> None:
    pages.memory.device = "tpu"
    assert "tpu" in NIXL.unusable(pages.memory)


def test_the_doctor_tells_the_version_and_that_it_starts() -> None:
    (finding,) = kvferry_doctor_findings()
    assert finding.level == "ok"
    assert finding.text.startswith("nixl 1.")
    assert "UCX plugin loads" in finding.text


def test_the_doctor_tells_that_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "cma")
    (finding,) = kvferry_doctor_findings()
    assert finding.level == "warn"
    assert "does not start" in finding.text
    assert "could not start" in finding.hint


def test_a_home_that_cannot_be_searched_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").symlink_to(tmp_path / "home")  # even root cannot look there
    program = "from kvferry.plugins.peer.agent import Agent; Agent('test', is_local=True, has_thread=False)"
    environ = {**os.environ, "HOME": str(tmp_path / "home")}  # nixl looks once in the life of a process
    child = subprocess.run(
        [sys.executable, "-c", program], check=False, env=environ, capture_output=True, text=True, timeout=30
    )
    assert child.returncode == 1
    assert "set HOME to a directory of this user" in child.stderr.splitlines()[-1]


def test_names_are_never_used_twice() -> None:
    agents = [Agent("test", is_local=True, has_thread=False) for _ in range(2)]
    assert agents[0].name != agents[1].name
    for agent in agents:
        agent.close()


def test_it_listens_on_this_machine_only_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(listening())
    agent = Agent("test", is_local=True, has_thread=False)
    added = [address for address in listening() if address not in before]
    agent.close()
    assert added == ["0100007F"]
    monkeypatch.setenv("UCX_NET_DEVICES", "no-such-device")
    with pytest.raises(HandoffFailed):
        Agent("test", is_local=True, has_thread=False)


def test_the_progress_thread_sleeps() -> None:
    agent = Agent("test", is_local=True, has_thread=True)
    assert idle_cores() < 0.2
    agent.close()


def test_a_nixl_whose_settings_look_different_is_used_as_it_is_and_warned_about_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import nixl._api as api

    monkeypatch.setattr(agent_module, "_is_warned", False)
    stock = api.nixlBind.nixlAgentConfig
    monkeypatch.setattr(api.nixlBind, "nixlAgentConfig", lambda *_: stock())
    for _ in range(2):
        Agent("test", is_local=True, has_thread=True).close()
    assert caplog.text.count("may keep one core busy") == 1
    assert idle_cores() < 0.2, "the thread is gone with its agent"


def test_what_replaces_a_setting_is_put_back() -> None:
    import nixl._api as api

    stock = api.nixlBind.nixlAgentConfig
    Agent("test", is_local=True, has_thread=True).close()
    assert api.nixlBind.nixlAgentConfig is stock


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    Agent("test", is_local=True, has_thread=True).close()
    assert capfd.readouterr() == ("", "")


def test_an_offer_that_would_be_too_long_is_not_made(pages: Pages) -> None:
    with Target([pages.spec]) as target:
        offer = unpack(target.offers[0])
        reader = connect(target, pages)
        reader.close()
    with pytest.raises(HandoffFailed, match="UCX_NET_DEVICES"):
        pack(msgspec.structs.replace(offer, metadata=bytes(MAX_OFFER_BYTES)))


def test_the_measurement_runs_and_compares(tmp_path: Path) -> None:
    (case,) = kvferry_bench_cases()
    parts: list[float] = []
    result = run_case(case, True, str(tmp_path), parts.append)
    assert result.skipped == ""
    assert [figure.raw_name for figure in result.figures] == ["bare NIXL", "memcpy", "socket"] * 2
    assert all(figure.value > 0 and figure.raw for figure in result.figures)
    assert parts == sorted(parts)


def test_without_nixl_there_is_nothing_to_measure(tmp_path: Path, without_nixl: None) -> None:
    (case,) = kvferry_bench_cases()
    assert "pip install" in run_case(case, True, str(tmp_path), lambda part: None).skipped


def test_where_processes_are_not_read_directly_there_is_nothing_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    (case,) = kvferry_bench_cases()
    assert "over TCP" in run_case(case, True, str(tmp_path), lambda part: None).skipped
