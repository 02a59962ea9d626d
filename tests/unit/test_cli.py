"""The command line: readable help, one clear line for a mistake, plugins that break nothing."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from kvferry.connector.cli import main
from kvferry.connector.cli.output import clean, table
from kvferry.connector.errors import TierUnavailable
from kvferry.connector.explain import ExplainLog, RequestRecord
from kvferry.connector.hooks import hookimpl
from kvferry.connector.offers import OWN_COMMANDS
from kvferry.connector.transport import TransportType

TRANSFER = {"kv_connector": "KVFerryConnector", "kv_role": "kv_both", "kv_connector_extra_config": {}}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KVFERRY_HOST__CAPACITY", "64MiB")
    monkeypatch.delenv("KVFERRY_CONFIG", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


class _Plugin:
    @hookimpl
    def kvferry_commands(self) -> Sequence[click.Command]:
        @click.command()
        def greet() -> None:
            """Greet the operator."""
            click.echo("hello")

        @click.command()
        def sink() -> None:
            raise TierUnavailable("disk", "the disk is gone", "plug it in")

        return [greet, sink]


class _Impostor:
    @hookimpl
    def kvferry_commands(self) -> Sequence[click.Command]:
        @click.command()
        def doctor() -> None:
            click.echo("an impostor")

        return [doctor]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that adds commands, named by the environment's configuration."""
    return configured(_Plugin(), monkeypatch)


def configured(commands: _Plugin | _Impostor, monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("kvferry_test_commands")
    module.kvferry_commands = commands.kvferry_commands  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("KVFERRY_PLUGINS", module.__name__)
    return module.__name__


# --- the group ----------------------------------------------------------------------------------------


def test_help_says_what_it_is_and_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("doctor", "explain", "plugins", "bench"):
        assert command in result.stdout


@pytest.mark.parametrize("command", ["doctor", "explain", "plugins", "bench"])
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 8


def test_a_plugins_command_is_listed_and_runs(plugin: str) -> None:
    assert "Greet the operator." in run("--help").stdout
    assert run("greet").stdout == "hello\n"


def test_a_plugin_cannot_replace_our_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    name = configured(_Impostor(), monkeypatch)
    assert "impostor" not in run("doctor").stdout
    assert f"plugin '{name}' failed in kvferry_commands" in run("plugins").stdout


def test_serve_without_its_libraries_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kvferry.connector.server.running", raising=False)
    monkeypatch.delitem(sys.modules, "kvferry.connector.server.http", raising=False)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    result = run("serve", "--http", "127.0.0.1:0")
    assert result.exit_code == 1
    assert "pip install 'kvferry[server]'" in result.output


def test_the_names_of_our_commands_are_reserved() -> None:
    assert set(main.commands) == OWN_COMMANDS


def test_an_error_raised_on_purpose_is_one_line(plugin: str) -> None:
    result = run("sink")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["Error: tier 'disk': the disk is gone; plug it in"]


def test_a_plugin_that_cannot_be_loaded_is_reported_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_PLUGINS", "kvferry_no_such_module")
    result = run("--help")
    assert result.exit_code == 0
    assert "doctor" in result.stdout
    listed = run("plugins")
    assert listed.exit_code == 1
    assert "kvferry_no_such_module" in listed.stdout
    assert "ModuleNotFoundError" in listed.stdout


def test_help_works_while_the_configuration_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_SAVE", "some")
    assert run("--help").exit_code == 0
    result = run("doctor")
    assert result.exit_code == 1
    assert "save: found 'some'" in result.stderr
    assert "Traceback" not in result.output


# --- plugins ------------------------------------------------------------------------------------------


def test_plugins_lists_what_each_one_adds(plugin: str) -> None:
    result = run("plugins")
    assert plugin in result.stdout
    assert "tier disk" in result.stdout
    assert "eviction lru" in result.stdout
    assert "command greet" in result.stdout


def test_plugins_tells_transports_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> str:
        return ""

    pigeon = TransportType("pigeon", nothing, nothing, nothing, "page by page", priority=3)  # type: ignore[arg-type]

    @hookimpl
    def kvferry_transports() -> Sequence[TransportType]:
        return [pigeon]

    module = types.ModuleType("kvferry_test_transports")
    module.kvferry_transports = kvferry_transports  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("KVFERRY_PLUGINS", module.__name__)
    (line,) = [line for line in run("plugins").stdout.splitlines() if line.startswith("transport pigeon")]
    assert "page by page" in line
    assert "priority 3" in line


def test_plugins_speaks_json(plugin: str) -> None:
    reports = {report["name"]: report for report in json.loads(run("plugins", "--json").stdout)}
    assert reports[plugin]["origin"] == "configuration"
    assert reports[plugin]["hooks"] == ["kvferry_commands"]


# --- doctor -------------------------------------------------------------------------------------------


def test_doctor_prints_each_value_with_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "kvferry.toml"
    path.write_text('save = "prompt"\nsecret = "hunter2"\n')
    result = run("doctor", "--config", str(path))
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert lines["save"].endswith(str(path))
    assert lines["host.capacity"].endswith("KVFERRY_HOST__CAPACITY")
    assert lines["lease_s"].endswith("default")
    assert "hunter2" not in result.output


def test_doctor_checks_what_would_be_passed_to_the_engine(tmp_path: Path) -> None:
    extra = {"tiers": [{"type": "disk", "path": str(tmp_path), "capcity": "1GiB"}]}
    result = run(
        "doctor", "--kv-transfer-config", json.dumps({**TRANSFER, "kv_connector_extra_config": extra})
    )
    assert result.exit_code == 1
    assert "tiers[0].capcity: unknown key (did you mean 'capacity'?)" in result.stdout


def test_doctor_finds_the_connector_below_a_multi_connector() -> None:
    child = {**TRANSFER, "kv_connector_extra_config": {"save": "none"}}
    outer = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [child]}}
    result = run("doctor", "--kv-transfer-config", json.dumps(outer))
    assert "nothing new: save is 'none'" in result.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no connector 'KVFerryConnector'"),
        (json.dumps({"kv_connector": "OtherConnector"}), "would not use kvferry"),
        (json.dumps({**TRANSFER, "kv_connector_extra_config": 3}), "expected a table"),
        (json.dumps({**TRANSFER, "kv_connector_extra_config": {"hosst": 1}}), "did you mean 'host'"),
    ],
)
def test_a_wrong_transfer_config_is_one_clear_line(text: str, message: str) -> None:
    result = run("doctor", "--kv-transfer-config", text)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


