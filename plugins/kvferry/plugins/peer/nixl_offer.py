"""What a rank says of itself to readers over NIXL, and what a reader believes of it.

NIXL does not survive damaged metadata: a blob that was cut short makes the peer's name unusable for as long as the
agent lives. So the offer is an envelope whose digest is compared before anything in it is looked at. The digest finds
damage; who may send offers at all is the side channel's business.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec

from kvferry.connector.errors import HandoffFailed
from kvferry.connector.transport import MAX_OFFER_BYTES

__all__ = ["PROBE_BYTES", "PROBE_REPEATS", "Offer", "pack", "unpack"]

VERSION = 1
DIGEST_BYTES = 16
PROBE_BYTES = 64
PROBE_REPEATS = 1024
"""How often the memory that readers try first holds ``Offer.probe``. 64 KiB: much more than connecting takes."""

Address = Annotated[int, msgspec.Meta(ge=1, lt=1 << 57)]


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank's pages, as a reader needs to know them."""

    agent: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    """The NIXL agent's name, new with every incarnation."""
    metadata: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_OFFER_BYTES)]
    """NIXL's own description of the agent: its addresses and its registered memory."""
    is_local: bool
    """It listens on this machine only."""
    address: Address
    nbytes: Annotated[int, msgspec.Meta(ge=1, lt=1 << 48)]
    device_id: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    probe_address: Address
    """Host memory that holds ``probe``, ``PROBE_REPEATS`` times."""
    probe: Annotated[bytes, msgspec.Meta(min_length=PROBE_BYTES, max_length=PROBE_BYTES)]
    """Random; who reads something else has reached something else."""


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    digest: bytes
    body: bytes


_envelopes = msgspec.msgpack.Decoder(_Envelope)
_offers = msgspec.msgpack.Decoder(Offer)


def pack(offer: Offer) -> bytes:
    """Return the offer as it travels.

    Raises:
        HandoffFailed: ``transport``: it is longer than offers may be.
    """
    body = msgspec.msgpack.encode(offer)
    packed = msgspec.msgpack.encode(_Envelope(VERSION, _digest(body), body))
    if len(packed) > MAX_OFFER_BYTES:
        why = f"NIXL describes this engine in {len(offer.metadata)} bytes, which is too long"
        raise HandoffFailed("transport", f"{why}; set UCX_NET_DEVICES to the devices that are needed")
    return packed


def unpack(packed: bytes) -> Offer:
    """Return what a peer offers.

    Raises:
        HandoffFailed: ``transport``: it is not an offer, or was damaged.
    """
    if len(packed) > MAX_OFFER_BYTES:
        raise HandoffFailed("transport", "the peer's NIXL offer is too long")
    try:
        envelope = _envelopes.decode(packed)
        if envelope.version != VERSION:
            why = f"the peer's NIXL offer has version {envelope.version}, this kvferry knows {VERSION}"
            raise HandoffFailed("transport", why)
        if envelope.digest != _digest(envelope.body):
            raise HandoffFailed("transport", "the peer's NIXL offer was damaged on its way")
        return _offers.decode(envelope.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HandoffFailed("transport", f"the peer's NIXL offer is none: {error}") from None


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES, person=b"kvferry-nixl").digest()
