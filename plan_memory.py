"""How much memory and disk a run of train_npo.py takes, from formulas: no model is loaded, no data is read.

    python plan_memory.py --model llama2-7b --loss npo --retain-weight 1 --gpus 2 --gpu-memory 80G

It takes the flags of train_npo.py, and those below. Where the run does not fit, it looks for the cheapest change
with which it fits: smaller micro-batches, --activation-checkpointing, bf16 with FSDP, and --lora last. It prints
the command. Layers are counted as Llama's.

The figures were compared with tests/rehearsal.py, which runs the real code on fake tensors (docs/scale.md has
the table). No GPU has confirmed them. A rehearsal sees neither the CUDA context, nor gaps between the
allocator's blocks, nor the libraries' work space. USABLE allows for these three.
"""

import shlex
from dataclasses import replace

from common import ROOT, InputError, Parser, positive, run_command
from evaluate_tofu import CHUNK
from losses import OBJECTIVES
from model import PRESETS, Preset, resolve_model
from train_npo import Settings, parse

ANSWER_SHARE = 2 / 3  # of a row's tokens, in TOFU
REFUSAL_TOKENS = 12  # of the longest refusals
USABLE = 0.92  # of a GPU's memory; see above
GB = 1e9
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
        keys = hidden // heads * getattr(config, "num_key_value_heads", heads)
        return (config.vocab_size, hidden, getattr(config, "intermediate_size", 4 * hidden),
                config.num_hidden_layers, keys, config.tie_word_embeddings)
    except (OSError, ValueError, AttributeError):
        raise InputError(f"--model {model}: need {', '.join(SHAPES)}, or a folder with config.json") from None


