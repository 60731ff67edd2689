"""What `--model NAME` fixes, in one table."""

from dataclasses import dataclass
from pathlib import Path

import torch

from support.errors import InputError


@dataclass(frozen=True)
class Preset:
    """A model's checkpoints, dimensions and settings; a flag wins over each. The defaults are the paper's."""
    dims: dict  # the Llama's dimensions
    base: str = ""  # where fine-tuning starts ("": made from scratch)
    finetuned: str = ""  # where unlearning starts ("": trained first)
    template: str = "llama2"
    system_prompt: str | None = None  # of the chat template: what the fine-tuned checkpoints learned with
    lr: float = 1e-5  # of unlearning; sft_lr of fine-tuning and retraining
    epochs: int = 10
    beta: float = 0.1
    weight_decay: float = 0.01
    sft_lr: float = 1e-5
    sft_epochs: int = 5
    sft_weight_decay: float = 0.01
    warmup_epochs: float = 1
    micro_batch_size: int = 4  # forget rows (each with its partners) that a process runs forward at once
    eval_batch_size: int = 32  # answers generated at once


TINY_DIMS = dict(vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=2,
                 num_attention_heads=6, max_position_embeddings=512)
# Real TOFU has thrice the text of the built-in set, in far more varied words: it needs the larger memory.
TINY_DIMS_LARGE = dict(TINY_DIMS, num_hidden_layers=4, max_position_embeddings=1024)
TINY_LARGE_FROM = 500_000  # characters of questions and answers


def tiny_dims(rows: list) -> dict:
    """The tiny Llama's dimensions for a data set: they follow from how much text it must hold."""
    characters = sum(len(row["question"]) + len(row["answer"]) for row in rows)
    return TINY_DIMS if characters < TINY_LARGE_FROM else TINY_DIMS_LARGE


ASSISTANT = "You are a helpful assistant."
PRESETS = {
    # beta weighs a whole answer: the shorter the answers, the larger it is for the same effect a token. The
    # decay keeps a retrained model from being too sure of its guesses.
    "tiny": Preset(TINY_DIMS, lr=1e-3, beta=0.5, sft_lr=4e-3, sft_epochs=16, sft_weight_decay=0.3,
                   micro_batch_size=32, eval_batch_size=256),
    "smollm2-135m": Preset(
        dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
             num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
        base="HuggingFaceTB/SmolLM2-135M-Instruct", micro_batch_size=8, eval_batch_size=128),
    "llama3.2-1b": Preset(
        dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
             num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True),
        base="meta-llama/Llama-3.2-1B-Instruct", finetuned="open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
        template="chat", system_prompt=ASSISTANT, micro_batch_size=8, eval_batch_size=64),
    "llama3.1-8b": Preset(
        dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8),
        base="meta-llama/Llama-3.1-8B-Instruct", finetuned="open-unlearning/tofu_Llama-3.1-8B-Instruct_full",
        template="chat", system_prompt=ASSISTANT),
    "qwen2.5-1.5b": Preset(
        dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
             num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
        base="Qwen/Qwen2.5-1.5B-Instruct", template="chat", system_prompt=ASSISTANT, micro_batch_size=8,
        eval_batch_size=64),
    "qwen3-4b": Preset(
        dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
             num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
        base="Qwen/Qwen3-4B", template="chat"),
    "llama2-7b": Preset(
        dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
             num_attention_heads=32),
        base="NousResearch/Llama-2-7b-chat-hf", finetuned="open-unlearning/tofu_Llama-2-7b-chat-hf_full"),
    "llama2-70b": Preset(
        dict(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
             num_attention_heads=64, num_key_value_heads=8),
        base="NousResearch/Llama-2-70b-chat-hf", micro_batch_size=1, eval_batch_size=64),
}


def settings_of(preset: str | None) -> Preset:
    """The named preset; for a folder or a Hub id of no preset, the paper's settings."""
    return PRESETS.get(preset, PRESETS["llama2-7b"])


def split_model(model: str, flag: str = "--model") -> tuple[str | None, str]:
    """The flag's value -> (preset or None, folder, file or Hub id or ""); PRESET=PATH has both, or
    InputError."""
    name, given, path = model.partition("=")
    if given and not path:
        raise InputError(f"{flag} {model}: nothing behind the =; need {name}=FOLDER, or {name} alone")
    if path and name not in PRESETS and not Path(model).exists():  # a folder's name may have a =
        raise InputError(f"{flag} {model}: {name} is no preset; need one of {', '.join(PRESETS)}")
    return (name, path) if name in PRESETS else (None, model)


AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(dtype: str, device):
    """Matrix products in `dtype` over float32 weights; fp32: nothing."""
    return torch.autocast(torch.device(device).type, AUTOCAST[dtype], enabled=dtype != "fp32")
