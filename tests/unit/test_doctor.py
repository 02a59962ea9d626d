"""What doctor finds on a machine and in a configuration."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from kvferry.connector.doctor import examine
from kvferry.connector.errors import ConfigError
from kvferry.connector.finding import Finding
from kvferry.connector.hooks import hookimpl
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.server.config import ServerConfig, ServerSettings
from kvferry.connector.server.running import CacheServer
from kvferry.connector.settings import load_settings
from kvferry.connector.tier import TierType

SMALL = {"capacity": "1MiB"}


def findings(
    extra: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
    toml_path: str | None = None,
) -> list[Finding]:
    settings = load_settings({"host": SMALL, **(extra or {})}, toml_path)
    registry = PluginRegistry(settings.config.plugins)
    return list(examine(settings, registry, {"HOME": "/tmp", **(environ or {})}))


def about(topic: str, found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.topic == topic]


def levels(found: list[Finding]) -> set[str]:
    return {finding.level for finding in found}


def test_this_machine_can_run_kvferry() -> None:
    assert levels(about("system", findings())) == {"ok"}
    assert any("kvferry 0" in finding.text for finding in about("versions", findings()))


def test_an_arena_larger_than_memory_is_an_error_with_both_sizes() -> None:
    (found,) = about("memory", findings({"host": {"capacity": "1000TiB"}}))
    assert found.level == "error"
    assert "are available" in found.text
    assert "host.capacity" in found.hint


def test_huge_pages_that_are_not_reserved_are_a_warning() -> None:
    found = about("memory", findings({"host": {"capacity": "900TiB", "huge_pages": True}}))
    assert any("host.huge_pages needs" in finding.text and finding.level == "warn" for finding in found)


def test_an_unknown_eviction_policy_is_an_error() -> None:
    (found,) = about("host", findings({"host": {**SMALL, "eviction": "mru"}}))
    assert (found.level, "lru" in found.hint) == ("error", True)


def test_an_unknown_admission_policy_is_an_error(tmp_path: Path) -> None:
    tier = {"type": "disk", "path": str(tmp_path / "kv"), "capacity": "1MiB", "admission": "second"}
    (found,) = [one for one in about("tier disk", findings({"tiers": [tier]})) if one.level == "error"]
    assert (found.text, "second-touch" in found.hint) == ("there is no admission policy 'second'", True)


def test_a_disk_tier_that_can_work_is_fine(tmp_path: Path) -> None:
    tier = {"type": "disk", "path": str(tmp_path / "kv"), "capacity": "1MiB"}
    found = about("tier disk", findings({"tiers": [tier]}))
    assert "error" not in levels(found)
    assert list(tmp_path.iterdir()) == []


def test_a_capacity_beyond_the_filesystem_is_a_warning(tmp_path: Path) -> None:
    tier = {"type": "disk", "path": str(tmp_path), "capacity": "900TiB"}
    assert any(
        "free" in finding.text and finding.level == "warn"
        for finding in about("tier disk", findings({"tiers": [tier]}))
    )


def test_a_path_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tier = {"type": "disk", "path": str(tmp_path / "file"), "capacity": "1MiB"}
    found = about("tier disk", findings({"tiers": [tier]}))
    assert any(finding.level == "error" and "not a directory" in finding.text for finding in found)


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        ({"type": "dsk"}, "did you mean 'disk'"),
        ({"type": "disk", "path": "/tmp"}, "capacity: is required"),
        ({"type": "disk", "path": "/tmp", "capacity": "1MiB", "threds": 1}, "did you mean 'threads'"),
    ],
)
def test_a_tier_that_is_configured_wrongly_is_an_error(tier: dict[str, object], message: str) -> None:
    (found,) = about("tiers[0]", findings({"tiers": [tier]}))
    assert found.level == "error"
    assert message in found.text


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"enabled": False}, "everything"),
        ({"save": "none"}, "nothing new"),
        ({"save": "prompt"}, "generated tokens"),
        ({}, "after a restart"),
    ],
)
def test_what_is_not_cached_is_said(extra: dict[str, object], text: str) -> None:
    assert any(text in finding.text for finding in about("not cached", findings(extra)))


def test_records_that_cannot_be_written_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    extra: dict[str, object] = {"explain": {"directory": str(tmp_path / "file" / "explain")}}
    assert levels(about("explain", findings(extra))) == {"warn"}


def test_a_secret_that_others_can_read_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "kvferry.toml"
    path.write_text('secret = "hunter2"\n')
    path.chmod(0o644)
    (found,) = about("secret", findings(toml_path=str(path)))
    assert found.level == "warn"
    assert "hunter2" not in found.text
    path.chmod(0o600)
    assert about("secret", findings(toml_path=str(path))) == []


def test_plugins_add_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    @hookimpl
    def kvferry_doctor_findings() -> Sequence[Finding]:
        return [Finding("warn", "widgets", "too few widgets", "add some")]

    module = types.ModuleType("kvferry_test_findings")
    module.kvferry_doctor_findings = kvferry_doctor_findings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert Finding("warn", "widgets", "too few widgets", "add some") in findings(
        {"plugins": [module.__name__]}
    )


def test_a_plugin_that_was_asked_for_and_fails_is_an_error() -> None:
    found = about("plugins", findings({"plugins": ["kvferry_no_such_module"]}))
    assert any(finding.level == "error" and "kvferry_no_such_module" in finding.text for finding in found)


def with_codec(codec: str, **options: object) -> list[Finding]:
    tier = {"type": "disk", "path": "/tmp/kvferry-none", "capacity": "1MiB", "codec": codec, **options}
    return [finding for finding in about("tier disk", findings({"tiers": [tier]})) if codec in finding.text]


def test_a_lossy_codec_is_said_in_one_line() -> None:
    (found,) = with_codec("fp8")
    assert (found.level, "LOSSY" in found.text) == ("warn", True)


def test_a_lossless_codec_is_fine() -> None:
    assert levels(with_codec("zstd")) == {"ok"}


def test_a_codec_that_nobody_offers_is_an_error() -> None:
    (found,) = with_codec("ztsd")
    assert (found.level, "'zstd'" in found.text) == ("error", True)


def test_a_codec_whose_library_is_missing_is_an_error_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (found,) = with_codec("zstd")
    assert (found.level, "kvferry[codecs]" in found.text) == ("error", True)


def check_tier(monkeypatch: pytest.MonkeyPatch, check: Callable[..., Iterable[Finding]]) -> list[Finding]:
    """Let doctor meet a tier whose plugin checks it like this."""

    class Options(msgspec.Struct, frozen=True):
        pass

    @hookimpl
    def kvferry_tier_types() -> Sequence[TierType]:
        return [TierType("checked", Options, lambda options, context: None, "for tests", check)]

    module = types.ModuleType("kvferry_test_checked")
    module.kvferry_tier_types = kvferry_tier_types  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return about(
        "tier c", findings({"plugins": [module.__name__], "tiers": [{"type": "checked", "name": "c"}]})
    )


def test_a_tier_is_checked_by_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_tier(monkeypatch, lambda options, name: [Finding("ok", f"tier {name}", "answers")])
    assert [finding.text for finding in found][-1] == "answers"


def test_a_mistake_that_a_check_finds_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(options: object, name: str) -> Iterator[Finding]:
        yield Finding("ok", f"tier {name}", "answers")
        raise ConfigError(f"tiers.{name}.bucket", "there is no such bucket")

    assert [finding.level for finding in check_tier(monkeypatch, check)][-1] == "error"


def test_a_check_that_fails_itself_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(options: object, name: str) -> list[Finding]:
        raise RuntimeError("oops")

    found = check_tier(monkeypatch, check)[-1]
    assert (found.level, "RuntimeError: oops" in found.text) == ("warn", True)


def test_a_cache_server_that_is_away_is_a_warning_and_the_arena_is_its_business(tmp_path: Path) -> None:
    found = findings({"service": f"unix://{tmp_path}/s", "host": {"capacity": "1000TiB"}})
    (server,) = about("cache server", found)
    assert server.level == "warn"
    assert "does not answer" in server.text
    assert not about("memory", found)
    assert not any("after a restart" in finding.text for finding in about("not cached", found))


def test_a_cache_server_that_answers_is_told(tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/s"
    server = CacheServer(ServerSettings(server=ServerConfig(listen=(address,), http="")))
    server.start()
    try:
        (found,) = about("cache server", findings({"service": address}))
        assert (found.level, "answers" in found.text) == ("ok", True)
        assert not server.status().pools, "looking opens no cache"
        (refused,) = about("cache server", findings({"service": address, "token": "x" * 40}))
        assert refused.level == "error"
    finally:
        server.close(1.0)


def test_tiers_beside_a_cache_server_are_an_error() -> None:
    with pytest.raises(ConfigError, match="belong to the cache server"):
        findings({"service": "unix:///s", "tiers": [{"type": "disk", "path": "/x"}]})


def test_a_token_that_others_can_read_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "kvferry.toml"
    file.write_text(f'service = "unix://{tmp_path}/s"\ntoken = "abc"\n')
    file.chmod(0o644)
    (found,) = about("token", findings(toml_path=str(file)))
    assert "others can read it" in found.text
    file.chmod(0o600)
    assert not about("token", findings(toml_path=str(file)))


def with_peer(token: str = "", **peer: object) -> list[Finding]:
    return about("handoff", findings({"peer": peer, "token": token}))


def test_a_handoff_within_a_machine_needs_nothing() -> None:
    assert levels(with_peer()) <= {"ok", "warn"}
    assert not any("network" in finding.text for finding in with_peer())


def test_a_side_channel_that_strangers_can_reach_needs_a_token() -> None:
    (found,) = [one for one in with_peer(listen="tcp://10.0.0.7:7071") if one.level == "error"]
    assert "no token" in found.text
    assert "KVFERRY_TOKEN" in found.hint
    with_token = with_peer("x" * 32, listen="tcp://10.0.0.7:7071")
    assert "error" not in levels(with_token)
    assert any(one.level == "warn" and "in clear" in one.text for one in with_token)


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        ({"listen": "10.0.0.7"}, "peer.listen"),
        ({"listen": "unix:///run/side.sock"}, "no tcp:// address"),
        ({"listen": "tcp://0.0.0.0:7071"}, "can reach 0.0.0.0"),
        ({"advertise": "gpu-7.internal"}, "this machine only"),
        ({"transport": "carrier-pigeon"}, "no transport 'carrier-pigeon'"),
        ({"allowed_hosts": ["10.0.0.0/99"]}, "'10.0.0.0/99' is no network"),
    ],
)
def test_a_handoff_that_cannot_work_is_an_error(peer: dict[str, object], text: str) -> None:
    errors = [one for one in with_peer("x" * 32, **peer) if one.level == "error"]
    assert [text in one.text for one in errors] == [True]


def test_a_listener_on_every_address_is_fine_once_it_has_a_name() -> None:
    found = with_peer("x" * 32, listen="tcp://0.0.0.0:7071", advertise="gpu-7.internal")
    assert "error" not in levels(found)


def test_handoffs_that_are_off_are_one_line() -> None:
    (found,) = with_peer(enabled=False, listen="nonsense")
    assert (found.level, "peer.enabled is false" in found.text) == ("ok", True)
