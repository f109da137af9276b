"""A result that was damaged after it was made is refused by name by every verb that uses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from finetui.engine.chat import load_tuned, result_folder  # noqa: E402
from finetui.engine.evaluation.subjects import subjects  # noqa: E402
from finetui.engine.export import export_run  # noqa: E402
from finetui.engine.merge.sources import find  # noqa: E402
from finetui.engine.run import Run  # noqa: E402
from finetui.planner.errors import ModelError  # noqa: E402

MakeRun = Callable[..., Run]
USES: dict[str, Callable[[Run, Path], object]] = {
    "chat": lambda run, out: load_tuned(run),
    "eval": lambda run, out: subjects([str(run.path)], [], "cpu"),
    "merge": lambda run, out: find(str(run.path)),
    "export --to adapter": lambda run, out: export_run(run, "adapter", out),
    "export --to merged": lambda run, out: export_run(run, "merged", out),
    "export --to gguf": lambda run, out: export_run(run, "gguf", out),
}


@pytest.mark.parametrize("use", USES)
def test_an_adapter_that_was_cut(make_run: MakeRun, tmp_path: Path, use: str) -> None:
    if use.endswith("gguf"):
        pytest.importorskip("gguf")
    run = make_run()
    run.output_path.mkdir()
    for name in ("tokenizer_config.json", "adapter_config.json"):
        (run.output_path / name).write_text("{}")
    weights = run.output_path / "adapter_model.safetensors"
    save_file({"a": torch.ones(8)}, weights)
    assert result_folder(run) == run.output_path
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="this file can't be read") as caught:
        USES[use](run, tmp_path / "out")
    assert caught.value.where == str(weights)
    assert not (tmp_path / "out").exists()
