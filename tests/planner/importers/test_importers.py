"""Whose file it is, whether its recipe can be planned, and that nothing in a file is dropped in silence."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetui.engine.planning import plan_for
from finetui.planner.errors import FinetuiError, RecipeError
from finetui.planner.importers import detect, import_file
from finetui.planner.recipe import Recipe


def _beside(name: str) -> ModuleType:
    """A test module of this folder, for the files that it holds."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES: dict[str, str] = {
    "axolotl": _beside("test_axolotl").QLORA,
    "llamafactory": _beside("test_llamafactory").SFT,
    "torchtune": _beside("test_torchtune").LORA,
    "trl": _beside("test_trl").SFT,
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_known_by_its_keys(kind: str, tmp_path: Path) -> None:
    assert detect(yaml.safe_load(FILES[kind]), "f") == kind
    file = tmp_path / "f.yml"
    file.write_text(FILES[kind])
    assert import_file(file).recipe == import_file(file, kind=kind).recipe


def test_keys_that_two_tools_have_tell_nothing() -> None:
    assert detect({"model_name_or_path": "m", "stage": "ppo", "max_length": 64}, "f") == "llamafactory"
    assert detect({"model_name_or_path": "m", "max_length": 64, "packing": True}, "f") == "trl"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model_name_or_path: m\nstage: sft\nuse_peft: true", "stage are of LLaMA-F.*use_peft are of TRL"),
        ("model: Qwen/Qwen3-8B\nepochs: 2", "a recipe of finetui already.*finetui plan"),
        ("compute_environment: LOCAL_MACHINE", "no tool's training file has these keys"),
        ("sequence_len: 5", "--from axolotl"),
        ("", "no keys in this file"),
        ("- a", "no mapping"),
        ("base_model: {a: b}\nsequence_len: 5", "f.yml:1: base_model: must be text"),
        ("base_model: m\nsequence_len: long", r"f.yml:2: sequence_len: must be a number \(not long\)"),
        ("base_model: m\nlora_r: 2.5\nadapter: lora\nsequence_len: 9", "f.yml:2: lora_r: must be a whole number of 1"),
        ("base_model: m\nsequence_len: 64\nlearning_rate: .nan", "f.yml:3: learning_rate: must be a finite number"),
        ("base_model: m\nsequence_len: 64\nlearning_rate: -1", "f.yml:3: learning_rate: learning_rate must be above"),
        ("base_model: m\nsequence_len: 64\nsample_packing: maybe", "f.yml:3: sample_packing: must be true or false"),
        ("base_model: m\nsequence_len: 64\ndatasets: 3", "f.yml:3: datasets: must be a list of mappings"),
        ("base_model: m\nsequence_len: 64\ndatasets: [{type: alpaca}]", r"f.yml:3: datasets\[0\].path: must be"),
        ("base_model: m\nsequence_len: 64\nlora_r: 9999\nadapter: lora", "f.yml:3: tuning.rank: 9999 is out of range"),
        ("sequence_len: 64\nsample_packing: true\nbase_model:", "base_model is missing"),
        ("base_model: m\nsequence_len: 64\nx: &x [*x]", "contains itself"),
        ("base_model: m\nbase_model: n", "set twice"),
        ("x: &x [a,a,a,a,a,a,a,a,a]\ny: &y [*x,*x,*x,*x,*x,*x,*x,*x,*x]\nz: &z [*y,*y,*y,*y,*y,*y,*y]\n"
         "w: &w [*z,*z,*z,*z,*z,*z,*z]\nv: [*w,*w,*w,*w,*w,*w,*w]", "more than 20,000 values"),
        ("model: {_component_: a.b}\ndataset: {_component_: c}\na: ${b}\nb: ${a}", "f.yml:3: a: .*stands for itself"),
        ("base_model: m\nsequence_len: 64\ndatasets: [{path: 'https://h/r.jsonl?token=abcdefghijk', type: alpaca}]",
         "f.yml:3: data.0.path holds a secret"),
    ],
)  # fmt: skip
def test_files_that_are_wrong_end_in_one_message(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "f.yml").write_text(text)
    with pytest.raises(RecipeError, match=match):
        import_file(tmp_path / "f.yml")


