"""Words and their rows: what to do where the tokenizers of merged models are not the same.

Row i of an embedding belongs to word i of its model's tokenizer. Models that gave their words other numbers, or have
words of their own, can be merged only after the rows were put in one order. Words are read from tokenizer.json; no
tokenizer is loaded for it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ...planner.errors import ModelError
from .sources import Source, read_json

FILE = "tokenizer.json"
#: How tensors with a row for each word end, in the families of transformers.
_BY_WORD = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
_HEAD_BIASES = ("lm_head.bias", "embed_out.bias")


def has_words(name: str) -> bool:
    """Whether a tensor has one row for each word."""
    return name.endswith((*_BY_WORD, *HEADS, *_HEAD_BIASES))


def embedding_of(names: Sequence[str]) -> str | None:
    """The input embedding among a model's tensors, if exactly one looks like it."""
    found = [name for name in names if name.endswith(_BY_WORD)]
    return found[0] if len(found) == 1 else None


def head_of(names: Sequence[str]) -> str | None:
    """The output head among a model's tensors, if it is stored."""
    return next((name for name in names if name.endswith(HEADS)), None)


@dataclass(frozen=True)
class Vocabulary:
    """The words of a tokenizer and their numbers; ``added`` are those with an entry of their own, as <|im_end|>."""

    ids: dict[str, int]
    added: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """One more than the largest number."""
        return max(self.ids.values(), default=-1) + 1


def vocabulary_of(source: Source) -> Vocabulary | None:
    """A model's words; None where it has no tokenizer.json."""
    found = [folder / FILE for folder in source.folders if (folder / FILE).is_file()]
    if not found:
        return None
    tree = read_json(found[-1])
    model = tree.get("model") or {}
    words = model.get("vocab") or {}
    ids = dict(words) if isinstance(words, dict) else {str(pair[0]): number for number, pair in enumerate(words)}
    added = {str(entry["content"]): entry for entry in tree.get("added_tokens") or ()}
    return Vocabulary(ids | {word: int(entry["id"]) for word, entry in added.items()}, added)


def has_chat_template(source: Source) -> bool:
    """Whether a model says how a conversation is written."""
    for folder in source.folders:
        config = folder / "tokenizer_config.json"
        if any(folder.glob("chat_template*")) or (config.is_file() and read_json(config).get("chat_template")):
            return True
    return False


@dataclass(frozen=True)
class Alignment:
    """The rows of the result: which row of each model belongs to each of them, -1 for none.

    ``new`` are the words that the first model's tokenizer lacks, with their entries for tokenizer.json.
    """

    rows: list[torch.Tensor]
    new: list[dict[str, Any]]

    @property
    def count(self) -> int:
        """Rows of the result."""
        return len(self.rows[0])

    def apply(self, tensors: Sequence[torch.Tensor], which: Sequence[int]) -> list[torch.Tensor]:
        """The tensors with their rows in the order of the result.

        Where a model lacks a word it gets the row of the first model, or where that lacks it too the mean of the rows
        of those that have it, so that a word's row is not pulled towards what never stood for it.

        Args:
            tensors: fp32, one row for each word of their models.
            which: the numbers of their models.
        """
        rows = [self.rows[number] for number in which]
        width = tensors[0].shape[1:]
        total, count = torch.zeros(self.count, *width), torch.zeros(self.count)
        for tensor, row in zip(tensors, rows, strict=True):
            known = row >= 0
            total[known] += tensor[row[known]]
            count += known
        total /= count.clamp_min(1.0).reshape(-1, *[1] * len(width))
        if 0 in which:
            known = self.rows[0] >= 0
            total[known] = tensors[which.index(0)][self.rows[0][known]]
        aligned = []
        for tensor, row in zip(tensors, rows, strict=True):
            known = row >= 0
            mine = total.clone()
            mine[known] = tensor[row[known]]
            aligned.append(mine)
        return aligned


