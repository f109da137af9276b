"""A GGUF file and the Modelfile from which Ollama makes a model that talks as this one was trained to.

Without a TEMPLATE Ollama guesses one. The Modelfile's is written from the form of the trained chat template
(:mod:`.turn_form`), in Go's template language as Ollama has it (https://github.com/ollama/ollama, docs/template.md):
``.Messages`` are the turns, system messages among them; ``.System`` is what those say.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...planner.errors import RunError
from ..chat import result_folder
from ..data.examples import Message
from ..data.template import own_template, render, stop_token_ids
from ..models.load import load_tokenizer
from ..output import written_whole
from ..run import Run
from .exported import Exported, Tell, plain_name
from .gguf import prepare
from .gguf_tokenizer import begins_with_bos
from .turn_form import TurnForm, find

#: Of a generation config, what a Modelfile calls alike.
_SAMPLING = ("temperature", "top_k", "top_p")


def export_ollama(run: Run, destination: Path, tell: Tell, *, quant: str = "auto", system: str = "") -> Exported:
    """Write a GGUF file and a Modelfile into ``destination``.

    Args:
        quant: as for a GGUF file.
        system: the system message of the Modelfile; none if empty.

    Raises:
        RunError: the chat template is none that Ollama's language can say, or has no place for ``system``.
        UserError: those of a GGUF file.
    """
    result = result_folder(run)
    tokenizer, _ = load_tokenizer(result)
    form, notes = _form(tokenizer, run.plan.resolved.method, system)
    prepared = prepare(run, destination, quant)
    text = modelfile(prepared.name, form, _stops(tokenizer), _sampling(result), system)
    with written_whole(destination) as partial:
        wrote = prepared.write(partial, tell)
        (partial / "Modelfile").write_text(text, encoding="utf-8")
    words = "TEMPLATE: writes conversations as the trained chat template does" if form else ""
    checked = tuple(filter(None, (*prepared.checked, words, wrote)))
    name = plain_name(run)
    use = (shlex.join(["ollama", "create", name, "-f", str(destination / "Modelfile")]), f"ollama run {name}")
    return Exported(destination, checked, (*prepared.layout.notes, *notes), use)


def _form(tokenizer: Any, method: str, system: str) -> tuple[TurnForm | None, tuple[str, ...]]:
    """The form of the trained template, None for a model that goes on with text, and what it leaves out."""
    if method == "pretrain" or not tokenizer.chat_template:
        if system:
            raise RunError("this model knows no system message", where="--system", do="Leave --system out.")
        return None, ("the model was trained on text, not on turns: it goes on with what it is given",)
    bos = str(tokenizer.bos_token or "") if begins_with_bos(tokenizer) else ""

    def write(messages: Sequence[Message]) -> str:
        return render(tokenizer, messages, "the probe", prompt=True).removeprefix(bos)  # Ollama puts it there

    form = find(write, [str(token) for token in tokenizer.added_tokens_decoder.values()])
    if system and form.system is None:
        what = "the chat template has no place for a system message"
        raise RunError(what, where="--system", do="Leave --system out.")
    template, notes = own_template(tokenizer), []
    if "tools" in template:
        notes.append("the TEMPLATE of the Modelfile has no place for tools")
    if "strftime_now" in template:
        notes.append("the chat template writes the date: that of today stands in the Modelfile")
    if form.head.strip() and form.system:
        notes.append(f"without a system message the template writes its own: {_short(form.head)!r}")
    if render(tokenizer, [Message("user", "  a  ")], "the probe").find("  a  ") < 0:
        notes.append("Ollama keeps white space around messages, which the trained chat template drops")
    return form, tuple(notes)


def _short(text: str, most: int = 100) -> str:
    return text if len(text) <= most else text[:most] + "…"


def _stops(tokenizer: Any) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))]


def _sampling(folder: Path) -> dict[str, float]:
    """How the model's makers draw from it, where they say so."""
    file = folder / "generation_config.json"
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not told.get("do_sample"):
        return {}
    return {key: told[key] for key in _SAMPLING if isinstance(told.get(key), int | float)}  # text could say anything


def modelfile(gguf: str, form: TurnForm | None, stops: Sequence[str], sampling: dict[str, float], system: str) -> str:
    """The text of a Modelfile.

    Args:
        gguf: the file beside it.
        form: of conversations; None hands text through as it is.
        stops: text that ends an answer.
    """
    template = go_template(form) if form else "{{ .Prompt }}"
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{_quotable(template, "chat template")}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER {key} {value}" for key, value in sampling.items()]
    if system:
        lines.append(f'SYSTEM """{_quotable(system, "--system")}"""')
    return "\n".join(lines) + "\n"


def _quotable(text: str, where: str) -> str:
    if '"""' in text or text.endswith('"'):
        do = "Leave them out." if where == "--system" else "Use --to gguf: llama-server runs the template itself."
        raise RunError("a Modelfile has no way to write these quotation marks", where=where, do=do)
    return text


def go_template(form: TurnForm) -> str:
    """A form in Go's template language; no white space is trimmed, so that literal text is what it looks like."""
    before, after = (_literal(part) for part in form.system or ("", ""))
    message = f"{before}{{{{ $.System }}}}{after}"
    head, place = _literal(form.head), ""
    if form.system and not form.folded:
        otherwise = f"{{{{ else }}}}{head}" if head else ""
        head = f"{{{{ if .System }}}}{message}{otherwise}{{{{ end }}}}"
    elif form.folded == "last":
        place = f"{{{{ if and $.System $last }}}}{message}{{{{ end }}}}"
    elif form.folded == "first":  # the system message itself comes first of all
        place = f"{{{{ if and $.System (eq $i 1) }}}}{message}{{{{ end }}}}"
    answer, ask = _literal(form.answer), _literal(form.ask)
    following = answer if answer == ask else f"{{{{ if $last }}}}{ask}{{{{ else }}}}{answer}{{{{ end }}}}"
    return (
        head
        + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + f'{{{{ if eq .Role "user" }}}}{_literal(form.user)}{place}{{{{ .Content }}}}{following}'
        + '{{ else if eq .Role "assistant" }}{{ .Content }}'
        + f"{{{{ if not $last }}}}{_literal(form.end)}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
