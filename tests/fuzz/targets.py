"""What finetui reads from elsewhere, each with inputs near valid ones.

A target takes one input and a folder of its own. It may raise :class:`FinetuiError`, and nothing else.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from finetui.engine.checkpoints import store
from finetui.engine.events import EventLog, EventReader, LogLine, parse_line
from finetui.engine.run import Run, list_runs
from finetui.planner import calibration
from finetui.planner.architecture import Architecture
from finetui.planner.errors import FinetuiError
from finetui.planner.hardware import PRESETS
from finetui.planner.plan import Plan
from finetui.planner.recipe import Recipe, apply_overrides
from finetui.planner.weights import stored_weights

from .inputs import HOSTILE, garbled, mutated, values


@dataclass(frozen=True)
class Target:
    """One reader; ``examples`` is how many inputs it gets in CI."""

    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any, Path], None]
    examples: int = 150


def _text(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8")


# --- recipes

_RECIPES = [path.read_bytes() for path in sorted(PRESETS.glob("*.yaml"))]
_RECIPE_TREES: list[Any] = [
    {
        "model": "org/m", "method": "sft", "tuning": {"type": "qlora", "rank": 8, "targets": ["q_proj"]}, "epochs": 1,
        "data": [{"path": "./a.jsonl", "format": "auto", "columns": {"prompt": "q"}, "limit": 3}], "max_steps": 3,
        "optimizer": {"name": "auto", "learning_rate": 2e-4}, "hardware": {"gpus": [0, 1], "gpu": "H100-80GB"},
        "limits": {"hours": 1}, "evaluation": {"holdout": 0.1}, "checkpoint": {"every": 5, "keep": 2},
    },
    {
        "model": "org/m", "method": "grpo", "data": "a.jsonl", "rollout": {"num_generations": 4},
        "rewards": ["numeric", {"function": "regex", "pattern": "a+"}, {"function": "./r.py:score", "weight": 2}],
    },
    {
        "model": "org/m", "data": "a.jsonl",
        "stages": [{"method": "sft"}, {"method": "dpo", "data": "b.jsonl", "tuning": {"start_from": "previous"}},
                   {"do": "merge"}, {"do": "export", "to": "adapter", "path": "out"}],
    },
]  # fmt: skip


def _recipe(raw: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(raw)
    recipe = Recipe.load(folder / "recipe.yaml")
    recipe.save(folder / "again.yaml")
    assert Recipe.load(folder / "again.yaml") == recipe or b"nan" in raw.lower()


def _override(items: list[str], folder: Path) -> None:
    Recipe.build(apply_overrides({"model": "m", "data": [{"path": "a.jsonl"}]}, items))


_KEYS = ("tuning.rank", "tuning", "data.0.path", "data.1", "data", "epochs", "rewards.0", "stages.0.method", "model.a")
_settings = st.lists(
    st.builds(
        "{}={}".format, st.sampled_from(_KEYS) | st.text(max_size=8), st.sampled_from(HOSTILE) | st.text(max_size=8)
    ),
    max_size=3,
)

# --- models

_CONFIGS = [
    json.loads((PRESETS / "models" / name / "config.json").read_text(encoding="utf-8"))
    for name in ("Qwen--Qwen3-8B", "Qwen--Qwen3-30B-A3B", "EleutherAI--pythia-1.4b", "CohereLabs--c4ai-command-r-v01")
]


def _config(tree: Any, folder: Path) -> None:
    if isinstance(tree, dict):
        arch = Architecture.from_config(tree)
        assert arch.parameters > 0
        arch.lora_parameters(8, "all-linear")


def _config_file(raw: bytes, folder: Path) -> None:
    from finetui.engine.planning import plan_for

    (folder / "config.json").write_bytes(raw)
    plan_for(Recipe.build({"model": str(folder), "hardware": {"gpu": "RTX-4090"}})).to_json()


_HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def _safetensors(tree: Any) -> bytes:
    header = _text(tree)
    return struct.pack("<Q", len(header)) + header + bytes(32)


def _header(raw: bytes, folder: Path) -> None:
    from finetui.engine.models.weights import stored_tensors

    (folder / "model.safetensors").write_bytes(raw)
    with contextlib.suppress(FinetuiError):
        stored_weights(str(folder))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # as whoever reads ahead takes them
        stored_tensors(folder)


def _index(tree: Any, folder: Path) -> None:
    from finetui.engine.models.load import locate

    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(_safetensors(_HEADER))
    (folder / "model.safetensors.index.json").write_bytes(_text(tree))
    locate(str(folder))


class _Tokenizer:
    """As much of a tokenizer as rendering needs."""

    special_tokens_map: dict[str, str] = {"bos_token": "<s>", "eos_token": "</s>"}  # noqa: RUF012

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def get_chat_template(self, tools: Any = None) -> str:
        return self.chat_template


_TEMPLATES = [
    b"{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    b"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    b"{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n * 3 + 1 %}"
    b"{{ m.content ~ ns.n }}{% endfor %}{{ raise_exception('no') if messages|length > 5 }}{{ tools | tojson }}",
    b"{% macro f(x, n) %}{{ x }}{% if n %}{{ f(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ f('a', 9) }}"
    b"{% for i in range(30) %}{% for j in range(30) %}{{ (i * j) ** 2 }}{% endfor %}{% endfor %}",
]


def _template(raw: bytes, folder: Path) -> None:
    from finetui.engine.data.examples import Message
    from finetui.engine.data.template import render

    turns = [Message("user", "a"), Message("assistant", "b")]
    render(_Tokenizer(raw.decode("utf-8", errors="replace")), turns, "row")


# --- data

_ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}], "tools": [{"type": "function"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["q", "a"]]},
    {"question": "a", "answer": "b", "context": "c"},
    {"prompt": "a", "completion": "b"},
    {"text": "a"},
    {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
    {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
     "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
]  # fmt: skip
_METHODS = ("sft", "pretrain", "dpo", "kto", "grpo", "reward")


def _read_data(path: Path, method: str) -> None:
    from finetui.engine.data.preview import read_through, survey

    more = {"rewards": ["numeric"]} if method == "grpo" else {}
    recipe = Recipe.build({"model": "m", "method": method, "data": [{"path": str(path), "on_bad_row": "skip"}], **more})
    survey(recipe)
    read_through(recipe)


def _row(case: tuple[list[Any], str], folder: Path) -> None:
    rows, method = case
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _read_data(folder / "rows.jsonl", method)


_TEXTS = {
    "jsonl": b"".join(_text(row) + b"\n" for row in _ROWS[4:5] * 4),
    "json": _text(_ROWS[2:3] * 3),
    "csv": b'prompt,completion\na,"b\nc"\nd,e\n"f,""g""",h\n',
    "tsv": b"instruction\toutput\na\tb\nc\td\n",
    "txt": b"one\n\ntwo\nthree\n",
}


