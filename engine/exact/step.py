"""One optimiser step of a plan, followed on fake tensors through the real model code.

The step is a steady one: the optimiser's states are there, and so are the gradients of earlier micro-batches where the
plan accumulates. Forward runs under autocast as the trainer would; its loss is that of the framework whose run is
predicted; backward and optimiser are torch's own. The :class:`~.ledger.Ledger` counts what is alive at each instant.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...planner.errors import ModelError, RecipeError, first_line
from ...planner.plan import Resolved
from ...planner.storage import ADAM32_BYTES, optimizer_bytes
from ..evaluate import score
from ..models.adapt import adapt
from ..models.layers import checkpoint_layers
from ..models.load import Numerics, patch_kernels
from ..trainers.walks import shorten_walks
from .ledger import Ledger, Peak
from .pretend import pretended
from .shapes import make_fake, on_meta, quantise, recognised, text_config, twin

#: Frameworks whose code is at hand.
FOLLOWED = ("finetui", "trl", "transformers")
#: Optimisers that are run; of others the states are entered by their sizes.
_RUN = ("adamw", "sgd", "adafactor")


@dataclass
class Followed:
    """What one step showed. Bytes of one device; ``notes`` say what was not followed, and how it was accounted for."""

    peaks: dict[str, Peak]
    parameters: int
    trainable: int
    notes: list[str] = field(default_factory=list)
    versions: str = ""

    @property
    def moment(self) -> str:
        """The fullest moment."""
        return max(self.peaks, key=lambda name: self.peaks[name].bytes)

    @property
    def allocated(self) -> int:
        return self.peaks[self.moment].bytes


def follow(
    config: Mapping[str, Any], resolved: Resolved, name: str = "model", *, framework: str = "finetui",
    masked: bool = False,
) -> Followed:  # fmt: skip
    """Follow one step.

    Args:
        config: the parsed config.json.
        resolved: what runs, and how.
        framework: whose loss and adapters: one of :data:`FOLLOWED`.
        masked: whether rows are padded, so that a framework that hands masks to attention makes one.

    Raises:
        ModelError: transformers can't build the model, or its code asks for values that only weights would give.
        RecipeError: a part of the plan is not followed.
    """
    _possible(resolved, framework)
    numerics = Numerics.of(resolved)
    text = text_config(config, name, resolved.attention)
    notes: list[str] = []
    small = twin(text) if framework == "finetui" and resolved.kernels != "off" else None
    model = on_meta(text, numerics.weights, name).eval()  # as from_pretrained gives it
    counted = sum(p.numel() for p in model.parameters())
    if resolved.quantization != "none":
        quantise(model, resolved.quantization, numerics)
    with torch.device("meta"):
        model = adapt(model, resolved, name)
    if framework != "finetui" and not resolved.trains_base:
        _as_peft_has_it(model, brief=framework == "trl" and resolved.quantization == "nf4")
    ledger = Ledger()
    packed = resolved.packing or (masked and framework != "finetui")
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if small is not None:  # first: what is recognised is run with real numbers
            stack.enter_context(recognised(small, numerics.autocast or numerics.weights))
        stack.enter_context(pretended(packed=packed))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(ledger)
        try:
            return _Step(model, resolved, numerics, ledger, framework, notes, patched=small is not None).run(counted)
        except (NotImplementedError, RuntimeError, AssertionError, AttributeError, TypeError) as error:
            if _ours(error):
                raise
            what = f"its code can't be followed without weights ({first_line(error)})"
            raise ModelError(what, where=name, do="Plan without --exact.") from error


def _ours(error: Exception) -> bool:
    """Whether finetui's own code raised an error, so that it is a defect and says nothing about the model."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = str(frame.f_globals.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]
    return ours and not isinstance(error, RuntimeError)  # which torch raises in the name of whoever called it


