"""Write data.js for the page: the tiny model, rows as token ids, runs by step, and Section 4's instances.

    python docs/unlearn/make_data.py --runs runs/page    # about four minutes; needs node

The page has no tokenizer. So rows come as ids, and a table gives the text of every id. The weights are
rounded to float16 (2 bytes each, in base64), which changes the model's logits by about 1e-3. The rows are
of the built-in task: the first authors of forget10, the first authors of its retain set, and retain authors
whose rows the page never trains on ("unseen" by the retain term; the model was fine-tuned on them all).

The folder that --runs names holds seven runs of seed 0, about four minutes each with one thread:

    for beta in 0.5 2 4; do
        for weight in 0 1; do
            python train_npo.py --loss npo --beta $beta --retain-weight $weight --eval-every 2 \
                --out runs/page/npo_beta${beta}_weight$weight
        done
    done
    python train_npo.py --loss ga --eval-every 2 --out runs/page/ga

The page gets their evaluations at STEPS. Delta is rounded to 0.01 nats and log R to 0.0001, which is too
little to move the largest gap of the Kolmogorov-Smirnov test by a row. Without --runs, the runs that data.js
holds already are kept.
"""

import argparse
import base64
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from scipy.optimize import linprog
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

import minimal_npo
import synthetic
from common import ROOT
from data.prompts import encode
from data.synthetic_instances import Instance
from data.tofu import load_task
from metrics import agreement, log_truth_ratios
from study.records import words

START, RETRAINED, TEMPLATE = ROOT / "data/tiny/start", ROOT / "data/tiny/retrained", "llama2"
LOGS = [ROOT / f"data/tiny/retrained_forget10{seed}.json" for seed in ("", "_seed1")]  # the first judges
FORGET_ROWS, RETAIN_ROWS, UNSEEN_ROWS = 40, 120, 40
MEASURED = 8  # of each set: the rows whose probability the live page measures after every step
STEPS = (0, 4, 8, *range(10, 31, 2), 36, 42, 50, 62, 76, 88, 100, 112, 125)
QUESTIONS = {"forget": (0, 10, 16, 29, 42, 58), "retain": (0, 4, 13, 22, 30, 36)}  # whose answers are shown
CHARACTERS = 80  # of an answer: a collapsed model repeats itself for much longer
ALPHAS, SEED, LP_STARTS = (0.0, 0.25, 0.5, 0.75, 1.0), 0, 6  # of Section 4's instances
CONFIG = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
          "vocab_size", "rms_norm_eps", "bos_token_id", "eos_token_id")
HEADER = "// Made by make_data.py from data/tiny/start and the built-in rows. Do not edit.\n"
FOOTER = 'if (typeof module === "object") module.exports = DATA;\n'


def weights_record() -> dict:
    """{names: [{name, shape}], base64}: all tensors in the order of `names`, float16, little-endian."""
    tensors = load_file(START / "model.safetensors")
    flat = np.concatenate([tensors[name].ravel() for name in tensors]).astype("<f2")
    return {"names": [{"name": name, "shape": list(tensor.shape)} for name, tensor in tensors.items()],
            "base64": base64.b64encode(flat.tobytes()).decode()}


def row_records(tokenizer, rows: list) -> list:
    """[{ids, start, question, answer}]: ids[start:] are the answer's tokens, end-of-sequence included."""
    texts = encode(tokenizer, TEMPLATE, [(row["question"], row["answer"]) for row in rows])
    return [{"ids": text.ids, "start": text.start, "question": row["question"], "answer": row["answer"]}
            for row, text in zip(rows, texts, strict=True)]


def vocabulary(tokenizer) -> list:
    """The text of every token id. A text is the concatenation; special tokens are empty."""
    # An id is decoded after another one, because a decoder may strip the space that begins a text.
    before = tokenizer("a", add_special_tokens=False).input_ids
    skip = len(tokenizer.decode(before))
    special = set(tokenizer.all_special_ids)
    return ["" if i in special else tokenizer.decode([*before, i])[skip:] for i in range(len(tokenizer))]


# ------------------------------------------------------------------------------------- runs of the tiny model

def rounded(values, decimals: int) -> list:
    return np.round(np.asarray(values, dtype=float), decimals).tolist()


def cut(text: str) -> str:
    """The text up to the last word that ends within CHARACTERS."""
    return text if len(text) <= CHARACTERS else text[:CHARACTERS].rsplit(" ", 1)[0] + " …"


