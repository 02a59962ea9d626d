"""Where an engine of TensorRT-LLM finds its configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kvferry.connector.config import Config
from kvferry.connector.errors import ConfigError
from kvferry.engines.trtllm.options import load_config, load_options


def engine(server_url: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(kv_connector_config=SimpleNamespace(server_url=server_url))


def write(folder: Path, text: str, name: str = "kvferry.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("args", [SimpleNamespace(), SimpleNamespace(kv_connector_config=None), engine()])
def test_without_any_source_everything_is_a_default(args: SimpleNamespace) -> None:
    assert load_options(args, {}).config == Config()


def test_the_file_is_the_one_that_the_forwarded_variable_names(tmp_path: Path) -> None:
    ours = write(tmp_path, 'tenant = "plain"\n', "a.toml")
    forwarded = write(tmp_path, 'tenant = "forwarded"\n[trtllm]\nquery_wait_s = 0.5\n', "b.toml")
    environ = {"KVFERRY_CONFIG": ours}
    assert load_options(engine(), environ).config.tenant == "plain"
    settings = load_options(engine(), {**environ, "TLLM_KVFERRY_CONFIG": forwarded})
    assert (settings.config.tenant, settings.config.trtllm.query_wait_s) == ("forwarded", 0.5)
    assert settings.origins["tenant"] == forwarded


def test_forwarded_variables_come_before_others() -> None:
    environ = {
        "KVFERRY_TENANT": "a",
        "TLLM_KVFERRY_TENANT": "b",
        "KVFERRY_MODEL": "m",
        "TLLM_OTHER": "x",
        "TRTLLM_KVFERRY_TENANT": "c",
    }
    config = load_options(engine(), environ).config
    assert (config.tenant, config.model) == ("b", "m")


def test_the_engines_address_is_the_cache_servers_and_comes_first(tmp_path: Path) -> None:
    environ = {"TLLM_KVFERRY_SERVICE": "unix:///run/other.sock"}
    settings = load_options(engine("unix:///run/kvferry.sock"), environ)
    assert settings.config.service == "unix:///run/kvferry.sock"
    assert settings.origins["service"] == "kv_connector_config.server_url"
    assert load_options(engine(), environ).config.service == "unix:///run/other.sock"


@pytest.mark.parametrize(
    ("args", "environ", "message"),
    [
        (engine("nonsense"), {}, "service"),
        (engine("tcp://host:1"), {"TLLM_KVFERRY_TIERS": '[{"type": "disk", "path": "/kv"}]'}, "tiers"),
        (engine(), {"TLLM_KVFERRY_TENNANT": "x"}, "KVFERRY_TENANT"),
        (engine(), {"TLLM_KVFERRY_CONFIG": "/nowhere.toml"}, "/nowhere.toml"),
        (engine(), {"TLLM_KVFERRY_TRTLLM__QUERY_WAIT_S": "soon"}, "KVFERRY_TRTLLM__QUERY_WAIT_S"),
    ],
)
def test_a_mistake_is_refused(args: SimpleNamespace, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_options(args, environ)


def test_a_process_reads_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLLM_KVFERRY_TENANT", "ours")
    assert load_config(engine()).tenant == "ours"