# --- explain ------------------------------------------------------------------------------------------


def recorded(directory: Path) -> None:
    log = ExplainLog(directory, "e0", 1 << 20)
    for number in range(3):
        log.record(
            RequestRecord(
                request_id=f"cmpl-{number}",
                arrived=float(number),
                prompt_tokens=100,
                missing_block=0,
                missing_reason="evicted",
            )
        )
    log.close()


def test_explain_tells_requests_and_a_summary(tmp_path: Path) -> None:
    recorded(tmp_path / "state" / "kvferry" / "explain")
    result = run("explain", "--last", "2")
    assert result.exit_code == 0
    assert "cmpl-0" not in result.stdout
    assert "cmpl-2" in result.stdout
    assert "first missing block 0: evicted" in result.stdout
    assert "2 requests: 2 miss" in result.stdout


def test_explain_one_request_as_json(tmp_path: Path) -> None:
    recorded(tmp_path)
    result = run("explain", "cmpl-1", "--json", "--directory", str(tmp_path))
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["request_id"] == "cmpl-1"


def test_explain_without_records_says_where_it_looked(tmp_path: Path) -> None:
    result = run("explain", "cmpl-9", "--directory", str(tmp_path))
    assert result.exit_code == 1
    assert f"no request whose id starts with 'cmpl-9' recorded in {tmp_path}" in result.stderr


def test_explain_says_how_many_lines_it_skipped(tmp_path: Path) -> None:
    recorded(tmp_path)
    with (tmp_path / "e0.jsonl").open("ab") as file:
        file.write(b"torn")
    assert "1 unreadable lines were skipped" in run("explain", "--directory", str(tmp_path)).stderr


# --- output -------------------------------------------------------------------------------------------


def test_tables_align_their_columns() -> None:
    assert list(table([("a", "1"), ("bbb", "22")], indent=" ", right=(1,))) == [" a     1", " bbb  22"]


def test_text_of_unknown_origin_is_cleaned_and_cut() -> None:
    assert clean("a\x1b[31mb\r\n\x9b") == "a?[31mb???"
    assert len(clean("x" * 1000)) == 200
