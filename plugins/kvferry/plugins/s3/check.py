"""What ``kvferry doctor`` says about an S3 tier: whether the bucket can be used, and whether it ever empties.

Reads only. Blocks that nobody deletes stay and cost money for ever, so a bucket without a rule that
expires them is worth a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import botocore.exceptions

from kvferry.connector.errors import ConfigError
from kvferry.connector.finding import Finding
from kvferry.plugins.s3.access import Access, asking, find_access
from kvferry.plugins.s3.opening import PROBE_S, require_bucket
from kvferry.plugins.s3.options import S3Options

__all__ = ["check"]

_LIFECYCLE_HINT = 'see "Let old blocks expire" in the guide to the S3 tier'


def check(options: S3Options, name: str) -> Iterator[Finding]:
    """Yield what is worth knowing about a tier with these options. Contacts the store, writes nothing."""
    topic = f"tier {name}"
    try:
        access = find_access(options, name, PROBE_S)
        why = require_bucket(options, access, name)
    except ConfigError as error:
        yield Finding("error", topic, f"{error.path}: {error.why}", error.hint)
        return
    if why:
        hint = "kvferry starts without its blocks and takes them when it is back"
        yield Finding("warn", topic, f"{access.where} cannot be used now: {why}", hint)
        return
    text = f"{access.where} answers; region {access.region}, {access.style}-style"
    yield Finding("ok", topic, f"{text}, credentials: {access.credentials_source}")
    if access.endpoint_url.startswith("http://"):
        yield Finding(
            "warn", topic, f"{access.endpoint_url} is not encrypted", "use https outside one machine"
        )
    if not options.verify:
        yield Finding("warn", topic, "certificates are not verified", "set ca_bundle instead of verify")
    yield _lifecycle(access, topic)


def _lifecycle(access: Access, topic: str) -> Finding:
    """Tell whether some rule of the bucket expires the tier's objects."""
    bucket, prefix = access.place.bucket, access.place.prefix
    try:
        with asking(access):
            answer = access.client.get_bucket_lifecycle_configuration(Bucket=bucket)
    except botocore.exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code != "NoSuchLifecycleConfiguration":
            return Finding("ok", topic, f"whether {bucket!r} has a lifecycle rule cannot be read ({code})")
        answer = {}
    except botocore.exceptions.BotoCoreError as error:
        what = f"whether {bucket!r} has a lifecycle rule cannot be read ({type(error).__name__})"
        return Finding("ok", topic, what)
    for rule in answer.get("Rules", ()):
        days = rule.get("Expiration", {}).get("Days")
        scope = _scope(rule)
        if (
            rule.get("Status") == "Enabled"
            and days
            and scope is not None
            and prefix.startswith(scope.rstrip("/"))
        ):
            return Finding("ok", topic, f"blocks expire after {days} days, as {bucket!r} is configured")
    what = f"no lifecycle rule of {bucket!r} expires what is below {prefix!r}: blocks stay for ever"
    return Finding("warn", topic, what, _LIFECYCLE_HINT)


def _scope(rule: dict[str, Any]) -> str | None:
    """Return the prefix that a lifecycle rule is for, empty for all; None where it asks for more than that."""
    if "Prefix" in rule:
        return str(rule["Prefix"])
    chosen = rule.get("Filter", {})
    return str(chosen.get("Prefix", "")) if set(chosen) <= {"Prefix"} else None
