"""Measurements of what kvferry costs, each against the machine's raw limit in the same run."""
