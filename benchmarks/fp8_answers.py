"""How much a model's answers change when its KV was rounded by the codec ``fp8``.

    python benchmarks/fp8_answers.py TEXT...

Needs torch, transformers and the demo's model (``pip install 'kvferry[vllm,codecs,demo]'``). The KV of the text's first
1,024 tokens is rounded or not, then the model reads the next 512: how well it predicts each, and how often the two
would choose the same next token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from kvferry.connector.layout import BlockLayout
from kvferry.plugins.codecs.fp8 import Fp8Codec

CONTEXT = 1024
AFTER = 512


def rounded(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits of vectors, ``[vector][element]``, as they come back."""
    vectors, dim = bits.shape
    codec = Fp8Codec(
        BlockLayout(
            num_layers=1,
            num_kv_heads=1,
            block_tokens=vectors,
            head_dim=dim,
            kv_factor=1,
            itemsize=2,
            dtype="bfloat16",
        )
    )
    payload = bytearray(bits.tobytes())
    body = memoryview(bytearray(len(payload)))
    length = codec.encode(memoryview(payload), body)
    codec.decode(body[:length], memoryview(payload))
    return np.frombuffer(payload, bits.dtype).reshape(bits.shape)


@click.command(help=__doc__)
@click.argument(
    "texts", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def main(texts: tuple[Path, ...]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from kvferry.engines.vllm.demo.model import default_cache_dir, prepare

    def through_codec(tensor: Any) -> Any:
        bits = tensor.contiguous().view(torch.int16).numpy()
        back = rounded(bits.reshape(-1, bits.shape[-1])).reshape(bits.shape)
        return torch.from_numpy(back.copy()).view(torch.bfloat16)

    checkpoint = prepare(default_cache_dir())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    text = "".join(path.read_text() for path in texts)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt").input_ids
    ids = ids[:, : CONTEXT + AFTER]
    chosen = []
    with torch.no_grad():
        layers = model(ids[:, :CONTEXT], use_cache=True).past_key_values.layers
        context = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
        for name, change in (("exact", lambda tensor: tensor.clone()), ("fp8", through_codec)):
            cache = DynamicCache()
            for index, (keys, values) in enumerate(context):
                cache.update(change(keys), change(values), index)
            logits = model(ids[:, CONTEXT:], past_key_values=cache).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, CONTEXT + 1 :]).item()
            click.echo(f"{name:>6}: loss {loss:.4f} per token")
            chosen.append(logits.argmax(-1))
    same = (chosen[0] == chosen[1]).float().mean().item()
    click.echo(f"the same next token at {same:.1%} of {len(chosen[0])} positions")


if __name__ == "__main__":
    main()
