"""What a run will need, told before anything is loaded or rented: `train_npo.py --dry-run`.

Parameters are counted on a model without memory. What training holds is added up from what the code keeps:
S sequences of T tokens pass at once, n = S * T; H hidden size, K key-value size, I inner size, V vocabulary.
The peak is at the turn from the forward to the backward pass of a step's last micro-batch.
"""

import math
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.prompts import encode
from data.tofu import complement, load_task, parse_split, slice_rows
from losses import OBJECTIVES
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
    """From the config.json in the folder `s.start`, else from the preset's dimensions. Raises InputError."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    in_folder = s.start and (Path(s.start) / "config.json").is_file()
    if not in_folder and not s.preset:
        raise InputError(f"--dry-run: {s.start} is no model's folder, and no preset ({', '.join(PRESETS)})")
    try:
        if in_folder:
            config = AutoConfig.from_pretrained(s.start, local_files_only=True)
        elif s.preset == "tiny":
            config = LlamaConfig(**tiny_dims(rows), tie_word_embeddings=True)
        else:
            config = LlamaConfig(**PRESETS[s.preset].dims)
        with torch.device("meta"):
            return shape_of(AutoModelForCausalLM.from_config(config))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"--model {s.model}: its config.json is not a model's ({error})") from None


def shape_of(lm) -> Shape:
    """A loaded model's sizes."""
    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())
    config, blocks, heads = lm.config, decoder_layers(lm), lm.config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value = head_size * (getattr(config, "num_key_value_heads", None) or heads)
    return Shape(count(lm), len(blocks), count(blocks[0]), count(lm) - sum(map(count, blocks)),
                 config.hidden_size, key_value, config.intermediate_size, config.vocab_size)


class Load(NamedTuple):
    """How a run is cut: what decides its memory."""
    processes: int
    parallel: str
    dtype: str
    checkpointing: bool
    sequences: int  # S: that pass at once
    width: int  # T: the longest row
    answers: int  # N: answer tokens among the n = S * T
    compared: int  # of them with a K, or a loss against the reference's logits
    more_micro_batches: bool  # a process runs more than one a step

    @property
    def sharded(self) -> bool:
        return self.parallel == "fsdp" and self.processes > 1

    @property
    def element(self) -> int:
        """Bytes of a number in the products."""
        return 4 if self.dtype == "fp32" else 2


def token_bytes(x: Shape, load: Load) -> int:
    """What one decoder layer keeps of each token for the backward pass, bytes. Float32: the residual stream
    twice, what the two norms return, queries, the attention's result, keys, values, gate and up: 4 (6 H + 2 K
    + 2 I); norms' insides and the gated product are computed again (`layers.py`), a small model keeps them: 2
    H + 2 I more. Autocast keeps float32 streams and a 16-bit copy for each product that reads them; sharded,
    all of it has 16 bits."""
    element, autocast = load.element, load.dtype != "fp32" and load.parallel == "ddp"
    if load.checkpointing:
        return x.hidden * (element if load.parallel == "fsdp" else 4)
    copies = 2 * 4 + 2 * 5 + 2 * 2 if autocast else 6 * element
    inside = 2 * 4 * x.hidden + 2 * element * x.inner if x.hidden < layers.SMALL_HIDDEN else 0
    return copies * x.hidden + element * (2 * x.key_value + 2 * x.inner) + inside


def memory(x: Shape, load: Load) -> dict:
    """Bytes of one process at its peak, by part; "peak" is their sum."""
    share, element, n = load.processes if load.sharded else 1, load.element, load.sequences * load.width
    gradients, head_weight = 4 * x.parameters / share, 4 * x.vocabulary * x.hidden
    parts = {"weights": gradients, "gradients": gradients, "AdamW's moments": 2 * gradients}
    if load.sharded:  # the root, its gradient and the float32 that is reduced; two layers, and so on
        parts["FSDP: gathered root and layers"] = (2 * element + 4) * x.root + (4 * element + 4) * x.layer
    elif element == 2:
        parts["16-bit copies of the weights"] = 2 * (x.layers * x.layer + x.vocabulary * x.hidden)
    parts["reference"] = head_weight * (load.compared > 0) + 4 * load.compared * x.hidden
    parts["activations"] = x.layers * n * token_bytes(x, load)
    # Behind the layers: the chunks that are kept and one at work, with the gradients for head and embedding.
    tokens, heads = min(load.answers, chunk_tokens(x.vocabulary)), 2 if load.compared else 1
    chunk = 4 * tokens * x.vocabulary
    kept = min(KEPT_CHUNKS, math.ceil(load.answers / tokens)) * heads * chunk * element / 4
    # Inside a layer's backward pass: gradients of gate, up and product, the product itself, and the stream's.
    again = token_bytes(x, load._replace(checkpointing=False)) if load.checkpointing else 0
    layer = n * (element * 5 * x.inner + 4 * 4 * x.hidden + again)
    parts["logits in chunks, or a layer at work"] = max(kept + 4 * heads * chunk + head_weight, layer)
    if not load.more_micro_batches and (load.parallel == "fsdp" or load.processes == 1):
        # Gradients are made as activations go: the larger counts.
        parts["gradients that come as activations go"] = -min(gradients, parts["activations"])
    return {**parts, "peak": sum(parts.values())}