def test_no_file_and_no_text(tmp_path: Path) -> None:
    (tmp_path / "long.yml").write_text("base_model: " + "x" * (10 << 20))
    with pytest.raises(RecipeError, match="longer than 256 KiB, which no training config is"):
        import_file(tmp_path / "long.yml")
    (tmp_path / "latin.yml").write_bytes(b"base_model: \xe9")
    for path in (tmp_path / "none.yml", tmp_path, tmp_path / "latin.yml"):
        with pytest.raises(RecipeError):
            import_file(path)
    (tmp_path / "f.yml").write_text(FILES["axolotl"])
    with pytest.raises(RecipeError, match="no effect on a file of axolotl"):
        import_file(tmp_path / "f.yml", method="sft")


def test_a_recipe_file_that_is_of_another_tool_says_so(tmp_path: Path) -> None:
    (tmp_path / "f.yml").write_text(FILES["torchtune"])
    with pytest.raises(RecipeError, match=r"a training file of torchtune, not a recipe. .* finetui import .*f.yml"):
        Recipe.load(tmp_path / "f.yml")


def test_what_is_written_holds_what_was_lost_and_no_secret(tmp_path: Path) -> None:
    more = 'swanlab_api_key: hunter2hunter2\ncomet_mode: "a\\e[31m\\nmodel: x"\n'
    (tmp_path / "f.yml").write_text(FILES["axolotl"] + more)
    found = import_file(tmp_path / "f.yml")
    text = found.to_yaml()
    head = text[: text.index("\nmodel: ")]
    assert head.startswith("# Imported from f.yml (Axolotl). Not carried over:\n# - wandb_project: mine: would log")
    assert "hunter2" not in text + json.dumps([fate.value for fate in found.fates])
    assert "\x1b" not in text
    assert all(line.startswith("#") for line in head.splitlines())
    (tmp_path / "recipe.yaml").write_text(text)
    assert Recipe.load(tmp_path / "recipe.yaml") == found.recipe


def test_columns_are_ones_that_a_reader_knows(tmp_path: Path) -> None:
    from finetui.engine.data.files import Row
    from finetui.engine.data.formats import detect as format_of

    info = _beside("test_llamafactory").INFO
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    names = ",".join(name for name in info if name != "program")
    chat = [{"who": "asker", "text": "a", "role": "user", "content": "a"}]
    text = dict.fromkeys(["q", "c", "r", "instruction", "input", "output", "content"], "a")
    row = Row({**text, "turns": chat, "messages": chat, "good": True, "chosen": "a", "rejected": "b"}, "row")
    for method in ("sft", "dpo", "kto"):
        (tmp_path / "f.yml").write_text(f"model_name_or_path: m/n\nstage: {method}\ndataset: {names}\ndataset_dir: .\n")
        for source in import_file(tmp_path / "f.yml").recipe.data:
            takes = {"preference": "dpo", "unpaired-preference": "kto"}.get(source.format, "sft")
            if takes == method:
                assert format_of([row], source, method).format == source.format


_MORE = [
    ("axolotl", ("adapter: qlora", "adapter:"), ""),
    ("axolotl", ("load_in_4bit: true", "load_in_4bit: false"), "rl: dpo\nsample_packing_bin_size: 2\n"),
    ("axolotl", ("sample_packing: true", "rl: kto"), ""),
    ("axolotl", ("sample_packing: true", "rl: grpo"), "trl: {num_generations: 4, max_completion_length: 64}\n"),
    ("axolotl", ("type: alpaca", "type: completion"), "fp16: true\n"),
    ("llamafactory", ("quantization_bit: 4", "use_dora: true"), ""),
    ("llamafactory", ("stage: sft", "stage: dpo"), "pref_loss: simpo\n"),
    ("llamafactory", ("finetuning_type: lora", "finetuning_type: freeze"), "use_badam: false\n"),
    ("torchtune", ("lora_llama3_1_8b", "qlora_llama3_1_8b"), ""),
    ("torchtune", ("llama3_1.lora_llama3_1_8b", "phi4.lora_phi4_14b"), ""),
    ("torchtune", ("llama3_1.lora_llama3_1_8b", "qwen2_5.lora_qwen2_5_7b_base"), ""),
    ("torchtune", ("llama3_1.lora_llama3_1_8b", "gemma2.lora_gemma2_2b"), ""),
    ("trl", ("packing: true", "beta: 0.1"), ""),
    ("trl", ("packing: true", "num_generations: 8"), ""),
]


