"""A server's configuration: its own tables, and what an engine's says about a cache."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvferry.connector.cli import main
from kvferry.connector.config import Config, HostConfig
from kvferry.connector.errors import ConfigError, KVFerryError
from kvferry.connector.server import config
from kvferry.connector.server.config import ServerConfig, ServerSettings, TenantConfig
from kvferry.connector.server.settings import engine_variables, load_server_settings
from kvferry.connector.settings import load_settings

GIB = 1 << 30
TOKEN = "correct horse battery staple"
FULL = """
plugins = ["my.plugin"]
lease_s = 30

[server]
listen = ["unix:///tmp/a.sock", "tls://0.0.0.0:7070"]
http = ""
max_models = 2
tls = {certificate = "server.pem", client_ca = "ca.pem"}

[host]
capacity = "64GiB"

[[tiers]]
type = "disk"
path = "/kv"

[[tenants]]
name = "search"
token = "the token of search"
host = {capacity = "16 GiB"}

[[tenants]]
name = "chat"
certificate = "chat.internal"
tiers = [{type = "memory", deadline_s = 3.0}]
max_models = 1
"""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> str:
        path = tmp_path / "kvferry.toml"
        path.write_text(text)
        return str(path)

    return write


def test_without_any_source_everything_is_a_default() -> None:
    settings = load_server_settings(None, {})
    assert (settings.server, settings.tenants, settings.cache) == (ServerConfig(), (), Config())
    assert set(settings.origins.values()) == {"default"}


def test_a_file_says_what_is_served_to_whom_and_where(write: Write) -> None:
    path = write(FULL)
    settings = load_server_settings(path, {})
    assert settings.server.listen == ("unix:///tmp/a.sock", "tls://0.0.0.0:7070")
    assert settings.server.tls == config.ServerTlsConfig(certificate="server.pem", client_ca="ca.pem")
    assert settings.server.http == ""
    assert settings.tenants == (
        TenantConfig(name="search", token="the token of search", host=HostConfig(capacity=16 * GIB)),
        TenantConfig(
            name="chat",
            certificate="chat.internal",
            tiers=({"type": "memory", "deadline_s": 3.0},),
            max_models=1,
        ),
    )
    assert settings.cache == Config(
        host=HostConfig(capacity=64 * GIB),
        tiers=({"type": "disk", "path": "/kv"},),
        plugins=("my.plugin",),
        lease_s=30.0,
    )
    assert settings.origins["server.max_models"] == path
    assert settings.origins["server.max_connections"] == "default"


def test_the_command_line_beats_the_file_which_beats_variables(write: Write) -> None:
    environ = {
        "KVFERRY_SERVER__HTTP": "127.0.0.1:1",
        "KVFERRY_SERVER__MAX_MODELS": "7",
        "KVFERRY_SERVER__DRAIN_S": "2.5",
        "KVFERRY_SERVER__TLS__CERTIFICATE": "from-variable.pem",
        "KVFERRY_HOST__CAPACITY": "1GiB",
        "KVFERRY_TOKEN": TOKEN,
    }
    path = write("[server]\nhttp = '127.0.0.1:2'\nmax_models = 8\n")
    settings = load_server_settings(path, environ, {"http": "127.0.0.1:3"})
    assert settings.server == ServerConfig(
        http="127.0.0.1:3",
        max_models=8,
        drain_s=2.5,
        token=TOKEN,
        tls=config.ServerTlsConfig(certificate="from-variable.pem"),
    )
    assert settings.cache.host.capacity == GIB
    assert [settings.origins[f"server.{key}"] for key in ("http", "max_models", "drain_s", "token")] == [
        "command line",
        path,
        "KVFERRY_SERVER__DRAIN_S",
        "KVFERRY_TOKEN",
    ]


def test_the_variable_of_the_server_itself_beats_the_one_it_shares_with_engines() -> None:
    environ = {"KVFERRY_TOKEN": "of somebody else", "KVFERRY_SERVER__TOKEN": TOKEN}
    assert load_server_settings(None, environ).server.token == TOKEN


def test_lists_may_be_written_with_commas_and_tenants_as_json() -> None:
    environ = {
        "KVFERRY_SERVER__LISTEN": "unix:///tmp/a.sock, tcp://127.0.0.1:1",
        "KVFERRY_TENANTS": '[{"name": "search", "token": "the token of search"}]',
    }
    settings = load_server_settings(None, environ)
    assert settings.server.listen == ("unix:///tmp/a.sock", "tcp://127.0.0.1:1")
    assert settings.tenants == (TenantConfig(name="search", token="the token of search"),)


def test_the_file_may_be_named_by_a_variable(write: Write) -> None:
    assert load_server_settings(None, {"KVFERRY_CONFIG": write(FULL)}).server.max_models == 2


# --- server and engines beside each other -------------------------------------------------------------


def test_variables_of_engines_are_left_to_them_and_those_of_the_server_to_it() -> None:
    environ = {
        "KVFERRY_SERVICE": "unix:///tmp/a.sock",
        "KVFERRY_SAVE": "prompt",
        "KVFERRY_TLS__CA": "ca.pem",
        "KVFERRY_SERVER__HTTP": "",
        "KVFERRY_TOKEN": TOKEN,
        "KVFERRY_HOST__CAPACITY": "1GiB",
    }
    assert load_server_settings(None, environ).server == ServerConfig(http="", token=TOKEN)
    assert engine_variables(environ) == ["KVFERRY_SAVE", "KVFERRY_SERVICE", "KVFERRY_TLS__CA"]
    engine = load_settings(environ=environ).config
    assert (engine.save, engine.token, engine.tls.ca) == ("prompt", TOKEN, "ca.pem")


def test_variables_that_kubernetes_sets_beside_a_service_are_ignored() -> None:
    environ = {
        "KVFERRY_SERVER_SERVICE_HOST": "10.0.0.1",
        "KVFERRY_SERVER_SERVICE_PORT_HTTP": "80",
        "KVFERRY_SERVER_PORT": "tcp://10.0.0.1:80",
        "KVFERRY_SERVER_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert load_server_settings(None, environ).server == ServerConfig()
    assert load_settings(environ=environ).config == Config()


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("save = 'all'", "the engine's configuration"),
        ("load_deadline_s = 1.0", "the engine's configuration"),
        ("explain = {enabled = false}", "the engine's configuration"),
        ("model = 'm'", "the engine's configuration"),
        ("service = 'unix:///tmp/a.sock'", "type remote"),
        (f"token = '{TOKEN}'", "[server]"),
        ("tls = {ca = 'x'}", "[server.tls]"),
        ("tenant = 'search'", "[[tenants]]"),
    ],
)
def test_keys_that_mean_nothing_to_a_server_are_refused_in_its_file(
    text: str, hint: str, write: Write
) -> None:
    with pytest.raises(ConfigError, match="means nothing to a cache server") as raised:
        load_server_settings(write(text), {})
    assert hint in raised.value.hint
    assert TOKEN not in str(raised.value)


# --- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sever]", "sever: unknown key .*did you mean 'server'"),
        ("[server]\nlissten = []", r"server\.lissten: unknown key .*did you mean 'listen'"),
        ("[server.tls]\ncert = 'x'", r"server\.tls\.cert: unknown key .*did you mean 'certificate'"),
        ("[server]\nlisten = 'unix:///a'", r"server\.listen: found 'unix:///a', expected a list"),
        ("[server]\nmax_connections = 0", r"server\.max_connections: found 0"),
        ("[server]\nlog_format = 'xml'", "expected 'text' or 'json'"),
        ("[server]\ntoken = 5", r"server\.token: found a value \(not shown\)"),
        ("[[tenants]]\ntoken = 'x'", r"tenants\[0\]\.name: is required"),
        ("[[tenants]]\nname = 'a'\ntokn = 'x'", r"tenants\[0\]\.tokn: unknown key .*'token'"),
        ("[[tenants]]\nname = 'a'\nhost = 5", r"tenants\[0\]\.host: found 5, expected a table"),
        ("[[tenants]]\nname = 'a'\nhost = {capacity = 'x'}", r"tenants\[0\]\.host\.capacity: found 'x'"),
        ("[[tenants]]\nname = 'a'\ntiers = [{}]", r"tenants\[0\]\.tiers\[0\]\.type: is required"),
        (
            "[[tenants]]\nname = 'a'\ntiers = [{type = 'x', name = '/'}]",
            r"tenants\[0\]\.tiers\[0\]\.name: found '/'",
        ),
        ("[[tiers]]\ntype = 'x'\n[[tiers]]\ntype = 'x'", r"tiers\[1\]\.name: 'x' is taken"),
        ("[[tiers]]\ntype = 'x'\nthreads = -1", r"tiers\[0\]\.threads: found -1"),
        ("[host]\ncapcity = 1", r"host\.capcity: unknown key .*'capacity'"),
        ("= 1", "not valid TOML"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_source(text: str, message: str, write: Write) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_server_settings(path, {})
    if "is taken" not in message and "'/'" not in message:
        assert path in str(raised.value)


def test_a_mistake_that_is_overridden_is_a_mistake_still(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"server\.http"):
        load_server_settings(write("[server]\nhttp = 5"), {}, {"http": "127.0.0.1:1"})


def test_an_unknown_variable_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'KVFERRY_SERVER__HTTP'"):
        load_server_settings(None, {"KVFERRY_SERVER__HTP": "x"})


def test_no_message_shows_a_tenants_token(write: Write) -> None:
    with pytest.raises(ConfigError) as raised:
        load_server_settings(write("tenants = [{name = 'a', token = 'sesame'}, 5]"), {})
    assert "sesame" not in str(raised.value)


# --- the command --------------------------------------------------------------------------------------


Run = Callable[[ServerSettings], None]


def stand_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put ``run`` in the place of the server itself, which the command imports only when it starts one."""
    module = types.ModuleType("kvferry.connector.server.running")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("KVFERRY_CONFIG", raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """The settings that servers were started with."""
    found: list[ServerSettings] = []
    stand_in(found.append, monkeypatch)
    return found


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["serve", *arguments])


