"""TLS contexts of both ends of a connection to a cache server, made from their configuration.

TLS 1.3 or nothing: both ends are ours. A client always verifies the server; a server verifies clients where it
was given an authority for that.

Functions without state; they read the files that the configuration names.
"""

from __future__ import annotations

import ssl

from kvferry.connector.config import TlsConfig
from kvferry.connector.errors import ConfigError

__all__ = ["client_context", "server_context"]


def client_context(tls: TlsConfig, path: str) -> ssl.SSLContext:
    """Return the context of a client.

    Args:
        tls: Its configuration.
        path: Where that stands, for messages.

    Raises:
        ConfigError: The options are incomplete, or a file cannot be used.
    """
    if tls.private_key and not tls.certificate:
        raise ConfigError(f"{path}.private_key", "there is no certificate to it", f"give {path}.certificate")
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=tls.ca or None)
    except OSError as error:
        raise ConfigError(f"{path}.ca", f"cannot use {tls.ca}: {_reason(error)}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if tls.certificate:
        _load_certificate(context, tls.certificate, tls.private_key, path)
    return context


def server_context(certificate: str, private_key: str, client_ca: str, path: str) -> ssl.SSLContext:
    """Return the context of a server.

    Args:
        certificate: PEM file of its certificate chain.
        private_key: PEM file of its key; in the certificate's own file when empty.
        client_ca: PEM file of the authorities of clients' certificates; no client is asked for one when empty.
        path: Where these stand in the configuration, for messages.

    Raises:
        ConfigError: A file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load_certificate(context, certificate, private_key, path)
    if client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(client_ca)
        except OSError as error:
            raise ConfigError(f"{path}.client_ca", f"cannot use {client_ca}: {_reason(error)}") from error
    return context


def _load_certificate(context: ssl.SSLContext, certificate: str, private_key: str, path: str) -> None:
    try:
        context.load_cert_chain(certificate, private_key or None, password=_no_password)
    except OSError as error:
        with_key = f" with the key {private_key}" if private_key else ""
        raise ConfigError(
            f"{path}.certificate",
            f"cannot use {certificate}{with_key}: {_reason(error)}",
            "PEM files that this process may read; the key must not be encrypted",
        ) from error


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "it is no PEM file of this kind"
    return error.strerror or str(error)


def _no_password() -> str:
    """Called for an encrypted key, for which OpenSSL would otherwise ask on the terminal."""
    return ""
