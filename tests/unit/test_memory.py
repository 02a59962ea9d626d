"""Sizes as people read them."""

from __future__ import annotations

import pytest

from kvferry.connector.memory import format_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (3 << 29, "1.5 GiB"),
        (1000 << 30, "1000 GiB"),
        (17 << 40, "17 TiB"),
        (1 << 50, "1 PiB"),
        (5000 << 50, "5000 PiB"),
    ],
)
def test_a_size_has_the_largest_unit_that_fits(count: int, text: str) -> None:
    assert format_bytes(count) == text
