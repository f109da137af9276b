"""When vLLM generates, what TRL is told then, and what reaches vLLM.

The real one has not been run: a stand-in with the parts of its interface that TRL calls takes its place, and a server
that speaks its protocol.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetui.engine.events import Fallback
from finetui.engine.trainers import vllm
from finetui.engine.trainers.vllm import vllm_settings
from finetui.planner.errors import RecipeError
from finetui.planner.recipe import Recipe

GIB = 2**30


def job(told: list[Any], *, device: str = "cuda", need: float = 20.0, billions: float = 8.0, **tree: Any) -> Any:
    import torch

    recipe = Recipe.build({"model": "m", "method": "grpo", "rewards": ["numeric"], **tree})
    plan = SimpleNamespace(
        memory=SimpleNamespace(device_gib=need), model=SimpleNamespace(parameters=int(billions * 1e9))
    )
    return SimpleNamespace(
        recipe=recipe, run=SimpleNamespace(plan=plan), device=torch.device(device), emit=told.append,
        resolved=SimpleNamespace(method=recipe.method, sequence_length=1024),
    )  # fmt: skip


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is installed, on a GPU of 80 GiB."""
    monkeypatch.setattr(vllm, "installed", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (70 * GIB, 80 * GIB))


def test_it_gets_the_room_that_the_plan_leaves(card: None) -> None:
    told: list[Any] = []
    settings = vllm_settings(job(told))
    assert settings == {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3, "vllm_max_model_length": 1024,
    }  # fmt: skip
    larger = vllm_settings(job(told, billions=14.0))  # its copy alone is a third of the card
    assert larger["vllm_gpu_memory_utilization"] == pytest.approx(1.25 * 28e9 / (80 * GIB), abs=1e-3)
    tight = vllm_settings(job(told, need=56.0))
    assert tight["vllm_gpu_memory_utilization"] == pytest.approx(1 - 0.7 - 0.05)


def test_without_it_transformers_generates_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "installed", lambda: False)
    told: list[Any] = []
    assert vllm_settings(job(told)) == {"use_vllm": False}
    assert [event.line for event in told] == ["completions by transformers: it is not installed"]
    with pytest.raises(RecipeError, match=r"vLLM can't generate: it is not installed\. Install it with: pip install"):
        vllm_settings(job(told, rollout={"engine": "vllm"}))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": "cpu"}, "it needs a GPU"),
        ({"tuning": "qlora"}, "stored in 4 or 8 bits"),
        ({"tuning": {"type": "lora", "new_tokens": ["<a>"]}}, "tuning.new_tokens"),
        ({"need": 64.0}, "the plan leaves it 15% of the GPU, and it needs 23%"),
        ({"method": "ppo"}, "value head"),
    ],
)
def test_where_it_can_not_generate_the_choice_of_transformers_is_told(
    card: None, change: dict[str, Any], why: str
) -> None:
    told: list[Any] = []
    assert vllm_settings(job(told, **change)) == {"use_vllm": False}
    assert isinstance(told[0], Fallback)
    assert why in told[0].why
    if change.get("method") != "ppo":
        with pytest.raises(RecipeError, match=f"vLLM can't generate: .*{why}"):
            vllm_settings(job(told, **change, rollout={"engine": "vllm"}))


def test_a_server_that_does_not_answer_is_told_at_once(card: None) -> None:
    message = (
        r"no vLLM server answers at http://127\.0\.0\.1:9 \(.*refused.*\)\. Start it with: .*vllm serve m --weight"
    )
    with pytest.raises(RecipeError, match=message):
        vllm_settings(job([], rollout={"server": "http://127.0.0.1:9"}))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"method": "ppo", "rollout": {"engine": "vllm"}}, "value head"),
        ({"method": "ppo", "rollout": {"server": "http://h:1"}}, "rollout.server has no effect when method is ppo"),
        ({"rollout": {"server": "http://h:1", "engine": "transformers"}}, "no effect when rollout.engine is transf"),
        ({"rollout": {"server": "localhost:8000"}}, "rollout.server"),
    ],
)
def test_what_contradicts_itself_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.build({"model": "m", "method": "grpo", "rewards": ["numeric"], **tree})


def test_the_keywords_are_those_of_trl() -> None:
    from trl import GRPOConfig, RLOOConfig

    wanted = {"use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_server_base_url"}
    for config in (GRPOConfig, RLOOConfig):
        assert wanted <= set(config.__dataclass_fields__)


# --- a stand-in for vLLM

