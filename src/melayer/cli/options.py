"""The options that commands share, as dataclasses whose fields become options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from melayer.cli.parsing import check_numbers, memory_of
from melayer.cli.session import session, what_is_kept
from melayer.errors import InputError, border

if TYPE_CHECKING:
    from melayer.data.corpus import Corpus


class DType(StrEnum):
    """The dtypes that weights can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_MODEL, _TEXTS, _CRITERION = "Model", "Texts", "Criterion"

# --- options that several commands have ---------------------------------------------------------------------------

SELECTOR = "weight, weight-low, activation, activation-low or random."
STRENGTH = "How much of a masked entry is taken away."
BLOCKS = "Masked blocks, e.g. 12- or 12,14-20; default: all after the ME layer."
POSITIONS = "first tokens, or all massive ones."

Model = Annotated[str, typer.Argument(help="`demo`, a directory, a .gguf file or a hub id.", show_default=False)]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Tokens kept of each text; default 512, or the model's positions.", rich_help_panel=_TEXTS),
]
MaxListed = Annotated[int, typer.Option(min=1, help="Massive scalars listed a text and block.")]
OtherFirstTokens = Annotated[
    bool,
    typer.Option(
        "--other-first-tokens/--no-other-first-tokens",
        help="Look at a few short texts without BOS, with it, and with the chat template's first token.",
        rich_help_panel=_TEXTS,
    ),
]
Epsilon = Annotated[float, typer.Option(help="A head is a sink head where a key draws more than this.")]
FirstTokens = Annotated[int, typer.Option(help="Different first tokens to compare.")]
MaskRate = Annotated[float, typer.Option("--mask-rate", help="The share of the dimensions to mask.")]
Selector = Annotated[str, typer.Option(help=SELECTOR)]
Selectors = Annotated[str, typer.Option(help="Of weight, weight-low, activation, activation-low and random.")]
Strength = Annotated[float, typer.Option(help=STRENGTH)]
MaskedBlocks = Annotated[str | None, typer.Option(help=BLOCKS)]
Positions = Annotated[str, typer.Option(help=POSITIONS)]
SelectorSeed = Annotated[int, typer.Option(min=0, help="Of selector random.")]
Chat = Annotated[bool | None, typer.Option("--chat/--no-chat", help="Chat template; default: where there is one.")]
System = Annotated[str | None, typer.Option(help="A system prompt.")]

# --- options in groups --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextOptions:
    """What to run."""

    text: Annotated[list[str] | None, typer.Option(help="A text to run; repeatable.", rich_help_panel=_TEXTS)] = None
    file: Annotated[
        Path | None,
        typer.Option(help="A file of texts: text lines, JSON, parquet or CSV.", rich_help_panel=_TEXTS),
    ] = None
    column: Annotated[
        str | None,
        typer.Option(help="The column of --file with the text; default: the usual names.", rich_help_panel=_TEXTS),
    ] = None
    whole_file: Annotated[
        bool, typer.Option("--whole-file", help="Take --file as one text.", rich_help_panel=_TEXTS)
    ] = False
    limit: Annotated[int | None, typer.Option(min=1, help="Run only the first texts.", rich_help_panel=_TEXTS)] = None
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin-of-sequence token; default: the tokenizer's way.",
            rich_help_panel=_TEXTS,
        ),
    ] = None
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in one forward pass.", rich_help_panel=_TEXTS)
    ] = 2048

    def of_file(self, path: Path, *, limit: int | None = None) -> list[str]:
        """The texts of a file, read as `--file` is."""
        from melayer.data.texts import read_texts

        return read_texts(path, whole=self.whole_file, column=self.column, limit=limit)

    def arguments(self) -> dict[str, Any]:
        """The arguments of a measurement; whatever can be wrong with them is found before a model is loaded."""
        from melayer.data.documents import require_characters
        from melayer.data.texts import builtin_texts

        texts: list[str] = list(self.text or [])
        if self.file is not None:
            texts += self.of_file(self.file, limit=self.limit)
        elif self.whole_file or self.column is not None:
            option = "--whole-file" if self.whole_file else "--column"
            raise InputError(f"{option} says how to read a file, but no --file was given. Add --file PATH.")
        for index, text in enumerate(texts):
            if not text.strip():
                raise InputError(f"Text {index} is empty. Give texts with at least one word.")
            with border(f"Text {index} cannot be read", "Give it as UTF-8."):
                require_characters(text, "it")
        if not texts and self.limit is not None:
            texts = builtin_texts()
        return {"texts": texts[: self.limit] or None, "bos": self.bos, "max_batch_tokens": self.max_batch_tokens}


@dataclass(frozen=True)
class CriterionOptions:
    """What counts as massive, and as the ME layer."""

    min_abs: Annotated[float, typer.Option(help="|h| must exceed this.", rich_help_panel=_CRITERION)] = 100.0
    min_ratio: Annotated[float, typer.Option(help="…and this many medians.", rich_help_panel=_CRITERION)] = 1000.0
    persistence: Annotated[
        float, typer.Option(help="Share of the blocks it must last for.", rich_help_panel=_CRITERION)
    ] = 0.25
    majority: Annotated[float, typer.Option(help="Share of the texts to exceed.", rich_help_panel=_CRITERION)] = 0.5
    min_tokens: Annotated[int, typer.Option(help="Shorter texts do not vote.", rich_help_panel=_CRITERION)] = 8

    def arguments(self) -> dict[str, Any]:
        """The arguments of a measurement."""
        from melayer.measurements.criterion import Criterion

        return {"criterion": Criterion(**{item.name: getattr(self, item.name) for item in fields(self)})}