def _file(case: tuple[str, bytes, bool], folder: Path) -> None:
    suffix, raw, packed = case
    path = folder / f"rows.{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(raw, 1, mtime=0)[: -3 if len(raw) % 2 else None] if packed else raw)
    _read_data(path, "pretrain" if suffix == "txt" else "sft")


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), raw)
    return raw.getvalue()


def _columns(raw: bytes, folder: Path) -> None:
    (folder / "rows.parquet").write_bytes(raw)
    _read_data(folder / "rows.parquet", "sft")


# --- runs

_EVENTS = [
    {"seq": 1, "time": 1.0, "type": "state", "state": "running", "cause": None, "attempt": 1},
    {"seq": 2, "time": 2.0, "type": "step", "step": 1, "epoch": 0.1, "loss": "nan", "learning_rate": 1e-4,
     "grad_norm": 1.0, "tokens": 10, "tokens_per_s": 5.0, "step_s": 2.0, "steps": 10},
    {"seq": 3, "time": 3.0, "type": "gpu", "index": 0, "name": "H100", "memory_used_gib": 1.0, "throttle": []},
    {"seq": 4, "time": 4.0, "type": "metrics", "step": 1, "values": {"reward": 1.0}},
    {"seq": 5, "time": 5.0, "type": "sample", "step": 1, "prompt": "a", "answer": "b"},
    {"seq": 6, "time": 6.0, "type": "checkpoint", "step": 1, "path": "checkpoints/x", "bytes": 1, "seconds": 0.1},
    {"seq": 7, "time": 7.0, "type": "warning", "what": "w"},
    {"seq": 8, "time": 8.0, "type": "memory", "rank": 0, "allocated_gib": 1.0, "reserved_gib": 1.0, "peak_gib": 1.0},
    {"seq": 9, "time": 9.0, "type": "host", "cpu_percent": 1.0, "memory_used_gib": 1.0, "disk_free_gib": 1.0},
    {"seq": 10, "time": 10.0, "type": "phase", "phase": "loading", "done": 1, "total": 2},
    {"seq": 11, "time": 11.0, "type": "eval", "step": 1, "loss": 1.0},
]  # fmt: skip