def align(
    names: Sequence[str], vocabularies: Sequence[Vocabulary | None], rows: Sequence[int], keep: Literal["base", "union"]
) -> Alignment:
    """The order of rows for ``tokenizer: base`` or ``union``.

    Args:
        names: of the models, for messages; the first gives the tokenizer.
        vocabularies: theirs.
        rows: how many rows their embeddings have, which may be more than there are words.
        keep: the first model's words alone, or those that the others added to theirs too.

    Raises:
        ModelError: a model has no tokenizer.json, or the words to add belong to a vocabulary that was built anew.
    """
    known: list[Vocabulary] = []
    for name, one, count in zip(names, vocabularies, rows, strict=True):
        if one is None:
            raise ModelError(f"it has no {FILE}, from which its words could be read", where=name, do="Add it.")
        if one.size > count:
            what = f"its tokenizer has words up to {one.size - 1}, and its embedding {count} rows"
            raise ModelError(what, where=name, do="Use the tokenizer that belongs to it.")
        known.append(one)
    base, count = known[0], rows[0]
    ids, new = dict(base.ids), []
    if keep == "union":
        for name, one in zip(names[1:], known[1:], strict=True):
            for word in sorted(set(one.ids) - set(ids), key=one.ids.__getitem__):
                if word not in one.added:
                    what = f"{word!r} is a word of {name} and not of {names[0]}: their vocabularies were built apart"
                    raise ModelError(what, where="tokenizer", do="Only added words can be joined. Use tokenizer: base.")
                entry = copy.copy(one.added[word])
                entry["id"] = ids[word] = max(ids.values()) + 1
                new.append(entry)
        count = max(count, max(ids.values()) + 1)
    maps = []
    for number, one in enumerate(known):
        mine = torch.full((count,), -1, dtype=torch.int64)
        if number == 0:  # rows without a word are kept as well: they round the size up
            mine[: rows[0]] = torch.arange(rows[0])
            mine[[entry["id"] for entry in new]] = -1
        else:
            shared = [(ids[word], row) for word, row in one.ids.items() if word in ids]
            if shared:
                here, there = zip(*shared, strict=True)
                mine[list(here)] = torch.tensor(there)
        maps.append(mine)
    return Alignment(maps, new)


def differences(names: Sequence[str], vocabularies: Sequence[Vocabulary | None]) -> tuple[list[str], str]:
    """How the models' words differ from the first one's.

    Returns:
        Notes on words that only some models have, and, if words that both have stand in other rows, that in a sentence:
        such models can't be merged as they are.
    """
    notes: list[str] = []
    first = vocabularies[0]
    for name, one in zip(names[1:], vocabularies[1:], strict=True):
        if first is None or one is None:
            if first is not one:
                lacking = name if one is None else names[0]
                notes.append(f"whether words have the same numbers can't be seen: {lacking} has no {FILE} here")
            continue
        moved = [word for word, number in one.ids.items() if first.ids.get(word, number) != number]
        if moved:
            word = moved[0]
            what = f"{word!r} is word {first.ids[word]} of {names[0]} and {one.ids[word]} of {name}"
            return notes, f"{what}, as are {len(moved) - 1} others" if len(moved) > 1 else what
        more, less = set(one.ids) - set(first.ids), set(first.ids) - set(one.ids)
        for words, has, lacks in ((more, name, names[0]), (less, names[0], name)):
            if words:
                shown = ", ".join(sorted(words)[:3]) + (" …" if len(words) > 3 else "")
                notes.append(f"{has} has {len(words)} words that {lacks} lacks ({shown})")
    return notes, ""


def with_words(path: Path, new: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """tokenizer.json, and tokenizer_config.json if that lists added words too, with more of them.

    Args:
        path: the folder with the files as they are.
    """
    import json

    changed = {FILE: read_json(path / FILE)}
    changed[FILE]["added_tokens"] = [*(changed[FILE].get("added_tokens") or []), *new]
    config = path / "tokenizer_config.json"
    if config.is_file() and isinstance(
        (tree := json.loads(config.read_text("utf-8"))).get("added_tokens_decoder"), dict
    ):
        for entry in new:
            rest = {key: value for key, value in entry.items() if key != "id"}
            tree["added_tokens_decoder"][str(entry["id"])] = rest
        changed[config.name] = tree
    return changed
