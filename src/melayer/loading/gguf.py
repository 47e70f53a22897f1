"""A GGUF file, converted once to a safetensors directory in the user's cache.

transformers reads a GGUF file in 20 to 40 seconds (it parses the header's strings in Python and dequantises in
numpy); the converted directory loads in about one. An entry is keyed by the file's sha256, written under a
temporary name, and renamed when it is whole, so that a kill or a full disk never leaves one that could be used.
Its checksums are verified each time that it is read.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import struct
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from melayer.errors import MelayerWarning, ModelError, border
from melayer.loading.reading import reading
from melayer.runs import records
from melayer.runs.atomic import staged_directory
from melayer.runs.cache import cache_directory, sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "melayer-cache.json"
# Part of the key: raise it when the conversion changes, so that entries of an older melayer are not read.
FORMAT = 2
_AGAIN = "Download it again."
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class Manifest:
    """What an entry of the cache says of itself. In a directory that is not of the cache it says nothing."""

    format: int
    source: str
    """The name of the GGUF file."""
    source_sha256: str
    files: dict[str, str]
    """The sha256 of each file of the entry."""
    notes: tuple[str, ...] = ()
    """What is to be said each time that the entry is read."""


def convert(path: Path, *, cache: Path | None = None) -> Path:
    """The directory that holds `path` as safetensors, made now if it is not in the cache yet.

    Safe to call from several processes at once: one converts, the others wait and read.

    Args:
        path: A `.gguf` file.
        cache: The cache's root; `cache_directory()` by default.

    Returns:
        A directory that `from_pretrained` reads: config, float32 weights and tokenizer.

    Raises:
        ModelError: The file is not a whole GGUF file, transformers cannot read it, or the cache cannot be written.

    Warns:
        MelayerWarning: The conversion is not quite the original.
    """
    return converted(path, cache=cache)[0]


def converted(path: Path, *, cache: Path | None = None) -> tuple[Path, str]:
    """What `convert` returns, and the sha256 of `path`."""
    from filelock import FileLock

    with border(f"{path} cannot be read", "Give a .gguf file that you may read.", error=ModelError):
        check_gguf(path)
        source = sha256_of(path)
    root = (cache or cache_directory()) / "gguf"
    entry = root / f"{source[:32]}-{FORMAT}"
    try:
        if not is_whole(entry):
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f"{entry.name}.lock"):
                if not is_whole(entry):
                    _convert_locked(path, source, root, entry)
    except OSError as error:
        raise ModelError(
            f"The conversion of {path.name} could not be written to the cache {root}: {error}. "
            "Free some space or name another directory in the environment variable MELAYER_CACHE."
        ) from error
    for note in _manifest(entry).notes:
        warnings.warn(note, MelayerWarning, stacklevel=2)
    return entry, source


def _convert_locked(path: Path, source: str, root: Path, entry: Path) -> None:
    # Left by a process that was killed; nobody else can be writing here while we hold the lock.
    for left in root.glob(f"{entry.name}.*.tmp"):
        shutil.rmtree(left)
    if entry.exists():
        if entry.is_symlink() or not (entry / MANIFEST).is_file():
            raise ModelError(
                f"{entry}, where the conversion of {path.name} belongs, was not written by melayer, so it is left as "
                "it is. Move it away, or name another directory in the environment variable MELAYER_CACHE."
            )
        shutil.rmtree(entry)  # an entry of ours, which is damaged
    with staged_directory(entry) as working:
        _write_entry(path, source, working)


def is_whole(entry: Path) -> bool:
    """Whether an entry of the cache holds every file of its manifest, byte for byte."""
    try:
        manifest = _manifest(entry)
        named = f"{manifest.source_sha256[:32]}-{manifest.format}" == entry.name
        return bool(manifest.files) and named and all(sha256_of(entry / n) == d for n, d in manifest.files.items())
    except (OSError, ValueError, ModelError):
        # Absent, unreadable or damaged: in each case the answer is to convert again.
        return False


def source_sha256(entry: Path) -> str:
    """The sha256 of the GGUF file that an entry of the cache was converted from."""
    return _manifest(entry).source_sha256


def _manifest(entry: Path) -> Manifest:
    path = entry / MANIFEST
    return records.read(path, Manifest, f"{path} is damaged", "Remove its directory.", ModelError)


class _Header(NamedTuple):
    """What of a header is needed before a file is read."""

    end: int
    """The byte where the last tensor ends."""
    n_tensors: int
    n_parts: int
    """Of how many files the model is."""
    n_blocks: int


def check_gguf(path: Path) -> None:
    """Raise ModelError unless `path` is a GGUF file that holds all the tensors its header lists, of a whole model."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}, a GGUF file with b'GGUF'. {_AGAIN}")
    size = path.stat().st_size
    with border(f"{path} is damaged: its header or its tensors cannot be read", _AGAIN, error=ModelError):
        header = _read_header(path)
    named = _PART.search(path.name)
    n_parts = max(header.n_parts, int(named[2]) if named else 1)
    if n_parts > 1:
        raise ModelError(
            f"{path} is one of the {n_parts} parts of a model, and the weights in the others would be missing. "
            "Give the model as one file (llama.cpp's gguf-split joins parts), or the safetensors checkpoint."
        )
    if header.end > size:
        raise ModelError(
            f"{path} is cut off: its header lists tensors up to byte {header.end:,}, the file has {size:,}. {_AGAIN}"
        )
    if header.n_blocks > header.n_tensors:
        raise ModelError(
            f"{path} says that the model has {header.n_blocks:,} blocks, and holds {header.n_tensors:,} tensors, less "
            f"than one for each. {_AGAIN}"
        )


