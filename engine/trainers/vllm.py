"""Whether vLLM writes the completions of grpo and rloo, and with which settings of TRL's.

TRL loads a second copy of the model into vLLM, in the training process (``colocate``) or in a server on other GPUs, and
hands it the trained weights before each batch of completions. What rules that out is told before the first step rather
than by a crash of a library, and where the recipe leaves the choice open, transformers generates instead.
"""

from __future__ import annotations

import importlib.util
import urllib.error
import urllib.request
from typing import Any

import torch

from ...planner.errors import RecipeError
from ...planner.vllm import BESIDE, SPARE
from ..events import Fallback, LogLine
from .job import Job

#: Share of a GPU that vLLM takes where there is room for more: TRL's default.
_SHARE = 0.3
_SERVER = """VLLM_SERVER_DEV_MODE=1 vllm serve {model} --weight-transfer-config '{{"backend": "nccl"}}' \
--logprobs-mode processed_logprobs"""


def vllm_settings(job: Job) -> dict[str, Any]:
    """Keywords of GRPOConfig and RLOOConfig on who generates.

    Raises:
        RecipeError: vLLM is asked for and can't be used here, or no server answers.
    """
    asked = job.recipe.rollout
    if asked.engine == "transformers":
        job.emit(LogLine(0, "completions by transformers"))
        return {"use_vllm": False}
    obstacle = _obstacle(job)
    if obstacle is not None and (asked.engine == "vllm" or asked.server):
        what, do = obstacle
        raise RecipeError(f"vLLM can't generate: {what}", where="rollout.engine", do=do)
    if obstacle is not None:
        if installed():
            job.emit(Fallback("completions by transformers instead of vLLM", obstacle[0]))
        job.emit(LogLine(0, f"completions by transformers: {obstacle[0]}"))
        return {"use_vllm": False}
    settings: dict[str, Any] = {"use_vllm": True, "vllm_mode": "server" if asked.server else "colocate"}
    if asked.server:
        _check_server(asked.server, job.recipe.model)
        settings["vllm_server_base_url"] = asked.server
    else:
        settings["vllm_gpu_memory_utilization"] = round(_share(job), 3)
        settings["vllm_max_model_length"] = job.resolved.sequence_length
    job.emit(LogLine(0, f"completions by vLLM{f' at {asked.server}' if asked.server else ''}"))
    return settings


def installed() -> bool:
    """Whether vLLM is there to be imported."""
    return importlib.util.find_spec("vllm") is not None


def _obstacle(job: Job) -> tuple[str, str] | None:
    """What rules vLLM out, and what to do about it; None where nothing does."""
    otherwise = "Leave out rollout.engine, or set it to transformers."
    if job.resolved.method == "ppo":
        # The value head is a parameter of the policy that vLLM's model does not have.
        return "ppo's model has a value head, which vLLM's has not", otherwise
    if not installed():
        return "it is not installed", "Install it with: pip install 'trl[vllm]'"
    if job.device.type != "cuda":
        return "it needs a GPU", otherwise
    if job.recipe.tuning.stored != "none":
        # Merged adapters are quantised anew at each hand-over, and only the packed weights are handed over, without
        # the scales that belong to them (huggingface/trl#4973).
        return "it can't take over weights that are stored in 4 or 8 bits", "Use tuning: {type: lora}; or transformers."
    if job.recipe.tuning.new_tokens:
        return "its copy of the model has no rows for tuning.new_tokens", otherwise
    if not job.recipe.rollout.server and _share(job) < _least(job):
        what = f"the plan leaves it {_share(job):.0%} of the GPU, and it needs {_least(job):.0%} for its own copy"
        return what, f"Set rollout.server to a vLLM server on other GPUs. {otherwise}"
    return None


def _share(job: Job) -> float:
    """Share of the GPU that vLLM may take: what the plan leaves, and no more than it needs to be fast."""
    need = job.run.plan.memory.device_gib * 2**30 / _device_bytes(job)
    return min(max(_SHARE, _least(job)), 1.0 - need - SPARE)


def _least(job: Job) -> float:
    """Share of the GPU that a copy of the model in 16 bits fills, with what vLLM keeps beside it."""
    return BESIDE * 2 * job.run.plan.model.parameters / _device_bytes(job)


def _device_bytes(job: Job) -> int:
    return int(torch.cuda.mem_get_info(job.device)[1])


def _check_server(address: str, model: str) -> None:
    """Ask a server whether it is up: TRL waits four minutes for one that was never started.

    Raises:
        RecipeError: it does not answer.
    """
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=10) as answer:
            if answer.status == 200:
                return
            why = f"it answers {answer.status}"
    except (urllib.error.URLError, OSError, ValueError) as error:
        why = str(getattr(error, "reason", error))
    what = f"no vLLM server answers at {address} ({why})"
    raise RecipeError(what, where="rollout.server", do=f"Start it with: {_SERVER.format(model=model)}")
