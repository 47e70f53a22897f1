"""Benchmarks as lm-evaluation-harness defines them, with items from the hub or from local files."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from melayer.data.files import is_there
from melayer.errors import InputError, border, first_line, reason
from melayer.evaluation.hub_code import hub_code, hub_metric
from melayer.evaluation.local_files import (
    ALIASES,
    BENCHMARKS,
    NAMES,
    LocalRows,
    Rows,
    custom_dataset,
    read_splits,
    splits_by_task,
)
from melayer.evaluation.punkt import provide_punkt
from melayer.evaluation.xstest import rows_of_the_hub, xstest_task
from melayer.runs.cache import sha256_of


@dataclass(frozen=True, eq=False)
class Benchmark:
    """One or more of lm-eval's tasks whose items are counted together."""

    name: str
    tasks: Mapping[str, Any]
    """lm-eval's task objects by name."""
    primary: tuple[str, ...]
    """The metrics to judge by, as in `metric` or `metric,filter`; empty for all of a task that is not known here."""
    data: Mapping[str, str]
    """For each local file its sha256; empty where the items come from the hub."""
    cite: str = ""
    fields: tuple[str, ...] = ()
    """That each item must have, and not empty."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """By row of a local file why lm-eval cannot read it."""
    trust_remote_code: bool = False
    """Whether metrics may be code from the hub."""
    notes: tuple[str, ...] = ()
    """On rows of the files that are left out."""

    def keys(self, limit: int | None = None) -> list[str]:
        """The items, as `task/place`: the first of each task, or all."""
        return [
            f"{name}/{place}" for name, task in self.tasks.items() for place in range(len(task.eval_docs))[slice(limit)]
        ]


FEWSHOT_SEED = 1234
"""lm-eval's own default, so that both ask the same questions."""
_FILES = "Look at the files of --data DIR, or leave it out."
ANSWER_TOKENS = 256
"""What lm-eval's model class allows where a task names no number."""


def load_tasks(
    names: Sequence[str],
    *,
    data: str | Path | None = None,
    fewshot: int | None = None,
    max_new_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[Benchmark, ...]:
    """The benchmarks of these names, with their items.

    Args:
        names: Of `NAMES`, or of any task or group that lm-eval knows.
        data: A directory with the files of the benchmarks that are read from there; the others come from the hub.
        fewshot: Solved examples in each prompt; by default the task's own number.
        max_new_tokens: Tokens of a generated answer at most; by default the task's own number.
        trust_remote_code: Whether metrics may be programs that `evaluate` fetches from the hub. Tasks that run what
            the model writes are refused in any case.

    Raises:
        InputError: A name is not known, a file is missing or lacks a field, the hub cannot be reached, or a task runs
            code that was not asked for.

    Example:
        >>> load_tasks(["ifeval"], data="data")  # doctest: +SKIP
    """
    names = list(dict.fromkeys(ALIASES.get(name, name) for name in names))
    if not names:
        raise InputError(f"No tasks were given; expected some of {', '.join(NAMES)}, or names of lm-eval's tasks.")
    _check_installed()
    if data is not None and not (is_there(Path(data)) and Path(data).is_dir()):
        raise InputError(f"There is no directory {data}. Give the one that holds the benchmarks' files.")
    with quiet(), hub_code(trust_remote_code) as refused:
        manager = _manager_of([name for name in names if name not in BENCHMARKS])
        benchmarks = tuple(
            _known(name, None if data is None else Path(data), fewshot)
            if name in BENCHMARKS
            else _other(name, fewshot, manager)
            for name in names
        )
    if refused:  # lm-eval leaves such a metric out with a line in its log
        raise InputError(hub_metric(refused[0]))
    for name, task in ((name, task) for benchmark in benchmarks for name, task in benchmark.tasks.items()):
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(
                f"The task {name} runs the programs that the model writes, which melayer does not do. Give another "
                "task, or run it with lm-eval in a place where nothing can be harmed."
            )
        if task.OUTPUT_TYPE == "generate_until":
            with border(f"lm-eval cannot make the task {name}", "Give another task."):
                own = _answer_tokens(task)
            task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens or own}, update=True)
    return tuple(replace(benchmark, trust_remote_code=trust_remote_code) for benchmark in benchmarks)


