"""What went wrong with a request, read from the errors of obstore: a block's fate and a line for people.

obstore tells an HTTP error by its text only, so status and S3 error code are searched there. Nothing else
of the text is passed on: a store may repeat what was signed in its answer.

Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from kvferry.connector.errors import TierError, TierTimeout, TierUnavailable
from kvferry.connector.tier import Outcome

__all__ = ["FORBIDDEN_CODES", "REGION_CODES", "Trouble", "WrongLength", "raise_if_down", "trouble_of"]

FORBIDDEN_CODES = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "AccountProblem",
        "Forbidden",
    }
)
REGION_CODES = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
)

_FULL_CODES = frozenset(
    {
        "InsufficientStorage",
        "InsufficientCapacity",
        "QuotaExceeded",
        "XMinioAdminBucketQuotaExceeded",
        "XMinioStorageFull",
        "XAmzServerFull",
        "EntityTooLarge",
    }
)
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_BARE_REDIRECT = "redirect without LOCATION"
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_CAUSE = re.compile(
    r'(Connection refused|Connection reset by peer|failed to lookup address|certificate[^"]{0,80})'
)
_FORBIDDEN, _MOVED = (401, 403), (301, 307, 400)
_BUSY, _INTERNAL, _FULL = 429, 500, 507


class WrongLength(Exception):
    """An object is not as long as a block can be, or other than it was announced."""


class Trouble(msgspec.Struct, frozen=True):
    """What one failed request means."""

    outcome: Outcome
    """For its block."""
    why: str
    """Without secrets and without the key."""
    hint: str = ""
    is_general: bool = False
    """Any other request would have met the same."""
    is_timeout: bool = False
    code: str = ""
    """The S3 error code, where the store gave one."""
    status: int = 0
    """The HTTP status, where there was an answer."""


def trouble_of(error: BaseException) -> Trouble:
    """Return what an error of a request means; for one that nobody expected, too."""
    text = str(error)
    if isinstance(error, WrongLength):
        return Trouble(Outcome.FAILED, text)
    status = int(found[1]) if (found := _STATUS.search(text)) else 0
    if _BARE_REDIRECT in text:
        status = 301
    code = found[1] if (found := _CODE.search(text)) else ""
    if status or isinstance(error, FileNotFoundError):
        trouble = _answered(status, code, isinstance(error, FileNotFoundError))
        return msgspec.structs.replace(trouble, status=status, code=code)
    if isinstance(error, TimeoutError) or "TimedOut" in text:
        return Trouble(Outcome.FAILED, "no answer in time", is_general=True, is_timeout=True)
    if "HTTP error" in text:
        cause = found[1] if (found := _CAUSE.search(text)) else "the connection broke"
        return Trouble(Outcome.FAILED, f"no connection: {cause}", is_general=True)
    if "credential" in text.lower():
        hint = "see what `aws sts get-caller-identity` says"
        return Trouble(Outcome.FAILED, "no credentials can be had now", hint, is_general=True)
    return Trouble(Outcome.FAILED, f"an answer that makes no sense ({type(error).__name__})")


def _answered(status: int, code: str, is_absent: bool) -> Trouble:
    """Return what an answer other than success means."""
    answer = " ".join(filter(None, (str(status or ""), code)))
    if code == "NoSuchBucket":
        return Trouble(Outcome.FAILED, "the bucket does not exist", "create it", is_general=True)
    if is_absent:
        return Trouble(Outcome.MISSING, "no such object")
    if code in _FULL_CODES or status == _FULL:
        return Trouble(Outcome.NO_ROOM, f"the store is full: {answer}", "make room or raise the quota")
    if status in _FORBIDDEN:
        hint = "check the credentials and what they are allowed to do"
        return Trouble(Outcome.FAILED, f"the store refuses: {answer}", hint, is_general=True)
    if status in _MOVED or code in REGION_CODES:
        return Trouble(Outcome.FAILED, f"the store does not take the request: {answer}", is_general=True)
    if status == _INTERNAL:  # one object's; a full SeaweedFS says so too, and can still be read
        return Trouble(Outcome.FAILED, f"the store failed: {answer}", "look at its log")
    if status == _BUSY or status > _INTERNAL:
        return Trouble(Outcome.FAILED, f"the store cannot serve: {answer}", is_general=True)
    return Trouble(Outcome.FAILED, f"unexpected answer: {answer}")


def raise_if_down(tier: str, where: str, results: Sequence[object]) -> None:
    """Raise when every request of a call failed for a reason that is not a single block's.

    Args:
        tier: The tier's name.
        where: The endpoint, for the message.
        results: A ``Trouble`` for each request that failed, anything else for the others.

    Raises:
        TierTimeout: None was answered in time.
        TierUnavailable: The store cannot be reached or does not serve.
    """
    troubles = [result for result in results if isinstance(result, Trouble) and result.is_general]
    if not troubles or len(troubles) < len(results):
        return
    first = next((trouble for trouble in troubles if not trouble.is_timeout), troubles[0])
    kind: type[TierError] = TierTimeout if first.is_timeout else TierUnavailable
    raise kind(tier, f"{where}: {first.why}", first.hint)