def _read_header(path: Path) -> _Header:
    """What is needed, from the header alone.

    gguf's own reader parses every string of the vocabulary into numpy arrays (seconds) and maps each tensor,
    which fails on a cut-off file with a message about shapes; the few fields needed here are read directly.
    """
    import gguf

    with path.open("rb") as file:
        header = _HeaderReader(file, path.stat().st_size)
        file.seek(4)
        version = header.number("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}, expected 2 or 3")
        n_tensors, n_fields = header.number("<Q"), header.number("<Q")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = header.string()
            fields[key] = header.value(header.number("<I"))
        extents = []
        for _ in range(n_tensors):
            header.string()
            n_dims = header.number("<I")
            if n_dims > 4:
                raise ValueError(f"a tensor of {n_dims} dimensions, expected at most 4")
            shape = [header.number("<Q") for _ in range(n_dims)]
            kind = gguf.GGMLQuantizationType(header.number("<I"))
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            n_elements = 1
            for length in shape:
                n_elements *= length
            extents.append(header.number("<Q") + n_elements // block * block_bytes)
        alignment = int(fields.get("general.alignment", 32))
        if alignment < 1:
            raise ValueError(f"an alignment of {alignment}")
        start = -(-file.tell() // alignment) * alignment
    blocks = [int(value) for key, value in fields.items() if key.endswith(".block_count")]
    n_parts = int(fields.get("split.count", 1))
    return _Header(start + max(extents, default=0), n_tensors, n_parts, max(blocks, default=0))


# Value types of the GGUF specification; 8 is a string and 9 an array.
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}


class _HeaderReader:
    """The scalar, string and array encodings of a GGUF header, little-endian."""

    def __init__(self, file: Any, size: int) -> None:
        self.file = file
        self.size = size

    def number(self, code: str) -> int:
        return struct.unpack(code, self.file.read(struct.calcsize(code)))[0]  # type: ignore[no-any-return]

    def skip(self, n_bytes: int) -> None:
        if self.file.tell() + n_bytes > self.size:
            raise ValueError("the header runs past the end of the file")
        self.file.seek(n_bytes, os.SEEK_CUR)

    def string(self) -> str:
        length = self.number("<Q")
        if self.file.tell() + length > self.size:
            raise ValueError("the header runs past the end of the file")
        return self.file.read(length).decode("utf-8", errors="replace")  # type: ignore[no-any-return]

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == 8:
            return self.string()
        if kind != 9:
            raise ValueError(f"unknown value type {kind} in the header")
        inner, length = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[inner]))
        else:
            for _ in range(length):
                self.value(inner)
        return None


def _write_entry(path: Path, source: str, directory: Path) -> None:
    import safetensors

    # Some releases of the writer report a full disk as SafetensorError rather than as OSError.
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", MelayerWarning)
            model, tokenizer = _read_gguf(path, directory / "source")
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    files = sorted(file for file in directory.iterdir() if file.is_file())
    notes = tuple(str(warning.message) for warning in said if issubclass(warning.category, MelayerWarning))
    manifest = Manifest(FORMAT, path.name, source, {file.name: sha256_of(file) for file in files}, notes)
    (directory / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")


def _read_gguf(path: Path, alone: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What transformers makes of a GGUF file.

    Args:
        path: The file.
        alone: A directory to read it in, where there is nothing else: of a config, an adapter or a tokenizer beside
            it, transformers would take parts. It is gone afterwards.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        # Newer releases leave the weights packed where a kernel for them is installed; older ones always unpack.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    todo = "Use a safetensors checkpoint of the same model."
    alone.mkdir()
    link = alone / path.name
    link.symlink_to(path.resolve())
    with reading(str(path), "GGUF file", todo):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            alone, trust_remote_code=False, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name, trust_remote_code=False)
    link.unlink()
    alone.rmdir()
    quantised, info = loaded
    _require_complete(path, info["missing_keys"])
    if unused := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"{path.name} holds {len(unused)} weights that transformers has no place for and leaves out (the first is "
            f"{unused[0]}).",
            MelayerWarning,
            stacklevel=2,
        )
    mend_pre_tokenizer(tokenizer, _pre_tokenizer_name(path))
    return _without_quantisation(quantised), tokenizer


def _require_complete(path: Path, missing_keys: Iterable[str]) -> None:
    missing = sorted(missing_keys)
    if missing:
        # transformers fills these with random numbers and goes on; a measurement must not.
        raise ModelError(
            f"{path} lacks {len(missing)} of the weights that its model needs (the first is {missing[0]}), and they "
            "would be random. Give the whole model."
        )


def _without_quantisation(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not count as quantised, which `save_pretrained` would refuse."""
    import torch

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _pre_tokenizer_name(path: Path) -> str | None:
    """The header's `tokenizer.ggml.pre`: how the text was split before the merges were learned."""
    with path.open("rb") as file:
        header = _HeaderReader(file, path.stat().st_size)
        file.seek(8)
        header.number("<Q")
        for _ in range(header.number("<Q")):
            key = header.string()
            value = header.value(header.number("<I"))
            if key == "tokenizer.ggml.pre":
                return str(value)
    return None


def mend_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, pre: str | None) -> None:
    """Restore, in place, the split that transformers drops, so that ids are those of the original model.

    SmolLM splits every digit from its neighbours before the byte-level split; without that, numbers and
    a digit behind a blank line get other ids. A name that neither transformers nor we know is said aloud.

    Args:
        tokenizer: A tokenizer read from a GGUF file.
        pre: The file's `tokenizer.ggml.pre`.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    if pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif pre not in (None, "default", "gpt-2"):
        warnings.warn(
            f"The GGUF file names the pre-tokenizer {pre!r}, which transformers replaces by GPT-2's: some ids may "
            "differ from the original model's. Use the original tokenizer where that matters.",
            MelayerWarning,
            stacklevel=2,
        )
