"""The commands that `same_results.py` runs: every command on several models, with many options, and bad input."""

from __future__ import annotations

from dataclasses import dataclass

from same_results_toys import PLANTED

OUT = "{out}"
"""Stands in a command for a directory of the case's own."""

_TEXTS = ("--file", "toys/texts.txt")
_ENGLISH = ("--file", "toys/english.txt")
_ALL_SELECTORS = "weight,weight-low,activation,activation-low,random"
_FEW = ("-T", "16", "--n-sequences", "4")  # of quant-check

_API = """
import dataclasses, inspect, melayer
for name in sorted(melayer.__all__):
    thing = getattr(melayer, name)
    exception = inspect.isclass(thing) and issubclass(thing, Exception)
    print(name, inspect.signature(thing) if callable(thing) and not exception else type(thing).__name__)
    print(inspect.getdoc(thing) if callable(thing) else "")
    if inspect.isclass(thing):
        members = [member for member in dir(thing) if not member.startswith("_")]
        print("   ", [base.__name__ for base in thing.__mro__], members)
    if dataclasses.is_dataclass(thing):
        print("   ", [field.name for field in dataclasses.fields(thing)])
"""


@dataclass(frozen=True)
class Case:
    """Commands that are run one after the other, as arguments of the Python interpreter."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    fresh: bool = False
    """Whether each takes an interpreter of its own, from the start."""


def _case(name: str, *commands: tuple[str, ...], fresh: bool = False) -> Case:
    return Case(name, tuple(("-m", "melayer", *command) for command in commands), fresh)


def all_cases() -> list[Case]:
    """Every case, the short ones first."""
    found = [Case("api", (("-c", _API),), fresh=True), *_help(), *_errors()]
    for family in PLANTED:
        found += _family(family)
    found += [*_locating(), *_explaining(), *_masking(), *_quantising(), *_scanning(), *_printed(), *_demo()]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), "two cases of one name"
    return found


def _help() -> list[Case]:
    commands: tuple[str, ...] = (
        "locate",
        "explain",
        "rigidity",
        "sinks",
        "sweep",
        "report",
        "generate",
        "eval",
        "compare",
    )
    commands += ("quant-check", "contrast", "scan", "tune")
    found = [_case(f"help-{command}", (command, "--help")) for command in commands]
    found += [_case(f"help-tune-{method}", ("tune", method, "--help")) for method in ("sft", "dpo", "grpo")]
    return [_case("help", ("--help",), fresh=True), *found]


def _family(family: str) -> list[Case]:
    """Every command on one toy."""
    model = f"toys/{family}"
    given = (model, *_TEXTS, "--json")
    commands: dict[str, tuple[str, ...]] = {
        "locate": ("locate", *given),
        "locate-frugal": ("locate", *given, "--frugal"),
        "explain": ("explain", *given),
        "rigidity": ("rigidity", *given, "--n-first-tokens", "16"),
        "sinks": ("sinks", *given, "-T", "32"),
        "sweep": ("sweep", *given, "-T", "16", "--rates", "0,0.5,1", "--selectors", _ALL_SELECTORS),
        "generate": ("generate", *given, "--prompt", "X w4 w5 w6", "--max-new-tokens", "8"),
        "scan": (
            *("scan", model, "--data", "toys/corpus.jsonl", "--category", "kind", "--json"),
            *("--formats", "int8,fp8,int4", "--mask-rate", "0.5", "--layers", "7"),
        ),
        "quant-check": ("quant-check", *given, *_FEW, "--prefix", "X"),
        "contrast": ("contrast", model, "toys/llama-after", *_TEXTS, "--json", "-T", "32", "--n-first-tokens", "16"),
        "report": ("report", *given, "-T", "32", "--out", OUT),
    }
    return [_case(f"{family}-{name}", command) for name, command in commands.items()]


def _locating() -> list[Case]:
    given = ("toys/llama", *_TEXTS, "--json")
    commands: dict[str, tuple[str, ...]] = {
        "bos": ("locate", *given, "--bos", "--max-tokens", "20", "--max-listed", "2"),
        "no-bos": ("locate", *given, "--no-bos", "--limit", "3", "--max-batch-tokens", "50"),
        "whole-file": ("locate", *given, "--whole-file", "--max-tokens", "200"),
        "builtin": ("locate", "toys/llama", "--json", "--limit", "2"),
        "criterion": ("locate", *given, "--min-abs", "50", "--min-ratio", "100", "--persistence", "0.1"),
        "votes": ("locate", *given, "--majority", "0.9", "--min-tokens", "4"),
        "nothing": ("locate", "toys/llama", "--file", "toys/nothing-massive.txt", "--json"),
        "one-token": ("locate", "toys/llama", "--text", "w1", "--json"),
        "nan": ("locate", "toys/llama-nan", *_TEXTS, "--json"),
        "bfloat16": ("locate", *given, "--dtype", "bfloat16"),
        "float16": ("locate", *given, "--dtype", "float16"),
        "part": ("locate", *given, "--part", "ffn=mlp"),
        "adapter": ("locate", "toys/llama-adapter", "--base", "toys/llama", *_TEXTS, "--json"),
        "masked": ("locate", "toys/llama-masked", *_TEXTS, "--json"),
        "no-mask": ("locate", "toys/llama-masked", *_TEXTS, "--json", "--no-mask"),
        "gguf": ("locate", "toys/tiny.gguf", "--text", "hello there, this is a text", "--json"),
        "gguf-odd": ("locate", "toys/odd.gguf", "--text", "hello there, this is a text", "--json"),
        "frugal-stop": ("locate", *given, "--frugal", "--stop-early", "--limit", "4"),
        "frugal-bfloat16": ("locate", *given, "--frugal", "--dtype", "bfloat16", "--max-batch-tokens", "64"),
        "frugal-masked": ("locate", "toys/llama-masked", *_TEXTS, "--json", "--frugal"),
    }
    # What is loaded when, and which bars are drawn meanwhile, shows from the start of an interpreter only.
    return [
        _case(f"locate-{name}", command, fresh=name in ("bos", "gguf", "gguf-odd"))
        for name, command in commands.items()
    ]


def _explaining() -> list[Case]:
    given = ("toys/llama", *_TEXTS, "--json")
    commands: dict[str, tuple[str, ...]] = {
        "explain-layers": ("explain", *given, "--layers", "1,3-5", "--seeds", "2", "--top", "3", "--max-texts", "2"),
        "explain-all": ("explain", "toys/gemma2", *_TEXTS, "--json", "--layers", "0-"),
        "explain-bfloat16": ("explain", *given, "--dtype", "bfloat16"),
        "explain-nothing": ("explain", "toys/llama", "--file", "toys/nothing-massive.txt", "--json"),
        "rigidity-fixed": ("rigidity", *given, "--fixed-first-token"),
        "rigidity-seed": ("rigidity", *given, "--n-first-tokens", "8", "--seed", "3", "--max-tokens", "24"),
        "rigidity-masked": ("rigidity", "toys/llama-masked", *_TEXTS, "--json", "--n-first-tokens", "8"),
        "sinks-epsilon": ("sinks", *given, "-T", "32", "--epsilon", "0.1", "--bos"),
        "sinks-masked": ("sinks", "toys/llama-masked", *_TEXTS, "--json", "-T", "16"),
        "sinks-bfloat16": ("sinks", *given, "-T", "16", "--dtype", "bfloat16"),
        "contrast-same": (
            *("contrast", "toys/llama", "toys/llama", *_TEXTS, "--json"),
            *("-T", "16", "--n-first-tokens", "8", "--out", OUT),
        ),
        "contrast-masked": (
            *("contrast", "toys/llama", "toys/llama-masked", *_TEXTS, "--json"),
            *("-T", "16", "--epsilon", "0.2", "--n-first-tokens", "8", "--out", OUT),
        ),
        "report-nothing": ("report", "toys/llama", "--file", "toys/nothing-massive.txt", "--json", "--out", OUT),
        "report-nan": ("report", "toys/llama-nan", *_TEXTS, "--json", "--out", OUT),
    }
    return [_case(name, command) for name, command in commands.items()]


def _masking() -> list[Case]:
    given = ("toys/llama", *_TEXTS, "--json")
    sweep = ("sweep", *given, "-T", "16", "--selectors", "weight,random", "--out", OUT)
    asked = ("generate", *given, "--prompt", "X w4 w5 w6", "--prompt", "w9 w8 X w7", "--max-new-tokens", "8")
    found = [
        _case("sweep-goes-on", (*sweep, "--rates", "0,0.5"), (*sweep, "--rates", "0,0.25,...,1")),
        _case("sweep-other", (*sweep, "--rates", "0,0.5"), (*sweep, "--rates", "0,0.5", "--seed", "1")),
        _case(
            "sweep-strength",
            (
                *("sweep", *given, "-T", "16", "--strength", "0.5", "--layers", "5-", "--rates", "0.3,1"),
                *("--selectors", _ALL_SELECTORS, "--seed", "4", "--epsilon", "0.2", "--bos"),
            ),
        ),
    ]
    for selector in _ALL_SELECTORS.split(","):
        found.append(_case(f"generate-{selector}", (*asked, "--selector", selector, "--mask-rate", "0.9")))
        found.append(_case(f"generate-massive-{selector}", (*asked, "--selector", selector, "--positions", "massive")))
    more: dict[str, tuple[str, ...]] = {
        "layers": ("--layers", "4,6-", "--strength", "0.7", "--mask-rate", "1"),
        "layers-massive": ("--layers", "4,6-", "--positions", "massive", "--mask-rate", "1"),
        "warm": ("--temperature", "1.5", "--seed", "5", "--no-chat"),
        "rate-0": ("--mask-rate", "0"),
    }
    return [*found, *(_case(f"generate-{name}", (*asked, *options)) for name, options in more.items())]


def _quantising() -> list[Case]:
    given = ("quant-check", "toys/llama", *_TEXTS, "--json", *_FEW)
    commands: dict[str, tuple[str, ...]] = {
        "out": (*given, "--prefix", "X", "--out", OUT),
        "plain": (*given, "--treatments", "plain", "--formats", "fp8,int4"),
        "baked": (*given, "--treatments", "plain,baked", "--formats", "int8", "--prefix", "X w3"),
        "mask": (
            *(*given, "--treatments", "mask,baked+mask", "--granularities", "per-token", "--prefix", "X"),
            *("--mask-rate", "1", "--selector", "random", "--strength", "0.5", "--layers", "5-", "--seed", "2"),
        ),
        "calibration": (*given, "--calibration", "toys/calibration.txt", "--prefix", "X", "--formats", "int8"),
        "bos": (*given, "--bos", "--formats", "int8", "--granularities", "per-tensor,per-channel"),
        "bfloat16": (*given, "--prefix", "X", "--formats", "int8", "--dtype", "bfloat16"),
    }
    found = [_case(f"quant-check-{name}", command) for name, command in commands.items()]
    kept = (*given, "--prefix", "X", "--formats", "int8", "--out", OUT)
    return [*found, _case("quant-check-goes-on", kept, kept, (*kept, "-T", "12"))]


def _scanning() -> list[Case]:
    given = ("scan", "toys/llama", "--data", "toys/corpus.jsonl", "--json")
    commands: dict[str, tuple[str, ...]] = {
        "plain": given,
        "sites": (*given, "--sites", "block_out,ffn_act,k,embedding,final_norm", "--limit", "4"),
        "cut": (*given, "--max-tokens", "10", "--max-batch-tokens", "40", "--bos"),
        "truncate": (*given, "--max-tokens", "10", "--truncate"),
        "whole-file": ("scan", "toys/llama", "--data", "toys/texts.txt", "--json", "--whole-file"),
        "lines": ("scan", "toys/llama", "--data", "toys/texts.txt", "--json", "--min-abs", "50"),
        "mask": (
            *(*given, "--formats", "int8", "--mask-rate", "1", "--selector", "random", "--seed", "3"),
            *("--layers", "4-", "--strength", "0.5"),
        ),
    }
    found = [_case(f"scan-{name}", command) for name, command in commands.items()]
    kept = (*given, "--out", OUT, "--category", "kind")
    return [*found, _case("scan-goes-on", kept, kept, (*kept, "--sites", "block_out"))]


def _printed() -> list[Case]:
    """What a person sees, without --json."""
    given = ("toys/llama", *_TEXTS)
    commands: dict[str, tuple[str, ...]] = {
        "locate": ("locate", *given),
        "explain": ("explain", *given),
        "rigidity": ("rigidity", *given, "--n-first-tokens", "8"),
        "sinks": ("sinks", *given, "-T", "32"),
        "sweep": ("sweep", *given, "-T", "16", "--rates", "0,0.5", "--out", OUT),
        "generate": ("generate", *given, "--prompt", "X w4 w5 w6", "--max-new-tokens", "8"),
        "report": ("report", *given, "-T", "32", "--out", OUT),
        "scan": ("scan", "toys/llama", "--data", "toys/corpus.jsonl", "--formats", "int8", "--out", OUT),
        "quant-check": ("quant-check", *given, *_FEW, "--prefix", "X", "--formats", "int8", "--out", OUT),
        "contrast": (
            *("contrast", "toys/llama", "toys/llama-after", *_TEXTS),
            *("-T", "16", "--n-first-tokens", "8", "--out", OUT),
        ),
    }
    return [_case(f"printed-{name}", command) for name, command in commands.items()]


def _demo() -> list[Case]:
    """The real model, with few and short texts."""
    given = ("demo", *_ENGLISH, "--json")
    commands: dict[str, tuple[str, ...]] = {
        "locate": ("locate", *given),
        "locate-builtin": ("locate", "demo", "--limit", "3", "--max-tokens", "32", "--json"),
        "locate-bfloat16": ("locate", *given, "--dtype", "bfloat16"),
        "locate-frugal": ("locate", *given, "--frugal"),
        "explain": ("explain", *given, "--limit", "1", "--layers", "11,28", "--seeds", "1"),
        "rigidity": ("rigidity", *given, "--limit", "2", "--n-first-tokens", "8"),
        "sinks": ("sinks", *given, "-T", "12"),
        "sweep": ("sweep", *given, "-T", "12", "--limit", "2", "--rates", "0,0.5,1", "--selectors", "weight,random"),
        "generate": ("generate", *given, "--limit", "2", "--prompt", "Why is the sky blue?", "--max-new-tokens", "8"),
        "scan": (
            *("scan", "demo", "--data", "toys/english.jsonl", "--category", "kind", "--json"),
            *("--sites", "block_out,ffn_out,k"),
        ),
        "quant-check": (
            *("quant-check", *given, "-T", "10", "--n-sequences", "2", "--formats", "int8"),
            *("--granularities", "per-tensor,per-token"),
        ),
        "contrast": ("contrast", "demo", "demo", *_ENGLISH, "--json", "-T", "12", "--limit", "2"),
        "report": ("report", *given, "--limit", "1", "-T", "8", "--out", OUT),
    }
    return [_case(f"demo-{name}", command) for name, command in commands.items()]


def _errors() -> list[Case]:
    """Bad input: exit code 2 and a sentence."""
    llama, nowhere = "toys/llama", "toys/nowhere"
    unwritable = "toys/texts.txt/out"  # inside of what is no directory
    commands: dict[str, tuple[str, ...]] = {
        "no-command": ("find", llama),
        "no-option": ("locate", llama, "--nothing"),
        "no-model": ("locate", nowhere),
        "no-config": ("locate", "toys"),
        "empty-text": ("locate", llama, "--text", " "),
        "no-file": ("locate", llama, "--file", "toys/nowhere.txt"),
        "empty-file": ("locate", llama, "--file", "toys/empty.txt"),
        "not-utf8": ("locate", llama, "--file", "toys/latin.txt"),
        "whole-file": ("locate", llama, "--whole-file"),
        "max-tokens": ("locate", llama, *_TEXTS, "--max-tokens", "300"),
        "part-words": ("locate", llama, "--part", "ffn"),
        "part-name": ("locate", llama, "--part", "mlp=mlp", *_TEXTS),
        "part-path": ("locate", llama, "--part", "ffn=nowhere", *_TEXTS),
        "majority": ("locate", llama, "--majority", "2"),
        "device": ("locate", llama, "--device", "cuda:9"),
        "stop-early": ("locate", llama, "--stop-early"),
        "frugal-map": ("locate", llama, "--frugal", "--device-map", "auto"),
        "frugal-early": ("locate", llama, *_TEXTS, "--frugal", "--stop-early", "--max-batch-tokens", "20"),
        "memory": ("locate", llama, "--device-map", "auto", "--max-memory", "much"),
        "adapter-base": ("locate", "toys/llama-adapter", *_TEXTS),
        "not-gguf": ("locate", "toys/words.gguf"),
        "explain-range": ("explain", llama, *_TEXTS, "--layers", "2,8"),
        "explain-layers": ("explain", llama, "--layers", "x"),
        "explain-backwards": ("explain", llama, "--layers", "5-3"),
        "rigidity-one": ("rigidity", llama, *_TEXTS, "--n-first-tokens", "1"),
        "rigidity-many": ("rigidity", llama, *_TEXTS, "--n-first-tokens", "1000"),
        "sinks-1": ("sinks", llama, "-T", "1"),
        "sinks-long": ("sinks", llama, *_TEXTS, "-T", "64"),
        "sinks-epsilon": ("sinks", llama, "--epsilon", "2"),
        "sweep-selector": ("sweep", nowhere, "--selectors", "best"),
        "sweep-rate": ("sweep", nowhere, "--rates", "0,1.5"),
        "sweep-word": ("sweep", nowhere, "--rates", "0,x"),
        "sweep-dots": ("sweep", nowhere, "--rates", "0,...,1"),
        "sweep-steps": ("sweep", nowhere, "--rates", "0,0.3,...,1"),
        "sweep-none": ("sweep", nowhere, "--rates", ","),
        "sweep-out": ("sweep", llama, *_TEXTS, "-T", "16", "--out", unwritable),
        "sweep-range": ("sweep", llama, *_TEXTS, "-T", "16", "--layers", "12-"),
        "sweep-nothing": ("sweep", llama, "--file", "toys/nothing-massive.txt", "-T", "16"),
        "sweep-masked": ("sweep", "toys/llama-masked", *_TEXTS, "-T", "16"),
        "report-out": ("report", llama, *_TEXTS, "--out", unwritable),
        "report-long": ("report", llama, *_TEXTS, "--out", OUT, "-T", "60"),
        "generate-prompt": ("generate", llama, "--prompt", " ", "--layers", "4"),
        "generate-selector": ("generate", nowhere, "--prompt", "a", "--selector", "best"),
        "generate-rate": ("generate", nowhere, "--prompt", "a", "--mask-rate", "2"),
        "generate-positions": ("generate", nowhere, "--prompt", "a", "--positions", "last"),
        "generate-chat": ("generate", llama, "--prompt", "w1", "--layers", "4", "--selector", "random", "--chat"),
        "generate-long": ("generate", llama, *_TEXTS, "--prompt", "w1", "--max-new-tokens", "256"),
        "quant-format": ("quant-check", nowhere, "--formats", "int3"),
        "quant-granularity": ("quant-check", nowhere, "--granularities", "per-head"),
        "quant-treatment": ("quant-check", nowhere, "--treatments", "cooked"),
        "quant-prefix": ("quant-check", llama, *_TEXTS, "--prefix", " "),
        "quant-out": ("quant-check", llama, *_TEXTS, *_FEW, "--out", unwritable),
        "quant-short": ("quant-check", llama, *_TEXTS, "-T", "1"),
        "scan-data": ("scan", llama, "--data", "toys/nowhere.jsonl"),
        "scan-kinds": ("scan", llama, "--data", "toys"),
        "scan-column": ("scan", llama, "--data", "toys/corpus.jsonl", "--column", "body"),
        "scan-category": ("scan", llama, "--data", "toys/texts.txt", "--category", "kind"),
        "scan-sites": ("scan", llama, "--data", "toys/corpus.jsonl", "--sites", "everywhere"),
        "scan-formats": ("scan", llama, "--data", "toys/corpus.jsonl", "--formats", "int3"),
        "scan-mask": ("scan", llama, "--data", "toys/corpus.jsonl", "--mask-rate", "0.5"),
        "scan-masked": (
            *("scan", "toys/llama-masked", "--data", "toys/corpus.jsonl"),
            *("--formats", "int8", "--mask-rate", "0.5"),
        ),
        "scan-out": ("scan", llama, "--data", "toys/corpus.jsonl", "--out", unwritable),
        "contrast-one": ("contrast", llama),
        "contrast-nowhere": ("contrast", llama, nowhere, *_TEXTS, "-T", "16", "--n-first-tokens", "8"),
        "compare-nowhere": ("compare", "toys", "toys/nowhere"),
        "eval-rate": ("eval", nowhere, "--tasks", "gsm8k", "--mask-rate", "7"),
        "eval-task": ("eval", llama, "--tasks", "no-such-task", *_TEXTS),
        "tune-columns": ("tune", "sft", nowhere, "--data", "toys/answers.jsonl", "--out", OUT, "--columns", "text"),
        "tune-layers": ("tune", "dpo", nowhere, "--data", "toys/answers.jsonl", "--out", OUT, "--layers", "4-"),
        "tune-data": ("tune", "sft", llama, "--data", "toys/nowhere.jsonl", "--out", OUT),
    }
    return [_case(f"error-{name}", command) for name, command in commands.items()]
