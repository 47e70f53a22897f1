"""What a census costs against a plain forward pass, and whether its memory grows with the corpus.

    python benchmarks/scan.py --lengths 512,2048 --repeats 3 [--json]
    python benchmarks/scan.py --documents 10000 [--json]

Each contender runs the same sequences of the demo model, one at a time, in a process of its own. `plain` is the forward
pass alone (one row of logits, as for all others). `block-out`, `all-sites` and `int8` are `melayer.scan`: the residual
stream alone, every site, and every site with what int8 loses of the linear inputs (a second pass); reading the corpus,
tokenising and the conclusions included. `hidden-states` is `output_hidden_states` with the statistics of `block-out`
computed afterwards. Ratios are to the plain pass of the same round; the table shows their medians.

TransformerLens (`run_with_cache`, the statistics of the residual stream afterwards) runs where an environment of its
own has it beside melayer; name its interpreter: --python transformer-lens=env/bin/python

With --documents it runs so many short documents, the forward passes alone and a scan of every site, and prints how far
the resident memory moves from batch to batch, and whether it grows.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("plain", "block-out", "all-sites", "int8", "hidden-states")
OPTIONAL = ("transformer-lens",)
TOKENS = 16384
"""In all sequences together."""
READ_AHEAD = 1900  # documents that are batched together


def run_plain(model: Any, tokenizer: Any, ids: Any, texts: list[str], length: int) -> None:
    """The forward passes alone."""
    for row in ids:
        model(row[None], use_cache=False, logits_to_keep=1)


def _scan(model: Any, tokenizer: Any, texts: list[str], length: int, **options: Any) -> None:
    import melayer

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "corpus.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        result = melayer.scan(
            model, tokenizer, path, max_tokens=length, max_batch_tokens=length, truncate=True, **options
        )
    assert result is not None
    assert result.total.tokens == length * len(texts)


def run_block_out(model: Any, tokenizer: Any, ids: Any, texts: list[str], length: int) -> None:
    """Ours, the residual stream alone."""
    _scan(model, tokenizer, texts, length, sites=["block_out"])


def run_all_sites(model: Any, tokenizer: Any, ids: Any, texts: list[str], length: int) -> None:
    """Ours, every site."""
    _scan(model, tokenizer, texts, length)


def run_int8(model: Any, tokenizer: Any, ids: Any, texts: list[str], length: int) -> None:
    """Ours, with what int8 loses."""
    _scan(model, tokenizer, texts, length, formats=["int8"])


def run_hidden_states(model: Any, tokenizer: Any, ids: Any, texts: list[str], length: int) -> None:
    """All hidden states kept, and the same statistics afterwards."""
    for row in ids:
        out = model(row[None], use_cache=False, logits_to_keep=1, output_hidden_states=True)
        for hidden in out.hidden_states[1:]:
            statistics_of(hidden[0])


def run_transformer_lens(model: Any, tokenizer: Any, ids: Any, texts: list[str], length: int) -> None:
    """TransformerLens' cache of everything, and the statistics of the residual stream afterwards."""
    from transformer_lens.model_bridge import TransformerBridge

    if not hasattr(model, "bridge"):
        vars(model)["bridge"] = TransformerBridge.boot_transformers(
            model.name_or_path, hf_model=model, tokenizer=tokenizer, device="cpu"
        )
    for row in ids:
        _, cache = vars(model)["bridge"].run_with_cache(row[None])
        for layer in range(model.config.num_hidden_layers):
            statistics_of(cache[f"blocks.{layer}.hook_out"][0])


def statistics_of(hidden: Any) -> None:
    """What `block-out` keeps of [tokens, d_model], written as one would on a stored activation."""
    import torch

    x = hidden.float()
    size = x.abs()
    size.argmax()
    size.amax(dim=0)
    median = size.flatten().median()
    (size.amax(dim=1) > torch.clamp(1000 * median, min=100)).sum()
    torch.bincount(size.clamp(min=2.0**-24).log2().add_(24).mul_(64).int().flatten(), minlength=4096)
    for power in (1, 2, 3, 4):
        x.double().pow(power).sum()


