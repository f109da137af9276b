"""The ``tuning`` section of a recipe: which parameters are trained, and how the frozen ones are stored.

A type says what is trained; the other keys say how. What the literature gives a name of its own but is one of these
types with one of these keys may be written by that name (:data:`SHORT`): ``tuning: {type: dora, rank: 8}`` is
``{type: lora, use_dora: true, rank: 8}``. A key without effect on its type is an error.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from .methods import METHODS
from .options import (
    CHANGES_BASE,
    LORA_TYPES,
    LOW_RANK,
    NOT_RECOMPUTED,
    ON_NF4,
    SHORT,
    TRAINS_BASE,
    TUNING_KEYS,
    VIRTUAL_TOKENS,
    TuningOptions,
)
from .section import Auto, Section

if TYPE_CHECKING:
    from .recipe import Recipe

TuningType = Literal[
    "full", "freeze", "lora", "qlora", "lora-fp8", "adalora", "ia3", "vera", "oft", "loha", "lokr", "xlora", "prompt",
    "prefix",
]  # fmt: skip
Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq"]

#: What a type takes where the recipe says nothing and the key's own default would be a poor one.
_USUAL: dict[str, dict[str, Any]] = {"vera": {"rank": 256}}


class Tuning(Section):
    """Which parameters are trained."""

    type: TuningType = "lora"
    """``full`` trains every weight, ``freeze`` some of the layers; ``lora`` adds low-rank adapters, ``qlora`` on a
    4-bit base, ``lora-fp8`` on an 8-bit one. ``adalora ia3 vera oft loha lokr xlora`` are other adapters, ``prompt``
    and ``prefix`` learn virtual tokens. ``dora rslora lora+ pissa olora eva loftq`` stand for one with an option."""
    rank: int = Field(16, ge=1, le=4096)
    """Rank r of the adapters; of adalora the mean one at the end. VeRA's is 256 unless set."""
    alpha: float | Auto = "auto"
    """The adapters' scale is alpha / rank. ``auto`` is twice the rank."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapters' input; of oft, the share of blocks that are left out."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear modules that get an adapter, or all of them but the output head."""
    quantization: Literal["auto", "none", "nf4", "fp8"] = "auto"
    """Storage of the frozen weights: ``auto`` is double-quantised NF4 for qlora, fp8 for lora-fp8, else none."""
    use_dora: bool = False
    """Train the magnitude of each weight's rows apart from their direction (DoRA, arXiv:2402.09353)."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank, so that high ranks still learn (rsLoRA, arXiv:2312.03732)."""
    init: Init = "default"
    """How adapters begin: ``pissa`` (arXiv:2404.02948) and ``olora`` (arXiv:2406.01775) from the weights, ``eva``
    (arXiv:2410.07170) from the data, ``loftq`` (arXiv:2310.08659) from what 4 bits lose."""
    lora_plus_ratio: float = Field(1.0, ge=1.0)
    """Learning rate of the B matrices over that of the A matrices (LoRA+, arXiv:2402.12354)."""
    modules_to_save: list[str] = Field([])
    """Modules that are trained as a whole beside the adapters, such as embed_tokens or lm_head."""
    new_tokens: list[str] = Field([])
    """Words to add to the vocabulary; only their own rows of the embeddings are trained beside adapters."""
    target_parameters: list[str] = Field([])
    """Weights that are no module of their own, such as ``mlp.experts.down_proj`` of a mixture of experts."""
    trained_layers: int = Field(0, ge=0)
    """freeze: train the last so many layers."""
    trained_modules: list[str] = Field([])
    """freeze: train the modules of these names, such as lm_head or down_proj."""
    initial_rank: int = Field(0, ge=0, le=4096)
    """adalora: the rank that all adapters begin with; 1.5 times the rank unless set (arXiv:2303.10512)."""
    block_size: int = Field(32, ge=2)
    """oft: width of the blocks that are rotated (arXiv:2306.07280)."""
    virtual_tokens: int = Field(20, ge=1, le=4096)
    """prompt, prefix: how many tokens are learned."""
    init_text: str = ""
    """prompt: the words that the virtual tokens begin as."""
    experts: list[str] = Field([])
    """xlora: folders of the LoRA adapters that are mixed (arXiv:2402.07148)."""
    start_from: str = ""
    """Folder of an adapter of the same shape (or of a run with one) whose training goes on."""

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, tree: Any) -> Any:
        """Short names as what they stand for, and what a type takes where nothing is said."""
        if not isinstance(tree, dict):
            return tree
        name = tree.get("type")
        if isinstance(name, str) and name in SHORT:
            tree = _with_short(name, tree)
        usual = _USUAL.get(tree.get("type", ""), {}) if isinstance(tree.get("type"), str) else {}
        return {**usual, **tree}

    @model_serializer(mode="wrap")
    def _with_what_is_usual(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written down without defaults, a number that a type would take another of must stay."""
        return {**write(self), **{key: getattr(self, key) for key in _USUAL.get(self.type, {})}}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self._without_useless_keys()
        self._stored_as_it_can_be()
        if self.type == "freeze" and not self.trained_layers and not self.trained_modules:
            raise ValueError("freeze trains nothing so far||Set trained_layers: 4, or name trained_modules.")
        if self.type == "xlora" and len(self.experts) < 2:
            raise ValueError("xlora mixes at least two adapters||List their folders under experts.")
        if self.type == "adalora" and self.initial_rank and self.initial_rank <= self.rank:
            raise ValueError("initial_rank must be above rank||adalora takes ranks away; it adds none.")
        if self.type in LORA_TYPES:
            self._lora_possible()
        for name in ("new_tokens", "modules_to_save", "target_parameters", "trained_modules", "experts"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not all(value.strip() for value in values):
                raise ValueError(f"{name} holds an empty or a repeated name||Name each once.")
        return self

    def _without_useless_keys(self) -> None:
        every = set(Tuning.model_fields) - {"type", "quantization"}
        at_work = {name for name in self.model_fields_set & every if self._differs(name) or name in _ADAPTER}
        useless = sorted(at_work - TUNING_KEYS[self.type])
        if useless:
            one = "has" if len(useless) == 1 else "have"
            instead = "Remove it, or use type: lora." if self.type in TRAINS_BASE else "Remove it."
            raise ValueError(f"{', '.join(useless)} {one} no effect when type is {self.type}||{instead}")

    def _differs(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def _stored_as_it_can_be(self) -> None:
        asked = self.quantization
        if self.type in TRAINS_BASE and asked in ("nf4", "fp8"):
            raise ValueError(
                f"{'full fine-tuning' if self.type == 'full' else 'freeze'} can't train {_BITS[asked]} weights||"
                "Use type: qlora, or leave out quantization."
            )
        if self.type == "lora" and asked in ("nf4", "fp8"):
            name = {"nf4": "qlora", "fp8": "lora-fp8"}[asked]
            raise ValueError(f"lora on {asked.upper()} weights is called {name}||Use type: {name}.")
        if self.type in ("qlora", "lora-fp8") and asked == "none":
            raise ValueError(f"{self.type} without quantisation is called lora||Use type: lora.")
        own = {"qlora": "nf4", "lora-fp8": "fp8"}.get(self.type)
        if asked == "fp8" and own != "fp8":
            raise ValueError(f"{self.type} can't be put on fp8 weights||Use type: lora-fp8, or quantization: none.")
        if asked == "nf4" and self.type not in ON_NF4:
            raise ValueError(
                f"{self.type} can't be put on NF4 weights||Use quantization: none, or one of: "
                f"{', '.join(sorted(ON_NF4))}."
            )

    def _lora_possible(self) -> None:
        if self.init in CHANGES_BASE and self.type != "lora":
            raise ValueError(
                f"init {self.init} takes a part out of the weights, which {_BITS[self.stored]} ones don't allow||"
                "Use type: lora; or init: loftq with qlora, which is made for it."
            )
        if self.init == "loftq" and self.type != "qlora":
            raise ValueError("init loftq makes up for what NF4 loses||Use type: qlora, or another init.")
        if self.target_parameters and (self.dropout or self.use_dora):
            name = "dropout" if self.dropout else "use_dora"
            off = "0" if self.dropout else "false"
            raise ValueError(f"{name} can't be used with target_parameters||Set {name}: {off}.")
        if self.start_from and self.init != "default":
            raise ValueError("init has no effect on an adapter that goes on||Remove init, or start_from.")

    @property
    def stored(self) -> Literal["none", "nf4", "fp8"]:
        """How the frozen weights are stored."""
        if self.quantization == "auto":
            return "nf4" if self.type == "qlora" else "fp8" if self.type == "lora-fp8" else "none"
        return self.quantization

    @property
    def family(self) -> Literal["full", "lora", "qlora"]:
        """Which of the three it stores and keeps like: weights that are trained, frozen ones, quantised ones."""
        if self.type in TRAINS_BASE:
            return "full"
        return "qlora" if self.stored == "nf4" else "lora"

    @property
    def options(self) -> TuningOptions:
        """What goes beyond type, rank, alpha, dropout and targets, as a value that can be compared and hashed."""
        chosen: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(TuningOptions)}
        if self.type == "adalora" and not self.initial_rank:
            chosen["initial_rank"] = max(self.rank + 1, round(1.5 * self.rank))
        return TuningOptions.read(chosen)


_BITS = {"nf4": "4-bit", "fp8": "8-bit", "none": "16-bit"}
#: Keys that are told even when they are set to their default: a user who writes them means them.
_ADAPTER = {"rank", "alpha", "dropout", "targets"}


def _with_short(name: str, tree: dict[str, Any]) -> dict[str, Any]:
    """``{type: dora, …}`` spelled out; an option that the name stands for may be set again, but not against it."""
    meant = SHORT[name]
    for key, value in meant.items():
        if key not in ("type", "lora_plus_ratio") and tree.get(key, value) != value:
            raise ValueError(f"type {name} is {key}: {value}, and {key} says {tree[key]}||Remove one of the two.")
    return {**meant, **{key: value for key, value in tree.items() if key != "type"}}


def names() -> tuple[str, ...]:
    """All that ``type`` may say."""
    return (*get_args(TuningType), *SHORT)


def check_tuning(recipe: Recipe) -> None:
    """What a tuning rules out in the other sections of a recipe.

    Raises:
        ValueError: with what and what to do.
    """
    kind, init, optimizer = recipe.tuning.type, recipe.tuning.init, recipe.optimizer.name
    if kind in VIRTUAL_TOKENS and recipe.method not in ("sft", "pretrain"):
        raise ValueError(f"{kind} tuning can't be trained with {recipe.method}||Use method: sft, or type: lora.")
    if init in CHANGES_BASE and METHODS[recipe.method].reference:
        what = f"{recipe.method} compares with the model without its adapter; after init {init} the weights below it"
        raise ValueError(f"{what} are no reference||Use another init.")
    if init == "eva" and recipe.method not in ("sft", "pretrain"):
        raise ValueError(f"init eva looks at rows of sft, and {recipe.method} has others||Use another init.")
    if kind in VIRTUAL_TOKENS and recipe.packing is True:
        raise ValueError(f"packing can't be used with {kind} tuning: it has one beginning per row||Set packing: false.")
    if kind in NOT_RECOMPUTED and recipe.hardware.checkpointing not in ("auto", "none"):
        what = "prefix tuning feeds layers through a cache, which recomputing them would fill twice"
        if kind == "xlora":
            what = "xlora hands its layers their mixture from outside, which recomputing them would not see"
        raise ValueError(f"{what}||Set hardware.checkpointing: none.")
    if optimizer in LOW_RANK and kind not in TRAINS_BASE:
        what = f"{optimizer} keeps states of whole weights in a lower rank, and {kind} trains none"
        raise ValueError(f"{what}||Use type: full, or optimizer.name: adamw.")
    if optimizer == "muon" and kind in _NO_MATRICES:
        raise ValueError(f"muon updates matrices, and {kind} trains none||Use optimizer.name: adamw.")


#: Types whose parameters are vectors, or rows of a table.
_NO_MATRICES = VIRTUAL_TOKENS | {"ia3", "vera", "oft"}
