"""Every error kvferry raises on purpose.

The tree follows responsibility, not modules: who has to act is readable from the class.

    KVFerryError                    root: catch this to catch all of them
    ├─ ConfigError                  the operator's fault; raised before anything starts
    ├─ PluginError                  a plugin broke its contract; ``__cause__`` is kept
    ├─ PluginMissing                a broken plugin may have offered what the configuration names
    ├─ UsageError                   the calling code's fault
    │  ├─ ClosedError               used after ``close()``
    │  ├─ LeaseError                an unknown, expired or foreign lease or reservation
    │  └─ LayoutError               pages, slots and blocks that do not fit together
    ├─ ArenaError                   shared memory could not be created, mapped or trusted
    ├─ TierError                    the outside's fault: a tier failed as a whole
    │  ├─ TierUnavailable           it cannot be reached or opened now
    │  └─ TierTimeout               it did not answer within its deadline
    ├─ WireError                    the other end of a connection broke the protocol
    ├─ AccessRefused                a credential was refused, by the server or by us
    ├─ DeviceError                  CUDA: its driver or its compiler refused, or is not there
    ├─ HandoffFailed                pages of another engine could not be had; the request recomputes
    ├─ LoadFailed                   what an engine counts as computed could not be loaded; the engine ends
    └─ BlockRefused                 bytes were offered that must not reach a model

A miss is not an error and has no class here: lookups and loads report it as a value.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AccessRefused",
    "ArenaError",
    "BlockRefused",
    "ClosedError",
    "ConfigError",
    "DeviceError",
    "HandoffFailed",
    "KVFerryError",
    "LayoutError",
    "LeaseError",
    "LoadFailed",
    "PluginError",
    "PluginMissing",
    "TierError",
    "TierTimeout",
    "TierUnavailable",
    "UsageError",
    "WireError",
    "short_key",
]


def short_key(key: bytes) -> str:
    """Return the first 8 hex digits of a block key, the form used in messages and logs."""
    return key[:4].hex()


class KVFerryError(Exception):
    """Root of every error that kvferry raises on purpose."""


class ConfigError(KVFerryError):
    """The configuration is wrong; nothing was started.

    Args:
        path: Where in the configuration, dotted (``tiers[0].capacity``).
        why: What is wrong with the value.
        hint: What to write instead.
    """

    def __init__(self, path: str, why: str, hint: str = "") -> None:
        self.path = path
        self.why = why
        self.hint = hint
        super().__init__(f"{path}: {why}" + (f" ({hint})" if hint else ""))


class PluginError(KVFerryError):
    """A plugin failed to import, registered something invalid, or raised where it must not.

    Args:
        plugin: The plugin's name.
        hook: The hook or operation that failed.
        why: What happened.
    """

    def __init__(self, plugin: str, hook: str, why: str) -> None:
        self.plugin = plugin
        self.hook = hook
        super().__init__(f"plugin {plugin!r} failed in {hook}: {why}; it is switched off")


class PluginMissing(KVFerryError):
    """The configuration names what no working plugin offers, and a broken plugin may be why.

    Args:
        path: Dotted path of the key that names it.
        why: What is not there.
        hint: What it might have been instead.
        suspects: The plugins that are switched off.
    """

    def __init__(self, path: str, why: str, hint: str, suspects: Sequence[str]) -> None:
        self.path = path
        self.suspects = tuple(suspects)
        super().__init__(
            f"{path}: {why} ({hint}; switched off: {', '.join(suspects)}, see `kvferry plugins`)"
        )


class UsageError(KVFerryError):
    """The calling code broke the contract of the function it called."""


class ClosedError(UsageError):
    """An object was used after ``close()``."""


class LeaseError(UsageError):
    """A lease or reservation is unknown, has expired, or belongs to another owner."""


class LayoutError(UsageError):
    """Pages, slots or blocks do not fit together."""


class ArenaError(KVFerryError):
    """The shared-memory arena could not be created, mapped or trusted."""


class TierError(KVFerryError):
    """A tier failed as a whole; single blocks that are absent or refused are values, not errors.

    Args:
        tier: The tier's name.
        why: The cause.
        hint: What the operator can do.
        key: The block concerned, if it was one.
    """

    def __init__(self, tier: str, why: str, hint: str = "", key: bytes | None = None) -> None:
        self.tier = tier
        self.key = key
        block = f" block {short_key(key)}" if key is not None else ""
        super().__init__(f"tier {tier!r}{block}: {why}" + (f"; {hint}" if hint else ""))


class TierUnavailable(TierError):
    """The tier cannot be reached or opened now."""


class TierTimeout(TierError):
    """The tier did not answer within its deadline."""


class WireError(KVFerryError):
    """The other end of a connection sent what the protocol does not allow; the connection is closed."""


class AccessRefused(KVFerryError):
    """A credential was refused: the server's opinion of ours, or ours of the server."""


class DeviceError(KVFerryError):
    """CUDA's driver or compiler refused an operation, or is not there.

    Args:
        op: What was asked of it (``cuMemcpyBatchAsync``, ``compile staging.cu for sm_90``).
        code: CUDA's name for the error (``CUDA_ERROR_INVALID_VALUE``), or the cause in words.
        hint: What the operator can do.
        log: What the compiler wrote.
    """

    def __init__(self, op: str, code: str, hint: str = "", log: str = "") -> None:
        self.op = op
        self.code = code
        self.log = log
        text = f"CUDA failed to {op}" if " " in op else f"{op} failed"
        text += f": {code}" + (f"; {hint}" if hint else "")
        super().__init__(text + (f"\n{log}" if log else ""))


class HandoffFailed(KVFerryError):
    """Pages of another engine could not be had, or must not be used; the request is recomputed.

    Args:
        reason: One word for counters; ``HandoffFailed.REASONS`` has them all.
        why: What happened, and what to do where something can be done.
    """

    REASONS = (
        "params",
        "unreachable",
        "refused",
        "incompatible",
        "gone",
        "content",
        "expired",
        "timeout",
        "disconnected",
        "transport",
        "checksum",
        "aborted",
    )

    def __init__(self, reason: str, why: str) -> None:
        assert reason in self.REASONS
        self.reason = reason
        self.why = why
        super().__init__(f"handoff failed ({reason}): {why}; the request is recomputed")


class LoadFailed(KVFerryError):
    """A load failed for good in an engine that cannot be told so; the engine is stopped.

    Args:
        rank: Of the engine.
        request_id: The engine's name for the request.
        why: What failed.
    """

    def __init__(self, rank: int, request_id: str, why: str) -> None:
        self.rank = rank
        self.request_id = request_id
        super().__init__(
            f"rank {rank} cannot load the blocks that request {request_id} was promised: {why}; the engine counts them "
            "as computed, so it is stopped: its output would be wrong"
        )


class BlockRefused(KVFerryError):
    """A block was offered whose bytes must not reach a model.

    Args:
        key: The block that was asked for.
        reason: One word for counters: ``magic``, ``version``, ``key``, ``fingerprint``,
            ``header``, ``length``, ``codec``, ``checksum`` or ``mac``.
        why: The difference that was found.
    """

    def __init__(self, key: bytes, reason: str, why: str) -> None:
        self.key = key
        self.reason = reason
        super().__init__(f"block {short_key(key)} refused ({reason}): {why}; it counts as a miss")
