"""Talk to what a run made: the tuned model, and the base model beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..planner.errors import HardwareError, RunError
from ..planner.plan import Resolved
from .checkpoints.store import latest
from .models.adapt import grow_vocabulary
from .models.files import require_sound
from .models.load import Numerics, load_base, load_tokenizer, locate, stored_dtype
from .models.misfit import with_adapter
from .run import Run

Voice = Literal["tuned", "base"]


@dataclass(frozen=True)
class Generation:
    """How an answer is made. Temperature 0 takes the likeliest token each time; ``top_p`` counts only above it."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass
class Tuned:
    """A run's model in memory.

    ``model`` is a ``PeftModel``, whose adapter can be switched off, or a full model, beside which the base is loaded
    when it is first asked for.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    folder: Path
    base_name: str
    resolved: Resolved
    _base: Any = None

    @contextlib.contextmanager
    def voice(self, *, base: bool = False) -> Iterator[Any]:
        """The model to call; with ``base`` the one that training began from."""
        if not base:
            yield self.model
        elif hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield self.model
        else:
            if self._base is None:
                where = locate(self.base_name)
                plain = load_base(where, self.resolved, self.device, _say_nothing, dtype=stored_dtype(where))
                self._base = plain.eval()
            yield self._base

    def context(self) -> torch.autocast:
        """The autocast context that the model was trained in."""
        numerics = Numerics.of(self.resolved) if not self.resolved.trains_base else Numerics(torch.float32, None)
        return numerics.context(self.device)


def _say_nothing(_: object) -> None:
    pass


def result_folder(run: Run) -> Path:
    """Where the best that a run has to offer lies: its output, else its newest sound checkpoint.

    Raises:
        RunError: it has written neither yet.
        ModelError: its output is damaged or not all there any more.
    """
    if (run.output_path / "tokenizer_config.json").is_file():
        require_sound(run.output_path)
        return run.output_path
    newest = latest(run.path / "checkpoints").checkpoint
    if newest is None:
        do = "Let it run to its first checkpoint, or stop it: that writes one."
        raise RunError("this run has not written a model yet", where=run.name, do=do)
    return newest.path


def load_tuned(run: Run, *, device: str | None = None) -> Tuned:
    """Load a run's model for inference, in the formats that it was trained in.

    Args:
        device: ``cuda`` or ``cpu``; None is what is there.

    Raises:
        RunError: the run has no model yet, or one that does not talk.
        UserError: its base model is not to be had.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise HardwareError("there is no usable GPU", do="Leave the device out to use the CPU.")
    resolved = _for_inference(run.plan.resolved, kind)
    if resolved.method == "reward":
        do = "Load it with AutoModelForSequenceClassification to score answers."
        raise RunError("a reward model scores answers, it does not write any", where=run.name, do=do)
    folder, place = result_folder(run), torch.device(kind)
    name = run.recipe.model
    tokenizer, _ = load_tokenizer(folder)
    if resolved.trains_base:
        model = load_base(folder, resolved, place, _say_nothing, dtype=stored_dtype(folder))
    else:
        base = load_base(locate(name), resolved, place, _say_nothing)
        if resolved.options.new_tokens:
            grow_vocabulary(base, tokenizer, len(resolved.options.new_tokens))
        model = with_adapter(base, folder, name)
    model.to(place) if resolved.quantization == "none" else None
    return Tuned(model.eval(), tokenizer, place, folder, name, resolved)


def _for_inference(resolved: Resolved, kind: str) -> Resolved:
    """The plan's formats on the device that is there; the CPU has no fp16 products worth the name."""
    precision = "fp32" if kind == "cpu" and resolved.precision == "fp16" else resolved.precision
    return dataclasses.replace(resolved, device=kind, precision=precision)


@dataclass
class ChatSession:
    """A conversation with a run's model, or with several voices of it that each keep their own history.

    Args:
        run: what to talk to.
        base: let the base model answer too.
        generation: how answers are made.
        device: ``cuda`` or ``cpu``; None is what is there.
    """

    run: Run
    base: bool = False
    generation: Generation = Generation()
    device: str | None = None

    def __post_init__(self) -> None:
        self.tuned = load_tuned(self.run, device=self.device)
        self.history: dict[Voice, list[dict[str, str]]] = {voice: [] for voice in self.voices}

    @property
    def voices(self) -> tuple[Voice, ...]:
        """Who answers, in order."""
        return ("tuned", "base") if self.base else ("tuned",)

    def clear(self) -> None:
        """Forget the conversation."""
        for turns in self.history.values():
            turns.clear()

    def stream(self, text: str, voice: Voice = "tuned") -> Iterator[str]:
        """Yield the answer piece by piece; both sides are remembered. Leaving the loop early ends the generation."""
        turns = self.history.setdefault(voice, [])
        turns.append({"role": "user", "content": text})
        ids = self._prompt(turns)
        pieces: list[str] = []
        try:
            for piece in self._generate(ids, base=voice == "base"):
                pieces.append(piece)
                yield piece
        finally:
            turns.append({"role": "assistant", "content": "".join(pieces).strip()})

    def answer(self, text: str, voice: Voice = "tuned") -> str:
        """The whole answer at once."""
        return "".join(self.stream(text, voice)).strip()

    def _prompt(self, turns: list[dict[str, str]]) -> list[int]:
        """The conversation in tokens; its oldest turns are forgotten when the model can't hold it."""
        tokenizer, config = self.tuned.tokenizer, self.tuned.model.config.get_text_config()
        room = (getattr(config, "max_position_embeddings", None) or 1 << 30) - self.generation.max_new_tokens
        while True:
            if self.tuned.resolved.method == "pretrain":  # it knows text, not turns
                ids = tokenizer(turns[-1]["content"])["input_ids"]
            else:
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) <= max(room, 16) or len(turns) < 3:
                return list(ids)
            del turns[:2]

    def _generate(self, ids: list[int], *, base: bool) -> Iterator[str]:
        """Generate in a thread of its own and yield its text as it comes."""
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
        left = threading.Event()
        failures: list[BaseException] = []

        class Left(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                return torch.full((input_ids.shape[0],), left.is_set(), device=input_ids.device)

        prompt = torch.tensor([ids], device=self.tuned.device)
        settings = self._settings()

        def work() -> None:
            try:
                with torch.inference_mode(), self.tuned.voice(base=base) as model, self.tuned.context():
                    model.generate(
                        input_ids=prompt,
                        attention_mask=torch.ones_like(prompt),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Left()]),
                        use_cache=True,
                        **settings,
                    )
            except BaseException as error:
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=work, name="generate", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            left.set()
            thread.join()
        if failures:
            raise failures[0]

    def _settings(self) -> dict[str, Any]:
        from .data.template import stop_token_ids

        chosen: dict[str, Any] = {
            "max_new_tokens": self.generation.max_new_tokens,
            "eos_token_id": stop_token_ids(self.tuned.tokenizer),
            "pad_token_id": self.tuned.tokenizer.pad_token_id,
            "do_sample": self.generation.temperature > 0,
        }
        if self.generation.temperature > 0:
            chosen |= {"temperature": self.generation.temperature, "top_p": self.generation.top_p}
        return chosen
