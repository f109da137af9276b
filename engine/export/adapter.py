"""The adapter of a LoRA or QLoRA run in PEFT's format, with its tokenizer: ``PeftModel.from_pretrained`` loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ...planner.errors import RunError
from ..chat import result_folder
from ..checkpoints.store import MANIFEST
from ..modes import give_usual_modes
from ..output import written_whole
from ..run import Run
from .exported import Exported, require_room
from .talk import check_folder

#: What only resuming needs, in a checkpoint folder.
_FOR_RESUMING = (
    MANIFEST,
    "optimizer.*",
    "rank[0-9]*.safetensors",
    "adalora.*",
    "trainer_state.json",
)


def export_adapter(run: Run, destination: Path) -> Exported:
    """Copy the adapter to ``destination``.

    Raises:
        RunError: the run trained the full model, so that there is no adapter, or it has written nothing yet.
        TrainingError: the disk has too little room (cause ``disk``).
    """
    folder = result_folder(run)
    if not (folder / "adapter_config.json").is_file():
        do = f"Use: finetui export {run.name} --to merged"
        raise RunError("this run trained the full model and has no adapter", where=run.name, do=do)
    require_room(destination, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    with written_whole(destination) as partial:
        copy_model_files(folder, partial)
        name = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        assert name, "an adapter names its base model"
        checked = check_folder(run, folder, partial)
    return Exported(destination, checked, use=(f"PeftModel.from_pretrained(base, {str(destination)!r})",))


def copy_model_files(source: Path, target: Path) -> None:
    """Copy a model or adapter folder without what only resuming needs."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_FOR_RESUMING), dirs_exist_ok=True)
    give_usual_modes(target)  # in the run they were for its user alone
