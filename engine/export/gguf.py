"""One file that llama.cpp, Ollama and LM Studio load: weights, tokenizer and chat template of a run, in GGUF.

Everything that can be known is looked at before anything is merged: the architecture, how the tokenizer cuts text, the
place of each tensor, the size of the file. A plain LoRA is then added tensor by tensor on the way into the file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...planner.errors import MissingExtraError, ModelError
from ..chat import result_folder
from ..data.examples import Message
from ..data.template import render
from ..models.load import load_tokenizer, locate, stored_dtype
from ..models.weights import stored_tensors
from ..output import written_whole
from ..run import Run
from .exported import Exported, Tell, plain_name, require_room
from .gguf_file import Layout, lay_out, write
from .gguf_model import ELSEWHERE, family_of
from .merged import empty_model, is_adapter, refuse_unmergeable, standing_size, streamed, write_merged
from .source import Source, of_folder
from .talk import ends_answers, same_prompts, trained

_SCRATCH = ".merged"


@dataclass(frozen=True)
class Prepared:
    """A file that can be written: everything about it is known and checked but its weights.

    Args:
        result: the folder of the run's adapter or model.
        source: the tensors of the model that stands alone; None where it has to be merged whole first.
        layout: of the file; shapes of a vocabulary that grew are those of the base.
        checked: what was made sure of.
    """

    run: Run
    result: Path
    config: Any
    tokenizer: Any
    stored: torch.dtype
    source: Source | None
    layout: Layout
    checked: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{plain_name(self.run)}-{self.layout.quant}.gguf"

    def write(self, folder: Path, tell: Tell) -> str:
        """Write the file into a folder; returns what became of it, for display.

        Raises:
            ModelError: weights that are not finite, or too large for the format.
        """
        path = folder / self.name
        with self._standing(folder, tell) as source:
            quant, name = self.layout.quant, self.run.name
            layout = lay_out(self.config, self.tokenizer, source.shapes, quant, self.stored, name)
            write(layout, source, path, tell)
        _read_back(path, layout)
        return f"{len(layout.tensors)} tensors in {layout.quant}, {path.stat().st_size / 2**20:.1f} MiB"

    @contextlib.contextmanager
    def _standing(self, folder: Path, tell: Tell) -> Iterator[Source]:
        """The tensors of the model that stands alone; merged whole, they lie in a folder for that time."""
        if self.source is not None:
            yield self.source
            return
        scratch = folder / _SCRATCH
        scratch.mkdir()
        write_merged(self.run, self.result, scratch, tell)
        yield of_folder(scratch)
        shutil.rmtree(scratch)


def export_gguf(run: Run, destination: Path, tell: Tell, *, quant: str = "auto") -> Exported:
    """Write one GGUF file into ``destination``.

    Args:
        quant: a choice of :data:`quants.MIXTURES`, or ``auto``: as the weights are stored.

    Raises:
        MissingExtraError: the package ``gguf`` is not installed.
        ModelError: llama.cpp can't compute what this model does.
        RunError: the run has no model yet, or there is no such format.
        TrainingError: the disk has too little room (cause ``disk``).
    """
    prepared = prepare(run, destination, quant)
    with written_whole(destination) as partial:
        wrote = prepared.write(partial, tell)
    path = destination / prepared.name
    use = shlex.join(["llama-server", "-m", str(path)])
    return Exported(destination, (*prepared.checked, wrote), prepared.layout.notes, (use,))


def prepare(run: Run, destination: Path, quant: str) -> Prepared:
    """Look at everything that can be known before weights are; errors are those of :func:`export_gguf`."""
    if find_spec("gguf") is None:
        raise MissingExtraError("export --to gguf", "export")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    from transformers import AutoConfig

    result = result_folder(run)
    refuse_unmergeable(run)
    if run.plan.resolved.method == "reward":
        raise ModelError("a reward model scores answers, which llama.cpp does not", where=run.name, do=ELSEWHERE)
    base = locate(run.recipe.model) if is_adapter(result) else result
    family_of(str(json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type")))
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    tokenizer, _ = load_tokenizer(result)
    stored = stored_dtype(base)
    layout = lay_out(config, tokenizer, _shapes(base), quant, stored, run.name)
    source = streamed(run, base, result) if is_adapter(result) else of_folder(result)
    require_room(destination, layout.bytes + (0 if source else standing_size(run, result)))
    checked = _check_talk(run, layout, tokenizer)
    return Prepared(run, result, config, tokenizer, stored, source, layout, checked)


def _shapes(base: Path) -> Mapping[str, Sequence[int]]:
    """The shapes of a model's plain tensors, also where they are stored packed."""
    from ..models.load import already_quantised

    if not already_quantised(base) and (found := stored_tensors(base)):
        return {name: told.shape for name, told in found.items()}
    return {name: tuple(tensor.shape) for name, tensor in empty_model(base).state_dict().items()}


def _check_talk(run: Run, layout: Layout, tokenizer: Any) -> tuple[str, ...]:
    """What llama.cpp will make of a conversation: the template in the file, and the tokens at which it stops."""
    before = trained(tokenizer, run.plan.resolved.method)
    assert before is not None
    template = layout.metadata.get("tokenizer.chat_template")

    def prompt(messages: Sequence[Message]) -> list[int]:
        text = render(tokenizer, messages, "the probe", prompt=True, template=template)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    kinds = ("eos", "eot", "eom")
    stops = [layout.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in kinds]
    return (same_prompts(before, prompt), ends_answers(before, [s for s in stops if s is not None], tokenizer))


def _read_back(path: Path, layout: Layout) -> None:
    """Make sure that the file holds what was laid out."""
    from gguf import GGUFReader

    found = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    wanted = {tensor.name: tensor.kind for tensor in layout.tensors} | dict.fromkeys(layout.model.extra, "F32")
    assert found == wanted, "a GGUF file reads as it was written"
