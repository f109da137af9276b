"""A tree of tensors and plain values as one safetensors file: what a checkpoint keeps of optimisers and random numbers.

Nothing that can run is written or read, as a pickle could. Tensors lie in the file under numbers; the tree itself is
JSON in the file's metadata, in which ``{"$tensor": "7"}`` stands for one of them. The file is written here and not by
the safetensors library, whose writer holds the interpreter lock from beginning to end: training would stand still
while a thread writes. Format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: The format's names of dtypes.
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
#: Under this key a file that begins a tree tells the names of those beside it that have the rest of its tensors.
FURTHER = "further"
#: Bytes that are hashed and written at a time: many, since at the end of each the interpreter lock is asked for.
_PIECE = 64 * 2**20

Tree = Any
"""Dictionaries, lists and tuples of tensors, numbers, strings, booleans and None, nested as they like."""


def taken_apart(tree: Tree) -> tuple[Tree, dict[str, torch.Tensor]]:
    """A tree as what JSON can say, and its tensors by number.

    Raises:
        TypeError: something in it is neither a tensor nor a plain value.
    """
    tensors: dict[str, torch.Tensor] = {}

    def told(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach()
            return {"$tensor": name}
        if isinstance(value, Mapping):
            return {"$map": [[told(key), told(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"$tuple": [told(item) for item in value]}
        if isinstance(value, list):
            return [told(item) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a checkpoint has no room for a {type(value).__name__}")

    return told(tree), tensors


def put_together(told: Tree, tensors: Mapping[str, torch.Tensor]) -> Tree:
    """The tree again."""
    if isinstance(told, list):
        return [put_together(item, tensors) for item in told]
    if not isinstance(told, dict):
        return told
    if "$tensor" in told:
        return tensors[told["$tensor"]]
    if "$tuple" in told:
        return tuple(put_together(item, tensors) for item in told["$tuple"])
    return {put_together(key, tensors): put_together(item, tensors) for key, item in told["$map"]}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file; returns the SHA-256 of what was meant to be in it, taken from memory.

    Args:
        tensors: on any device; one that is not on the CPU is copied there by itself.

    Raises:
        OSError: the disk is full.
        ValueError: the format has no name for a dtype.
    """
    # The widest elements first, then by name, so that each begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"safetensors has no name for {tensor.dtype}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    # Both let go of the interpreter lock, and a disk is about as fast as a hash.
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as beside:
        for piece in _pieces(head, (tensors[name] for name in names)):
            hashed = beside.submit(digest.update, piece)
            rest = piece
            while rest:
                rest = rest[file.write(rest) :]
            hashed.result()
    return digest.hexdigest()


def _pieces(head: bytes, tensors: Iterator[torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(len(head).to_bytes(8, "little") + head)
    for tensor in tensors:
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            whole = flat.numpy().data.cast("B")
            for begin in range(0, len(whole), _PIECE):
                yield whole[begin : begin + _PIECE]


def write_tree(path: Path, tree: Tree) -> str:
    """Write a tree as one file; returns its SHA-256."""
    told, tensors = taken_apart(tree)
    return write_tensors(path, tensors, {"tree": json.dumps(told)})


def read_tree(path: Path) -> Tree:
    """Read back what :func:`write_tree` wrote; tensors are on the CPU.

    Raises:
        OSError: the file can't be read.
        ValueError: it is another file.
    """
    with opened_tree(path) as tree:
        return loaded(tree)


def loaded(tree: Tree) -> Tree:
    """A tree of :func:`opened_tree` with its tensors, on the CPU."""
    if isinstance(tree, Stored):
        return tree.whole()
    if isinstance(tree, dict):
        return {key: loaded(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(loaded(item) for item in tree)
    return tree


@dataclass(frozen=True)
class Stored:
    """A tensor of a tree that is still in its file."""

    file: Any
    name: str

    def whole(self) -> torch.Tensor:
        """All of it."""
        tensor: torch.Tensor = self.file.get_tensor(self.name)
        return tensor

    def rows(self, which: slice) -> torch.Tensor:
        """Some of its rows, the others of which are not read; a scalar has none and is read whole."""
        found = self.file.get_slice(self.name)
        tensor: torch.Tensor = found[which] if found.get_shape() else self.whole()
        return tensor


@contextlib.contextmanager
def opened_tree(path: Path) -> Iterator[Tree]:
    """In the block, what :func:`write_tree` wrote with a :class:`Stored` in the place of each tensor.

    Raises:
        OSError: the file can't be read.
        ValueError: it is another file.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as opened:
        file = opened.enter_context(safe_open(path, "pt"))
        about = file.metadata() or {}
        if "tree" not in about:
            raise ValueError(f"{path} holds no tree")
        beside = [path.with_name(name) for name in json.loads(about.get(FURTHER, "[]"))]
        files = [file, *(opened.enter_context(safe_open(each, "pt")) for each in beside)]
        places: Any = {name: Stored(each, name) for each in files for name in each.keys()}  # noqa: SIM118
        yield put_together(json.loads(about["tree"]), places)