def _events(raw: bytes, folder: Path) -> None:
    from finetui.tui.history import History
    from finetui.tui.watch import lines_of

    path = folder / "events.jsonl"
    path.write_bytes(raw)
    read = EventReader(path).read()
    list(lines_of(read, History()))
    with EventLog(path) as log:
        written = log.append(LogLine(0, "after"))
    whole = path.read_bytes()
    assert whole.endswith(b"\n")
    last = parse_line(whole.splitlines()[-1])
    assert last is not None
    assert last.seq == written.seq


_PLAN: dict[str, Any] = {}


def _plan_tree() -> dict[str, Any]:
    from finetui.engine.planning import plan_for

    if not _PLAN:
        tiny = Recipe.load(PRESETS / "quickstart.yaml", ["hardware.gpu=RTX-4090"])
        _PLAN.update(json.loads(plan_for(tiny).to_json()))
    return _PLAN


_STATUS = {"state": "running", "pid": 1, "pid_started": 1.0, "host": "h", "created": 1.0, "started": 2.0, "attempt": 1}
_MANIFEST = {"step": 3, "written": 1.0, "facts": {"tokens": 1}, "files": {"a": {"bytes": 1, "sha256": "0" * 64}}}


def _run(case: tuple[str, Any], folder: Path) -> None:
    name, tree = case
    run = folder / "r"
    step = run / "checkpoints" / "step-000003"
    step.mkdir(parents=True, exist_ok=True)
    (step / "a").write_bytes(b"x")
    files = {"run.json": _STATUS, "plan.json": _plan_tree(), "checkpoints/step-000003/manifest.json": _MANIFEST}
    for file, sound in {**files, name: tree}.items():
        (run / file).write_bytes(_text(sound))
    for look in (lambda: Run(run).status, lambda: Run(run).plan, lambda: Run.open(run), lambda: list_runs(folder)):
        with contextlib.suppress(FinetuiError):
            look()
    store.find(run / "checkpoints")
    store.latest(run / "checkpoints")


def _history(raw: bytes, folder: Path) -> None:
    kept = folder / "calibration"
    with contextlib.suppress(FileExistsError):
        kept.mkdir()
    plan = Plan.from_dict(_plan_tree())
    finished = calibration.compare(plan, allocated_gib=None, tokens_per_s=plan.speed.tokens_per_s, run="r")
    calibration.record(finished, kept)
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:2000] + raw + b"\n")
    calibration.correction(calibration.history(kept), calibration.history(kept)[0].kind)


def targets() -> list[Target]:
    """All of them."""
    rows = st.tuples(st.lists(mutated(_ROWS), min_size=1, max_size=3), st.sampled_from(_METHODS))
    files = st.sampled_from(sorted(_TEXTS)).flatmap(
        lambda suffix: st.tuples(st.just(suffix), garbled([_TEXTS[suffix]]), st.sampled_from((False, False, True)))
    )
    parts = st.one_of(
        st.tuples(st.just("run.json"), mutated([_STATUS])),
        st.tuples(st.just("plan.json"), mutated([_plan_tree()])),
        st.tuples(st.just("checkpoints/step-000003/manifest.json"), mutated([_MANIFEST])),
    )
    events = st.lists(mutated(_EVENTS), max_size=6).map(lambda trees: b"".join(_text(tree) + b"\n" for tree in trees))
    return [
        Target("recipe-text", garbled(_RECIPES), _recipe),
        Target("recipe-tree", mutated(_RECIPE_TREES).map(_text), _recipe, 150),
        Target("override", _settings, _override, 300),
        Target("config", mutated(_CONFIGS), _config, 400),
        Target("config-file", mutated(_CONFIGS).map(_text) | garbled([_text(c) for c in _CONFIGS]), _config_file, 80),
        Target("safetensors-header", mutated([_HEADER]).map(_safetensors) | garbled([_safetensors(_HEADER)]), _header),
        Target("model-index", mutated([{"metadata": {}, "weight_map": {"a.weight": "model-1.safetensors"}}]), _index),
        Target("chat-template", garbled(_TEMPLATES), _template, 40),
        Target("row", rows, _row, 200),
        Target("data-file", files, _file, 120),
        Target("parquet", garbled([_parquet()]), _columns, 60),
        Target("events", events | events.flatmap(lambda raw: garbled([raw])), _events, 250),
        Target("run-directory", parts, _run, 150),
        Target("calibration", garbled([_text({"a": 1})]) | values.map(_text), _history, 60),
    ]
