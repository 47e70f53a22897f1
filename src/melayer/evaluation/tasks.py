"""Benchmarks as lm-evaluation-harness defines them, with items from the hub or from local files."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melayer.data.files import is_there
from melayer.errors import InputError, first_line
from melayer.evaluation.local_files import (
    ALIASES,
    BENCHMARKS,
    NAMES,
    LocalRows,
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
    notes: tuple[str, ...] = ()
    """On rows of the files that are left out."""

    def keys(self, limit: int | None = None) -> list[str]:
        """The items, as `task/place`: the first of each task, or all."""
        return [
            f"{name}/{place}" for name, task in self.tasks.items() for place in range(len(task.eval_docs))[slice(limit)]
        ]


FEWSHOT_SEED = 1234
"""lm-eval's own default, so that both ask the same questions."""
ANSWER_TOKENS = 256
"""What lm-eval's model class allows where a task names no number."""


def load_tasks(
    names: Sequence[str],
    *,
    data: str | Path | None = None,
    fewshot: int | None = None,
    max_new_tokens: int | None = None,
) -> tuple[Benchmark, ...]:
    """The benchmarks of these names, with their items.

    Args:
        names: Of `NAMES`, or of any task or group that lm-eval knows.
        data: A directory with the files of the benchmarks that are read from there; the others come from the hub.
        fewshot: Solved examples in each prompt; by default the task's own number.
        max_new_tokens: Tokens of a generated answer at most; by default the task's own number.

    Raises:
        InputError: A name is not known, a file is missing or lacks a field, or the hub cannot be reached.

    Example:
        >>> load_tasks(["ifeval"], data="data")  # doctest: +SKIP
    """
    names = list(dict.fromkeys(ALIASES.get(name, name) for name in names))
    if not names:
        raise InputError(f"No tasks were given; expected some of {', '.join(NAMES)}, or names of lm-eval's tasks.")
    _check_installed()
    if data is not None and not (is_there(Path(data)) and Path(data).is_dir()):
        raise InputError(f"There is no directory {data}. Give the one that holds the benchmarks' files.")
    with quiet():
        _check_names([name for name in names if name not in BENCHMARKS])
        benchmarks = tuple(
            _known(name, None if data is None else Path(data), fewshot) if name in BENCHMARKS else _other(name, fewshot)
            for name in names
        )
    for task in (task for benchmark in benchmarks for task in benchmark.tasks.values()):
        if task.OUTPUT_TYPE == "generate_until":
            own = (task.config.generation_kwargs or {}).get("max_gen_toks", ANSWER_TOKENS)
            task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens or own}, update=True)
    return benchmarks


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
        provide_punkt()
    overrides: dict[str, Any] = {} if fewshot is None else {"num_fewshot": fewshot}
    if name == "xstest":
        found = found if local else rows_of_the_hub()
        tasks = {"xstest": xstest_task(found.splits)}
    else:
        children = []
        for task, rows in splits_by_task(name, found.splits).items():
            child = {"task": task, **overrides}
            if rows:
                child |= {"custom_dataset": custom_dataset(rows), "dataset_kwargs": None}
                # Splits that nothing is taken from, but that lm-eval would look for.
                unused = {"training_split": "train", "validation_split": "validation"}
                child |= {key: None for key, split in unused.items() if split not in rows}
            children.append(child)
        tasks = _loaded(children, known.folder)
    files = {} if data is None or not local else {file: sha256_of(data / file) for file in known.files.values()}
    return Benchmark(name, tasks, known.primary, files, known.cite, found.notes)


def _other(name: str, fewshot: int | None) -> Benchmark:
    overrides = {} if fewshot is None else {"num_fewshot": fewshot}
    return Benchmark(name, _loaded([{"task": name, **overrides}], None), (), {})


def _loaded(children: Sequence[dict[str, Any]], folder: str | None) -> dict[str, Any]:
    import datasets
    import lm_eval.tasks

    if folder is None:
        manager = lm_eval.tasks.TaskManager()
    else:
        # The list of all fourteen thousand tasks takes seven seconds to make.
        path = Path(lm_eval.tasks.__file__).parent / folder
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(path))
    name = children[0]["task"]
    try:
        return dict(manager.load({"group": "melayer", "task": list(children)})["tasks"])
    except (datasets.exceptions.DatasetNotFoundError, OSError) as error:
        raise InputError(
            f"The items of {name} cannot be had from the hub ({first_line(error).rstrip('.')}). Check the network, or "
            f"give --data DIR with local files, which {', '.join(NAMES)} can be read from."
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"lm-eval cannot make the task {name}: {first_line(error).rstrip('.')}.") from error


def _check_names(names: Sequence[str]) -> None:
    if not names:
        return
    from lm_eval.tasks import TaskManager

    every = set(TaskManager().all_tasks)
    for name in names:
        if name not in every:
            near = difflib.get_close_matches(name, [*NAMES, *sorted(every)], n=4)
            hint = f"The nearest are {', '.join(near)}." if near else "`lm-eval ls tasks` lists lm-eval's."
            raise InputError(
                f"There is no task {name!r}; expected one of {', '.join(NAMES)} or one of lm-eval's. {hint}"
            )


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
