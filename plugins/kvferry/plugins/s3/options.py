"""What an operator can set for an S3 tier, and where in the bucket a block lies because of it.

Values and names only; nothing is contacted here.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from kvferry.connector.errors import ConfigError
from kvferry.connector.keys import BlockKey

__all__ = ["THREADS", "Place", "S3Options", "addressing_style", "place_of"]

THREADS = 8
"""Threads of a tier, unless the operator says otherwise: a store is far away and wide, and takes many
requests at once to fill the way there. More would have stores wait for one another on a slow line, until
their deadline has passed."""

_URL_HINT = 'write it like "s3://bucket/prefix"'
_PLAIN_SEGMENT = re.compile(r"[A-Za-z0-9!_.*'()=-]+", re.ASCII)
_HOST_STYLE_BUCKET = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", re.ASCII)


class S3Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a tier of type ``s3``."""

    bucket: str = ""
    """Bucket that holds the blocks. It must exist. Required, unless ``url`` is given."""
    prefix: str = "kvferry"
    """What the names of all objects start with."""
    url: str = ""
    """``s3://bucket/prefix``, instead of ``bucket`` and ``prefix``."""
    region: str = ""
    """The bucket's region; as the AWS configuration says when empty."""
    endpoint_url: str = ""
    """Where the store answers, such as ``https://minio.example:9000``; as the AWS configuration says when
    empty, and at last AWS itself."""
    profile: str = ""
    """Profile of ``~/.aws`` to use."""
    access_key_id: str = ""
    """Credentials, with ``secret_access_key``. When empty they are searched where every AWS tool does:
    environment, ``~/.aws``, container, instance, role. Prefer that."""
    secret_access_key: str = ""
    """Belongs to ``access_key_id``."""
    addressing: Literal["auto", "path", "virtual"] = "auto"
    """``path`` names the bucket in the path, ``virtual`` in the host name; ``auto`` is ``virtual`` for AWS
    and ``path`` for any other endpoint."""
    ca_bundle: str = ""
    """File with CA certificates (PEM) to trust besides the system's."""
    verify: bool = True
    """False accepts any certificate. Whoever sits in between can then read every block."""
    max_in_flight: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    """Most requests at once; an eighth of them is never taken by stores."""


class Place(msgspec.Struct, frozen=True):
    """Where the blocks of one model lie."""

    bucket: str
    prefix: str
    """Without slashes at its ends; may be empty."""

    def name(self, fingerprint: bytes, key: BlockKey) -> str:
        """Return the name of a block's object.

        The level of two hex digits spreads the load: a store such as AWS counts requests per prefix.
        """
        digits = key.hex()
        parts = (self.prefix, fingerprint[:4].hex(), digits[:2], digits)
        return "/".join(part for part in parts if part)

    def probe_name(self) -> str:
        """Return the name of the object that is written and deleted to see whether that is allowed."""
        return f"{self.prefix}/kvferry-probe" if self.prefix else "kvferry-probe"


def place_of(options: S3Options, name: str) -> Place:
    """Return bucket and prefix, whichever way they were given.

    Raises:
        ConfigError: There is no bucket, there are two, or a name cannot be used.
    """
    path = f"tiers.{name}"
    bucket, prefix, field = options.bucket, options.prefix, "prefix"
    if options.url:
        parts = urlsplit(options.url)
        if options.bucket:
            raise ConfigError(f"{path}.bucket", "is given twice, here and in url", "remove one")
        if parts.scheme != "s3" or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{path}.url", "is not the address of a bucket", _URL_HINT)
        if parts.netloc != parts.hostname:
            raise ConfigError(f"{path}.url", "holds more than a bucket and a prefix", _URL_HINT)
        bucket, prefix, field = parts.netloc, parts.path.strip("/") or options.prefix, "url"
    if not bucket:
        raise ConfigError(f"{path}.bucket", "is required and was not given", f"or url, {_URL_HINT}")
    prefix = prefix.strip("/")
    for segment in prefix.split("/") if prefix else ():
        if segment in (".", "..") or not _PLAIN_SEGMENT.fullmatch(segment):
            raise ConfigError(
                f"{path}.{field}",
                f"{segment!r} cannot be part of a prefix",
                "use letters, digits and any of ! - _ . * ' ( ) =, between single slashes",
            )
    return Place(bucket, prefix)


def addressing_style(options: S3Options, bucket: str, endpoint_url: str) -> Literal["path", "virtual"]:
    """Return how the bucket is named in requests to ``endpoint_url``."""
    if options.addressing != "auto":
        return options.addressing
    host = urlsplit(endpoint_url).hostname or ""
    is_aws = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
    return "virtual" if is_aws and _HOST_STYLE_BUCKET.fullmatch(bucket) else "path"