_PACKAGE = {
    "__init__.py": """
import math
from types import SimpleNamespace
NOTES = {"llm": [], "loads": [], "sampling": [], "prompts": []}
class RequestOutput: ...
class SamplingParams:
    def __init__(self, **asked): NOTES["sampling"].append(asked); self.n = asked["n"]; self.most = asked["max_tokens"]
class LLM:
    def __init__(self, **asked):
        NOTES["llm"].append(asked)
        load = lambda pairs: NOTES["loads"].extend((name, list(weight.shape)) for name, weight in pairs)
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=load))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker, model_config=SimpleNamespace(max_model_len=1024))
    def reset_prefix_cache(self): NOTES["loads"].append(("reset", []))
    def generate(self, prompts, sampling_params, use_tqdm):
        NOTES["prompts"] += [len(prompt["prompt_token_ids"]) for prompt in prompts]
        words = [[5 + i, 9, 11][: sampling_params.most] for i in range(len(prompts))]
        score = lambda word: {word: SimpleNamespace(logprob=math.log(0.1), rank=1)}
        return [SimpleNamespace(prompt_token_ids=p["prompt_token_ids"], outputs=[
            SimpleNamespace(token_ids=w, logprobs=[score(word) for word in w])]) for p, w in zip(prompts, words)]
""",
    "sampling_params.py": "class StructuredOutputsParams: ...\n",
    "utils/__init__.py": "",
    "utils/network_utils.py": "get_ip = lambda: '127.0.0.1'\n",
    "distributed/__init__.py": "",
    "distributed/weight_transfer/__init__.py": "",
    "distributed/weight_transfer/nccl_common.py": "def trainer_init(info): raise AssertionError('needs NCCL')\n",
    "distributed/weight_transfer/packed_tensor.py": """
from vllm import NOTES
def packed_nccl_broadcast_producer(iterator, group, src, post_iter_func):
    NOTES["loads"].append([(name, list(weight.shape)) for name, weight in iterator])
""",
}
_SCRIPT = """
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
mode, folder, presets = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
import torch
torch.set_num_threads(1)
import vllm
SAID = []
class Server(BaseHTTPRequestHandler):
    def log_message(self, *_): ...
    def give(self, tree):
        body = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        config = {"weight_transfer_config": {}, "model_config": {"logprobs_mode": "processed_logprobs"}}
        self.give({"data": [{"id": "served"}], "world_size": 1, "vllm_config": config})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        SAID.append((self.path, asked))
        choices = []
        for prompt in asked.get("prompt", []):
            for i in range(asked["n"]):
                words = [5 + i, 9, 11][: asked["max_tokens"]]
                scored = {"tokens": [f"token_id:{w}" for w in words], "token_logprobs": [-2.3] * len(words),
                          "top_logprobs": [{f"token_id:{w}": -2.3} for w in words]}
                choices.append({"prompt_token_ids": prompt, "token_ids": words, "logprobs": scored})
        self.give({"choices": choices, "success": True})
server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()

from trl.generation.vllm_client import VLLMClient
VLLMClient.init_communicator = lambda self, device: None  # the weights themselves go through NCCL, which needs a GPU
from finetui.engine.events import read_events
from finetui.engine.planning import plan_for
from finetui.engine.run import Run
from finetui.engine.trainers import vllm as ours
from finetui.engine.worker import attempt
from finetui.planner.recipe import Recipe
ours._obstacle, ours._share = (lambda job: None), (lambda job: 0.4)
rollout = {"num_generations": 2, "max_completion_length": 3, "temperature": 0.7, "top_p": 0.9}
if mode == "server":
    rollout["server"] = f"http://127.0.0.1:{server.server_address[1]}"
recipe = Recipe.build({
    "model": str(presets / "tiny"), "method": "grpo", "tuning": {"type": "lora", "rank": 2}, "track": [],
    "data": str(presets / "data" / "sums.jsonl"), "rewards": ["numeric"], "rollout": rollout, "batch_size": 4,
    "max_steps": 2, "sequence_length": 64, "hardware": {"device": "cpu"}, "evaluation": {"holdout": 0.01},
})
run = Run.create(recipe, plan_for(recipe), root=folder)
code = attempt(run)
told = [(event.type, event.data) for event in read_events(run.events_path)]
(folder / "notes.json").write_text(json.dumps({"code": code, "told": told, "said": SAID, **vllm.NOTES}, default=str))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_what_reaches_it(mode: str, tmp_path: Path) -> None:
    if mode == "server":
        pytest.importorskip("requests")  # TRL's client speaks through it; vLLM itself brings it along
    for name, text in _PACKAGE.items():
        path = tmp_path / "site" / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    info = tmp_path / "site" / "vllm-0.30.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.30.0\n")
    (info / "top_level.txt").write_text("vllm\n")
    presets = Path(__file__).parents[3] / "presets"
    search = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", "-c", _SCRIPT, mode, str(tmp_path), str(presets)],
        env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    notes = json.loads((tmp_path / "notes.json").read_text())
    assert notes["code"] == 0, notes["told"][-3:]
    assert [data["step"] for kind, data in notes["told"] if kind == "step"] == [1, 2]
    lines = [data["line"] for kind, data in notes["told"] if kind == "log"]
    assert any(line.startswith("completions by vLLM") for line in lines)
    asked = {"n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 3, "logprobs": 0}
    if mode == "colocate":
        (llm,) = notes["llm"]
        assert llm["model"] == str(presets / "tiny") or Path(llm["model"]).is_dir()
        assert (llm["gpu_memory_utilization"], llm["max_model_len"], llm["quantization"]) == (0.4, 64, None)
        assert {**asked, "n": 1}.items() <= notes["sampling"][0].items()
        synced = notes["loads"]
        resets = [name for name, _ in synced].count("reset")
        names = [name for name, _ in synced[: next(i for i, pair in enumerate(synced) if pair[0] == "reset")]]
    else:
        posts = [path for path, _ in notes["said"]]
        completions = [body for path, body in notes["said"] if path == "/v1/completions"]
        assert any(asked.items() <= body.items() for body in completions)  # one each where rewards are measured
        assert completions[0]["model"] == "served"
        assert all(isinstance(token, int) for token in completions[0]["prompt"][0])
        resets = posts.count("/reset_prefix_cache")
        assert posts.count("/start_weight_update") == posts.count("/finish_weight_update") == resets
        names = [name for name, _ in notes["loads"][0]]
        announced = next(body for path, body in notes["said"] if path == "/update_weights")["update_info"]
        assert announced["names"] == names
    assert resets >= 2  # before the first step and after it
    # The names are those of the checkpoint: none of PEFT's, none of an adapter's.
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not [name for name in names if "lora" in name or "base" in name]
