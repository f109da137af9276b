"""Recipe: what the user asks for. One YAML file; every performance knob may be ``auto``, and is by default.

A recipe is strict: an unknown key, a wrong type or a combination that can't work is a :class:`RecipeError` that
names file, line and field. Nothing here reads a model, a dataset or a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import RecipeError
from .explain import explain, line_numbers

Auto = Literal["auto"]
Method = Literal["sft", "pretrain", "dpo", "ipo", "orpo", "kto", "cpo", "simpo", "grpo", "rloo", "ppo", "reward"]
TuningType = Literal["full", "lora", "qlora"]
DataFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"]
OptimizerName = Literal["auto", "adamw", "adamw-8bit", "paged-adamw-8bit", "sgd", "adafactor"]
#: Changes to a recipe: dotted keys to values, or the same as ``a.b=c`` texts whose values are YAML.
Overrides = Mapping[str, Any] | Sequence[str]
Precision = Literal["auto", "bf16", "bf16-mixed", "fp16", "fp32"]

#: Methods that a plan can be carried out for today.
RUNNABLE_METHODS: frozenset[str] = frozenset({"sft", "pretrain"})
#: Methods whose examples are independent token sequences, so that several may share one row.
PACKABLE_METHODS: frozenset[str] = frozenset({"sft", "pretrain"})


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tuning(_Section):
    """Which parameters are trained."""

    type: TuningType = "lora"
    """``full`` trains every weight; ``lora`` adds low-rank adapters; ``qlora`` adds them to a 4-bit base."""
    rank: int = Field(16, ge=1, le=4096)
    """Rank r of the adapters."""
    alpha: float | Auto = "auto"
    """The adapters' scale is alpha / rank. ``auto`` is twice the rank."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapters' input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear modules that get an adapter, or all of them but the output head."""
    quantization: Literal["auto", "none", "nf4"] = "auto"
    """Storage of the frozen weights: ``auto`` is NF4 with double quantisation for qlora, none otherwise."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.type == "full":
            if self.quantization == "nf4":
                raise ValueError(
                    "full fine-tuning can't train 4-bit weights||Use type: qlora, or leave out quantization."
                )
            useless = sorted(self.model_fields_set & {"rank", "alpha", "dropout", "targets"})
            if useless:
                raise ValueError(f"{', '.join(useless)} has no effect when type is full||Remove it, or use type: lora.")
        if self.type == "lora" and self.quantization == "nf4":
            raise ValueError("lora on NF4 weights is called qlora||Use type: qlora.")
        if self.type == "qlora" and self.quantization == "none":
            raise ValueError("qlora without quantisation is called lora||Use type: lora.")
        return self


class DataSource(_Section):
    """One dataset: a file, a folder or a hub dataset."""

    path: str
    """File (.jsonl .json .csv .parquet .txt), folder, or hub dataset id."""
    format: DataFormat = "auto"
    """How a row is read. ``auto`` looks at the first rows and says what it found."""
    split: Literal["train", "eval"] = "train"
    """``eval`` rows are never trained on."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    limit: int | None = Field(None, ge=1)
    """Take only the first N rows."""


class Optimizer(_Section):
    """How parameters are updated."""

    name: OptimizerName = "auto"
    """``auto`` is AdamW, in 8 bits where memory is short."""
    learning_rate: float | Auto = Field("auto")
    """Peak learning rate. ``auto`` is 2e-4 for adapters, 1e-5 for full fine-tuning."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.03, ge=0.0, le=1.0)
    """Share of all steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Gradients are scaled down to this norm; 0 leaves them as they are."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.learning_rate != "auto" and self.learning_rate <= 0:
            raise ValueError("learning_rate must be above 0||Try 2.0e-4 for adapters or 1.0e-5 for full fine-tuning.")
        return self


class HardwareRequest(_Section):
    """What the run may use, and how."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto`` is CUDA where there is a GPU, else the CPU."""
    gpu: str | None = None
    """Plan for this GPU of the catalog instead of for this machine."""
    gpus: Auto | Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=0)]] = "auto"
    """How many GPUs, or which (``[0, 1]``). On the CPU: how many processes."""
    strategy: Literal["auto", "single", "ddp"] = "auto"
    """How several GPUs share the work."""
    checkpointing: Literal["auto", "none", "full"] = "auto"
    """Activation checkpointing: recompute each layer in the backward pass instead of keeping it."""
    precision: Precision = "auto"
    """``bf16`` keeps weights in 16 bits, ``bf16-mixed`` and ``fp16`` compute in 16 bits over fp32 weights."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Fused Triton kernels. ``auto`` uses those that prove themselves on this GPU."""
    usd_per_h: float | None = Field(None, gt=0)
    """What the machine costs per hour; without it a local one is free and others cost their cheapest offer."""


