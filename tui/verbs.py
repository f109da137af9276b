"""The verbs of the command line, as one Typer app. Not needed, and so not imported, when the app is what is wanted."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.models import OptionInfo

from ..planner.version import VERSION


def build(verbs: Mapping[str, str]) -> typer.Typer:
    """The command line with these verbs; each names its module in ``commands/``, which is imported now."""
    app = typer.Typer(
        help="Plan a fine-tune before you download or rent anything, then run that very plan.",
        no_args_is_help=False,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    ) -> None:
        if version:
            print(VERSION)
            raise typer.Exit
        if context.invoked_subcommand is None:
            print(context.get_help())

    for verb, name in verbs.items():
        module = importlib.import_module(f".commands.{name}", __package__)
        command = getattr(module, name)
        _name_values(command)
        app.command(verb)(_with_plain(command))
    return app


#: Letters of what an option takes, above which it is called a name.
_LONGEST_WORD = 8


def _name_values(command: Callable[..., None]) -> None:
    """Name what each option takes, as in ``--rank N``: typer would show its Python type."""
    for parameter in signature(command, eval_str=True).parameters.values():
        kind, *more = get_args(parameter.annotation) or (parameter.annotation,)
        kinds = get_args(kind) or (kind,)  # X | None, list[X] | None
        for option in more:
            if not isinstance(option, OptionInfo) or option.metavar or bool in kinds:
                continue
            if int in kinds or float in kinds:
                option.metavar = "N" if int in kinds else "X"
            elif Path in kinds:
                option.metavar = "PATH"
            elif not any(get_origin(one) is Literal for one in kinds):  # typer lists the values of those
                word = parameter.name.rpartition("_")[2].upper()
                option.metavar = word if len(word) <= _LONGEST_WORD else "NAME"


#: What makes rich print words alone, one row to a line however wide the terminal.
_PLAIN = {"TTY_COMPATIBLE": "0", "NO_COLOR": "1", "COLUMNS": "1000"}


def _with_plain(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb that can answer in JSON the other plain form too, unless it has one of its own."""
    own = list(signature(command, eval_str=True).parameters.values())
    if not {"as_json"} <= (names := {parameter.name for parameter in own}) or "plain" in names:
        return command
    words = "Words alone: no colours, nothing that moves, one row to a line."
    flag = Parameter(
        "plain", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, typer.Option("--plain", help=words)]
    )

    def wrapped(*, plain: bool = False, **values: Any) -> None:
        if plain:
            os.environ.update(_PLAIN)
        command(**values)

    own = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]
    wrapped.__doc__ = command.__doc__
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, flag)}
    wrapped.__signature__ = Signature([*own, flag])  # type: ignore[attr-defined]
    return wrapped
