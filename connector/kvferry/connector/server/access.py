"""Access: which credential is which tenant, and what a server refuses to start with.

The rules, in this order:

1. A token that is offered has to be right, whatever else is known of the client. It tells the tenant.
2. A certificate whose common name is a tenant's tells the tenant. With a token of another tenant it is refused.
3. On a unix socket a process of the server's own user needs nothing: it is the tenant without a name.
4. So is whoever shows a certificate of ``client_ca``, where neither a tenant's certificate nor ``server.token`` is
   configured.
5. So is whoever comes to a loopback listener, where no credential is configured at all.

Everybody else is refused. A tenant never comes from what a client says about itself.

Threading: immutable once made; any thread may ask.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvferry.connector.address import Address, parse_address
from kvferry.connector.errors import AccessRefused, ConfigError
from kvferry.connector.handshake import Grant, Peer
from kvferry.connector.schema import is_name
from kvferry.connector.server.config import ServerConfig, TenantConfig

__all__ = ["NAMELESS", "Access", "default_socket", "listen_addresses"]

SHORTEST_TOKEN = 16
"""Characters. A proof that was overheard lets anybody try tokens, as fast as they can."""
NAMELESS = ""
"""The tenant without a name."""
_RESERVED = "default"
"""What the tenant without a name is called in logs and directories."""


def default_socket(environ: Mapping[str, str]) -> str:
    """Return where a server listens that was told nothing."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    return f"unix://{runtime}/kvferry.sock" if runtime.startswith("/") else "unix:///run/kvferry/kvferry.sock"


def listen_addresses(config: ServerConfig, environ: Mapping[str, str]) -> tuple[Address, ...]:
    """Return where a server listens.

    Raises:
        ConfigError: One of the addresses is none, or is given twice.
    """
    texts = config.listen or (default_socket(environ),)
    addresses: list[Address] = []
    for index, text in enumerate(texts):
        address = parse_address(text, f"server.listen[{index}]")
        if address in addresses and address.port != 0:
            raise ConfigError(f"server.listen[{index}]", f"{text!r} is there twice")
        addresses.append(address)
    return tuple(addresses)


class Access:
    """Decides who is let in, by the rules above.

    Args:
        server: The ``[server]`` table.
        tenants: The tenants.

    Raises:
        ConfigError: The credentials are ambiguous, weak or incomplete, or the server would be open to strangers.
    """

    def __init__(self, server: ServerConfig, tenants: Sequence[TenantConfig] = ()) -> None:
        self.addresses = listen_addresses(server, os.environ)
        self._tokens = dict(_tokens(server, tenants))
        self._certificates = dict(_certificates(tenants))
        self._any_certificate = bool(server.tls.client_ca) and not self._certificates and not server.token
        self._is_open = not self._tokens and not server.tls.client_ca
        self._check(server, tenants)
        self.warnings = tuple(self._warnings())

    def admit(self, peer: Peer, proves: Callable[[str], bool] | None) -> Grant:
        """Return what a client is granted. See ``handshake.Gatekeeper``.

        Raises:
            AccessRefused: It is not let in; the message tells the log why.
        """
        certified = self._certificates.get(peer.common_name) if peer.common_name is not None else None
        if proves is not None:
            return self._by_token(peer, proves, certified)
        if certified is not None:
            return Grant(certified, "")
        if peer.uid is not None:
            if peer.uid == os.geteuid():
                return Grant(NAMELESS, "")
            raise AccessRefused(f"{peer.name} has no token, and is not the server's user {os.geteuid()}")
        if peer.common_name is not None:
            if self._any_certificate:
                return Grant(NAMELESS, "")
            raise AccessRefused(f"{peer.name} has no token, and no tenant is called {peer.common_name!r}")
        if peer.is_loopback and self._is_open:
            return Grant(NAMELESS, "")
        raise AccessRefused(f"{peer.name} has no token")

    def _by_token(self, peer: Peer, proves: Callable[[str], bool], certified: str | None) -> Grant:
        """Try all tokens, so that the time it takes does not tell which."""
        proved = [(token, tenant) for token, tenant in self._tokens.items() if proves(token)]
        if not proved:
            raise AccessRefused(f"{peer.name} has a wrong token")
        token, tenant = proved[0]
        if certified is not None and certified != tenant:
            raise AccessRefused(f"{peer.name} has a certificate and a token of two different tenants")
        return Grant(tenant, token)

    def _check(self, server: ServerConfig, tenants: Sequence[TenantConfig]) -> None:
        _check_tenants(tenants)
        has_tls = any(address.scheme == "tls" for address in self.addresses)
        if has_tls and not server.tls.certificate:
            raise ConfigError("server.tls.certificate", "a tls:// address needs the server's certificate")
        for index, tenant in enumerate(tenants):
            if tenant.certificate and not (has_tls and server.tls.client_ca):
                raise ConfigError(
                    f"tenants[{index}].certificate",
                    "nobody can show it",
                    "certificates need a tls:// address in server.listen, and server.tls.client_ca",
                )
        for index, address in enumerate(self.addresses):
            has_certificates = address.scheme == "tls" and bool(server.tls.client_ca)
            if not address.is_loopback and not self._tokens and not has_certificates:
                ways = "set KVFERRY_TOKEN, or a token for each tenant"
                if address.scheme == "tls":
                    ways += ", or server.tls.client_ca"
                raise ConfigError(
                    f"server.listen[{index}]",
                    f"refuses to start: whoever reaches {address} could use the cache",
                    ways,
                )

    def _warnings(self) -> Iterator[str]:
        """Yield what is allowed, but should be known."""
        for address in self.addresses:
            if address.scheme == "tcp" and not address.is_loopback:
                yield (
                    f"{address} is not encrypted: blocks, from which prompts can be recovered, travel in clear and "
                    "can be altered on the way; use tls:// unless the network is yours alone"
                )
            elif address.scheme != "unix" and self._is_open:
                yield f"every user of this machine may use the cache at {address}; a token would keep them out"


