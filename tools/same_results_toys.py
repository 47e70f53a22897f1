"""The models and texts that `same_results.py` measures beside the demo model: one directory, made once and reused.

The models are those of `tests/toys.py`, from fixed seeds, with massive activations planted. Nothing here runs the code
under comparison, save for the masks, whose file is made with the public `WeMask.save` of the tree that comes first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

MADE = "made"
"""The file that says that the directory is complete."""

PLANTED: dict[str, list[tuple[int, int, float]]] = {
    "llama": [(3, 7, 15000.0), (3, 9, -9000.0)],  # pre-norm, gated
    "gemma2": [(2, 7, 10000.0), (4, 7, 10000.0)],  # post-norms, sliding window, capped scores
    "gpt2": [(3, 7, 30000.0)],  # Conv1D, LayerNorm with biases, positions in a table
    "gpt_neox": [(3, 7, 15000.0)],  # attention and FFN in parallel
    "gpt_oss": [(3, 7, 20000.0), (6, 7, -19000.0)],  # experts with biases, sinks of its own; erased later
    "qwen3_next": [(4, 7, 9000.0)],  # linear attention, a shared expert
}
"""For each family the block, the dimension and the value of what is written into token X."""

_MASK = """
import sys
from melayer import WeMask
WeMask(rate=0.5, selector="random", layers=(5, 6)).save(sys.argv[1])
"""


def provide(directory: Path, source: Path) -> None:
    """Makes the directory unless it is there already.

    Args:
        directory: Where to.
        source: The tree whose `WeMask` writes the mask.
    """
    if (directory / MADE).exists():
        return
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _texts(partial)
    _models(partial)
    shutil.copytree(partial / "llama", partial / "llama-masked")
    environment = {**os.environ, "PYTHONPATH": str(source)}
    subprocess.run([sys.executable, "-c", _MASK, str(partial / "llama-masked")], env=environment, check=True)
    (partial / MADE).touch()
    partial.rename(directory)


def _toys() -> Any:
    """The module `tests/toys.py`."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import toys  # type: ignore[import-not-found]  # beside the tests, not the tools

    return toys


def _texts(directory: Path) -> None:
    toys = _toys()
    lines = [toys.text(40, x_at=place, seed=seed) for seed, place in enumerate((0, 0, 3, 0, 17, 7, 0, None))]
    lines[2] = lines[2].rsplit(" ", 1)[0] + " X"  # a second one, far behind the first
    (directory / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    held = [toys.text(40, x_at=0, seed=seed) for seed in range(30, 38)]
    (directory / "calibration.txt").write_text("\n".join(held) + "\n", encoding="utf-8")
    plain = [toys.text(20, x_at=None, seed=seed) for seed in range(50, 54)]
    (directory / "nothing-massive.txt").write_text("\n".join(plain) + "\n", encoding="utf-8")
    rows = [{"text": toys.text(24, x_at=(0, 4, None)[i % 3], seed=70 + i), "kind": "ab"[i % 2]} for i in range(9)]
    broken = ["{not json", json.dumps({"text": ""}), json.dumps({"text": 3})]
    lines = [*map(json.dumps, rows), *broken]
    (directory / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    english = [
        "The sky is clear today and the wind blows softly from the sea.",
        "My favorite color is Dark Blue. The old man walked down to the harbour.",
        "def area(radius):\n    return 3.14159 * radius ** 2",
        "Seventeen plus twenty-five is forty-two, and that is all there is to say.",
    ]
    (directory / "english.txt").write_text("\n".join(line.replace("\n", " ") for line in english), encoding="utf-8")
    documents = [json.dumps({"text": text, "kind": "prose" if i != 2 else "code"}) for i, text in enumerate(english)]
    (directory / "english.jsonl").write_text("\n".join(documents) + "\n", encoding="utf-8")
    (directory / "latin.txt").write_bytes(b"caf\xe9")
    (directory / "words.gguf").write_text("no numbers at all\n", encoding="utf-8")
    (directory / "empty.txt").write_text("", encoding="utf-8")
    (directory / "answers.jsonl").write_text('{"prompt": "w1 w2", "response": "w3"}\n', encoding="utf-8")


def _models(directory: Path) -> None:
    import torch

    toys = _toys()
    for family, writes in PLANTED.items():
        _save(toys.plant(_moved(toys.make(family)), writes), directory / family)
    # What contrast holds the first one to: as training might have left it.
    _save(toys.plant(_moved(toys.make("llama"), seed=2), [(4, 7, 9000.0)]), directory / "llama-after")
    model = toys.plant(_moved(toys.make("llama")), PLANTED["llama"])
    with torch.no_grad():
        toys.blocks(model)[2].mlp.down_proj.weight[0, 0] = float("nan")
    _save(model, directory / "llama-nan")
    _adapter(directory)
    toys.write_gguf(directory / "tiny.gguf")
    toys.write_gguf(directory / "odd.gguf", pre="of-tomorrow")


def _moved(model: Any, seed: int = 1) -> Any:
    """The model with norms and biases that are not 1 and 0, and heads that choose: much is unseen where all is even."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            elif any(part in name for part in ("attn", "attention")):
                parameter *= 4
    return model


def _save(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    _toys().tokenizer().save_pretrained(directory)


def _adapter(directory: Path) -> None:
    """A LoRA adapter for the Llama whose base is not where it was trained."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(directory / "llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    base.name_or_path = config.base_model_name_or_path = "elsewhere/llama"
    _save(get_peft_model(base, config), directory / "llama-adapter")
