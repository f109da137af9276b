"""Checkpoints whose weights are stored in fewer bits already: which of them can be trained, and under which tuning.

``quantization_config`` in a config.json says so (huggingface.co/docs/transformers/main/quantization/overview). Three
kinds are told apart. NF4 as bitsandbytes writes it is what finetui makes itself for qlora, and is taken as it is. MXFP4
(gpt-oss) and e4m3 with a scale per block (DeepSeek V3, Qwen3-FP8) are opened as they are read: the model is then one in
16 bits, and planned as such. Everything else, GPTQ and AWQ among it, needs kernels of its own for its backward pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ModelError

if TYPE_CHECKING:
    from .recipe import Recipe

#: Formats that transformers opens while it reads them, and what people call them.
OPENED: dict[str, str] = {"mxfp4": "MXFP4", "fp8": "FP8"}
_TITLES = {
    **OPENED, "gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "aqlm": "AQLM", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors", "auto-round": "AutoRound",
}  # fmt: skip
#: Modules that NF4 of finetui's own leaves in 16 bits too; the others are of towers that a text model does not have.
_LEFT = re.compile(r"(^|\.)(lm_head|embed_out|output|multi_modal_projector|merger|modality_projection|router)$|vision")
_SUFFIX = re.compile(
    r"[-_.](gptq|awq|hqq|fp8|(unsloth-)?bnb-4bit|4bit|int4|int8|w4a16|w8a8|gguf)([-_.](int)?[0-9a-z]+)*$", re.IGNORECASE
)


@dataclass(frozen=True)
class Packed:
    """How weights are stored; ``ours`` is true of what finetui's own qlora would have made of them."""

    method: str
    bits: int = 0
    ours: bool = False
    why_not: str = ""
    """What of it is not as finetui would have it, where it is bitsandbytes' 4-bit format."""

    @property
    def title(self) -> str:
        """What people call the format."""
        name = _TITLES.get(self.method, self.method)
        return f"{name} ({self.bits} bits)" if self.bits and self.method not in OPENED else name

    @property
    def opened(self) -> bool:
        """It is stored in few bits, and read into 16."""
        return self.method in OPENED


def packed_weights(config: Mapping[str, Any]) -> Packed | None:
    """What a config.json says of the weights' format; None where they are stored as plain numbers."""
    texts = (config, *(config.get(key) for key in ("text_config", "llm_config", "language_config")))
    told = next(
        (t["quantization_config"] for t in texts if isinstance(t, Mapping) and t.get("quantization_config")), None
    )
    if not isinstance(told, Mapping):
        return None
    four = told.get("load_in_4bit") or told.get("_load_in_4bit")
    eight = told.get("load_in_8bit") or told.get("_load_in_8bit")
    method = "bitsandbytes" if four or eight else str(told.get("quant_method") or "unnamed").lower()
    if method != "bitsandbytes":
        bits = told.get("bits", told.get("nbits", told.get("w_bit", 0)))
        return Packed(method, bits if type(bits) is int else 0)
    if not four:
        return Packed(method, 8)
    why = _unlike_ours(told)
    return Packed(method, 4, ours=not why, why_not=why)


def _unlike_ours(told: Mapping[str, Any]) -> str:
    if told.get("bnb_4bit_quant_type", "fp4") != "nf4":
        return "they are FP4, not NF4"
    if not told.get("bnb_4bit_use_double_quant"):
        return "their scales are not quantised a second time"
    left = [str(name) for name in told.get("llm_int8_skip_modules") or () if not _LEFT.search(str(name))]
    return f"some of them are not packed ({', '.join(left[:2])})" if left else ""


def check_packed(recipe: Recipe, packed: Packed | None, name: str) -> None:
    """Refuse what can't be trained, before anything is downloaded.

    Args:
        name: of the model.

    Raises:
        ModelError: this format can't be trained at all, or not with this tuning.
    """
    if packed is not None:
        _check(packed, recipe.tuning.type, recipe.tuning.stored, name)


def trainable_as(packed: Packed | None, tunings: Sequence[str], name: str) -> list[str]:
    """Those of ``full``, ``lora`` and ``qlora`` that can be trained on weights that are packed so.

    Raises:
        ModelError: none of them can.
    """
    possible, refused = [], None
    for tuning in tunings:
        try:
            if packed is not None:
                _check(packed, tuning, "nf4" if tuning == "qlora" else "none", name)
            possible.append(tuning)
        except ModelError as error:
            refused = error
    if refused is not None and not possible:
        raise refused
    return possible


def _check(packed: Packed, tuning: str, stored: str, name: str) -> None:
    if (packed.opened and stored == "none") or (packed.ours and stored == "nf4"):
        return
    original = _SUFFIX.sub("", name)
    source = "the model that it was made from" + (f" (by its name {original})" if original != name else "")
    if packed.opened:
        what = f"its weights are stored as {packed.title}, and can't be packed as {stored.upper()} while they are read"
        do = f"Use tuning: lora, which trains on 16 bits; or {source}."
    elif packed.ours:
        what = f"its weights are stored in NF4, which tuning {tuning} can't be put on"
        do = f"Use tuning: qlora; or {source}."
    else:
        do = f"Use {source}, with tuning: qlora: finetui packs it as it reads it."
        what = f"its weights are stored as {packed.title}, through which finetui can't train"
        if packed.why_not:
            what = f"its weights are stored in 4 bits by bitsandbytes, but {packed.why_not}"
    raise ModelError(what, where=f"{name}: config.json", do=do)
