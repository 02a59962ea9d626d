"""The shipped connector on an engine that prefills, whose pages a test damages behind its digests' back.

Selected by ``kv_connector_module_path``. While the file that the environment variable ``DAMAGE`` names exists, one bit
of each handed-over request's first page is inverted, after the page was digested and before the digests are told. Each
time a line is added to the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvferry.engines.handoff.digest import PageDigester
from kvferry.engines.vllm.connector import KVFerryConnector

__all__ = ["KVFerryConnector"]

TOP_BYTE, EXPONENT = 3, 0x40
"""Of a little-endian float32, and the bit that makes a small number huge."""

_digest = PageDigester.digest


def _damaging(self: PageDigester, pages: Sequence[int] | npt.NDArray[np.int32]) -> bytes:
    digests = _digest(self, pages)
    damage = Path(os.environ["DAMAGE"])
    if damage.exists():
        layout = self._layout
        page = layout.layer_offsets[0] + int(pages[0]) * layout.page_stride
        self._bytes[page + layout.token_stride + layout.kv_stride + TOP_BYTE] ^= EXPONENT
        with damage.open("a") as lines:
            lines.write("one bit\n")
    return digests


PageDigester.digest = _damaging  # type: ignore[method-assign]