class Limits(_Section):
    """When a run is ended early."""

    cost_usd: float | None = Field(None, gt=0)
    """Stop with a checkpoint before this much is spent; on your own machine, give hardware.usd_per_h too."""
    hours: float | None = Field(None, gt=0)
    """Stop with a checkpoint after this long."""
    nan_steps: int = Field(3, ge=1)
    """Fail after so many steps in a row whose loss or gradient is not finite."""


class CheckpointPolicy(_Section):
    """When the state of a run is written down."""

    every: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """How many of the latest checkpoints stay on disk."""


class Evaluation(_Section):
    """Loss on held-out data."""

    every: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Steps between evaluations; there is one at the start and one at the end in any case."""
    holdout: Auto | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    """Share of the training rows that is held out when no source has split: eval. ``auto`` is 5%, at most 200 rows."""


def _sources(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


def _tuning(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


class Recipe(_Section):
    """What the user asks for.

    ``tuning: qlora`` is short for ``tuning: {type: qlora}`` and ``data: rows.jsonl`` for a list with that one path.
    Relative paths in a file are relative to that file.
    """

    model: str
    """Hub id or checkpoint folder."""
    method: Method = "sft"
    """What is learned from the data."""
    tuning: Annotated[Tuning, BeforeValidator(_tuning)] = Tuning()
    """Which parameters are trained."""
    data: Annotated[list[DataSource], BeforeValidator(_sources)] = []
    """What is trained on."""
    sequence_length: int | Auto = Field("auto")
    """Longest sequence in tokens; longer rows are cut. ``auto`` is 2048, or less if model or data is shorter."""
    batch_tokens: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Tokens per optimiser step over all GPUs."""
    batch_size: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Sequences per optimiser step over all GPUs; instead of batch_tokens."""
    micro_batch: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Sequences per GPU in one forward pass."""
    packing: Auto | bool = "auto"
    """Put several short examples into one row, without attention between them."""
    train_on: Literal["auto", "answers", "all"] = "auto"
    """Which tokens count for the loss. ``auto`` is answers for sft and all for pretrain."""
    chat_template: str = "auto"
    """``auto`` is the tokenizer's own, or ChatML if it has none; else a .jinja file."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """End after so many optimiser steps where epochs would take more; the schedule of the rate ends there too."""
    seed: int = Field(42, ge=0)
    """Seed of data order, adapter initialisation and dropout."""
    optimizer: Optimizer = Optimizer()
    hardware: HardwareRequest = HardwareRequest()
    evaluation: Evaluation = Evaluation()
    limits: Limits = Limits()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    track: list[Literal["tensorboard"]] = ["tensorboard"]
    """Where metrics are also written."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.batch_size != "auto" and self.batch_tokens != "auto":
            raise ValueError("batch_size and batch_tokens both set the batch||Keep one of them.")
        if self.packing is True and self.method not in PACKABLE_METHODS:
            raise ValueError(f"packing can't be used with method {self.method}||Set packing: false.")
        if self.method == "pretrain" and self.train_on == "answers":
            raise ValueError("pretrain has no answers: it trains on all tokens||Set train_on: all, or method: sft.")
        if self.sequence_length != "auto" and self.sequence_length < 8:
            raise ValueError("sequence_length is below 8 tokens||Use 512 or more, or auto.")
        if self.data and all(source.split == "eval" for source in self.data):
            raise ValueError("no source in data has split: train||Give at least one source to train on.")
        if self.hardware.strategy == "ddp" and self.hardware.gpus == 1:
            raise ValueError(
                "strategy ddp needs more than one GPU||Set hardware.gpus to 2 or more, or strategy: single."
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Overrides = ()) -> Self:
        """Read a YAML file, with overrides on top.

        Raises:
            RecipeError: the file is missing or not YAML, or a key, a type or a combination is wrong.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError("there is no such recipe", where=str(path), do="Check the path.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe can't be read ({error})", where=str(path)) from None
        return cls.parse(text, source=str(path), base=path.resolve().parent, overrides=overrides)

    @classmethod
    def parse(cls, text: str, *, source: str = "recipe", base: Path | None = None, overrides: Overrides = ()) -> Self:
        """Read YAML text; ``source`` names it in messages, ``base`` is the folder its relative paths start from."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{source}:{mark.line + 1}" if mark else source
            problem = getattr(error, "problem", None) or "it is not YAML"
            raise RecipeError(f"this is not valid YAML ({problem})", where=where, do="Check the indentation.") from None
        if not isinstance(tree, dict):
            raise RecipeError("a recipe is a mapping of keys to values", where=source, do="Start with: model: <hub id>")
        lines = line_numbers(node)
        _make_absolute(tree, base)
        return cls.build(apply_overrides(tree, overrides), source=source, lines=lines)

    @classmethod
    def build(
        cls, tree: dict[str, Any], *, source: str = "recipe", lines: dict[tuple[str | int, ...], int] | None = None
    ) -> Self:
        """Validate a plain dictionary; errors name ``source`` and, if ``lines`` is given, the line.

        Raises:
            RecipeError: with one line per problem found.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise explain(cls, error, source, lines or {}) from None

    def with_overrides(self, overrides: Overrides) -> Self:
        """This recipe with changes applied and checked."""
        return type(self).build(apply_overrides(self.to_dict(), overrides), source="--set")

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults, and the model: what a person would write."""
        return {"model": self.model, **self.model_dump(exclude_defaults=True)}

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def apply_overrides(tree: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Apply settings to a nested dictionary, in place; list items are addressed by number (``data.0.limit``).

    Raises:
        RecipeError: an override is not of the form key=value, or goes through something that is no mapping.
    """
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_parse_override, overrides)
    for key, value in pairs:
        item = f"{key}={value}"
        target: Any = tree
        parts = key.split(".")
        for part in parts[:-1]:
            if isinstance(target, list):
                target = target[_index(part, target, item)]
                continue
            if part == "tuning" and isinstance(target.get(part), str):
                target[part] = {"type": target[part]}
            if part == "data" and "data" in target:
                target["data"] = _sources(target["data"])
            step = target.setdefault(part, {})
            if not isinstance(step, dict | list):
                raise RecipeError(f"{part} has no sub-keys", where=f"--set {item}", do=f"Set {part} itself.")
            target = step
        if isinstance(target, list):
            target[_index(parts[-1], target, item)] = value
        else:
            target[parts[-1]] = value
    return tree


def _parse_override(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{item!r} is not a setting", where="--set", do="Write it as key.subkey=value.")
    try:
        return key.strip(), yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return key.strip(), text


def _index(part: str, items: list[Any], item: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(
            f"{part!r} is not an item of the list", where=f"--set {item}", do=f"Use 0 to {len(items) - 1}."
        )
    return int(part)


def _make_absolute(tree: dict[str, Any], base: Path | None) -> None:
    """Turn paths that are relative to the recipe's folder into absolute ones; hub ids stay as they are."""
    if base is None:
        return

    def absolute(value: Any, always: bool = False) -> Any:
        if not isinstance(value, str) or value.startswith(("/", "~")):
            return value
        if always or value.startswith(("./", "../")) or (base / value).exists():
            return str((base / value).resolve())
        return value

    tree["model"] = absolute(tree.get("model"))
    if tree["model"] is None:
        del tree["model"]
    if isinstance(tree.get("chat_template"), str) and tree["chat_template"] != "auto":
        tree["chat_template"] = absolute(tree["chat_template"], always=True)
    data = _sources(tree.get("data"))
    if isinstance(data, list):
        tree["data"] = [
            {**d, "path": absolute(d.get("path"))} if isinstance(d, dict) and "path" in d else d for d in data
        ]