def test_the_command_starts_a_server_with_the_file_and_its_options(
    started: list[ServerSettings], write: Write
) -> None:
    result = invoke(
        "--config", write(FULL), "--listen", "unix:///tmp/b.sock", "--listen", "tcp://127.0.0.1:1"
    )
    assert result.exit_code == 0, result.output
    (settings,) = started
    assert settings.server.listen == ("unix:///tmp/b.sock", "tcp://127.0.0.1:1")
    assert settings.server.max_models == 2


def test_the_command_says_what_it_leaves_to_engines(
    started: list[ServerSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFERRY_SAVE", "prompt")
    assert "KVFERRY_SAVE is left to engines" in invoke("--http", "").stderr
    assert started[0].server.http == ""


def test_a_mistake_is_one_clear_line(started: list[ServerSettings], write: Write) -> None:
    result = invoke("--config", write("[server]\nlissten = []"))
    assert result.exit_code == 1
    assert "did you mean 'listen'" in result.output
    assert "Traceback" not in result.output
    assert started == []


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(settings: ServerSettings) -> None:
        raise KVFerryError("another server listens on unix:///tmp/a.sock")

    stand_in(run, monkeypatch)
    result = invoke()
    assert result.exit_code == 1
    assert result.output.startswith("Error: another server listens")
