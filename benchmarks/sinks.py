"""What the sinks of key 0 and the statistics of every block cost, against a plain forward pass.

    python benchmarks/sinks.py --lengths 512,2048,4096 --repeats 3 [--json]

Each contender does the same job on the same tokens in a process of its own: the largest |h| with its place and the
median by block, and the mean attention that key 0 draws by block and head. `plain` is the forward pass alone (SDPA,
one row of logits, as for all others). Ratios are to the plain pass of the same round; the table shows their medians.

nnsight and TransformerLens run where an environment of their own has them beside melayer; name its interpreter:

    python benchmarks/sinks.py --python nnsight=env/bin/python --python transformer-lens=env/bin/python
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("plain", "melayer", "hidden-states", "eager-attentions")
OPTIONAL = ("nnsight", "transformer-lens")
EAGER = ("eager-attentions", *OPTIONAL)


def run_plain(model: Any, tokenizer: Any, ids: Any, text: str) -> None:
    """The forward pass alone."""
    model(ids, use_cache=False, logits_to_keep=1)


def run_melayer(model: Any, tokenizer: Any, ids: Any, text: str) -> None:
    """Ours, through the public function: tokenising, reading the architecture and the conclusions included."""
    import melayer

    melayer.sinks(model, tokenizer, T=ids.shape[1], texts=[text])


def run_hidden_states(model: Any, tokenizer: Any, ids: Any, text: str) -> None:
    """`output_hidden_states` and the same statistics afterwards; no sinks."""
    _summarise(model(ids, use_cache=False, logits_to_keep=1, output_hidden_states=True).hidden_states)


def run_eager_attentions(model: Any, tokenizer: Any, ids: Any, text: str) -> None:
    """Eager attention with `output_attentions` and `output_hidden_states`: the usual way to see sinks."""
    out = model(ids, use_cache=False, logits_to_keep=1, output_hidden_states=True, output_attentions=True)
    _summarise(out.hidden_states)
    for attention in out.attentions:
        attention[0, :, :, 0].mean(dim=-1)


def run_nnsight(model: Any, tokenizer: Any, ids: Any, text: str) -> None:
    """nnsight on eager attention; each block is summarised as it comes, and only summaries are saved."""
    from nnsight import LanguageModel

    wrapped = LanguageModel(model, tokenizer=tokenizer)
    with wrapped.trace(ids, use_cache=False, logits_to_keep=1):
        found = list().save()  # type: ignore[attr-defined]  # noqa: C408 - nnsight gives lists a `save`
        for block in wrapped.model.layers:
            drawn = block.self_attn.output[1][0, :, :, 0].mean(dim=-1)
            magnitude = block.output.abs()
            found.append((drawn, magnitude.argmax(), magnitude.max(), magnitude.flatten().median()))
    assert len(found) == len(model.model.layers)


def run_transformer_lens(model: Any, tokenizer: Any, ids: Any, text: str) -> None:
    """TransformerLens' bridge on the same model with hooks that keep summaries only."""
    from transformer_lens.model_bridge import TransformerBridge

    if not hasattr(model, "bridge"):
        vars(model)["bridge"] = TransformerBridge.boot_transformers(
            model.name_or_path, hf_model=model, tokenizer=tokenizer, device="cpu"
        )
    seen = []

    def pattern(value: Any, hook: Any) -> None:
        seen.append(value[0, :, :, 0].mean(dim=-1))

    def block_out(value: Any, hook: Any) -> None:
        _summarise([value])

    hooks = []
    for layer in range(model.config.num_hidden_layers):
        hooks += [(f"blocks.{layer}.attn.hook_pattern", pattern), (f"blocks.{layer}.hook_out", block_out)]
    vars(model)["bridge"].run_with_hooks(ids, fwd_hooks=hooks)
    assert len(seen) == model.config.num_hidden_layers


def _summarise(hidden_states: Any) -> None:
    for hidden in hidden_states:
        magnitude = hidden[0].abs()
        magnitude.argmax()
        magnitude.max()
        magnitude.flatten().median()