class Work(NamedTuple):
    """A run's counts; `estimated` where no tokenizer was at hand."""
    rows: int
    steps: int
    tokens: float  # of a global batch, without padding
    answer_tokens: float  # of them
    sequences: int  # that a row of the stream becomes: itself, its partner, its refusal
    width: int  # the longest row's tokens
    estimated: bool


def count_work(s: Namespace, task) -> Work:
    """Rows and tokens of the run that the settings describe."""
    objective, rows = OBJECTIVES[s.loss], task.forget or task.retain
    texts = objective.with_answer + objective.with_refusal
    with_partner = s.loss != "sft" and (s.retain_weight > 0 or s.kl_weight > 0)
    estimated = not s.start or not (Path(s.start) / "tokenizer.json").is_file()
    own = text_lengths(s, rows, estimated)
    partners = text_lengths(s, task.retain, estimated) if with_partner else np.zeros((1, 2))
    width, steps = max(own[:, 0].max(), partners[:, 0].max()), s.epochs * len(rows) / s.batch_size
    return Work(len(rows), math.ceil(steps), *(s.batch_size * (texts * own.mean(0) + partners.mean(0))),
                texts + with_partner, math.ceil(width), estimated)


def text_lengths(s: Namespace, rows: list, estimated: bool) -> np.ndarray:
    """(rows, 2): tokens, answer tokens; from the characters, or by the tokenizer in the model's folder."""
    if estimated:
        return np.array([(len(row["question"] + row["answer"]), len(row["answer"])) for row in rows]
                        ) / CHARACTERS_PER_TOKEN + (TEMPLATE_TOKENS, 1)
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(s.start, local_files_only=True)
    template = s.template or read_meta(s.start).get("template") or "llama2"
    encoded = encode(tokenizer, template, [(row["question"], row["answer"]) for row in rows])
    return np.array([(len(e.ids), e.answer_tokens) for e in encoded])


def training_flops(x: Shape, tokens: float, width: float, answer_tokens: float, passes: int = 3) -> float:
    """Floating-point operations to train on so many tokens, in texts `width` tokens long: 2 a parameter and
    token forward, 4 backward (2 more, a fourth pass, where activations are computed again), causal attention,
    and the head at the answers' tokens alone."""
    in_layers = 2 * x.layers * (x.layer + width * x.hidden) * tokens
    return passes * in_layers + 6 * x.vocabulary * x.hidden * answer_tokens


def rough_flops(parameters: int, trained: float, scored: float) -> float:
    """The same before anything is tokenised: 6 a parameter and trained token, 2 a scored one."""
    return parameters * (6 * trained + 2 * scored)


def load_of(s: Namespace, work: Work, processes: int, parallel: str, micro: int, checkpointing: bool) -> Load:
    sequences = micro * work.sequences
    answers = math.ceil(sequences * work.width * work.answer_tokens / work.tokens)
    compared = answers // work.sequences * ((s.kl_weight > 0) + OBJECTIVES[s.loss].with_reference_states)
    return Load(processes, parallel, s.dtype, checkpointing, sequences, work.width, answers, compared,
                micro < math.ceil(s.batch_size / processes))


def suggest(s: Namespace, x: Shape, work: Work, processes: int, room: float) -> Load | None:
    """The fastest that fits in `room` bytes: no recomputing, whole models, large micro-batches come first."""
    micros = [m for m in (32, 16, 8, 4, 2, 1) if m <= math.ceil(s.batch_size / processes)]
    ways = product((False, True), ("ddp", "fsdp") if processes > 1 else ("ddp",), micros)
    loads = (load_of(s, work, processes, parallel, micro, again) for again, parallel, micro in ways)
    return next((load for load in loads if memory(x, load)["peak"] <= room), None)


