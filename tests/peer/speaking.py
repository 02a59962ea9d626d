"""A checkpoint of random weights that speaks: every token is a word of its own.

What follows a prompt is then also visible as text, and the chat endpoint works: its template puts the messages'
words one behind the other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from checkpoints import tiny_llama
from prompts import VOCABULARY

__all__ = ["speaking_llama", "words"]

_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def speaking_llama(directory: Path) -> Path:
    """Write ``tiny_llama`` with a tokenizer of ``VOCABULARY`` words; return its directory."""
    tiny_llama(directory)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word(token): token for token in range(VOCABULARY)},
            "unk_token": word(0),
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    access = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": word(0),
        "eos_token": word(1),
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(access))
    return directory


def word(token: int) -> str:
    """Return what a token is called."""
    return {0: "<s>", 1: "</s>"}.get(token, f"w{token}")  # no word may begin like a special one


def words(tokens: Sequence[int]) -> str:
    """Return the text of tokens."""
    return " ".join(map(word, tokens))
