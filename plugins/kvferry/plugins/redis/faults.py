"""What an exception of redis-py means: a tier that cannot serve, or one block that failed.

The only place where redis-py's errors are translated. Messages name the server, never a credential.
"""

from __future__ import annotations

from redis import exceptions

from kvferry.connector.errors import TierError, TierTimeout, TierUnavailable
from kvferry.connector.tier import Outcome

__all__ = ["block_outcome", "has_moved", "is_connection_lost", "tier_error"]

_MOVED = (exceptions.MovedError, exceptions.AskError, exceptions.TryAgainError)
_CREDENTIALS = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
_TEXTS: tuple[tuple[type[Exception], str, str], ...] = (
    (exceptions.BusyLoadingError, "is still loading its data", "it will be used once it is ready"),
    (exceptions.ReadOnlyError, "is a replica now and takes no writes", "name the master, or use sentinels"),
    (exceptions.MasterDownError, "is a replica that has lost its master", ""),
    (exceptions.ClusterDownError, "belongs to a cluster that is down", "see CLUSTER INFO"),
    (exceptions.InvalidResponse, "does not speak the Redis protocol", "check the URL"),
)
_REPLICA_OR_DOWN = (exceptions.ReadOnlyError, exceptions.ClusterDownError, exceptions.BusyLoadingError)


def has_moved(error: object) -> bool:
    """Tell whether a reply says that another node of the cluster has the key."""
    return isinstance(error, _MOVED)


def is_connection_lost(error: BaseException) -> bool:
    """Tell whether the connection on which this was raised can't be used further."""
    replied = isinstance(error, exceptions.ResponseError | exceptions.BusyLoadingError)
    return not replied


def tier_error(tier: str, place: str, error: BaseException) -> TierError:
    """Return the error that says what ``error`` means to the tier as a whole.

    Args:
        tier: The tier's name.
        place: Where it happened, in words.
        error: What redis-py or the socket raised.
    """
    if isinstance(error, TierError):
        return error
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return TierTimeout(tier, f"{place} did not answer in time")
    if isinstance(error, _CREDENTIALS):
        hint = "check username, password and the user's ACL"
        return TierUnavailable(tier, f"{place} refuses the credentials: {one_line(error)}", hint)
    for kind, text, hint in _TEXTS:
        if isinstance(error, kind):
            return TierUnavailable(tier, f"{place} {text}", hint)
    return TierUnavailable(tier, f"{place} cannot be used: {one_line(error)}")


def block_outcome(error: BaseException) -> Outcome | None:
    """Return what an error reply means for one block; None where it concerns the tier as a whole."""
    if isinstance(error, exceptions.OutOfMemoryError):
        return Outcome.NO_ROOM
    if is_connection_lost(error) or isinstance(error, (*_CREDENTIALS, *_REPLICA_OR_DOWN)):
        return None
    return Outcome.FAILED


def one_line(error: BaseException) -> str:
    """Return an exception's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__
