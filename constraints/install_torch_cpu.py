"""Install torch's CPU build into the running Python's environment.

    python constraints/install_torch_cpu.py

Where the configured package index has no CPU build, PyTorch's own index is asked. What is already installed is left
alone. Without this, anything that asks for a plain ``torch`` would pull the CUDA build, gigabytes that no test uses.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def install_torch() -> None:
    """Install torch, unless it is there."""
    if is_installed(TORCH):
        return
    try:
        pip(TORCH)
    except subprocess.CalledProcessError:
        print(f"no {TORCH} on the configured index; asking {TORCH_INDEX}", file=sys.stderr)
        pip("--index-url", TORCH_INDEX, TORCH)


def pip(*arguments: str) -> None:
    """Run ``pip install`` for this interpreter."""
    command = [sys.executable, "-m", "pip", "install", *arguments]
    print("+", *command, flush=True)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def is_installed(pin: str) -> bool:
    """Tell whether exactly this ``name==version`` is installed."""
    name, _, wanted = pin.partition("==")
    try:
        return version(name) == wanted
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    install_torch()
