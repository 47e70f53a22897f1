"""The README beside weights that are only part of a model, for those who load them without melayer."""

from __future__ import annotations

from pathlib import Path

from melayer.loading.source import MASK_FILE
from melayer.runs import atomic

CARD = "README.md"
_OURS = "<!-- Written by melayer, which writes it again as long as this line stands here. -->"


def holds_weights(directory: Path) -> bool:
    """Whether there is a model or an adapter in the directory."""
    return any((directory / name).is_file() for name in ("config.json", "adapter_config.json"))


def may_write(directory: Path) -> bool:
    """Whether there is no card in the directory, or one of ours."""
    try:
        return _OURS in (directory / CARD).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True
    except OSError:
        return False


def write(directory: Path, what: str, *, made: str = "", adapter: bool = False) -> None:
    """Writes the card, if there is none that others wrote.

    Args:
        directory: Where the weights and the mask are.
        what: The mask in a few words.
        made: How the weights were made, a sentence.
        adapter: Whether they are an adapter's.

    Raises:
        OSError: It cannot be written.
    """
    if may_write(directory):
        atomic.write_text(directory / CARD, text(what, made=made, adapter=adapter))


def text(what: str, *, made: str = "", adapter: bool = False) -> str:
    """The card."""
    plain = "PeftModel.from_pretrained" if adapter else "AutoModelForCausalLM.from_pretrained"
    library = "peft" if adapter else "transformers"
    return f"""---
library_name: {library}
tags: [melayer]
---
{_OURS}

# This model runs under a mask

{made + " " if made else ""}The weights are only one part of it: `{MASK_FILE}` holds a mask ({what}) that relaxes the
massive token where attention reads it. **`{plain}` loads the weights without the mask**, without a word, and so does
every program that takes the weights alone: the answers are then those of another model. This loads both:

```python
# pip install melayer
import melayer

model, tokenizer, mask = melayer.load("path/or/id")  # mask=False leaves the mask out
```

`melayer eval path/or/id ...` and all other commands of melayer do so by themselves. To put the mask on a model that is
loaded already: `melayer.WeMask.load("path/or/id").attach(model)`.
"""
