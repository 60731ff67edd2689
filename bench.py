"""Speed and memory as ratios: this code against the loops that people use today, on one machine's CPU.

    python bench.py                                                   # the tiny model, about 10 minutes
    python bench.py --model smollm2-135m=FOLDER --data TOFU_FOLDER    # the numbers that count, about an hour

Ours is the command `train_npo.py`, timed from outside by the lines that it prints. The opponents are plain
loops in float32 with the same attention, threads and optimizer:

    B   as a framework does it: `minimal_npo.unlearn`, which runs a policy and a resident reference forward in
        each step, takes logits at all places, and retain rows in a second forward pass. Its micro-batches
        have our size. For fine-tuning it is a loop of its own
    A   as the authors do it: B with every row padded to 500 tokens, 2 rows at a time
    B'  an evaluation with 8 texts at a time, answers by the library's `generate`
    S   the synthetic experiment with one method and one instance at a time, in one thread

The sides take the same steps on the same rows in turn; ours, A and B have a new process each. Whole loops are
timed, ours with its reference pass. A takes 4 rows of 4 batches, B' every seventh row, S one instance of
five, and their times are scaled up. Losses of ours and B, scores and distances must agree to a relative 1e-4.
Memory is a process's peak, with Python and its libraries. Linux only.
"""

import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import minimal_npo
import synthetic
from common import ROOT, Parser, environment, run_command, write_json
from data.batches import Plan
from data.synthetic_instances import PUBLISHED_SEEDS, published_instance
from data.tofu import load_task
from evaluate_tofu import Prepared, evaluate, prepare, rouge_l_recall
from model import AnswerModel, load_model
from study.report import table
from train_npo import adamw, lr_factor, parse

METHODS = {"npo+rt": "--loss npo --retain-weight 1", "sft": "--loss sft --split retain01"}
TOLERANCE, STRIDE = 1e-4, 7  # B' takes every seventh row
KIB = 1024 / 1e9  # GB; Linux counts a process's peak in KiB


def spread(values: list) -> dict:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values), "n": len(values)}


def row_of(unit: str, costs: dict, **more) -> dict:
    """A row of the table. costs: "ours" and the opponents, one value per repeat. A ratio compares two values
    that were measured one after the other. Above 1, ours costs less."""
    ratios = {name: spread([theirs / ours for ours, theirs in zip(costs["ours"], values, strict=True)])
              for name, values in costs.items() if name != "ours"}
    return {"unit": unit, "ratio": ratios, "costs": {n: spread(v) for n, v in costs.items()}, **more}


def agree(what: str, ours, theirs) -> float:
    """The largest difference over the mean size of ours. Raises RuntimeError if it is above TOLERANCE."""
    gap = float(np.abs(np.subtract(ours, theirs)).max() / np.abs(ours).mean())
    if not gap <= TOLERANCE:
        raise RuntimeError(f"{what} differ by {gap:.2e}: ours and the opponent did not compute the same")
    return gap


def timed(function, *arguments, **named) -> tuple:
    """(what the function returns, seconds)."""
    begin = time.perf_counter()
    result = function(*arguments, **named)
    return result, time.perf_counter() - begin


def in_new_process(function, *arguments):
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_flush_denormal, (True,)) as pool:
        return pool.submit(function, *arguments).result()


