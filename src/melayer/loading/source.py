"""From a name to where a model's files are: `demo`, a directory, a `.gguf` file or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from melayer.errors import ModelError
from melayer.loading import gguf
from melayer.loading.demo import demo_file

MASK_FILE = "melayer_mask.json"
"""What a mask beside a model's weights is called: where there is one, the weights alone are not the model."""


@dataclass(frozen=True)
class Source:
    """Where a model's files are."""

    name: str
    """As the user wrote it."""
    location: str
    """A directory for `from_pretrained`, or a hub id."""
    gguf_sha256: str | None = None
    """The sha256 of the GGUF file that was converted into `location`."""

    @property
    def is_local(self) -> bool:
        """Whether `location` is a directory."""
        return Path(self.location).is_dir()


def find(name: str) -> Source:
    """Where `name` leads; a GGUF file is converted into the cache on the way.

    Raises:
        ModelError: There is no such file or directory, or it is not a model.
    """
    path = Path(name).expanduser()
    if name == "demo":
        return _converted(name, demo_file())
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file {name}. Give the path of a .gguf file that exists.")
        return _converted(name, path)
    if path.is_dir():
        return Source(name, str(path), gguf.source_sha256(path))
    if path.is_file():
        raise ModelError(
            f"{name} is a file that is not a .gguf model. Give the directory that holds config.json and the weights."
        )
    if not _may_be_hub_id(name):
        raise ModelError(
            f"There is no model {name!r}: not a file or directory here, and not a hub id (owner/model). "
            "Give `demo`, a directory, a .gguf file or a hub id."
        )
    return Source(name, name)


def _converted(name: str, path: Path) -> Source:
    directory = gguf.convert(path)
    return Source(name, str(directory), gguf.source_sha256(directory))


def _may_be_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if name.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
