"""Sources: the models that are merged, and their tensors one at a time, whatever they are stored as.

A source is a checkpoint folder, a model of the Hub, the output of a run, or an adapter over its base, whose products
are added to the base's weights as these are read. Nothing is loaded as a whole, and no code of a model runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ...planner.errors import ModelError, first_line
from ...planner.hub import is_hub_id
from ...planner.inside import inside
from ..models.files import opened, weight_files

#: Formats of floating point that can be averaged as they are.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
#: Buffers that older releases of transformers stored, and that it now makes anew from the config.
_MADE_ANEW = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias")


@dataclass(frozen=True)
class Stored:
    """One tensor as a file holds it; ``dtype`` as safetensors names it (BF16)."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class Source(Protocol):
    """A model whose tensors can be read."""

    name: str
    """As the user named it."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""

    @property
    def tensors(self) -> dict[str, Stored]:
        """What it is made of, by name."""

    @property
    def folders(self) -> list[Path]:
        """Where its config, tokenizer and templates lie; of files of one name the last folder's counts."""

    def weight_files(self) -> list[Path]:
        """The files that hold its weights."""

    def read(self, name: str) -> Any:
        """A tensor as it is stored."""


class Checkpoint:
    """A folder in Hugging Face format with safetensors files.

    Args:
        name: as the user named it.
        folder: of :func:`finetui.engine.models.load.locate`, which has refused pickles and paths that leave it.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._open: dict[str, Any] = {}

    @property
    def folders(self) -> list[Path]:
        """The folder."""
        return [self.folder]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json.

        Raises:
            ModelError: it can't be read, or says that the weights are packed.
        """
        config = read_json(self.folder / "config.json")
        packed = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
        if packed:
            kind = packed.get("quant_method", "in fewer bits") if isinstance(packed, dict) else "in fewer bits"
            do = "Merge the model that it was quantised from, and quantise the result."
            raise ModelError(f"its weights are packed ({kind}), and such can't be added up", where=self.name, do=do)
        return config

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """What its files hold.

        Raises:
            ModelError: a file is missing, damaged, or holds a tensor that another one holds too.
        """
        found: dict[str, Stored] = {}
        for file in self.shards():
            opened = self._handle(file.name)
            for name in opened.keys():  # noqa: SIM118 - no dictionary
                if name.endswith(_MADE_ANEW):
                    continue
                if name in found:
                    do = "Remove the file that does not belong to the model."
                    raise ModelError(f"{name} is in {found[name].file} and in {file.name}", where=self.name, do=do)
                part = opened.get_slice(name)
                found[name] = Stored(file.name, str(part.get_dtype()), tuple(part.get_shape()))
        return found

    def weight_files(self) -> list[Path]:
        """The files that hold its weights."""
        return self.shards()

    def shards(self) -> list[Path]:
        """The safetensors files that belong to the checkpoint; without an index all, whatever they are called.

        Raises:
            ModelError: there are none, or the index names one that is not there.
        """
        files = weight_files(self.folder)
        files = files or [
            inside(self.folder, path.name, error=ModelError) for path in sorted(self.folder.glob("*.safetensors"))
        ]
        if not files:
            raise ModelError("this folder holds no weights", where=str(self.folder), do="Fetch the model again.")
        return files

    def read(self, name: str) -> Any:
        """A tensor as it is stored."""
        return self._handle(self.tensors[name].file).get_tensor(name)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = opened(self.folder / file)
        return self._open[file]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: it can't be read, or is none.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = f"the file can't be read ({first_line(error)})"
        raise ModelError(what, where=str(path), do="Fetch the model again.") from None
    if not isinstance(tree, dict):
        raise ModelError("this is no JSON object", where=str(path), do="Fetch the model again.")
    return tree


def find(name: str) -> Source:
    """The source that a name stands for: a run, an adapter, a checkpoint folder, ``BASE+ADAPTER``, or a hub id.

    Raises:
        ModelError: there is none, or it can't be merged.
        HubError: the Hub does not give it.
        RunError: the run has made nothing yet.
    """
    from ..models.load import locate

    base, folder = parts(name)
    if folder is not None:
        from .adapted import Adapted

        return Adapted(name, base, folder)
    return Checkpoint(name, locate(base))


class Listed:
    """A model of the Hub that is not here: its config and the names, formats and shapes of its tensors.

    Raises:
        HubError: the Hub does not tell.
        ModelError: it has no safetensors.
    """

    def __init__(self, name: str, model: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        from ...planner import hub

        self.name, self.config = name, hub.remote_config(model)
        try:
            files = HfApi().get_safetensors_metadata(model).files_metadata
        except (NotASafetensorsRepoError, SafetensorsParsingError):
            raise ModelError(
                "it has no weights as safetensors", where=model, do="Look for a version that has."
            ) from None
        except Exception as error:
            raise hub.explained(error, model) from None
        self.tensors = {
            tensor: Stored(file, str(told.dtype), tuple(told.shape))
            for file, header in files.items()
            for tensor, told in header.tensors.items()
            if not tensor.endswith(_MADE_ANEW)
        }
        self.folders: list[Path] = []

    def weight_files(self) -> list[Path]:
        """None are here."""
        return []

    def read(self, name: str) -> Any:
        """Not possible: nobody merges what was listed alone."""
        raise AssertionError(f"{name} of {self.name} is not here")


def find_listed(name: str) -> Source:
    """As :func:`find`, but of a model that is on the Hub alone its config and headers are all that is asked for.

    An adapter changes neither the names nor the sizes of its base's tensors.
    """
    from ..models.at_hand import folder_of

    base, _ = parts(name)
    return find(name) if folder_of(base) is not None or not is_hub_id(base) else Listed(name, base)


def parts(name: str) -> tuple[str, Path | None]:
    """The base, as a folder or hub id, and the folder of the adapter that a name stands for, if there is one.

    Raises:
        ModelError: an adapter names no base.
        RunError: the run has made nothing yet.
    """
    if "+" in name and not Path(name).expanduser().exists():
        first, _, second = name.partition("+")
        folder = _made_here(second)
        if folder is None or not is_adapter(folder):
            do = "Write it as BASE+ADAPTER, where ADAPTER is a folder or a run."
            raise ModelError(f"there is no adapter {second!r}", where=name, do=do)
        return first, folder
    folder = _made_here(name)
    if folder is None:
        return name, None
    if not is_adapter(folder):
        return str(folder), None
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ModelError("this adapter names no base", where=name, do=f"Write it as BASE+{name}.")
    return str(base), folder


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / "adapter_config.json").is_file()


def _made_here(name: str) -> Path | None:
    """The folder of an adapter, or of what the run of this name or directory made; None if it is neither."""
    from ..run import Run, list_runs, trained

    path = Path(name).expanduser()
    if is_adapter(path):
        return path
    if (path / "run.json").is_file():
        run = Run.open(path)
    elif "/" in name or path.exists():
        return None
    else:
        found = [run for run in list_runs() if run.name == name]
        if not found:
            return None
        run = found[0]
    from ..chat import result_folder

    return result_folder(trained(run))
