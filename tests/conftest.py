"""What all tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A property does not fail because a busy machine stood still while it was tried.
settings.register_profile("kvferry", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvferry")