def child(contender: str, length: int) -> dict[str, float]:
    """Seconds after a short warm-up, and the peak memory of the process in bytes."""
    import torch
    from transformers.utils import logging

    import melayer
    from melayer.data.texts import builtin_texts

    logging.disable_progress_bar()
    model, tokenizer, _ = melayer.load("demo")
    ids = tokenizer("\n\n".join(builtin_texts()))["input_ids"]
    ids = (ids * (TOKENS // len(ids) + 2))[: TOKENS + TOKENS // length * 8]
    step = length + 8  # decoded and encoded again, a text may have a few tokens less
    texts = [tokenizer.decode(ids[start : start + step]) for start in range(0, TOKENS // length * step, step)]
    rows = torch.tensor([tokenizer(text)["input_ids"][:length] for text in texts])
    run = globals()[f"run_{contender.replace('-', '_')}"]
    with torch.no_grad():
        run(model, tokenizer, rows[:1, :64], texts[:1], 64)
        start = time.perf_counter()
        run(model, tokenizer, rows, texts, length)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def growth(contender: str, documents: int) -> list[float]:
    """The resident memory after each batch of so many documents of about a dozen tokens, in bytes."""
    import melayer
    from melayer.data.rows import batches, encode
    from melayer.model.forward import forward

    model, tokenizer, _ = melayer.load("demo")
    texts = [f"Entry {n}: the {n % 97} of {n % 89} and a {n * 7 % 83}." for n in range(documents)]
    sizes: list[float] = []

    def look(*given: object) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * resource.getpagesize())

    if contender == "plain":
        for start in range(0, documents, READ_AHEAD):
            for batch in batches(encode(tokenizer, texts[start : start + READ_AHEAD], max_tokens=512)):
                forward(model, batch)
                look()
        return sizes
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "corpus.txt"
        path.write_text("".join(f"{text}\n" for text in texts))
        melayer.scan(model, tokenizer, path, store=directory, checkpoint_seconds=10, progress=look)
    return sizes


def flatness(documents: int) -> dict[str, Any]:
    """For the forward passes alone and for a scan, each in its own process, from about 100 documents on."""
    found: dict[str, Any] = {"documents": documents}
    for contender in ("plain", "all-sites"):
        command = [sys.executable, __file__, "--child-growth", contender, str(documents)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        sizes = json.loads(done.stdout.splitlines()[-1])[1:]
        tenth = max(1, len(sizes) // 10)
        found[contender] = {
            "rss_bytes": sizes,
            "max_over_min": max(sizes) / min(sizes),
            "last_over_first_tenth": statistics.median(sizes[-tenth:]) / statistics.median(sizes[:tenth]),
        }
    return found


def measure(contender: str, length: int, python: str = sys.executable) -> dict[str, float] | None:
    """One process; None where it died, for want of memory say."""
    command = [python, __file__, "--child", contender, str(length)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return None if done.returncode else dict(json.loads(done.stdout.splitlines()[-1]))


def compare(lengths: list[int], repeats: int, pythons: dict[str, str]) -> list[dict[str, Any]]:
    """The medians over rounds."""
    contenders = (*CONTENDERS, *pythons)
    results: list[dict[str, Any]] = []
    for length in lengths:
        rounds: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in contenders}
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
                rounds[contender].append((found["seconds"], found["peak_rss_bytes"], time_ratio, memory_ratio))
        keys = ("seconds", "peak_rss_bytes", "time_ratio", "memory_ratio")
        for contender, found_rounds in rounds.items():
            columns = zip(*found_rounds, strict=True)
            values = [statistics.median(column) for column in columns] if found_rounds else [None] * 4
            results.append({"contender": contender, "length": length, **dict(zip(keys, values, strict=True))})
    return results


def main() -> None:
    """Run the rounds, or the growth, and print a table or the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,2048")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--documents", type=int, help="print the memory of a scan of so many")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PYTHON", help="transformer-lens=...")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--child-growth", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child[0], int(given.child[1]))))
        return
    if given.child_growth:
        print(json.dumps(growth(given.child_growth[0], int(given.child_growth[1]))))
        return
    if given.documents:
        found = flatness(given.documents)
        if given.json:
            print(json.dumps(found))
            return
        print(f"{'contender':12} {'smallest MB':>12} {'largest MB':>12} {'ratio':>6} {'last tenth over first':>22}")
        for contender in ("plain", "all-sites"):
            row = found[contender]
            low, high = (f(row["rss_bytes"]) / 1e6 for f in (min, max))
            ratios = f"{row['max_over_min']:6.3f} {row['last_over_first_tenth']:22.3f}"
            print(f"{contender:12} {low:12.0f} {high:12.0f} {ratios}")
        return
    pythons = dict(item.partition("=")[::2] for item in given.python)
    if not set(pythons) <= set(OPTIONAL):
        parser.error(f"--python takes {' or '.join(OPTIONAL)}, each with its interpreter")
    results = compare([int(length) for length in given.lengths.split(",")], given.repeats, pythons)
    if given.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'contender':18} {'T':>5} {'seconds':>8} {'peak MB':>8} {'time':>6} {'memory':>7}")
    for row in results:
        if row["seconds"] is None:
            print(f"{row['contender']:18} {row['length']:5}   did not finish")
            continue
        print(
            f"{row['contender']:18} {row['length']:5} {row['seconds']:8.2f} {row['peak_rss_bytes'] / 1e6:8.0f} "
            f"{row['time_ratio']:6.2f} {row['memory_ratio']:7.2f}"
        )


if __name__ == "__main__":
    main()
