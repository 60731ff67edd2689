"""What a run will need, told before anything is loaded or rented: `train_npo.py --dry-run`.

Parameters are counted on a model without memory. What training holds is added up from what the code keeps:
S texts of T tokens pass at once, n = S * T; H hidden size, K key-value size, I inner size, V vocabulary.
The peak is at the turn from the forward to the backward pass of a step's last micro-batch.
"""

import math
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.tofu import Task, complement, load_task, parse_split, slice_rows
from losses import OBJECTIVES
from models import layers
from models.answers import KEPT_CHUNKS, chunk_tokens
from models.presets import PRESETS, tiny_dims
from models.saving import hub_id, read_meta
from models.sharded import decoder_layers
from running.plan import Plan
from running.settings import check_processes, template_of
from support.errors import InputError, cause_of

CHARACTERS_PER_TOKEN = 3.5  # of English with names, where no tokenizer is at hand: on the safe side
TOFU_ROWS = 4000
TOFU_CHARACTERS = (70, 169), (201, 418)  # question and answer, on average and of the longest row
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
    """From the config.json in the folder `s.start`, else from the preset's dimensions. Raises InputError."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    try:
        if s.start and not hub_id(s.start) and not Path(s.start).exists():
            raise OSError(f"{s.start} is not there")
        if s.start and (Path(s.start) / "config.json").is_file():
            config = AutoConfig.from_pretrained(s.start, local_files_only=True, trust_remote_code=False)
        elif s.preset == "tiny":
            config = LlamaConfig(**tiny_dims(rows), tie_word_embeddings=True)
        else:
            config = LlamaConfig(**PRESETS[s.preset].dims)
        with torch.device("meta"):
            return shape_of(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"--model {s.model} is neither a preset ({', '.join(PRESETS)}) nor a model's "
                         f"folder ({cause_of(error)})") from None


def shape_of(lm) -> Shape:
    """A loaded model's sizes."""
    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())
    config, blocks, heads = lm.config, decoder_layers(lm), lm.config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value = head_size * (getattr(config, "num_key_value_heads", None) or heads)
    inner = [getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")]
    return Shape(count(lm), len(blocks), count(blocks[0]), count(lm) - sum(map(count, blocks)),
                 config.hidden_size, key_value, next(filter(None, inner), 4 * config.hidden_size),
                 config.vocab_size)


def token_bytes(x: Shape, dtype: str, parallel: str, checkpointing: bool) -> int:
    """What one decoder layer keeps of each token for the backward pass, bytes. Float32: the residual stream
    twice, what the two norms return, queries, the attention's result, keys, values, gate and up: 4 (6 H + 2 K
    + 2 I); norms' insides and the gated product are computed again (`layers.py`), a small model keeps them: 2
    H + 2 I more. Autocast keeps float32 streams and a 16-bit copy a product; sharded, all has 16 bits."""
    element, autocast = 4 if dtype == "fp32" else 2, dtype != "fp32" and parallel == "ddp"
    if checkpointing:
        return x.hidden * (element if parallel == "fsdp" else 4)
    copies = 2 * 4 + 2 * 5 + 2 * 2 if autocast else 6 * element
    inside = 2 * 4 * x.hidden + 2 * element * x.inner if x.hidden < layers.SMALL_HIDDEN else 0
    return copies * x.hidden + element * (2 * x.key_value + 2 * x.inner) + inside


def memory(x: Shape, s: Namespace, work: Namespace, processes: int) -> dict:
    """Bytes of one process at its peak, by part; "peak" is their sum. work: what `count_work` returns."""
    n = s.micro_batch_size * work.texts * work.width  # tokens of S texts, as long as the longest
    answers = math.ceil(n * work.answer_tokens / work.tokens)  # N of them
    on_logits = "reference_logits" in OBJECTIVES[s.loss].takes
    compared = answers // work.texts * ((s.kl_weight > 0) + on_logits)  # of N, with the reference's
    sharded, element = s.parallel == "fsdp" and processes > 1, 4 if s.dtype == "fp32" else 2  # bytes a number
    share = processes if sharded else 1
    adapters = (s.lora or 0) * x.layers * (9 * x.hidden + 2 * x.key_value + 3 * x.inner)  # of 7 products
    gradients, head_weight = 4 * (adapters or x.parameters) / share, 4 * x.vocabulary * x.hidden
    weights = 4 * x.parameters / share
    if adapters:  # frozen ones in the products' precision
        weights = element * x.layers * x.layer + 4 * x.root + 4 * adapters
    parts = {"weights": weights, "gradients": gradients, "AdamW's moments": 2 * gradients}
    if sharded:  # the root, its gradient and the float32 that is reduced; two layers, and so on
        parts["FSDP: gathered root and layers"] = (2 * element + 4) * x.root + (4 * element + 4) * x.layer
    elif element == 2 and not adapters:
        parts["16-bit copies of the weights"] = 2 * (x.layers * x.layer + x.vocabulary * x.hidden)
    parts["reference"] = head_weight * (compared > 0) + 4 * compared * x.hidden
    parts["activations"] = x.layers * n * token_bytes(x, s.dtype, s.parallel, s.activation_checkpointing)
    # Behind the layers: the chunks that are kept and one at work, with the gradients for head and embedding.
    tokens, heads = min(answers, chunk_tokens(x.vocabulary)), 2 if compared else 1
    chunk = 4 * tokens * x.vocabulary
    kept = min(2 * KEPT_CHUNKS, math.ceil(answers / tokens)) * heads * chunk * element / 4
    # Inside a layer's backward pass: gradients of gate, up and product, the product itself, and the stream's.
    again = token_bytes(x, s.dtype, s.parallel, False) if s.activation_checkpointing else 0
    layer = n * (element * 5 * x.inner + 4 * 4 * x.hidden + again)
    parts["logits in chunks, or a layer at work"] = max(kept + 4 * heads * chunk + head_weight, layer)
    one_micro_batch = s.micro_batch_size >= math.ceil(s.batch_size / processes)
    if one_micro_batch and (s.parallel == "fsdp" or processes == 1):
        # Gradients are made as activations go: the larger counts.
        parts["gradients that come as activations go"] = -min(gradients, parts["activations"])
    return {**parts, "peak": sum(parts.values())}


class CharacterTokenizer:
    """Stands in where no tokenizer is at hand: a token every CHARACTERS_PER_TOKEN, one at the last."""
    eos_token_id = 0

    def __call__(self, texts: list, **_) -> dict:
        begins = [[*np.arange(0, len(text), CHARACTERS_PER_TOKEN), len(text) - 1] for text in texts]
        return {"input_ids": [[1] * len(some) for some in begins],
                "offset_mapping": [[(begin, None) for begin in some] for some in begins]}


def count_work(s: Namespace, task: Task) -> Namespace:
    """Counts of the run that the settings describe: rows, steps; tokens and answer_tokens of a global batch,
    without padding; texts that a row becomes (itself, its partner, its refusal); width, the longest
    text's tokens; whether they are estimated, from characters."""
    estimated = not s.start or not (Path(s.start) / "tokenizer.json").is_file()
    tokenizer, template, context = CharacterTokenizer(), "llama2", None
    if not estimated:
        from transformers import AutoConfig, AutoTokenizer
        try:
            tokenizer = AutoTokenizer.from_pretrained(s.start, local_files_only=True, trust_remote_code=False)
            config = AutoConfig.from_pretrained(s.start, local_files_only=True, trust_remote_code=False)
            context = getattr(config, "max_position_embeddings", None)
        except Exception as error:  # a torn file is reported in many ways
            raise InputError(f"--dry-run: {s.start} has no tokenizer that can be read ({cause_of(error)})"
                             ) from None
        template = template_of(s, tokenizer, read_meta(s.start))
    plan = Plan(Namespace(**{**vars(s), "template": template}), task, tokenizer, context)
    texts = [e for items in plan.stream for some in plan.texts(items) for e in some]
    return Namespace(rows=plan.rows, steps=plan.steps, tokens=sum(len(e.ids) for e in texts) / plan.steps,
                     answer_tokens=sum(e.answer_tokens for e in texts) / plan.steps, estimated=estimated,
                     texts=len(texts) // (plan.rows * s.epochs), width=max(len(e.ids) for e in texts))


def suggest(s: Namespace, x: Shape, work: Namespace, processes: int, room: float) -> Namespace | None:
    """The settings of the fastest that fits in `room` bytes: no recomputing, whole models, large
    micro-batches come first."""
    sizes = sorted({32, 16, 8, 4, 2, 1, s.micro_batch_size}, reverse=True)
    micros = [m for m in sizes if m <= math.ceil(s.batch_size / processes)]
    modes = ("ddp", "fsdp") if processes > 1 and not s.lora else ("ddp",)
    for again, parallel, micro in product((False, True), modes, micros):
        way = Namespace(**{**vars(s), "activation_checkpointing": again, "parallel": parallel,
                           "micro_batch_size": micro})
        if memory(x, way, work, processes)["peak"] <= room:
            return way
    return None


def as_published(s: Namespace) -> Task:
    """A Hub id is not asked for, there may be no network: as many rows as TOFU's full.json has, as long."""
    row, longest = ({"question": "?" * q, "answer": "!" * a} for q, a in TOFU_CHARACTERS)
    full = [longest, *[row] * (TOFU_ROWS - 2), longest]
    forgets = parse_split(s.split)[0] == "forget"
    return Task(f"{s.data} (not read: TOFU's published number and lengths of rows)", s.split, full,
                slice_rows(full, s.split) if forgets else [],
                slice_rows(full, complement(s.split) if forgets else s.split), {}, [row["answer"]], "", "")


def dry_run(s: Namespace, processes: int):
    """Print the plan: counts, memory as asked and as suggested."""
    processes, gpu_memory = s.gpus or processes, s.gpu_memory or 80e9
    check_processes(s, processes)
    published = s.split != "own" and hub_id(s.data)
    task = as_published(s) if published else load_task(s.data, s.split, s.forget, s.retain)
    x, work, room = read_shape(s, task.full), count_work(s, task), USABLE * gpu_memory
    best, fits = suggest(s, x, work, processes, room), memory(x, s, work, processes)["peak"] <= room
    print(f"{s.method} on {s.split} of {task.source}, model {s.model}: {x.parameters / GB:.3f} G parameters, "
          f"{s.dtype}\n{work.rows} rows, {s.epochs} epochs in batches of {s.batch_size}: {work.steps} steps; "
          f"{work.tokens:,.0f} tokens a step, {work.answer_tokens:,.0f} of them answers; the longest text "
          f"{work.width}{' (estimated: no tokenizer at hand)' * work.estimated}")
    for how, way in {"as asked": s, "as suggested": best}.items():
        if way:
            print(f"\nmemory of one process at its peak, {how}, GB")
            for part, size in memory(x, way, work, processes).items():
                print(f"  {part:44}{size / GB:8.2f}")
    print(f"\nAs asked it {'fits' if fits else 'does not fit'} on {processes} x {gpu_memory / GB:g} GB "
          f"({USABLE:.0%} of it usable).")
    if best is None:
        print("Nothing fits: more --gpus, or larger ones, are needed.")
    elif best != s:
        print(f"{'Faster' if fits else 'This fits'}: --parallel {best.parallel} --micro-batch-size "
              f"{best.micro_batch_size}{' --activation-checkpointing' * best.activation_checkpointing}")
