"""Load and quantise the model of a plan, and put its kernels on it; :mod:`.adapt` decides what of it is trained.

What is kept in which number format, by precision and tuning (``planner/stacks.py`` predicts memory from the same
table; ``autocast`` is the format that matrix products run in when it differs from that of the weights):

=============  =========================  =========================  ===========================
precision      full                       lora                       qlora
=============  =========================  =========================  ===========================
``bf16``       weights bf16, no autocast  base bf16, autocast bf16   NF4 base, autocast bf16
``bf16-mixed`` weights fp32, autocast     base fp32, autocast bf16   NF4 base, autocast bf16
``fp16``       weights fp32, autocast     base fp16, autocast fp16   NF4 base, autocast fp16
``fp32``       weights fp32               base fp32                  NF4 base, computes in fp32
=============  =========================  =========================  ===========================

Adapters, their gradients and their optimiser state are fp32 in every column: at a learning rate of 2e-4 an update is
smaller than half a bf16 step of most weights and would be rounded away. Their matrix products still run in 16 bits,
because autocast casts the (small) adapter weights instead of the (large) activations. NF4 is double-quantised
(Dettmers et al. 2023, arXiv:2305.14314); lora-fp8 is qlora on e4m3 instead (``quantize.py``); embeddings, norms and
the output head stay in the 16-bit or fp32 format.
Nothing is upcast for "k-bit training": gradients reach the adapters without it under non-reentrant checkpointing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...planner.errors import FinetuiError, HardwareError, HubError, ModelError, RecipeError, first_line
from ...planner.inside import inside
from ...planner.options import LORA_TYPES
from ...planner.plan import Resolved
from ..events import Fallback
from ..folders import cache_folder
from ..pickles import refuse
from .files import require_sound
from .misfit import UNREADABLE, explained, refused_config, unannounced
from .packed import compute_in, opening, packed_checkpoint, plain, require
from .quantize import fp8_config, not_in_8_bits
from .remote_code import refusal, trusted
from .weights import Reading, around, stored_tensors

Emit = Callable[[Any], object]
"""Receives event payloads."""


@dataclass(frozen=True)
class Numerics:
    """The format of the (base) weights, and of matrix products when it is another one."""

    weights: torch.dtype
    autocast: torch.dtype | None

    @classmethod
    def of(cls, resolved: Resolved) -> Numerics:
        """The row of the table above.

        Raises:
            HardwareError: fp16 on the CPU, which has neither its matrix products nor a loss scaler.
        """
        adapters = not resolved.trains_base
        if resolved.precision == "fp16":
            if resolved.device == "cpu":
                raise HardwareError("fp16 needs a GPU", where="hardware.precision", do="Use fp32 or bf16 on the CPU.")
            return cls(torch.float16 if adapters else torch.float32, torch.float16)
        if resolved.precision == "bf16-mixed":
            return cls(torch.float32, torch.bfloat16)
        if resolved.precision == "bf16":
            return cls(torch.bfloat16, torch.bfloat16 if adapters else None)
        return cls(torch.float32, None)

    def context(self, device: torch.device) -> torch.autocast:
        """The autocast context of a forward pass outside the trainer."""
        return torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)


def locate(model: str) -> Path:
    """The folder of a model: a given one, the shipped tiny one with its weights made, or a download from the Hub.

    Raises:
        ModelError: the folder is no checkpoint, or one that is damaged or not all there.
        HubError: the Hub can't be reached, does not know the model, or wants a licence accepted first.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                "this folder has no config.json", where=model, do="Give a checkpoint in Hugging Face format."
            )
        names = [path.name for path in folder.iterdir()]
        refuse(folder, names)
        if not any(name.endswith(".safetensors") for name in names):
            return _make_weights(folder)
        return _whole(folder)
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError("there is no such folder", where=model, do="Give a folder or a hub id such as Qwen/Qwen3-8B.")
    return _download(model)


def _whole(folder: Path) -> Path:
    """A checkpoint folder, once none of its files is somewhere else, and each is what it says."""
    for path in folder.iterdir():
        inside(folder, path.name, error=ModelError)
    require_sound(folder)
    return folder


def _make_weights(folder: Path) -> Path:
    from . import tiny

    if tiny.is_tiny(folder):
        return tiny.ensure_tiny_model(cache_folder())
    raise ModelError("this folder holds no weights", where=str(folder), do="It needs *.safetensors files.")


_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*", "*.gguf", "*.msgpack", "*.h5"]


