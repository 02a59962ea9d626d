"""Handoff: one engine prefills, another takes the KV pages straight out of its memory and decodes."""
