"""Peak memory of training at SmolLM2-135M's shape (random weights): ours, what `memory_plan.py` predicts, and a plain
loop with a resident reference and full logits.

    python benchmark/memory.py --data TOFU_DIR --out results

npo+rt on real TOFU rows, a batch of the stream. Each case is a fresh process; its peak resident size is counted above
its size just before the model is loaded. A first step of one row makes AdamW's moments; the second, a global batch of
the stream's first 32 rows, sets the peak.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
import torch.nn.functional as F

import train_npo
from data.batches import Item, collate, collate_packed
from data.tofu import load_task
from evaluate_tofu import Prepared
from models.loading import (
    AUTOCAST,
    PRESETS,
    AnswerModel,
    load_model,
    make_tiny,
    pad_id,
    save_model,
    weights_folder,
)
from running import memory_plan
from running.processes import join_world, peak_memory
from running.reference import Reference, reference_pass
from running.sharding import fill, shard
from support.files import write_json
from support.provenance import environment

# (name, ours?, processes, parallel, micro-batch, rows of the measured step, whole layers recomputed)
CASES = [("ours, micro-batch 8", True, 1, "ddp", 8, 32, False), ("plain, micro-batch 8", False, 1, "ddp", 8, 32, False),
         ("ours, micro-batch 32", True, 1, "ddp", 32, 32, False),
         ("plain, micro-batch 32", False, 1, "ddp", 32, 32, False),
         ("ours, ddp, 2 processes", True, 2, "ddp", 8, 32, False),
         ("ours, fsdp, 2 processes", True, 2, "fsdp", 8, 32, False),
         ("ours, activation checkpointing", True, 1, "ddp", 8, 32, True)]
GB = 1e9
# glibc raises its threshold for blocks of their own to 32 MB, and keeps smaller ones in a heap with holes:
# more resident memory than is held. Set, the threshold stays, for the plain loop; ours has what it sets itself.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)}


class Quiet:
    """Stands for a run folder: keeps nothing."""
    stopped = wants_stop = wants_checkpoint = False
    evaluation_steps = checkpoint_steps = frozenset()

    def restore(self, *_):
        return 0

    def log(self, *_):
        pass


def prepare(data: str, folder: Path):
    """A folder with random weights of the preset's shape, and a tokenizer fitted to the data."""
    task = load_task(data, "forget10")
    texts = [row[key] for row in task.full + task.facts() for key in ("question", "answer")] + task.refusals
    dims = dict(PRESETS["smollm2-135m"].dims, max_position_embeddings=2048)
    del dims["tie_word_embeddings"]  # make_tiny's are
    save_model(*make_tiny(texts, 0, dims), folder, {"preset": "smollm2-135m", "template": "llama2", "trained_on": {}})


def two_steps(plan, rows: int):
    """Cut the plan to a step of one row and one of the stream's first `rows` rows; it keeps no others."""
    items = plan.stream[0][:rows]
    plan.forget, plan.retain = [plan.forget[i.row] for i in items], [plan.retain[i.partner] for i in items]
    items = [Item(at, at, 0) for at in range(rows)]
    plan.stream, plan.steps, plan.warmup_steps = [items[:1], items], 2, 1


