"""Storage tiers shipped with kvferry, registered through the same hooks as a third party's."""