def _answer_tokens(task: Any) -> int:
    """How long an answer may be by the task's own settings, under any of the names that lm-eval knows for that."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(task.config.generation_kwargs or {}, ANSWER_TOKENS)["max_gen_toks"])


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            "Evaluation needs lm-evaluation-harness, which is not installed. Get it with: pip install 'melayer[eval]'"
        ) from error


def _known(name: str, data: Path | None, fewshot: int | None) -> Benchmark:
    known = BENCHMARKS[name]
    local = data is not None and any(is_there(data / file) for file in known.files.values())
    if data is not None and not local and name != "aime24":
        file = next(iter(known.files.values()))
        raise InputError(
            f"{name} is to be read from {data}, but {data / file} is missing. Add it, or leave --data out."
        )
    found = LocalRows({}) if not local or data is None else read_splits(name, data)
    if name == "ifeval":
        with border("nltk's sentence model, which IFEval needs, cannot be had", "Install 'melayer[eval]' anew."):
            provide_punkt()
    overrides: dict[str, Any] = {} if fewshot is None else {"num_fewshot": fewshot}
    unread: dict[str, str] = {}
    if name == "xstest":
        with border("XSTest's items cannot be read", "See docs/evaluate.md for what its file looks like."):
            found = found if local else rows_of_the_hub()
            tasks = {"xstest": xstest_task(found.splits)}
    else:
        children = []
        for task, rows in splits_by_task(name, found.splits).items():
            child = {"task": task, **overrides}
            if rows:
                child |= {"rows": rows, "dataset_kwargs": None}
                # Splits that nothing is taken from, but that lm-eval would look for.
                unused = {"training_split": "train", "validation_split": "validation"}
                child |= {key: None for key, split in unused.items() if split not in rows}
            children.append(child)
        manager = _manager(known.folder)
        if found.splits:
            tasks, unread = _loaded_from_rows(children, manager)
        else:
            tasks = _loaded(children, manager, _FILES)
    files = {} if data is None or not local else {file: sha256_of(data / file) for file in known.files.values()}
    return Benchmark(name, tasks, known.primary, files, known.cite, known.fields, unread, notes=found.notes)


def _other(name: str, fewshot: int | None, manager: Any) -> Benchmark:
    overrides = {} if fewshot is None else {"num_fewshot": fewshot}
    todo = f"Give other names; of local files (--data DIR) {', '.join(NAMES)} can be made."
    return Benchmark(name, _loaded([{"task": name, **overrides}], manager, todo), (), {})


def _loaded_from_rows(children: Sequence[dict[str, Any]], manager: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The tasks of rows at hand, without those that a task's own preparation fails on, and why it does."""

    def made(rows_of: Mapping[str, Mapping[str, Rows]]) -> dict[str, Any]:
        given = [
            {key: value for key, value in child.items() if key != "rows"}
            | {"custom_dataset": custom_dataset(rows_of[child["task"]])}
            for child in children
        ]
        return _loaded(given, manager, _FILES)

    rows = {child["task"]: child["rows"] for child in children}
    try:
        return made(rows), {}
    except InputError as error:
        kept: dict[str, dict[str, Rows]] = {}
        unread: dict[str, str] = {}
        for task, splits in rows.items():
            kept[task] = {}
            for split, of_split in splits.items():
                why = [_unprepared(task, manager, row) for row in of_split]
                kept[task][split] = [row for row, fault in zip(of_split, why, strict=True) if fault is None]
                unread |= {f"{task}, row {place} of {split}": fault for place, fault in enumerate(why) if fault}
        if not unread or not all(of_split for splits in kept.values() for of_split in splits.values()):
            raise error
        return made(kept), unread


def _unprepared(task: str, manager: Any, row: Mapping[str, Any]) -> str | None:
    """Why a task's preparation of its rows fails on this one; None where it does not."""
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        prepare = load_yaml(manager.task_index[task].yaml_path).get("process_docs")
        alone = datasets.Dataset.from_list([dict(row)])
        list(alone if prepare is None else prepare(alone))
    except Exception as error:  # noqa: BLE001 - whatever a task's own code raises over a row
        return reason(error)
    return None


def _manager(folder: str | None) -> Any:
    """lm-eval's list of tasks: of one folder, or all."""
    import lm_eval.tasks

    if folder is None:
        return lm_eval.tasks.TaskManager()
    # The list of all fourteen thousand tasks takes seven seconds to make.
    path = Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(path))


def _loaded(children: Sequence[dict[str, Any]], manager: Any, todo: str) -> dict[str, Any]:
    import datasets

    name = children[0]["task"]
    with border(f"lm-eval cannot make the task {name}", todo):
        try:
            return dict(manager.load({"group": "melayer", "task": list(children)})["tasks"])
        except (datasets.exceptions.DatasetNotFoundError, OSError) as error:
            raise InputError(
                f"The items of {name} cannot be had from the hub ({first_line(error).rstrip('.')}). Check the network, "
                f"or give --data DIR with local files, which {', '.join(NAMES)} can be read from."
            ) from error


def _manager_of(names: Sequence[str]) -> Any:
    """lm-eval's list of all its tasks, in which these are; None where none is asked for."""
    if not names:
        return None
    for name in names:
        if Path(name).suffix in (".yaml", ".yml") or "/" in name or "\\" in name:
            raise InputError(
                f"{name!r} is a file: tasks are taken by name alone, since a task's file can name programs (!function) "
                "that would run. Give the name of one of lm-eval's tasks."
            )
    with border("lm-eval's list of tasks cannot be read", "Install 'melayer[eval]' anew."):
        manager = _manager(None)
        every = set(manager.all_tasks)
    for name in names:
        if name not in every:
            near = difflib.get_close_matches(name, [*NAMES, *sorted(every)], n=4)
            hint = f"The nearest are {', '.join(near)}." if near else "`lm-eval ls tasks` lists lm-eval's."
            raise InputError(
                f"There is no task {name!r}; expected one of {', '.join(NAMES)} or one of lm-eval's. {hint}"
            )
    return manager


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and datasets tell their own users what they do; errors still come through."""
    import datasets

    logger, bars = logging.getLogger("lm_eval"), datasets.utils.logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.utils.logging.enable_progress_bar()