def plain_loop(s, lm, reference, plan, pad: int):
    """Policy and reference in memory, all logits, one cross entropy over them: what one writes first."""
    optimizer = torch.optim.AdamW(lm.parameters(), lr=s.lr, weight_decay=s.weight_decay)

    def logps(model, batch):
        labels = torch.full_like(batch.ids, -100)
        labels[batch.rows, batch.positions] = batch.targets
        logits = model(input_ids=batch.ids, use_cache=False).logits
        return -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(-1), batch.lengths.sum()
    for items in plan.stream:
        for at in range(0, len(items), s.micro_batch_size):
            some = items[at:at + s.micro_batch_size]
            forget = collate([plan.forget[i.row] for i in some], pad)
            retain = collate([plan.retain[i.partner] for i in some], pad)
            with torch.no_grad():
                reference_logps, _ = logps(reference, forget)
            policy_logps, _ = logps(lm, forget)
            retain_logps, tokens = logps(lm, retain)
            loss = train_npo.npo_loss(policy_logps, reference_logps, s.beta).mean() - retain_logps.sum() / tokens
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(case: tuple, data: str, folder: str) -> dict:
    """Bytes above the size before the model was loaded: measured, and for ours as predicted."""
    name, ours, processes, parallel, micro, rows, checkpointing = case
    given = {"loss": "npo", "retain_weight": 1.0, "model": f"smollm2-135m={folder}", "data": data,
             "parallel": parallel, "template": "llama2",
             "micro_batch_size": micro, "epochs": 1, "activation_checkpointing": checkpointing}
    s = train_npo.resolve(given)
    w = join_world("cpu", parallel)
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401  (imported, it is part of the size before)
    task, tokenizer = load_task(data, s.split), AutoTokenizer.from_pretrained(folder)
    plan = train_npo.Plan(s, task, tokenizer, None)
    two_steps(plan, rows)
    pad = pad_id(tokenizer)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    lm = load_model(folder, without_weights=w.sharded)[0]
    if not ours:
        plain_loop(s, lm, load_model(folder)[0].requires_grad_(False), plan, pad)
    else:
        model = AnswerModel(lm)
        if w.sharded:
            shard(model, AUTOCAST[s.dtype], w)
            fill(model, weights_folder(folder), w.device)
        with tempfile.TemporaryDirectory() as place:
            place = w.agree(place)
            reference_pass(s, model, plan, Prepared({}, [], {}), tokenizer, Path(place) / "reference", "mark", w)
            w.wait()
            reference = Reference(Path(place) / "reference", "mark", w.device)
            train_npo.train(s, model, plan, reference, pad, w, Quiet())
            w.wait()
    result = {"case": name, "processes": processes, "parallel": parallel, "micro_batch": micro, "rows": rows,
              "measured": w.most((peak_memory() - before) // 1024) * 1024}
    if ours:
        micros = train_npo.micro_batches(s, plan, plan.stream[-1], w)
        encoded = [[plan.forget[i.row] for i in m.items] + [plan.retain[p] for p in m.partners] for m in micros]
        packed = lambda texts: collate_packed(texts, [[i] for i in range(len(texts))], pad)
        widest = max(map(packed, encoded), key=lambda batch: batch.tokens)
        x = memory_plan.read_shape(s, task.full)
        load = memory_plan.Load(processes, parallel, s.dtype, checkpointing, *widest.ids.shape, len(widest.targets), 0,
                                len(micros) > 1)
        result["load"] = load._asdict()
        result["parts"] = {key: round(value) for key, value in memory_plan.memory(x, load).items()}
        result["predicted"] = result["parts"]["peak"]
    return {**result, "rank": w.rank}


def run_case(case: tuple, args, folder: Path) -> dict:
    """One case in fresh processes; of several the one with the largest peak."""
    processes = case[2]
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
                   "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    with tempfile.TemporaryDirectory() as place:
        words = [*launch, __file__, "--data", args.data, "--case", str(CASES.index(case)), "--model", str(folder),
                 "--out", place]
        subprocess.run(words, check=True, env={**os.environ, **({} if case[1] else ALLOCATOR)})
        results = [json.loads(file.read_text()) for file in Path(place).glob("rank*.json")]
    return max(results, key=lambda result: result["measured"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="TOFU's folder")
    parser.add_argument("--out", default="results", help="folder for memory.json and memory.md (default: results)")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of the cases to measure; the others stay")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        result = measure(CASES[args.case], args.data, args.model)
        (Path(args.out) / f"rank{result['rank']}.json").write_text(json.dumps(result))
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    file = Path(args.out) / "memory.json"
    done = {r["case"]: r for r in json.loads(file.read_text())["cases"]} if file.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        prepare(args.data, Path(place) / "model")
        for number, case in enumerate(CASES):
            if args.only is None or number in args.only:
                done[case[0]] = run_case(case, args, Path(place) / "model")
                print(done[case[0]], flush=True)
                provenance = environment()
                provenance["command"] = "measure_memory.py --data TOFU_DIR"
                write_json(file, {"cases": list(done.values()), "provenance": provenance})
                (Path(args.out) / "memory.md").write_text(table(done))


def table(done: dict) -> str:
    """Markdown: every case, then ours against the plain loop."""
    lines = ["# Memory at SmolLM2-135M's shape, npo+rt, float32 on a CPU", "",
             "Peak resident size of a process above its size before the model is loaded, GB; written by "
             "`python benchmark/memory.py --data TOFU_DIR`. The plain loop runs with "
             + " ".join(f"{key}={value}" for key, value in ALLOCATOR.items()) + ", which keeps holes out of its heap.",
             "",
             "| case | measured | predicted | predicted / measured |", "|---|---|---|---|"]
    for name, r in done.items():
        predicted = f"{r['predicted'] / GB:.2f} | {r['predicted'] / r['measured']:.2f}" if "predicted" in r else "|"
        lines.append(f"| {name} | {r['measured'] / GB:.2f} | {predicted} |")
    lines.append("")
    for micro in (8, 32):
        ours, plain = (done.get(f"{who}, micro-batch {micro}") for who in ("ours", "plain"))
        if ours and plain:
            lines.append(f"Micro-batch {micro}: ours needs {ours['measured'] / plain['measured']:.2f} of the plain "
                         "loop's peak.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
