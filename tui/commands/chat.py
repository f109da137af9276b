"""``finetui chat``: talk to a tuned model, and to its base beside it."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from ...engine.run import Run, trained
from ...planner.errors import MissingExtraError
from ..quiet import hush_libraries
from .options import JsonFlag, RunArgument

if TYPE_CHECKING:
    from ...engine.chat import ChatSession

BaseFlag = Annotated[bool, typer.Option("--base", help="Show the base model's answer beside the tuned one's.")]
PromptFlag = Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this once, print the answer, leave.")]
LengthFlag = Annotated[int, typer.Option("--max-new-tokens", min=1, max=2**20, help="Longest answer in tokens.")]
TemperatureFlag = Annotated[
    float, typer.Option("--temperature", min=0.0, max=100.0, help="0 always takes the likeliest token.")
]


def chat(
    run: RunArgument,
    base: BaseFlag = False,
    prompt: PromptFlag = None,
    max_new_tokens: LengthFlag = 256,
    temperature: TemperatureFlag = 0.0,
    as_json: JsonFlag = False,
) -> None:
    """Talk to the model of a run. /reset forgets the conversation, /quit or Ctrl-D leaves."""
    found = trained(Run.open(run))
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise MissingExtraError("chat", "train")
    hush_libraries()
    from ...engine.chat import ChatSession, Generation

    print(f"Loading {found.name} …", file=sys.stderr)
    session = ChatSession(found, base=base, generation=Generation(max_new_tokens, temperature))
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is not None:
        _once(session, prompt, as_json=as_json)
        return
    print("Ask something. /reset forgets the conversation, /quit leaves.", file=sys.stderr)
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line in {"/quit", "/exit"}:
            return
        if line == "/reset":
            session.clear()
        elif line:
            _answer(session, line)


def _answer(session: ChatSession, line: str) -> None:
    """Stream the tuned model's answer, then the base model's if it was asked for; Ctrl-C ends an answer."""
    for voice in session.voices:
        print(f"[{voice}] " if len(session.voices) > 1 else "", end="", flush=True)
        try:
            for piece in session.stream(line, voice):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" …", end="")
        print()


def _once(session: ChatSession, prompt: str, *, as_json: bool) -> None:
    if not as_json:
        _answer(session, prompt)
        return
    answers = {voice: session.answer(prompt, voice) for voice in session.voices}
    print(json.dumps({"prompt": prompt, **answers}, ensure_ascii=False))
