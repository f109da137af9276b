"""The weights of a checkpoint straight onto a GPU, read by several threads while the process is busy with other things.

A start spends seconds importing libraries, during which disk, bus and GPU are idle. :class:`Reading` needs torch alone:
each thread reads pieces of the safetensors files into two pinned buffers in turn and sends one to the GPU while it
fills the other. ``load_base`` gives the finished tensors to transformers, which then has nothing left to copy.

The format (https://huggingface.co/docs/safetensors, "Format"): eight bytes with the length of a header, little-endian;
the header, JSON from names to dtype, shape and byte range; the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from .files import weight_files

#: Reading threads, and bytes of each of their buffers: one thread copies memory at about 10 GB/s, the bus takes 55.
THREADS, BUFFER = 6, 16 * 2**20
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """One tensor as a file holds it."""

    file: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What the safetensors files of a checkpoint hold, by name; empty if there are none, or another format's tensors.

    Raises:
        ValueError: a file is damaged.
        ModelError: the index is damaged, or names a file that is not there or outside of the folder.
        OSError: a file can't be read.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length < 2**27:
                raise ValueError(f"{file} is no safetensors file")
            header = json.loads(opened.read(length))
            if not isinstance(header, dict):
                raise ValueError(f"{file} is no safetensors file")
        size, begin = file.stat().st_size, 8 + length
        for name, told in header.items():
            if name == "__metadata__":
                continue
            if told["dtype"] not in _DTYPES:
                return {}
            dtype, (start, end) = _DTYPES[told["dtype"]], told["data_offsets"]
            found[name] = Stored(file, begin + start, dtype, tuple(told["shape"]))
            if begin + end > size or _bytes(found[name]) != end - start:
                raise ValueError(f"{file} is damaged at tensor {name}")
    return found


class Reading:
    """Tensors on their way to a device; :meth:`tensors` waits for them.

    Args:
        stored: what to read, of :func:`stored_tensors`.
        device: a CUDA device; on the CPU the same way is taken without pinned memory, for tests.
    """

    def __init__(self, stored: dict[str, Stored], device: torch.device, *, threads: int = THREADS) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._error: BaseException | None = None
        self._pieces: SimpleQueue[tuple[Path, int, torch.Tensor]] = SimpleQueue()
        self._found: dict[str, torch.Tensor] = {}
        self._thread = threading.Thread(target=self._read_all, args=(stored, threads), name="weights", daemon=True)
        self._thread.start()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, once all are there; they belong to the caller alone.

        Raises:
            OSError: a file could not be read.
            RuntimeError: the device has too little memory, or failed.
        """
        self._thread.join()
        if self._error is not None:
            self._found.clear()
            raise self._error
        found, self._found = self._found, {}
        return found

    def _read_all(self, stored: dict[str, Stored], threads: int) -> None:
        try:
            for name, tensor in stored.items():
                # One allocation each, so that each can be freed and has no neighbour to keep alive.
                self._found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                for piece in _pieces(tensor, self._found[name]):
                    self._pieces.put(piece)
            workers = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except BaseException as error:  # handed to whoever waits
            self._error = error

    def _work(self) -> None:
        try:
            if self._cuda:
                torch.cuda.set_device(self._device)
            buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
            stream: Any = torch.cuda.Stream(self._device) if self._cuda else None
            sent: list[Any] = [None, None]
            files: dict[Path, int] = {}
            turn = 0
            while self._error is None:
                try:
                    file, begin, target = self._pieces.get_nowait()
                except Empty:
                    break
                if file not in files:
                    files[file] = os.open(file, os.O_RDONLY)
                if sent[turn] is not None:
                    sent[turn].synchronize()
                piece = buffers[turn][: target.numel()]
                _fill(files[file], begin, piece)
                if self._cuda:
                    with torch.cuda.stream(stream):
                        target.copy_(piece, non_blocking=True)
                        sent[turn] = stream.record_event()
                else:
                    target.copy_(piece)
                turn = 1 - turn
            if self._cuda:
                stream.synchronize()
            for descriptor in files.values():
                os.close(descriptor)
        except BaseException as error:  # handed to whoever waits
            self._error = error


def around(tensors: dict[str, torch.Tensor], folder: Path, options: dict[str, Any]) -> tuple[Any, Any] | None:
    """A causal model built by transformers around tensors that are in place, as ``from_pretrained`` would build it.

    Args:
        tensors: the checkpoint's, by their names in it; their memory becomes that of the parameters.
        options: of ``from_pretrained``.

    Returns:
        Model and loading info; None where only ``from_pretrained`` itself knows which class the folder holds.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "quantization_config", None):
        return None
    if (folder / "generation_config.json").is_file():
        options = options | {"generation_config": GenerationConfig.from_pretrained(str(folder))}
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = kind.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True, **options)
    model.name_or_path = config._name_or_path = str(folder)
    return model, info


def _pieces(stored: Stored, tensor: torch.Tensor) -> Iterator[tuple[Path, int, torch.Tensor]]:
    raw = tensor.view(-1).view(torch.uint8)
    for start in range(0, raw.numel(), BUFFER):
        yield stored.file, stored.begin + start, raw[start : start + BUFFER]


def _fill(descriptor: int, begin: int, piece: torch.Tensor) -> None:
    raw: Any = piece.numpy()
    view = memoryview(raw)
    while view:
        count = os.preadv(descriptor, [view], begin)
        if not count:
            raise OSError("a file of the checkpoint ends too early")
        view, begin = view[count:], begin + count


def _bytes(stored: Stored) -> int:
    count = 1
    for size in stored.shape:
        count *= size
    return count * stored.dtype.itemsize
