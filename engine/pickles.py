"""Pickles are programs (https://docs.python.org/3/library/pickle.html), and finetui runs none.

Weights, adapters and datasets are read as safetensors, JSON, CSV, text, Parquet or Arrow, which hold values and nothing
else. Whoever has a pickle only turns it into safetensors once, with torch's reader that makes tensors and no other
object (``weights_only``)::

    python -P -m finetui.engine.pickles FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..planner.errors import FinetuiError, ModelError, first_line

#: Suffixes under which pickles go about.
SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
#: Files of these names are weights.
_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin", "model*.pt", "model*.pth", "consolidated*.pth")
#: What a file of the index of a sharded checkpoint is called.
_INDEX = "model.safetensors.index.json"


def pickled_weights(names: Iterable[str]) -> list[str]:
    """Which of these files of a model's folder hold weights as pickles."""
    return sorted(name for name in names if any(Path(name).match(pattern) for pattern in _WEIGHTS))


def refuse(folder: Path | str, names: Iterable[str], error: type[FinetuiError] = ModelError) -> None:
    """Refuse a folder whose weights exist as pickles alone.

    Raises:
        FinetuiError: ``error``, with the way to safetensors.
    """
    names = list(names)
    found = pickled_weights(names)
    if found and not any(name.endswith(".safetensors") for name in names):
        package = (__package__ or "finetui.engine").partition(".")[0]
        place = folder if Path(folder).is_dir() else "FOLDER"
        do = f"Convert it once with: python -P -m {package}.engine.pickles {place}"
        if place == "FOLDER":
            do = f"Look for a version of it with *.safetensors, or download it to a FOLDER and c{do[1:]}"
        what = f"its weights are a pickle ({found[0]}), which can run any program when it is loaded"
        raise error(what, where=str(folder), do=do)


def convert(folder: Path) -> list[Path]:
    """Write the pickled weights of a folder as safetensors beside them; the pickles stay.

    Tensors that share memory are written once each name, since safetensors knows no sharing.

    Returns:
        The new files.

    Raises:
        ModelError: there are none, or a file holds something else than tensors.
    """
    import torch
    from safetensors.torch import save_file

    names = pickled_weights(path.name for path in folder.iterdir())
    if not names:
        raise ModelError("there are no pickled weights here", where=str(folder), do=f"They are {' '.join(_WEIGHTS)}.")
    written: list[Path] = []
    places: dict[str, str] = {}
    total = 0
    for number, name in enumerate(names, 1):
        try:
            state: Any = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged archive has many ways to say so; the pickle's own is UnpicklingError
            what = f"{name} holds something else than tensors, or is damaged ({first_line(error)})"
            raise ModelError(what, where=str(folder), do="Ask its author for safetensors.") from None
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ModelError(f"{name} is no table of tensors by name", where=str(folder), do="Ask for safetensors.")
        tensors = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
        target = folder / _name(name, number, len(names))
        save_file(tensors, target, metadata={"format": "pt"})
        written.append(target)
        places |= dict.fromkeys(tensors, target.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(written) > 1:
        import json

        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written


def _name(pickle: str, number: int, count: int) -> str:
    if pickle.startswith("adapter_model"):
        return "adapter_model.safetensors"
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def main(argv: list[str] | None = None) -> int:
    """Convert the folder that is named."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -P -m finetui.engine.pickles FOLDER", file=sys.stderr)
        return 2
    try:
        for path in convert(Path(arguments[0])):
            print(path)
    except FinetuiError as error:
        print(f"finetui: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
