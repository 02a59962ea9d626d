"""What ``kvferry doctor`` says about a remote tier: whether each server answers, and how soon.

The servers are greeted and nothing else: no block is asked for, so none of them opens a cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from kvferry.connector.dialing import dial
from kvferry.connector.errors import ConfigError, KVFerryError
from kvferry.connector.finding import Finding
from kvferry.plugins.remote.opening import mistake_of
from kvferry.plugins.remote.options import RemoteOptions, servers_of, tls_for

__all__ = ["check_remote_tier"]

_STEP_TIMEOUT_S = 2.0
_SLOW_S = 0.05


def check_remote_tier(options: RemoteOptions, name: str) -> Iterator[Finding]:
    """Yield findings; takes a few seconds for each server at most.

    Args:
        options: What the operator wrote.
        name: The tier's name.
    """
    topic = f"tier {name}"
    try:
        addresses = servers_of(options, name)
    except ConfigError as error:
        yield Finding("error", topic, f"{error.path}: {error.why}", error.hint)
        return
    for address in addresses:
        started = time.monotonic()
        try:
            dial(address, options.token, tls_for(address, options), started + _STEP_TIMEOUT_S).close()
        except (KVFerryError, OSError) as error:
            mistake = mistake_of(name, str(address), error)
            if mistake is not None:
                yield Finding("error", topic, f"{mistake.path}: {mistake.why}", mistake.hint)
            else:
                hint = "the engine starts without it and uses it once it answers"
                yield Finding("warn", topic, f"{address} is not available: {error}", hint)
            continue
        taken_s = time.monotonic() - started
        text = f"{address} lets this machine in, within {taken_s * 1000:.0f} ms"
        hint = "a server so far away makes hits slow" if taken_s > _SLOW_S else ""
        yield Finding("warn" if hint else "ok", topic, text, hint)