def _download(model: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot(*patterns: str) -> Path:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(patterns), ignore_patterns=_UNWANTED))

    try:
        folder = snapshot(*_WANTED)
        if not any(folder.glob("*.safetensors")):
            refuse(model, huggingface_hub.list_repo_files(model))
    except errors.GatedRepoError:
        do = f"Accept its licence on https://huggingface.co/{model}, then set HF_TOKEN or run: hf auth login"
        raise HubError("this model is gated and your account has no access to it", where=model, do=do) from None
    except errors.RepositoryNotFoundError:
        do = "Check the spelling; for a private model set HF_TOKEN."
        raise HubError("the Hub has no such model", where=model, do=do) from None
    except errors.LocalEntryNotFoundError:
        do = "Connect to the network (or set HF_ENDPOINT to a mirror), or give a local folder."
        raise HubError("the Hub can't be reached and the model is not in the cache", where=model, do=do) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise HubError(f"the download failed ({error})", where=model, do="Try again; it resumes.") from error
    return _whole(folder)


def stored_dtype(folder: Path) -> torch.dtype:
    """The format that a checkpoint's weights are stored in, as its config says (fp32 if it does not)."""
    for told in reversed(_config(folder)):
        if name := told.get("dtype") or told.get("torch_dtype"):
            found = getattr(torch, str(name), None)
            return found if isinstance(found, torch.dtype) else torch.float32
    return torch.float32


def already_quantised(folder: Path) -> bool:
    """Whether a checkpoint is stored in a format that transformers knows as a quantisation."""
    return any("quantization_config" in told for told in _config(folder))


def head_size(folder: Path) -> int | None:
    """Numbers per attention head, as far as the config says."""
    for told in _config(folder):
        with contextlib.suppress(KeyError, TypeError, ZeroDivisionError):
            return int(told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"])
    return None


def _config(folder: Path) -> list[dict[str, Any]]:
    """A model's config, that of its text part first; none where it can't be read, which loading will complain about."""
    try:
        whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return (
        [told for told in (whole.get("text_config"), whole) if isinstance(told, dict)]
        if isinstance(whole, dict)
        else []
    )


def load_tokenizer(
    folder: Path, chat_template: str = "auto", new_tokens: Sequence[str] = ()
) -> tuple[Any, tuple[str, ...]]:
    """The tokenizer, ready for training, and what had to be decided for that.

    Args:
        new_tokens: words to add after all others.

    Raises:
        ModelError: there is none, or it can't be read.
        RecipeError: a new token is one already.
        DataError: the chat template of the recipe is not usable.
    """
    from transformers import AutoTokenizer

    from ..data.template import prepare_tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trusted(folder))
    except FinetuiError:
        raise
    except Exception as error:  # the library under it raises nothing more special
        if "trust_remote_code" in str(error):
            raise refusal(folder) from None
        do = "The folder needs tokenizer.json, or the files that its tokenizer class reads."
        what = f"the tokenizer can't be loaded ({first_line(error)})"
        raise refused_config(folder) or ModelError(what, where=str(folder), do=do) from error
    notes = prepare_tokenizer(tokenizer, chat_template)
    known = [token for token in new_tokens if token in tokenizer.get_vocab()]
    if known:
        do = "Remove it from new_tokens."
        raise RecipeError(f"{known[0]!r} is a token of this model already", where="tuning.new_tokens", do=do)
    tokenizer.add_tokens(list(new_tokens))
    return tokenizer, notes


