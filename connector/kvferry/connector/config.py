"""The configuration schema: typed, strict, with defaults that are safe and fast.

Values only. ``settings`` reads them from the engine's extra config, a TOML file and ``KVFERRY_*``
variables and explains mistakes; a tier's own options are typed by its plugin.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = [
    "MOST_THREADS",
    "Config",
    "CudaConfig",
    "ExplainConfig",
    "HostConfig",
    "PeerConfig",
    "TierConfig",
    "TlsConfig",
    "TrtllmAdapterConfig",
    "TrtllmConfig",
]

GIB = 1 << 30
MOST_THREADS = 256
"""Per tier."""

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
AdapterId = Annotated[str, msgspec.Meta(pattern=r"^(0|[1-9][0-9]*)$")]


class HostConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The host tier: the shared-memory arena."""

    capacity: int = 4 * GIB
    """Bytes of the arena, all workers together; sizes like ``"64GiB"`` are understood."""
    eviction: str = "s3fifo"
    """Eviction policy by name: ``lru``, ``s3fifo``, or a plugin's."""
    huge_pages: bool = False
    """Back the arena with huge pages; falls back, saying so, where none are reserved."""


class TierConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What kvferry itself needs to know about a tier; the rest are the tier's own options."""

    type: str
    """Which kind of tier; ``kvferry plugins`` lists them."""
    name: str = ""
    """Name in reports; the type when empty."""
    threads: Annotated[int, msgspec.Meta(ge=0, le=MOST_THREADS)] = 0
    """Threads that call the tier; 0 takes as many as suit its type. Each moves up to 8 MiB at a time."""
    queue_blocks: Count = 256
    """Blocks that may wait to be stored; more are shed and counted."""
    deadline_s: Seconds = 10.0
    """Seconds after which a load or store counts as failed."""
    open_deadline_s: Seconds = 120.0
    """Seconds after which kvferry goes on without a tier that is still being opened."""
    codec: str = "none"
    """How blocks are encoded in this tier: ``none``, ``lz4``, ``zstd``, ``fp8`` (loses precision), or a
    plugin's."""
    admission: str = "adaptive"
    """Which blocks are worth a write: ``adaptive``, ``always``, ``second-touch``, or a plugin's."""
    write: Literal["through", "back"] = "through"
    """``through`` stores a block as soon as it is saved; ``back`` only when it is about to leave the
    arena, so that short-lived blocks are never written, and a crash loses what was not."""
    promote: bool = True
    """Store blocks here that were loaded from a tier below."""
    ask: Literal["when_faster", "always"] = "when_faster"
    """``when_faster`` loads only what is expected to arrive before the engine would have computed it."""
    required: bool = False
    """Refuse to start when the tier cannot be opened, rather than go on without it."""


class ExplainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Records for ``kvferry explain``."""

    enabled: bool = True
    """False keeps no records."""
    directory: str = ""
    """Where records are kept; ``$XDG_STATE_HOME/kvferry/explain`` when empty."""
    max_bytes: int = 16 << 20
    """Bound on the records on disk, per engine."""


class PeerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Handoff of KV pages between engines: prefill on one, decode on another."""

    enabled: bool | None = None
    """Whether pages are handed over and taken, as the engine's role allows. When not given: only where the engine
    has one role (``kv_producer`` or ``kv_consumer``). Otherwise requests are computed as if nobody had asked for it."""
    listen: str = "tcp://127.0.0.1:0"
    """Where the side channel of an engine that prefills listens; port 0 takes a free one. Beyond this machine a
    ``token`` is needed."""
    advertise: str = ""
    """Host name or address at which decoding engines reach it; the listening one when empty."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts and networks (``10.0.0.0/8``) from which pages are taken. None given: this machine, and with a
    ``token`` any."""
    transport: str = "auto"
    """``nixl``, ``socket``, a plugin's, or ``auto``: the best that both engines have."""
    lease_s: Seconds = 30.0
    """Seconds that pages are held for a decoding engine that says nothing; it renews the lease while it waits."""
    deadline_s: Seconds = 10.0
    """Seconds after which a decoding engine gives up a transfer and computes the prompt itself."""
    held_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.75
    """Share of the engine's pages that may be held for others; beyond it pages are freed at once."""
    verify: bool = True
    """Compare checksums of what was read from host memory; pages in GPU memory are never hashed."""
    commit_wait_s: Seconds = 1.0
    """Seconds that a prefill's answer may wait until what it saved is visible to whoever shares the cache."""


class CudaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How blocks move between a GPU's pages and the arena."""

    path: Literal["auto", "kernel", "batch", "copies"] = "auto"
    """``kernel`` gathers pages by a kernel and copies whole blocks; ``batch`` and ``copies`` copy every run of a page
    by DMA, many or one to a call of the driver. ``auto`` measures at start for about a second and takes the fastest.
    One that is not there, or fails the self-test, is replaced by the next, with a warning."""
    thread_blocks: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16
    """Thread blocks of 512 threads that a kernel may have: what it takes of the GPU while the model computes."""
    ring_bytes: Annotated[int, msgspec.Meta(ge=1)] = 64 << 20
    """Memory on the GPU that ``kernel`` gathers into, per rank; no less than four blocks' share of the rank."""


class TrtllmAdapterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A LoRA adapter that requests to TensorRT-LLM name by a number alone."""

    name: str
    """The adapter's name, the same in every engine that should share its blocks."""
    path: str
    """Where its weights are; what they are is part of the key."""


class TrtllmConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What only engines of TensorRT-LLM need."""

    query_wait_s: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.02
    """Seconds that a step waits in all for blocks of slower tiers, which have to be in the arena before they are
    offered. 0 offers what is there."""
    sync_bytes: int | None = None
    """Largest load, all ranks together, that the engine's step waits for; a larger one goes on beside the steps. When
    not given: 32 MiB with one rank, and no such load with several."""
    adapters: dict[AdapterId, TrtllmAdapterConfig] = {}
    """LoRA adapters by the number that requests give (``lora_task_id``), each a table of ``name`` and ``path``. A
    request with another number is passed through untouched."""


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS towards a cache server; used with ``tls://`` addresses."""

    ca: str = ""
    """PEM file of the authorities that may sign the server's certificate; the system's when empty."""
    certificate: str = ""
    """PEM file of this client's certificate, where the server asks for one."""
    private_key: str = ""
    """PEM file of the certificate's key; in the certificate's own file when empty."""
    server_name: str = ""
    """The name the server's certificate must bear; the address's host when empty."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be configured."""

    enabled: bool = True
    """False passes every request through untouched."""
    service: str = ""
    """Cache server to use: ``unix:///path`` on this machine, ``tcp://host:port`` or ``tls://host:port``
    anywhere. Empty runs the cache inside the engine."""
    token: str = ""
    """Credential for the cache server. Prefer ``KVFERRY_TOKEN``."""
    tls: TlsConfig = TlsConfig()
    answer_budget_s: Seconds = 0.002
    """Seconds that one engine step waits for the cache server in all; what is not answered by then is asked
    again in the next step."""
    block_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Tokens per block, a multiple of the engine's page; 0 picks the smallest multiple >= 64."""
    host: HostConfig = HostConfig()
    tiers: tuple[dict[str, object], ...] = ()
    """Tiers below the host, in the order they are asked; each a ``TierConfig`` plus its options."""
    plugins: tuple[str, ...] = ()
    """Modules to load as plugins besides the installed ones."""
    tenant: str = ""
    """Blocks are shared within a tenant only."""
    secret: str = ""
    """Signs frames; frames without a valid signature are refused. Prefer ``KVFERRY_SECRET``."""
    model: str = ""
    """Model id for keys; the engine's model name when empty. Set it when paths differ by machine."""
    revision: str = ""
    """Revision of the weights for keys; found or digested when empty."""
    peer: PeerConfig = PeerConfig()
    cuda: CudaConfig = CudaConfig()
    trtllm: TrtllmConfig = TrtllmConfig()
    save: Literal["all", "prompt", "none"] = "all"
    """``all`` saves prompt and generated blocks, ``prompt`` only the prompt's, ``none`` nothing."""
    lease_s: Seconds = 60.0
    """Seconds a lease or reservation is valid without being renewed or settled."""
    load_deadline_s: Seconds = 5.0
    """Seconds a request waits for slower tiers before it goes on with what is in the arena."""
    retry_failed_s: Seconds = 30.0
    """Seconds for which a block that could not be loaded is not offered again."""
    self_test: bool = True
    """Check at start that pages survive the round trip through a block; off only for debugging."""
    explain: ExplainConfig = ExplainConfig()
