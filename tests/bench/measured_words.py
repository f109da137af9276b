"""What the words of a table of measured runs mean: methods, tunings, lengths, optimisers, checkpointing, sharing.

Every function reads one cell, or the words around it, and answers in the planner's terms, or raises :class:`Refused`
with the reason. Nothing here knows a source: a word means the same in every row.
"""

from __future__ import annotations

import re

from finetui.planner.architecture import Architecture


class Refused(Exception):
    """A row that can't be answered; its text is the reason."""


#: Words of a method to its name in the planner, in the order they are looked for.
_METHODS = (
    (r"\bsimpo\b", "simpo"), (r"\borpo\b", "orpo"), (r"\bcpo\b", "cpo"), (r"\bkto\b", "kto"), (r"\bipo\b", "ipo"),
    (r"\bdpo\b", "dpo"), (r"\bgrpo\b|\bdapo\b", "grpo"), (r"\brloo\b", "rloo"), (r"\bppo\b", "ppo"),
    (r"\breward\b|\brm\b", "reward"), (r"pre-?train|\bcpt\b|continued", "pretrain"),
)  # fmt: skip
#: Words of an adapter to its kind, in the order they are looked for.
_KINDS = (
    (r"adalora", "adalora"), (r"\bia3|\(ia\)", "ia3"), (r"randlora", "randlora"), (r"vb-?lora", "vblora"),
    (r"gralora", "gralora"), (r"delora", "delora"), (r"vera\b", "vera"), (r"\bh?boft", "boft"), (r"\boft", "oft"),
    (r"\bloha", "loha"), (r"\blokr", "lokr"), (r"\bhra\b", "hra"), (r"\bc3a\b", "c3a"), (r"fourier", "fourierft"),
    (r"wave-?ft", "waveft"), (r"\bhira\b", "hira"), (r"\bglora\b", "glora"), (r"\bdeft\b", "deft"),
    (r"\blily\b", "lily"), (r"\bosf\b", "osf"), (r"\bpeanut", "peanut"), (r"\bpsoft", "psoft"),
    (r"tiny-?lora", "tinylora"), (r"uni-?lora", "unilora"), (r"super-?tuning", "shira"),
    (r"\bshira", "shira"), (r"\broad", "road"), (r"\bmiss\b|\bbone\b", "miss"),
    (r"adapter[ _-]?v2", "adapter-v2"),
    (r"p-?tuning|prompt encoder", "p-tuning"), (r"prefix", "prefix"), (r"prompt[ _-]?tuning", "prompt"),
    (r"adapt(ion|er)[ _-]?prompt|llama-adapter|\badapter\b", "adaption-prompt"),
    (r"trainable[ _-]?tokens", "trainable-tokens"), (r"\bln[ _-]?tuning|layer ?norm tuning", "norms"),
)  # fmt: skip
_SPLIT_LAYERS = r"tensor[ -]parallel|pipeline[ -]parallel|\b[tp]p ?= ?[2-9]|\bexpert[ -]parallel|\bep ?= ?[2-9]"
#: How several devices share, by what the row says of it; the first that matches.
_STRATEGIES = (
    (r"zero[ -_]?(stage[ -]?)?3|zero-infinity|stage ?3", "zero3"), (r"zero[ -_]?(stage[ -]?)?2|stage ?2\b", "zero2"),
    (r"zero[ -_]?(stage[ -]?)?1|stage ?1\b", "zero1"), (r"no_shard|\bddp\b|(?<!sharded )data[ -]parallel", "ddp"),
    (r"shard_grad_op|hybrid_shard_zero2", "shard-grad-op"), (r"full_shard|hybrid_shard|fsdp|fully[ -]shard", "fsdp"),
)  # fmt: skip
#: Programs that quantise the scales of NF4 weights again unless told not to; bitsandbytes itself and others do not.
_DOUBLE = re.compile(r"axolotl|unsloth|swift|llama[ -]?factory|torchtune|torchao|finetui|fsdp_qlora|\bfms")
_OPTIMIZERS = (
    (r"paged.*lion", "paged-lion-8bit"), (r"lion.*8|8.*lion", "lion-8bit"), (r"lion", "lion"),
    (r"q-?galore|galore", "galore"), (r"apollo[ _-]?mini", "apollo-mini"), (r"apollo", "apollo"), (r"muon", "muon"),
    (r"adafactor", "adafactor"), (r"schedule[ _-]?free", "schedule-free"), (r"\bsgd\b", "sgd"),
    (r"paged.*32|paged_adamw$|paged adamw$", "paged-adamw"), (r"paged", "paged-adamw-8bit"),
    (r"adam\w*4-?bit|4-?bit.*adam", "adamw-4bit"), (r"adam.*8|8.*adam", "adamw-8bit"),
    (r"ada-?lomo", "adafactor"), (r"\blomo", "sgd"), (r"adam-?mini", "lion"),  # one state as wide as weights
    (r"(?<![a-z])came(?![a-z])", "came"), (r"adam|lora-?fa|loftq|\bhf default", "adamw"),
)  # fmt: skip
_MODULES = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v", "o": "o", "projection": "o"}
_SIDES = {
    "q": ("q_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv"),
    "k": ("k_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv"),
    "v": ("v_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv"),
    "o": ("o_proj", "dense", "out_proj", "c_proj"),
}
#: Of attention with a latent space for keys and values (DeepSeek's), where a row names a side, not a module.
_LATENT = {"q": ("q_a_proj", "q_b_proj"), "k": ("kv_a_proj_with_mqa", "kv_b_proj"), "v": ("kv_b_proj",), "o": ()}
#: Tokens of the longest row where rows are said to be short: of alpaca-gpt4, which ms-swift's scripts train on, 607 in
#: English and 544 in Chinese (dataset_info of its documentation), as its answers end at 512.
_SHORT = 600
#: Words for what is trained for, not how.
_TASKS = frozenset({"sft", "train", "training", "finetune", "finetuning", "supervised", "classification", "embedding",
                    "qat", "instruct", "chat", "alignment", "rlhf"})  # fmt: skip
