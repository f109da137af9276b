"""Work: what one micro-batch multiplies and moves on one device, and how fast that device does it.

FLOPs per token of a forward pass are 2 per weight it is multiplied with, and 2 x q x S for causal attention over S
tokens (half of the full square; within a window, over the window). A backward pass costs as much again for the input's
gradient, and once more where the weight is trained, so frozen weights need 4 instead of 6 (8 instead of 6 with
checkpointing, 6 instead of 4 frozen). FlashAttention-2's backward is 2.5 forwards (arXiv:2307.08691).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .architecture import Architecture
from .fused import recomputed_weights, stack_on
from .hardware import Gpu
from .methods import stack_for
from .settings import Settings
from .stacks import Stack
from .traffic import dequantized_bytes, elementwise_bytes

#: What a training step gets of the best matrix product: shapes differ from the best one, and launches leave gaps.
#: Chosen so that llama-shaped 7B runs on A100-80GB at 16k tokens land on their measured 3,063 to 3,354 tokens/s.
STEP_EFFICIENCY = 0.86
#: The same where layers run as one function or are compiled: their pieces add up to a step's time (on an H200).
WHOLE_LAYERS_EFFICIENCY = 0.91
#: What the products of real layers reach of the best product there is (706 of 794 TFLOP/s on an H200).
LAYER_SHARE = 0.89
#: Rate of e4m3 products with a scale per row over bf16 ones (1,348 of 689 TFLOP/s on an H200), less their small parts.
FP8_GAIN = 1.85
#: Tokens at which matrix products reach half of that; smaller micro-batches can't fill the device.
_HALF_TOKENS = 160.0
#: Share of peak bandwidth that elementwise kernels see.
BANDWIDTH_SHARE = 0.8
#: FLOPs of exponentials and rescaling per FLOP of attention's products, at the peak of ordinary units.
_BESIDE = 0.0291
#: Where attention's instructions don't reach the matrix units' peak: what they reach over the peak of ordinary units.
_ISSUED = {"9": 5.88, "cudnn": 10.4, "10": 12.3}


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one micro-batch on one device, and the rates at which it does them.

    ``peak`` and ``rate`` are FLOP/s of matrix products: the datasheet's and those of this step; ``attention_rate`` the
    same of attention, ``bandwidth`` bytes/s. ``forward``, ``backward``, ``recompute`` and ``attention`` (of one forward
    pass) are FLOPs per token, ``moved`` bytes per token, ``unpacked`` bytes of the micro-batch. ``gain`` is how many
    times as fast the products of layers are in 8 bits.
    """

    tokens: int
    peak: float
    achievable: float
    efficiency: float
    filled: float
    bandwidth: float
    gain: float
    head: float
    """FLOPs per token of the head, which stays in 16 bits."""
    forward: float
    backward: float
    recompute: float
    span: float
    attention: float
    attention_rate: float
    passes: float
    moved: float
    unpacked: float

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        settings: Settings,
        stack: Stack,
        gpu: Gpu,
        *,
        mean_length: float | None = None,
    ) -> Work:
        """``settings`` and ``stack`` as :func:`as_run` gives them; ``mean_length`` as of :func:`.speed.step_speed`."""
        wide = settings.compute_bytes != 2
        forward, backward, recompute = matmul_flops(architecture, settings, stack)
        in_8_bits = (settings.quantization == "fp8" or settings.fp8_products) and has_fp8(gpu)
        span = min(mean_length or settings.sequence_length, settings.sequence_length)
        attention = attention_flops(architecture, span)
        within = settings.masked and stack.whole_layers  # these layers attend within documents, by flash attention
        if settings.masked and not within:
            # A kernel that is given a mask computes the upper half too, and all documents of a row.
            span, attention = settings.sequence_length, 2 * attention_flops(architecture, settings.sequence_length)
        # What is parked on the host has the attention's output with it, where layers run as one function.
        attended = settings.keeps_outputs or (stack.whole_layers and settings.checkpointing == "offload")
        recent = stack.recent_attention and not within
        attention_rate = _attention_rate(gpu, span, architecture.head_dim, recent=recent) * stack.attention_speed
        return cls(
            tokens=settings.tokens,
            peak=(gpu.fp32_tflops if wide else gpu.bf16_tflops) * 1e12,
            achievable=gpu.achievable,
            efficiency=WHOLE_LAYERS_EFFICIENCY if stack.whole_layers or stack.compiled else STEP_EFFICIENCY,
            filled=fill(settings.tokens, gpu),
            bandwidth=gpu.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE,
            gain=FP8_GAIN if in_8_bits else 1.0,
            head=2.0 * architecture.vocab * architecture.hidden,
            forward=forward,
            backward=backward,
            recompute=recompute,
            span=span,
            attention=attention,
            attention_rate=attention_rate * (gpu.fp32_tflops / gpu.bf16_tflops if wide else 1.0),
            passes=3.5 + (0.0 if attended else settings.recomputed(architecture.num_layers)),
            moved=elementwise_bytes(architecture, settings, stack),
            unpacked=dequantized_bytes(architecture, settings, stack, in_8_bits=in_8_bits),
        )

    @property
    def rate(self) -> float:
        """FLOP/s of this step's matrix products."""
        return self.peak * self.achievable * self.efficiency * self.filled

    def shortened(self, flops: float) -> float:
        """The FLOPs per token that take as long where all but the head's run ``gain`` times as fast."""
        head = min(self.head, flops)
        return head + (flops - head) / self.gain

    @property
    def products(self) -> dict[str, float]:
        """FLOPs per token of each pass's products, those in 8 bits counted as the fewer that take as long."""
        return {
            "forward": self.shortened(self.forward),
            "backward": self.shortened(self.backward),
            "recompute": self.recompute / self.gain,
        }

    @property
    def seconds(self) -> dict[str, float]:
        """What the device is busy with in one micro-batch, by term."""
        return {
            **{name: self.tokens * flops / self.rate for name, flops in self.products.items()},
            "attention": self.tokens * self.attention * self.passes / self.attention_rate,
            "elementwise": self.tokens * self.moved / self.bandwidth,
            "dequantize": self.unpacked / self.bandwidth,
        }


