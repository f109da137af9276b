"""The teacher of a student: where it is, what it holds in memory, and what its forward passes take.

It is frozen and lies on every device whole. Its pass over a micro-batch comes before the student's, without gradients:
of its layers one is at work at a time, and nothing is kept but the last hidden states of trained positions. Both
heads' logits are made a few rows at a time, in fp32, with the gradient of the student's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .architecture import Architecture
from .errors import HubError, ModelError, RecipeError
from .hardware import GIB, Gpu
from .hub import find_config, read_config
from .inside import local_path
from .plan import TeacherSummary
from .stacks import Stack
from .storage import QUANTIZED_BYTES, fixed_bytes

if TYPE_CHECKING:
    from .memory_terms import Part, Reckoned
    from .recipe import Recipe
    from .settings import Settings
    from .work import Work

#: What makes a folder an adapter, and its weights.
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Rows of logits that are at work at a time.
CHUNK_ROWS = 256
#: fp32 values per logit of the student's head and of the teacher's that are held at the fullest instant of a chunk, and
#: bytes of each that are read and written on the way, by divergence; then what a temperature other than 1 adds to both.
#: Measured on an H200: 8,192 rows of 128,256 words took 30.6, 33.6 and 50.8 ms beside their products, and 10.4 more
#: with a temperature; chunks of 256 rows held 7.5, 7.5 and 9.5 values for each two logits, and one more.
_AT_WORK = {"forward-kl": (4.0, 3.5), "reverse-kl": (4.0, 3.5), "jsd": (5.0, 4.5)}
_MOVED = {"forward-kl": (64.0, 48.0), "reverse-kl": (70.0, 53.0), "jsd": (105.0, 81.0)}
_HEATED = (0.5, 19.0)
#: Vocabularies are padded to multiples of up to some hundred words, which is less than this share of them.
_PADDING = 0.01


@dataclass(frozen=True)
class Found:
    """A teacher by name.

    Args:
        base: hub id or folder of the model.
        adapter: the folder of what was trained on it, if that is what was named.
    """

    base: str
    adapter: Path | None = None


@dataclass(frozen=True)
class Teacher:
    """A teacher as memory and time see it.

    Args:
        name: what plans call it.
        adapter_bytes: of an adapter beside its weights.
        remote: its weights may have to be downloaded.
        divergence, heated: what is made small, and whether at a temperature other than 1.
    """

    name: str
    architecture: Architecture
    quantization: Literal["none", "nf4"] = "none"
    adapter_bytes: float = 0.0
    remote: bool = False
    divergence: str = "forward-kl"
    heated: bool = False

    def _of_logits(self, student: Architecture, table: dict[str, tuple[float, float]], heat: float) -> float:
        """What a row's logits come to: so much for each word of the student's, and of the teacher's."""
        mine, theirs = (each + (heat if self.heated else 0.0) for each in table[self.divergence])
        return mine * student.vocab + theirs * self.architecture.vocab

    def stored_bytes(self, compute: int, stack: Stack) -> float:
        """Bytes of its weights where arithmetic has ``compute`` bytes a number."""
        kept = (self.architecture, "full", 0, "all-linear", self.quantization, compute, compute, compute, "sgd", stack)
        return fixed_bytes(*kept).weights + self.adapter_bytes

    def forward_bytes(self, compute: int, settings: Settings) -> float:
        """Bytes at the fullest instant of its pass: the residual, a norm's input in fp32 and its output, and either
        the parts of one MLP or those of one attention; of packed rows also the mask of their documents."""
        a = self.architecture
        inner = max((layer.inner for layer in a.layers), default=0)
        attended = a.heads * (a.head_dim + a.value_dim) + 2 * a.kv_width
        around = (2 * compute + 4) * a.hidden
        mask = settings.rows * settings.sequence_length**2 if settings.masked else 0
        return float(settings.tokens * (around + compute * max(4 * inner, 2 * attended)) + mask)

    def loss_bytes(self, student: Architecture, compute: int, tokens: int, *, head_bytes: float) -> float:
        """Bytes of the loss: one chunk of both heads' logits, the teacher's states and the gradient of the student's.

        Args:
            head_bytes: of a gradient of the student's head, made in fp32 and rounded; 0 if it stays as it is.
        """
        chunk = 4.0 * min(tokens, CHUNK_ROWS) * self._of_logits(student, _AT_WORK, _HEATED[0])
        return chunk + compute * tokens * (3 * student.hidden + self.architecture.hidden) + head_bytes

    def spent(self, student: Architecture, settings: Settings, work: Work, gpu: Gpu) -> list[Part]:
        """Seconds of one micro-batch, part by part: a forward pass by torch's own kernels, and what both heads' logits
        become."""
        from .traffic import layers_bytes
        from .work import _attention_rate, attention_flops

        a, tokens, compute = self.architecture, work.tokens, settings.compute_bytes
        flops = 2.0 * (a.layer_matmul_weights + a.vocab * a.hidden)
        # Given a mask, attention computes the upper half too, and all documents of a row.
        span, twice = (settings.sequence_length, 2.0) if settings.masked else (work.span, 1.0)
        attended = twice * attention_flops(a, span)
        rate = _attention_rate(gpu, span, a.head_dim, recent=not settings.masked)
        rate *= gpu.fp32_tflops / gpu.bf16_tflops if compute != 2 else 1.0
        moved = tokens * layers_bytes(a, False) * compute / 2
        if self.quantization != "none":
            moved += (QUANTIZED_BYTES[self.quantization] + 2.0 * compute) * a.linear_weights
        rows = self._of_logits(student, _MOVED, _HEATED[1])
        parts = [
            ("matrix products", f"{tokens:,} tokens × {flops / 1e9:,.2f} GFLOP", tokens * flops / work.rate),
            ("attention", f"over {span:,.0f} tokens, {attended / 1e6:,.1f} MFLOP a token", tokens * attended / rate),
            ("norms, rotary embedding, activation, residuals", f"{moved / 1e9:,.1f} GB", moved / work.bandwidth),
        ]
        how = f"{tokens:,} tokens × {rows / 1e6:,.1f} MB"
        return [*parts, ("both heads' logits, their softmaxes and gradient", how, tokens * rows / work.bandwidth)]

    def seconds(self, student: Architecture, settings: Settings, work: Work, gpu: Gpu) -> float:
        """Of one micro-batch: the sum of :meth:`spent`."""
        return sum(seconds for *_, seconds in self.spent(student, settings, work, gpu))

    @property
    def kernels(self) -> int:
        """Kernels of one pass."""
        from .traffic import KERNELS

        return KERNELS * self.architecture.num_layers

    def launched_s(self, gpu: Gpu) -> float:
        """Seconds in which the host starts the kernels of its pass."""
        from .launching import LAUNCH_CPU_S, LAUNCH_S

        return self.kernels * (LAUNCH_CPU_S if gpu.kind == "cpu" else gpu.launch_s or LAUNCH_S)

    def lever(self, weights: float, settings: Settings) -> str:
        """What lowers so many bytes of weights, where the teacher's are the larger part of them; else nothing."""
        packed = self.quantization != "none"
        width = QUANTIZED_BYTES[self.quantization] if packed else settings.compute_bytes
        if 2.0 * width * self.architecture.parameters < weights:
            return ""
        return "a smaller teacher" if packed else "distillation.quantization: nf4"

    def part(self, compute: int, stack: Stack) -> Part:
        """Its weights as a summand of memory."""
        each = "linear layers in 4 bits" if self.quantization != "none" else f"{compute} bytes each"
        how = f"{self.architecture.parameters / 1e6:,.1f} M, {each}"
        return "the frozen teacher", how, self.stored_bytes(compute, stack)

    def explained_loss(self, student: Architecture, compute: int, tokens: int, size: float) -> Reckoned:
        """The loss's bytes with their formula."""
        rows, each = min(tokens, CHUNK_ROWS), self._of_logits(student, _AT_WORK, _HEATED[0])
        chunk = 4.0 * rows * each
        many = each / (student.vocab + self.architecture.vocab)
        how = f"{rows:,} tokens × 4 bytes × {many:.2f} × ({student.vocab:,} + {self.architecture.vocab:,} words)"
        states = "hidden states of trained tokens, the gradient of the student's, and of its head if it is trained"
        parts: list[Part] = [("logits of both heads at work", how, chunk), (states, "", size - chunk)]
        return "some tokens × all words of both heads at a time, in fp32", "counted in forward", parts

    def summary(self, compute: int, stack: Stack) -> TeacherSummary:
        """What the JSON of a plan holds."""
        count = self.architecture.parameters
        size, download = self.stored_bytes(compute, stack) / GIB, 2 * count / GIB if self.remote else 0.0
        return TeacherSummary(self.name, count, self.quantization, size, download)

    def told(self, compute: int, stack: Stack) -> tuple[str, str]:
        """Its name, and what is said of it beside a plan."""
        count, size = self.architecture.parameters, self.stored_bytes(compute, stack)
        held = "in 4 bits" if self.quantization != "none" else f"in {8 * compute} bits"
        many = f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.1f} M"
        large = f"{size / GIB:,.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.0f} MiB"
        why = f"{many} parameters held frozen {held} on each device, {large}"
        return (
            self.name,
            f"{why}; {2 * count / 1e9:,.1f} GB to download where it is not there yet" if self.remote else why,
        )


