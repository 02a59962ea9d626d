"""The documentation covers what the code offers, and its examples are valid.

Each test reads the code and compares; nothing here is a list to keep in step by hand.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import msgspec
import pytest

from kvferry.connector import config, errors, frame, hooks, metrics
from kvferry.connector.cli import main
from kvferry.connector.server import config as server_config
from kvferry.connector.server.access import Access
from kvferry.connector.server.settings import load_server_settings
from kvferry.connector.service import MissReason
from kvferry.connector.settings import load_settings, split_tier, typed_options
from kvferry.connector.testing import TierTests
from kvferry.connector.tier import TierType

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(page: str) -> str:
    """A reference page with its generated parts filled in, as the site shows it."""
    text: str = load_module(DOCS / "mkdocs_hooks.py").on_page_markdown(
        (DOCS / "reference" / page).read_text()
    )
    assert "<!-- generated" not in text
    return text


def code_blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for body in re.findall(
            rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL
        ):
            yield page.relative_to(REPOSITORY).as_posix(), body


def plugin_tier_types() -> list[TierType]:
    """The tier types of the plugins that kvferry ships."""
    folder = REPOSITORY / "plugins" / "kvferry" / "plugins"
    modules = [
        importlib.import_module(f"kvferry.plugins.{path.parent.name}")
        for path in folder.glob("*/__init__.py")
    ]
    found = [tier_type for module in modules for tier_type in getattr(module, "kvferry_tier_types", list)()]
    assert found
    return found


HOOKS = [name for name, value in vars(hooks).items() if hasattr(value, f"{hooks.PROJECT}_spec")]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_heading_and_its_signature(hook: str) -> None:
    assert f"\n### {hook}\n" in (DOCS / "reference" / "hooks.md").read_text()
    parameters = ", ".join(inspect.signature(getattr(hooks, hook)).parameters)
    page = built("hooks.md")
    signature = re.search(rf"def {hook}\((.*?)\)", page)
    assert signature is not None
    assert re.sub(r": \w+(\[\w+\])?", "", signature[1]) == parameters


def test_there_are_hooks() -> None:
    assert len(HOOKS) >= 5


@pytest.mark.parametrize(
    ("struct", "table"), [
        (config.Config, ""), (config.HostConfig, "host"), (config.ExplainConfig, "explain"), (config.TlsConfig, "tls"),
        (config.PeerConfig, "peer"), (config.CudaConfig, "cuda"), (config.TrtllmConfig, "trtllm"),
        (config.TierConfig, "tiers"), (server_config.ServerConfig, "server"),
        (server_config.ServerTlsConfig, "server.tls"), (server_config.TenantConfig, "tenants"),
        *((tier_type.options, f"The {tier_type.name} tier") for tier_type in plugin_tier_types()),
    ]
)  # fmt: skip
def test_every_configuration_key_is_documented(struct: type[msgspec.Struct], table: str) -> None:
    page = built("configuration.md")
    section = page.partition(f"\n## {table}\n")[2].partition("\n## ")[0] if table else page
    for field in msgspec.structs.fields(struct):
        if isinstance(field.default, msgspec.Struct):
            assert f"\n## {'.'.join(filter(None, (table, field.name)))}\n" in page
        else:
            assert f"| `{field.name}` |" in section


@pytest.mark.parametrize("tier_type", plugin_tier_types(), ids=lambda tier_type: tier_type.name)
def test_every_tier_type_has_a_section(tier_type: TierType) -> None:
    assert f"\n## The {tier_type.name} tier\n" in (DOCS / "reference" / "configuration.md").read_text()


def test_every_transport_is_described() -> None:
    page = (DOCS / "how-to" / "hand-prefill-to-decode.md").read_text()
    offered = importlib.import_module("kvferry.plugins.peer").kvferry_transports()
    assert [transport.name for transport in offered if f"| `{transport.name}` |" not in page] == []


@pytest.mark.parametrize("metric", metrics.METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_documented(metric: metrics.Metric) -> None:
    assert f"| `{metric.name}` |" in built("metrics.md")


@pytest.mark.parametrize("name", [name for name in errors.__all__ if inspect.isclass(getattr(errors, name))])
def test_every_error_is_documented(name: str) -> None:
    assert (
        f"| [`{name}`](#kvferry.connector.errors.{name}) |" in (DOCS / "reference" / "errors.md").read_text()
    )
    assert getattr(errors, name).__doc__


@pytest.mark.parametrize("reason", errors.HandoffFailed.REASONS)
def test_every_reason_of_a_failed_handoff_says_what_to_do(reason: str) -> None:
    assert f"| `{reason}` |" in (DOCS / "reference" / "errors.md").read_text()


@pytest.mark.parametrize("reason", [reason.value for reason in MissReason if reason is not MissReason.NONE])
def test_every_reason_for_a_miss_says_what_to_do(reason: str) -> None:
    assert f"| `{reason}` |" in (DOCS / "how-to" / "debug-a-miss.md").read_text()


def test_every_reason_for_refusing_a_frame_is_in_the_format() -> None:
    page = (DOCS / "reference" / "frame-format.md").read_text()
    reasons = set(re.findall(r'^ +\("(\w+)", ', inspect.getsource(frame.FrameSeal.verify), re.MULTILINE))
    assert {"magic", "key", "fingerprint", "length"} <= reasons
    assert [reason for reason in reasons | {"checksum", "mac"} if f"`{reason}`" not in page] == []
    assert f"{frame.HEADER_BYTES} bytes of header" in page
    assert f"This page describes version {frame.FRAME_VERSION}." in page


def test_every_command_in_the_docs_exists() -> None:
    context = click.Context(main)
    mentioned = {name for page in PAGES for name in re.findall(r"`kvferry ([a-z]+)", page.read_text())}
    mentioned |= {
        name
        for _, body in code_blocks("bash")
        for name in re.findall(r"^kvferry ([a-z]+)", body, re.MULTILINE)
    }
    assert {"doctor", "explain", "plugins", "bench", "demo"} <= mentioned
    assert mentioned - set(main.list_commands(context)) == set()


def test_every_file_the_design_names_exists() -> None:
    page = (DOCS / "explanation" / "design.md").read_text()
    rows = [
        re.findall(r"`([^`]+)`", row) for row in re.findall(r"^\| [^|]*\? \| (.*) \|$", page, re.MULTILINE)
    ]
    assert len(rows) > 10
    paths = [
        REPOSITORY / (name if "/" in name else Path(first).parent / name)
        for first, *more in rows
        for name in (first, *more)
    ]
    assert [path for path in paths if not path.exists()] == []


def test_every_decision_is_listed() -> None:
    listed = (DOCS / "adr" / "index.md").read_text()
    pages = sorted((DOCS / "adr").glob("0*.md"))
    assert pages
    assert [page.name for page in pages if f"]({page.name})" not in listed] == []


def is_a_servers(toml: str) -> bool:
    return re.search(r"^\[(server|\[tenants)\b", toml, re.MULTILINE) is not None


def configurations() -> Iterator[tuple[str, dict[str, object]]]:
    """Every configuration in the documentation: connector flags, JSON fragments, TOML files."""
    for page, body in code_blocks("bash"):
        for flag in re.findall(r"--kv-transfer-config '(.*?)'", body, flags=re.DOTALL):
            yield page, json.loads(flag)["kv_connector_extra_config"]
    for page, body in code_blocks("json"):
        yield page, json.loads(body)
    for page, body in code_blocks("toml"):
        if "[project" not in body and not is_a_servers(body):
            yield page, tomllib.loads(body)


@pytest.mark.parametrize(
    ("page", "values"), list(configurations()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_configuration_in_the_docs_is_valid(page: str, values: dict[str, object]) -> None:
    known = {tier_type.name: tier_type for tier_type in plugin_tier_types()}
    for tier in load_settings(values).config.tiers:
        own, options = split_tier(tier)
        if own.type in known:
            typed_options(known[own.type], options, "tier")
        else:
            assert page in ("docs/how-to/write-a-tier-plugin.md", "docs/examples/kvferry-sqlite/README.md")


@pytest.mark.parametrize(
    ("page", "body"),
    [(page, body) for page, body in code_blocks("toml") if is_a_servers(body)],
    ids=lambda value: value if value.endswith(".md") else "",
)
def test_every_servers_file_in_the_docs_is_valid(page: str, body: str, tmp_path: Path) -> None:
    known = {tier_type.name: tier_type for tier_type in plugin_tier_types()}
    path = tmp_path / "kvferry.toml"
    path.write_text(body)
    settings = load_server_settings(str(path), {})
    assert Access(settings.server, settings.tenants).addresses
    for tier in settings.cache.tiers:
        own, options = split_tier(tier)
        typed_options(known[own.type], options, "tier")


def test_every_flag_is_complete() -> None:
    flags = [
        json.loads(flag)
        for _, body in code_blocks("bash")
        for flag in re.findall(r"--kv-transfer-config '(.*?)'", body, flags=re.DOTALL)
    ]
    assert len(flags) >= 2
    for flag in flags:
        assert flag["kv_connector"] == "KVFerryConnector"
        assert flag["kv_connector_module_path"] == "kvferry.engines.vllm"
        assert flag["kv_role"] in ("kv_both", "kv_producer", "kv_consumer")
        assert flag["kv_load_failure_policy"] == "recompute"


@pytest.mark.parametrize(
    ("page", "body"), list(code_blocks("python")), ids=lambda value: value if value.endswith(".md") else ""
)
def test_every_python_example_compiles(page: str, body: str) -> None:
    compile(body, page, "exec")


@pytest.mark.parametrize("check", [name for name in dir(TierTests) if name.startswith("test_")])
def test_every_check_of_the_kit_is_documented(check: str) -> None:
    assert f"| `{check.removeprefix('test_')}` | " in built("testing.md")