_WORDS_OF_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def method_of(text: str) -> str:
    """The planner's name of a training method; ``sft`` where the words name none."""
    words = text.lower().replace("_", " ")
    if re.search(r"mergekit|\bmerge\b|inference|generat(e|ion) only|distill", words):
        raise Refused(f"no training: {text[:40]}")
    return next((name for pattern, name in _METHODS if re.search(pattern, words)), "sft")


def kind_of(text: str) -> str:
    """Adapters that are no pairs, by the recipe's name for them or PEFT's."""
    words = text.lower().replace("_", " ")
    return next((kind for pattern, kind in _KINDS if re.search(pattern, words)), "")


def tuning_of(text: str, rank: str, framework: str = "") -> tuple[str, str]:
    """Tuning and quantisation."""
    name = text.lower()
    if re.search(r"\bhqq\b", name):  # a 16-bit scale and zero per 64 weights
        return "qlora", "nf4-single"
    if re.search(r"\beetq\b", name):
        return "lora", "int8"
    if re.search(r"\b(aqlm|vptq|gguf)\b", name):
        raise Refused(f"quantisation not modelled: {text}")
    if re.search(r"fp8.*lora|lora.*fp8", name):
        return "lora", "fp8"
    if re.search(r"gptq|\bawq\b", name):  # both a 16-bit scale and a 4-bit zero per 128 weights
        return "qlora", "gptq"
    if re.search(r"int-?8|8-?bit|llm\.int8", name) and not re.search(r"full", name):
        return "lora", "int8"
    if re.search(r"qlora|qdora|4-?bit|nf4|fp4|int-?4", name):
        plain = re.search(r"nf4(?!\W?(dq|double))|no double", name) and not _DOUBLE.search(framework.lower())
        return "qlora", "nf4-single" if plain else "nf4"
    if re.search(r"full|\bfft\b|galore|apollo|badam|\blomo|from scratch|pre-?train", name):
        return "full", "none"
    if re.search(r"lora|dora|pissa|olora|\beva\b|loftq|corda", name) or kind_of(name):
        return "lora", "none"
    if re.search(r"freeze|frozen|last \d+ layers|lisa\b", name):
        raise Refused(f"which layers are trained is not stated: {text}")
    # What is left names no way of tuning (a task, an objective), or an adapter as yet unheard of.
    unheard = re.fullmatch(r"\w+", name.strip()) and name.strip() not in _TASKS and method_of(text) == "sft"
    return ("lora" if _is_number(rank) or unheard else "full"), "none"