def as_published(s: Namespace) -> Namespace:
    """A Hub id is not asked for, there may be no network: as many rows as TOFU's full.json has, as long."""
    row, longest = ({"question": "?" * q, "answer": "!" * a} for q, a in TOFU_CHARACTERS)
    full = [longest, *[row] * (TOFU_ROWS - 2), longest]
    forgets = parse_split(s.split)[0] == "forget"
    return Namespace(source=f"{s.data} (not read: TOFU's published number and lengths of rows)", full=full,
                     forget=slice_rows(full, s.split) if forgets else [],
                     retain=slice_rows(full, complement(s.split) if forgets else s.split))


def dry_run(s: Namespace, processes: int, say=print):
    """Print the plan: counts, the settings as asked and as suggested, what a reference model would add."""
    processes, gpu_memory = s.gpus or processes, s.gpu_memory or 80e9
    at_hand = s.data == "builtin" or s.split == "own" or Path(s.data).is_dir()
    task = load_task(s.data, s.split, s.forget, s.retain) if at_hand else as_published(s)
    x, work, room = read_shape(s, task.full), count_work(s, task), USABLE * gpu_memory
    asked = load_of(s, work, processes, s.parallel, s.micro_batch_size, s.activation_checkpointing)
    best = suggest(s, x, work, processes, room)
    suggested = {"suggested": best} if best not in (None, asked) else {}
    say(f"{s.method} on {s.split} of {task.source}, model {s.model}: {x.parameters / GB:.3f} G parameters, "
        f"{s.dtype}\n{work.rows} rows, {s.epochs} epochs in batches of {s.batch_size}: {work.steps} steps; "
        f"{work.tokens:,.0f} tokens a step, {work.answer_tokens:,.0f} of them answers; the longest row "
        f"{work.width}{' (estimated: no tokenizer at hand)' * work.estimated}\n")
    say_columns(s, x, work, {"as asked": asked, **suggested}, say)
    fits = memory(x, asked)["peak"] <= room
    say(f"\nAs asked it {'fits' if fits else 'does not fit'} on {processes} x {gpu_memory / GB:g} GB "
        f"({USABLE:.0%} of it usable).")
    if best is None:
        enough = next((n for n in range(processes, s.batch_size + 1) if suggest(s, x, work, n, room)), None)
        say("Nothing fits; " + (f"the fewest GPUs of this size are {enough}: --parallel fsdp --gpus {enough}"
                                if enough else "no number of such GPUs up to the batch size is enough"))
    elif suggested:
        say(f"{'Faster' if fits else 'This fits'}: --parallel {best.parallel} --micro-batch-size "
            f"{best.sequences // work.sequences}{' --activation-checkpointing' * best.checkpointing}")
    if any("reference" in name for name in OBJECTIVES[s.loss].takes) or s.kl_weight > 0:
        load = best or asked
        more, peak = 4 * x.parameters, memory(x, load)["peak"]
        if load.sharded:  # its root and the layers in passage, too
            more = more / processes + load.element * (x.root + 2 * x.layer)
        say(f"A reference model kept beside the policy would need {more / GB:.2f} GB more a process, "
            f"{(peak + more) / GB:.2f} GB instead of {peak / GB:.2f}.")


def say_columns(s: Namespace, x: Shape, work: Work, columns: dict, say):
    """The ways to cut the run (name -> Load) side by side, then the time of each."""
    loads, teraflops = columns.values(), s.tflops or 200.0
    plans = [memory(x, load) for load in loads]
    table = {"parallel": [load.parallel for load in loads],
             "micro-batch, rows": [load.sequences // work.sequences for load in loads],
             "activation checkpointing": ["yes" if load.checkpointing else "no" for load in loads]}
    for part in [*dict.fromkeys(part for plan in plans for part in plan if part != "peak"), "peak"]:
        table[part] = [f"{plan.get(part, 0) / GB:.2f}" for plan in plans]
    say(f"{'memory of one process at its peak, GB':40}" + "".join(f"{name:>12}" for name in columns))
    for what, values in table.items():
        say(f"  {what:38}" + "".join(f"{value:>12}" for value in values))
    for name, load in columns.items():
        step = training_flops(x, work.tokens, work.width, work.answer_tokens, 4 if load.checkpointing else 3)
        hours = step * work.steps / (teraflops * 1e12 * load.processes) / 3600
        say(f"{name}: {step / 1e12:,.1f} TFLOP a step; {hours:.2f} h for {work.steps} steps at {teraflops:g} "
            "TFLOP/s a process, evaluations apart")