def versions() -> str:
    """The libraries whose code is followed, as in ``transformers 5.23.0, peft 0.21.2``."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "trl"))


def _possible(resolved: Resolved, framework: str) -> None:
    if framework not in FOLLOWED:
        do = f"Use {', '.join(FOLLOWED)}, or plan without --exact."
        raise RecipeError(f"the code of {framework} is not followed", where="--framework", do=do)
    if resolved.method not in ("sft", "pretrain"):
        do = "Plan without --exact."
        raise RecipeError(f"the loss of {resolved.method} is not followed", where="method", do=do)
    if resolved.strategy not in ("single", "ddp"):
        what = f"{resolved.strategy} shares what one device would hold, which is not followed"
        raise RecipeError(what, where="hardware.strategy", do="Plan without --exact.")


def _as_peft_has_it(model: Any, *, brief: bool) -> None:
    """PEFT's own cast of inputs, which the engine switches off; ``brief``: TRL's 16-bit adapters on 4-bit weights."""
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True
    for parameter in model.parameters():
        if brief and parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def _backward(loss: torch.Tensor) -> None:
    """``loss.backward()``, which would leave the pretence, so that layers would be recomputed as on the CPU."""
    one = torch.ones_like(loss)
    torch.autograd.graph._engine_run_backward(
        (loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Step:
    def __init__(
        self, model: Any, resolved: Resolved, numerics: Numerics, ledger: Ledger, framework: str,
        notes: list[str], *, patched: bool,
    ) -> None:  # fmt: skip
        self.resolved, self.numerics, self.ledger, self.framework = resolved, numerics, ledger, framework
        self.notes = notes
        make_fake(model, ledger, adapted=not resolved.trains_base)
        self.model = model
        self.whole = patched and patch_kernels(model, resolved, torch.device("cuda"), lambda _: None)
        if not self.whole:
            if resolved.checkpointing == "offload":
                do = "Use checkpointing: full or selective, or plan without --exact."
                raise RecipeError(
                    "what transformers itself moves is not followed", where="hardware.checkpointing", do=do
                )
            checkpoint_layers(model, resolved, lambda _: None)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if framework == "finetui":
            shorten_walks(self.model, self.trained)
        self.model.train()

    def run(self, counted: int) -> Followed:
        """Set-up, the measured step, and what it showed."""
        ledger = self.ledger
        loss_of = self._loss()
        with ledger.during("setup", "optimizer"):
            optimizer = self._optimizer()
        ledger.peaks.clear()
        batch = self._batch()
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._is_gradient)
        with ledger.during("loss", "activations"):
            loss = loss_of(batch)
        with ledger.during("backward", "logits"):
            _backward(loss)
        del loss
        with ledger.during("optimizer", "buffers"):
            optimizer()
        peaks = {name: ledger.peaks[name] for name in ("loss", "backward", "optimizer")}
        return Followed(peaks, counted, sum(p.numel() for p in self.trained), self.notes, versions())

    def _is_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.enter(parameter.grad, "gradients")

    def _batch(self) -> dict[str, Any]:
        shape = (self.resolved.micro_batch, self.resolved.sequence_length)
        with self.ledger.during("setup", "activations"):
            ids = torch.zeros(shape, dtype=torch.long)
            batch = {"input_ids": ids, "labels": torch.zeros_like(ids)}
            if self.resolved.packing:
                batch["position_ids"] = torch.zeros_like(ids)
            else:
                batch["attention_mask"] = torch.ones_like(ids)
        return batch

    # --- loss

    def _loss(self) -> Any:
        """The function from a batch to its loss, as the framework's trainer has it."""
        if self.framework == "transformers":
            return self._all_logits
        from trl.trainer.utils import add_fused_lm_head

        outputs = ("log_probs", "entropy", "is_top1")
        add_fused_lm_head(self.causal, outputs=outputs)
        if self.framework == "finetui":
            from ..trainers.head import give_token_loss

            with self.ledger.during("setup", "activations"):
                why = "mixture of experts" if self._routed() else give_token_loss(self.model, self._autocast())
            if not why:
                self._mark_head()
                return self._token_loss
        self._mark_head()
        return self._tiles

    def _routed(self) -> bool:
        return bool(getattr(self.causal.config, "output_router_logits", False))

    def _mark_head(self) -> None:
        """What is made after the backbone's last hidden states, and before their gradient, is the loss's."""

        def forward(_module: Any, _args: Any, out: Any) -> None:
            self.ledger.term = "logits"
            hidden = out[0] if isinstance(out, tuple) else out.last_hidden_state
            if hidden.requires_grad:
                hidden.register_hook(self._head_is_done)

        self.causal.base_model.register_forward_hook(forward)

    def _head_is_done(self, _gradient: torch.Tensor) -> None:
        self.ledger.term = "activations"

    def _autocast(self) -> Any:
        return torch.autocast("cpu", self.numerics.autocast or torch.bfloat16, enabled=bool(self.numerics.autocast))

    def _token_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        from ...kernels.attention import Documents
        from ..trainers.head import Wanted
        from ..trainers.unasked import no_masks, told

        inputs = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
        rows, length = batch["input_ids"].shape
        spared = False  # of packed rows the one mask is counted that the planner has for them
        if self.resolved.packing:
            lengths = (length // 2, length - length // 2) * rows
            inputs["documents"] = Documents(lengths, torch.zeros(len(lengths) + 1, dtype=torch.int32))
        elif self.whole:
            inputs, spared = told(inputs, self.causal.config.get_text_config())
        wanted = Wanted(torch.ones(()), rows * (length - 1))
        with self._autocast(), no_masks() if spared else contextlib.nullcontext():
            out = self.model(**inputs, use_cache=False, token_loss=wanted)
        loss: torch.Tensor = out.loss
        return loss

    def _tiles(self, batch: dict[str, Any]) -> torch.Tensor:
        with self._autocast():
            scored = score(self.model, batch, fused=True, routed=self._routed())
        return scored.loss if scored.auxiliary is None else scored.loss + scored.auxiliary

    def _all_logits(self, batch: dict[str, Any]) -> torch.Tensor:
        self._mark_head()
        with self._autocast():
            out = self.model(**batch, use_cache=False)
        # accelerate wraps forward so that what it returns is fp32 (``convert_outputs_to_fp32``).
        if self.numerics.autocast:
            out.logits.float()
        loss: torch.Tensor = out.loss
        return loss

    # --- optimiser

    def _optimizer(self) -> Any:
        """States as after a first step; answers with the function that takes the next one."""
        resolved, name = self.resolved, self.resolved.optimizer
        width = self.trained[0].element_size()
        if name not in _RUN:
            return self._sized(name, width)
        if name == "adamw":
            made: Any = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        elif name == "sgd":
            made = torch.optim.SGD(self.trained, lr=1e-4)
        else:
            from transformers import Adafactor

            made = Adafactor(self.trained, lr=1e-4, scale_parameter=False, relative_step=False)
        self._fill_gradients()
        with self.ledger.during("setup", "optimizer"):
            made.step()
        if resolved.accumulation == 1:  # else those of earlier micro-batches stay
            for parameter in self.trained:
                parameter.grad = None
        return made.step

    def _fill_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)
            self.ledger.enter(parameter.grad, "gradients")

    def _wide(self, name: str) -> int:
        """Trained parameters of embeddings, whose states stay in 32 bits under an 8-bit optimiser."""
        if not name.endswith("8bit") or name.startswith("paged"):
            return 0
        tables = {id(m.weight): m.weight for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        return sum(weight.numel() for weight in tables.values() if weight.requires_grad)

    def _sized(self, name: str, width: int) -> Any:
        state, temporary = optimizer_bytes(name, width)
        self.notes.append(f"the states of {name} are counted by their size, not made")
        total = sum(p.numel() for p in self.trained)
        largest = max(p.numel() for p in self.trained)
        self.states = torch.empty(round(state * total + (ADAM32_BYTES - state) * self._wide(name)), dtype=torch.uint8)
        if self.resolved.accumulation > 1:
            self._fill_gradients()

        def step() -> None:
            torch.empty(round(temporary * largest), dtype=torch.uint8)

        return step