def moments(s: Settings, shape: tuple, gpus: int, tokens_per_row: int) -> list[dict[str, float]]:
    """Bytes on one GPU by part, at each moment of a step and of an evaluation that can be the peak."""
    V, H, F, layers, K, tied = shape
    layer, root = 2 * H * H + 2 * H * K + 3 * H * F + 2 * H, (1 if tied else 2) * V * H + H  # parameters
    autocast, sharded = s.dtype != "fp32", s.parallel == "fsdp" and gpus > 1
    size, share = 2 if autocast else 4, gpus if sharded else 1  # size: bytes per number in matrix products
    rows = min(s.micro_batch_size, -(-s.batch_size // gpus))
    loss, many = OBJECTIVES[s.loss], s.batch_size > rows * gpus  # many: gradients wait for more micro-batches
    texts, refused = rows * (loss.needs_answers + bool(s.terms)), rows * ("policy_chosen_logps" in loss.inputs)
    prompt = round((1 - ANSWER_SHARE) * tokens_per_row)
    tokens = texts * tokens_per_row + refused * (prompt + REFUSAL_TOKENS)
    answers = texts * ANSWER_SHARE * tokens_per_row + refused * REFUSAL_TOKENS
    compared = rows * ANSWER_SHARE * tokens_per_row * sum(
        "reference_logits" in objective.inputs for objective in s.objectives().values())
    weights = trained = layers * layer + root
    if s.lora:  # two matrices per linear layer; frozen layers are kept in the precision of the products
        trained = s.lora * layers * (9 * H + 2 * K + 3 * F)
        weights = trained + root + layers * layer * size / 4
    # What a layer keeps of each token for its backward pass: residual stream and norms (float32 under
    # autocast), queries, attention output; keys and values; gate, up and their two products.
    kept = {4: 32, 2: 20 if sharded else 24 if s.lora else 30}[size] * H + size * (2 * K + 4 * F)
    if not autocast and K < H:  # in float32, keys that heads share are copied, and attention is written out
        kept += 4 * (H // (128 if H >= 4096 else 64) * tokens_per_row + 2 * (H - K))
    evaluated = s.eval_every != "never"
    always = {"weights": 4 * weights / share, "AdamW's moments": 8 * trained / share,
              "reference's head": 4 * V * H * (compared > 0 or s.loss != "sft" and evaluated),
              "gathered by FSDP": size * root * sharded}
    def copies(count):
        return {"16-bit copies of weights": 2 * (count * layer * (not s.lora) + V * H) * autocast * (not sharded)}

    checkpoint = (size if sharded else 4) * H  # a layer's input alone; one layer at a time is computed again
    saved = {"activations": tokens * layers * (checkpoint if s.activation_checkpointing else kept)}
    full, begun = {"gradients": 4 * trained / share}, {"gradients": 4 * trained / share * many}
    again = {"one layer at work": tokens * kept * s.activation_checkpointing}
    # FSDP gathers a layer ahead of time, and sums the last layer's gradients in float32.
    two_layers = {"gathered by FSDP": (root + min(3, layers) * layer) * size * sharded,
                  "new gradients": (size * V * H + 4 * layer if sharded else 4 * V * H * tied) * (not s.lora)}
    # At the end the gradients of embedding and head are summed, or cast to float32.
    last = max(size + 4, 4 * size * tied) * root if sharded else (12 if tied else 4) * V * H
    summed = always | {"gathered by FSDP": 0, "new gradients": last * (not s.lora),
                       "gradients": 4 * (trained - root * sharded * (not many)) / share}
    if refused and texts:  # the refusals come first in the backward pass; their gradients wait for the answers
        waiting = layers * layer * (not s.lora)
        summed |= begun | {"gathered by FSDP": always["gathered by FSDP"], "activations": saved["activations"] * texts * tokens_per_row / tokens,
                           "16-bit copies of weights": 2 * waiting * autocast * (not sharded),
                           "new gradients": summed["new gradients"] + size * waiting}
    head = size * V * H + (0 if sharded else 4 * V * H * autocast)
    backward = copies(1 if s.activation_checkpointing else layers)
    result = [
        always | copies(layers) | saved | begun | {"logits": 8 * V * (answers + (answers + compared) * (compared > 0))},
        always | backward | saved | begun | {"logits": V * (16 * answers + 8 * compared)},
        always | backward | saved | begun | {"logits": V * size * answers, "new gradients": head * (not s.lora)},
        always | backward | saved | begun | again | two_layers, always | full | again | two_layers, summed]
    if evaluated or "kl_baseline" in loss.inputs:
        batch, whole = Preset.eval_batch_size, {"gathered by FSDP": size * (layers * layer + root) * sharded}
        _, name, _ = resolve_model(s.model)
        batch = PRESETS[name].eval_batch_size if name else batch
        scored = batch * tokens_per_row * (V * size * ANSWER_SHARE + 6 * H)
        cache = batch * (prompt + Preset.max_new_tokens) * (layers + 1) * K * (size + (size if sharded else 4))  # keys: as the stream
        result += [always | copies(layers) | whole | {"logits": scored + max(scored, 16 * V * CHUNK)},
                   always | copies(layers) | whole | {"logits": scored, "a generation's cache": cache}]
    return result


def memory(s: Settings, shape: tuple, gpus: int, tokens_per_row: int) -> dict[str, float]:
    """Bytes on one GPU at the peak, by part. "peak" is their sum."""
    parts = max(moments(s, shape, gpus, tokens_per_row), key=lambda moment: sum(moment.values()))
    return parts | {"peak": sum(parts.values())}


def changes(s: Settings, gpus: int):
    """Changes of the settings to try, in the order of this file's first lines. The first one is none."""
    sharded = [{"parallel": "fsdp"}] if gpus > 1 and not s.lora else []
    adapters = {"lora": s.lora or 8, "parallel": "ddp"}
    less = [{"activation_checkpointing": True},
            *({"micro_batch_size": m} for m in (16, 8, 4, 2, 1) if m < s.micro_batch_size)]
    for additions in ([{}, *sharded, *less], [adapters, {"dtype": "bf16"}, *less]):
        change = {}
        for addition in additions:
            change |= addition
            yield {name: value for name, value in change.items() if value != getattr(s, name)}


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
    typed = plans[0][1]
    change, changed = next((plan for plan in plans if plan[1]["peak"] <= room), plans[-1])
    add = "".join(f" --{name.replace('_', '-')}" + f" {value}" * (value is not True)
                  for name, value in change.items())
    print(f"{s.method}, {s.model}, {s.dtype}, micro-batches of {s.micro_batch_size} rows, "
          f"{args.tokens_per_row} tokens each\n\n{'GB on each GPU':32}as typed{'  with' * bool(add)}{add}")
    for part in (part for part in typed if typed[part] or changed[part]):
        print(f"{part:32}{typed[part] / GB:8.2f}" + f"{changed[part] / GB:8.2f}" * bool(add))
    verdict = f"does not fit as typed. Add{add}" if add else "fits"
    print(f"\nOn {args.gpus} x {args.gpu_memory / GB:g} GB ({USABLE:.0%} of it usable) this run " + (
        verdict if changed["peak"] <= room else "does not fit with any change: take more or larger GPUs"))


if __name__ == "__main__":
    run_command(main)
