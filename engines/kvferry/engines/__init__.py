"""Thin adapters from inference engines to the kvferry session."""
