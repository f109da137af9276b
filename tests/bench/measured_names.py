"""Models and GPUs as tables of measured runs spell them."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from finetui.planner.architecture import Architecture
from finetui.planner.errors import UserError
from finetui.planner.hardware import Gpu, find_gpu
from finetui.planner.hub import find_config, known_models

from .measured_words import Refused

CONFIGS = Path(__file__).parent / "data" / "configs"
SHAPES = Path(__file__).parent / "data" / "shapes.json"
#: Ends of a name that say how a model was tuned or stored, not how it is built.
_VARIANTS = re.compile(
    r"[-_.](instruct|chat|it|mt|deduped|full|lora|qlora|pt|base|hf|dpo|sft|awq|gptq(-\w+)?|int[48]|4bit|8bit|bnb|nf4|"
    r"unsloth|fp8|bf16|"
    r"text)$"
)
#: Other spellings. Those of the second part were tuned from a model of the same shape.
_ALIASES = {
    "llama-3-8b": "meta-llama-3-8b", "llama-3-70b": "meta-llama-3-70b", "llama3-8b": "meta-llama-3-8b",
    "llama3-70b": "meta-llama-3-70b", "meta-llama-3.1-8b": "llama-3.1-8b", "meta-llama-3.1-70b": "llama-3.1-70b",
    "meta-llama-3.1-405b": "llama-3.1-405b", "tiny-llama": "tinyllama-1.1b-chat-v1.0",
    "tinyllama": "tinyllama-1.1b-chat-v1.0", "tinyllama-1.1b": "tinyllama-1.1b-chat-v1.0",
    "mistral-7b": "mistral-7b-v0.1", "mixtral-8x7b": "mixtral-8x7b-v0.1", "mixtral-8x22b": "mixtral-8x22b-v0.1",
    "mistral-7b-v0.2": "mistral-7b-v0.3", "codellama-7b": "llama-2-7b", "codellama-13b": "llama-2-13b",
    "vicuna-7b": "llama-2-7b", "vicuna-13b": "llama-2-13b", "llama-7b": "llama-2-7b", "llama-13b": "llama-2-13b",
    "gpt2": "gpt2", "gpt2-small": "gpt2", "phi-3-mini": "phi-3-mini-4k-instruct", "phi-3": "phi-3-mini-4k-instruct",
    "gemma-2-2b": "gemma-2-2b", "gemma-3-1b": "gemma-3-1b-pt", "gemma-3-4b": "gemma-3-4b-pt",
    "gemma-3-12b": "gemma-3-12b-pt", "gemma-3-27b": "gemma-3-27b-pt", "llama-3.3-70b": "llama-3.3-70b-instruct",
    "magistral-small-2506": "mistral-small-24b-base-2501", "plano-orchestrator-4b": "qwen3-4b",
    "mistral-small-24b": "mistral-small-24b-base-2501", "zephyr-7b-beta": "mistral-7b-v0.1",
    "gpt-j": "gpt-j-6b", "smollm3": "smollm3-3b", "starcoder-15b": "starcoder", "command-r": "c4ai-command-r-v01",
    "mistral-large": "mistral-large-instruct-2407", "gpt-oss": "gpt-oss-20b", "gpt-neox": "gpt-neox-20b",
    "santacoder": "gpt_bigcode-santacoder", "devstral-small": "mistral-small-24b-base-2501",
    "olmo-2-1b": "olmo-2-0425-1b", "olmo-2-7b": "olmo-2-1124-7b", "olmo-2-13b": "olmo-2-1124-13b",
    "orpheus-3b": "llama-3.2-3b", "internlm2.5-7b": "internlm2-7b", "internlm2.5-20b": "internlm2-20b",
    "llama-3.2-11b-vision": "llama-3.1-8b", "llama-3.2-90b-vision": "llama-3.1-70b", "llava-1.5-7b": "llama-2-7b",
    "llava-1.5-13b": "llama-2-13b", "llama-4-scout": "llama-4-scout-17b-16e",
}  # fmt: skip


#: Models tuned from others of the same shape, whose name they hold.
_TUNED = (
    (r"^(?:qwen2\.5|qwen2)-(?:coder-|math-)?(\d[\d.]*b)$", r"qwen2.5-\1"),
    (r"^qwq-32b.*$", "qwen2.5-32b"),
    (r"^qwen2(?:\.5)?-(?:vl|audio|omni)-(\d[\d.]*b)$", r"qwen2.5-\1"),
    (r"^qwen3-vl-(\d[\d.]*b)$", r"qwen3-\1"),
    (r"^(?:devstral|magistral|mistral)-small.*$", "mistral-small-24b-base-2501"),
    (r"^.*llama-3\.[13].*-70b.*$", "llama-3.1-70b"),
    (r"^granite-3\.\d-([28])b.*$", r"granite-3.3-\1b-base"),
    (r"^stablelm-2-1\.6b$", "stablelm-2-1-6b"),
    (r"^zephyr-7b.*$", "mistral-7b-v0.1"),
    (r"^deepseek-r1-distill-qwen-(14|32)b$", r"qwen2.5-\1b"),
    (r"^deepseek-r1-distill-llama-70b$", "llama-3.1-70b"),
    (r"^(?:huggy)?llama-?(?:1-)?(?:30|33)b$", "llama-30b"),
    (r"^llama-1-(\d+b)$", r"llama-\1"),
    (r"^codellama-(34|70)b.*$", r"codellama-\1b-hf"),
    (r"^codellama-(7|13)b.*$", r"llama-2-\1b"),
    (r"^(?:vicuna|guanaco|alpaca|wizardlm|wizardmath|orca-2|openllama|open_llama)[-_](7|13)b.*$", r"llama-2-\1b"),
    (r"^.*mistral-7b.*$", "mistral-7b-v0.1"),
    (r"^mistral-nemo.*$", "mistral-nemo-base-2407"),
    (r"^phi-3\.5-mini.*$", "phi-3-mini-4k-instruct"),
    (r"^phi-3-(mini|medium).*$", r"phi-3-\1-4k-instruct"),
    (r"^gemma-1\.1-(\d+b)$", r"gemma-\1"),
    (r"^smollm-(\d.*)$", r"smollm2-\1"),
    (r"^olmo-?3-7b.*$", "olmo-3-7b"),
    (r"^internvl3[_.]5-8b.*$", "internvl3_5-8b"),
    (r"^qwen3-(\d[\d.]*b)(?:-base|-thinking.*|-\d{4})?$", r"qwen3-\1"),
    (r"^qwen3-(?:coder-)?30b-a3b.*$", "qwen3-30b-a3b"),
)


def architecture_of(model: str, configs: Path | None) -> Architecture:
    """The shapes of a model, from the folders given or from what is shipped.

    Raises:
        Refused: nothing here knows it, or its config.json can't be read.
    """
    wanted = _spellings(model)
    for folder in filter(None, (configs, CONFIGS)):
        path = next((found for name in wanted if (found := _folder(folder).get(name))), None)
        if path:
            return _read(path, model)
    more = _more()
    found = next((more[name] for name in wanted if name in more), None)
    if found:
        return Architecture.from_config(*found)
    shipped = _shipped()
    known = next((shipped[name] for name in wanted if name in shipped), None)
    if known:
        return Architecture.from_config(find_config(known)[1], known)
    raise Refused(f"no shapes for {model}: give its config.json with --configs")


def _spellings(model: str) -> list[str]:
    """Full name, last part, and that without what says how it was tuned or stored; in lower case, the plainest last."""
    full = re.sub(r"\s+", "-", re.sub(r"\s*\(.*?\)", "", model).strip().lower())
    names = [full, full.rsplit("/", 1)[-1]]
    plain = names[-1].replace("_", "-")
    for old, new in ((r"^(llama|qwen|gemma|phi|mistral|falcon|mpt|pythia)(\d)", r"\1-\2"), (r"^qwen-(\d)", r"qwen\1")):
        plain = re.sub(old, new, plain)
    names.append(re.sub(r"-(instruct|chat)(?=-v\d|-\d{4}$)", "", plain))
    while (shorter := _VARIANTS.sub("", names[-1])) != names[-1]:
        names.append(shorter)
    same = [re.sub(pattern, known, names[-1]) for pattern, known in _TUNED if re.fullmatch(pattern, names[-1])]
    return list(dict.fromkeys(spelling for name in names + same for spelling in (name, _ALIASES.get(name, name))))


@cache
def _folder(configs: Path) -> dict[str, Path]:
    """Every config.json of a folder by its model's full name, its last part, and that without its variant."""
    names: dict[str, Path] = {}
    for path in sorted(configs.glob("*/config.json")):
        full = path.parent.name.replace("--", "/").lower()
        for name in reversed(_spellings(full)):
            names.setdefault(name, path)
        names[full] = path
    return names


