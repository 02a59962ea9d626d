"""The ``kvferry`` command line: one module per command, ``main`` puts them together."""
