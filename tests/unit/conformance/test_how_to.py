"""The how-to's tier, held to the kit by the how-to's test: the two code blocks of the page as they stand."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.abc import InspectLoader
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "write-a-tier-plugin.md"


class CodeBlock(InspectLoader):
    """Imports the block of the page that begins with a module's file name."""

    def get_source(self, fullname: str) -> str:
        blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
        (source,) = [block for block in blocks if block.startswith(f'"""{fullname}.py')]
        return str(source)

    def module(self, name: str) -> ModuleType:
        spec = importlib.util.spec_from_loader(name, self)
        assert spec is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        self.exec_module(module)
        return module


CodeBlock().module("my_tier")
TestFiles = CodeBlock().module("test_my_tier").TestFiles