@cache
def _more() -> dict[str, tuple[dict[str, Any], str]]:
    """Shapes of further models by the same names."""
    shapes = json.loads(SHAPES.read_text(encoding="utf-8"))
    return {spelling: (config, name) for name, config in shapes.items() for spelling in reversed(_spellings(name))}


@cache
def _shipped() -> dict[str, str]:
    """The models of the presets by the same names."""
    names: dict[str, str] = {}
    for name, _ in known_models().values():
        for spelling in _spellings(name):
            names.setdefault(spelling, name)
    return {**names, **{name.lower(): name for name, _ in known_models().values()}}


@cache
def _read(path: Path, model: str) -> Architecture:
    try:
        return Architecture.from_config(json.loads(path.read_text(encoding="utf-8")), model)
    except UserError as error:
        raise Refused(f"{model}: {error.what}") from None


def gpu_of(name: str) -> Gpu | None:
    """A GPU of the catalog, or None where the words name none, or one that is not there."""
    plain = re.sub(r"^\s*\d+\s*[x×*]\s*", "", name.strip())
    plain = re.sub(r"\s*(\(.*|\+.*|@.*|,.*|\d+\s*W\b.*)", "", plain).strip()
    plain = re.sub(r"^(colab|kaggle|aws|gcp|azure|lambda|runpod|quadro)[\s-]+", "", plain, flags=re.IGNORECASE)
    bare = re.sub(r"[- ]\d+\s*(GB|GiB|G)\b", "", plain, flags=re.IGNORECASE).strip(" -")
    memory = memory_of(name)
    sized = f"{bare}-{memory:.0f}GB" if memory else bare
    pcie = re.sub(r"[- ]?pcie", "", sized, flags=re.IGNORECASE) + "-PCIe" if "pcie" in name.lower() else sized
    short = re.sub(r"[- ](sxm\d?|hbm\d?e?)", "", sized, flags=re.IGNORECASE)
    ordered = (pcie, sized, short, plain, bare) if memory else (plain, pcie, bare, short)
    for candidate in dict.fromkeys(ordered):
        try:
            return find_gpu(candidate)
        except UserError:
            continue
    return None


def memory_of(name: str) -> float:
    """GB that the words give a GPU; 0 where they give none."""
    found = re.search(r"(?:^|[- (])(\d+)\s*(?:GB|GiB|G)\b", name, flags=re.IGNORECASE)
    return float(found.group(1)) if found else 0.0
