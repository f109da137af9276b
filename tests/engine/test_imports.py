"""What is decorated while a run imports is compiled when it is called, and only then."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch")
import torch

from finetui.engine.imports import compiling_later


def test_functions_are_compiled_at_their_first_call(monkeypatch):
    compiled = []

    def stock(model, **options):
        compiled.append((model.__name__, options))
        return lambda *args: model(*args) + 1

    monkeypatch.setattr(torch, "compile", stock)
    with compiling_later():

        @torch.compile
        def plain(x):
            return x

        @torch.compile(dynamic=True)
        def told(x):
            return 2 * x

        class Kind:
            @torch.compile
            def method(self, x):
                return 3 * x

    assert torch.compile is stock
    assert compiled == []
    assert [plain(1), plain(1), told(1), Kind().method(1)] == [2, 2, 3, 4]
    assert compiled == [("plain", {}), ("told", {"dynamic": True}), ("method", {})]


def test_the_compiler_of_torch_is_not_imported():
    pytest.importorskip("bitsandbytes")
    script = (
        "import sys\nfrom finetui.engine.imports import compiling_later\n"
        "with compiling_later():\n    import bitsandbytes\n"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.split()[-1] == "False"
