"""How much memory and disk a run of train_npo.py takes, from formulas: no model is loaded, no data is read.

    python plan_memory.py --model llama2-7b --loss npo --retain-weight 1 --gpus 2 --gpu-memory 80G

It takes the flags of train_npo.py, and those below. Where the run does not fit, it tries smaller
micro-batches, --activation-checkpointing, bf16 with FSDP, and last --lora. Layers are counted as Llama's.

The figures were compared with tests/rehearsal.py, which runs the real code on fake tensors (docs/scale.md).
No GPU has confirmed them. They leave out the CUDA context, gaps between the allocator's blocks, and the
libraries' work space: 8% of a GPU are kept free for these.
"""

import math
import shlex
from dataclasses import replace

from common import ROOT, InputError, Parser, positive, run_command
from evaluate_tofu import CHUNK
from losses import OBJECTIVES
from model import resolve_model
from train_npo import Settings, parse

ANSWER_SHARE, REFUSAL_TOKENS = 2 / 3, 12  # of a row's tokens in TOFU; tokens of a refusal
USABLE, GB = 0.92, 1e9  # of a GPU's memory, see above
# Sizes of vocabulary V, hidden states H, MLP F; number of layers; size of keys; is the head the embedding?
SHAPES = {"smollm2-135m": (49152, 576, 1536, 30, 192, True),
          "llama3.2-1b": (128256, 2048, 8192, 16, 512, True),
          "llama3.1-8b": (128256, 4096, 14336, 32, 1024, False),
          "qwen2.5-1.5b": (151936, 1536, 8960, 28, 256, True),
          "llama2-7b": (32000, 4096, 11008, 32, 4096, False)}