def train(flags: list[str], out: Path) -> tuple[float, list, float]:
    """Ours: (seconds per row from the reference pass to the last step, losses, peak memory in GB)."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train_npo.py"), *flags, "--eval-every", "never",
                                "--device", "cpu", "--out", str(out)], stdout=subprocess.PIPE, text=True)
    begin = end = 0.0
    for line in process.stdout:
        if line.startswith("step"):
            end = time.perf_counter()
        elif not end:
            begin = time.perf_counter()  # the last line before the reference pass
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError("train_npo.py failed, see its message above")
    config = json.loads((out / "config.json").read_text())
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    return (end - begin) / (config["rows"] * config["settings"]["epochs"]), losses, usage.ru_maxrss * KIB


def answer_logps(lm, texts: list, width: int = 0) -> torch.Tensor:
    """log pi(y|x), (B, 1). Texts are padded to `width` tokens, or to the longest."""
    width = max(width, *(len(text.ids) for text in texts))
    ids, mask, labels = (torch.tensor([line + [filler] * (width - len(line)) for line in lines])
                         for filler, lines in ((0, [text.ids for text in texts]),
                                               (0, [[1] * len(text.ids) for text in texts]),
                                               (-100, [[-100] * t.start + t.ids[t.start:] for t in texts])))
    logits, labels = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], labels[:, 1:]
    return -F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100).sum(-1, keepdim=True)


def fine_tune(s, plan: Plan, policy, width: int, at_once: int):
    """Train `policy` on the stream's rows. Yields each step's (loss, None), as the page does."""
    optimizer = adamw(policy, s)
    for step, items in enumerate(plan.stream):
        tokens, total = plan.counts(items).forget_tokens, 0.0
        for at in range(0, len(items), at_once):
            texts = [plan.texts[f"run/row/{item.row}"] for item in items[at:at + at_once]]
            loss = -answer_logps(policy, texts, width).sum() / tokens
            loss.backward()
            total += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = s.lr * lr_factor(step, plan.steps, plan.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        yield total, None


def opponent(name: str, flags: list[str]) -> tuple[float, list, float]:
    """A or B on train_npo.py's batches, in a process of its own: (seconds per row, losses, peak memory in
    GB)."""
    s = parse(flags)
    reference, tokenizer, meta, _ = load_model(s.model, base=s.loss == "sft")
    s.template, policy = meta["template"], copy.deepcopy(reference)
    plan, width, at_once = Plan(s, load_task(s.data, s.split), tokenizer, None), 0, s.micro_batch_size
    if name == "A":
        plan.stream, width, at_once = [items[:4] for items in plan.stream[:4]], 500, 2
        minimal_npo.answer_logps = partial(answer_logps, width=width)
    if s.loss == "sft":
        steps = fine_tune(s, plan, policy, width, at_once)
    else:
        minimal_npo.MICRO_BATCH_SIZE = at_once
        texts = ({int(key.split("/")[2]): text for key, text in plan.texts.items() if key.startswith(kind)}
                 for kind in ("run/row/", "run/retain/"))
        steps = minimal_npo.unlearn(policy, reference, *texts, plan.stream, s.lr, s.beta, s.weight_decay)
    values, seconds = timed(list, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return seconds / sum(map(len, plan.stream)), [loss for loss, _ in values], peak


def measure_step(args, method: str) -> dict:
    # The learning rate is the paper's. With a larger one, rounding grows from step to step.
    flags = ["--split", args.split, "--epochs", "4", "--lr", "1e-5", "--model", args.model, "--data",
             args.data, *METHODS[method].split()]
    with tempfile.TemporaryDirectory() as folder:
        results = [{"ours": train(flags, Path(folder) / str(k)), "A": in_new_process(opponent, "A", flags),
                    "B": in_new_process(opponent, "B", flags)} for k in range(args.repeats)]
    gaps = [agree(f"losses of {method}", sides["ours"][1], sides["B"][1]) for sides in results]
    seconds, peaks = ({name: [sides[name][part] for sides in results] for name in ("ours", "A", "B")}
                      for part in (0, 2))
    return {f"{method} step": row_of("s per row", seconds, largest_difference=max(gaps)),
            f"{method} peak memory": row_of("GB", peaks)}


@torch.no_grad()
def plain_evaluation(lm, tokenizer, prepared: Prepared, keys: list, max_new_tokens: int) -> list:
    """B': scores the rows with these keys and answers their questions. -log pi(y|x) of their texts."""
    nlls, end, tokenizer.pad_token = [], tokenizer.eos_token_id, tokenizer.eos_token
    texts = [text for key, text in prepared.texts.items() if key.rpartition("/")[0] in keys]
    for at in range(0, len(texts), 8):
        nlls += (-answer_logps(lm, texts[at:at + 8])[:, 0]).tolist()
    for at in range(0, len(keys), 8):
        batch = tokenizer.pad({"input_ids": [prepared.prompts[key] for key in keys[at:at + 8]]},
                              padding_side="left", return_tensors="pt")
        lines = lm.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end,
                            pad_token_id=end)[:, batch["input_ids"].shape[1]:]
        for key, line in zip(keys[at:at + 8], lines, strict=True):
            name, index = key.split("/")
            generation = tokenizer.decode(line, skip_special_tokens=True).strip()
            rouge_l_recall(prepared.rows[name][int(index)]["answer"], generation)
    return nlls


