"""What vLLM serves, and the command that serves it: the adapter beside its base where vLLM takes it, else one model.

What vLLM takes is what its vllm/lora/peft_helper.py and vllm/config/lora.py say. It reads adapters with one rank and
one alpha: patterns of several would be loaded with a wrong scale, and not a word.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ..chat import result_folder
from ..data.template import own_template, stop_token_ids
from ..models.load import load_tokenizer, locate
from ..run import Run
from .adapter import export_adapter
from .exported import Exported, Tell, plain_name
from .merged import export_merged, is_adapter
from .talk import trained

#: What ``--max-lora-rank`` can be.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def export_vllm(run: Run, destination: Path, tell: Tell) -> Exported:
    """Write a folder that vLLM serves; ``use`` is the command.

    Raises:
        UserError: of the form that is written, ``adapter`` or ``merged``.
    """
    result = result_folder(run)
    if not is_adapter(result):
        made = export_merged(run, destination, tell)
        return Exported(made.path, made.checked, made.notes, (_command([str(destination)]),))
    config: dict[str, Any] = json.loads((result / "adapter_config.json").read_text(encoding="utf-8"))
    refused = refusals(config)
    if run.plan.resolved.options.new_tokens:
        refused = (*refused, "words that the base does not have")
    if run.plan.resolved.method == "reward":
        refused = (*refused, "a head that scores")
    if refused:
        made = export_merged(run, destination, tell)
        why = f"vLLM takes no adapter with {', '.join(refused)}: it is merged into its base"
        return Exported(made.path, made.checked, (why, *made.notes), (_command([str(destination)]),))
    arguments = _beside_base(run, result, destination, config)  # before anything is written: the base may be gone
    made = export_adapter(run, destination)
    return Exported(made.path, made.checked, made.notes, (_command(arguments),))


def refusals(config: dict[str, Any]) -> tuple[str, ...]:
    """What of an adapter vLLM does not take.

    Args:
        config: of PEFT.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        return (f"tuning of the kind {kind}",)
    found = {
        "DoRA": config.get("use_dora"),
        f"trained copies of {config.get('modules_to_save')}": config.get("modules_to_save"),
        "trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "trained tokens": config.get("trainable_token_indices"),
        "several ranks": config.get("rank_pattern"),
        "several scales": config.get("alpha_pattern"),
        "whole parameters as targets": config.get("target_parameters"),
        f"a rank of {config['r']} (at most {MAX_RANKS[-1]})": config["r"] > MAX_RANKS[-1],
    }
    return tuple(what for what, there in found.items() if there)


def _beside_base(run: Run, result: Path, destination: Path, config: dict[str, Any]) -> list[str]:
    """The arguments that serve a base with the adapter of ``result``, talking as the adapter was trained to.

    vLLM takes chat template and stop tokens from the base, whatever lies beside the adapter.
    """
    rank = next(most for most in MAX_RANKS if most >= config["r"])
    arguments = [run.recipe.model, "--enable-lora", "--max-lora-rank", str(rank)]
    arguments += ["--lora-modules", _module(plain_name(run), destination)]
    tokenizer, _ = load_tokenizer(result)
    base = locate(run.recipe.model)
    plain = _own_tokenizer(base)
    if tokenizer.chat_template and (not plain.chat_template or own_template(plain) != own_template(tokenizer)):
        arguments += ["--chat-template", str(destination / "chat_template.jinja")]
    before = trained(tokenizer, run.plan.resolved.method)
    if before is not None and before.end not in _stops(base, plain):
        stops = {"eos_token_id": stop_token_ids(tokenizer)}
        arguments += ["--override-generation-config", json.dumps(stops)]
    return arguments


def _module(name: str, folder: Path) -> str:
    """An adapter as vLLM takes it: ``name=path``, which it cuts at every ``=`` and takes for JSON at a comma."""
    path = str(folder)
    return json.dumps({"name": name, "path": path}) if set(path) & {"=", ","} else f"{name}={path}"


def _own_tokenizer(base: Path) -> Any:
    """The base's tokenizer as others load it."""
    from transformers import AutoTokenizer

    from ..models.remote_code import trusted

    return AutoTokenizer.from_pretrained(str(base), trust_remote_code=trusted(base))


def _stops(base: Path, tokenizer: Any) -> set[int]:
    """The tokens at which vLLM ends answers of a base."""
    found = {tokenizer.eos_token_id}
    file = base / "generation_config.json"
    if file.is_file():
        stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(stops if isinstance(stops, list) else [stops])
    return found


def _command(arguments: list[str]) -> str:
    return shlex.join(["vllm", "serve", *arguments])
