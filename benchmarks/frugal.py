"""What `locate_frugal` costs on a checkpoint of a given shape, against reading its files once.

    python benchmarks/frugal.py --shape 7b --lengths 32 --repeats 4 [--json]

Writes a Llama checkpoint with random weights in bfloat16 (13.5 GB for 7b) and a massive activation planted in it, under
--dir (default: where temporary files go), and deletes it afterwards. Contenders, each in a process of its own:

- read: the files once, front to back, into a buffer of 16 MB. Time ratios are to it.
- frugal: `melayer.locate_frugal`, from the name of the directory to the result.
- stop-early: the same, stopped when the ME layer is certain.
- whole: `melayer.load` and `melayer.locate`, where the weights fit into the memory that there is.

Before each, the files are dropped from the page cache (--warm leaves them there). Eight texts of the given length run.
Memory ratios are to the size of the checkpoint. A wrong ME layer, place or dimension ends the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTENDERS = ("read", "frugal", "stop-early", "whole")
LAYER, DIM, VALUE = 2, 7, 4000.0
"""The activation planted: written by this block into this dimension of the first token."""
_LISTEN, _NEURON, _WEIGHT = 13, 5, 3.0
_BOS = 1


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    vocabulary: int

    @property
    def n_bytes(self) -> int:
        """Of its checkpoint, in bfloat16."""
        block = 4 * self.d_model**2 + 3 * self.d_model * self.d_ff + 2 * self.d_model
        return 2 * (self.n_layers * block + 2 * self.vocabulary * self.d_model + self.d_model)


SHAPES = {
    "tiny": Shape(8, 64, 96, 4, 200),
    "1b": Shape(16, 2048, 5632, 16, 32000),
    "7b": Shape(32, 4096, 11008, 32, 32000),
}


def write(directory: Path, shape: Shape) -> None:
    """The checkpoint with its tokenizer; no more than one block is in memory at once."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.01, generator=generator)

    weight_map: dict[str, str] = {}

    def save(place: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{place + 1:05d}-of-{shape.n_layers + 2:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    def table() -> torch.Tensor:
        rows = random(shape.vocabulary, shape.d_model)
        rows[:, [_LISTEN, DIM]] = 0
        return rows

    embedding = table()
    embedding[_BOS, _LISTEN] = 80.0  # large, but not massive
    save(0, {"model.embed_tokens.weight": embedding})
    for layer in range(shape.n_layers):
        block = {f"self_attn.{name}_proj.weight": random(shape.d_model, shape.d_model) for name in "qkvo"}
        block |= {f"mlp.{name}_proj.weight": random(shape.d_ff, shape.d_model) for name in ("gate", "up")}
        block["mlp.down_proj.weight"] = random(shape.d_model, shape.d_ff)
        for name in ("input_layernorm", "post_attention_layernorm"):
            block[f"{name}.weight"] = torch.ones(shape.d_model, dtype=torch.bfloat16)
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            block[name][[_LISTEN, DIM]] = 0
        if layer == LAYER:
            for name in ("gate", "up"):
                block[f"mlp.{name}_proj.weight"][_NEURON] = 0
                block[f"mlp.{name}_proj.weight"][_NEURON, _LISTEN] = _WEIGHT
            # The first token is almost all _LISTEN, which the norm brings to the root of d_model.
            block["mlp.down_proj.weight"][DIM, _NEURON] = VALUE / (_WEIGHT**2 * shape.d_model)
        save(layer + 1, {f"model.layers.{layer}.{name}": tensor for name, tensor in block.items()})
    norm = torch.ones(shape.d_model, dtype=torch.bfloat16)
    save(shape.n_layers + 1, {"model.norm.weight": norm, "lm_head.weight": table()})
    index = {"metadata": {"total_size": shape.n_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        bos_token_id=_BOS,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(directory)
    vocabulary = {"<unk>": 0, "<s>": _BOS, "</s>": 2} | {f"w{i}": i for i in range(3, shape.vocabulary)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def files_of(directory: Path) -> list[Path]:
    """The files with the weights, in their order."""
    return sorted(directory.glob("*.safetensors"))


def drop_from_cache(directory: Path) -> None:
    """The next to read the weights reads them from the disk; where the system cannot be told, nothing happens."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files_of(directory):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(contender: str, directory: Path, length: int) -> dict[str, float]:
    """Seconds, without imports, and the peak memory of the process in bytes."""
    seconds = _read(directory) if contender == "read" else _locate(contender, directory, length)
    return {"seconds": seconds, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _read(directory: Path) -> float:
    buffer = memoryview(bytearray(16 << 20))
    start = time.perf_counter()
    for file in files_of(directory):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def _locate(contender: str, directory: Path, length: int) -> float:
    # Imported by name: what is loaded lazily would else be loaded, and timed, where it is first used.
    import accelerate  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401
    from transformers.utils import logging

    import melayer
    import melayer.measurements.locate.frugal

    logging.disable_progress_bar()
    words = [[f"w{3 + (17 * text + 31 * place) % 190}" for place in range(length - 1)] for text in range(8)]
    options: dict[str, Any] = {"texts": [" ".join(text) for text in words], "max_tokens": length, "bos": True}
    start = time.perf_counter()
    if contender == "whole":
        loaded = melayer.load(str(directory))
        result = melayer.locate(loaded.model, loaded.tokenizer, **options)
    else:
        result = melayer.locate_frugal(str(directory), stop_early=contender == "stop-early", **options)
    seconds = time.perf_counter() - start
    assert result.me_layer == LAYER, result.sentence
    row = result.blocks[LAYER]
    assert (row.token_index, row.dim) == (0, DIM), result.sentence
    assert row.max_abs is not None
    # What blocks before it write beside _LISTEN takes a part of the norm, and so of the value.
    assert 0.5 < row.max_abs / VALUE < 1.05, result.sentence
    assert result.complete == (contender != "stop-early"), result.sentence
    return seconds


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    with Path("/proc/meminfo").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def measure(contender: str, directory: Path, length: int, shape: Shape, *, warm: bool) -> dict[str, float] | None:
    """One process; None where the contender needs more memory than there is."""
    if contender == "whole" and shape.n_bytes > 0.8 * available_bytes():
        return None
    if not warm:
        drop_from_cache(directory)
    command = [sys.executable, __file__, "--child", contender, str(directory), str(length)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(directory: Path, shape: Shape, lengths: list[int], repeats: int, *, warm: bool) -> list[dict[str, Any]]:
    """The medians over the rounds."""
    results: list[dict[str, Any]] = []
    keys = ("seconds", "peak_rss_bytes", "time_ratio", "memory_ratio")
    for length in lengths:
        rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in CONTENDERS}
        for turn in range(repeats):
            # Another order each round: a disk behind a virtual machine may remember what was read just before.
            order = CONTENDERS[turn % 4 :] + CONTENDERS[: turn % 4]
            found = {}
            for contender in order:
                sys.stderr.write(f"{length} tokens, round {turn + 1} of {repeats}: {contender}\n")
                found[contender] = measure(contender, directory, length, shape, warm=warm)
                sys.stderr.write(f"{found[contender]}\n")
            read = found["read"]
            assert read is not None
            for contender, values in found.items():
                if values is not None:
                    seconds, memory = values["seconds"], values["peak_rss_bytes"]
                    rounds[contender].append((seconds, memory, seconds / read["seconds"], memory / shape.n_bytes))
        for contender, rows in rounds.items():
            medians = [statistics.median(column) for column in zip(*rows, strict=True)] if rows else [None] * 4
            results.append({"contender": contender, "length": length, **dict(zip(keys, medians, strict=True))})
    return results


def _stopped(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Write the checkpoint, run the rounds, delete it, and print the table or the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--lengths", default="32")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--dir", type=Path, help="where to write the checkpoint")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child[0], Path(given.child[1]), int(given.child[2]))))
        return
    if given.write:
        write(Path(given.write), SHAPES[given.shape])
        return
    shape = SHAPES[given.shape]
    place = given.dir or Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    if free < 1.1 * shape.n_bytes:
        parser.error(f"{place} has {free / 1e9:.1f} GB left, and the checkpoint takes {shape.n_bytes / 1e9:.1f} GB")
    # An interrupt unwinds by itself; a termination must too, or gigabytes stay behind.
    signal.signal(signal.SIGTERM, _stopped)
    with tempfile.TemporaryDirectory(dir=place, prefix="melayer-frugal-") as temporary:
        sys.stderr.write(f"Writing {shape.n_bytes / 1e9:.1f} GB to {temporary}\n")
        # In a process of its own: a child's peak counts what its parent had in memory when it was started.
        subprocess.run([sys.executable, __file__, "--shape", given.shape, "--write", temporary], check=True)
        lengths = [int(length) for length in given.lengths.split(",")]
        results = compare(Path(temporary), shape, lengths, given.repeats, warm=given.warm)
    if given.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{'contender':12} {'tokens':>6} {'seconds':>8} {'peak MB':>8} {'time':>6} {'memory':>7}")
    for row in results:
        if row["seconds"] is None:
            print(f"{row['contender']:12} {row['length']:6}   not run: needs more memory than this machine has")
            continue
        print(
            f"{row['contender']:12} {row['length']:6} {row['seconds']:8.2f} {row['peak_rss_bytes'] / 1e6:8.0f} "
            f"{row['time_ratio']:6.2f} {row['memory_ratio']:7.3f}"
        )


if __name__ == "__main__":
    main()
