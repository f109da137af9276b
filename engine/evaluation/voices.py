"""A subject in memory, ready to be asked, and after it the base that it came from.

An adapter is loaded once and switched off for its base. A full model and its base are in memory one after the other.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.adapt import grow_vocabulary
from ..models.load import Emit, Numerics, load_base, load_tokenizer, locate, stored_dtype
from ..models.misfit import with_adapter
from .subjects import ADAPTER, Subject


@dataclass
class Voice:
    """A model in memory. ``numerics`` say what it computes in, ``base`` whether it is what a subject began as."""

    label: str
    base: bool
    model: Any
    tokenizer: Any
    device: torch.device
    numerics: Numerics

    def context(self) -> torch.autocast:
        """The autocast that it computes in: that which it was trained in."""
        return self.numerics.context(self.device)


def tokenizer_of(subject: Subject) -> Any:
    """The tokenizer that lies beside the subject's weights, else its base's.

    Raises:
        ModelError: there is none, or it can't be read.
    """
    own = (subject.folder / "tokenizer_config.json").is_file()
    return load_tokenizer(subject.folder if own else locate(subject.model))[0]


def voices(subject: Subject, tokenizer: Any, *, base: bool, emit: Emit) -> Iterator[Voice]:
    """The subject, then with ``base`` what it began as. A voice is over once the next is asked for: its ``model`` is
    None then, so that no memory is held by it.

    Raises:
        ModelError: the weights can't be loaded, or the adapter does not belong to its base.
    """
    device = torch.device(subject.resolved.device)
    base = base and subject.has_base
    if (subject.folder / ADAPTER).is_file():
        yield from _switched(subject, tokenizer, device, base, emit)
        return
    # Without autocast, as full models are trained and served: in the format that they are stored in.
    voice = Voice(subject.label, False, _whole(subject, subject.folder, device, emit), tokenizer, device, _PLAIN)
    yield voice
    voice.model = None
    if base:
        _let_go(device)
        voice = Voice("base", True, _whole(subject, locate(subject.model), device, emit), tokenizer, device, _PLAIN)
        if added := len(subject.resolved.options.new_tokens):
            grow_vocabulary(voice.model, tokenizer, added)
        yield voice
        voice.model = None
    _let_go(device)


_PLAIN = Numerics(torch.float32, None)


def _switched(subject: Subject, tokenizer: Any, device: torch.device, base: bool, emit: Emit) -> Iterator[Voice]:
    numerics = Numerics.of(subject.resolved)
    voice = Voice(subject.label, False, _adapted(subject, tokenizer, device, emit), tokenizer, device, numerics)
    yield voice
    if base:
        plain = Voice("base", True, voice.model, tokenizer, device, numerics)
        with voice.model.disable_adapter():
            yield plain
        plain.model = None
    voice.model = None
    _let_go(device)


def _let_go(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _whole(subject: Subject, folder: Path, device: torch.device, emit: Emit) -> Any:
    dtype = stored_dtype(folder)
    if device.type == "cpu" and dtype is torch.float16:
        dtype = torch.float32  # the CPU has no fp16 products worth the name
    return _placed(load_base(folder, subject.resolved, device, emit, dtype=dtype), subject, device)


def _adapted(subject: Subject, tokenizer: Any, device: torch.device, emit: Emit) -> Any:
    model = load_base(locate(subject.model), subject.resolved, device, emit)
    if added := len(subject.resolved.options.new_tokens):
        grow_vocabulary(model, tokenizer, added)
    return _placed(with_adapter(model, subject.folder, subject.model), subject, device)


def _placed(model: Any, subject: Subject, device: torch.device) -> Any:
    if subject.resolved.quantization == "none":
        model.to(device)
    return model.eval()
