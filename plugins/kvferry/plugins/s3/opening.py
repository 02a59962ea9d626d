"""Opening an S3 tier: mistakes of the operator are found now, and told once and clearly.

The bucket is listed (one name), then a small object is written and deleted the way blocks will be. What
only the operator can put right is a ``ConfigError`` that names the option. A store that does not answer is
a warning: the tier opens, its calls fail until the store is back, and then hits resume by themselves.
"""

from __future__ import annotations

import socket
import ssl
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions

from kvferry.connector.errors import ConfigError
from kvferry.connector.tier import TierContext
from kvferry.plugins.s3.access import Access, asking, find_access, open_store
from kvferry.plugins.s3.options import S3Options
from kvferry.plugins.s3.tier import S3Tier
from kvferry.plugins.s3.trouble import FORBIDDEN_CODES, REGION_CODES, Trouble

__all__ = ["PROBE_S", "open_s3_tier", "require_bucket"]

PROBE_S = 5.0
"""Bound of each request while a tier is opened."""

_PERMISSIONS = "allow s3:ListBucket on the bucket, s3:GetObject, s3:PutObject and s3:DeleteObject in it"
_KEY_CODES = frozenset({"InvalidAccessKeyId", "InvalidClientTokenId", "InvalidToken", "ExpiredToken", "401"})
_SECRET_CODES = frozenset({"SignatureDoesNotMatch"})
_UNREACHABLE = {
    "ConnectTimeoutError": "it cannot be reached in time",
    "ConnectionClosedError": "it closes the connection",
    "EndpointConnectionError": "it cannot be reached",
    "ProxyConnectionError": "the proxy cannot be reached",
    "ReadTimeoutError": "it does not answer in time",
}
_TLS_TO_HTTP = (
    "WRONG_VERSION_NUMBER",
    "wrong version number",
    "record layer failure",
    "packet length too long",
)


def open_s3_tier(options: S3Options, context: TierContext) -> S3Tier:
    """Open the tier. Contacts the store, for a few seconds at most.

    Raises:
        ConfigError: Bucket, credentials, permissions, region, endpoint or certificates are wrong.
    """
    access = find_access(options, context.name, min(PROBE_S, context.deadline_s))
    store = open_store(access, deadline_s=context.deadline_s, max_in_flight=options.max_in_flight)
    why = require_bucket(options, access, context.name)
    tier = S3Tier(context, store, access.place, access.where, options.max_in_flight)
    trouble = None if why else tier.probe(PROBE_S)
    if trouble is not None:
        try:
            _raise_for_writing(options, access, context.name, trouble)
        except ConfigError:
            tier.close()
            raise
        why = trouble.why
    if why:
        context.logger.warning(
            "tier %r: %s cannot be used now: %s; blocks are missed until it can",
            context.name,
            access.where,
            why,
        )
    else:
        context.logger.info(
            "tier %r: %s opened, region %s, %s-style, credentials: %s",
            context.name,
            access.where,
            access.region,
            access.style,
            access.credentials_source,
        )
    return tier


def require_bucket(options: S3Options, access: Access, name: str) -> str:
    """List the bucket; return why the store does not answer now, empty when it does.

    Raises:
        ConfigError: The answer shows a mistake of the configuration; names the option.
    """
    try:
        with asking(access):
            access.client.list_objects_v2(Bucket=access.place.bucket, Prefix=access.place.prefix, MaxKeys=1)
    except botocore.exceptions.ClientError as error:
        code, status = _told(error)
        if status == 400 and _speaks_tls(access.endpoint_url):
            raise _wrong_scheme(access, name, "http") from None
        _raise_if_mistaken(options, access, name, code, status)
        return f"it answered {code or status}"
    except botocore.exceptions.SSLError as error:
        raise _tls_error(options, access, name, str(error)) from None
    except botocore.exceptions.ParamValidationError:
        raise ConfigError(
            f"tiers.{name}.bucket", f"{access.place.bucket!r} cannot be the name of a bucket"
        ) from None
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.CredentialRetrievalError) as error:
        raise ConfigError(f"tiers.{name}.{_credential_field(options)}", str(error)) from None
    except botocore.exceptions.BotoCoreError as error:
        if isinstance(error, botocore.exceptions.ConnectionClosedError) and _speaks_tls(access.endpoint_url):
            raise _wrong_scheme(access, name, "http") from None
        return _UNREACHABLE.get(type(error).__name__, type(error).__name__)
    return ""


