"""Why a checkpoint can't be loaded, in plain words: what a file or a config says that the model's class can't use.

transformers tells it in a table on standard error, of which its exception says only that there was one.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ...planner.errors import ModelError, first_line
from ..supervision.failure import is_out_of_memory
from .files import opened, require_sound, weight_files
from .remote_code import trusted

#: What the classes of transformers raise over a checkpoint that somebody damaged or put together wrongly.
UNREADABLE = (
    OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip


def explained(error: Exception, folder: Path, told: list[str]) -> Exception:
    """What to raise in place of an error that loading a checkpoint ended with.

    Args:
        told: of :func:`unannounced`.

    Returns:
        A ModelError that names the file, or the weights whose shapes the config contradicts. The error itself where it
        is about the machine and not about the checkpoint.

    Raises:
        ModelError: a file is damaged.
    """
    if is_out_of_memory(error):
        return error
    require_sound(folder)
    differing = _differing(folder) if isinstance(error, RuntimeError) else []
    if differing:
        name, stored, wanted = differing[0]
        more = f", and {len(differing) - 1} more weights differ" if len(differing) > 1 else ""
        what = f"its weights are not those of its config.json: {name} is {stored}, and should be {wanted}{more}"
        return ModelError(what, where=str(folder), do="Fetch config.json and weights from one source.")
    for line in told:
        print(line, file=sys.stderr)
    if isinstance(error, RuntimeError) and not told:  # CUDA and its libraries say so too
        return error
    do = "Fetch it again; if it is sound, a newer transformers may know it."
    return refused_config(folder) or ModelError(
        f"the model can't be loaded ({first_line(error)})", where=str(folder), do=do
    )


def refused_config(folder: Path) -> ModelError | None:
    """The error of a config that transformers has no use for; None if that is not what is wrong."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(str(folder), trust_remote_code=trusted(folder))
    except UNREADABLE as error:
        what = f"transformers can't use this config ({' '.join(str(error).split())[:200]})"
        return ModelError(what, where=str(folder / "config.json"), do="Fetch it again from its source.")
    return None


def require_one_format(model: Any, layers: Sequence[Any]) -> None:
    """Refuse what FSDP2 asserts against: gradients of a unit are summed in one buffer, and so of one format.

    Args:
        model: the root, of which all that is in none of ``layers`` is a unit.
        layers: the other units.

    Raises:
        ModelError: some architectures keep a few weights in fp32 whatever the format of the others.
    """
    held = {id(p) for layer in layers for p in layer.parameters()}
    root = [(name, p) for name, p in model.named_parameters() if id(p) not in held]
    for unit in (*(list(layer.named_parameters()) for layer in layers), root):
        trained = [(name, p) for name, p in unit if p.requires_grad]
        other = next(((name, p) for name, p in trained if p.dtype != trained[0][1].dtype), None)
        if other is not None:
            formats = " and ".join(f"{name} is {p.dtype}" for name, p in (trained[0], other)).replace("torch.", "")
            do = "Set hardware.precision: bf16-mixed, which trains all weights in fp32, or hardware.strategy: ddp."
            what = f"weights of two formats can't be trained together where they are split: {formats}"
            raise ModelError(what, where=type(model).__name__, do=do)


def with_adapter(model: Any, folder: Path, base: str) -> Any:
    """A base with the adapter of a folder on it, to be asked and not to be trained.

    Args:
        base: what the base is called in messages.

    Raises:
        ModelError: the adapter is damaged, or does not belong to its base.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder))
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        require_sound(folder)
        what = f"this adapter does not fit its base {base} ({_mismatch(str(error))})"
        do = "Use the model that it was trained on: base_model_name_or_path in its adapter_config.json names it."
        raise ModelError(what, where=str(folder), do=do) from error


def _mismatch(text: str) -> str:
    """What of an error says what does not fit: the class that it happened in stands in the line before."""
    lines = [line.strip() for line in text.splitlines() if "mismatch" in line]
    return first_line(lines[0] if lines else text, 200)


@contextlib.contextmanager
def unannounced() -> Iterator[list[str]]:
    """Keep transformers' table of weights that are missing or left over off standard error; gives what it would say."""
    told: list[str] = []

    def hold(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return True
        told.append(message)
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(hold)
    try:
        yield told
    finally:
        logger.removeFilter(hold)


def _differing(folder: Path) -> list[tuple[str, list[int], list[int]]]:
    """Weights that are stored in another shape than the config asks for: name, shape that is, shape that should be."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = trusted(folder)
    with contextlib.suppress(*UNREADABLE), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        files = [opened(file) for file in weight_files(folder)]
        stored = {name: list(file.get_slice(name).get_shape()) for file in files for name in file.keys()}  # noqa: SIM118
        return [(name, stored[name], shape) for name, shape in wanted.items() if stored.get(name, shape) != shape]
    return []
