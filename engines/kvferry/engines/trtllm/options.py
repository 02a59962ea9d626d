"""Where an engine of TensorRT-LLM finds kvferry's configuration.

The engine's own configuration has no place for a connector's, except for one address
(``kv_connector_config.server_url``), and of a launcher's environment it hands only variables of its own to the ranks
that it starts. So the configuration is a TOML file that ``TLLM_KVFERRY_CONFIG`` names, and every ``KVFERRY_`` variable
may be written with ``TLLM_`` in front.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from kvferry.connector.config import Config
from kvferry.connector.settings import Settings, load_settings

__all__ = ["load_config", "load_options"]

_FORWARDED = "TLLM_"
"""In front of variables that TensorRT-LLM hands to its ranks."""
_OURS = "KVFERRY_"
_ADDRESS = "kv_connector_config.server_url"


def load_config(llm_args: object) -> Config:
    """Return the effective configuration of this process's engine.

    Args:
        llm_args: The engine's arguments.

    Raises:
        ConfigError: See ``load_settings``.
    """
    return load_options(llm_args, os.environ).config


def load_options(llm_args: object, environ: Mapping[str, str]) -> Settings:
    """Return the effective configuration and where it is from.

    Args:
        llm_args: The engine's arguments. The address in them, if any, is the cache server's, and comes first.
        environ: Environment variables; ``TLLM_KVFERRY_X`` comes before ``KVFERRY_X``.

    Raises:
        ConfigError: See ``load_settings``.
    """
    address = getattr(getattr(llm_args, "kv_connector_config", None), "server_url", None)
    extra = {"service": str(address)} if address else {}
    return load_settings(extra, environ=_variables(environ), extra_name=_ADDRESS)


def _variables(environ: Mapping[str, str]) -> Mapping[str, str]:
    prefix = _FORWARDED + _OURS
    forwarded = {
        name.removeprefix(_FORWARDED): text for name, text in environ.items() if name.startswith(prefix)
    }
    return {**environ, **forwarded}