def read_ahead(folder: Path, resolved: Resolved, device: torch.device) -> Reading | None:
    """Begin to read a checkpoint onto a GPU, if its weights are used as they are stored; see :mod:`.weights`."""
    if device.type != "cuda" or resolved.quantization != "none" or resolved.method == "reward":
        return None
    try:
        stored = stored_tensors(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading it will say what is wrong with it
    wanted = Numerics.of(resolved).weights
    return Reading(stored, device) if stored and all(t.dtype is wanted for t in stored.values()) else None


def load_base(
    folder: Path,
    resolved: Resolved,
    device: torch.device,
    emit: Emit,
    *,
    dtype: torch.dtype | None = None,
    reading: Reading | None = None,
) -> Any:
    """The model itself on ``device``, quantised if the plan says so.

    Args:
        dtype: format of the weights; None is what :class:`Numerics` says for training.
        reading: of :func:`read_ahead`, if the weights of this folder are on their way already.

    Raises:
        ModelError: the checkpoint can't be read, or lacks weights that the architecture has.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    scores = resolved.method == "reward"
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    numerics = Numerics.of(resolved)
    dtype = dtype or numerics.weights
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": resolved.attention, "use_safetensors": True}
    options["trust_remote_code"] = trusted(folder)
    packed = packed_checkpoint(folder)
    if packed is not None:
        require(packed, resolved.quantization, folder)
    if packed is not None and packed.opened:
        options["quantization_config"] = opening(packed)
    elif resolved.quantization == "nf4":
        if packed is None:  # else it is in NF4 already
            options["quantization_config"] = nf4_config(numerics)
        options["device_map"] = {"": device}
    elif resolved.quantization == "fp8":
        options["quantization_config"] = fp8_config()
        options["device_map"] = {"": device}
    if device.type == "cuda":
        options["device_map"] = {"": device}
    if scores:
        options["num_labels"] = 1
        torch.manual_seed(resolved.seed)  # of the new head
    loaded: Any
    told: list[str] = []
    try:
        read = reading.tensors() if reading is not None else {}

        def load() -> Any:
            built = around(read, folder, options) if read else None
            return built or kind.from_pretrained(str(folder), output_loading_info=True, **options)

        with unannounced() as told:
            try:
                loaded = load()
            except ValueError as error:
                if "attention" not in str(error) or resolved.attention == "eager":
                    raise
                options["attn_implementation"] = "eager"
                loaded = load()
                emit(Fallback("attention: eager instead of sdpa", "the architecture has no scaled-dot-product path"))
    except UNREADABLE as error:
        if "trust_remote_code" in str(error):
            raise refusal(folder) from None
        raise explained(error, folder, told) from error
    model, info = loaded
    if (left := sorted(info["unexpected_keys"])) and not scores:  # whose class has no output head
        emit(Fallback(f"weights left out: {_some(left)}", "config.json has no place for them"))
    missing = sorted(set(info["missing_keys"]) - ({"score.weight"} if scores else set()))
    if missing:
        what = f"the checkpoint lacks weights of the model: {_some(missing)}"
        raise ModelError(what, where=str(folder), do="It would be trained from random numbers there. Use a whole one.")
    if resolved.quantization == "fp8" and (why := not_in_8_bits(model, numerics.autocast or dtype)):
        emit(Fallback("products of e4m3 weights in their input's format", why))
    if packed is not None:
        if resolved.quantization == "none":
            model = plain(model, packed, dtype)
        compute_in(model, numerics.autocast or dtype)
    model.config.use_cache = False
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks a layer for good at its first inference on such a CPU, and the packed product
            # has no gradient: training after an evaluation would lose every adapter below it, without an error.
            module.support_avx512bf16_for_cpu = False
    return model


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return f"{len(names)} ({shown})"


def nf4_config(numerics: Numerics) -> Any:
    """How bitsandbytes packs and computes: NF4 whose scales are quantised too (arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=numerics.autocast or numerics.weights,
    )


def patch_kernels(model: Any, resolved: Resolved, device: torch.device, emit: Emit) -> bool:
    """Put the fused kernels on a model on CUDA; each kind of module left as it was is a Fallback event.

    Returns:
        Whether every decoder layer runs as one function, and so keeps for its backward pass what the plan's
        checkpointing allows by itself: the layers must not be checkpointed from outside then.
    """
    if device.type != "cuda" or resolved.kernels == "off":
        return False
    from ...kernels.patch import KERNELS, patch_model
    from .layers import keeping

    numerics = Numerics.of(resolved)
    # Whole layers are for weights that are trained themselves, or frozen with LoRA pairs; products are for pairs.
    pairs = resolved.tuning in LORA_TYPES
    unfit = {"decoder_layer": not pairs and not resolved.trains_base, "lora": not pairs}
    wanted = [kernel for kernel in KERNELS if not unfit.get(kernel)]
    dtype = numerics.autocast or numerics.weights
    report = patch_model(model, only=wanted, dtype=dtype, keeping=keeping(resolved))
    for line in report.summary():
        print(f"kernels: {line}")
    left: dict[tuple[str, str], int] = {}
    for item in report.left:
        left[item.kernel, item.why] = left.get((item.kernel, item.why), 0) + 1
    for (kernel, why), count in left.items():
        emit(Fallback(f"kernel {kernel}: {count} modules run as they were", why))
    layers = [item.replaced for item in report.items if item.kernel == "decoder_layer"]
    # A hybrid has layers without attention besides, which are none of ours, and may be none that look like ours.
    return all(layers) and len(layers) == int(model.config.get_text_config().num_hidden_layers)


def tell_fallbacks(model: Any, emit: Emit) -> None:
    """After a first step: which modules have a kernel that their inputs in training turned out not to fit."""
    from ...kernels.patch import fallbacks

    left: dict[tuple[str, str], int] = {}
    for item in fallbacks(model):
        left[item.kernel, item.why] = left.get((item.kernel, item.why), 0) + 1
    for (kernel, why), count in left.items():
        emit(Fallback(f"kernel {kernel}: {count} modules run as they were after all", why))
