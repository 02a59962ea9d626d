"""What ``kvferry doctor`` says about NIXL: whether it is there, and whether it starts."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

from kvferry.connector.errors import HandoffFailed
from kvferry.connector.finding import Finding
from kvferry.plugins.peer.agent import Agent, is_installed

__all__ = ["findings"]

TOPIC = "peer nixl"
FALLBACK = "handoffs between engines use the transport `socket`"


def findings() -> Sequence[Finding]:
    """Start and end an agent, where nixl is installed; takes up to a second."""
    if not is_installed():
        return [
            Finding("ok", TOPIC, f"nixl is not installed; {FALLBACK}", "pip install 'kvferry[nixl]' for NIXL")
        ]
    version = importlib.metadata.version("nixl")
    try:
        agent = Agent("kvferry-doctor", is_local=True, has_thread=False)
    except HandoffFailed as error:
        return [Finding("warn", TOPIC, f"nixl {version} does not start; {FALLBACK}", error.why)]
    agent.close()
    return [Finding("ok", TOPIC, f"nixl {version} starts, and its UCX plugin loads")]
