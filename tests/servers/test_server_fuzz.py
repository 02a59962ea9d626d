"""The cache server is sent what nobody should send; nobody else notices. A short run of ``fuzz_server``."""

from __future__ import annotations

import pytest
from fuzz_server import Tally, run_layer

SEED = 4


@pytest.mark.parametrize(("layer", "messages"), [("decode", 20_000), ("inside", 20_000), ("served", 12_000)])
def test_hostile_clients_do_no_harm(layer: str, messages: int) -> None:
    tally = Tally()
    run_layer(layer, messages, SEED, threads=2, tally=tally)
    assert tally.messages >= messages
    if layer != "decode":
        assert tally.sent["(good reads)"] >= 10
        assert tally.sent["(neighbour's blocks)"] > 0
        assert tally.slowest_s < 10.0
