"""The tokenizer beside a model, read and tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.errors import ModelError, border
from melayer.loading.reading import reading, require_said

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"
_MEND = "Download or copy the tokenizer's files again."
_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def read_tokenizer(name: str, directory: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory; it has made tokens of a word.

    Args:
        name: What the model is called in messages.
        directory: Where it is.
        trust_remote_code: Whether its own code may run.

    Raises:
        ModelError: It cannot be read, names files elsewhere, or makes no tokens.
    """
    from transformers import AutoTokenizer

    require_said(trust_remote_code)
    _require_names_within(name, directory)
    with reading(name, "tokenizer", _MEND):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code
        )
        if not tokenizer.vocab_size:
            raise ValueError("it knows no tokens")
        _try(tokenizer)
        for token in _NAMES:
            if not isinstance(getattr(tokenizer, token), (int, type(None))):
                raise ValueError(f"its {token} is {getattr(tokenizer, token)!r}")
    template: Any = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    if template is not None and not all(isinstance(text, str) for text in texts):
        raise ModelError(f"The chat template of {name} is no text: {str(template)[:100]!r}. {_MEND}")
    return tokenizer


def _try(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes tokens of a text: one that lacks a part is often read without a word, and fails at the first text."""
    text = str(tokenizer.decode(list(range(min(3, len(tokenizer)))))) or "a"
    try:
        tokenizer.decode(tokenizer(text, verbose=True)["input_ids"])
    except Exception as error:
        # A plain Exception comes from the tokenizer itself, over a word that it does not know: of other texts it may
        # know all.
        if type(error) is not Exception:
            raise


def _require_names_within(name: str, directory: Path) -> None:
    """Raises ModelError where the tokenizer's config names a file that is not in its directory."""
    path = directory / CONFIG
    if not path.is_file():
        return
    with border(f"The tokenizer of {name} cannot be read", _MEND, error=ModelError):
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise TypeError(f"{CONFIG} holds a {type(values).__name__}")
        files = values.get("fast_tokenizer_files") or []
        if any("/" in str(file) or "\\" in str(file) for file in files):
            raise ModelError(f"{path} names {files!r} as tokenizers, which are no files beside it. {_MEND}")
