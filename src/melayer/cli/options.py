"""The options that commands share, as dataclasses whose fields become options."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from melayer.cli.masks import MaskRequest
from melayer.cli.parsing import blocks_of, memory_of
from melayer.cli.session import session
from melayer.errors import InputError

if TYPE_CHECKING:
    from melayer.data.corpus import Corpus


class DType(StrEnum):
    """The dtypes that weights can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_MODEL, _TEXTS, _CRITERION = "Model", "Texts", "Criterion"
_ROWS, _MASK, _TRAINING = "Rows", "Mask", "Training"

# --- options that several commands have ---------------------------------------------------------------------------

_SELECTOR = "weight, weight-low, activation, activation-low or random."
_STRENGTH = "How much of a masked entry is taken away."
_BLOCKS = "Masked blocks, e.g. 12- or 12,14-20; default: all after the ME layer."
_POSITIONS = "first tokens, or all massive ones."

Model = Annotated[str, typer.Argument(help="`demo`, a directory, a .gguf file or a hub id.", show_default=False)]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Tokens kept of each text; default 512, or the model's positions.", rich_help_panel=_TEXTS),
]
MaxListed = Annotated[int, typer.Option(min=1, help="Massive scalars listed a text and block.")]
Epsilon = Annotated[float, typer.Option(help="A head is a sink head where a key draws more than this.")]
FirstTokens = Annotated[int, typer.Option(help="Different first tokens to compare.")]
MaskRate = Annotated[float, typer.Option("--mask-rate", help="The share of the dimensions to mask.")]
Selector = Annotated[str, typer.Option(help=_SELECTOR)]
Selectors = Annotated[str, typer.Option(help="Of weight, weight-low, activation, activation-low and random.")]
Strength = Annotated[float, typer.Option(help=_STRENGTH)]
MaskedBlocks = Annotated[str | None, typer.Option(help=_BLOCKS)]
Positions = Annotated[str, typer.Option(help=_POSITIONS)]
SelectorSeed = Annotated[int, typer.Option(min=0, help="Of selector random.")]
Chat = Annotated[bool | None, typer.Option("--chat/--no-chat", help="Chat template; default: where there is one.")]
System = Annotated[str | None, typer.Option(help="A system prompt.")]

# --- options in groups --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextOptions:
    """What to run."""

    text: Annotated[list[str] | None, typer.Option(help="A text to run; repeatable.", rich_help_panel=_TEXTS)] = None
    file: Annotated[Path | None, typer.Option(help="A UTF-8 file of texts, one a line.", rich_help_panel=_TEXTS)] = None
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

    def arguments(self) -> dict[str, Any]:
        """The arguments of a measurement; whatever can be wrong with them is found before a model is loaded."""
        from melayer.data.texts import builtin_texts, read_texts

        texts: list[str] = list(self.text or [])
        if self.file is not None:
            texts += read_texts(self.file, whole=self.whole_file)
        elif self.whole_file:
            raise InputError("--whole-file says how to read a file, but no --file was given. Add --file PATH.")
        for index, text in enumerate(texts):
            if not text.strip():
                raise InputError(f"Text {index} is empty. Give texts with at least one word.")
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

        return Corpus(data, self.column, self.category, self.split, self.whole_file)

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


