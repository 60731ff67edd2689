"""What a run will need, told before anything is loaded or rented: `train_npo.py --dry-run`.

    python train_npo.py --dry-run --model llama2-7b --loss npo --retain-weight 1 --gpus 2 --gpu-memory 80G

Parameters are counted on a model without memory. What training holds is added up from what the code keeps: S
sequences of T tokens pass at once, n = S * T; H hidden size, K key-value size, I inner size, V vocabulary, P
parameters. The peak is at the turn from the forward to the backward pass of a step's last micro-batch, when
every activation, every gradient and AdamW's moments are there.
"""

import math
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

from data.prompts import encode
from data.tofu import complement, load_task, parse_split, slice_rows
from models import layers
from models.answers import KEPT_CHUNKS, chunk_tokens
from models.presets import PRESETS, tiny_dims
from models.saving import read_meta
from models.sharded import decoder_layers
from support.errors import InputError

CHARACTERS_PER_TOKEN = 3.5  # of English with names, where no tokenizer is at hand: on the safe side
TEMPLATE_TOKENS = 12  # beside question and answer
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
    """From the preset's dimensions, or from the config.json of the folder that `--model` names. Raises
    InputError."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    folder = Path(s.start) if s.start else None
    try:
        if folder and (folder / "config.json").is_file():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        elif s.preset:
            config = LlamaConfig(**{**tiny_dims(rows), "tie_word_embeddings": True} if s.preset == "tiny"
                                 else PRESETS[s.preset].dims)
        else:
            raise InputError(f"--dry-run: {s.start} is neither a preset ({', '.join(PRESETS)}) nor a folder "
                             "with a config.json; give one of them")
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"--model {s.model}: its config.json is not a model's ({error})") from None
    return shape_of(lm)


def shape_of(lm) -> Shape:
    """A loaded model's sizes."""
    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())

    config, layers = lm.config, decoder_layers(lm)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(count(lm), len(layers), count(layers[0]), count(lm) - sum(map(count, layers)),
                 config.hidden_size,
                 head_size * (getattr(config, "num_key_value_heads", None) or heads),
                 config.intermediate_size,
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

    Float32: the residual stream twice, what the two norms return, queries, the attention's result, keys,
    values, gate and up: 4 (6 H + 2 K + 2 I); norms' insides and the gated product are computed again
    (`layers.py`), a small model keeps them: 2 H + 2 I more. Autocast keeps float32 streams and a 16-bit copy
    for each product that reads them; sharded, all of it has 16 bits.
    """
    element = 4 if load.dtype == "fp32" else 2
    if load.checkpointing:
        return x.hidden * (element if load.parallel == "fsdp" else 4)
    copies = 2 * 4 + 2 * 5 + 2 * 2 if load.dtype != "fp32" and load.parallel == "ddp" else 6 * element
    inside = 2 * 4 * x.hidden + 2 * element * x.inner if x.hidden < layers.SMALL_HIDDEN else 0
    return copies * x.hidden + element * (2 * x.key_value + 2 * x.inner) + inside


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
    kept = min(KEPT_CHUNKS,
               math.ceil(load.answers / tokens)) * (2 if load.kl_answers else 1) * chunk * element / 4
    head = kept + (8 if load.kl_answers else 4) * chunk + 4 * x.vocabulary * x.hidden
    # Inside a layer's backward pass: gradients of gate, up and product, the product itself, and the stream's.
    whole = token_bytes(x, load._replace(checkpointing=False)) if load.checkpointing else 0
    layer = n * (element * 5 * x.inner + 4 * 4 * x.hidden + whole)
    parts["logits in chunks, or a layer at work"] = max(head, layer)
    if not load.more_micro_batches and not (load.parallel == "ddp" and load.processes > 1):
        # Gradients are made as activations go: the larger counts.
        parts["gradients that come as activations go"] = -min(parts["gradients"], activations)
    return {**parts, "peak": sum(parts.values())}


# ---------------------------------------------------------------- the run: rows, tokens, steps, operations

class Work(NamedTuple):
    """A run's counts; `estimated` where no tokenizer was at hand."""
    rows: int
    steps: int
    tokens: float  # of a global batch, without padding
    answer_tokens: float  # of them
    sequences: int  # that a row of the stream becomes: itself, its partner, its refusal
    width: int  # the longest row's tokens
    answer_share: float
    estimated: bool


def count_work(s: Namespace, task) -> Work:
    """Rows and tokens of the run that the settings describe: by the tokenizer in the model's folder, else
    estimated."""
    rows = task.forget or task.retain
    unlearning = s.loss != "sft"
    uses_retain = unlearning and (s.retain_weight > 0 or s.kl_weight > 0)
    sequences = 1 + uses_retain + (s.loss == "dpo")
    used = [rows, task.retain if uses_retain else []]
    tokenizer = None
    if s.start and (Path(s.start) / "tokenizer.json").is_file():
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(s.start, local_files_only=True)
        encoded = [encode(tokenizer, s.template or read_meta(s.start).get("template") or "llama2",
                          [(row["question"], row["answer"]) for row in some], None) if some else []
                          for some in used]
        lengths = [[(len(e.ids), e.answer_tokens) for e in some] for some in encoded]
    else:
        tokens = lambda text: len(text) / CHARACTERS_PER_TOKEN
        lengths = [[(tokens(row["question"] + row["answer"]) + TEMPLATE_TOKENS, tokens(row["answer"]) + 1)
                    for row in some] for some in used]
    mean = lambda some, i: sum(pair[i] for pair in some) / max(1, len(some))
    total, answers = (mean(lengths[0], i) * (sequences - uses_retain) + mean(lengths[1], i) for i in (0, 1))
    return Work(len(rows), math.ceil(s.epochs * len(rows) / s.batch_size), s.batch_size * total,
                s.batch_size * answers, sequences,
                math.ceil(max(pair[0] for some in lengths for pair in some)), answers / total,
                tokenizer is None)


def training_flops(x: Shape, tokens: float, width: float, answer_tokens: float, passes: int = 3) -> float:
    """Floating-point operations to train on so many tokens, in texts `width` tokens long: 2 a parameter and token
    forward, 4 backward (2 more, a fourth pass, where activations are computed again), causal attention, and the head at
    the answers' tokens alone."""
    layers = 2 * x.layers * (x.layer + width * x.hidden) * tokens
    return passes * layers + 6 * x.vocabulary * x.hidden * answer_tokens


def rough_flops(parameters: int, trained: float, scored: float) -> float:
    """The same before anything is tokenised: 6 a parameter and trained token, 2 a parameter and scored one."""
    return parameters * (6 * trained + 2 * scored)


def load_of(s: Namespace, work: Work, processes: int, parallel: str, micro: int, checkpointing: bool) -> Load:
    sequences = micro * work.sequences
    answers = math.ceil(sequences * work.width * work.answer_share)
    kl_answers = answers // work.sequences if s.kl_weight > 0 else 0
    return Load(processes, parallel, s.dtype, checkpointing, sequences, work.width, answers, kl_answers,
                micro < math.ceil(s.batch_size / processes))


def suggest(s: Namespace, x: Shape, work: Work, processes: int, gpu_memory: float) -> Load | None:
    """The fastest way that fits: without recomputing first, whole models before parts, large micro-batches
    before small."""
    largest = math.ceil(s.batch_size / processes)
    micros = [m for m in (32, 16, 8, 4, 2, 1) if m <= largest]
    for checkpointing in (False, True):
        for parallel in ("ddp", "fsdp")[:1 + (processes > 1)]:
            for micro in micros:
                load = load_of(s, work, processes, parallel, micro, checkpointing)
                if memory(x, load)["peak"] <= USABLE * gpu_memory:
                    return load
    return None


# ---------------------------------------------------------------- in words

def as_published(s: Namespace) -> Namespace:
    """A Hub id is not asked for, since there may be no network: as many rows as TOFU's full.json has, as
    long."""
    row, longest = ({"question": "?" * q, "answer": "!" * a} for q, a in TOFU_CHARACTERS)
    full = [longest, *[row] * (TOFU_ROWS - 2), longest]
    forgets = parse_split(s.split)[0] == "forget"
    return Namespace(source=f"{s.data} (not read: TOFU's published number and lengths of rows)", full=full,
                     forget=slice_rows(full, s.split) if forgets else [],
                     retain=slice_rows(full, complement(s.split) if forgets else s.split))


def dry_run(s: Namespace, processes: int, say=print):
    """Print the plan: counts, the settings as asked and as suggested side by side, and what a reference model
    beside the policy would add."""
    processes, gpu_memory, teraflops = s.gpus or processes, s.gpu_memory or 80e9, s.tflops or 200.0
    at_hand = s.data == "builtin" or s.split == "own" or Path(s.data).is_dir()
    task = load_task(s.data, s.split, s.forget, s.retain) if at_hand else as_published(s)
    x = read_shape(s, task.full)
    work = count_work(s, task)
    mark = " (estimated: no tokenizer at hand)" if work.estimated else ""
    asked = load_of(s, work, processes, s.parallel, s.micro_batch_size, s.activation_checkpointing)
    best = suggest(s, x, work, processes, gpu_memory)
    say(f"{s.method} on {s.split} of {task.source}, model {s.model}: {x.parameters / GB:.3f} G parameters, "
        f"{s.dtype}")
    say(f"{work.rows} rows, {s.epochs} epochs in batches of {s.batch_size}: {work.steps} steps; "
        f"{work.tokens:,.0f} tokens a step, {work.answer_tokens:,.0f} of them answers; the longest row "
        f"{work.width}{mark}")
    columns = [("as asked", asked)] + ([("suggested", best)] if best and best != asked else [])
    say(f"\n{'memory of one process at its peak, GB':40}" + "".join(f"{name:>12}" for name, _ in columns))
    for what, value in (("parallel", lambda c: c.parallel),
                        ("micro-batch, rows", lambda c: c.sequences // work.sequences),
                        ("activation checkpointing", lambda c: "yes" if c.checkpointing else "no")):
        say(f"  {what:38}" + "".join(f"{value(load):>12}" for _, load in columns))
    plans = [memory(x, load) for _, load in columns]
    for part in sorted({key: None for p in plans for key in p}, key=lambda key: key == "peak"):
        say(f"  {part:38}" + "".join(f"{p.get(part, 0) / GB:12.2f}" for p in plans))
    for what, load in columns:
        step = training_flops(x, work.tokens, work.width, work.answer_tokens, 4 if load.checkpointing else 3)
        hours = step * work.steps / (teraflops * 1e12 * processes) / 3600
        say(f"{what}: {step / 1e12:,.1f} TFLOP a step; {hours:.2f} h for {work.steps} steps at {teraflops:g} "
            "TFLOP/s a process, evaluations apart")
    say("")
    gpus = f"{processes} x {gpu_memory / GB:g} GB ({USABLE:.0%} of it usable)"
    fits = plans[0]["peak"] <= USABLE * gpu_memory
    say(f"As asked it {'fits' if fits else 'does not fit'} on {gpus}.")
    if best is None:
        enough = next((n for n in range(processes, s.batch_size + 1) if suggest(s, x, work, n, gpu_memory)),
                      None)
        say("Nothing fits" + (f"; the fewest GPUs of this size are {enough}: --parallel fsdp --gpus {enough}"
                              if enough
                              else ", on no number of such GPUs up to the batch size; need larger ones"))
    elif best != asked:
        flags = f"--parallel {best.parallel} --micro-batch-size {best.sequences // work.sequences}"
        say(f"{'Faster' if fits else 'This fits'}: "
            f"{flags}{' --activation-checkpointing' * best.checkpointing}")
    last = best or asked
    if s.loss in ("npo", "dpo", "kto") or s.kl_weight > 0:
        sharded = last.parallel == "fsdp" and processes > 1
        more = 4 * x.parameters / (processes if sharded else 1)
        if sharded:  # its root and the layers in passage, too
            more += (2 if s.dtype != "fp32" else 4) * (x.root + 2 * x.layer)
        peak = memory(x, last)["peak"]
        say(f"A reference model kept beside the policy would need {more / GB:.2f} GB more a process, "
            f"{(peak + more) / GB:.2f} GB instead of {peak / GB:.2f}.")
