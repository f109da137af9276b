"""The terms of memory as formulas with numbers: what each is made of at the moment that decides, in bytes."""

from __future__ import annotations

from collections.abc import Sequence

from .architecture import Architecture
from .fused import stack_on
from .hardware import GIB, Gpu
from .interval import lean
from .loss import loss_bytes, tail_bytes
from .masks import mask_bytes
from .memory import (
    Stage,
    context_bytes,
    cublas_workspaces,
    held_to_the_end,
    kv_cache_bytes,
    moments_of,
    scratch_bytes,
    slack_bytes,
    stages_of,
    unknowns,
)  # fmt: skip
from .methods import METHODS, stack_for
from .settings import Settings
from .shares import Shares, shares, stored
from .stacks import Stack
from .storage import QUANTIZED_BYTES, Fixed
from .trained import trained_parameters

#: What a part is, how it is reckoned, and its bytes.
Part = tuple[str, str, float]
#: The formula in words, where it comes from, and its parts.
Reckoned = tuple[str, str, list[Part]]

_QUANTIZED = {"nf4": "4 bits (NF4)", "nf4-single": "4 bits (NF4)", "int8": "8 bits", "gptq": "4 bits (GPTQ)",
              "fp8": "8 bits (e4m3)"}  # fmt: skip


def memory_parts(architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu) -> dict[str, Reckoned]:
    """Each term of :attr:`.plan.Memory.terms` with its formula and its parts in bytes."""
    settings = settings.under(stack)
    stack = stack_for(settings.method, stack_on(architecture, settings, stack, gpu))
    fixed = stored(architecture, settings, stack)
    shared = shares(architecture, settings, stack, fixed)
    moments = moments_of(architecture, settings, stack, fixed, shared, gpu)
    needs, raised = {}, {}
    for name, terms in moments.items():
        moving = sum(terms.values())
        unsure = unknowns(architecture, settings, stack, name, ())
        raised[name] = lean(stored=shared.static, moving=moving, unknown=unsure)
        needs[name] = moving + raised[name]
    moment = max(needs, key=lambda name: needs[name])
    at = _At(architecture, settings, stack, gpu, fixed, shared, moment, moments[moment])
    return {
        "weights": at.weights(),
        "adapter": at.adapter(),
        "gradients": at.gradients(),
        "optimizer": at.optimizer(),
        "activations": at.activations(),
        "logits": at.logits(),
        "buffers": at.buffers(raised[moment], slack_bytes(moments, settings, stack, gpu)),
        "context": at.context(),
    }


