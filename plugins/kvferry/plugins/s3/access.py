"""Access to a bucket: boto3 finds credentials, region and endpoint, obstore carries the data with them.

boto3 knows every place where an AWS tool looks; obstore moves bytes at less than half of boto3's CPU time
(docs/adr/0011). Both are told the same, explicitly, so that no variable of the environment can make the
two talk to different stores.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import boto3
import botocore.config
import botocore.exceptions
import msgspec
import urllib3
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import S3Store

from kvferry.connector.errors import ConfigError
from kvferry.plugins.s3.options import Place, S3Options, addressing_style, place_of

if TYPE_CHECKING:
    from obstore.store import ClientConfig

__all__ = ["Access", "asking", "find_access", "open_store"]

_CONNECT_S = 3.0
_CREDENTIALS_TTL = timedelta(minutes=10)
"""How long obstore may use credentials; it asks boto3 again five minutes before that. boto3 renews them when
they have 10 to 15 minutes left, so those in use are never older than they may be."""
_RETRIES = 2
_FIRST_BACKOFF, _LONGEST_BACKOFF = timedelta(milliseconds=50), timedelta(milliseconds=200)


class Access(msgspec.Struct, frozen=True):
    """A bucket and the way to it."""

    place: Place
    client: Any
    """boto3's S3 client, for questions that are not about blocks."""
    credentials: Boto3CredentialProvider
    endpoint_url: str
    region: str
    style: str
    """``path`` or ``virtual``."""
    credentials_source: str
    """Where boto3 found the credentials, in its words."""
    ca_bundle: str
    verify: bool

    @property
    def where(self) -> str:
        """Endpoint and bucket, for messages."""
        return f"{self.endpoint_url}/{self.place.bucket}"


def find_access(options: S3Options, name: str, deadline_s: float) -> Access:
    """Find credentials, region and endpoint. May ask an instance's metadata service, but not the store.

    Args:
        options: The operator's options.
        name: The tier's name.
        deadline_s: Bound of a request to the store, in seconds.

    Raises:
        ConfigError: Something is missing or contradicts itself; names the field.
    """
    place = place_of(options, name)
    path = f"tiers.{name}"
    if bool(options.access_key_id) != bool(options.secret_access_key):
        missing = "secret_access_key" if options.access_key_id else "access_key_id"
        raise ConfigError(f"{path}.{missing}", "is missing, half a pair of credentials", "give both or none")
    if "@" in urlsplit(options.endpoint_url).netloc:
        raise ConfigError(
            f"{path}.endpoint_url", "holds a user or a password", "credentials have options of their own"
        )
    session = _session(options, path)
    credentials = _credentials(session, path)
    ca_bundle = _ca_bundle(options, session, path)
    client = _client(options, session, path, place, ca_bundle, deadline_s)
    endpoint_url = str(client.meta.endpoint_url)
    return Access(
        place=place,
        client=client,
        credentials=credentials,
        endpoint_url=endpoint_url,
        region=str(client.meta.region_name or "us-east-1"),
        style=addressing_style(options, place.bucket, endpoint_url),
        credentials_source=str(getattr(credentials.credentials, "method", "") or "given"),
        ca_bundle=ca_bundle,
        verify=options.verify,
    )


def open_store(access: Access, *, deadline_s: float, max_in_flight: int) -> S3Store:
    """Return the data path to the bucket. Contacts nothing."""
    parts = urlsplit(access.endpoint_url)
    endpoint = access.endpoint_url.rstrip("/")
    if access.style == "virtual":
        endpoint = urlunsplit(parts._replace(netloc=f"{access.place.bucket}.{parts.netloc}")).rstrip("/")
    client_options: ClientConfig = {
        "allow_http": parts.scheme == "http",
        "allow_invalid_certificates": not access.verify,
        "connect_timeout": timedelta(seconds=min(_CONNECT_S, deadline_s)),
        "timeout": timedelta(seconds=deadline_s),
        "pool_max_idle_per_host": str(max_in_flight),
        "user_agent": "kvferry",
    }
    if access.ca_bundle:
        client_options["root_certificate"] = Path(access.ca_bundle).read_bytes()
    return S3Store(
        access.place.bucket,
        config={
            "endpoint": endpoint,
            "aws_endpoint_url_s3": endpoint,
            "region": access.region,
            "virtual_hosted_style_request": access.style == "virtual",
            "unsigned_payload": True,
            "skip_signature": False,
            "disable_bulk_delete": True,
        },
        client_options=client_options,
        retry_config={
            "max_retries": _RETRIES,
            "retry_timeout": timedelta(seconds=deadline_s / 2),
            "backoff": {"init_backoff": _FIRST_BACKOFF, "max_backoff": _LONGEST_BACKOFF, "base": 2},
        },
        credential_provider=access.credentials,
    )


