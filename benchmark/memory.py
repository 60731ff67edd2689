"""Peak memory of training at SmolLM2-135M's shape (random weights): ours, what `memory_plan.py` predicts, and
B.

npo+rt, each case in fresh processes. The peak resident size is counted above the size just before the model
is loaded. A first step of one row makes AdamW's moments; the second, of ROWS rows, sets the peak.
"""

import resource
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmark.measurements import METHODS, Side, in_fresh_processes, spread
from benchmark.opponents import PlainLoop
from data.tofu import load_task
from models.loading import PRESETS, make_tiny, save_model
from running.memory_plan import Load, memory, shape_of
from running.processes import World, join_world, peak_memory
from support.files import write_json

GB = 1e9
ROWS = 32
# glibc raises its threshold for blocks of their own to 32 MB, and keeps smaller ones in a heap with holes:
# more is resident than is held. Set, the threshold stays: for the plain loop; ours sets its own.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)}


class Case(NamedTuple):
    name: str
    micro_batch: int
    ours: bool = True
    processes: int = 1
    parallel: str = "ddp"
    checkpointing: bool = False  # whole layers are recomputed


CASES = [Case("ours, micro-batch 8", 8), Case("plain, micro-batch 8", 8, ours=False),
         Case("ours, micro-batch 32", 32), Case("plain, micro-batch 32", 32, ours=False),
         Case("ours, ddp, 2 processes", 8, processes=2),
         Case("ours, fsdp, 2 processes", 8, processes=2, parallel="fsdp"),
         Case("ours, activation checkpointing", 8, checkpointing=True)]


def measure_memory(code: Namespace, args: Namespace) -> dict:
    """All cases; the row's ratios are those of the plain loop's peaks over ours."""
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = load_task(args.data, "full").full
        texts = [row[key] for row in rows for key in ("question", "answer")]
        dims = {**PRESETS["smollm2-135m"].dims, "max_position_embeddings": 2048}
        del dims["tie_word_embeddings"]  # make_tiny's are
        meta = {"preset": "smollm2-135m", "template": "llama2", "trained_on": {}}
        save_model(*make_tiny(texts, 0, dims), Path(folder) / "model", meta)
        there = Namespace(**{**vars(args), "model": f"smollm2-135m={folder}/model"})
        for case in CASES:
            found = in_fresh_processes(measure_case, code, there, case, count=case.processes,
                                       **({} if case.ours else ALLOCATOR))
            cases[case.name] = max(found, key=lambda result: result["measured"])
            print(cases[case.name], flush=True)
    peaks = {name: result["measured"] for name, result in cases.items()}
    ratio = {n: peaks[f"plain, micro-batch {n}"] / peaks[f"ours, micro-batch {n}"] for n in (8, 32)}
    return {"unit": "bytes", "cases": list(cases.values()),
            "ratio": {f"{n} rows": spread([value]) for n, value in ratio.items()}}


def measure_case(code: Namespace, args: Namespace, case: Case) -> dict:
    """In a process of its own: bytes above the size before the model was loaded, and for ours as
    predicted."""
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401  (a part of the size before)
    w = join_world(args.device.type, case.parallel) if case.ours else World(0, 1, args.device)
    load_task(args.data, "forget10")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    given = {**METHODS["npo+rt"], "micro_batch_size": case.micro_batch, "parallel": case.parallel,
             "activation_checkpointing": case.checkpointing}
    side, predicted = Side(code, args, given, [1, ROWS], every=4, w=w), {}
    if case.ours:
        predicted = train_and_predict(side, case)
    else:
        loop = PlainLoop(side.s, side.lm, side.tokenizer, 0, case.micro_batch, args.device)
        side.lm = None
        for items in side.plan.stream:
            loop.step(side.s.lr, *side.rows(items))
    on_gpu = args.device.type == "cuda"
    measured = torch.cuda.max_memory_allocated() if on_gpu else peak_memory() - before
    if dist.is_initialized():
        dist.destroy_process_group()
    return {"case": case.name, "processes": case.processes, "parallel": case.parallel, "rows": ROWS,
            "micro_batch": case.micro_batch, "measured": measured, **predicted}


def train_and_predict(side: Side, case: Case) -> dict:
    """The real loop's two steps, and what the plan says of the largest batch that the model was given in
    them."""
    shape, model, batches = shape_of(side.lm), side.model(), []
    side.lm = None

    def note(_, given: tuple):
        batches.append((*given[0].ids.shape, len(given[0].targets)))

    model.register_forward_pre_hook(note)
    with tempfile.TemporaryDirectory() as place:
        reference, _ = side.refer(side.w.agree(place), model)
        side.train(model, reference)
        side.w.wait()  # the others read the reference there
    sequences, width, answers = max(batches, key=lambda batch: batch[0] * batch[1])
    load = Load(case.processes, case.parallel, side.s.dtype, case.checkpointing, sequences, width, answers, 0,
                more_micro_batches=len(batches) > 2)  # the first step has one
    parts = {key: round(value) for key, value in memory(shape, load).items()}
    return {"load": load._asdict(), "parts": parts, "predicted": parts["peak"]}


def write_memory(folder: Path, row: dict):
    """memory.json and memory.md: every case, then ours against the plain loop."""
    write_json(folder / "memory.json", {"cases": row["cases"], "provenance": row["provenance"]})
    allocator = " ".join(f"{key}={value}" for key, value in ALLOCATOR.items())
    made = row["provenance"]
    lines = [f"# Memory at SmolLM2-135M's shape, npo+rt, {made['dtype']} on {made['device']}", "",
             "Peak resident size of a process above its size before the model is loaded, GB; written by "
             f"`{made['command']}`. The plain loop runs with {allocator}, which keeps holes out of its heap.",
             "", "| case | measured | predicted | predicted / measured |", "|---|---|---|---|"]
    for case in row["cases"]:
        measured, predicted = case["measured"] / GB, case.get("predicted", 0) / GB
        said = f"{predicted:.2f} | {predicted / measured:.2f}" if predicted else "|"
        lines.append(f"| {case['case']} | {measured:.2f} | {said} |")
    lines += ["", *(f"Micro-batch of {what}: ours needs {1 / ratio['median']:.2f} of the plain loop's peak."
                    for what, ratio in row["ratio"].items())]
    (folder / "memory.md").write_text("\n".join(lines) + "\n")