@pytest.mark.parametrize(("kind", "change", "more"), [*((kind, ("", ""), "") for kind in FILES), *_MORE])
def test_what_is_imported_can_be_planned(kind: str, change: tuple[str, str], more: str, tmp_path: Path) -> None:
    text = FILES[kind].replace(*change, 1)
    for line in ("assistant_only_loss: true\n", "packing_strategy: bfd\n") if change[1] and kind == "trl" else ():
        text = text.replace(line, "")
    (tmp_path / "f.yml").write_text(text + more)
    found = import_file(tmp_path / "f.yml")
    (tmp_path / "recipe.yaml").write_text(found.to_yaml())
    recipe = Recipe.load(tmp_path / "recipe.yaml", {"hardware.gpu": "H100", "hardware.gpus": 1})
    sources = [source.model_dump(exclude_unset=True) for source in recipe.data if not source.path.startswith("/")]
    plan = plan_for(recipe.with_overrides({"data": sources}))  # files of the examples are not here
    assert plan.resolved.method == found.recipe.method
    assert plan.resolved.tuning == found.recipe.tuning.type
    if found.recipe.batch_size != "auto":
        assert plan.resolved.batch_size == found.recipe.batch_size


def _leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{path}[{index}]")
    else:
        yield path


_HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 3.7, 1e400, float("nan"), 2**70, "", "auto", "x" * 300, "~nobody/x", "${a.b}", "1e-5",
    "train[:5]", "\x1b[31m", [], {}, [None], ["a", 1], [[]], {"a": None}, [{"path": "a/b"}], {"path": 1}, "🦎", "../..",
    "[a-z]", {"_component_": "a.b"}, [{"_component_": "x"}], "json", ["json"], "a,b", {"min_lr": "x"}, 0.5,
]  # fmt: skip


_KEYS = ["rl", "stage", "adapter", "trl", "loss", "datasets", "dataset", "special_tokens", "peft", "é", "1"]


@st.composite
def _mangled(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A file with some of its values, at any depth, replaced, removed or put under another key."""
    kind = draw(st.sampled_from(sorted(FILES)))
    tree: dict[str, Any] = yaml.safe_load(FILES[kind])
    for _ in range(draw(st.integers(1, 4))):
        target: Any = tree
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(target[key], dict | list) and draw(st.booleans()):
                target = target[key]
                continue
            what = draw(st.integers(0, 3))
            if what == 0:
                del target[key]
            elif what == 1 and isinstance(target, dict):
                target[draw(st.sampled_from(_KEYS))] = copy.deepcopy(target[key])
            else:
                target[key] = copy.deepcopy(draw(st.sampled_from(_HOSTILE)))
            break
    return kind, tree


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(_mangled())
def test_any_file_ends_in_a_recipe_or_in_a_message(tmp_path: Path, case: tuple[str, dict[str, Any]]) -> None:
    kind, tree = case
    file = tmp_path / "f.yml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    try:
        found = import_file(file, kind=kind)
    except FinetuiError as error:
        named = str(file) in error.where
        assert named
        return
    told = [fate.key for fate in found.fates if fate.key]
    assert len(told) == len(set(told))
    for leaf in _leaves(yaml.safe_load(file.read_text(encoding="utf-8"))):
        assert any(leaf == key or leaf.startswith((f"{key}.", f"{key}[")) for key in told), leaf
    (tmp_path / "recipe.yaml").write_text(found.to_yaml(), encoding="utf-8")
    assert Recipe.parse((tmp_path / "recipe.yaml").read_text(encoding="utf-8")) == found.recipe


def test_importing_needs_nothing_heavy() -> None:
    code = (
        "import sys, finetui.planner.importers as i; [i.detect({'base_model': 'm', 'sequence_len': 1}, 'f')]\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'textual', 'rich', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