def run_record(folder: Path) -> dict:
    """A run's evaluations at STEPS (the others are left out), from its folder. Lists have one entry per step:
    delta is log pi_theta - log pi_ref of each evaluated answer, in nats; qualityLog10 belongs to forget
    quality, and gapRows is the largest gap in rows."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
    files = {step: folder / "eval" / f"step_{step:06d}.json" for step in STEPS}
    evaluations = {step: json.loads(file.read_text(encoding="utf-8"))
                   for step, file in files.items() if file.exists()}
    rows, metrics = ([evaluation[key] for evaluation in evaluations.values()] for key in ("rows", "metrics"))

    def deltas(name: str) -> list:
        nlls = np.array([[row["answer_nll"] for row in one[name]] for one in rows])
        return rounded(nlls[0] - nlls, 2)

    kind = settings["loss"] + "+rt" * (settings["retain_weight"] > 0)
    return {"name": kind if kind == "ga" or settings["beta"] == 0.5 else f"{kind}@{settings['beta']:g}",
            "loss": settings["loss"], "beta": settings["beta"], "retainWeight": settings["retain_weight"],
            "steps": list(evaluations), "delta": {name: deltas(name) for name in QUESTIONS},
            "logR": [rounded(log_truth_ratios(one["forget"]), 4) for one in rows],
            "qualityLog10": rounded([m["forget_quality_log10"] for m in metrics], 3),
            "gapRows": [round(m["ks_statistic"] * m["ks_rows"]) for m in metrics],
            "utility": rounded([m["model_utility"] for m in metrics], 4),
            "probability": {name: rounded([m[name]["probability"] for m in metrics], 4)
                            for name in QUESTIONS},
            "answers": {name: [[cut(one[name][i]["generation"]) for i in places] for one in rows]
                        for name, places in QUESTIONS.items()}}


def wording(task) -> list:
    """The words that answers share whatever their fact is. A fact's words stand in an answer and in its
    paraphrase, and in neither the question nor a false answer. A word that is rarely so is wording."""
    answers, facts, names = Counter(), Counter(), set()
    for row in [row for name in QUESTIONS for row in task.evaluated[name]]:
        answer, false = set(words(row["answer"])), set().union(*map(words, row["perturbed_answer"]))
        answers.update(answer)
        facts.update((answer & set(words(row["paraphrased_answer"]))) - set(words(row["question"])) - false)
        names |= {word for text in row["question"].replace("'s", "").split()[1:]
                  if text[0].isupper() for word in words(text)}
    return sorted(word for word in answers if facts[word] <= answers[word] / 4
                  and word.removesuffix("'s") not in names)


def judge_record(model, tokenizer, task) -> dict:
    """What the runs are compared with: log R, utility and answers of retrained models, and the questions."""
    logs = [json.loads(file.read_text(encoding="utf-8")) for file in LOGS]
    ratios = [log_truth_ratios(log["rows"]["forget"]) for log in logs]
    shown = {name: [task.evaluated[name][i] for i in places] for name, places in QUESTIONS.items()}
    return {"logR": rounded(ratios[0], 4), "qualityAmong": round(agreement(*ratios)["ks_p"], 4),
            "utility": rounded([log["metrics"]["model_utility"] for log in logs], 4),
            "wording": wording(task),
            "questions": {name: [{"question": row["question"], "answer": row["answer"],
                                  "retrained": minimal_npo.answer(model, tokenizer, row["question"])}
                                 for row in part] for name, part in shown.items()}}


# --------------------------------------------------------------------------------------------- the live model

def live_record(models: dict, tokenizer, task, rows: dict) -> dict:
    """{measured, probability: {start, retrained: {forget, retain, unseen}}}: the mean probability per token
    of the first MEASURED rows of each set, as the page measures it."""
    texts = {name: encode(tokenizer, TEMPLATE, [(row["question"], row["answer"]) for row in part[:MEASURED]])
             for name, part in rows.items()}
    return {"measured": MEASURED, "probability": {
        key: {name: round(minimal_npo.probability(model, part), 4) for name, part in texts.items()}
        for key, model in models.items()}}


# -------------------------------------------------------------------------------------------------- Section 4

def section4_record() -> dict:
    """{seed, instances: [{alpha, reference, retrained, criticalAtLeast}]}. `section4.js` draws the inputs
    from the seed; the two models are trained here. criticalAtLeast is a lower bound of the critical retain
    weight, and null where it is above a million."""
    code = f"console.log(JSON.stringify(require('./section4.js').draw({SEED})))"
    drawn = json.loads(subprocess.run(["node", "-e", code], cwd=Path(__file__).parent, check=True,
                                      capture_output=True, text=True).stdout)
    arrays = {name: np.array(values, dtype=float) for name, values in drawn.items()}
    instance, instances = Instance(**arrays, y_idk=None), []
    for alpha in ALPHAS:
        reference, retrained = synthetic.reference_and_retrained(instance, alpha, synthetic.TRAIN_STEPS)
        signed = [instance.features(x) * (2 * y - 1)[:, None]
                  for x, y in ((instance.x_forget + alpha, instance.y_forget),
                               (instance.x_retain - alpha, instance.y_retain))]
        bound = critical_weight_at_least(*signed)
        instances.append({"alpha": alpha, "reference": rounded(reference, 6),
                          "retrained": rounded(retrained, 6),
                          "criticalAtLeast": None if bound > 1e6 else round(float(bound), 3)})
    return {"seed": SEED, "instances": instances}


def critical_weight_at_least(forget: np.ndarray, retain: np.ndarray) -> float:
    """A lower bound of `theory_check.critical_retain_weight`, which would need 2^200 linear programs here.

    Any direction v gives the bound mean_f (-v.x_f)_+ / mean_r (-v.x_r)_+ (docs/critical_weight.md). For a set
    of forget inputs the best v is a linear program. The inputs that v makes negative are the next set, until
    the bound no longer grows. The first set holds all inputs, later ones random halves of them."""
    (n_f, d), n_r, rng, best = forget.shape, len(retain), np.random.default_rng(0), 0.0
    A = np.block([[-retain, -np.eye(n_r)], [np.zeros((1, d)), np.full((1, n_r), 1 / n_r)]])
    bounds = [(-1e6, 1e6)] * d + [(0, None)] * n_r
    for start in range(LP_STARTS):
        negative, last = rng.random(n_f) < (0.5 if start else 1.1), 0.0
        while True:
            cost = np.r_[forget[negative].sum(0) / n_f, np.zeros(n_r)]
            v = linprog(cost, A, np.r_[np.zeros(n_r), 1.0], bounds=bounds).x[:d]
            lost, kept = (np.maximum(-x @ v, 0).mean() for x in (forget, retain))
            if lost / max(kept, 1e-12) <= 1.001 * last:
                break
            last, negative = lost / max(kept, 1e-12), forget @ v < 0
        best = max(best, last)
    return best


# ---------------------------------------------------------------------------------------------------- data.js

def read_data(path: Path) -> dict:
    """The record that a data.js holds."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text[text.index("const DATA = ") + 13:text.rindex(";\nif")])