class _At:
    """One plan at the moment that decides."""

    def __init__(
        self, architecture: Architecture, settings: Settings, stack: Stack, gpu: Gpu, fixed: Fixed, shared: Shares,
        moment: str, terms: dict[str, float],
    ) -> None:  # fmt: skip
        self.architecture, self.settings, self.stack, self.gpu = architecture, settings, stack, gpu
        self.fixed, self.shared, self.moment, self.terms = fixed, shared, moment, terms

    def _split(self, what: str) -> tuple[float, str]:
        share = self.settings.sharing.share(what, self.settings.world_size)
        return share, f" ÷ {self.settings.world_size} GPUs" if share < 1 else ""

    def weights(self) -> Reckoned:
        """Quantised ones, those that stay in 16 or 32 bits, and a frozen reference."""
        a, s, stack = self.architecture, self.settings, self.stack
        head = a.vocab * a.hidden
        parameters = a.parameters + (head if stack.unties and a.tied else 0)
        if METHODS[s.method].scalar_head:
            parameters += a.hidden - (0 if a.tied else head)
        split, by = self._split("weights")
        parts: list[Part] = []
        quantized = 0
        if s.quantized:
            packed, name = QUANTIZED_BYTES[s.quantization], _QUANTIZED[s.quantization]
            linear = a.linear_weights + (head if stack.quantizes_head else 0)
            parts.append(
                (f"linear layers in {name}", f"{_m(linear)} × {packed:.4g} bytes{by}", packed * linear * split)
            )
            if stack.quantizes_experts and a.expert_weights:
                whole = split if s.sharing.gathers != "layers" or self.shared.buffers else 1.0
                each = self.fixed.packed_experts / a.expert_weights
                how = f"{_m(a.expert_weights)} × {each:.4g} bytes"
                parts.append((f"experts in {name}", how, self.fixed.packed_experts * whole))
            quantized = linear + (a.expert_weights if stack.quantizes_experts else 0)
        width = 4 if s.quantized and stack.kbit_upcast else s.weight_bytes
        rest = parameters - quantized
        what = "embeddings, norms and head" if quantized else "all weights"
        parts.append((f"{what} in {8 * width} bits", f"{_m(rest)} × {width} bytes{by}", float(width * rest * split)))
        if self.shared.head:
            parts.append(("the head, which each device has whole", "the rest of it", self.shared.head))
        if s.beside.copy:
            size = float(s.compute_bytes * a.parameters * split)
            parts.append(("the frozen reference", f"{_m(a.parameters)} × {s.compute_bytes} bytes{by}", size))
        if s.beside.teacher is not None:
            parts.append(s.beside.teacher.part(s.compute_bytes, stack))
        if s.offload == "parameters":
            parts = []
        source = "NF4: arXiv:2305.14314" if s.quantization.startswith("nf4") else "counted from config.json"
        return "parameters × bytes each", source, parts

    def adapter(self) -> Reckoned:
        """What is trained beside a frozen base."""
        a, s = self.architecture, self.settings
        if s.tuning == "full":
            return "no adapter: the model's own weights are trained", "", []
        count, width = trained_parameters(a, s), s.adapter_bytes(self.stack)
        _, by = self._split("weights")
        if self.shared.buffers:
            by = f" × (1 + 1/{s.world_size}): whole, and one device's rows of them"
        targets = s.targets if isinstance(s.targets, str) else ", ".join(s.targets)
        formula = f"rank × (inputs + outputs) of every targeted module ({targets}) × bytes each"
        if s.kind not in ("", "lora-fp8", "dora", "rslora"):
            formula = f"trained parameters of {s.kind} × bytes each"
        return formula, "arXiv:2106.09685", [("adapters", f"{_m(count)} × {width} bytes{by}", self.shared.adapter)]

    def gradients(self) -> Reckoned:
        """Those that are there at this moment."""
        size = self.terms["gradients"]
        if not size:
            return "none are there yet at this moment", "", []
        whole = max(self.fixed.gradients, 1.0)
        width = self.fixed.gradients / max(self.fixed.trained, 1.0)
        how = f"{_m(self.fixed.trained)} × {width:g} bytes"
        share = size / whole
        if abs(share - 1) > 0.005:
            how += f" × {share:.0%} of them at the fullest layer" if share < 1 else f" × {share:.2f}, twice for a while"
        what = "gradients of earlier micro-batches" if self.moment == "loss" else "gradients"
        return "trained parameters × bytes each, as far as they are there", "", [(what, how, size)]

    def optimizer(self) -> Reckoned:
        """States, and what its step needs besides."""
        s, fixed = self.settings, self.fixed
        _, by = self._split("optimizer")
        each = fixed.optimizer / max(fixed.trained, 1.0)
        parts: list[Part] = [
            (f"states of {s.optimizer}", f"{_m(fixed.trained)} × {each:.4g} bytes{by}", self.shared.optimizer),
            ("temporaries of its step", "of its largest tensor", self.terms["temporary"]),
        ]
        source = "8 bits: arXiv:2110.02861" if "8bit" in s.optimizer else "traced in torch 2.13"
        return "trained parameters × bytes of state each", source, parts

    def activations(self) -> Reckoned:
        """What forward kept, and the layer at work."""
        a, s = self.architecture, self.settings
        hidden, tokens = a.hidden, s.tokens
        shape = f"{s.rows} × {s.sequence_length:,} = {tokens:,} tokens"
        if self.moment == "optimizer":
            return "nothing is kept any more when the optimiser steps", "", []
        if self.moment == "rollout":
            return "hidden states of the answers that are generated", "", [("states", shape, self.terms["activations"])]
        if self.moment == "teacher":
            return "one layer of the teacher at work", "", [("states", shape, self.terms["activations"])]
        stages, moving = stages_of(a, s, self.stack, self.fixed, self.shared.copies)
        policy = "all they made" if s.checkpointing == "none" else "their inputs alone"
        parts: list[Part] = []
        if self.moment == "loss":
            for stage in stages:
                kept = f"{stage.count} layers × {stage.kept / tokens:,.0f} bytes a token × {tokens:,}"
                parts.append((f"kept by layers ({policy})", kept, stage.count * stage.kept))
            each = tail_bytes(self.stack, s)
            tail = f"{each:g} bytes × {hidden:,} × {tokens:,}"
            parts.append(("hidden states around the loss", tail, each * hidden * tokens))
        else:
            parts = self._worst_layer(stages, self.terms["activations"] - moving)
        if moving:
            parts.append(("on their way from and to the host", f"{moving / tokens:,.0f} bytes a token", moving))
        formula = f"layers × bytes a token × tokens of a micro-batch ({shape})"
        return formula, "bytes counted with saved-tensor hooks on transformers' Llama (planner/activations.py)", parts

    def _worst_layer(self, stages: Sequence[Stage], wanted: float) -> list[Part]:
        """The parts of the instant of backward whose activations are ``wanted``."""
        tokens = self.settings.tokens
        to_the_end = held_to_the_end(list(stages), self.settings, self.stack, 2.0 * self.architecture.hidden * tokens)
        if to_the_end and abs(to_the_end - wanted) < 1.0:
            how = "all layers' inputs and the gradients of all but two of them"
            work = stages[-1].work
            return [("kept to the end by FSDP1's hooks", how, to_the_end - work), ("the layer at work", "", work)]
        total, done = sum(stage.count * stage.kept for stage in stages), 0
        count = sum(stage.count for stage in stages)
        for stage in stages:
            n, kept, work = stage.count, stage.kept, stage.work
            for after in (0, n - 1):
                if abs(total - after * kept + work - wanted) < 1.0:
                    left = count - done - after
                    how = f"{left} layers, {(total - after * kept) / tokens / max(left, 1):,.0f} bytes a token each"
                    return [
                        ("kept by layers that are still to come", how, total - after * kept),
                        ("the layer at work", f"{work / tokens:,.0f} bytes a token × {tokens:,}", work),
                    ]
            total, done = total - n * kept, done + n
        return [("gradient of the embedding's output", f"2 bytes × {self.architecture.hidden:,} × {tokens:,}", wanted)]

    def logits(self) -> Reckoned:
        """The loss's own, or what of it stays in backward."""
        a, s, stack = self.architecture, self.settings, self.stack
        size, tokens = self.terms["logits"], s.tokens
        if not size:
            return "none are there at this moment", "", []
        if self.moment == "backward":
            how = f"{stack.logit_alive:g} bytes × {a.vocab:,} words × {tokens:,} tokens"
            return "what of the logits stays while backward runs", stack.source, [("logits", how, size)]
        forward, backward, head = loss_bytes(a, s, stack, self.fixed, cpu=self.gpu.kind == "cpu")
        if s.beside.teacher is not None:
            return s.beside.teacher.explained_loss(a, s.compute_bytes, tokens, forward)
        words = {
            "logits": "bytes a logit × words × tokens: all logits at once",
            "rows": "some tokens × all words at a time, and their gradient at once",
            "tiles": "some tokens × some words at a time",
            "chunks": "some tokens × all words at a time",
        }[stack.loss]
        each = (
            f"{max(forward, backward) / (a.vocab * tokens):.3g} bytes a logit × {a.vocab:,} words × {tokens:,} tokens"
        )
        if forward >= backward + head:
            return words, stack.source, [("the loss's forward", each, forward)]
        width = f"{head / max(a.vocab * a.hidden, 1):g} bytes × {a.vocab:,} × {a.hidden:,}"
        return words, stack.source, [("the loss's backward", each, backward), ("gradient of the head", width, head)]

    def buffers(self, raised: float, slack: float) -> Reckoned:
        """All that is neither data nor weight: masks, workspaces, unpacked weights, and the allocator's gaps."""
        a, s, shared, whole = self.architecture, self.settings, self.shared, self.shared.whole
        parts: list[Part] = [
            ("allocator", "blocks that no later request fits", slack),
            ("what gathers leave behind", "", whole.stranded),
            ("what is not known for sure", "a lean towards more", raised),
        ]
        if self.moment == "rollout":
            parts.append(("keys and values of the answers", "", kv_cache_bytes(a, s)))
            parts.append(("16-bit copies and gathers", "", self.terms["buffers"] - kv_cache_bytes(a, s)))
            return "what stands beside the data", "", parts
        reused = self.stack.keeps_scratch and s.quantized and self.gpu.kind != "cpu"
        scratch = scratch_bytes(a, s, self.stack) if reused else 0.0
        standing = [
            ("mask of attention", f"{s.rows} × {s.sequence_length:,}² bytes", mask_bytes(a, s, self.stack)),
            ("gradient buckets of DDP", "once more all gradients", shared.bucket),
            ("layers that are whole", "two of the largest", shared.buffers),
            ("cuBLAS", "two workspaces", cublas_workspaces(self.gpu) * (3 if s.graphs else 1)),
            ("weights that are unpacked at once", "the largest block of a layer in 16 bits", scratch),
        ]
        left = self.terms["buffers"] - sum(size for _, _, size in standing)
        dequantized = self.fixed.dequantized if self.moment == "backward" and not reused else 0.0
        gathered = {"loss": whole.loss, "backward": whole.backward}.get(self.moment, 0.0)
        head = self.fixed.unpacked_head if self.moment == "loss" else 0.0
        left -= dequantized + gathered + head
        parts += [
            *standing,
            ("one unpacked weight", f"{_m(a.largest_linear)} × 2 bytes", dequantized),
            ("gathered layers", s.sharing.title, gathered),
            ("the unpacked head", "", head),
            ("16-bit copies that autocast makes of fp32 weights", "", left),
        ]
        return (
            "what stands beside the data",
            "cuBLAS: CUDABlas.cpp of torch; the allocator: runs on A100 and H200",
            parts,
        )

    def context(self) -> Reckoned:
        """The driver's."""
        several = context_bytes(self.gpu, 2) - context_bytes(self.gpu, 1) if self.settings.world_size > 1 else 0.0
        alone = context_bytes(self.gpu, 1) + self.stack.context_gib * GIB
        name = "Python and its libraries" if self.gpu.kind == "cpu" else "CUDA context with lazily loaded kernels"
        parts: list[Part] = [(name, "", alone), ("NCCL", "buffers of its channels", several)]
        return "what the driver takes before anything is allocated", "", parts


def _m(count: float) -> str:
    """A count of parameters."""
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,.0f}"
