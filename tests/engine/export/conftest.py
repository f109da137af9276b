"""Small models of many families, tokenizers of many kinds, and llama.cpp itself where xllamacpp is installed."""

from __future__ import annotations

import ctypes as c
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = (
    "red like a rose", "blue like the sky", "green as grass", "Don't you'll WE'VE 12345 67 890", "日本語 テキスト 🚀",
    "def f(x):\n        return x", "naïve café  — “quotes”…",
)  # fmt: skip


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Makes a model with random weights, norms and biases included, and its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind: str, **shape: Any) -> tuple[Any, Path]:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SHAPE, "head_dim": 16, **shape})
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    weight.add_(torch.randn_like(weight) * 0.2)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., Any]:
    """Makes a byte-level BPE tokenizer that cuts text as a pre-tokenizer says."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from finetui.engine.data.template import prepare_tokenizer

    def make(cut: Any = None, *, ignore_merges: bool = False, normalizer: Any = None) -> Any:
        raw = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        raw.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        if normalizer is not None:
            raw.normalizer = normalizer
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=319, special_tokens=SPECIAL, initial_alphabet=alphabet)
        raw.train_from_iterator(TEXTS * 5, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
        prepare_tokenizer(tokenizer)
        return tokenizer

    return make


@pytest.fixture(scope="session")
def sentencepiece() -> Callable[..., Any]:
    """Makes a SentencePiece tokenizer as transformers has it: BPE with single bytes, and merges in order of scores.

    With ``cut``, a pre-tokenizer, it is none: SentencePiece cuts nothing before it merges.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from finetui.engine.data.template import prepare_tokenizer

    def make(before: str = "never", *, cut: Any = None) -> Any:
        learned = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        words = [word for text in TEXTS * 5 for word in text.replace(" ", " ▁").split(" ")]
        trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=["<unk>", *SPECIAL, *bytes_])
        learned.train_from_iterator(words, trainer)
        told = json.loads(learned.to_str())
        vocabulary, merges = told["model"]["vocab"], []
        for pair in told["model"]["merges"]:
            word = "".join(pair if isinstance(pair, list) else pair.split(" "))
            cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
            found = [list(cut) for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
            found.sort(key=lambda cut: (len(cut[0]), len(cut[1])))
            merges += found
        told["model"]["merges"] = merges
        told["added_tokens"] = [token for token in told["added_tokens"] if not token["content"].startswith("<0x")]
        raw = Tokenizer.from_str(json.dumps(told))
        spaces = normalizers.Replace(" ", "▁")
        if before == "prepend":
            raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        elif before == "never":
            raw.normalizer = spaces
        else:
            raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=before, split=False)
        raw.pre_tokenizer = cut or raw.pre_tokenizer
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
        prepare_tokenizer(tokenizer)
        return tokenizer

    return make


class LlamaCpp:
    """A file in llama.cpp, through the C functions of llama.h; what is passed by value there is left as it comes."""

    def __init__(self, library: Any, path: Path) -> None:
        self._library = library
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        assert self._model, f"llama.cpp does not load {path.name}"
        self._words = library.llama_model_get_vocab(self._model)
        self.rows = library.llama_vocab_n_tokens(self._words)

    def tokens(self, text: str, *, begin: bool = False) -> list[int]:
        """Token ids of a text, special tokens in it read as such."""
        raw, room = text.encode(), (c.c_int32 * 2048)()
        count = self._library.llama_tokenize(self._words, raw, len(raw), room, len(room), begin, True)
        return list(room[:count])

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """The logits after the last token."""
        context = self._library.llama_init_from_model(self._model, self._library.llama_context_default_params())
        row = (c.c_int32 * len(ids))(*ids)  # which the batch points to
        batch = self._library.llama_batch_get_one(row, len(ids))
        assert self._library.llama_decode(context, batch) == 0
        found = np.ctypeslib.as_array(self._library.llama_get_logits(context), (self.rows,)).copy()
        self._library.llama_free(context)
        return found

    def ends(self) -> set[int]:
        """The tokens at which generation ends."""
        return {i for i in range(self.rows) if self._library.llama_vocab_is_eog(self._words, i)}

    def close(self) -> None:
        self._library.llama_model_free(self._model)


@pytest.fixture(scope="session")
def llama_library() -> Any:
    """llama.cpp as a library, with the signatures of its functions."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not here")
    library = c.CDLL(xllamacpp.xllamacpp.__file__)
    # Structures that are passed by value: larger than any of them, so that their fields need not be known.
    large = type("Large", (c.Structure,), {"_fields_": [("bytes", c.c_ubyte * 1024)]})
    some, number, truth = c.c_void_p, c.c_int32, c.c_bool
    signatures: dict[str, tuple[Any, ...]] = {
        "llama_log_set": (None, some, some), "llama_backend_init": (None,), "llama_model_default_params": (large,),
        "llama_model_load_from_file": (some, c.c_char_p, large), "llama_model_get_vocab": (some, some),
        "llama_vocab_n_tokens": (number, some), "llama_context_default_params": (large,),
        "llama_init_from_model": (some, some, large), "llama_batch_get_one": (large, some, number),
        "llama_decode": (number, some, large), "llama_get_logits": (c.POINTER(c.c_float), some),
        "llama_tokenize": (number, some, c.c_char_p, number, some, number, truth, truth),
        "llama_vocab_is_eog": (truth, some, number), "llama_free": (None, some), "llama_model_free": (None, some),
        "ggml_quantize_chunk": (c.c_size_t, c.c_int, some, some, c.c_int64, c.c_int64, c.c_int64, some),
    }  # fmt: skip
    for name, (result, *arguments) in signatures.items():
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    library.quiet = c.CFUNCTYPE(None, c.c_int, c.c_char_p, some)(lambda *_: None)
    library.llama_log_set(c.cast(library.quiet, some), None)
    library.llama_backend_init()
    return library


@pytest.fixture
def llama_cpp(llama_library: Any) -> Iterator[Callable[[Path], LlamaCpp]]:
    """Loads files in llama.cpp."""
    loaded: list[LlamaCpp] = []

    def load(path: Path) -> LlamaCpp:
        loaded.append(LlamaCpp(llama_library, path))
        return loaded[-1]

    yield load
    for one in loaded:
        one.close()
