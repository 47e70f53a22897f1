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
import shutil
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.errors import MelayerWarning, ModelError
from melayer.runs.atomic import staged_directory
from melayer.runs.cache import cache_directory, sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "melayer-cache.json"
# Part of the key: raise it when the conversion changes, so that entries of an older melayer are not read.
FORMAT = 1
# What transformers, gguf and numpy raise on a file that is not what its header says.
_CORRUPT = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RuntimeError,
    struct.error,
    OverflowError,
)


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
    """
    from filelock import FileLock

    check_gguf(path)
    source = sha256_of(path)
    root = (cache or cache_directory()) / "gguf"
    entry = root / f"{source[:32]}-{FORMAT}"
    if is_whole(entry):
        return entry
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{entry.name}.lock"):
            if is_whole(entry):
                return entry
            # Left by a process that was killed; nobody else can be writing here while we hold the lock.
            for left in root.glob(f"{entry.name}.*.tmp"):
                shutil.rmtree(left)
            if entry.exists():
                shutil.rmtree(entry)
            with staged_directory(entry) as working:
                _write_entry(path, source, working)
    except OSError as error:
        raise ModelError(
            f"The conversion of {path.name} could not be written to the cache {root}: {error}. "
            "Free some space or name another directory in the environment variable MELAYER_CACHE."
        ) from error
    return entry


def is_whole(entry: Path) -> bool:
    """Whether an entry of the cache holds every file of its manifest, byte for byte."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        return all(sha256_of(entry / name) == digest for name, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Absent, unreadable or damaged: in each case the answer is to convert again.
        return False


def source_sha256(directory: Path) -> str | None:
    """The sha256 of the GGUF file that a directory was converted from; None if it was not converted by us."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return None
    return str(json.loads(manifest.read_text(encoding="utf-8"))["source_sha256"])


def check_gguf(path: Path) -> None:
    """Raise ModelError unless `path` is a GGUF file that holds all the tensors its header lists."""
    import gguf

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"{path} is not a GGUF file: it starts with {magic!r}, a GGUF file with b'GGUF'. Download it again."
        )
    size = path.stat().st_size
    try:
        end = _end_of_tensors(gguf, path)
    except _CORRUPT as error:
        raise ModelError(
            f"{path} is damaged: its header or its tensors cannot be read ({error}). Download it again."
        ) from error
    if end > size:
        raise ModelError(
            f"{path} is cut off: its header lists tensors up to byte {end:,}, the file has {size:,}. Download it again."
        )


def _end_of_tensors(gguf: Any, path: Path) -> int:
    """The byte where the last tensor ends, from the header alone.

    gguf's own reader parses every string of the vocabulary into numpy arrays (seconds) and maps each tensor,
    which fails on a cut-off file with a message about shapes; the few fields needed here are read directly.
    """
    with path.open("rb") as file:
        header = _HeaderReader(file, path.stat().st_size)
        file.seek(4)
        version = header.number("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}, expected 2 or 3")
        n_tensors, n_fields = header.number("<Q"), header.number("<Q")
        alignment = 32
        for _ in range(n_fields):
            key = header.string()
            value = header.value(header.number("<I"))
            if key == "general.alignment":
                alignment = int(value)
        extents = []
        for _ in range(n_tensors):
            header.string()
            shape = [header.number("<Q") for _ in range(header.number("<I"))]
            kind = gguf.GGMLQuantizationType(header.number("<I"))
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            n_elements = 1
            for length in shape:
                n_elements *= length
            extents.append(header.number("<Q") + n_elements // block * block_bytes)
        start = -(-file.tell() // alignment) * alignment
    return start + max(extents, default=0)


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
        model, tokenizer = _read_gguf(path)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    files = sorted(file for file in directory.iterdir() if file.is_file())
    manifest = {
        "format": FORMAT,
        "source": path.name,
        "source_sha256": source,
        "files": {file.name: sha256_of(file) for file in files},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        # Newer releases leave the weights packed where a kernel for them is installed; older ones always unpack.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        quantised = AutoModelForCausalLM.from_pretrained(path.parent, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except _CORRUPT as error:
        raise ModelError(
            f"transformers cannot read {path}: {error}. Use a safetensors checkpoint of the same model."
        ) from error
    mend_pre_tokenizer(tokenizer, _pre_tokenizer_name(path))
    return _without_quantisation(quantised), tokenizer


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