def read_shape(model: str) -> tuple:
    """A line of the table above, or the same from a folder's config.json. Raises InputError."""
    preset, name, path = resolve_model(model)
    if name in SHAPES and not path:
        return SHAPES[name]
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(path or ROOT / preset.finetuned, local_files_only=True)
        hidden, heads = config.hidden_size, config.num_attention_heads
        if any(getattr(config, name, 0) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
            raise ValueError("experts")
        size = getattr(config, "head_dim", None) or hidden // heads
        keys = size * getattr(config, "num_key_value_heads", heads)
        return (config.vocab_size, hidden, getattr(config, "intermediate_size", 4 * hidden),
                config.num_hidden_layers, keys, config.tie_word_embeddings)
    except (OSError, ValueError, AttributeError):
        raise InputError(f"--model {model}: need {', '.join(SHAPES)}, or a folder with the config.json of a "
                         "model without experts, whose layers are like Llama's") from None


def parameters(s: Settings, shape: tuple) -> tuple[int, int, int, int]:
    """Numbers of parameters: of a layer, of embedding and head, of the model, and of what is trained."""
    V, H, F, layers, K, tied = shape
    layer, root = 2 * H * H + 2 * H * K + 3 * H * F + 2 * H, (1 if tied else 2) * V * H + H
    weights = layers * layer + root  # and two matrices of adapters per linear layer
    return layer, root, weights, s.lora * layers * (9 * H + 2 * K + 3 * F) or weights


def moments(s: Settings, shape: tuple, gpus: int, tokens_per_row: int) -> list[dict[str, float]]:
    """Bytes on one GPU by part, at each moment that can be the peak."""
    (V, H, F, layers, K, tied), (layer, root, _, trained) = shape, parameters(s, shape)
    autocast, sharded, full = s.dtype != "fp32", s.parallel == "fsdp" and gpus > 1, not s.lora
    size, share = 2 if autocast else 4, gpus if sharded else 1  # size: bytes per number in matrix products
    rows, loss = min(s.micro_batch_size, math.ceil(s.batch_size / gpus)), OBJECTIVES[s.loss]
    prompt, answer = (1 - ANSWER_SHARE) * tokens_per_row, ANSWER_SHARE * tokens_per_row
    texts = rows * (loss.needs_answers + bool(s.terms))
    refused = rows * ("policy_chosen_logps" in loss.inputs)
    tokens = texts * tokens_per_row + refused * (prompt + REFUSAL_TOKENS)
    answers = texts * answer + refused * REFUSAL_TOKENS
    compared = rows * answer * sum("reference_logits" in term.inputs for term in s.objectives().values())
    weights = trained if full else trained + root + layers * layer * size / 4  # frozen layers have 16 bits
    evaluated = s.eval_every != "never"
    head = 4 * V * H * (compared > 0 or s.loss != "sft" and evaluated)
    # What a layer keeps of each token for its backward pass: residual stream and norms (float32 under
    # autocast), queries, attention output; keys and values; gate, up and their two products.
    kept = (32 if not autocast else 20 if sharded else 30 if full else 24) * H + size * (2 * K + 4 * F)
    if not autocast and K < H:  # a GPU has no float32 kernel for shared keys: attention is written out
        kept += 4 * (H // (128 if H >= 4096 else 64) * tokens_per_row + 2 * (H - K))
    stored = (size if sharded else 4) * H if s.activation_checkpointing else kept  # of each layer

    def at(activations=0.0, gathered=0.0, copied=0.0, gradients=0.0, new=0.0, **more) -> dict[str, float]:
        cast = 2 * (copied * layer * full + V * H) * (autocast and not sharded and copied > 0)
        return {"weights": 4 * weights / share, "AdamW's moments": 8 * trained / share,
                "gradients": gradients, "reference's head": head, "activations": activations,
                "16-bit copies of weights": cast, "gathered by FSDP": size * gathered * sharded,
                "gradients being added": new * full, **more}

    # `begun`: gradients of earlier micro-batches.
    done, saved = 4 * trained / share, tokens * layers * stored
    begun = done * (s.batch_size > rows * gpus)
    again = tokens * kept * s.activation_checkpointing  # one layer is computed again at a time
    copied = 1 if s.activation_checkpointing else layers
    ahead = root + min(3, layers) * layer  # FSDP gathers layers early
    in_layers = size * V * H + 4 * layer if sharded else 4 * V * H * tied
    # At the end the gradients of embedding and head are added, or cast to float32.
    last = max(size + 4, 4 * size * tied) * root if sharded else (12 if tied else 4) * V * H
    forward = 8 * V * (answers + (answers + compared) * (compared > 0))
    result = [
        at(saved, root, layers, begun, logits=forward),
        at(saved, root, copied, begun, logits=V * (16 * answers + 8 * compared)),
        at(saved, root, copied, begun, size * V * H + 4 * V * H * (autocast and not sharded),
           logits=V * size * answers),
        at(saved + again, ahead, copied, begun, in_layers), at(again, ahead, 0, done, in_layers),
        at(0, 0, 0, done - 4 * root / share * (sharded and not begun), last)]
    if refused and texts:  # the refusals' gradients, the first of the backward pass, wait for the others
        result.append(at(texts * tokens_per_row * layers * stored, root, copied, begun,
                         last + size * layers * layer))
    if evaluated or "kl_baseline" in loss.inputs:
        preset, *_ = resolve_model(s.model)
        scored = preset.eval_batch_size * (V * size * answer + 6 * H * tokens_per_row)
        cache = preset.eval_batch_size * (prompt + preset.max_new_tokens) * (layers + 1) * K
        result += [at(0, layers * layer + root, layers, logits=scored + max(scored, 16 * V * CHUNK)),
                   at(0, layers * layer + root, layers, logits=scored,  # without FSDP the keys are float32
                      **{"a generation's cache": cache * (size + (size if sharded else 4))})]
    return result


def memory(s: Settings, shape: tuple, gpus: int, tokens_per_row: int) -> dict[str, float]:
    """Bytes on one GPU at the peak, by part. "peak" is their sum."""
    parts = max(moments(s, shape, gpus, tokens_per_row), key=lambda moment: sum(moment.values()))
    return parts | {"peak": sum(parts.values())}


def changes(s: Settings, gpus: int):
    """Changes of the settings to try, in the order of this file's first lines. The first one is none."""
    smaller = [{"micro_batch_size": m} for m in (16, 8, 4, 2, 1) if m < s.micro_batch_size]
    again, short = {"activation_checkpointing": True}, {"dtype": "bf16"} if s.dtype == "fp32" else {}
    for base in ({}, short | {"parallel": "fsdp"}, short | {"lora": s.lora or 8, "parallel": "ddp"}):
        if "fsdp" not in base.values() or gpus > 1 and not s.lora:
            for change in ({}, *smaller, again, *(again | fewer for fewer in smaller)):
                yield {name: value for name, value in (base | change).items() if value != getattr(s, name)}


def main(argv: list | None = None):
    parser = Parser(__doc__)
    parser.add_argument("--gpus", type=positive(int), default=1, help="one process runs on each")
    parser.add_argument("--gpu-memory", default=80 * GB, help="of one GPU, such as 80G",
                        type=lambda text: GB * positive(float)(text.rstrip("GB")))
    parser.add_argument("--tokens-per-row", type=positive(int), default=128, help="of the longest rows")
    args, flags = parser.parse_known_args(argv)
    s = parse(flags)
    work, room = (read_shape(s.model), args.gpus, args.tokens_per_row), USABLE * args.gpu_memory
    plans = [(change, memory(replace(s, **change), *work)) for change in changes(s, args.gpus)]
    typed, fits = plans[0][1], [plan for plan in plans if plan[1]["peak"] <= room]
    change, changed = (fits or plans[-1:])[0]
    add = [word for name, value in change.items()
           for word in (f"--{name.replace('_', '-')}", str(value)) if word != "True"]
    print(f"{s.method}, {s.model}, {s.dtype}, micro-batches of {s.micro_batch_size} rows, "
          f"{args.tokens_per_row} tokens each\n\n{'GB on each GPU':32}as typed  {shlex.join(add)}")
    for part in sorted({*typed, *changed}, key=lambda part: (part == "peak", -changed.get(part, 0))):
        sizes = [parts.get(part, 0) / GB for parts in (typed, changed)][:1 + bool(add)]
        print(f"{part:32}" + "".join(f"{size:8.2f}" for size in sizes))
    *_, weights, trained = parameters(replace(s, **change), work[0])
    disk = 36 * trained + 4 * weights * (1 + (s.keep == "best"))  # three checkpoints; model/, best/
    print(f"\nThe machine's own memory: {4 * weights / GB:.0f} GB for each process. Disk: {disk / GB:.0f} GB."
          f"\nOn {args.gpus} x {args.gpu_memory / GB:g} GB, {USABLE:.0%} of it usable, this run " + (
          "fits:" if fits else "does not fit with any change: take more or larger GPUs"))
    if fits:
        start = "python" if args.gpus == 1 else f"torchrun --nproc_per_node={args.gpus}"
        print(start, "train_npo.py", shlex.join([*flags, *add]))


if __name__ == "__main__":
    run_command(main)
