"""A finished run in a few kilobytes: settings, curves of its metrics, kinds of its last answers.

The first kind that applies is counted. The thresholds are ours.

    empty         no word
    repetitive    at least 30% of its runs of 8 characters came before (seq-rep-n, Welleck et al., 2019)
    refusal       at least 80% of its word pairs, begin and end included, are in the refusals
    garbled       less than 80% of its word pairs are in the answers of the data
    true          against each perturbed answer: it has more than half of the letters of the words by which
                  the true answer, also paraphrased, differs from it. Words of the question do not count.
    other fact    any other
"""

import json
import re
import statistics
from functools import cache
from itertools import pairwise
from pathlib import Path

from common import InputError
from data.tofu import evaluation_split, load_task
from metrics import answer_nats, log_truth_ratio
from study.report import plain

KINDS = ("true", "other fact", "refusal", "repetitive", "garbled", "empty")
CURVES = ("forget_quality_log10", "log_truth_ratio_mean", "log_truth_ratio_sd", "model_utility", "forget_kl",
          "world_facts_kl", "privleak")
LOGGED = ("mean_W", "forget_loss", "retain_loss", "grad_norm")
FORGET_CURVES = ("extraction_strength", "paraphrase_probability")
WITHOUT_EFFECT = ("retain_log", "micro_batch_size", "device", "parallel", "activation_checkpointing",
                  "compile", "eval_every", "checkpoint_every", "keep", "log_to", "out", "resume")
SAMPLED_SETS, SAMPLED_ROW, TEXT = ("forget", "retain", "world_facts"), 7, 160  # TEXT: characters of a sample
DIGITS = 5  # significant ones of what was measured


# ---------------------------------------------------------------- kinds of answers

def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits. An apostrophe belongs to its word."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def word_pairs(text: str) -> list[tuple]:
    return list(pairwise(["<", *words(text), ">"]))


def repetition_rate(text: str) -> float:
    """Share of the text's runs of 8 characters that came before in it; 0 for a shorter text."""
    runs = [text[i:i + 8] for i in range(len(text) - 7)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def names_fact(generation: str, row: dict) -> bool:
    """The generation has most of what tells the true answer from each perturbed one."""
    spoken, fact = words(generation), set(words(row["answer"])) - set(words(row["question"]))
    fact &= set(words(row.get("paraphrased_answer") or row["answer"]))
    telling = [fact - set(words(text)) for text in row.get("perturbed_answer") or []]
    if not any(telling):
        return spoken == words(row["answer"])
    return all(2 * len("".join(left & set(spoken))) > len("".join(left)) for left in telling if left)


def kind(generation: str, row: dict, answer_pairs: set, refusal_pairs: set) -> str:
    shares = [statistics.mean(pair in pairs for pair in word_pairs(generation))
              for pairs in (refusal_pairs, answer_pairs)]
    if not words(generation):
        return "empty"
    if repetition_rate(generation) >= 0.3:
        return "repetitive"
    if shares[0] >= 0.8:
        return "refusal"
    if shares[1] < 0.8:
        return "garbled"
    return "true" if names_fact(generation, row) else "other fact"


@cache
def texts_of(data: str, split: str) -> tuple:
    """(evaluated rows of each set, word pairs of the answers, word pairs of the refusals)."""
    task = load_task(data, split)
    answers = [row["answer"] for row in task.forget + task.retain + task.facts()]
    return task.evaluated, *({pair for text in texts for pair in word_pairs(text)}
                             for texts in (answers, task.refusals))


def answers_of(data: str, split: str, results: dict) -> tuple[dict, list]:
    """(set -> {"answers", counts of KINDS, "repetition_rate"}, a question with its answer from each set)."""
    (evaluated, *pairs), counts, samples = texts_of(data, split), {}, []
    for name, rows in evaluated.items():
        texts = [result["generation"] for result in results[name]]
        kinds = [kind(text, row, *pairs) for text, row in zip(texts, rows, strict=False)]
        counts[name] = {"answers": len(texts), **{key: kinds.count(key) for key in KINDS},
                        "repetition_rate": round(statistics.mean(map(repetition_rate, texts)), 4)}
        if name in SAMPLED_SETS:
            place = min(SAMPLED_ROW, len(texts) - 1)
            sample = {key: results[name][place][key][:TEXT] for key in ("question", "answer", "generation")}
            samples.append({"set": name, **sample, "kind": kinds[place]})
    return counts, samples


# ---------------------------------------------------------------- from run folders to records

def record(folder: Path) -> dict:
    """Settings and provenance of a finished run, its curves over the evaluations (None where a metric was not
    measured), and its last answers. Raises InputError."""
    if not (folder / "model").is_dir():
        raise InputError(f"{folder} is no finished run: it has no model/ in it")
    config, *evaluations = (json.loads(path.read_text(encoding="utf-8")) for path in (
        folder / "config.json", *sorted((folder / "eval").glob("step_*.json"))))
    settings, metrics = config["settings"], [evaluation["metrics"] for evaluation in evaluations]
    curves = {key: [values.get(key) for values in metrics] for key in CURVES}
    needed = ("model_utility",) if settings["loss"] == "sft" else ("model_utility", "forget_quality_log10")
    if len(evaluations) < len(needed) or None in sum((curves[key] for key in needed), []):
        raise InputError(f"{folder}: need evaluations of TOFU's sets; of an unlearning run at least two, "
                         "with --retain-log")
    curves |= {f"forget_{key}": [values["forget"].get(key) for values in metrics] for key in FORGET_CURVES}
    split, rows = evaluation_split(settings["split"]), [evaluation["rows"] for evaluation in evaluations]
    steps = [evaluation["provenance"].get("step", 0) for evaluation in evaluations]  # 0: evaluate_tofu.py's
    log = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    log = {line["step"]: line for line in log}
    curves["forget_nll"] = [answer_nats(sets["forget"]) for sets in rows]  # nats per answer
    curves |= {f"{name}_probability": [values.get(name, {}).get("probability") for values in metrics]
               for name in ("forget", "retain")}
    curves |= {key: [log.get(step, {}).get(key) for step in steps] for key in LOGGED}  # of that step
    answers, samples = answers_of(settings["data"], split, rows[-1])
    measured = {**curves, "answers": answers,
                "mia": {"min_k": [values.get("mia", {}).get("min_k") for values in metrics]},
                "samples": samples}
    if settings["loss"] == "sft":
        measured["log_truth_ratios"] = list(map(log_truth_ratio, rows[-1]["forget"]))
    else:
        measured["answers_start"], measured["samples_start"] = answers_of(settings["data"], split, rows[0])
    return {"method": config["method"], **{k: v for k, v in settings.items() if k not in WITHOUT_EFFECT},
            "data": Path(settings["data"]).name, "command": config["command"], "commit": config["commit"],
            "start_weights": config["start_hash"], "steps": steps, **plain(measured, DIGITS)}


def attacks(path: Path) -> dict:
    """What a robustness.json measured: {"model", "retrained" or "start": {state: extraction strength in it,
    "leak": {k: leak@k}}}."""
    models = {}
    for entries in json.loads(path.read_text(encoding="utf-8"))["attacks"].values():
        for name, entry in entries.items():
            model = models.setdefault(name, {})
            for state in entry["states"]:  # of a curve over steps the last state stays
                if "leak" in state:
                    model["leak"] = state["leak"]
                elif "extraction_strength" in state:
                    model[state["what"]] = state["extraction_strength"]
    return plain(models, DIGITS)
