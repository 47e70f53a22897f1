"""From a name to the directory that a model is read from: `demo`, a directory, a `.gguf` file or a hub id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from melayer.errors import ModelError, border
from melayer.loading import gguf, hub
from melayer.loading.demo import demo_file
from melayer.loading.files import Hashed
from melayer.loading.reading import shown

MASK_FILE = "melayer_mask.json"
"""What a mask beside a model's weights is called: where there is one, the weights alone are not the model."""

_GIVE = "Give `demo`, a directory, a .gguf file or a hub id."


@dataclass(frozen=True)
class Source:
    """Where a model's files are."""

    name: str
    """As the user wrote it."""
    directory: Path
    """What is read; of a hub id, its snapshot in the hub's cache."""
    gguf: Hashed | None = None
    """The GGUF file that was converted into `directory`."""
    from_hub: bool = False


def find(name: str, *, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """Where `name` leads; a GGUF file is converted into the cache on the way, and what is on the hub is fetched.

    Args:
        name: As a user wrote it.
        revision: Branch, tag or commit on the hub.
        allow_pickle: Whether weights may be pickles.

    Raises:
        ModelError: There is no such file or directory, it is not a model, or it cannot be had from the hub.
    """
    if name == "demo":
        return _converted(name, demo_file())
    with border(f"There is no model {shown(name)}", _GIVE, error=ModelError):
        path = Path(name).expanduser()
        kind = "directory" if path.is_dir() else "file" if path.is_file() else "other" if path.exists() else None
        is_gguf = path.suffix.lower() == ".gguf"
    if not name:
        raise ModelError(f"The model's name is empty. {_GIVE}")
    if kind == "directory":
        return Source(name, path)
    if kind == "other":
        raise ModelError(f"{shown(name)} is neither a directory nor a plain file, so it is not a model. {_GIVE}")
    if is_gguf and kind is None:
        raise ModelError(f"There is no file {shown(name, quote=False)}. Give the path of a .gguf file that exists.")
    if is_gguf:
        return _converted(name, path)
    if kind == "file":
        raise ModelError(
            f"{name} is a file that is not a .gguf model. Give the directory that holds config.json and the weights."
        )
    if not _may_be_hub_id(name):
        raise ModelError(
            f"There is no model {shown(name)}: not a file or directory here, and not a hub id (owner/model). {_GIVE}"
        )
    return Source(name, hub.fetch(name, revision, allow_pickle=allow_pickle), from_hub=True)


def require_revision_used(revision: str | None, sources: Iterable[Source]) -> None:
    """Raises ModelError where a revision was given, and nothing came from the hub."""
    if revision is not None and not any(source.from_hub for source in sources):
        raise ModelError(f"The revision {revision!r} was given, but nothing is taken from the hub. Leave it out.")


def _converted(name: str, path: Path) -> Source:
    directory, sha256 = gguf.converted(path)
    return Source(name, directory, Hashed(path.name, sha256))


def _may_be_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if name.startswith((".", "/", "~")) or not name.isprintable():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
