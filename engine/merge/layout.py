"""Layout: every tensor of the result before any is read: its name, shape and format, and what it is made of."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...planner.errors import ModelError, RecipeError
from . import depth
from .methods import METHODS
from .parameters import Each, first_of
from .recipe import MergedModel, MergeRecipe, Slice
from .sources import FLOATS, Checkpoint, Source, Stored
from .vocabulary import (
    Alignment,
    align,
    differences,
    embedding_of,
    has_chat_template,
    has_words,
    head_of,
    vocabulary_of,
)

#: dtype of a recipe → its name in a safetensors header.
HEADER_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
#: Keys of a config that may differ without a word: they name no property of the weights.
_UNTOLD = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_commit_hash"}
_UNTOLD |= {"vocab_size", "tie_word_embeddings", *depth.COUNTS}  # told in words of their own
#: Weights that leave less than this share of themselves when added up cancel each other.
_CANCELLED = 0.01
#: A share that is lost when it is added to the rest in fp32, whose numbers have 24 bits.
_NOTHING = 2.0**-24
#: Bytes of what is worked on piece by piece (``pruning.CHUNK`` numbers in float64, several times).
_BUFFERS = 256 << 20


@dataclass(frozen=True)
class Part:
    """A tensor of a source, by the source's number."""

    source: int
    tensor: str


@dataclass(frozen=True)
class Piece:
    """One tensor of the result.

    ``each`` and ``whole`` are the method's parameters here. Of a ``copied`` one, which holds no floating-point numbers,
    all parts have to be equal. A ``by_word`` one is put into the order of rows of the layout first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    base: Part | None = None
    each: tuple[dict[str, float], ...] = ()
    whole: dict[str, Any] = field(default_factory=dict)
    copied: bool = False
    by_word: bool = False

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return Stored("", self.dtype, self.shape).numel


@dataclass(frozen=True)
class Layout:
    """The result, tensor by tensor, its config, and what a user should know of it before it is made."""

    pieces: list[Piece]
    config: dict[str, Any]
    alignment: Alignment | None
    notes: list[str]

    @property
    def memory(self) -> int:
        """Bytes of host memory at most: the largest tensor in fp32 for each model, three times more, and buffers."""
        largest = max(4 * piece.numel * (len(piece.parts) + (piece.base is not None) + 3) for piece in self.pieces)
        return largest + _BUFFERS


def lay_out(recipe: MergeRecipe, sources: Sequence[Source]) -> Layout:
    """What a merge makes.

    Args:
        sources: for each of ``recipe.names``.

    Raises:
        ModelError: the models don't fit on each other; it names the tensor and the models.
        RecipeError: a slice or a gradient asks for layers that are not there, or a value is not possible.
    """
    for source in sources:
        _require_rows(source)
    notes = _differences(sources)
    tables, tied = _with_heads(sources, notes)
    alignment = _alignment(recipe, sources, tables, notes)
    builder = _Builder(recipe, sources, tables, alignment)
    pieces = list(builder.slices() if recipe.slices else builder.models())
    if not pieces:
        raise ModelError("there is nothing to merge", where=sources[0].name, do="Give models with weights.")
    config = copy.deepcopy(sources[0].config)
    if tied is not None:
        set_key(config, "tie_word_embeddings", tied)
    if recipe.dtype != "auto":
        for level in _levels(config):
            for key in {"dtype", "torch_dtype"} & set(level) or ({"dtype"} if level is config else set()):
                level[key] = recipe.dtype
    if alignment is not None:
        set_key(config, "vocab_size", alignment.count)
    if recipe.slices:
        depth.stack(config, [(sources[number].config, layer) for number, layer in builder.order], sources[0].name)
    return Layout(pieces, config, alignment, notes)


Table = dict[str, tuple[str, Stored]]
"""A model's tensors by the name that they have in the result: what to read for them, and what that is."""


