"""What ``kvferry doctor`` says about CUDA: the GPU, the driver, the compiler, and which ways blocks may go.

Opens the first GPU and compiles the kernels for it, so that the engine finds them compiled. Which way is taken is
measured by each worker at its start and said in its log.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvferry.connector.errors import DeviceError
from kvferry.connector.finding import Finding
from kvferry.cuda.driver import open_device
from kvferry.cuda.program import kept_kernels

__all__ = ["findings"]

_DRIVER = Path("/dev/nvidiactl")
"""Is there where NVIDIA's driver is loaded."""


def findings(driver: Path = _DRIVER) -> Iterator[Finding]:
    """Yield the findings about CUDA.

    Args:
        driver: A file that is there where there is a driver.
    """
    topic = "cuda"
    try:
        device = open_device(0)
    except DeviceError as error:
        if driver.exists():
            hint = "until then blocks are copied by torch, page by page"
            yield Finding("warn", topic, _line(error), hint)
        else:
            yield Finding("ok", topic, "no NVIDIA driver here: pages in host memory need none")
        return
    ways = ["batch"] if device.has_batch_copies else []
    ways.append("copies")
    try:
        kept_kernels(device.architecture)
        ways.insert(0, "kernel")
    except DeviceError as error:
        yield Finding("warn", topic, _line(error), "blocks go without a kernel, which may be slower")
    yield Finding(
        "ok",
        topic,
        f"GPU 0 is {device.architecture}; blocks may go by {', '.join(ways)}",
        "cuda.path names one; auto takes the fastest at start and logs it",
    )
    if not device.has_batch_copies:
        what = "the driver copies one run at a time: it is older than CUDA 12.8"
        yield Finding("ok", topic, what, "a newer one also has the path batch")


def _line(error: DeviceError) -> str:
    return " ".join(str(error).split())[:300]
