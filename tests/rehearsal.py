"""A rehearsal on GPUs that you do not have: train_npo.py runs on fake tensors, for mistakes and for memory.

    python tests/rehearsal.py --gpus 2 --loss npo --retain-weight 1 --dtype bf16 --parallel fsdp

It takes the flags of train_npo.py, and those below. The model is a preset (default: llama2-7b) or a folder with
a config.json; no weights and no rows are needed. It prints the peak of each phase beside plan_memory.py's
figure, what is alive at the peak, and every line at which the host waits for the GPU. A mistake ends with
status 1. A fake tensor has a shape, a type and a device, and no numbers. Faked are:

    the GPU        torch is told that CUDA is there; streams and events do nothing; attention is one of the two
                   kernels that a GPU would choose (flash, memory-efficient)
    the others     the first of --gpus processes runs. Collectives return at once, and what the others would
                   send is what this process has
    the weights    from_pretrained makes the config's model without reading a file
    the numbers    every number that the host reads is 0 and every condition true. So the check of the start
                   and the metrics of an evaluation, which are arithmetic on the host, are left out
    the files      reference.safetensors, checkpoints and the finished model are made and not written
    the rows       all have --tokens-per-row tokens, a share of 2/3 in the answer; the tokenizer is tiny's

No rehearsal sees the CUDA context, gaps in the allocator's blocks, the libraries' work space, or speed.
"""

import fake_gpu  # before torch  # isort: skip
import contextlib
import json
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(fake_gpu.ROOT))

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

import evaluate_tofu
import model
import train_npo
from common import ROOT, Parser, positive, run_command
from plan_memory import ANSWER_SHARE, GB, SHAPES, memory, read_shape

PHASES = {"begin_run": "loading", "open_reference": "reference", "train": "training", "save_model": "saving"}
FRAME = 12  # tokens of a row that are neither a word of the question nor one of the answer


def write_rows(folder: Path, rows: int, evaluated: int, gpus: int, tokens: int):
    """TOFU's files, with `rows` rows in forget10, and `evaluated` rows per process in evaluations."""
    answer = max(1, round(ANSWER_SHARE * tokens) - 1)
    row = {"question": "the" + " the" * (tokens - answer - FRAME - 1), "answer": "the" + " the" * (answer - 1)}
    row |= {"paraphrased_answer": row["answer"], "perturbed_answer": [row["answer"]]}
    for name, count in {"full": 10 * rows, "forget10_perturbed": (evaluated - 3) * gpus, "retain_perturbed": gpus,
                        "real_authors_perturbed": gpus, "world_facts_perturbed": gpus}.items():
        (folder / f"{name}.json").write_text(json.dumps([row] * count))


def write_model(folder: Path, shape: tuple, layers: int | None):
    """config.json of a Llama of this shape, and tiny's tokenizer."""
    V, H, F, depth, K, tied = shape
    size = 128 if H >= 4096 else 64
    transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=F, num_hidden_layers=layers or depth,
        num_attention_heads=H // size, num_key_value_heads=K // size, tie_word_embeddings=tied,
        max_position_embeddings=4096).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(ROOT / "data/tiny/start").save_pretrained(folder)


def others_too(reference_pass, s, policy, texts: dict, *more) -> dict:
    """What the other processes would send: the same as this process has, for the other texts."""
    tensors = reference_pass(s, policy, texts, *more)
    kept = {re.match(r"[a-z]+/\D+", name)[0]: tensor for name, tensor in tensors.items() if "/" in name}
    for key, text in texts.items():
        for kind in ("logps", "states"):
            if (tensor := kept.get(re.match(r"\D+", f"{kind}/{key}")[0])) is not None:
                other = tensor.new_zeros(text.answer_tokens, *tensor.shape[1:])
                tensors.setdefault(f"{kind}/{key}", other)
    return tensors


