"""The ``kvferry`` command line: one module per command; ``main`` puts them together."""

from __future__ import annotations

from kvferry.connector.cli.group import main

__all__ = ["main"]
