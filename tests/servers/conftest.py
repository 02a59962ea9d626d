"""Fixtures that start real servers; each kind has a module of its own."""

from redis_server import redis_cluster, shared_redis, start_cluster, start_redis
from s3_server import open_s3, own_weed, s3_tier, weed

__all__ = [
    "open_s3",
    "own_weed",
    "redis_cluster",
    "s3_tier",
    "shared_redis",
    "start_cluster",
    "start_redis",
    "weed",
]
