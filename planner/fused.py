"""What finetui's own kernels change: whole decoder layers as one function, which keeps what its policy says.

Bytes per token and layer for 16-bit values, with H hidden, I MLP width, Q and K the widths of queries and of keys
(``kernels/decoder_layer.py`` has the same table)::

    checkpointing: full      2 H                       all is computed again but the down projection
    checkpointing: offload   0 (4 H + 2 Q on the host) the projections to q, k, v, gate and up
    checkpointing: none      4 H + 4 Q + 4 K + 4 I     norms, rotary embedding and activation

and 2 per rank for each of the seven modules with an adapter; trained weights keep nothing more, since the inputs of
their products are among these or elementwise. The attention's log-sums, 4 per head, stay wherever its output does.

A norm after the MLP (Gemma 3, OLMo 2) needs what it normed: 2 H more under ``none``, and the down projection is
computed again under the others. One after attention costs nothing: what it normed is kept in place of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .architecture import Architecture
from .hardware import Gpu
from .layer import Layer, Linear
from .settings import Settings
from .stacks import Stack


@dataclass(frozen=True)
class Built:
    """What lies around attention and MLP: norms before them, norms after them, a factor on what they add."""

    before: bool = True
    after: bool = False
    scaled: bool = False


_PRE, _SANDWICH, _POST = Built(), Built(after=True), Built(before=False, after=True)
#: Families whose layers the kernels recognise (``kernels/layers.py``): RMSNorms, attention, gated MLP, sums.
FAMILIES = {
    **dict.fromkeys(("ernie4_5", "gemma", "glm", "helium", "hunyuan_v1_dense", "llama", "ministral", "mistral"), _PRE),
    **dict.fromkeys(("phi3", "qwen2", "qwen3", "smollm3"), _PRE),
    **dict.fromkeys(("gemma3_text", "glm4"), _SANDWICH),
    **dict.fromkeys(("exaone4", "olmo2", "olmo3"), _POST),
    "granite": Built(scaled=True),
}
#: Rows of the MLP that go through at once (``kernels/decoder_mlp.py``).
PIECE = 4096


@dataclass(frozen=True)
class LayerBytes:
    """Bytes per token of one layer: kept on the device, further ones in its backward, and waiting on the host.

    ``moving`` are those of parked tensors that are on the device on their way, however many layers there are.
    """

    kept: float
    work: float
    parked: float = 0.0
    moving: float = 0.0


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes per token that one layer's elementwise kernels and its adapters' small products read and write."""

    forward: float
    backward: float
    again: float


def runs_whole_layers(architecture: Architecture, stack: Stack, gpu: Gpu, *, dropout: bool) -> bool:
    """Whether each decoder layer is one function: a known layer, no dropout, a GPU with bf16."""
    return (
        stack.whole_layers
        and gpu.kind == "cuda"
        and gpu.bf16
        and not dropout
        and architecture.model_type in FAMILIES
        and all(not layer.experts for layer in architecture.layers)
    )


def stack_on(architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu) -> Stack:
    """The stack as it runs here: its own kernels only where they apply.

    Where layers do not run as one function, their norms and gated MLPs still have kernels of their own.
    """
    if not stack.whole_layers:
        if stack.kbit_upcast and settings.sharing.weights and settings.quantization.startswith("nf4"):
            # TRL and Axolotl leave 4-bit models that are sharded as they are (sft_trainer.py, loaders/model.py).
            return _without_upcast(stack)
        return stack
    # Other adapters run as PEFT's own modules.
    known = settings.kind in ("", "lora-fp8", "freeze") and not settings.dora
    if settings.kernels and known and runs_whole_layers(architecture, stack, gpu, dropout=settings.dropout):
        return stack
    singly = settings.kernels and gpu.kind == "cuda" and architecture.gated and not architecture.layer_norm
    return _without_layers(stack, singly, gpu.kind == "cuda")


@lru_cache(maxsize=32)
def _without_upcast(stack: Stack) -> Stack:
    return replace(stack, kbit_upcast=False)


