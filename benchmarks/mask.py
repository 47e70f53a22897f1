"""What WeMask costs while decoding: under hooks, and from a baked prefix, against the plain model.

    python benchmarks/mask.py --lengths 128 --new-tokens 128 --repeats 3 [--json]

Each contender decodes greedily after the same prompt in a process of its own; the prompt's pass counts too, and for
`baked` the prefix (the prompt's first token) was computed beforehand. Ratios are to the plain model of the same round;
the table shows their medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

CONTENDERS = ("plain", "hooks", "baked")


def child(contender: str, length: int, new_tokens: int) -> dict[str, float]:
    """Seconds of the fastest of three runs after a short one, and the peak memory of the process in bytes."""
    import torch
    from transformers.utils import logging

    import melayer
    from melayer.data.texts import builtin_texts

    logging.disable_progress_bar()
    model, tokenizer, _ = melayer.load("demo")
    mask = melayer.WeMask(rate=0.5, layers=tuple(range(12, 30)))
    text = "\n\n".join(builtin_texts())
    ids = torch.tensor([tokenizer(text)["input_ids"][:length]])
    assert ids.shape[1] == length
    cache = mask.bake(model, ids[0, :1]) if contender == "baked" else None
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def run(count: int) -> None:
        given = {} if cache is None else {"past_key_values": copy.deepcopy(cache)}
        generate: Any = model.generate
        out = generate(ids, **options, **given, min_new_tokens=count, max_new_tokens=count)
        assert out.shape[1] == length + count

    with mask.apply(model) if contender == "hooks" else nullcontext():
        run(4)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            run(new_tokens)
            seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure(contender: str, length: int, new_tokens: int) -> dict[str, float]:
    """One process."""
    command = [sys.executable, __file__, "--child", contender, str(length), str(new_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run the rounds and print the table or the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="128")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child[0], int(given.child[1]), int(given.child[2]))))
        return
    results = []
    for length in map(int, given.lengths.split(",")):
        rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in CONTENDERS}
        for turn in range(given.repeats):
            # Another order each round, so that no contender always runs on a warmer machine.
            order = CONTENDERS[turn % 3 :] + CONTENDERS[: turn % 3]
            found = {}
            for contender in order:
                sys.stderr.write(f"prompt of {length}, round {turn + 1} of {given.repeats}: {contender}\n")
                found[contender] = measure(contender, length, given.new_tokens)
            plain = found["plain"]
            for contender, values in found.items():
                seconds, memory = values["seconds"], values["peak_rss_bytes"]
                ratios = (seconds / plain["seconds"], memory / plain["peak_rss_bytes"])
                rounds[contender].append((seconds, memory, *ratios))
        for contender, rows in rounds.items():
            keys = ("seconds", "peak_rss_bytes", "time_ratio", "memory_ratio")
            medians = [statistics.median(column) for column in zip(*rows, strict=True)]
            results.append({"contender": contender, "length": length, **dict(zip(keys, medians, strict=True))})
    if given.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'contender':10} {'prompt':>6} {'seconds':>8} {'peak MB':>8} {'time':>6} {'memory':>7}")
    for row in results:
        print(
            f"{row['contender']:10} {row['length']:6} {row['seconds']:8.2f} {row['peak_rss_bytes'] / 1e6:8.0f} "
            f"{row['time_ratio']:6.3f} {row['memory_ratio']:7.2f}"
        )


if __name__ == "__main__":
    main()
