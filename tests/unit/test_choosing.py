"""``service`` decides where an engine's cache is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kvferry.connector.choosing import open_service, with_remote_tier
from kvferry.connector.client import ClientService
from kvferry.connector.config import Config, HostConfig, TlsConfig
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.errors import ConfigError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import load_settings

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=8, head_dim=16, itemsize=2)
SMALL = HostConfig(capacity=1 << 20)


def test_without_one_it_is_in_the_engine() -> None:
    service = open_service(Config(host=SMALL), LAYOUT, bytes(32), PluginRegistry())
    assert isinstance(service, EmbeddedService)
    assert service.description.endswith("slots, tiers host")
    service.close(1.0)


def test_on_this_machine_the_engine_is_a_client(tmp_path: Path) -> None:
    config = Config(service=f"unix://{tmp_path}/s", host=SMALL)
    service = open_service(config, LAYOUT, bytes(32), PluginRegistry())
    assert isinstance(service, ClientService)
    service.close(1.0)


def test_elsewhere_the_server_is_a_tier() -> None:
    config = Config(
        service="tls://cache.example:9465", token="secret", tls=TlsConfig(ca="/ca.pem"), lease_s=7.0
    )
    embedded = with_remote_tier(config)
    assert embedded.tiers == (
        {
            "type": "remote",
            "name": "remote",
            "servers": ["tls://cache.example:9465"],
            "admission": "always",
            "token": "secret",
            "tls": msgspec.to_builtins(TlsConfig(ca="/ca.pem")),
        },
    )
    assert (embedded.service, embedded.token, embedded.lease_s) == ("", "", 7.0)
    plain = with_remote_tier(Config(service="tcp://127.0.0.1:9465"))
    assert plain.tiers == (
        {"type": "remote", "name": "remote", "servers": ["tcp://127.0.0.1:9465"], "admission": "always"},
    )


@pytest.mark.parametrize("config", [Config(), Config(service="unix:///s")], ids=["embedded", "unix"])
def test_otherwise_the_configuration_stays_as_it_is(config: Config) -> None:
    assert with_remote_tier(config) is config


def test_a_server_and_tiers_are_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="tiers belong to the cache server"):
        load_settings({"service": "tcp://127.0.0.1:1", "tiers": [{"type": "disk"}]})


def test_what_is_no_address_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="service"):
        load_settings({"service": "kvferry.sock"})
