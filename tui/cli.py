"""The command line. Each verb lives in one file of ``commands/`` and is imported only when it is asked for.

stdout is data, stderr is talk. Exit codes: 0 done, 1 a failure, 2 a mistake that the user can put right, 130 Ctrl-C.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import Annotated

import typer

from ..planner.errors import FinetuiError
from ..planner.version import VERSION

#: Verb → module in ``commands/``, in the order of the help page.
VERBS: dict[str, str] = {
    "quickstart": "quickstart",
    "plan": "plan",
    "fit": "fit",
    "gpus": "gpus",
    "advise": "advise",
    "run": "run",
    "runs": "runs",
    "attach": "attach",
    "logs": "logs",
    "compare": "compare",
    "top": "top",
    "serve": "serve",
    "stop": "stop",
    "resume": "resume",
    "data": "data",
    "chat": "chat",
    "export": "export",
    "bench": "bench",
    "doctor": "doctor",
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``finetui`` and of ``python -m finetui``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = next((word for word in arguments if not word.startswith("-")), None)
    gc.disable()  # while modules are imported the collector finds nothing to free
    try:
        if not arguments:  # the app paints before any verb is imported
            from .app import run_app

            gc.enable()
            run_app()
            return
        app = _build([verb] if verb in VERBS else list(VERBS))
        gc.enable()
        app(args=arguments, prog_name="finetui", standalone_mode=True)
    except FinetuiError as error:
        _report(error, as_json="--json" in arguments)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `finetui logs | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def _build(verbs: list[str]) -> typer.Typer:
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

    for verb in verbs:
        module = importlib.import_module(f".commands.{VERBS[verb]}", __package__)
        app.command(verb)(getattr(module, verb))
    return app


def _report(error: FinetuiError, *, as_json: bool) -> None:
    if as_json:
        parts = {"kind": type(error).__name__, "what": error.what, "where": error.where, "do": error.do}
        print(json.dumps({"error": parts}, indent=2, ensure_ascii=False))
        return
    print(f"finetui: {error}", file=sys.stderr)