@contextlib.contextmanager
def asking(access: Access) -> Iterator[None]:
    """Around requests of boto3's client: a certificate that is not to be verified is no news.

    Changes the process's warning filters meanwhile, so it is for opening and for ``kvferry doctor``.
    """
    with warnings.catch_warnings():
        if not access.verify:
            warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
        yield


def _session(options: S3Options, path: str) -> boto3.Session:
    try:
        return boto3.Session(
            profile_name=options.profile or None,
            region_name=options.region or None,
            aws_access_key_id=options.access_key_id or None,
            aws_secret_access_key=options.secret_access_key or None,
        )
    except botocore.exceptions.ProfileNotFound as error:
        raise ConfigError(f"{path}.profile", str(error), "`aws configure list-profiles` lists them") from None
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise ConfigError(f"{path}.profile", f"the AWS configuration cannot be used: {error}") from None


def _credentials(session: boto3.Session, path: str) -> Boto3CredentialProvider:
    try:
        return Boto3CredentialProvider(session, ttl=_CREDENTIALS_TTL)
    except botocore.exceptions.BotoCoreError as error:
        raise ConfigError(f"{path}.profile", f"no credentials can be had: {error}") from None
    except ValueError:
        raise ConfigError(
            f"{path}.access_key_id",
            "no credentials were found: not here, in the environment, in ~/.aws, or from this machine's role",
            "`aws sts get-caller-identity` shows what AWS tools find",
        ) from None


def _ca_bundle(options: S3Options, session: boto3.Session, path: str) -> str:
    """Return the file with the CA certificates, the option's or the AWS configuration's; may be empty."""
    found = options.ca_bundle or session._session.get_config_variable("ca_bundle") or ""
    chosen = os.path.expanduser(str(found))
    if chosen:
        try:
            is_pem = "BEGIN CERTIFICATE" in Path(chosen).read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise ConfigError(f"{path}.ca_bundle", f"{chosen} cannot be read: {error.strerror}") from None
        if not is_pem:
            raise ConfigError(
                f"{path}.ca_bundle", f"{chosen} holds no certificate", "give a file in PEM form"
            )
    return chosen


def _client(
    options: S3Options, session: boto3.Session, path: str, place: Place, ca_bundle: str, deadline_s: float
) -> Any:
    """Return boto3's client. Checksums only where the operation needs one: other stores know no more."""
    verify = (ca_bundle or True) if options.verify else False

    def client(style: str) -> Any:
        config = botocore.config.Config(
            connect_timeout=min(_CONNECT_S, deadline_s),
            read_timeout=deadline_s,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": style},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        endpoint_url = options.endpoint_url or None
        return session.client("s3", endpoint_url=endpoint_url, verify=verify, config=config)

    try:
        made = client("auto" if options.addressing == "auto" else options.addressing)
        style = addressing_style(options, place.bucket, str(made.meta.endpoint_url))
        return made if options.addressing != "auto" else client(style)
    except ValueError as error:
        raise ConfigError(
            f"{path}.endpoint_url", str(error), 'write it like "https://minio.example:9000"'
        ) from None
    except botocore.exceptions.BotoCoreError as error:
        raise ConfigError(f"{path}.region", f"the AWS configuration cannot be used: {error}") from None
