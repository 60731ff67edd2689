"""Weights from a `.gguf` file: dequantised once into a folder that `from_pretrained` loads.

    python train_npo.py --model smollm2-135m=FILE.gguf --loss sft --split full

A GGUF file holds a Llama's tensors, often in 4 to 8 bits a weight, its tokenizer and its chat template. They
become a fresh `LlamaForCausalLM` in float32, kept in `runs/models/gguf-NAME-HASH/` for next time: exactly the
quantised model, not the one it was made from. Optional packages read it: gguf and accelerate.
"""

import hashlib
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError

from models.saving import save_model
from support.errors import InputError
from support.files import locked

KEPT_IN = Path("runs/models")
PACKAGES = ("gguf", "accelerate")


def converted(file: Path, kept_in: Path = KEPT_IN) -> Path:
    """The folder with this file's weights in float32, made now where it isn't there yet: by the process that
    comes first, while the others wait for the lock. Raises InputError where the file can't be used."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; need a .gguf file with the weights of a Llama")
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"{file} is no GGUF file: it doesn't begin with GGUF; need a Llama's weights")
        opened.seek(0)
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = kept_in / f"gguf-{file.stem}-{digest[:16]}"
    try:
        with locked(kept_in / f".{folder.name}.lock", wait=True):
            if not folder.is_dir():
                _convert(file, digest, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}; choose a "
                         "working folder with room for the weights in float32") from None
    return folder


def _convert(file: Path, digest: str, folder: Path):
    """Read, copy, and let `folder` appear in one rename."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"{file}: .gguf files need the packages gguf and accelerate: pip install "
                         f"{' '.join(missing)}")
    print(f"{file}: dequantising into {folder}, once", flush=True)
    model, tokenizer = read_gguf(file)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_model(model, tokenizer, aside, {"converted_from": {"file": file.name, "sha256": digest}})
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_gguf(file: Path):
    """(LlamaForCausalLM in float32, tokenizer with its chat template). Raises InputError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    try:
        source = dict(gguf_file=file.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        read, info = AutoModelForCausalLM.from_pretrained(file.parent, **source, dtype=torch.float32,
                                                          output_loading_info=True)
    except Exception as error:  # format and version errors of every kind: the sentence carries the cause
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(f"{file}: cannot read it as a Llama ({cause}); take another file") from None
    if type(read) is not LlamaForCausalLM:
        raise InputError(f"{file} holds a {type(read).__name__}, no Llama; take a folder of safetensors")
    if info["missing_keys"]:
        raise InputError(f"{file}: weights are missing, such as {min(info['missing_keys'])}; need them all")
    # A fresh model, so that nothing of the file's quantisation stays in what is saved.
    vars(read.config).pop("quantization_config", None)
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer
