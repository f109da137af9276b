"""MergeRecipe: what is to be merged and how, as flags of the command line or as a YAML file.

::

    method: ties
    base: Qwen/Qwen3-8B
    models:
      - {model: ./support, weight: 0.6, density: 0.5}
      - {model: my-run, weight: [0.2, 0.4], density: 0.5}    # a finished run; less of it in the first layers
    dtype: bfloat16

or, to stack layers of several models, ``slices`` in place of ``models``::

    method: passthrough
    slices:
      - sources: [{model: ./a, layers: [0, 24]}]             # the first 24 layers
      - sources: [{model: ./b, layers: [20, 40]}]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ...planner.errors import RecipeError
from ...planner.explain import Lines, explain, line_numbers
from ...planner.section import Section
from ...planner.yaml_text import parse, read_text
from .methods import METHODS, Method
from .parameters import EACH, WHOLE, Each, Whole, is_gradient, numbers

MethodName = Literal[
    "linear", "slerp", "nuslerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della_linear", "della",
    "breadcrumbs", "breadcrumbs_ties", "model_stock", "nearswap", "passthrough", "cat", "svd",
]  # fmt: skip
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
#: Largest factor on a model or on its changes. Far more than is of use: above it nothing else is left in the sum.
MOST = 100
#: Methods that add adapters to one adapter; see :mod:`.adapters`. The last two do nothing else.
OF_ADAPTERS = ("linear", "cat", "svd")


class MergedModel(Each):
    """A model that is merged, and what holds for it alone."""

    model: Annotated[str, Field(min_length=1)]
    """A folder, a hub id, or a run of finetui; an adapter stands for its base with it. ``BASE+ADAPTER`` names both."""


class SliceSource(MergedModel):
    """Layers of a model."""

    layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]
    """From this one, counted from 0, up to and without that one."""


class Slice(Whole):
    """Some layers of the result, and which layers of which models they are made of."""

    sources: Annotated[list[SliceSource], Field(min_length=1)]


class Made(Section):
    """What a merge was made with; finetui writes it, so that the same can be made again."""

    versions: dict[str, str] = Field(default_factory=dict)
    sources: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Of each model the SHA-256 of its weights, by file."""
    output: dict[str, str] = Field(default_factory=dict)
    """The SHA-256 of what was written, by file."""


def _underscores(value: Any) -> Any:
    return value.replace("-", "_") if isinstance(value, str) else value


