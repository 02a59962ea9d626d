"""What doctor finds on a machine and in a configuration."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvferry.connector.doctor import Finding, examine
from kvferry.connector.hooks import hookimpl
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import load_settings

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