def _is_number(text: str) -> bool:
    return bool(re.search(r"\d", text))


def length_of(text: str, unknown: list[str], widest: float = 2.75) -> int:
    """Tokens of the widest row; a bound that rows nearly reach is noted in ``unknown``.

    Args:
        widest: its length as a multiple of the mean, where that is told.
    """
    words = text.lower().replace(",", "").replace("_", "")
    if re.search(r"^\W*<=?\s*\d+k? unpacked", words):
        raise Refused("how long the rows really were is not stated")
    numbers = _numbers(words)
    if re.search(r"\bshort\b", words):  # a page at most, far below the bound
        unknown.append("short")
        return min([_SHORT, *(number for number in numbers if number)])
    if not numbers or numbers[0] < 1:
        raise Refused("how long the rows really were is not stated")
    if both := prompt_and_answer(text):
        return sum(both)
    exact = re.fullmatch(r"[\d.]+\s*k?\s*(tokens?|ctx|context)?[\s,(]*(packed|packing|fixed|padded|full)?.*", words)
    bound = re.search(r"<|\bmax|up to|~|about|approx|≤|longest|unpacked|unpadded|padding-free|mean|avg|average", words)
    if exact and not bound:
        return numbers[0]
    mean = re.search(r"(?:mean|avg|average)\D{0,3}(\d+)", words)
    if mean:
        numbers[0] = min(numbers[0], round(widest * int(mean.group(1))))
    unknown.append("length")  # a bound that the longest row of a large set nearly reaches
    return numbers[0]


def widest_of(text: str, rows: int) -> float:
    """The widest row of a run as a multiple of their mean, where lengths are spread log-normally by half of it.

    Padded, all rows of a micro-batch are as long as its longest, and the longest of some thousand is six times the
    mean; flattened, that one lies among others. Of the steps of a run 99 in 100 stay below three times the mean.

    Args:
        rows: of a micro-batch.
    """
    if re.search(r"padding[- _]free|flattened", text):
        return (rows + 5.0) / rows
    return 2.75 if "99th" in text else 6.0


def prompt_and_answer(text: str) -> tuple[int, int] | None:
    """Lengths that are given as ``512 + 1024``, or as ``prompt 512 + completion 1024``."""
    words = text.lower().replace(",", "").replace("_", "")
    number, answer = r"[\d.]+k?\s*(?:tokens)?\s*", r"(?:completion\w*|answer\w*)?"
    found = re.match(rf"\W*(?:prompt\w*)?\W*{number}(?:prompt)?\s*[+/&]\s*{answer}\W*{number}", words)
    return (numbers[0], numbers[1]) if found and len(numbers := _numbers(words)) > 1 else None


def _numbers(words: str) -> list[int]:
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(k\b|ki\b|kib\b)?", words)
    return [round(float(number) * (1024 if thousand else 1)) for number, thousand in parts]


def whole(text: str, what: str) -> int:
    """One number: ``8``, ``8.0``, ``2x8``, ``2 nodes x 8``, ``8 (1 node)``."""
    plain = re.sub(r"\(.*?\)", "", text.lower())
    plain = re.sub(r"nodes?|gpus?|per device|per gpu|each|\b(mbs|bs|b|n)\b|batch( size)?", " ", plain)
    plain = re.sub(r"\b(one|single|a)\b", "1", plain).strip(" ,=:")
    plain = re.sub(r"^(\d+)\s*[x×*]\s*[a-z].*$", r"\1", plain)  # 4 x A100
    product = re.fullmatch(r"(\d+)\s*[x×*]\s*(\d+)", plain)
    if product:
        return int(product.group(1)) * int(product.group(2))
    if not re.fullmatch(r"\d+(\.0+)?", plain) or float(plain) < 1:
        raise Refused(f"{what} is not one number: {text[:30]!r}")
    return int(float(plain))


def rank_of(text: str) -> int:
    """The rank; 16, what most examples have, where it is left out."""
    found = re.search(r"\d+", text)
    if not text.strip() or re.fullmatch(r"\W*(-|n/?a|none|not stated)\W*", text.strip().lower()):
        return 16
    if not found:
        raise Refused(f"rank is not one number: {text[:30]!r}")
    return max(int(found.group()), 1)


