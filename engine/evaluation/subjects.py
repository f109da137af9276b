"""What is evaluated: the result of a run, one of its checkpoints, an adapter or a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...planner.errors import HardwareError, ModelError, RunError
from ...planner.hub import is_hub_id, read_config
from ...planner.plan import Resolved
from ..chat import result_folder
from ..checkpoints import store
from ..models.load import locate
from ..models.packed import packed_checkpoint
from ..run import Run, list_runs, trained

#: Where a run keeps what it made; as ``--checkpoint`` it stands for the result.
RESULT = "result"
#: What makes a folder an adapter.
ADAPTER = "adapter_config.json"
#: Longest sequence in tokens where no plan says one.
_LENGTH = 2048


@dataclass(frozen=True)
class Subject:
    """One model to evaluate.

    Args:
        label: what tables call it.
        folder: the adapter or the full model.
        model: what it began as: hub id or folder; itself if there is no base to compare with.
        resolved: formats and sizes; of a run those of its plan, on the device that is there.
        run: the run that made it, if one did.
        checkpoint: ``result``, or the name of a checkpoint; empty outside runs.
    """

    label: str
    folder: Path
    model: str
    resolved: Resolved
    run: Run | None = None
    checkpoint: str = ""

    @property
    def has_base(self) -> bool:
        """Whether there is a base that answers in the same way; a reward model's has no scores."""
        return self.resolved.method != "reward" and str(self.folder) != self.model

    @property
    def base_key(self) -> tuple[Any, ...]:
        """The same for subjects whose bases give the same figures."""
        settled = self.resolved
        return self.model, settled.quantization, settled.precision, settled.trains_base, settled.options.new_tokens


def subjects(targets: list[str], checkpoints: list[str], device: str | None = None) -> list[Subject]:
    """What the words of a command mean: runs by name or folder, models and adapters by folder or hub id.

    Args:
        checkpoints: of every run that is named: ``result``, ``step-000200`` or ``200``. Without any its result, or
            while it has none its newest checkpoint.
        device: ``cuda`` or ``cpu``; None is what is there.

    Raises:
        RunError: there is no such run or checkpoint, or it has not written a model yet.
        ModelError, HubError: there is no such model.
        HardwareError: the device is not there.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise HardwareError("there is no usable GPU", where="--device", do="Leave it out to use the CPU.")
    found: list[Subject] = []
    for target in targets:
        run, named = _run_of(target)
        if run is None:
            if checkpoints:
                raise RunError(f"{target} is no run and has no checkpoints", where="--checkpoint", do="Leave it out.")
            found.append(_of_model(target, kind))
            continue
        run = trained(run)
        found += [_of_run(run, name, kind) for name in (checkpoints or [named])]
    labels = [subject.label for subject in found]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise RunError(f"{twice} is named twice", do="Name each run, model and checkpoint once.")
    return found


def _run_of(target: str) -> tuple[Run | None, str]:
    """The run that a word means, and which of its folders if the word is the path of one; None for a model."""
    path = Path(target).expanduser()
    if (path / "run.json").is_file():
        return Run(path.resolve()), ""
    if (path / "config.json").is_file() or (path / ADAPTER).is_file():
        path = path.resolve()
        if path.name == "output" and (path.parent / "run.json").is_file():
            return Run(path.parent), RESULT
        if path.parent.name == "checkpoints" and (path.parent.parent / "run.json").is_file():
            return Run(path.parent.parent), path.name
        return None, ""
    known = {run.name: run for run in reversed(list_runs())}
    if target in known:
        return known[target], ""
    if not path.exists() and is_hub_id(target):
        return None, ""
    do = "Give a run, a checkpoint folder with config.json, or an adapter folder with adapter_config.json."
    if path.is_dir():
        raise RunError("this folder is neither a run nor a model", where=target, do=do)
    if path.exists():
        raise RunError("this is a file, and neither a run nor a model", where=target, do=do)
    if "/" in target:
        raise RunError("there is no such folder", where=target, do=do)
    return Run.open(target), ""  # by the beginning of its name; else raises, and names the runs there are


def _of_run(run: Run, checkpoint: str, device: str) -> Subject:
    folder = _folder_of(run, checkpoint)
    shown = RESULT if folder == run.output_path else folder.name
    resolved = run.plan.resolved
    precision = "fp32" if device == "cpu" and resolved.precision == "fp16" else resolved.precision
    resolved = dataclasses.replace(resolved, device=device, precision=precision)
    label = run.name if shown == RESULT else f"{run.name} {shown}"
    return Subject(label, folder, run.recipe.model, resolved, run, shown)


def _folder_of(run: Run, checkpoint: str) -> Path:
    if checkpoint == "":
        return result_folder(run)
    if checkpoint == RESULT:
        if not (run.output_path / "tokenizer_config.json").is_file():
            do = "Wait for its end, or name a checkpoint."
            raise RunError("this run has not written its result yet", where=run.name, do=do)
        return run.output_path
    name = store.folder_name(int(checkpoint)) if checkpoint.isdigit() else checkpoint
    folder = run.path / "checkpoints" / name
    there = ", ".join(one.path.name for one in store.find(run.path / "checkpoints")) or "none"
    if "/" in name or not folder.is_dir():
        raise RunError(f"there is no checkpoint {name!r}", where=run.name, do=f"There is: {there}.")
    if wrong := store.damage(folder):
        raise RunError(f"the checkpoint {name} is damaged: {wrong}", where=run.name, do=f"There is: {there}.")
    return folder


def _of_model(target: str, device: str) -> Subject:
    folder = locate_any(target)
    adapter = (folder / ADAPTER).is_file()
    model = target
    if adapter:
        base_name = read_config(folder / ADAPTER).get("base_model_name_or_path")
        if not isinstance(base_name, str) or not base_name:
            do = "Write the model that it was trained on there, as base_model_name_or_path."
            raise ModelError(f"its {ADAPTER} names no base model", where=target, do=do)
        model = base_name
    base = locate(model) if adapter else folder
    packed = packed_checkpoint(base)
    ours = packed is not None and packed.ours
    resolved = Resolved(
        method="sft", tuning="lora" if adapter else "full", rank=0, alpha=0.0, dropout=0.0, targets="all-linear",
        quantization="nf4" if ours else "none", sequence_length=min(window_of(base), _LENGTH), micro_batch=1,
        accumulation=1, packing=False, train_on="answers", epochs=1.0, steps=0, warmup_steps=0, optimizer="adamw",
        learning_rate=0.0, schedule="constant", weight_decay=0.0, max_grad_norm=0.0,
        precision="bf16" if device == "cuda" else "fp32", checkpointing="none", attention="sdpa", kernels="off",
        strategy="single", device="cuda" if device == "cuda" else "cpu", gpus=[], checkpoint_every=0, eval_every=0,
        seed=0,
    )  # fmt: skip
    label = Path(target).name if Path(target).expanduser().is_dir() else target
    return Subject(label, folder, model if adapter else str(folder), resolved)


def locate_any(target: str) -> Path:
    """The folder of a model or of an adapter.

    Raises:
        ModelError, HubError: as :func:`~finetui.engine.models.load.locate`.
    """
    folder = Path(target).expanduser()
    return folder.resolve() if (folder / ADAPTER).is_file() else locate(target)


def window_of(folder: Path) -> int:
    """How many tokens a model can look back on, as its config says; very many where that says nothing."""
    config = read_config(folder / "config.json")
    inner = config.get("text_config")
    length = (inner if isinstance(inner, dict) else config).get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else 1 << 30