class MergeRecipe(Whole):
    """A merge."""

    method: Annotated[MethodName, BeforeValidator(_underscores)]
    base: str | None = None
    """The model that all others were made from. Config, tokenizer and templates come from it, else from the first."""
    models: list[MergedModel] = Field(default_factory=list)
    slices: list[Slice] = Field(default_factory=list)
    to: Literal["model", "adapter"] | None = None
    """``adapter`` adds adapters of one base to a new adapter: what cat and svd do anyway, and linear if it is set."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """svd: rank of the new adapter; the largest of those that go in, unless set."""
    dtype: Dtype = "auto"
    """Format of the result; ``auto`` keeps that of the base, else of the first model. It is computed in float32."""
    tokenizer: Literal["same", "base", "union"] = "same"
    """``base`` keeps the words of the base or first model alone, ``union`` adds those of the others."""
    seed: int = 0
    """Where dare and della begin to draw."""
    made: Made | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if bool(self.models) == bool(self.slices):
            raise ValueError("a merge has either models or slices||Give one of them.")
        spec = None if self.makes_adapter else METHODS[self.method]
        if spec is None:
            self._check_adapters()
        else:
            self._check_models(spec)
        if self.rank is not None and self.method != "svd":
            raise ValueError(f"rank has no effect on {self.method}||Remove it.")
        if self.seed and not (spec and spec.random):
            raise ValueError(f"seed has no effect on {self.method}, which draws no random numbers||Remove it.")
        self._check_parameters(spec)
        return self

    @property
    def makes_adapter(self) -> bool:
        """Whether the result is an adapter and no model."""
        return self.to == "adapter" or self.method in ("cat", "svd")

    def _check_adapters(self) -> None:
        if self.method not in OF_ADAPTERS:
            do = f"Use {', '.join(OF_ADAPTERS)}; or to: model."
            raise ValueError(f"{self.method} makes no adapter||{do}")
        if self.to == "model":
            raise ValueError(f"{self.method} makes an adapter, and no model||Use linear, or leave `to` out.")
        if self.slices or self.base or self.tokenizer != "same":
            raise ValueError("an adapter is made of adapters alone||Remove slices, base and tokenizer.")
        if len(self.models) < 2:
            raise ValueError("one adapter is no merge||Name another one.")

    def _check_models(self, spec: Method) -> None:
        if spec.base == "required" and self.base is None:
            raise ValueError(f"{self.method} needs a base||Name the model that the others were made from: base: …")
        if spec.base == "none" and self.base is not None:
            raise ValueError(
                f"base has no effect on {self.method}||Remove it, or use a method such as task_arithmetic."
            )
        for group in [self.models] if self.models else [part.sources for part in self.slices]:
            count = len(group)
            if count < spec.least or (spec.most is not None and count > spec.most):
                wanted = f"exactly {spec.least}" if spec.most == spec.least else f"at least {spec.least}"
                beside = " beside the base" if spec.base == "required" else ""
                raise ValueError(f"{self.method} takes {wanted} models{beside}, not {count}||Use another method.")
            if any(one.model == self.base for one in group):
                raise ValueError("the base is one of the models too, where it adds nothing||Name it once, as base.")
            ranges = {one.layers for one in group if isinstance(one, SliceSource)}
            lengths = {end - start for start, end in ranges}
            if len(lengths) > 1 or min(lengths, default=1) < 1:
                raise ValueError("the sources of a slice differ in their number of layers||Give ranges of one length.")
            if self.base is not None and len(ranges) > 1:
                raise ValueError("with a base the sources of a slice are the same layers||Give one range, or no base.")

    def _check_parameters(self, spec: Method | None) -> None:
        taken = {"weight"} if spec is None else set(spec.each) | set(spec.whole)
        parts: list[Each] = [self, *self.models, *self.slices, *(one for s in self.slices for one in s.sources)]
        for part in parts:
            for name in (*EACH, *WHOLE):
                if name not in taken and getattr(part, name, None) is not None:
                    fit = f"It takes {', '.join(sorted(taken))}." if taken else "It takes none."
                    raise ValueError(f"{name} has no effect on {self.method}||{fit}")
            if any(not 0.0 < value <= 1.0 for value in numbers(part.density)):
                raise ValueError("density is a share above 0 and at most 1||Change it.")
            if any(not 0.0 <= value < 1.0 for name in ("gamma", "epsilon") for value in numbers(getattr(part, name))):
                raise ValueError("gamma and epsilon are shares from 0 to below 1||Change them.")
            if spec is None and isinstance(part.weight, list):
                raise ValueError("the weight of an adapter is one number||Remove gradients and filters.")
            self._check_range(part)
        if not self._normalized(spec):
            absurd = [value for part in parts for value in numbers(part.weight) if abs(value) > MOST]
            if absurd:
                raise ValueError(f"a weight of {absurd[0]:g} is no share of a model||Give one from -{MOST} to {MOST}.")
        if spec is not None and "density" in spec.each and self.density is None:
            without = [one.model for one in self.each_model() if one.density is None]
            if without and all(part.density is None for part in self.slices):
                do = "Set density, the share of its changes to keep: TIES kept 0.2 in its paper."
                raise ValueError(f"{self.method} needs the density of {without[0]}||{do}")
        if self.method == "nearswap" and self.t is None and all(part.t is None for part in self.slices):
            raise ValueError("nearswap needs t, how close two numbers must be||Set it, such as t: 0.0001.")
        per = {part.per for part in parts if isinstance(part, Whole)}
        if self.method == "model_stock" and "column" in per:
            raise ValueError("model_stock takes per: tensor or row||Change per.")

    def _check_range(self, part: Each) -> None:
        """Refuse what the formula of a method gives no meaning to, or what leaves nothing of the models."""
        if self.method == "nuslerp" and any(value < 0.0 for value in numbers(part.weight)):
            raise ValueError("nuslerp goes from one model to the other by their weights||Give weights of 0 or more.")
        if not isinstance(part, Whole):
            return
        way, scale = numbers(part.t), numbers(part.scale)
        if self.method == "slerp" and any(not 0.0 <= value <= 1.0 for value in way):
            raise ValueError("t is from 0, the first model, to 1, the second||Change it.")
        if self.method == "nearswap" and any(value <= 0.0 for value in way):
            raise ValueError("t is how close two numbers must be, and so above 0||Change it, such as t: 0.0001.")
        if any(abs(value) > MOST for value in scale):
            raise ValueError(f"a scale of {max(scale, key=abs):g} leaves nothing of the base||At most {MOST}.")

    def _normalized(self, spec: Method | None) -> bool:
        """Whether weights count beside each other alone, at each tensor."""
        if spec is None:
            return False
        usual = spec.whole.get("normalize", False) if self.normalize is None else self.normalize
        each = [part.normalize if part.normalize is not None else usual for part in self.slices] or [usual]
        return self.method == "nuslerp" or all(each)

    def each_model(self) -> Iterator[MergedModel]:
        """Every mention of a model, in order."""
        yield from self.models
        for part in self.slices:
            yield from part.sources

    @property
    def names(self) -> list[str]:
        """The models, each once, the one that gives config and tokenizer first."""
        names = [self.base] if self.base is not None else []
        return list(dict.fromkeys([*names, *(one.model for one in self.each_model())]))

    @property
    def by_depth(self) -> bool:
        """Whether a setting is another one at other layers."""
        parts: list[Each] = [self, *self.models]
        return any(is_gradient(getattr(part, name, None)) for part in parts for name in (*EACH, "t", "scale"))

    @classmethod
    def load(cls, path: str | Path) -> tuple[Self, list[str]]:
        """Read a file of ours, or of mergekit (:mod:`.mergekit`).

        Returns:
            The merge, and what of the file has no part in it, in words.

        Raises:
            RecipeError: it is missing, no YAML, or asks for something that is not possible; with file and line.
        """
        from . import mergekit

        path = Path(path)
        tree, node = parse(read_text(path), str(path))
        if not isinstance(tree, dict):
            do = "Start with: method: linear"
            raise RecipeError("a merge is a mapping of keys to values", where=str(path), do=do)
        lines = line_numbers(node)
        notes: list[str] = []
        if mergekit.is_mergekit(tree):
            tree, notes = mergekit.translated(tree, str(path))
            lines = {}
        _make_absolute(tree, path.resolve().parent)
        return cls.build(tree, source=str(path), lines=lines), notes

    @classmethod
    def build(cls, tree: dict[str, Any], *, source: str, lines: Lines | None = None) -> Self:
        """Check a plain dictionary.

        Raises:
            RecipeError: with one line per problem found.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise explain(cls, error, source, lines or {}) from None

    def to_dict(self) -> dict[str, Any]:
        """What a person would write."""
        tree: dict[str, Any] = self.model_dump(exclude_defaults=True, mode="json")
        for group in (tree.get("models", ()), *(part["sources"] for part in tree.get("slices", ()))):
            for number, one in enumerate(group):
                group[number] = {"model": one["model"]} | one
        first = {key: tree[key] for key in ("method", "base", "models", "slices") if key in tree}
        return first | tree


def _make_absolute(tree: dict[str, Any], folder: Path) -> None:
    """Relative folders in a file start from where it lies; hub ids and names of runs stay."""

    def absolute(part: Any, key: str) -> None:
        name = part.get(key) if isinstance(part, dict) else None
        if isinstance(name, str):
            pieces = [
                str(folder / one) if (folder / one).is_dir() or one[:1] == "." else one for one in name.split("+")
            ]
            whole = folder / name
            part[key] = str(whole) if whole.is_dir() else "+".join(pieces)

    absolute(tree, "base")
    for group in (tree.get("models"), *(p.get("sources") for p in tree.get("slices") or () if isinstance(p, dict))):
        for one in group if isinstance(group, list) else ():
            absolute(one, "model")
