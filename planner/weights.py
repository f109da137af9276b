"""How large a model's weights are as they are stored, read from the headers of its safetensors files.

A header is the first few kilobytes of a file: a length, and JSON with the shape and dtype of each tensor
(huggingface.co/docs/safetensors). Of a model on the Hub they come by range request, through huggingface_hub, and the
answer is kept for its commit under the state directory.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import hub
from .errors import HubError, ModelError
from .state import state_dir

#: Bytes per value of the dtypes that safetensors names.
_WIDTHS = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F8_E4M3": 1,
    "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1, "F4": 0.5,
}  # fmt: skip
#: Longest header that is believed; those of models with thousands of experts have 10 MB.
_LONGEST = 100 * 2**20


@dataclass(frozen=True)
class Stored:
    """``bytes`` of all tensors, and how many values there are of each dtype."""

    bytes: int
    values: dict[str, int]

    @property
    def parameters(self) -> int:
        """Values of all dtypes. Of packed 4-bit weights two are one value here."""
        return sum(self.values.values())


def stored_weights(model: str) -> Stored | None:
    """What the safetensors files of a folder or of a model on the Hub hold; ``None`` where there are none.

    Raises:
        ModelError: a file of the folder has no header that can be read.
        HubError: the Hub can't be reached and nothing was kept from before, or it does not answer for this model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        headers = [_header(file) for file in sorted(path.glob("*.safetensors"))]
        return _sum(tensor for header in headers for tensor in header.values()) if headers else None
    if path.is_file() or not hub.is_hub_id(model):
        return None
    if hub.offline_set() or not hub.reachable():
        kept = sorted(_folder().glob(f"{_plain(model)}@*.json"), key=lambda file: file.stat().st_mtime)
        if kept:
            return _kept(kept[-1])
        raise hub.offline(model) if hub.offline_set() else hub.unreachable()
    return _from_hub(model)


def _from_hub(model: str) -> Stored | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        commit = api.model_info(model, timeout=hub.TIMEOUT_S).sha
        place = _folder() / f"{_plain(model)}@{commit}.json"
        if (known := _kept(place)) is not None:
            return known
        files = api.get_safetensors_metadata(model, revision=commit).files_metadata.values()
    except NotASafetensorsRepoError:
        return None
    except SafetensorsParsingError as error:
        what, do = f"the header of its weights can't be read ({error})", "Give another model: these files are damaged."
        raise HubError(what, where=model, do=do) from None
    except Exception as error:
        raise hub.explained(error, model) from None
    found = _sum({"dtype": t.dtype, "shape": t.shape} for file in files for t in file.tensors.values())
    _keep(place, found)
    return found


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if 0 < length <= _LONGEST else None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"the header can't be read ({error})", where=str(file), do="Copy the file anew.") from None
    if not isinstance(header, dict):
        raise ModelError("this is no safetensors file", where=str(file), do="Copy the file anew.")
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    for name, tensor in tensors.items():
        if not _sound(tensor):
            do = "Copy the file anew."
            raise ModelError(f"its header tells neither dtype nor shape of {name!r}", where=str(file), do=do)
    return tensors


def _sound(tensor: Any) -> bool:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("dtype"), str):
        return False
    shape = tensor.get("shape")
    return isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**48 for size in shape)


def _sum(tensors: Iterable[Mapping[str, Any]]) -> Stored:
    values: dict[str, int] = {}
    for tensor in tensors:
        values[tensor["dtype"]] = values.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    return Stored(round(sum(_WIDTHS.get(dtype, 1) * count for dtype, count in values.items())), values)


# --- answers that were given before


def _folder() -> Path:
    return state_dir() / "hub"


def _plain(model: str) -> str:
    return model.replace("/", "--")


def _kept(place: Path) -> Stored | None:
    try:
        return Stored(**json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none, or of another release
        return None


def _keep(place: Path, found: Stored) -> None:
    """Written whole or not at all; a state directory that can't be written only costs the next request."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=".")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(found), file)
        os.replace(name, place)
    except OSError:
        return
