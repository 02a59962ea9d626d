"""Where the configuration comes from, and what an operator is told about a mistake in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from kvferry.connector.config import Config, HostConfig
from kvferry.connector.errors import ConfigError
from kvferry.connector.schema import parse_size
from kvferry.connector.settings import effective, load_settings, split_tier, typed_options
from kvferry.connector.tier import TierType

MIB = 1 << 20


def write_toml(directory: Path, text: str) -> str:
    path = directory / "kvferry.toml"
    path.write_text(text)
    return str(path)


# --- precedence and origins ---------------------------------------------------------------------------


def test_without_any_source_everything_is_a_default() -> None:
    settings = load_settings()
    assert settings.config == Config()
    assert set(settings.origins.values()) == {"default"}


def test_extra_config_beats_file_beats_environment_beats_default(tmp_path: Path) -> None:
    path = write_toml(tmp_path, 'save = "none"\nlease_s = 7\n[host]\ncapacity = "2GiB"\n')
    environ = {"KVFERRY_HOST__CAPACITY": "3GiB", "KVFERRY_LEASE_S": "9", "KVFERRY_BLOCK_TOKENS": "128"}
    settings = load_settings({"host": {"capacity": "1GiB"}}, path, environ)
    assert settings.config.host.capacity == 1 << 30
    assert settings.config.lease_s == 7
    assert settings.config.block_tokens == 128
    assert settings.config.host.eviction == HostConfig().eviction
    assert settings.origins["host.capacity"] == "kv_connector_extra_config"
    assert settings.origins["lease_s"] == path
    assert settings.origins["block_tokens"] == "KVFERRY_BLOCK_TOKENS"
    assert settings.origins["host.eviction"] == "default"


def test_the_file_is_named_by_argument_then_extra_config_then_variable(tmp_path: Path) -> None:
    paths = []
    for name in ("argument", "extra", "variable"):
        (tmp_path / name).mkdir()
        paths.append(write_toml(tmp_path / name, f'model = "{name}"\n'))
    argument, extra, variable = paths
    environ = {"KVFERRY_CONFIG": variable}
    assert load_settings({"config_file": extra}, argument, environ).config.model == "argument"
    assert load_settings({"config_file": extra}, None, environ).config.model == "extra"
    assert load_settings({}, None, environ).config.model == "variable"


def test_variables_carry_every_type() -> None:
    environ = {
        "KVFERRY_ENABLED": "false",
        "KVFERRY_MODEL": "123",
        "KVFERRY_RETRY_FAILED_S": "2.5",
        "KVFERRY_PLUGINS": "my.plugin, other",
        "KVFERRY_EXPLAIN__MAX_BYTES": "8 MiB",
        "KVFERRY_TIERS": json.dumps([{"type": "disk", "path": "/kv"}]),
    }
    config = load_settings(environ=environ).config
    assert config.enabled is False
    assert config.model == "123"
    assert config.retry_failed_s == 2.5
    assert config.plugins == ("my.plugin", "other")
    assert config.explain.max_bytes == 8 * MIB
    assert config.tiers == ({"type": "disk", "path": "/kv"},)


def test_handoffs_are_configured_like_everything_else(tmp_path: Path) -> None:
    path = write_toml(tmp_path, '[peer]\nlisten = "tcp://10.0.0.7:7071"\nlease_s = 5\n')
    environ = {"KVFERRY_PEER__ALLOWED_HOSTS": "10.0.0.0/8, gpu-7", "KVFERRY_PEER__LEASE_S": "9"}
    settings = load_settings({"peer": {"transport": "socket"}}, path, environ)
    peer = settings.config.peer
    assert (peer.transport, peer.listen, peer.lease_s) == ("socket", "tcp://10.0.0.7:7071", 5)
    assert peer.allowed_hosts == ("10.0.0.0/8", "gpu-7")
    shown = {line.path: (line.value, line.origin) for line in effective(settings)}
    assert shown["peer.lease_s"] == ("5.0", path)
    assert shown["peer.transport"] == ('"socket"', "kv_connector_extra_config")
    assert shown["peer.allowed_hosts"][1] == "KVFERRY_PEER__ALLOWED_HOSTS"


@pytest.mark.parametrize(
    ("peer", "path"),
    [
        ({"leases_s": 5}, "peer.leases_s"),
        ({"lease_s": 0}, "peer.lease_s"),
        ({"held_share": 1.5}, "peer.held_share"),
    ],
)
def test_a_mistake_in_the_handoffs_options_is_named(peer: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError) as failure:
        load_settings({"peer": peer})
    assert failure.value.path == path


def test_tensorrt_llms_table_is_configured_like_everything_else(tmp_path: Path) -> None:
    path = write_toml(tmp_path, '[trtllm.adapters.7]\nname = "support"\npath = "/adapters/support"\n')
    environ = {"KVFERRY_TRTLLM__QUERY_WAIT_S": "0", "KVFERRY_TRTLLM__SYNC_BYTES": "9"}
    settings = load_settings({"trtllm": {"sync_bytes": "8MiB"}}, path, environ)
    trtllm = settings.config.trtllm
    assert (trtllm.query_wait_s, trtllm.sync_bytes) == (0, 8 * MIB)
    assert trtllm.adapters["7"].name == "support"
    shown = {line.path: (line.value, line.origin) for line in effective(settings)}
    assert shown["trtllm.adapters"] == ('{"7": {"name": "support", "path": "/adapters/support"}}', path)
    assert load_settings().config.trtllm.sync_bytes is None


@pytest.mark.parametrize(
    ("trtllm", "path"),
    [
        ({"sync_byte": 5}, "trtllm.sync_byte"),
        ({"query_wait_s": -1}, "trtllm.query_wait_s"),
        ({"query_wait_s": 5}, "trtllm.query_wait_s"),
        ({"sync_bytes": -1}, "trtllm.sync_bytes"),
        ({"adapters": {"support": {"name": "support", "path": "/a"}}}, "trtllm.adapters"),
        ({"adapters": {"07": {"name": "support", "path": "/a"}}}, "trtllm.adapters"),
        ({"adapters": {"7": {"name": "support"}}}, "trtllm.adapters"),
        ({"adapters": {"7": {"name": "support", "path": "/a", "rank": 8}}}, "trtllm.adapters"),
    ],
)
def test_a_mistake_in_tensorrt_llms_table_is_named(trtllm: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError) as failure:
        load_settings({"trtllm": trtllm})
    assert failure.value.path == path


def test_variables_that_kubernetes_sets_beside_a_service_are_ignored() -> None:
    environ = {
        "KVFERRY_SERVICE_HOST": "10.0.0.1",
        "KVFERRY_SERVICE_PORT": "80",
        "KVFERRY_PORT": "tcp://10.0.0.1:80",
        "KVFERRY_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert load_settings(environ=environ).config == Config()


# --- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"hosst": {}}, "hosst: unknown key .*did you mean 'host'"),
        ({"host": {"capcity": 1}}, r"host\.capcity: unknown key .*did you mean 'capacity'"),
        ({"zzz": 1}, "zzz: unknown key .*known: .*block_tokens"),
        ({"host": 3}, "host: found 3, expected a table"),
        ({"host": {"huge_pages": "yes"}}, r"host\.huge_pages: found 'yes', expected true or false"),
        ({"block_tokens": -1}, "block_tokens: found -1, expected a whole number >= 0"),
        ({"block_tokens": "64"}, "block_tokens: found '64', expected a whole number"),
        ({"save": "some"}, "save: found 'some', expected 'all' or 'prompt' or 'none'"),
        ({"lease_s": 0}, "lease_s: found 0, expected a number > 0"),
        ({"lease_s": float("nan")}, "lease_s: found nan, expected a finite number"),
        ({"plugins": "my.plugin"}, "plugins: found 'my.plugin', expected a list"),
        ({"tiers": {"type": "disk"}}, "tiers: found .* expected a list"),
        ({"tiers": [{"typ": "disk"}]}, r"tiers\[0\]\.type: is required"),
        (
            {"tiers": [{"type": "disk", "threads": -1}]},
            r"tiers\[0\]\.threads: found -1, expected a whole number >= 0",
        ),
        ({"tiers": [{"type": "disk"}, {"type": "disk"}]}, r"tiers\[1\]\.name: 'disk' is taken"),
        ({"tiers": [{"type": "disk", "name": "host"}]}, r"tiers\[0\]\.name: 'host' is taken"),
        ({"tiers": [{"type": "disk", "name": "a b"}]}, r"tiers\[0\]\.name: found 'a b'"),
        ({"config_file": 3}, "config_file: found 3"),
    ],
)
def test_a_mistake_is_named_with_its_path_and_what_is_allowed(extra: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(extra)


def test_a_mistake_tells_which_source_it_is_in(tmp_path: Path) -> None:
    path = write_toml(tmp_path, 'save = "some"\n')
    with pytest.raises(ConfigError, match=rf"from {path}"):
        load_settings({"save": "all"}, path)
    with pytest.raises(ConfigError, match="from KVFERRY_LEASE_S"):
        load_settings(environ={"KVFERRY_LEASE_S": "long"})


def test_an_unknown_variable_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"KVFERRY_HOST_CAPACITY: unknown key .*KVFERRY_HOST__CAPACITY"):
        load_settings(environ={"KVFERRY_HOST_CAPACITY": "1GiB"})


def test_a_file_that_cannot_be_read_or_parsed_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent.*No such file"):
        load_settings(toml_path=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_settings(toml_path=write_toml(tmp_path, "save = "))


# --- sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64GiB", 64 << 30),
        ("512 MiB", 512 * MIB),
        ("1.5 KiB", 1536),
        ("2tib", 2 << 40),
        ("3 GB", 3_000_000_000),
        ("4096", 4096),
        ("10 B", 10),
        (123, 123),
    ],
)
def test_sizes_are_understood(text: object, count: int) -> None:
    assert parse_size(text, "host.capacity") == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "12 parsecs", "-1GiB", "0", 0, -5, 1.5, True, None, "1e9", "64G", "9999999PiB"]
)
def test_what_is_no_positive_size_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match=r"host\.capacity: found .*64GiB"):
        parse_size(text, "host.capacity")


# --- tiers --------------------------------------------------------------------------------------------


class DiskOptions(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    capacity: int
    io_threads: Annotated[int, msgspec.Meta(ge=1)] = 2
    access_token: str = ""


DISK = TierType("disk", DiskOptions, lambda options, context: None, "for this test")  # type: ignore[arg-type, return-value]


def test_a_tier_is_split_into_our_fields_and_the_plugins_options() -> None:
    config, options = split_tier(
        {"type": "disk", "threads": 8, "path": "/kv", "capacity": "1GiB"}, "tiers[0]"
    )
    assert (config.type, config.name, config.threads) == ("disk", "disk", 8)
    assert options == {"path": "/kv", "capacity": "1GiB"}


def test_options_are_typed_and_sizes_converted() -> None:
    options = typed_options(DISK, {"path": "/kv", "capacity": "1GiB"}, "tiers[0]")
    assert options == DiskOptions(path="/kv", capacity=1 << 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/kv", "capcity": 1}, r"tiers\[0\]\.capcity: unknown key \(did you mean 'capacity'"),
        ({"path": "/kv", "thread": 1}, r"tiers\[0\]\.thread: unknown key \(did you mean 'threads'"),
        ({"path": "/kv"}, r"tiers\[0\]\.capacity: is required"),
        ({"path": "/kv", "capacity": 0}, r"tiers\[0\]\.capacity: found 0, a size must be positive"),
        ({"path": 3, "capacity": 1}, r"tiers\[0\]\.path: found 3, expected text"),
        ({"path": "/kv", "capacity": 1, "io_threads": 0}, r"tiers\[0\]\.io_threads: found 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed_options(DISK, options, "tiers[0]")


# --- secrets ------------------------------------------------------------------------------------------


def test_secrets_are_masked_wherever_they_stand() -> None:
    tier = {
        "type": "redis",
        "url": "redis://me:hunter2@host/0",
        "auth_token": "hunter2",
        "tls": {"password": "hunter2"},
    }
    settings = load_settings({"tiers": [tier]}, None, {"KVFERRY_SECRET": "hunter2"})
    shown = {line.path: line for line in effective(settings)}
    assert not any("hunter2" in line.value for line in shown.values())
    assert shown["secret"].value == "********"
    assert shown["secret"].origin == "KVFERRY_SECRET"
    assert shown["tiers[0].url"].value == '"redis://me:********@host/0"'
    assert shown["tenant"].value == '""'


def test_a_secret_of_the_wrong_type_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"secret": 98765})
    assert "98765" not in str(caught.value)


def test_every_field_is_listed_with_its_origin() -> None:
    paths = [line.path for line in effective(load_settings())]
    assert {"enabled", "host.capacity", "explain.max_bytes", "save"} <= set(paths)
    assert len(paths) == len(set(paths))
