"""Recipe: what the user asks for. One YAML file; every performance knob may be ``auto``, and is by default.

A recipe is strict: an unknown key, a wrong type or a combination that can't work is a :class:`RecipeError` that
names file, line and field. Nothing here reads a model, a dataset or a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from .datasource import DataSource
from .distillation import Distillation, check_distillation
from .errors import RecipeError
from .explain import Lines, explain, line_numbers
from .limits import CheckpointPolicy, Evaluation, HardwareRequest, Limits
from .objective import Preference, check_objective
from .optimizer import Optimizer
from .rollout import Reward, Rollout, absolute_reward, check_rollout
from .secrets import secret_in
from .section import Auto, Section
from .stages import PREVIOUS, Stage, expand
from .tuning import Tuning, check_tuning
from .yaml_text import parse, read_text

Method = Literal[
    "sft", "pretrain", "distill", "dpo", "ipo", "orpo", "kto", "cpo", "simpo", "grpo", "rloo", "ppo", "reward"
]  # fmt: skip
#: Changes to a recipe: dotted keys to values, or the same as ``a.b=c`` texts whose values are YAML.
Overrides = Mapping[str, Any] | Sequence[str]

#: Methods that a plan can be carried out for.
RUNNABLE_METHODS: frozenset[str] = frozenset(get_args(Method))
#: Methods whose examples are independent token sequences, so that several may share one row.
PACKABLE_METHODS: frozenset[str] = frozenset({"sft", "pretrain", "distill"})


def _sources(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


def _rewards(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if not isinstance(value, list):
        return value
    return [{"function": item} if isinstance(item, str) else item for item in value]


def _tuning(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


class Recipe(Section):
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
    data: Annotated[list[DataSource], BeforeValidator(_sources)] = Field([])
    """What is trained on."""
    sequence_length: int | Auto = Field("auto")
    """Longest sequence in tokens; longer rows are cut. ``auto`` is 2048, or less if model or data is shorter."""
    batch_tokens: Auto | Annotated[int, Field(ge=1, le=10**12)] = "auto"
    """Tokens per optimiser step over all GPUs."""
    batch_size: Auto | Annotated[int, Field(ge=1, le=10**7)] = "auto"
    """Sequences per optimiser step over all GPUs; instead of batch_tokens."""
    micro_batch: Auto | Annotated[int, Field(ge=1, le=10**7)] = "auto"
    """Sequences per GPU in one forward pass."""
    packing: Auto | bool = "auto"
    """Put several short examples into one row, without attention between them."""
    train_on: Literal["auto", "answers", "last-answer", "all"] = "auto"
    """Which tokens count for the loss; ``last-answer`` is what follows the last question of a conversation. ``auto``
    is answers for sft and all for pretrain."""
    loss: Literal["nll", "dft", "eaft"] = "nll"
    """sft, pretrain: how much each trained token counts. ``nll``: all the same. ``dft``: by its probability, so that
    what is unlikely pulls less (arXiv:2508.05629). ``eaft``: by how unsure the model is there, so that it is not turned
    round where it is sure (arXiv:2601.02151). Held-out loss is nll with each."""
    chat_template: str = "auto"
    """``auto`` is the tokenizer's own, or ChatML if it has none; else a .jinja file, or a family's name (llama3,
    qwen2_5, gemma, phi3 ...)."""
    epochs: float = Field(1.0, gt=0, le=1e6)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1, le=10**9)
    """End after so many optimiser steps where epochs would take more; the schedule of the rate ends there too."""
    neftune_alpha: float = Field(0.0, ge=0.0)
    """Noise on the input embeddings while training, in the size of NEFTune's alpha (arXiv:2310.05914); 5 is usual."""
    trust_remote_code: bool = False
    """Run the Python files that come with the model. You allow them once, by ``finetui trust MODEL``; a change of any
    asks again."""
    seed: int = Field(42, ge=0)
    """Seed of data order, adapter initialisation and dropout."""
    distillation: Distillation = Distillation()
    """distill: whom the model learns from, and how."""
    preference: Preference = Preference()
    """What a preference method optimises."""
    rollout: Rollout = Rollout()
    """How answers are generated, by methods that learn from rewards."""
    rewards: Annotated[list[Reward], BeforeValidator(_rewards)] = Field([])
    """Who judges those answers: names of shipped rewards, and functions of yours (``path.py:function``)."""
    optimizer: Optimizer = Optimizer()
    hardware: HardwareRequest = HardwareRequest()
    evaluation: Evaluation = Evaluation()
    limits: Limits = Limits()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    track: list[Literal["tensorboard"]] = Field(["tensorboard"])
    """Where metrics are also written."""
    stages: list[Stage] = Field([])
    """Several trainings in a row, and what to do with what they make: each stage says what differs from the recipe."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.batch_size != "auto" and self.batch_tokens != "auto":
            raise ValueError("batch_size and batch_tokens both set the batch||Keep one of them.")
        if self.packing is True and self.method not in PACKABLE_METHODS:
            raise ValueError(f"packing can't be used with method {self.method}||Set packing: false.")
        if self.train_on in ("last-answer", "all") and self.method not in PACKABLE_METHODS:
            what = f"train_on: {self.train_on} has no meaning for method {self.method}, which compares whole answers"
            raise ValueError(f"{what}||Leave it out.")
        if self.loss != "nll" and self.method not in PACKABLE_METHODS:
            what = f"loss: {self.loss} weighs single tokens, and method {self.method} learns from whole answers"
            raise ValueError(f"{what}||Remove it.")
        if self.loss == "eaft" and self.hardware.kernels == "off" and self.hardware.device != "cpu":
            what = "loss: eaft needs finetui's own output head on a GPU, which kernels: off takes away"
            raise ValueError(f"{what}||Set hardware.kernels: auto, or loss: dft.")
        if self.method == "pretrain" and self.train_on in ("answers", "last-answer"):
            raise ValueError("pretrain has no answers: it trains on all tokens||Set train_on: all, or method: sft.")
        if self.sequence_length != "auto" and self.sequence_length < 8:
            raise ValueError("sequence_length is below 8 tokens||Use 512 or more, or auto.")
        if self.sequence_length != "auto" and self.sequence_length > 2**27:
            raise ValueError("sequence_length is above 2**27 tokens, which no model reads||Use fewer, or auto.")
        if self.seed >= 2**32:  # NumPy's, which the trainer seeds too
            raise ValueError("seed is above 2**32 - 1, the largest that NumPy takes||Use a smaller one.")
        if self.data and all(source.split == "eval" for source in self.data):
            raise ValueError("no source in data has split: train||Give at least one source to train on.")
        check_distillation(self)
        check_objective(self)
        check_rollout(self)
        check_tuning(self)
        if self.stages:
            try:
                expand(self)
            except RecipeError as error:
                raise ValueError(f"{error.where}: {error.what}||{error.do}") from None
        held_out = self.evaluation.holdout != 0 or any(source.split == "eval" for source in self.data)
        if not held_out and (self.evaluation.patience or self.evaluation.keep_best):
            what = "patience and keep_best need held-out rows"
            raise ValueError(f"{what}||Set evaluation.holdout, or give a source with split: eval.")
        strategy = self.hardware.strategy
        if strategy in ("ddp", "fsdp") and self.hardware.gpus == 1:
            do = "Set hardware.gpus to 2 or more, or strategy: single."
            raise ValueError(f"strategy {strategy} needs more than one GPU||{do}")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Overrides = ()) -> Self:
        """Read a YAML file, with overrides on top.

        Raises:
            RecipeError: the file is missing or not YAML, or a key, a type or a combination is wrong.
        """
        path = Path(path)
        return cls.parse(read_text(path), source=str(path), base=path.resolve().parent, overrides=overrides)

    @classmethod
    def parse(cls, text: str, *, source: str = "recipe", base: Path | None = None, overrides: Overrides = ()) -> Self:
        """Read YAML text; ``source`` names it in messages, ``base`` is the folder its relative paths start from."""
        tree, node = parse(text, source)
        if not isinstance(tree, dict):
            raise RecipeError("a recipe is a mapping of keys to values", where=source, do="Start with: model: <hub id>")
        lines = line_numbers(node)
        _make_absolute(tree, base)
        try:
            return cls.build(apply_overrides(tree, overrides), source=source, lines=lines)
        except RecipeError:
            _refuse_others(tree, source)
            raise

    @classmethod
    def build(
        cls, tree: dict[str, Any], *, source: str = "recipe", lines: dict[tuple[str | int, ...], int] | None = None
    ) -> Self:
        """Validate a plain dictionary; errors name ``source`` and, if ``lines`` is given, the line.

        Raises:
            RecipeError: with one line per problem found.
        """
        _refuse_unfit_text(tree, source, lines or {})
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

    def to_yaml(self) -> str:
        """The recipe as YAML: what a person would write."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")


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