def _raise_if_mistaken(options: S3Options, access: Access, name: str, code: str, status: int) -> None:
    """Raise the ConfigError that an S3 error code stands for, if it is the operator's to put right.

    Args:
        options: The operator's options.
        access: Where the request went.
        name: The tier's name.
        code: The S3 error code, or the HTTP status where there was none.
        status: The HTTP status.
    """
    path, bucket = f"tiers.{name}", access.place.bucket
    credentials = f"{path}.{_credential_field(options)}"
    if code == "NoSuchBucket" or (status == 404 and code in ("404", "NotFound")):
        raise ConfigError(
            f"{path}.bucket", f"there is no bucket {bucket!r} at {access.endpoint_url}", "create it"
        )
    if code == "InvalidBucketName":
        raise ConfigError(f"{path}.bucket", f"{bucket!r} cannot be the name of a bucket")
    if code in _KEY_CODES:
        hint = f"credentials came from: {access.credentials_source}"
        raise ConfigError(credentials, f"the store does not know these credentials ({code})", hint)
    if code in _SECRET_CODES:
        field = "secret_access_key" if options.access_key_id else _credential_field(options)
        why = f"the secret does not belong to the access key ({code})"
        raise ConfigError(f"{path}.{field}", why, f"credentials came from: {access.credentials_source}")
    if code in REGION_CODES or status == 301:
        hint = f"it was asked for in {access.region!r}; set the bucket's own region"
        raise ConfigError(f"{path}.region", f"bucket {bucket!r} is in another region ({code})", hint)
    if code in FORBIDDEN_CODES or status in (401, 403):
        raise ConfigError(f"{path}.bucket", f"access to {bucket!r} is denied ({code})", _PERMISSIONS)


def _raise_for_writing(options: S3Options, access: Access, name: str, trouble: Trouble) -> None:
    if trouble.status in (401, 403):
        raise ConfigError(
            f"tiers.{name}.bucket",
            f"{access.place.bucket!r} may be listed but not written ({trouble.code or trouble.status})",
            _PERMISSIONS,
        )
    _raise_if_mistaken(options, access, name, trouble.code, trouble.status)


def _told(error: Any) -> tuple[str, int]:
    """Return error code and HTTP status of a boto3 error."""
    answer = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return code, status


def _credential_field(options: S3Options) -> str:
    return "profile" if options.profile and not options.access_key_id else "access_key_id"


def _tls_error(options: S3Options, access: Access, name: str, text: str) -> ConfigError:
    path = f"tiers.{name}"
    if any(sign in text for sign in _TLS_TO_HTTP):
        return _wrong_scheme(access, name, "https")
    why = f"the certificate of {access.endpoint_url} is not trusted"
    if "doesn't match" in text or "mismatch" in text.lower():
        return ConfigError(f"{path}.endpoint_url", f"{why}: it was issued for another name")
    hint = (
        "check that this file holds the CA that signed it" if options.ca_bundle else "name the CA's file here"
    )
    return ConfigError(f"{path}.ca_bundle", why, hint)


def _wrong_scheme(access: Access, name: str, scheme: str) -> ConfigError:
    field = f"tiers.{name}.endpoint_url"
    if scheme == "http":
        return ConfigError(
            field, f"{access.endpoint_url} expects TLS", 'write "https://" instead of "http://"'
        )
    hint = 'write "http://" instead of "https://", if the network is trusted'
    return ConfigError(field, f"{access.endpoint_url} does not speak TLS", hint)


def _speaks_tls(endpoint_url: str) -> bool:
    """Tell whether a server that closed a connection without TLS would have liked one with it."""
    parts = urlsplit(endpoint_url)
    if parts.scheme != "http" or not parts.hostname:
        return False
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((parts.hostname, parts.port or 80), PROBE_S) as connection:
            context.wrap_socket(connection, server_hostname=parts.hostname).close()
    except OSError:
        return False
    return True
