"""torchtune's builders of models and datasets (read in torchtune 0.6.1: ``models``, ``datasets``) as hub ids."""

from __future__ import annotations

#: Builder without ``lora_`` or ``qlora_`` to its weights on the hub, and to those tuned for chats.
MODELS: dict[str, tuple[str, str]] = {
    "code_llama2_7b": ("codellama/CodeLlama-7b-hf", "codellama/CodeLlama-7b-Instruct-hf"),
    "code_llama2_13b": ("codellama/CodeLlama-13b-hf", "codellama/CodeLlama-13b-Instruct-hf"),
    "code_llama2_70b": ("codellama/CodeLlama-70b-hf", "codellama/CodeLlama-70b-Instruct-hf"),
    "gemma_2b": ("google/gemma-2b", "google/gemma-2b-it"),
    "gemma_7b": ("google/gemma-7b", "google/gemma-7b-it"),
    "gemma2_2b": ("google/gemma-2-2b", "google/gemma-2-2b-it"),
    "gemma2_9b": ("google/gemma-2-9b", "google/gemma-2-9b-it"),
    "gemma2_27b": ("google/gemma-2-27b", "google/gemma-2-27b-it"),
    "llama2_7b": ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
    "llama2_13b": ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf"),
    "llama2_70b": ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf"),
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
    "llama3_70b": ("meta-llama/Meta-Llama-3-70B", "meta-llama/Meta-Llama-3-70B-Instruct"),
    "llama3_1_8b": ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    "llama3_1_70b": ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct"),
    "llama3_1_405b": ("meta-llama/Llama-3.1-405B", "meta-llama/Llama-3.1-405B-Instruct"),
    "llama3_2_1b": ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
    "llama3_2_3b": ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"),
    "llama3_2_vision_11b": ("meta-llama/Llama-3.2-11B-Vision", "meta-llama/Llama-3.2-11B-Vision-Instruct"),
    "llama3_2_vision_90b": ("meta-llama/Llama-3.2-90B-Vision", "meta-llama/Llama-3.2-90B-Vision-Instruct"),
    "llama3_3_70b": ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.3-70B-Instruct"),
    "mistral_7b": ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
    "phi3_mini": ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct"),
    "phi4_14b": ("microsoft/phi-4", "microsoft/phi-4"),
    **{
        f"qwen2_{size.replace('.', '_').lower()}": (f"Qwen/Qwen2-{size}", f"Qwen/Qwen2-{size}-Instruct")
        for size in ("0.5B", "1.5B", "7B")
    },
    **{
        f"qwen2_5_{size.replace('.', '_').lower()}{kind}": (
            f"Qwen/Qwen2.5-{size}{'-Instruct' if kind == '_instruct' else ''}",
            f"Qwen/Qwen2.5-{size}{'' if kind == '_base' else '-Instruct'}",
        )
        for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
        for kind in ("", "_base", "_instruct")
    },
}
#: Words in the name of a checkpoint's folder that tell the one tuned for chats.
CHAT_WORDS = ("instruct", "chat", "-it")

#: Its names of modules to those of transformers; phi keeps some of them in one.
MODULES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
MLP = ("gate_proj", "up_proj", "down_proj")
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
         "up_proj": "gate_up_proj"}  # fmt: skip

#: Builder of a dataset to its hub id where it has one, our format, the columns that have other names, and whether
#: prompts are trained on unless the file says otherwise.
DATASETS: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca", {}, True),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca", {}, True),
    "grammar_dataset": ("liweili/c4_200m", "question-answer", {"question": "input", "answer": "output"}, False),
    "samsum_dataset": ("Samsung/samsum", "question-answer", {"question": "dialogue", "answer": "summary"}, False),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "sharegpt", {}, False),
    "chat_dataset": ("", "messages", {}, False),
    "instruct_dataset": ("", "question-answer", {"question": "input", "answer": "output"}, False),
    "preference_dataset": ("", "preference", {}, False),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", "preference", {}, False),
    "stack_exchange_paired_dataset": (
        "lvwerra/stack-exchange-paired", "preference",
        {"question": "question", "chosen": "response_j", "rejected": "response_k"}, False,
    ),
    "text_completion_dataset": ("", "text", {}, True),
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", "text", {"text": "page"}, True),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", "text", {"text": "article"}, True),
}  # fmt: skip