@dataclass(frozen=True)
class RowOptions:
    """What to train on."""

    columns: Annotated[
        str | None,
        typer.Option(help="Which column is which, e.g. prompt=question,response=answer.", rich_help_panel=_ROWS),
    ] = None
    validation: Annotated[
        str | None, typer.Option(help="A share of the rows, e.g. 0.05, or a file.", rich_help_panel=_ROWS)
    ] = None
    rows: Annotated[int | None, typer.Option(min=1, help="Take only the first rows.", rich_help_panel=_ROWS)] = None
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Chat template; default: where there is one.", rich_help_panel=_ROWS),
    ] = None
    system: Annotated[str | None, typer.Option(help="A system prompt.", rich_help_panel=_ROWS)] = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `sft`, `dpo` and `grpo`."""
        columns = {}
        for item in filter(None, (self.columns or "").split(",")):
            role, equals, column = item.strip().partition("=")
            if not (role and equals and column):
                raise InputError(f"--columns {item!r} was given; expected e.g. prompt=question,response=answer.")
            columns[role] = column
        validation: str | float | None = self.validation
        if validation is not None:
            with contextlib.suppress(ValueError):  # a file
                validation = float(validation)
        return {
            "columns": columns or None,
            "validation": validation,
            "limit": self.rows,
            "chat": self.chat,
            "system": self.system,
        }


@dataclass(frozen=True)
class MaskOptions:
    """What is masked while it trains."""

    mask_rate: Annotated[
        float | None,
        typer.Option(help="The share of the dimensions to mask; default: no mask.", rich_help_panel=_MASK),
    ] = None
    strength: Annotated[float, typer.Option(help=_STRENGTH, rich_help_panel=_MASK)] = 1.0
    selector: Annotated[str, typer.Option(help=_SELECTOR, rich_help_panel=_MASK)] = "weight"
    layers: Annotated[str | None, typer.Option(help=_BLOCKS, rich_help_panel=_MASK)] = None
    positions: Annotated[str, typer.Option(help=_POSITIONS, rich_help_panel=_MASK)] = "first"

    def request(self, seed: int) -> MaskRequest:
        """The mask, with the seed of everything random."""
        blocks = blocks_of("--layers", self.layers)
        return MaskRequest(self.mask_rate, self.selector, self.strength, seed, self.positions, blocks)


@dataclass(frozen=True)
class TrainingOptions:
    """How to train."""

    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps; default: the trainer's epochs.", rich_help_panel=_TRAINING),
    ] = None
    learning_rate: Annotated[float | None, typer.Option(help="Default: the trainer's.", rich_help_panel=_TRAINING)] = (
        None
    )
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows at once on each device.", rich_help_panel=_TRAINING)
    ] = None
    lora: Annotated[
        bool, typer.Option("--lora", help="Train an adapter, not all weights.", rich_help_panel=_TRAINING)
    ] = False
    lora_rank: Annotated[int, typer.Option(min=1, help="Of the adapter.", rich_help_panel=_TRAINING)] = 16
    lora_alpha: Annotated[int, typer.Option(min=1, help="Its scale is alpha / rank.", rich_help_panel=_TRAINING)] = 32
    lora_targets: Annotated[str, typer.Option(help="Modules, e.g. q_proj,v_proj.", rich_help_panel=_TRAINING)] = (
        "all-linear"
    )
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML with any option of TRL's SFTConfig, DPOConfig or GRPOConfig.", rich_help_panel=_TRAINING
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.", rich_help_panel=_TRAINING)] = 0
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.", rich_help_panel=_TRAINING)
    ] = False

    def adapter(self) -> bool | dict[str, Any]:
        """The argument `lora`."""
        if not self.lora:
            return False
        targets: str | list[str] = self.lora_targets
        if targets != "all-linear":
            targets = [name.strip() for name in self.lora_targets.split(",") if name.strip()]
        return {"r": self.lora_rank, "lora_alpha": self.lora_alpha, "target_modules": targets}

    def overrides(self) -> dict[str, Any]:
        """What the command line says of the trainer's options, over what the file says."""
        said = {
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch_size,
        }
        return {key: value for key, value in said.items() if value is not None}


@dataclass(frozen=True)
class TuneOptions(Options):
    """What `tune` takes beside what every measurement takes."""

    rows: RowOptions = field(default_factory=RowOptions)
    masking: MaskOptions = field(default_factory=MaskOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)


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
        with session(made["output"].debug):
            command(**given, options=container(**made))

    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    parameters = [*keyword, *shared]
    flattened.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flattened
