"""The group of commands: parsing included, each runs in a session, so that nothing ends in a trace."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

from melayer.cli import streams
from melayer.cli.session import asked, exit_code, session
from melayer.errors import InputError

MAY_BE_EMPTY = frozenset({"text", "prompt", "system", "instruction", "prefix"})
"""Options of texts: what an empty one means is said where it is used."""


class Commands(TyperGroup):
    """typer's group, with an end of our own: one sentence on stderr, and a code that says what kind of end it is."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **__: Any) -> Any:
        """Runs the command line, and leaves Python."""
        given = [str(word) for word in (sys.argv[1:] if args is None else args)]
        with exit_code() as code, asked(given), session("--debug" in given):
            streams.prepare()
            with streams.to_stdout(), self.make_context(prog_name or self.name or "melayer", list(given)) as context:
                self.invoke(context)
        sys.exit(code())

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command, its name and its arguments, which are looked at before typer makes values of them."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not isinstance(command, TyperGroup):
            _check(command, type(ctx)(command, info_name=name, parent=ctx), rest)
        return name, command, rest


def _check(command: Any, context: Any, words: list[str]) -> None:
    """Raises InputError where an option is given the empty text: what a shell makes of a variable that is not set.

    As a path it would be the directory at hand.
    """
    if "--help" in words:
        return
    values, _, order = command.make_parser(context).parse_args(args=list(words))
    for parameter in order:
        said = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name.upper()
        if values.get(parameter.name) == "" and parameter.name not in MAY_BE_EMPTY:
            raise InputError(f"{said} was given without a value (''). Give one, or leave it out.")


def positionals(root: Any, words: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """The command of a command line, and its arguments without the options; None where it is none of ours.

    Args:
        root: The group of all commands.
        words: The command line without the program's name.
    """
    command, context, rest, names = root, root.context_class(root), list(words), []
    try:
        while isinstance(command, TyperGroup):
            name, command, rest = TyperGroup.resolve_command(command, context, rest)
            context = type(context)(command, info_name=name, parent=context)
            names.append(str(name))
        values, _, order = command.make_parser(context).parse_args(args=rest)
    except Exception as error:  # noqa: BLE001 - it is of another version, or no command line at all
        del error
        return None
    arguments = [parameter for parameter in order if parameter.param_type_name == "argument"]
    return " ".join(names), tuple(str(values[parameter.name]) for parameter in arguments)