def write_data(record: dict, path: Path):
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    path.write_text(f"{HEADER}const DATA = {text};\n{FOOTER}", encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def data_record(runs: list) -> dict:
    """The contents of data.js."""
    tokenizer, task = AutoTokenizer.from_pretrained(START), load_task("builtin", "forget10")
    models = {name: AutoModelForCausalLM.from_pretrained(folder)
              for name, folder in (("start", START), ("retrained", RETRAINED))}
    config = json.loads((START / "config.json").read_text())
    rows = {"forget": task.forget[:FORGET_ROWS], "retain": task.retain[:RETAIN_ROWS],
            "unseen": task.retain[-UNSEEN_ROWS:]}
    return {"config": {**{key: config[key] for key in CONFIG},
                       "rope_theta": config["rope_parameters"]["rope_theta"]},
            "weights": weights_record(),
            "rows": {name: row_records(tokenizer, part) for name, part in rows.items()},
            "vocabulary": vocabulary(tokenizer),
            "live": live_record(models, tokenizer, task, rows),
            "section4": section4_record(),
            "judge": judge_record(models["retrained"], tokenizer, task),
            "runs": runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("data.js"))
    parser.add_argument("--runs", type=Path, help="folder of run folders (default: keep the runs of data.js)")
    arguments = parser.parse_args()
    if arguments.runs:
        runs = [run_record(file.parent) for file in sorted(arguments.runs.glob("*/config.json"))]
        runs.sort(key=lambda run: (run["loss"], run["retainWeight"], run["beta"]))
    else:
        runs = read_data(arguments.out)["runs"]
    write_data(data_record(runs), arguments.out)


if __name__ == "__main__":
    main()
