"""Everything that melayer raises on purpose: one base class, one child for each thing that can be wrong.

The message is written for the person who typed the command: what was given, what was expected, what to do.
The command line prints it and exits with code 2.
"""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class MelayerError(Exception):
    """Base of all errors that melayer raises on purpose."""


class ModelError(MelayerError):
    """The model or its tokenizer cannot be found, read or trusted."""


class ArchitectureError(MelayerError):
    """A part of the model is not where a decoder has it, so a site would have to be guessed."""


class InputError(MelayerError):
    """The texts or the options do not make a measurement."""


class OutputError(MelayerError):
    """A result cannot be written where it was asked for."""


class TrainingError(MelayerError):
    """Training cannot go on; what was kept until then is good."""


class ProcessError(MelayerError):
    """Another of the processes that share the work is gone."""


class MelayerWarning(UserWarning):
    """Something that does not make the answer wrong, but that its reader has to know."""


def require_known(
    given: str,
    known: Iterable[str],
    said: str,
    *,
    expected: str = "one of",
    suggest: bool = False,
    error: type[MelayerError] = InputError,
) -> None:
    """Raises InputError, or another `error`, unless the name that was given is one of those that there are.

    Args:
        given: The name.
        known: Those that there are, in the order in which they are listed.
        said: How the message begins, for example "There is no format 'int3'".
        expected: `one of`, or `some of` where several can be given.
        suggest: Whether the message ends with the known name that is most like the one given, if one is like it.
        error: What is raised.
    """
    names = list(known)
    if given not in names:
        near = difflib.get_close_matches(str(given), names, 1) if suggest else []
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise error(f"{said}; expected {expected} {', '.join(names)}.{meant}")


@contextmanager
def border(said: str, todo: str, *, error: type[MelayerError] = InputError) -> Iterator[None]:
    """Whatever others raise inside becomes one sentence of ours, so that no trace of theirs reaches a user.

    For every place where something comes in that we did not make: a path, a config, a tokenizer, a template, a row,
    a state, an option, a call of a library. What we raise ourselves passes, and so does what stops a program.

    Args:
        said: What was being done with which thing, for example "config.json of org/name cannot be read".
        todo: What to do, a sentence.
        error: What is raised.
    """
    try:
        yield
    except (MelayerError, MelayerWarning):
        raise
    except BaseException as caught:
        # A panic in Rust (tokenizers, safetensors) arrives as a BaseException that is not an Exception.
        if not isinstance(caught, Exception) and type(caught).__name__ != "PanicException":
            raise
        raise error(f"{said}: {reason(caught)}. {todo}") from caught


def reason(error: BaseException) -> str:
    """Why something failed, in one line without a full stop at its end, whatever kind of error it is."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[error.start : error.end]!r} is no character that can be written as {error.encoding}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not {error.encoding}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = first_line(error)
    if isinstance(error, KeyError | IndexError) or line == "":
        line = f"{type(error).__name__}: {line}"
    return (line if len(line) <= 300 else line[:299] + "…").rstrip(".")


def first_line(error: BaseException) -> str:
    """What another library's error says, without its further lines; the error's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def collected() -> Iterator[list[str]]:
    """Our own warnings inside the context become a list, once each; others go their way."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MelayerWarning)
        yield said
    for warning in caught:
        if not issubclass(warning.category, MelayerWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif str(warning.message) not in said:
            said.append(str(warning.message))
