"""The cache server's configuration: the engine's schema (what a cache is), and what only a server needs.

Values only; ``load_server_settings`` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from kvferry.connector.config import Config, Count, HostConfig, Seconds

__all__ = ["ServerConfig", "ServerSettings", "ServerTlsConfig", "TenantConfig"]


class ServerTlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS of the ``tls://`` listeners."""

    certificate: str = ""
    """PEM file of the server's certificate chain."""
    private_key: str = ""
    """PEM file of its key; in the certificate's own file when empty."""
    client_ca: str = ""
    """PEM file of the authorities that sign clients' certificates. Clients must show one then, and its common
    name tells the tenant; without tenants that name one, and without a ``token``, it may be any."""


class TenantConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may use the server, and how much of it. What is not given is as for everybody."""

    name: str
    """Blocks are shared within a tenant only."""
    token: str = ""
    """The tenant's credential, of at least 16 characters."""
    certificate: str = ""
    """Common name of the tenant's client certificate."""
    host: HostConfig | None = None
    """The arena of each of the tenant's models."""
    tiers: tuple[dict[str, object], ...] | None = None
    """Tiers below it, in place of everybody's."""
    max_models: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Models of the tenant that are served at the same time; 0 as for everybody."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``[server]`` table."""

    listen: tuple[str, ...] = ()
    """Addresses: ``unix:///path``, ``tcp://host:port``, ``tls://host:port``. Beyond this machine only ``tls://``
    with client certificates, or with a token, and ``tcp://`` with a token. None given:
    ``$XDG_RUNTIME_DIR/kvferry.sock``, or ``/run/kvferry/kvferry.sock`` where that variable is not set."""
    http: str = "127.0.0.1:9464"
    """Where ``/metrics``, ``/healthz``, ``/readyz`` and the status page are; empty for nowhere."""
    token: str = ""
    """Credential of the tenant without a name, of at least 16 characters. Prefer ``KVFERRY_TOKEN``."""
    tls: ServerTlsConfig = ServerTlsConfig()
    max_models: Count = 4
    """Models of one tenant that are served at the same time. One that no engine uses makes room for a new one;
    what it has on disk stays until as many others were served after it."""
    max_connections: Count = 1024
    """Connections at the same time; more are refused, and tried again later by the clients."""
    drain_s: Seconds = 10.0
    """Seconds that SIGTERM waits for stores under way."""
    events: str = ""
    """Where KV events are published in vLLM's form (ZeroMQ): ``tcp://127.0.0.1:5557``; empty for nowhere."""
    events_replay: str = ""
    """Where missed KV events can be asked for again; empty for nowhere."""
    events_kept: Count = 10_000
    """Batches of events that can be asked for again."""
    log_format: Literal["text", "json"] = "text"
    """``json`` writes one object a line."""
    tracing: bool = False
    """Send OpenTelemetry spans to where ``OTEL_EXPORTER_OTLP_ENDPOINT`` says; needs ``kvferry[otel]``."""


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A server's whole configuration."""

    server: ServerConfig = ServerConfig()
    tenants: tuple[TenantConfig, ...] = ()
    cache: Config = Config()
    """What each model gets: ``host``, ``tiers``, ``secret``, ``lease_s``, ``retry_failed_s``, ``plugins``."""
    origins: Mapping[str, str] = {}
    """Dotted path of each field to where its value comes from."""