def accumulation_of(text: str) -> int:
    """Micro-batches of one step."""
    found = re.search(r"(?:grad(?:ient)?[_ ]accum\w*(?:[_ ]steps)?[= :]+|\bga[= ]?|accumulation[= ]+)(\d+)", text)
    if found:
        return max(int(found.group(1)), 1)
    return 16 if re.search(r"lit-?gpt", text) else 1  # its scripts' batches in micro-batches


def optimizer_of(text: str, *, matters: bool) -> str:
    """The planner's name of an optimiser.

    Args:
        matters: the whole model is trained, so that its states weigh as much as the model.
    """
    name = text.lower()
    if matters and ("unclear" in name or "?" in name):
        raise Refused("the optimiser is not stated")
    if re.search(r"sophia|shampoo|\bsoap\b|badam", name) and matters:
        raise Refused(f"optimiser not modelled: {text[:40]}")
    found = next((known for pattern, known in _OPTIMIZERS if re.search(pattern, name)), None)
    return found or "adamw"


def not_stated(text: str) -> bool:
    """Whether a cell says nothing, or that its source says nothing."""
    words = re.sub(r"\W+", " ", text.lower()).strip()
    nothing = "default|not stated|unknown|unclear|unspecified|auto|n ?a"
    return bool(re.fullmatch(rf"|(the )?(framework s )?({nothing})( .*)?", words))