def _refuse_unfit_text(value: Any, source: str, lines: Lines, path: tuple[str | int, ...] = ()) -> None:
    """A recipe is kept, shown, compared and mailed: no secrets, and no names of files that are bytes and no text."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_unfit_text(part, source, lines, (*path, key))
    elif isinstance(value, str) and (what := secret_in(value) or _undecoded(value)):
        line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
        where = f"{source}:{line}" if line else source
        do = "Put it into the environment, and its name here: ${DATA_TOKEN}."
        if _undecoded(value):
            do = "Rename that file or folder, or link to it by another name."
        raise RecipeError(f"{'.'.join(map(str, path))} holds {what}", where=where, do=do)


def _undecoded(text: str) -> str:
    """Bytes of a name that are not UTF-8 stand in it as halves of characters (PEP 383)."""
    found = any("\ud800" <= letter <= "\udfff" for letter in text)
    return f"a name that is not UTF-8: {text!a}" if found else ""


def _refuse_others(tree: dict[str, Any], source: str) -> None:
    """Files of other tools are no recipes, but can be made into one."""
    from .importers import title_of

    if (title := title_of(tree)) is not None:
        do = f"Make one of it: finetui import {source} -o recipe.yaml"
        raise RecipeError(f"this is a training file of {title}, not a recipe", where=source, do=do) from None


def _parse_override(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{item!r} is not a setting", where="--set", do="Write it as key.subkey=value.")
    try:
        return key.strip(), parse(text, "--set")[0] if text else None
    except RecipeError:  # no YAML, as a regular expression may be: then it is the text itself
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
        try:
            if always or value.startswith(("./", "../")) or (base / value).exists():
                return str((base / value).resolve())
        except (OSError, ValueError):  # no file can have this name; whoever opens it says so
            pass
        return value

    tree["model"] = absolute(tree.get("model"))
    if tree["model"] is None:
        del tree["model"]
    stages = tree.get("stages")
    for part in [tree, *(stages if isinstance(stages, list) else [])]:
        if isinstance(part, dict):
            _make_files_absolute(part, base, absolute)


def _make_files_absolute(tree: dict[str, Any], base: Path, absolute: Callable[..., Any]) -> None:
    """The paths of a recipe, or of a stage, beside the model's."""
    if isinstance(tree.get("path"), str):  # of a stage that exports
        tree["path"] = absolute(tree["path"], always=True)
    distillation = tree.get("distillation")
    if isinstance(distillation, dict) and "teacher" in distillation:
        distillation["teacher"] = absolute(distillation["teacher"])
    tuning = tree.get("tuning")
    if isinstance(tuning, dict):
        if tuning.get("start_from") not in (None, "", PREVIOUS):
            tuning["start_from"] = absolute(tuning["start_from"], always=True)
        if isinstance(tuning.get("experts"), list):
            tuning["experts"] = [absolute(folder, always=True) for folder in tuning["experts"]]
    named = tree.get("chat_template")
    if isinstance(named, str) and Path(named).suffix:
        tree["chat_template"] = absolute(named, always=True)
    elif isinstance(named, str):  # a file, or the name of a family
        tree["chat_template"] = absolute(named)
    rewards = _rewards(tree.get("rewards"))
    if isinstance(rewards, list):
        tree["rewards"] = [absolute_reward(reward, base) for reward in rewards]
    data = _sources(tree.get("data"))
    if isinstance(data, list):
        tree["data"] = [
            {**d, "path": absolute(d.get("path"))} if isinstance(d, dict) and "path" in d else d for d in data
        ]
