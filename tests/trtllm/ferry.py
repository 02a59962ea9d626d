"""Starts stand-in engines with kvferry's own connector, configured as an operator configures it."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from copies import Copies
from standin.executor import Engine
from standin.interface import Dialect, Interface, played
from standin.model import Model
from standin.options import EngineOptions, llm_args

__all__ = ["ASYNC", "CONFIG", "SYNC", "Ferry", "made_up_checkpoint", "settle"]

CONFIG = """
block_tokens = {page_tokens}
[host]
capacity = "4MiB"
[trtllm.adapters.1]
name = "one"
path = "{adapter}"
"""
"""Of every engine here, unless a test gives its own."""

ASYNC = CONFIG.replace("[trtllm.", "[trtllm]\nsync_bytes = 1\n[trtllm.")
"""Every load goes on beside the engine's steps."""
SYNC = CONFIG.replace("[trtllm.", "[trtllm]\nsync_bytes = 1000000\n[trtllm.")
"""Every load is waited for."""

_MODULE = "kvferry.engines.trtllm.connector"


class Ferry:
    """Engines of one test. At most one dialect is played at a time.

    Args:
        folder: For checkpoints and configurations.
        monkeypatch: Undone at the test's end.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch
        self._stack = contextlib.ExitStack()
        self.copies = Copies(monkeypatch)
        self._engines: list[Engine] = []
        self._interface: Interface | None = None
        self._both: tuple[type[Any], type[Any]] | None = None

    def start(
        self,
        options: EngineOptions | None = None,
        *,
        dialect: Dialect = "v2",
        config: str = CONFIG,
        is_ready: bool = True,
        checkpoint: Path | None = None,
        **arguments: object,
    ) -> Engine:
        """Start an engine.

        Args:
            options: What is played.
            dialect: Of all engines of a test the same.
            config: kvferry's TOML, with ``{page_tokens}`` and ``{adapter}`` to be filled in.
            is_ready: Whether one step has been made: kvferry offers nothing before every rank has reported.
            checkpoint: The model's; made up if left out.
            **arguments: What of the engine's arguments is not as usual.
        """
        options = options or EngineOptions()
        if self._interface is None or self._both is None:
            self._interface = self._stack.enter_context(played(dialect))
            self._stack.callback(_forget)
            _forget()
            package = importlib.import_module("kvferry.engines.trtllm")
            self._both = package.KVFerryScheduler, package.KVFerryWorker
        assert self._interface.dialect == dialect
        model = checkpoint or made_up_checkpoint(self._folder / "checkpoint", options.model)
        adapter = self._folder / "adapter"
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text("{}")
        _write_tensor(adapter / "adapter_model.safetensors")
        path = self._folder / f"kvferry-{len(self._engines)}.toml"
        path.write_text(config.format(page_tokens=options.page_tokens, adapter=adapter))
        self._monkeypatch.setenv("TLLM_KVFERRY_CONFIG", str(path))
        given = llm_args(options, str(model), disable_overlap_scheduler=not options.overlap, **arguments)
        engine = Engine(self._interface, *self._both, options, given)
        self._engines.append(engine)
        if is_ready:
            engine.answer([0], 1)
            self.forget(engine)
        return engine

    def fill(self, engine: Engine, prompt: list[int]) -> None:
        """Have a prompt be in the cache and not in the engine's own pages."""
        engine.answer([*prompt, 1], 2)
        settle(engine)
        engine.allocator.evict(engine.options.num_pages)
        self.forget(engine)

    def forget(self, engine: Engine) -> None:
        """Count and number everything from here on."""
        self.copies.counts.update({"load": 0, "save": 0})
        engine.transcript.calls.clear()
        engine.transcript.iteration = -1

    def close(self) -> None:
        self.copies.release("load")
        self.copies.release("save")
        for engine in self._engines:
            engine.close()
        self._both = None
        self._stack.close()


def settle(engine: Engine) -> None:
    """Have all that was saved be committed."""
    engine.run()
    for _ in range(2):
        engine.step()


def made_up_checkpoint(folder: Path, model: Model) -> Path:
    """Write as much of a checkpoint as a connector may look at, and return its folder."""
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": model.layers,
        "num_attention_heads": max(4, model.kv_heads),
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_size": max(4, model.kv_heads) * model.head_dim,
        "torch_dtype": model.dtype,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tensor(folder / "model.safetensors")
    return folder


def _write_tensor(path: Path) -> None:
    """Write a safetensors file with one tensor."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def _forget() -> None:
    """Have the connector be imported anew: its base classes are those of the dialect that is played."""
    sys.modules.pop(_MODULE, None)
    package = sys.modules.get("kvferry.engines.trtllm")
    if package is not None:
        vars(package).pop("connector", None)
