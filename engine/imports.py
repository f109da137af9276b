"""Imports of a run, without what it never uses.

transformers, PEFT and TRL import more than a run asks of them, and a start waits for all of it:

- optional packages that happen to be installed, for features that no run has (:data:`UNUSED`);
- torch's compiler, some 540 modules: bitsandbytes decorates functions with ``torch.compile``, and the decorator alone
  imports it, for functions that a run on a GPU never calls;
- which distribution each package belongs to: they have ``importlib.metadata`` read the list of every file of everything
  that is installed, to learn the versions of a few packages that are named as they are imported;
- which of transformers' files offers what (:mod:`.known_models`).

All of it is undone afterwards: what a user's own code imports during the run, it gets.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import known_models

#: Packages that the libraries import where they are installed: for other quantisations, for images and sound, for
#: assisted generation, for object detection, and for the name of an error of a web client that nobody has used yet.
UNUSED = ("torchao", "sklearn", "scipy", "torchvision", "torchaudio", "aiohttp")

#: The libraries that look for them, once, and remember what they found.
_LIBRARIES = ("transformers", "peft", "trl")

#: Seconds after which a thread that imports lets others have the interpreter: reading and sending weights, they need it
#: often and for moments, and wait this long each time (Python's own 5 ms are for threads that compute side by side).
_SWITCH_S = 0.0005


@contextlib.contextmanager
def of_a_run(*, hide: bool = True) -> Iterator[None]:
    """Within, what a run needs is imported in the least time.

    Args:
        hide: leave out :data:`UNUSED`. Not where a model may use them: one that brings its own code, or that is stored
            in a quantised format. A library that is there already has looked for some, so they stay then too.
    """
    switch_s = sys.getswitchinterval()
    hide = hide and not any(library in sys.modules for library in _LIBRARIES)
    with contextlib.ExitStack() as ways:
        ways.enter_context(compiling_later())
        ways.enter_context(distributions_by_name())
        ways.enter_context(known_models.remembered())
        ways.enter_context(hidden(UNUSED if hide else ()))
        ways.callback(sys.setswitchinterval, switch_s)
        sys.setswitchinterval(min(switch_s, _SWITCH_S))
        ways.callback(gc.enable)
        gc.disable()
        yield
        if hide and (peft := sys.modules.get("peft.import_utils")) is not None:
            peft.is_torchao_available()  # or PEFT looks for it when it makes the first adapter; it keeps the answer
        gc.freeze()  # modules are there for good: the collector finds nothing to free in them, now or later


@contextlib.contextmanager
def hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Within, packages that were not imported before are not installed, for whoever looks or imports."""
    absent = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None is how the import system says no
    try:
        yield
    finally:
        for package in absent:
            if sys.modules.get(package, ...) is None:
                del sys.modules[package]


@contextlib.contextmanager
def distributions_by_name() -> Iterator[None]:
    """Within, ``importlib.metadata.packages_distributions`` answers for one package at a time."""
    stock = importlib.metadata.packages_distributions
    answer = _Distributions(functools.cache(stock))
    importlib.metadata.packages_distributions = lambda: answer
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = stock


class _Distributions(Mapping[str, list[str]]):
    """From packages to the distributions that they come with; all are looked at only where the names differ."""

    def __init__(self, everything: Callable[[], Mapping[str, list[str]]]) -> None:
        self._everything = everything

    def __getitem__(self, package: str) -> list[str]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            found = importlib.metadata.distribution(package)
            if any(Path(str(found.locate_file(package + end))).exists() for end in ("/__init__.py", ".py")):
                return [found.name]
        return self._everything()[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._everything())

    def __len__(self) -> int:
        return len(self._everything())


@contextlib.contextmanager
def compiling_later() -> Iterator[None]:
    """Within, ``torch.compile`` hands out functions that are compiled when they are called, if ever."""
    import torch

    stock = torch.compile

    def compile_later(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_later, **options)
        made: list[Callable[..., Any]] = []

        @functools.wraps(model)
        def later(*args: Any, **kwargs: Any) -> Any:
            if not made:
                made.append(stock(model, **options))
            return made[0](*args, **kwargs)

        return later

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = stock