def find_teacher(named: str) -> Found:
    """What a recipe's ``distillation.teacher`` says.

    Raises:
        ModelError: an adapter does not name its base, or its description can't be read.
    """
    folder = local_path(named, error=ModelError, where="distillation.teacher")
    for place in (folder, folder / "output"):
        if (place / _ADAPTER).is_file():
            base = read_config(place / _ADAPTER).get("base_model_name_or_path")
            if not isinstance(base, str) or not base:
                do = "Write the model that it was trained on there, as base_model_name_or_path."
                raise ModelError(f"its {_ADAPTER} names no base model", where=str(place), do=do)
            return Found(base, place)
        if place.is_dir() and (place / "config.json").is_file():
            return Found(str(place))
    return Found(named)


def teacher_of(recipe: Recipe, student: Architecture) -> Teacher:
    """The teacher of a recipe of method distill.

    Raises:
        ModelError, HubError: it is not to be had.
        RecipeError: its vocabulary is of another size than padding explains.
    """
    asked = recipe.distillation
    found = find_teacher(asked.teacher)
    weights = found.adapter / _ADAPTER_WEIGHTS if found.adapter is not None else None
    size = float(weights.stat().st_size) if weights is not None and weights.is_file() else 0.0
    local = found.adapter is not None or local_path(asked.teacher).is_dir()
    name = Path(asked.teacher).name if local else asked.teacher
    remote = not local_path(found.base).is_dir()
    learned = asked.divergence, asked.temperature != 1
    teacher = Teacher(name, architecture_of(found.base), asked.quantization, size, remote, *learned)
    _require_readable(teacher)
    ours, theirs = student.vocab, teacher.architecture.vocab
    if abs(ours - theirs) > _PADDING * max(ours, theirs):
        what = f"the teacher has {theirs:,} words and the student {ours:,}: they do not share a vocabulary"
        do = "Distil from a larger model of the student's own family, or train by sft on answers that it wrote."
        raise RecipeError(what, where="distillation.teacher", do=do)
    return teacher


@lru_cache(maxsize=16)
def architecture_of(model: str) -> Architecture:
    """That of a teacher by its hub id, folder or config.json.

    Raises:
        ModelError, HubError: it is not to be had.
    """
    try:
        name, config, _ = find_config(model)
    except (ModelError, HubError) as error:
        if error.where != "model":
            raise
        raise type(error)(error.what, where="distillation.teacher", do=error.do) from None
    return Architecture.from_config(config, name)


def _require_readable(teacher: Teacher) -> None:
    """Refuse weights that are packed in a way that they can't be opened from, or not be packed again."""
    packed, name = teacher.architecture.packed, teacher.architecture.name
    if packed is None or (packed.opened and teacher.quantization == "none"):
        return
    if packed.ours and teacher.quantization == "nf4":
        return
    what = f"the teacher's weights are stored as {packed.title}"
    do = "Name the model that it was made from."
    if packed.ours:
        do = "Set distillation.quantization: nf4."
    elif packed.opened:
        do = "Remove distillation.quantization: they are opened as they are read."
    raise ModelError(what, where=f"{name}: config.json", do=do)