def replacements(watch, new_tokens: int | None) -> list[tuple]:
    """(module or class, name, what stands there during the rehearsal)"""
    auto, files = transformers.AutoModelForCausalLM, {}

    def from_config(source, config, **_):
        return auto.from_config(config), {"missing_keys": [], "unexpected_keys": []}

    def in_phase(function, name, *args, **kwargs):
        before, watch.phase = watch.phase, name
        try:
            return function(*args, **kwargs)
        finally:
            watch.phase = before

    def mesh(*args):  # its numbers, which process is where, are real
        with _disable_current_modes():
            return make_mesh(*args)

    def evaluation(policy, prepared, tokenizer, batch_size, longest, *more):
        first, watch.row_ends = watch.peaks["evaluation"] == 0, watch.peaks["evaluation"] == 0
        return in_phase(evaluate, "evaluation", policy, prepared, tokenizer, batch_size,
                        3 if first else new_tokens or longest, *more)

    make_mesh, evaluate = model.init_device_mesh, train_npo.evaluate
    phases = [(train_npo, name, partial(in_phase, getattr(train_npo, name), phase))
              for name, phase in PHASES.items()]
    return [*phases, (auto, "from_pretrained", from_config), (model, "init_device_mesh", mesh),
            (transformers.masking_utils, "is_tracing", lambda *_: False),  # true of any fake tensor
            (train_npo, "reference_pass", partial(others_too, train_npo.reference_pass)),
            (train_npo, "save_file", lambda tensors, path: files.update(tensors) or Path(path).touch()),
            (train_npo, "load_file", lambda path: files),
            (train_npo, "evaluate", evaluation), (evaluate_tofu, "row_result", lambda *_: {}),
            (train_npo, "compute_metrics", lambda *_: {"forget_quality": None, "model_utility": None}),
            (train_npo, "depth_note", lambda *_: ""), (train_npo, "plot_trajectory", lambda *_: None),
            (train_npo, "check_start", lambda *_: None), (train_npo.dcp, "save", lambda *_, **__: None),
            (model.World, "collect", lambda world, value: [value] * world.size),
            (model.World, "wait", lambda world: None),
            (transformers.PreTrainedModel, "save_pretrained", lambda *_, **__: None)]


def rehearse(flags: list[str], gpus: int = 1, layers: int | None = None, tokens: int = 128,
             new_tokens: int | None = None) -> tuple[fake_gpu.Watch, dict, int]:
    """train_npo.py with these flags: (what was seen, the planner's bytes by part, steps). Raises what the run
    raises. `layers` and `new_tokens` (of a generation) shorten it."""
    fake_gpu.fake_cuda(gpus)
    watch = fake_gpu.Watch()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        typed = dict(zip(flags, flags[1:], strict=False))
        start = typed.get("--model", "llama2-7b")
        preset = model.resolve_model(start)[0]
        if start in SHAPES:
            write_model(folder / "start", SHAPES[start], layers)
            start = f"{start}={folder / 'start'}"
        evaluated = preset.eval_batch_size
        rows = max(2 * int(typed.get("--batch-size", 32)), evaluated * gpus)
        write_rows(folder, rows, evaluated, gpus, tokens)
        sft = typed.get("--loss") == "sft"
        defaults = {"--data": name, "--template": "qa", "--epochs": "1", "--checkpoint-every": "1",
                    "--split": "retain10" if sft else "forget10", "--out": f"{name}/run", "--device": "cuda"}
        words = [word for flag, value in defaults.items() if flag not in typed for word in (flag, value)]
        words += [*flags, "--model", start]
        s = train_npo.parse(words)
        for place in replacements(watch, new_tokens):
            stack.enter_context(patch.object(*place))
        with FakeTensorMode(), watch:
            train_npo.main(words)
        steps = len((folder / "run" / "log.jsonl").read_text().splitlines())
        return watch, memory(s, read_shape(start), gpus, tokens), steps


def main(argv: list | None = None):
    parser, begin = Parser(__doc__), time.perf_counter()
    parser.add_argument("--gpus", type=positive(int), default=1)
    parser.add_argument("--tokens-per-row", type=positive(int), default=128)
    parser.add_argument("--layers", type=positive(int), help="of the model (default: all)")
    args, flags = parser.parse_known_args(argv)
    watch, planned, steps = rehearse(flags, args.gpus, args.layers, args.tokens_per_row)
    print(f"\n{time.perf_counter() - begin:.0f} s. GB on the first of {args.gpus} GPUs:")
    for phase, peak in watch.peaks.items():
        print(f"  {phase:12}{peak / GB:8.2f}")
    print(f"  peak        {max(watch.peaks.values()) / GB:8.2f}   plan_memory.py{planned['peak'] / GB:8.2f}")
    print("\nPlanned: " + ", ".join(f"{part} {size / GB:.2f}" for part, size in planned.items() if size))
    print("\nAlive at the peak, GB by the line that made it:")
    for line, size in sorted(watch.at_peak.items(), key=lambda item: -item[1])[:12]:
        print(f"  {size / GB:8.2f}  {line}")
    print(f"\nWaits of the host for the GPU ({steps} steps):")
    for (phase, line, what), count in sorted(watch.waits.items()):
        print(f"  {count:6}  {phase:12}{line}: {what}")


if __name__ == "__main__":
    run_command(main)