@lru_cache(maxsize=16)
def _without_layers(stack: Stack, singly: bool, cuda: bool) -> Stack:
    stack = replace(
        stack,
        whole_layers=False,
        fused_norm=singly,
        fused_mlp=singly,
        remakes_activation=singly,
        keeps_scratch=singly,
    )
    # On the CPU there is no kernel for the loss: logits of all positions, and their log-softmax.
    return stack if cuda else replace(stack, loss="logits", logit_forward=12.0, logit_backward=12.0)


def layer_bytes(
    architecture: Architecture, rank: int, adapters: int, checkpointing: str, tokens: int = 0, *, width: int = 2,
    stream: int = 2,
) -> LayerBytes:  # fmt: skip
    """What one layer needs under ``none``, ``offload`` or ``full``, for so many tokens at once.

    Its backward has two crests: the MLP's, whose rows go through in pieces unless gate and up are kept, and the
    attention's, whose kernel adds up the gradient of the queries in fp32 and makes those of keys and values for every
    query head.

    Args:
        width: bytes of a value in products; stream: of the hidden states between layers, which are fp32 under fp32
            weights.
    """
    hidden, q, kv = architecture.hidden, architecture.query_width, architecture.kv_width
    inner, c, w = max(layer.inner for layer in architecture.layers), float(width), float(stream)
    built = FAMILIES.get(architecture.model_type, _PRE)
    small, sums = c * rank * adapters + 4.0 * built.after, 4.0 * architecture.heads
    # Normed queries and keys are new tensors beside the projected ones.
    normed = c * max(_inner_norms(architecture, layer) for layer in architecture.layers)
    heads, cast = c * (q + 2 * kv), c if w != c or built.after or built.scaled else 0.0
    n = c if built.before or w != c else 0.0  # of a normed input, which is the input itself without a norm
    # What is kept beside the input and the attention's output: the sum, or what is normed and added to the input.
    joined, again_sum = (c, w) if built.after else (w, 0.0)
    # Gradients of the layer's output and of the sum after attention, and the normed input; the gradients of the
    # attention's output, of its queries, keys and values, and its kernel's own.
    attention = (2 * w + n) * hidden + c * q + normed + heads + 4 * q + (2 * c * q if kv < q else 0)
    if checkpointing == "none":
        # Gradients of output and activation, the normed input, and the sum where it is made again; then gate and up
        # are gone, and the sum is, with what was normed and added to it.
        last = c * hidden if built.after else 0.0
        mlp = (w + cast + n + again_sum) * hidden + c * inner - last
        kept = (w + joined) * hidden + c * q + heads + 2 * c * inner + last + small + sums
        return LayerBytes(kept, max(mlp, attention - joined * hidden - last - 2 * c * inner))
    part = min(1.0, PIECE / tokens) if tokens else 1.0
    # Gradients of the output and, piece by piece, of the sum; of a piece its normed input, gate, up and activation.
    mlp = w * hidden + (w * hidden if part < 1 else 0) + part * ((n + cast) * hidden + 3 * c * inner)
    if checkpointing == "offload":
        # What one layer parked is on the device at each crest: its sum in use and the rest on its way in, then that in
        # use and the next sum on its way in. The normed input is let go meanwhile. In forward its input is in use too.
        # A sum that is made again comes on top, or else the input, which then is on its way with what is added to it.
        parked = (w + joined) * hidden + c * q
        forward = 2 * w * hidden + part * (n * hidden + 3 * c * inner)
        work = max(mlp + again_sum * hidden, forward, attention + heads + (again_sum - n) * hidden)
        return LayerBytes(small + sums, work, parked, parked)
    # Made again before either: the normed input, queries, keys, values, the attention's output, the sum after it, and
    # what was added to that where a norm stands between.
    again = (n + w + (c if built.after else 0)) * hidden + heads + normed + c * q + sums
    return LayerBytes(w * hidden + small, max(again + mlp, attention + heads + c * q + sums))


