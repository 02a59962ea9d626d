"""Where a cache server can be: three forms, and every other text is an error that shows them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.connector.address import Address, parse_address
from kvferry.connector.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:///run/kvferry.sock", Address(scheme="unix", path="/run/kvferry.sock")),
        ("unix:///run/user/1000/a b%.sock", Address(scheme="unix", path="/run/user/1000/a b%.sock")),
        ("tcp://127.0.0.1:7070", Address(scheme="tcp", host="127.0.0.1", port=7070)),
        ("tcp://cache-1.internal:1", Address(scheme="tcp", host="cache-1.internal", port=1)),
        ("tcp://kv_cache:65535", Address(scheme="tcp", host="kv_cache", port=65535)),
        ("tls://[::1]:443", Address(scheme="tls", host="::1", port=443)),
        ("tls://[fe80::1%eth0]:443", Address(scheme="tls", host="fe80::1%eth0", port=443)),
        ("tcp://0.0.0.0:0", Address(scheme="tcp", host="0.0.0.0", port=0)),
    ],
)
def test_an_address_is_read_and_written_alike(text: str, address: Address) -> None:
    assert parse_address(text, "service") == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "unix:///path"),
        ("/run/kvferry.sock", "unix:///path"),
        ("127.0.0.1:7070", "tcp://host:port"),
        ("http://127.0.0.1:7070", "tcp://host:port"),
        ("TCP://127.0.0.1:7070", "tcp://host:port"),
        ("unix:/run/kvferry.sock", "unix:///path"),
        ("unix://run/kvferry.sock", "three slashes"),
        ("unix://@abstract", "three slashes"),
        ("unix:///run/kvferry/", "unix:///path"),
        ("unix:///run/a\nb", "unix:///path"),
        ("unix:///run/a\0b", "unix:///path"),
        ("unix:///" + "a" * 107, "shorter"),
        ("tcp://host", "tcp://host:port"),
        ("tcp://host:", "tcp://host:port"),
        ("tcp://host:http", "tcp://host:port"),
        ("tcp://host:65536", "tcp://host:port"),
        ("tcp://host:-1", "tcp://host:port"),
        ("tcp://host:7070/", "tcp://host:port"),
        ("tcp://host:7070?x", "tcp://host:port"),
        ("tcp://:7070", "0.0.0.0"),
        ("tcp://*:7070", "0.0.0.0"),
        ("tcp://::1:7070", "brackets"),
        ("tcp://[::1]", "brackets"),
        ("tcp://[127.0.0.1]:7070", "tcp://host:port"),
        ("tcp://[::1:7070", "brackets"),
        ("tcp://ho st:7070", "tcp://host:port"),
        ("tcp://-x:7070", "tcp://host:port"),
        ("tcp://a..b:7070", "tcp://host:port"),
        ("tcp://host:٣", "tcp://host:port"),
    ],
)
def test_everything_else_is_an_error_that_says_what_to_write(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_address(text, "server.listen[0]")
    assert raised.value.path == "server.listen[0]"
    assert hint in raised.value.hint


def test_a_credential_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_address("tcp://user:sesame@host:7070", "service")
    assert "sesame" not in str(raised.value)
    assert "KVFERRY_TOKEN" in raised.value.hint


@pytest.mark.parametrize(
    ("text", "is_loopback"),
    [
        ("unix:///run/a.sock", True),
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.9.9.9:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://[::ffff:127.0.0.1]:1", True),
        ("tcp://localhost:1", True),
        ("tls://LocalHost:1", True),
        ("tcp://localhost.localdomain:1", False),
        ("tcp://localhost.evil.example:1", False),
        ("tcp://127.1:1", False),
        ("tcp://2130706433:1", False),
        ("tcp://0.0.0.0:1", False),
        ("tcp://[::]:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tls://[::ffff:10.0.0.1]:1", False),
    ],
)
def test_only_what_is_sure_to_stay_on_this_machine_is_loopback(text: str, is_loopback: bool) -> None:
    assert parse_address(text, "listen").is_loopback is is_loopback


@settings(deadline=None)
@given(
    st.text(max_size=40)
    | st.text(max_size=30).map("tcp://".__add__)
    | st.text(max_size=30).map("unix:///".__add__)
)
def test_any_text_is_an_address_or_an_error(text: str) -> None:
    try:
        address = parse_address(text, "service")
    except ConfigError:
        return
    assert str(address) == text or address.port  # a port may be written with zeros before it
    assert parse_address(str(address), "service") == address