def compare_evaluations(args, model: str) -> dict:
    torch.set_flush_denormal(True)  # as train_npo.py does
    lm, tokenizer, meta, preset = load_model(model)
    prepared = prepare(load_task(args.data, "forget10").evaluated, tokenizer, meta["template"])
    seconds, gaps, most = {"ours": [], "B'": []}, [], preset.max_new_tokens
    keys = [f"{name}/{i}" for name, rows in prepared.rows.items() for i in range(0, len(rows), STRIDE)]
    for _ in range(args.repeats):
        sets, took = timed(evaluate, AnswerModel(lm), prepared, tokenizer, preset.eval_batch_size, most)
        seconds["ours"].append(took)
        nlls, took = timed(plain_evaluation, lm, tokenizer, prepared, keys, most)
        seconds["B'"].append(took * len(prepared.prompts) / len(keys))
        ours = [nll for name in sets for row in sets[name][::STRIDE] for nll in (
            row["answer_nll"], row["paraphrased_nll"], *row["perturbed_nll"]) if nll is not None]
        gaps.append(agree("scores", ours, nlls))
    return row_of("s", seconds, largest_difference=max(gaps))


def measure_evaluation(args) -> dict:
    """Of the start; and of the tiny model after gradient ascent, whose answers never end."""
    rows = {"evaluation, start": in_new_process(compare_evaluations, args, args.model)}
    if args.model == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            train(["--loss", "ga"], Path(folder) / "run")
            rows["evaluation, collapsed"] = in_new_process(
                compare_evaluations, args, f"{folder}/run/model")
    return rows


def measure_synthetic(args) -> dict:
    """Figure 4 for both alpha, pi_ref and pi_retr included: ours in a process per core, S in one thread."""
    threads, instances = torch.get_num_threads(), [published_instance(seed) for seed in PUBLISHED_SEEDS]
    methods, steps = {alpha: synthetic.published_methods(alpha) for alpha in (1, 0)}, list(range(0, 2001, 25))
    seconds, gaps = {"ours": [], "S": []}, []
    torch.set_num_threads(1)
    for _ in range(args.repeats):
        curves, took = timed(synthetic.run, instances, methods, steps)
        seconds["ours"].append(took)
        begin = time.perf_counter()
        for alpha in methods:
            models = synthetic.reference_and_retrained(instances[0], alpha, synthetic.TRAIN_STEPS)
            problem = synthetic.Problem(instances[:1], alpha, [models])
            paths = [problem.unlearn([method], steps)[0, 0] for method in methods[alpha]]
            gaps.append(agree("distances", curves[alpha][0], paths))
        seconds["S"].append(len(instances) * (time.perf_counter() - begin))
    torch.set_num_threads(threads)
    return {"synthetic, Figure 4": row_of("s", seconds, largest_difference=max(gaps))}


MEASURES = {method: partial(measure_step, method=method) for method in METHODS} | {
    "evaluation": measure_evaluation, "synthetic": measure_synthetic}


def draw(rows: dict, path: Path):
    """A bar for each row and opponent: how many times ours costs less."""
    bars = {f"{work}, {name}": r for work, row in rows.items() for name, r in row["ratio"].items()}
    figure = Figure(figsize=(9, 1 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(bars), [r["median"] for r in bars.values()], color="0.6", xerr=np.transpose(
        [(r["median"] - r["min"], r["max"] - r["median"]) for r in bars.values()]))
    axes.axvline(1, color="tab:red")
    axes.set(xscale="log", xlabel="times the cost of ours (right of the red line: ours costs less)")
    axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.invert_yaxis()
    figure.savefig(path, dpi=200)


def lines_of(rows: dict) -> list[dict]:
    """A line of the table for each row and opponent."""
    return [{"work": work, "ours": f"{row['costs']['ours']['median']:.3g} {row['unit']}", "against": name,
             "ratio, median (range)": f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f}, {r['n']})"}
            for work, row in rows.items() for name, r in row["ratio"].items()]


def main(argv: list | None = None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default="tiny", help="tiny, or PRESET=FOLDER, or a folder")
    parser.add_argument("--data", default="builtin", help="builtin, or a folder with TOFU's files")
    parser.add_argument("--rows", nargs="+", choices=MEASURES, help="measure these alone")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results")
    args = parser.parse_args(argv)
    args.repeats, args.split = (5, "forget05") if args.model == "tiny" else (2, "forget01")
    label = Path(args.model.partition("=")[0]).name
    file = args.out / f"bench_{label}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    for work in args.rows or MEASURES:
        measured, took = timed(MEASURES[work], args)
        provenance = {**environment(), "cpu": cpu, "cores": os.cpu_count(), "took": took}
        rows |= {name: row | {"provenance": provenance} for name, row in measured.items()}
        write_json(file, {"model": label, "data": Path(args.data).name, "rows": rows})
        file.with_suffix(".md").write_text(table(lines_of(rows)) + "\n")
        draw(rows, file.with_suffix(".png"))
        print(f"{work}: {took:.0f} s\n{table(lines_of(measured))}\n", flush=True)


if __name__ == "__main__":
    run_command(main)
