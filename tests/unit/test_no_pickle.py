"""The no-pickle rule finds every way in that we know of, and the packages obey it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "tests" / "lint" / "no_pickle.py"

spec = importlib.util.spec_from_file_location("no_pickle", SCRIPT)
assert spec is not None
assert spec.loader is not None
no_pickle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(no_pickle)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as harmless",
        "from pickle import loads",
        "from _pickle import Unpickler",
        "import cloudpickle, json",
        "import dill",
        "import marshal",
        "import shelve",
        "from multiprocessing.connection import Client",
        "from multiprocessing import managers",
        "def load():\n    import pickle\n    return pickle",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load as read",
        "import torch\nreader = torch.load",
        "import yaml\nyaml.load(text)",
        "from yaml import unsafe_load",
        "eval('1')",
        "exec('x = 1')",
        "f = eval",
        "import builtins\nbuiltins.exec('')",
        "__import__('pickle')",
        "import importlib\nimportlib.import_module('marshal')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=wanted)",
    ],
)
def test_a_violation_is_found(source: str) -> None:
    assert no_pickle.violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.loads('1')",
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "tier.load(frames)",
        "import os\nos.execv(path, arguments)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "from multiprocessing import shared_memory",
        "# pickle\nx = 'eval(pickle)'",
    ],
)
def test_innocent_code_passes(source: str) -> None:
    assert not no_pickle.violations(source)


def test_the_report_names_line_and_cause() -> None:
    (hit,) = no_pickle.violations("x = 1\nimport marshal\n")
    assert hit == (2, "marshal")


def test_the_script_fails_on_a_violation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.py").write_text("from torch import load\n")
    assert no_pickle.main([str(tmp_path)]) == 1
    assert "bad.py:1: torch.load" in capsys.readouterr().out


def test_the_script_fails_when_it_looked_at_nothing(tmp_path: Path) -> None:
    assert no_pickle.main([str(tmp_path / "misspelt")]) == 1


def test_the_four_packages_obey() -> None:
    folders = [str(REPOSITORY / name) for name in ("connector", "plugins", "engines", "cuda")]
    assert no_pickle.main(folders) == 0