def as_run(architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu) -> tuple[Settings, Stack]:
    """Settings and stack as they come to run there: masters that accelerate makes, kernels that apply, the loss."""
    settings = settings.under(stack)
    return settings, stack_for(settings.method, stack_on(architecture, settings, stack, gpu))


def _attention_rate(gpu: Gpu, span: float, head_dim: int, *, recent: bool) -> float:
    """FLOP/s that attention over ``span`` tokens reaches over both passes.

    Its products run on the matrix units, its exponentials and rescaling on the ordinary ones, one after the other for
    the most part: FlashAttention-2 on an A100 (arXiv:2307.08691, causal, 128 wide) reaches 133 TFLOP/s at 1k tokens,
    157 at 2k, 188 at 16k, where products alone reach 271 of 312. Consumer cards and the H20 have as many ordinary units
    beside matrix units of a fraction of the speed, so attention comes near to what products reach there. On Hopper
    FlashAttention-2 does not use the asynchronous units (arXiv:2407.08608: a third of the peak); cuDNN, which torch
    takes there from 2.9 on, does: 401 TFLOP/s at 2k tokens and 492 at 8k on an H200 (measured). Narrower heads do as
    much beside their products for fewer FLOPs: at 64, cuDNN reached 306 (16 layers of 8k tokens in 12.6 ms, measured),
    FlashAttention-2 nine tenths.
    """
    peak, narrow = gpu.bf16_tflops, min(head_dim / 128, 1.0)
    if gpu.kind == "cpu":
        return 0.4 * gpu.bf16_tflops * 1e12
    major = gpu.compute_capability.partition(".")[0]
    products = gpu.achievable * peak
    cudnn = major == "9" and recent
    if major in _ISSUED:
        products = min(products, _ISSUED["cudnn" if cudnn else major] * gpu.fp32_tflops)
    elif major not in ("8", "12"):  # older than FlashAttention-2, or another maker's
        return narrow**0.15 * 0.45 * peak * 1e12 * span / (span + 470)
    rate = 1 / (1 / products + _BESIDE / gpu.fp32_tflops)
    return rate * 1e12 * (narrow**0.4 * span / (span + 670) if cudnn else narrow**0.15 * span / (span + 470))


def has_fp8(gpu: Gpu) -> bool:
    """Whether its matrix units take e4m3: Ada, Hopper and later."""
    major, _, minor = gpu.compute_capability.partition(".")
    if gpu.kind != "cuda" or not major.isdigit():  # AMD's names (gfx942) have no such order
        return False
    return (int(major), int(minor or 0)) >= (8, 9)


def fill(tokens: int, gpu: Gpu) -> float:
    """How well a micro-batch of so many tokens fills the device."""
    half = _HALF_TOKENS * (gpu.bf16_tflops / 312) if gpu.kind == "cuda" else 16.0
    return tokens / (tokens + half)


@lru_cache(maxsize=4096)
def _flops(architecture: Architecture, tuning: str, rank: int, targets: str | tuple[str, ...]) -> tuple[float, float]:
    head = architecture.vocab * architecture.hidden
    weights = architecture.layer_matmul_weights + head
    if tuning == "full":
        return 2.0 * weights, 4.0 * weights
    pairs = architecture.lora_parameters(rank, targets)
    if architecture.adapted_experts:  # of the experts' pairs, a token passes the active ones
        pairs = min(pairs, weights)
    return 2.0 * (weights + pairs), 2.0 * weights + 4.0 * pairs


def matmul_flops(architecture: Architecture, settings: Settings, stack: Stack) -> tuple[float, float, float]:
    """FLOPs per token of forward, backward and recomputation; the head is not checkpointed, but its tiles run twice."""
    forward, backward = _flops(architecture, settings.tuning, settings.rank, settings.targets)
    head = 2.0 * architecture.vocab * architecture.hidden
    share = settings.recomputed(architecture.num_layers)
    again = share * (forward - head)
    if settings.keeps_outputs and again:
        spared = sum(layer.count * module.weight for layer in architecture.layers for module in layer.every_other)
        again -= share * 2.0 * spared
    if stack.whole_layers and again:  # a layer's gradients don't need its output, nor some products their own again
        policy = "offload" if settings.checkpointing == "offload" else "full"
        made_again = (layer.count * recomputed_weights(architecture, layer, policy) for layer in architecture.layers)
        again = share * 2.0 * sum(made_again)
    if stack.loss == "rows":  # its gradient is made with the loss
        head = 0.0
    return forward, backward, head + again


def attention_flops(architecture: Architecture, span: float) -> float:
    """FLOPs per token of one causal forward over all layers: QK^T and its product with V."""
    width = architecture.heads * (architecture.head_dim + architecture.value_dim)
    local = min(span, architecture.window) if architecture.window else span
    full_layers = architecture.num_layers - architecture.windowed_layers
    return width * (span * full_layers + 2 * local * (1 - local / (2 * span)) * architecture.windowed_layers)
