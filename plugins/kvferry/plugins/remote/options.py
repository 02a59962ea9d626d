"""What an operator can set for a remote tier, and the servers that it names.

Values and parsing; the files that the TLS options name are read to see whether they can be used.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvferry.connector.address import Address, parse_address
from kvferry.connector.config import TlsConfig
from kvferry.connector.dialing import client_tls
from kvferry.connector.errors import ConfigError

__all__ = ["MOST_SERVERS", "RemoteOptions", "servers_of", "tls_for"]

MOST_SERVERS = 64


class RemoteOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a tier of type ``remote``."""

    servers: Annotated[list[str], msgspec.Meta(min_length=1, max_length=MOST_SERVERS)]
    """Cache servers: ``tcp://host:port``, ``tls://host:port``, ``unix:///path``. Each holds its share of the
    blocks. Every engine has to write an address the same way; the order does not matter."""
    token: str = ""
    """Credential for all of them; empty for none."""
    tls: TlsConfig = TlsConfig()
    """For those with ``tls://``."""


def servers_of(options: RemoteOptions, name: str) -> list[Address]:
    """Return the addresses that ``options`` name, in their order.

    Args:
        options: What the operator wrote.
        name: The tier's name, for messages.

    Raises:
        ConfigError: One is no address or stands there twice, or the TLS options cannot be used.
    """
    path = f"tiers.{name}"
    addresses: list[Address] = []
    for index, text in enumerate(options.servers):
        address = parse_address(text, f"{path}.servers[{index}]")
        if address in addresses:
            raise ConfigError(f"{path}.servers[{index}]", f"{address} is given twice", "remove one")
        addresses.append(address)
    has_tls = any(address.scheme == "tls" for address in addresses)
    for address in addresses:
        client_tls(address, tls_for(address, options) if has_tls else options.tls, f"{path}.tls")
    return addresses


def tls_for(address: Address, options: RemoteOptions) -> TlsConfig:
    """Return the TLS options that concern an address: none for those without TLS."""
    return options.tls if address.scheme == "tls" else TlsConfig()
