"""Job: one file that is being imported, and what every importer does alike with models, data and templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import RecipeError
from .ledger import Ledger

_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".bz2", ".xz")
#: ``train[:100]``, ``train[10%:20%]``: a split and a part of it.
_PART = re.compile(r"([\w.-]+)\[:(\d+)(%?)\]")


@dataclass(frozen=True)
class Job:
    """What is imported.

    ``folder`` is that of the file, ``gpus`` how many GPUs it was started on, ``method`` what the command line of the
    other tool said where its file does not.
    """

    ledger: Ledger
    folder: Path
    gpus: int = 1
    method: str | None = None

    def found(self, path: str) -> str | None:
        """The absolute path of what is here, from where one stands or beside the file; None if nothing is."""
        for base in (Path.cwd(), self.folder):
            try:
                there = base / Path(path).expanduser()
                if path and there.exists():
                    return str(there.resolve())
            except (OSError, ValueError, RuntimeError):  # no file can have this name
                return None
        return None

    def local(self, path: str) -> str:
        """A path that is here as an absolute one; others, and hub ids, as they are."""
        return self.found(path) or path

    def refuse(self, key: str, what: str, do: str) -> RecipeError:
        """The error of a file that describes what finetui has no method for: half of it would be another training."""
        return RecipeError(what, where=self.ledger.where(key), do=do)

    def need(self, key: str) -> str:
        """The text at a key that has to be there.

        Raises:
            RecipeError: it is missing.
        """
        value = self.ledger.text(key)
        if not value:
            raise RecipeError(f"{key} is missing", where=self.ledger.where(key), do="Say which model is trained.")
        return value


def is_file(path: str) -> bool:
    """Whether a data path means a file or folder, not a hub dataset."""
    return path.startswith(("/", "./", "../", "~")) or path.lower().endswith(_FILES)


def split(source: Ledger, key: str, to: str, path: str, *, trained: bool = True) -> None:
    """Carry the split of a hub dataset, or the part of a file.

    Args:
        to: our source, such as ``data.0``.
        path: what the source reads.
        trained: it is trained on, so that a share of its rows can be taken.
    """
    name = source.text(key)
    if name is None:
        return
    part = _PART.fullmatch(name)
    if name == "train" and trained:
        source.idle(key, "it is the one that is taken")
    elif not is_file(path):
        source.carry(key, f"{to}.hub_split", name)
    elif part is not None and not part[3] and int(part[2]):
        source.carry(key, f"{to}.limit", int(part[2]))
    elif part is not None and part[3] and trained and 0 < int(part[2]) < 100:
        source.carry(key, f"{to}.weight", int(part[2]) / 100, "a random share of the rows, not the first")
    else:
        source.lose(key, f"would read the part {name} of the file", "Put those rows into a file of their own.")


def template(ledger: Ledger, key: str, known: Mapping[str, str], job: Job) -> None:
    """Carry the name of a chat template, or a file that holds one."""
    name = ledger.text(key)
    if name is None:
        return
    if known.get(name) == "auto":
        ledger.idle(key, "the tokenizer's own is the default")
    elif name in known:
        ledger.carry(key, "chat_template", known[name])
    elif name.endswith((".jinja", ".jinja2", ".j2")):
        ledger.carry(key, "chat_template", job.local(name))
    else:
        do = "The tokenizer's own is used; finetui data shows what it makes. Or give a .jinja file as chat_template."
        ledger.lose(key, f"would write chats in the form {name!r} of that tool", do)


def mapped(source: Ledger, key: str, to: str, columns: Mapping[str, str]) -> None:
    """Carry the name of a column, where it is not the usual one."""
    part = columns[key]
    name = source.text(key)
    if name is not None:
        source.carry(key, f"{to}.columns.{part}", name)
