"""The class that authors subclass: all groups of checks on one base."""

from __future__ import annotations

from kvferry.connector.testing.capacity import CapacityChecks
from kvferry.connector.testing.concurrency import ConcurrencyChecks
from kvferry.connector.testing.contents import ContentsChecks
from kvferry.connector.testing.faults import FaultChecks
from kvferry.connector.testing.lifecycle import LifecycleChecks
from kvferry.connector.testing.restart import RestartChecks
from kvferry.connector.testing.round_trip import RoundTripChecks

__all__ = ["TierTests"]


class TierTests(
    LifecycleChecks,
    RoundTripChecks,
    ContentsChecks,
    ConcurrencyChecks,
    CapacityChecks,
    RestartChecks,
    FaultChecks,
):
    """Holds a tier to the contract in ``kvferry.connector.tier``: subclass it as ``Test...``, run pytest.

    Override ``make_tier``; that is enough. What else may be overridden, each opening further tests:

    ================  ==========================================================================
    ``configuration``  crash of the process (SIGKILL), several processes at once
    ``damage``         truncated, extended, flipped and exchanged bytes in the storage
    ``suspend``        with ``resume``: whatever the tier talks to stops answering
    ``kill``           with ``revive``: it is gone, and comes back
    ``exhaust``        with ``relieve``: the medium is full
    ================  ==========================================================================

    and the class attributes, of which ``small_capacity_bytes`` is the one that tiers with overhead need.
    What is needed from outside (a server) comes from the author's own fixtures, for example an autouse
    fixture that sets ``self.url``. A test that does not apply to a tier may be overridden with one that
    says why.
    """