def _with_heads(sources: Sequence[Source], notes: list[str]) -> tuple[list[Table], bool | None]:
    """The models' tensors. Where some share their head with the embedding and some do not, all get one of their own.

    Returns:
        The tables, and whether the result shares them, if that is not what the first config says.
    """
    tables: list[Table] = [{name: (name, told) for name, told in source.tensors.items()} for source in sources]
    heads = [head_of(list(table)) for table in tables]
    shared = []
    for source, head in zip(sources, heads, strict=True):
        said = [level["tie_word_embeddings"] for level in _levels(source.config) if "tie_word_embeddings" in level]
        shared.append(bool(said[0]) if said else head is None)
    if all(shared):  # some store it all the same
        for table, head in zip(tables, heads, strict=True):
            table.pop(head or "", None)
        return tables, None
    if not any(shared):
        return tables, None
    name = next(head for head, one in zip(heads, shared, strict=True) if not one)
    if name is None:
        return tables, None
    for source, table, one in zip(sources, tables, shared, strict=True):
        embedding = embedding_of(list(source.tensors))
        if one and embedding is not None:
            table[name] = (embedding, source.tensors[embedding])
    notes.append("some of the models share their head with the embedding and some do not: the result does not")
    return tables, False


def _require_rows(source: Source) -> None:
    """Refuse a model whose config has another number of words than its embedding has rows: no result would load."""
    embedding = embedding_of(list(source.tensors))
    told = [level.get(key) for level in _levels(source.config) for key in ("vocab_size", "padded_vocab_size")]
    said = [count for count in told if isinstance(count, int)]
    rows = None if embedding is None else source.tensors[embedding].shape[0]
    if rows is None or not said or rows in said or type(source) is not Checkpoint:  # an adapter may bring words along
        return
    what = f"{embedding} has {rows} rows, and config.json says {' or '.join(map(str, said))} words"
    raise ModelError(what, where=source.name, do="Fetch config.json and weights from one source.")


def _alignment(
    recipe: MergeRecipe, sources: Sequence[Source], tables: Sequence[Table], notes: list[str]
) -> Alignment | None:
    names = [source.name for source in sources]
    vocabularies = [vocabulary_of(source) for source in sources]
    if recipe.tokenizer != "same":
        rows = []
        for name, table in zip(names, tables, strict=True):
            embedding = embedding_of(list(table))
            if embedding is None:
                raise ModelError("which tensor is its embedding can't be seen", where=name, do="Leave tokenizer out.")
            rows.append(table[embedding][1].shape[0])
        return align(names, vocabularies, rows, recipe.tokenizer)
    more, moved = differences(names, vocabularies)
    if moved:
        do = "Their rows have to be put in one order first: --tokenizer base, or union to keep the words of all."
        raise ModelError(f"the models number their words differently: {moved}", where="tokenizer", do=do)
    notes += more
    return None