def child(contender: str, length: int) -> dict[str, float]:
    """Seconds of the second of two passes, and the peak memory of the process in bytes."""
    import torch
    from transformers.utils import logging

    import melayer
    from melayer.data.texts import builtin_texts

    logging.disable_progress_bar()
    model, tokenizer, _ = melayer.load("demo")
    if contender in EAGER:
        model.set_attn_implementation("eager")
    text = "\n\n".join(builtin_texts())
    while len(ids := tokenizer(text)["input_ids"]) < length:
        text = f"{text}\n\n{text}"
    # Cut the text so that it has exactly the tokens wanted, for every contender.
    text = str(tokenizer.decode(ids[:length]))
    while len(kept := tokenizer(text)["input_ids"]) < length:
        text += " and"
    tokens = torch.tensor([kept[:length]])
    run = globals()[f"run_{contender.replace('-', '_')}"]
    with torch.no_grad():
        run(model, tokenizer, tokens[:, :64], tokenizer.decode(kept[:80]))
        start = time.perf_counter()
        run(model, tokenizer, tokens, text)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    with Path("/proc/meminfo").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def needed_bytes(contender: str, length: int) -> int:
    """A lower bound on what a contender keeps at once, on the demo model (30 blocks of 9 heads, float32)."""
    return 30 * 9 * length**2 * 4 if contender == "eager-attentions" else 0


def measure(contender: str, length: int, python: str = sys.executable) -> dict[str, float] | None:
    """One process; None where the contender needs more memory than there is, or died."""
    if needed_bytes(contender, length) > 0.8 * available_bytes():
        return None
    command = [python, __file__, "--child", contender, str(length)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return None
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rounds_of(length: int, repeats: int, pythons: dict[str, str]) -> dict[str, list[tuple[float, ...]]]:
    """For each contender the seconds, bytes and ratios to the plain forward of the same round, of every round."""
    contenders = (*CONTENDERS, *pythons)
    ratios: dict[str, list[tuple[float, ...]]] = {name: [] for name in contenders}
    for turn in range(repeats):
        plain: dict[str, float] | None = None
        for contender in contenders:
            sys.stderr.write(f"T = {length}, round {turn + 1} of {repeats}: {contender}\n")
            found = measure(contender, length, pythons.get(contender, sys.executable))
            plain = found if contender == "plain" else plain
            if found is None or plain is None:
                continue
            time_ratio = found["seconds"] / plain["seconds"]
            memory_ratio = found["peak_rss_bytes"] / plain["peak_rss_bytes"]
            ratios[contender].append((found["seconds"], found["peak_rss_bytes"], time_ratio, memory_ratio))
    return ratios


def main() -> None:
    """Run the rounds and print the table or the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,2048,4096")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PYTHON", help="nnsight=... and so on")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child[0], int(given.child[1]))))
        return
    pythons = dict(item.partition("=")[::2] for item in given.python)
    if not set(pythons) <= set(OPTIONAL):
        parser.error(f"--python takes {' or '.join(OPTIONAL)}, each with its interpreter")
    results: list[dict[str, Any]] = []
    for length in map(int, given.lengths.split(",")):
        ratios = rounds_of(length, given.repeats, pythons)
        for contender, rounds in ratios.items():
            values = [statistics.median(column) for column in zip(*rounds, strict=True)] if rounds else [None] * 4
            keys = ("seconds", "peak_rss_bytes", "time_ratio", "memory_ratio")
            results.append({"contender": contender, "length": length, **dict(zip(keys, values, strict=True))})
    if given.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'contender':18} {'T':>5} {'seconds':>8} {'peak MB':>8} {'time':>6} {'memory':>7}")
    for row in results:
        if row["seconds"] is None:
            print(f"{row['contender']:18} {row['length']:5}   not run: needs more memory than this machine has")
            continue
        print(
            f"{row['contender']:18} {row['length']:5} {row['seconds']:8.2f} {row['peak_rss_bytes'] / 1e6:8.0f} "
            f"{row['time_ratio']:6.2f} {row['memory_ratio']:7.2f}"
        )


if __name__ == "__main__":
    main()
