"""Imports of a run, without what only a compiler needs.

bitsandbytes, which PEFT imports, decorates functions with ``torch.compile``, and the decorator alone imports the whole
of torch's compiler: some 540 modules and a second of a start, for functions that a run on a GPU never calls.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


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