def _differences(sources: Sequence[Source]) -> list[str]:
    """Keys of the configs that are not the same everywhere: the first model's are those of the result."""
    notes = []
    first = sources[0]
    told = _plain(first.config)
    for other in sources[1:]:
        theirs = _plain(other.config)
        for key in sorted((set(told) & set(theirs)) - _UNTOLD):
            if told[key] != theirs[key]:
                two = f"{told[key]} in {first.name} and {theirs[key]} in {other.name}"
                notes.append(f"{key} is {two}: the first counts")
    talks = next((other.name for other in sources[1:] if first.folders and has_chat_template(other)), None)
    if talks is not None and not has_chat_template(first):
        notes.append(
            f"the result has no chat template, as {first.name} has none: if it is to chat, copy that of {talks}, "
            "and what its generation_config.json says of end tokens"
        )
    return notes


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The single values of a config, its text part and its rotary embedding, which releases keep in other places.

    A key that only one config has is none that differs: releases of transformers leave out what is as usual.
    """
    inner: dict[str, Any] = {}
    for level in _levels(config):
        inner |= level | (level.get("rope_parameters") or {})
    return {key: value for key, value in inner.items() if isinstance(value, str | int | float)}


class _Builder:
    """Pieces, one after the other."""

    def __init__(
        self, recipe: MergeRecipe, sources: Sequence[Source], tables: Sequence[Table], alignment: Alignment | None
    ) -> None:
        self.recipe, self.sources, self.tables, self.alignment = recipe, sources, tables, alignment
        self.method = METHODS[recipe.method]
        self.number = {name: number for number, name in enumerate(recipe.names)}
        self.base = None if recipe.base is None else self.number[recipe.base]
        self.stacks = [
            depth.layers_of(list(table), source.config) for table, source in zip(tables, sources, strict=True)
        ]
        self.order: list[tuple[int, int]] = []
        """Of each layer of the result the source and the number of the layer there that its config is taken from."""

    def models(self) -> Iterator[Piece]:
        """Whole models: each tensor of the first, which all others have too."""
        used = [self.number[one.model] for one in self.recipe.models]
        used += [self.base] if self.base is not None else []
        names = dict.fromkeys(name for number in used for name in self.tables[number])
        stack = self.stacks[used[0]]
        if stack is None and self.recipe.by_depth:
            do = "Give one number in place of a list."
            raise RecipeError("which tensors are layers can't be seen, as a gradient needs", where="weight", do=do)
        for name in names:
            parts = [(one, name) for one in self.recipe.models]
            yield self._piece(name, depth.position(name, stack), parts, None, name)

    def slices(self) -> Iterator[Piece]:
        """Layers of several models in a row; what comes before them is of the first slice, what follows of the last."""
        out = 0
        stack = self._stack(self.number[self.recipe.slices[0].sources[0].model])
        outside = dict.fromkeys(
            name
            for part in (self.recipe.slices[0], self.recipe.slices[-1])
            for one in part.sources
            for name in self.tables[self.number[one.model]]
            if depth.number_of(name, stack) is None
        )
        for name in outside:
            part = self.recipe.slices[0 if depth.comes_before(name) else -1]
            yield self._piece(name, 0.0, [(one, name) for one in part.sources], part, name)
        for part in self.recipe.slices:
            count = part.sources[0].layers[1] - part.sources[0].layers[0]
            for step in range(count):
                yield from self._layer(out, step / max(1, count - 1), part, step, stack)
                self.order.append((self.number[part.sources[0].model], part.sources[0].layers[0] + step))
                out += 1

    def _layer(self, out: int, place: float, part: Slice, step: int, stack: depth.Stack) -> Iterator[Piece]:
        endings: dict[str, None] = {}
        for one in part.sources:
            number = self.number[one.model]
            mine = self._stack(number)
            layer = one.layers[0] + step
            if one.layers[1] > mine.count or mine.prefix != stack.prefix:
                what = f"layers {list(one.layers)} are asked for, and {one.model} has {mine.count}"
                raise RecipeError(what, where="slices", do="The end is not part of a range: [0, 24] are 24 layers.")
            endings |= dict.fromkeys(mine.endings(list(self.tables[number]), layer))
        for ending in endings:
            names = [(one, f"{stack.prefix}{one.layers[0] + step}.{ending}") for one in part.sources]
            yield self._piece(f"{stack.prefix}{out}.{ending}", place, names, part, names[0][1])

    def _stack(self, number: int) -> depth.Stack:
        stack = self.stacks[number]
        if stack is None:
            do = "Merge whole models, with models in place of slices."
            raise RecipeError("which tensors are layers can't be seen", where=self.sources[number].name, do=do)
        return stack

    def _piece(
        self,
        name: str,
        place: float,
        sources: Sequence[tuple[MergedModel, str]],
        part: Slice | None,
        in_base: str,
    ) -> Piece:
        wanted = [(self.number[one.model], tensor) for one, tensor in sources]
        if self.base is not None:
            wanted.append((self.base, in_base))
        found = [(number, *self._find(number, tensor, wanted)) for number, tensor in wanted]
        by_word = self.alignment is not None and has_words(name)
        shape = found[-1][2].shape if self.base is not None else found[0][2].shape
        for number, _, told in found:
            if told.shape[by_word:] != shape[by_word:]:
                raise self._mismatch(name, shape, found[-1 if self.base is not None else 0][0], told.shape, number)
        if by_word:
            assert self.alignment is not None
            shape = (self.alignment.count, *shape[1:])
        stored = min(found, key=lambda one: one[0])[2].dtype  # of the model that gives the config
        copied = any(told.dtype not in FLOATS for _, _, told in found)
        if (copied and len({told.dtype for _, _, told in found}) > 1) or stored.startswith("F8"):
            number, _, told = next(one for one in found if one[2].dtype not in FLOATS)
            what = f"{name} is stored as {told.dtype}, and such can't be added up"
            raise ModelError(what, where=self.sources[number].name, do="Give models in 16 or 32 bits.")
        parts = tuple(Part(number, tensor) for number, tensor, _ in found)
        dtype = stored if copied or self.recipe.dtype == "auto" else HEADER_DTYPES[self.recipe.dtype]
        base = parts[-1] if self.base is not None else None
        each, whole = self._values(name, place, [one for one, _ in sources], part)
        return Piece(name, dtype, shape, parts[: len(sources)], base, tuple(each), whole, copied, by_word)

    def _find(self, number: int, name: str, wanted: Sequence[tuple[int, str]]) -> tuple[str, Stored]:
        found = self.tables[number].get(name)
        if found is None:
            has = next((self.sources[n].name for n, tensor in wanted if tensor in self.tables[n]), "another one")
            what = f"it has no {name}, and {has} has"
            do = "Only models of one architecture can be merged: fine-tunes of one base."
            raise ModelError(what, where=self.sources[number].name, do=do)
        return found

    def _mismatch(self, name: str, one: Sequence[int], first: int, two: Sequence[int], second: int) -> ModelError:
        names = self.sources[first].name, self.sources[second].name
        do = "Only models of one size can be merged."
        if has_words(name) and list(one)[1:] == list(two)[1:]:
            do = "Their vocabularies differ: --tokenizer base keeps the words of the first, union those of all."
        return ModelError(f"{name} is {list(one)} in {names[0]} and {list(two)} in {names[1]}", where="merge", do=do)

    def _values(
        self, name: str, place: float, models: Sequence[MergedModel], part: Slice | None
    ) -> tuple[list[dict[str, float]], dict[str, Any]]:
        above: list[Each] = [self.recipe] if part is None else [part, self.recipe]
        each = []
        for one in models:
            values = {}
            for key, usual in self.method.each.items():
                found = first_of((getattr(level, key) for level in (one, *above)), name, place)
                values[key] = usual if found is None else found
                if values[key] != values[key]:
                    do = "Add a condition without a filter, for all tensors that no other one fits."
                    raise RecipeError(f"{key} has no value for {name} of {one.model}", where=key, do=do)
            if "epsilon" in values and not values["epsilon"] < values["density"] <= 1.0 - values["epsilon"]:
                what = f"density {values['density']:g} ± epsilon {values['epsilon']:g} goes beyond 0 and 1 at {name}"
                raise RecipeError(what, where="epsilon", do="Lower epsilon, or bring density nearer to a half.")
            each.append(values)
        whole: dict[str, Any] = {}
        for key, usual in self.method.whole.items():
            settings = [getattr(level, key) for level in above]
            number = first_of(settings, name, place) if key in ("t", "scale") else None
            plain = next((s for s in settings if s is not None), None) if key not in ("t", "scale") else number
            whole[key] = usual if plain is None else plain
            if whole[key] != whole[key]:
                raise RecipeError(f"{key} has no value for {name}", where=key, do="Add a condition without a filter.")
        if whole.get("normalize") or self.recipe.method == "nuslerp":
            weights = [values["weight"] for values in each]
            size = sum(map(abs, weights))
            if any(0.0 < abs(weight) < _NOTHING * size for weight in weights):
                what = f"of the weights at {name} one is nothing beside the others ({min(weights, key=abs):g})"
                raise RecipeError(what, where="weight", do="Change the weights, or leave that model out.")
            if abs(sum(weights)) <= _CANCELLED * size:
                do = "Change the weights, or for linear set normalize: false."
                what = f"the weights at {name} add up to {sum(weights):g}, and can't be divided by that"
                raise RecipeError(what, where="weight", do=do)
        return each, whole


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A config and that of its text part."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key wherever a config has it, or at its top."""
    levels = [level for level in _levels(config) if key in level] or [config]
    for level in levels:
        level[key] = value