def checkpointing_of(text: str, layers: int) -> tuple[str, int, bool]:
    """``full``, ``offload``, ``selective`` or ``none``; of how many of so many ``layers`` everything is kept, and
    whether of the others the outputs of some operations are (torchtitan's two kinds of ``selective``)."""
    words = re.sub(r"\W+", " ", text.lower()).strip()
    if not words or re.search(r"not stated|unknown|unclear|^\?", words):
        raise Refused(f"checkpointing is not stated: {text[:30]!r}")
    if re.search(r"\bsac\b|(selective|per|each|every) ?ops?\b|\bops? level|selective.*operations", words):
        return "full", 0, True
    every = re.search(r"(?:every|each) (other|second|third|\d+)|selective layers? ?(\d+)|1 (?:in|of) (\d+)", words)
    share = re.search(r"(\d+) ?%", text)
    if every:
        nth = {"other": 2, "second": 2, "third": 3}.get(every.group(1) or "")
        nth = nth or int(next(filter(None, every.groups())))
        return "selective", layers - -(-layers // max(nth, 1)), False
    if share:
        return "selective", round(layers * (1 - min(int(share.group(1)), 100) / 100)), False
    if re.search(r"selective|partial|half", words):
        raise Refused(f"which part is checkpointed is not modelled: {text[:30]!r}")
    if re.match(r"(no|none|false|off|disabled?|0|without|n)\b", words):
        return "none", 0, False
    if "offload" in words:
        return "offload", 0, False
    if re.match(
        r"(yes|true|on|full|fsdp|unsloth|enabled?|1|y|all|per|each|every|layer|block|with|non|re|act|grad|ac)", words
    ):
        return "full", 0, False
    raise Refused(f"checkpointing is not stated: {text[:30]!r}")


def sequence_shards_of(text: str) -> int:
    """Over how many devices the tokens of one row are spread: context or sequence parallelism, Ulysses, rings."""
    name = r"(?:context|sequence)[ _-]parallel(?:ism)?(?:[ _-]?(?:size|degree))?|ulysses|ring[ -]attention|\b[cs]p"
    found = re.search(rf"(?:{name})[ =:x]*(\d+)|(\d+)[ -]?way (?:{name})", text)
    if found:
        return max(int(found.group(1) or found.group(2)), 1)
    if re.search(name.removesuffix(r"|\b[cs]p"), text):
        raise Refused("over how many devices a row is spread is not stated")
    return 1


def strategy_of(text: str, usual: str) -> str:
    """How several devices share; empty where nothing says.

    Args:
        usual: what the framework does by itself, where it has but one way.
    """
    if re.search(_SPLIT_LAYERS, text):
        raise Refused("several GPUs: tensor, pipeline and expert parallelism are not modelled")
    return next((name for pattern, name in _STRATEGIES if re.search(pattern, text)), usual)


def offload_of(text: str) -> str:
    """What waits in host memory."""
    if re.search(
        r"(param\w*|model|weights?) (cpu )?offload|offload[_ ]param|zero-infinity|cpu offload(?!.*optim)", text
    ):
        return "parameters"
    if re.search(r"optim\w*[_ ](state )?(cpu )?offload|offload[_ ]optim|cpu[ _-]?adam|cpuoffloadoptimizer", text):
        return "optimizer"
    return "parameters" if re.search(r"zero[ -]?3[ +-]*(cpu )?offload", text) else (
        "optimizer" if re.search(r"zero[ -]?2[ +-]*(cpu )?offload", text) else "none"
    )  # fmt: skip


def targets_of(text: str, architecture: Architecture) -> str | tuple[str, ...]:
    """The named modules as this architecture calls them; of regular expressions the names they hold."""
    if not text.strip() or re.search(r"(^|all[ _.-]*|every )linear|^all\b|train\.py default|^\*$", text.lower()):
        return "all-linear"
    if re.search(r"\bdefaults?\b", text.lower()):  # PEFT's for most families: queries and values
        text = "q,v"
    if architecture.adapted_experts:  # of the same names, which PEFT puts pairs on as well
        text = re.sub(r"shared_experts?\.\w+", " ", text)
    known = {module.name for layer in architecture.layers for module in layer.linears}
    by_lower = {name.lower(): name for name in known}
    mlp = {module.name for layer in architecture.layers for module in layer.mlp}
    chosen: set[str] = set()
    for word in re.findall(r"[a-z0-9_]+", text.lower()):
        side = _MODULES.get(word.removesuffix("_proj"))
        if word in by_lower:
            chosen.add(by_lower[word])
        elif side:
            chosen |= {*_SIDES[side], *(() if word.endswith("_proj") else _LATENT[side])} & known
        elif word in ("attention", "attn", "qkv", "qkvo"):
            chosen |= {module.name for layer in architecture.layers for module in layer.attention}
        elif word in ("mlp", "ffn"):
            chosen |= mlp
        elif _WORDS_OF_MLP.get(word.removesuffix("_proj"), "") in known:
            chosen.add(_WORDS_OF_MLP[word.removesuffix("_proj")])
        elif word.removesuffix("_proj") in _WORDS_OF_MLP and mlp:  # gate and up are one in some families
            chosen |= {"gate_up_proj"} & known or mlp
    if "c_attn" in text and "w1" in text:
        return "all-linear"
    if re.search(r"query_key_value|wqkv|c_attn|qkv_proj|in_proj", text.lower()):  # one module in some families
        chosen |= {*_SIDES["q"], *_SIDES["k"], *_SIDES["v"]} & known
    if not chosen:
        return "all-linear"
    return tuple(sorted(chosen))


def precision_of(text: str, notes: str, strategy: str, *, full: bool) -> str:
    """How weights are stored and computed with.

    Args:
        text: framework and method; of the ``notes`` only what says ``precision`` counts.
    """
    said = re.search(r"(?:precision|dtype)[= :]+[\w-]+", notes)
    text = f"{text} {said.group() if said else ''}".lower()
    mixed = re.search(r"amp_|mixed|autocast|fp32 (master|param|weight)|zero[ -_]?\d|deepspeed", text)
    if re.search(r"\bfp32\b|float32|32-true", text) and not mixed and not re.search(r"bf16|fp16|bfloat", text):
        return "fp32"
    if re.search(r"\bfp16\b|float16|\b16-mixed", text) and not re.search(r"bf16|bfloat", text):
        # Trained in 16 bits throughout, which of the two makes no difference to memory.
        return "bf16" if full and re.search(r"mixed_precision[= :]+no\b", notes) else "fp16"
    if not full:
        return "bf16"
    if mixed or re.search(r"torchtitan|nanogpt", text):  # fp32 shards or weights, 16-bit products
        return "bf16-mixed"
    if re.search(r"llama[ -]?factory", text) and "pure" not in text and strategy != "fsdp":
        return "bf16-mixed"  # it turns what is trained to fp32 unless told pure_bf16
    return "bf16"


def attention_of(text: str) -> str:
    """``flash`` is FlashAttention's own package, ``sdpa`` torch's."""
    words = text.lower()
    if "eager" in words or re.search(r"\bnone\b|\bmath\b|vanilla", words):
        return "eager"
    return "flash" if re.search(r"flash|fa[23]\b|xformers", words) else "sdpa"
