"""What a Redis tier's URL and options mean, and what is said about mistakes in them. No server is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.connector.errors import ConfigError
from kvferry.connector.schema import is_secret
from kvferry.connector.settings import effective, load_settings
from kvferry.plugins.redis.options import RedisOptions, Target, parse_target

SECRET = "s3cr3t-and-more"


def target(url: str, **options: object) -> Target:
    return parse_target("r", RedisOptions(url=url, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "mode", "addresses", "is_tls", "db"),
    [
        ("redis://h", "single", (("h", 6379),), False, 0),
        ("redis://h:7000/3", "single", (("h", 7000),), False, 3),
        ("redis://h?db=2", "single", (("h", 6379),), False, 2),
        ("rediss://h:6380", "single", (("h", 6380),), True, 0),
        ("redis://[::1]:6379", "single", (("::1", 6379),), False, 0),
        ("redis+cluster://a,b:7001", "cluster", (("a", 6379), ("b", 7001)), False, 0),
        ("rediss+cluster://a", "cluster", (("a", 6379),), True, 0),
        ("redis+sentinel://a,b:5/mymaster", "sentinel", (("a", 26379), ("b", 5)), False, 0),
        ("rediss+sentinel://a/mymaster/4", "sentinel", (("a", 26379),), True, 4),
    ],
)
def test_a_url_names_servers(
    url: str, mode: str, addresses: tuple[tuple[str, int], ...], is_tls: bool, db: int
) -> None:
    found = target(url)
    assert (found.mode, found.addresses, found.is_tls, found.db) == (mode, addresses, is_tls, db)
    assert found.service == ("mymaster" if mode == "sentinel" else "")


def test_a_unix_socket_is_a_path() -> None:
    found = target("unix:///run/redis/socket?db=1")
    assert (found.socket_path, found.db, found.addresses) == ("/run/redis/socket", 1, ())


def test_credentials_come_from_the_url_or_from_options() -> None:
    inside = target(f"redis://kv%40ferry:{SECRET}%2F@h")
    assert (inside.username, inside.password) == ("kv@ferry", f"{SECRET}/")
    beside = target("redis://h", username="kvferry", password=SECRET)
    assert (beside.username, beside.password) == ("kvferry", SECRET)
    mixed = target("redis://kvferry@h", password=SECRET)
    assert (mixed.username, mixed.password) == ("kvferry", SECRET)
    assert target(f"unix://u:{SECRET}@/run/socket").password == SECRET


@pytest.mark.parametrize(
    ("url", "options", "path", "text"),
    [
        ("localhost:6379", {}, "url", "redis://"),
        ("http://h", {}, "url", "'http'"),
        ("redis://h:70000", {}, "url", "not host:port"),
        ("redis://", {}, "url", "not host:port"),
        ("redis://a,b", {}, "url", r"redis\+cluster:// or redis\+sentinel://"),
        ("redis://h/one", {}, "url", "database 'one'"),
        ("redis://h/1/2", {}, "url", "database '1/2'"),
        ("redis://h?timeout=3", {}, "url", "'timeout'"),
        ("redis+cluster://h/1", {}, "url", "a cluster has only one"),
        ("redis+sentinel://h", {}, "url", "names no service"),
        ("unix://run/socket", {}, "url", "three slashes"),
        (f"redis://u:{SECRET}@h", {"password": SECRET}, "password", "given twice"),
        ("redis://h", {"prefix": "kv ferry"}, "prefix", "'kv ferry'"),
        ("redis://h", {"prefix": "{tag}"}, "prefix", "letters"),
        ("redis://h", {"tls_ca": __file__}, "tls_ca", "rediss://"),
        ("rediss://h", {"tls_ca": "/nowhere"}, "tls_ca", "/nowhere is not a file"),
        ("rediss://h", {"tls_cert": __file__}, "tls_key", "is missing"),
    ],
)
def test_a_mistake_names_the_option(url: str, options: dict[str, object], path: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as raised:
        target(url, **options)
    assert raised.value.path == f"tiers.r.{path}"
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "url", [f"redis://u:{SECRET}@h:99999", f"redis://u:{SECRET}@h?x=1", f"redus://:{SECRET}@h"]
)
def test_no_message_about_a_url_shows_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        target(url)
    assert SECRET not in str(raised.value)


def test_a_target_can_be_shown() -> None:
    found = target(f"redis://u:{SECRET}@h:1/2")
    assert SECRET not in f"{found!r} {found} {found.label}"
    assert target("redis+sentinel://[::1]:1,b/m").label == "m behind [::1]:1,b:26379"


def test_passwords_are_masked_where_the_configuration_is_shown() -> None:
    tier = {
        "type": "redis",
        "url": f"redis://u:{SECRET}@h",
        "password": SECRET,
        "sentinel_password": SECRET,
    }
    shown = "\n".join(setting.value for setting in effective(load_settings({"tiers": [tier]})))
    assert "redis://u:" in shown
    assert SECRET not in shown
    assert is_secret("password")
    assert is_secret("sentinel_password")


def test_tls_files_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ca.pem").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert target("rediss://h", tls_ca="~/ca.pem").is_tls