def _check_tenants(tenants: Sequence[TenantConfig]) -> None:
    names: set[str] = set()
    for index, tenant in enumerate(tenants):
        path = f"tenants[{index}]"
        if not is_name(tenant.name):
            raise ConfigError(
                f"{path}.name", f"found {tenant.name!r}", "use letters, digits, '_', '-' and '.', at most 64"
            )
        if tenant.name == _RESERVED:
            raise ConfigError(
                f"{path}.name",
                f"{_RESERVED!r} is what the tenant of server.token is called",
                "choose another",
            )
        if tenant.name in names:
            raise ConfigError(
                f"{path}.name", f"{tenant.name!r} is taken", "give each tenant a name of its own"
            )
        if not tenant.token and not tenant.certificate:
            raise ConfigError(
                path,
                f"nobody can be tenant {tenant.name!r}",
                "give it a token or a certificate's common name",
            )
        names.add(tenant.name)


def _tokens(server: ServerConfig, tenants: Sequence[TenantConfig]) -> Iterator[tuple[str, str]]:
    """Yield each token with its tenant."""
    given = [("server.token", server.token, NAMELESS)]
    given += [(f"tenants[{index}].token", tenant.token, tenant.name) for index, tenant in enumerate(tenants)]
    seen: set[str] = set()
    for path, token, tenant in given:
        if not token:
            continue
        if len(token) < SHORTEST_TOKEN:
            raise ConfigError(
                path,
                f"a token of {len(token)} characters can be guessed",
                f"use at least {SHORTEST_TOKEN}, as from: openssl rand -hex 32",
            )
        if token != token.strip() or not token.isprintable():
            raise ConfigError(
                path,
                "the token has white space around it, or control characters",
                "a line end from a file, maybe?",
            )
        if token in seen:
            raise ConfigError(path, "another tenant has the same token", "give each tenant one of its own")
        seen.add(token)
        yield token, tenant


def _certificates(tenants: Sequence[TenantConfig]) -> Iterator[tuple[str, str]]:
    """Yield each common name with its tenant."""
    seen: set[str] = set()
    for index, tenant in enumerate(tenants):
        if not tenant.certificate:
            continue
        path = f"tenants[{index}].certificate"
        if tenant.certificate in seen:
            raise ConfigError(path, "another tenant has the same", "give each tenant one of its own")
        seen.add(tenant.certificate)
        yield tenant.certificate, tenant.name