@dataclass(frozen=True)
class ModelOptions:
    """How to load the model and read its wiring."""

    dtype: Annotated[DType, typer.Option(help="auto: the checkpoint's own.", rich_help_panel=_MODEL)] = DType.auto
    device: Annotated[str, typer.Option(help="auto: CUDA, else MPS, else CPU.", rich_help_panel=_MODEL)] = "auto"
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model over devices, e.g. auto.", rich_help_panel=_MODEL)
    ] = None
    max_memory: Annotated[
        str | None,
        typer.Option(help="With --device-map: e.g. 0=20GiB,cpu=60GiB.", rich_help_panel=_MODEL),
    ] = None
    offload_folder: Annotated[
        str | None,
        typer.Option(help="Where --device-map puts what fits nowhere else.", rich_help_panel=_MODEL),
    ] = None
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights: runs code in them.", rich_help_panel=_MODEL)
    ] = False
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own code.", rich_help_panel=_MODEL)
    ] = False
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL)] = (
        None
    )
    mask: Annotated[
        bool,
        typer.Option("--mask/--no-mask", help="Apply the mask saved with the model, if any.", rich_help_panel=_MODEL),
    ] = True
    base: Annotated[
        str | None,
        typer.Option(help="The model of an adapter that is not where it was trained.", rich_help_panel=_MODEL),
    ] = None
    part: Annotated[
        list[str] | None,
        typer.Option(help="Name a part that is not found, e.g. ffn=feed_forward.", rich_help_panel=_MODEL),
    ] = None

    def loading(self) -> dict[str, Any]:
        """The arguments of `melayer.load`."""
        taken = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "part"}
        return {**taken, "dtype": self.dtype.value, "max_memory": memory_of(self.max_memory)}

    def arguments(self) -> dict[str, Any]:
        """The arguments of a measurement."""
        parts = {}
        for item in self.part or []:
            name, equals, path = item.partition("=")
            if not (name and equals and path):
                raise InputError(f"--part {item!r} was given; expected NAME=PATH, for example ffn=feed_forward.")
            parts[name] = path
        return {"parts": parts}


@dataclass(frozen=True)
class OutputOptions:
    """How to answer."""

    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False


@dataclass(frozen=True)
class Options:
    """What every measurement takes."""

    texts: TextOptions = field(default_factory=TextOptions)
    criterion: CriterionOptions = field(default_factory=CriterionOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def arguments(self) -> dict[str, Any]:
        """The arguments of a measurement."""
        return {**self.texts.arguments(), **self.criterion.arguments(), **self.model.arguments()}


@dataclass(frozen=True)
class StoredOptions:
    """What a command takes that measures nothing itself."""

    output: OutputOptions = field(default_factory=OutputOptions)


@dataclass(frozen=True)
class CorpusOptions:
    """Which documents to run, and how."""

    column: Annotated[
        str | None, typer.Option(help="The column with the text; default: the usual names.", rich_help_panel=_TEXTS)
    ] = None
    category: Annotated[
        str | None, typer.Option(help="A column by which documents are kept apart.", rich_help_panel=_TEXTS)
    ] = None
    max_categories: Annotated[
        int,
        typer.Option(min=1, help="The first so many are kept apart, the others together.", rich_help_panel=_TEXTS),
    ] = 64
    split: Annotated[str, typer.Option(help="Of a data set of the hub.", rich_help_panel=_TEXTS)] = "train"
    whole_file: Annotated[
        bool,
        typer.Option("--whole-file", help="A text file is one document, not one a line.", rich_help_panel=_TEXTS),
    ] = False
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents.", rich_help_panel=_TEXTS)] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence; default 512, or the model's positions.", rich_help_panel=_TEXTS),
    ] = None
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Only the first sequence of each document.", rich_help_panel=_TEXTS),
    ] = False
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Begin-of-sequence token; default: the tokenizer's way.", rich_help_panel=_TEXTS
        ),
    ] = None
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in one forward pass.", rich_help_panel=_TEXTS)
    ] = 2048

    def corpus(self, data: str) -> Corpus:
        """What `scan` reads."""
        from melayer.data.corpus import Corpus

        return Corpus(data, self.column, self.category, self.split, self.whole_file, self.max_categories)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `scan`."""
        names = ("limit", "max_tokens", "truncate", "bos", "max_batch_tokens")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ScanOptions:
    """What `scan` takes beside its own."""

    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    criterion: CriterionOptions = field(default_factory=CriterionOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `scan`."""
        return {**self.corpus.arguments(), **self.criterion.arguments(), **self.model.arguments()}


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its `options` as options of its own: typer knows no groups.

    It runs in a session, which turns our errors into a sentence and an exit code.
    """
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in signature.parameters.values()
        if parameter.name != "options"
    ]
    container: type[Any] = hints["options"]
    groups: dict[str, type[Any]] = get_type_hints(container)
    shared = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=annotation)
        for kind in groups.values()
        for item, annotation in zip(fields(kind), get_type_hints(kind, include_extras=True).values(), strict=True)
    ]

    @functools.wraps(command)
    def flattened(**given: Any) -> None:
        made: dict[str, Any] = {
            name: kind(**{item.name: given.pop(item.name) for item in fields(kind)}) for name, kind in groups.items()
        }
        name, out = command.__name__.removesuffix("_command").replace("_", "-"), given.get("out")
        with session(made["output"].debug, what_is_kept(name, out)):
            check_numbers({**given, **{key: value for kind in made.values() for key, value in vars(kind).items()}})
            command(**given, options=container(**made))

    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    parameters = [*keyword, *shared]
    flattened.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flattened