def _inner_norms(architecture: Architecture, layer: Layer) -> int:
    """Features that the norms of queries and keys see."""
    built = FAMILIES.get(architecture.model_type, _PRE)
    return layer.norm_width - 2 * (built.before + built.after) * architecture.hidden


def cast_bytes(architecture: Architecture, settings: Settings) -> float:
    """Bytes of the 16-bit copies of fp32 weights that one layer's products take: attention's or the MLP's at a time."""
    if settings.worked_bytes == settings.compute_bytes or settings.quantized:
        return 0.0
    blocks = [block for layer in architecture.layers for block in (layer.attention, layer.mlp)]
    return float(settings.compute_bytes) * max(sum(module.weight for module in block) for block in blocks)


def layer_traffic(
    architecture: Architecture, layer: Layer, modules: Sequence[Linear], checkpointing: str
) -> LayerTraffic:
    """What one layer moves beside its large products, in forward, in backward and to compute again.

    A norm reads and writes its feature, and its backward reads two gradients and the input and writes one; one after a
    sublayer reads the sum's input too, and its backward one gradient less, and what it normed is added up once more.
    Rotary embedding and activation work in place. An adapter reads its input once per group of one input, and writes
    its share of the output, to which the large product adds; backward reads the gradient of the output twice and the
    input once, and writes its share of the input's gradient. Of gate, up and down all of that but one look at the
    gradients is done with the activation (``kernels/lora_glu.py``). A step of a 1B model, replayed, spent 8.4 ms of an
    H200 on these products and 8.1 ms on norms, embeddings and activations, where this makes 4.4 and 8.0; its large
    products took 3.8 ms less than :mod:`.work` makes of them (``tests/bench/results/profile-1b-h200.txt``).
    """
    hidden, q, kv = architecture.hidden, architecture.query_width, architecture.kv_width
    normed, built = _inner_norms(architecture, layer), FAMILIES.get(architecture.model_type, _PRE)
    # Twice a norm of 4, or a sum of 6 bytes per value: forward, once more in backward, and the gradients of either.
    before, after = 8.0 * hidden * built.before, 12.0 * hidden * (built.after or built.scaled)
    rotary, norms = 4.0 * (q + kv), before + 4 * normed
    names = {module.name for module in modules}
    groups = (layer.attention[:-1], layer.attention[-1:], layer.mlp[:-1], layer.mlp[-1:])
    inputs = [group[0].d_in if names & {module.name for module in group} else 0 for group in groups]
    inside = sum(module.d_out for module in layer.mlp[:-1] if module.name in names)
    outside = sum(module.d_out for module in modules) - inside
    again = 0.0
    if checkpointing in ("offload", "full"):
        made = layer.attention[:-1] if checkpointing == "offload" else layer.attention
        again = rotary + 4 * normed + 2.0 * sum(module.d_out for module in made if module.name in names)
    return LayerTraffic(
        forward=norms + after + rotary + 6 * layer.inner + 2 * sum(inputs) + 2 * outside,
        backward=norms
        + 2 * (before if built.before else 6.0 * hidden)
        + (1.5 * after if built.after else after / 1.5)
        + 8 * normed
        + rotary
        + 12 * layer.inner
        + 4 * sum(inputs[:-1])
        + 4 * outside
        + 2 * inside,
        again=again,
    )


def recomputed_weights(architecture: Architecture, layer: Layer, checkpointing: str) -> int:
    """Weights of the products that one layer's backward makes again."""
    if checkpointing == "none":
        return 0
    attention = layer.attention[:-1] if checkpointing == "offload" else layer.attention
    mlp = layer.mlp if FAMILIES.get(architecture.model_type, _PRE).after else layer.mlp[:-1]
    return sum(module.weight for module in (*attention, *mlp))


def parked_bytes(architecture: Architecture, settings: Settings, stack: Stack) -> float:
    """Bytes of one micro-batch that wait in host memory under ``offload``."""
    if settings.checkpointing != "offload":
        return 0.0
    each = 2.0 * architecture.hidden
    if stack.whole_layers:
        each = layer_bytes(architecture, settings.rank, 0, "offload").parked
    return each * architecture.num_layers * settings.tokens
