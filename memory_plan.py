"""What a run will need, told before anything is loaded or rented: `train_npo.py --dry-run`.

    python train_npo.py --dry-run --model llama2-7b --loss npo --retain-weight 1 --gpus 2 --gpu-memory 80G

Parameters are counted on a model without memory. What training holds is added up from what the code keeps: S sequences
of T tokens pass at once, n = S * T; H hidden size, K key-value size, I inner size, V vocabulary, P parameters.
The peak is at the turn from the forward to the backward pass of a step's last micro-batch, when every activation, every
gradient and AdamW's moments are there.
"""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

from chunked_head import CHUNK_BYTES, KEPT_CHUNKS, chunk_tokens
from data.batches import make_stream
from data.tofu import InputError, load_task
from models import PRESETS, tiny_dims
from sharding import decoder_layers

CHARACTERS_PER_TOKEN = 3.5  # of English with names, where no tokenizer is at hand: on the safe side
TEMPLATE_TOKENS = 12  # beside question and answer
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's, the allocator's gaps and the collectives'
GB = 1e9


class Shape(NamedTuple):
    """A model's sizes, in numbers of parameters or elements."""
    parameters: int
    layers: int
    layer: int  # parameters of one decoder layer
    root: int  # of all else: embedding, final norm, head
    hidden: int
    key_value: int
    inner: int
    vocabulary: int


def read_shape(s: Namespace, rows: list) -> Shape:
    """From the preset's dimensions, or from the config.json of the folder that `--model` names. Raises InputError."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    folder = Path(s.start) if s.start else None
    try:
        if folder and (folder / "config.json").is_file():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        elif s.preset:
            config = LlamaConfig(**tiny_dims(rows) if s.preset == "tiny" else PRESETS[s.preset].dims)
        else:
            raise InputError(f"--dry-run: {s.start} is neither a preset ({', '.join(PRESETS)}) nor a folder with a "
                             "config.json; give one of them")
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"--model {s.model}: its config.json is not a model's ({error})") from None
    count = lambda module: sum(p.numel() for p in module.parameters())
    layers, heads = decoder_layers(lm), config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(count(lm), len(layers), count(layers[0]), count(lm) - sum(map(count, layers)), config.hidden_size,
                 head_size * (getattr(config, "num_key_value_heads", None) or heads), config.intermediate_size,
                 config.vocab_size)


class Load(NamedTuple):
    """How a run is cut: what decides its memory."""
    processes: int
    parallel: str
    dtype: str
    checkpointing: bool
    sequences: int  # S: that pass at once
    width: int  # T: the longest row
    answers: int  # N: answer tokens among the n = S * T
    kl_answers: int  # M: of them with a K
    more_micro_batches: bool  # a process runs more than one a step


def token_bytes(x: Shape, load: Load) -> int:
    """What one decoder layer keeps of each token for the backward pass, bytes.

    Float32: the residual stream twice, what the two norms return, queries, the attention's result, keys, values, gate
    and up: 4 (6 H + 2 K + 2 I); norms' insides and the gated product are computed again (`layers.py`). Autocast keeps
    float32 streams and a 16-bit copy for each product that reads them; sharded, all of it has 16 bits.
    """
    element = 4 if load.dtype == "fp32" else 2
    if load.checkpointing:
        return x.hidden * (element if load.parallel == "fsdp" else 4)
    copies = 2 * 4 + 2 * 5 + 2 * 2 if load.dtype != "fp32" and load.parallel == "ddp" else 6 * element
    return copies * x.hidden + element * (2 * x.key_value + 2 * x.inner)


def memory(x: Shape, load: Load) -> dict:
    """Bytes of one process at its peak, by part; "peak" is their sum."""
    sharded, mixed = load.parallel == "fsdp" and load.processes > 1, load.dtype != "fp32"
    share, element = load.processes if sharded else 1, 2 if mixed else 4
    n = load.sequences * load.width
    parts = {"weights": 4 * x.parameters / share, "gradients": 4 * x.parameters / share,
             "AdamW's moments": 8 * x.parameters / share}
    if sharded:  # the root, its gradient and the float32 that is reduced; two layers, a gathering one, and so on
        parts["FSDP: gathered root and layers"] = (2 * element + 4) * x.root + (4 * element + 4) * x.layer
    elif mixed:
        parts["16-bit copies of the weights"] = 2 * (x.layers * x.layer + x.vocabulary * x.hidden)
    parts["reference"] = 4 * x.vocabulary * x.hidden * (load.kl_answers > 0) + 4 * load.kl_answers * x.hidden
    activations = x.layers * n * token_bytes(x, load)
    parts["activations"] = activations
    # Behind the layers: the chunks that are kept and one at work, with the gradients for head and embedding.
    tokens = min(load.answers, chunk_tokens(x.vocabulary))
    chunk = 4 * tokens * x.vocabulary
    kept = min(KEPT_CHUNKS, math.ceil(load.answers / tokens)) * (2 if load.kl_answers else 1) * chunk * element / 4
    head = kept + (8 if load.kl_answers else 4) * chunk + 4 * x.vocabulary * x.hidden
    # Inside a layer's backward pass: gradients of gate, up and product, the product itself, and the stream's.
    whole = token_bytes(x, load._replace(checkpointing=False)) if load.checkpointing else 0
    layer = n * (element * 5 * x.inner + 4 * 4 * x.hidden + whole)
    parts["logits in chunks, or a layer at work"] = max(head, layer)
    if not load.more_micro_batches and not (load.parallel == "ddp" and load.processes > 1):
        # Gradients are made as activations go: the larger counts.
        parts["gradients that come as activations go"] = -min(parts["gradients"], activations)
    return {**parts, "peak": sum(parts.values())}
