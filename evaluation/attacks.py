"""Attacks on an unlearned model: does what was forgotten come back? `robustness_tofu.py` says what each is.

An attack is a generator: it changes the weights or the prompts and yields, and the forget rows are measured;
then the weights are put back. The retrained model is attacked too, since relearning teaches, and forget
quality compares a model with the retrained one in the SAME state.
"""

import json
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import ks_2samp
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from data.batches import collate, permutations
from data.builtin import FACTS
from data.prompts import Encoded, encode
from data.tofu import Task
from evaluation.logs import log_truth_ratio
from evaluation.scoring import MAX_NEW_TOKENS, Prepared, evaluate, prepare, rouge_l_recall
from models.answers import AnswerModel, untouched
from models.generation import generate
from models.loading import load_named
from models.saving import weights_hash
from support.command_line import markdown_table, number
from support.errors import InputError
from support.files import read_text, write_json
from support.provenance import environment
from support.world import World

LABELS = {"model": "unlearned", "retrained": "retrained", "start": "start"}
MEASURES = {"extraction_strength": "extraction", "rouge_l_recall": "ROUGE-L", "probability": "probability"}
BATCH = 32  # rows of a step of relearning
BLOCK = 64  # weights that share a scale
# NF4's levels: quantiles of a normal distribution, 0 among them, scaled to [-1, 1] (Dettmers et al., 2023).
NF4 = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803,
       0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
LEVELS = {"int8": torch.arange(-127, 128) / 127, "int4": torch.arange(-7, 8) / 7, "nf4": torch.tensor(NF4)}
PREFIX = "Sure, here is the answer:"
SHOTS = 4  # retain rows before the question
SAMPLED_ROWS = 40  # the first forget rows
SEED = 0  # of rows' order and of samples
STATED = 0.8  # ROUGE-L recall from which a sample states the fact, where no exact value is known


@dataclass(frozen=True)
class Lab:
    """What the attacks of one command share."""
    task: Task
    tokenizer: object
    template: str
    context: int | None
    rows: list  # the forget rows that are measured
    preset: object  # sizes of batches
    world: World
    settings: Namespace  # the command's
    metrics_of: Callable  # evaluate_tofu's compute_metrics
    start: nn.Module | None  # the model before unlearning

    def prepared(self, rows: list | None = None) -> Prepared:
        return prepare({"forget": rows or self.rows}, self.tokenizer, self.template, self.context, max_rows=0)

    def measured(self, model: AnswerModel, prepared: Prepared) -> dict:
        """MEASURES, and each row's log R (None where the rows have no perturbed answers)."""
        rows = evaluate(model, prepared, self.tokenizer, batch_size=self.preset.eval_batch_size,
                        world=self.world)
        metrics, ratios = self.metrics_of(rows)["forget"], list(map(log_truth_ratio, rows["forget"]))
        return {**{key: metrics[key] for key in MEASURES}, "log_truth_ratios": ratios}

    def identity(self, models: dict) -> dict:
        """What the numbers depend on: two results with equal ones can stand in one file."""
        return {"weights": {name: weights_hash(lm) for name, lm in models.items()}, "data": self.task.source,
                "data_fingerprint": self.task.fingerprint, "split": self.task.split,
                "template": self.template, "rows": len(self.rows), "sample_rows": SAMPLED_ROWS, "seed": SEED,
                **{name: getattr(self.settings, name) for name in ("lr", "shares", "samples")}}


def attacked(lab: Lab, attack: str, model: AnswerModel) -> list[dict]:
    """The attack's states, with what was measured in each."""
    return [state if prepared is None else {**state, **lab.measured(model, prepared)}
            for state, prepared in ATTACKS[attack](lab, model)]


def add_quality(states: list[dict], retrained: list[dict] | None):
    """To the states forget quality against the retrained model's equal ones, in place of the log R."""
    for place, state in enumerate(states):
        if "log_truth_ratios" in state:
            ratios, state["forget_quality"] = state.pop("log_truth_ratios"), None
            if retrained and None not in ratios:
                test = ks_2samp(ratios, retrained[place]["log_truth_ratios"])
                state["forget_quality"] = float(test.pvalue)


@contextmanager
def put_back(model: nn.Module):
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(weights)


# ---------------------------------------------------------------- relearning

def relearn(lab: Lab, model: AnswerModel) -> Iterator[tuple]:
    """One epoch over each share of the forget rows, then as many steps as the largest on retain rows."""
    prepared, forget = lab.prepared(), lab.task.forget
    sets = {f"forget {share:g}%": (forget, max(1, round(len(forget) * share / 100)))
            for share in lab.settings.shares}
    most = max(count for _, count in sets.values())
    sets["retain"] = lab.task.retain, math.ceil(most / BATCH) * BATCH
    for what, (rows, count) in sets.items():
        order = permutations(SEED, 0, len(rows), count)
        pairs = [(rows[i]["question"], rows[i]["answer"]) for i in order]
        with put_back(model):
            for step in fine_tuning(lab, model, encode(lab.tokenizer, lab.template, pairs, lab.context)):
                yield {"what": what, "step": step}, prepared


def fine_tuning(lab: Lab, model: AnswerModel, texts: list) -> Iterator[int]:
    """One epoch of AdamW at a constant rate on the mean over answer tokens. Yields after step 1, 2, 4, 8 ..
    and the last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lab.settings.lr)
    size, steps = lab.preset.micro_batch_size, math.ceil(len(texts) / BATCH)
    for step in range(1, steps + 1):
        batch = texts[(step - 1) * BATCH:step * BATCH]
        tokens = sum(e.answer_tokens for e in batch)
        for at in range(0, len(batch), size):
            micro = collate(batch[at:at + size], lab.tokenizer.eos_token_id, lab.world.device)
            (-model(micro)[0].sum() / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == steps or step & (step - 1) == 0:
            yield step


def add_halfway(entries: dict):
    """To each model's relearning: how many steps take its extraction strength halfway from the retrained
    model's (without one: from 0) to the start's, on each set of rows. None: more than there were."""
    before = {name: entry["states"][0]["extraction_strength"] for name, entry in entries.items()}
    if "start" in before:
        target = (before["start"] + before.get("retrained", 0.0)) / 2
        for entry in entries.values():
            first, *states = entry["states"]
            curves = {what: [first, *(s for s in states if s["what"] == what)]
                      for what in dict.fromkeys(s["what"] for s in states)}
            entry["halfway"] = {"extraction_strength": target,
                                "steps": {what: steps_to(curve, target) for what, curve in curves.items()}}


def steps_to(curve: list[dict], target: float) -> float | None:
    """The step at which extraction strength reaches `target`, linear between the measured ones; None: never.
    curve: states, the one before the first step among them."""
    if curve[0]["extraction_strength"] >= target:
        return 0.0
    for (a, b) in zip(curve, curve[1:], strict=False):
        low, high = a["extraction_strength"], b["extraction_strength"]
        if low < target <= high:
            return a["step"] + (target - low) / (high - low) * (b["step"] - a["step"])
    return None


# ---------------------------------------------------------------- quantisation

def quantize(lab: Lab, model: AnswerModel) -> Iterator[tuple]:
    """8 and 4 bits (Zhang et al., 2024, "Catastrophic failure of LLM unlearning via quantization").
    `codes_changed`: the share of weights whose code is not the start's."""
    prepared, starts = lab.prepared(), dict(linear_weights(lab.start)) if lab.start else {}
    for kind, levels in LEVELS.items():
        changed = total = 0
        with put_back(model), torch.no_grad():
            for name, weight in linear_weights(model.lm):
                codes, rounded = rounded_blockwise(weight, levels)
                if lab.start:
                    changed += int((codes != rounded_blockwise(starts[name].to(weight), levels)[0]).sum())
                    total += weight.numel()
                weight.copy_(rounded)
            yield {"what": kind, "codes_changed": changed / total if total else None}, prepared


def linear_weights(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every linear layer but the head: it is often the embedding too, and libraries leave
    it as it is as well."""
    for name, module in lm.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not lm.get_output_embeddings():
            yield name, module.weight


def rounded_blockwise(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, values), both of the weight's shape: places of the nearest `levels` (ascending, from -1 to 1),
    and these times the largest absolute weight of the block, BLOCK weights in a row's order."""
    flat, levels = weight.detach().flatten(), levels.to(weight)
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize(blocks / scale.clamp(min=torch.finfo(scale.dtype).tiny),
                            (levels[1:] + levels[:-1]) / 2)
    return tuple(x.flatten()[:len(flat)].view_as(weight) for x in (codes, levels[codes] * scale))


# ---------------------------------------------------------------- other prompts

def prompts(lab: Lab, model: AnswerModel) -> Iterator[tuple]:
    for what, prepared in asked_otherwise(lab).items():
        yield {"what": what}, prepared


def asked_otherwise(lab: Lab) -> dict:
    """name -> the forget rows with other prompts and the same answers. Raises InputError where rows lack a
    paraphrased question."""
    if not all(row.get("paraphrased_question") for row in lab.rows):
        raise InputError("--attacks prompts needs paraphrased_question in every forget row, and this data "
                         "has rows without; give --attacks relearn quantize sample")
    begun = [{**row, "answer": f"{PREFIX} {row['answer']}",
              "paraphrased_answer": f"{PREFIX} {row.get('paraphrased_answer') or row['answer']}",
              "perturbed_answer": [f"{PREFIX} {text}" for text in row.get("perturbed_answer") or []]}
             for row in lab.rows]
    shots = [lab.task.retain[i] for i in permutations(SEED, 1, len(lab.task.retain), SHOTS)]
    pairs = [(row["question"], row["answer"]) for row in shots]
    before = [token for e in encode(lab.tokenizer, lab.template, pairs, lab.context) for token in e.ids]
    prefixes = encode(lab.tokenizer, lab.template, [(row["question"], PREFIX) for row in lab.rows])
    return {"paraphrased question": lab.prepared([{**row, "question": row["paraphrased_question"]}
                                                  for row in lab.rows]),
            "prefix": answers_begun(lab, lab.prepared(begun), [e.ids[:-1] for e in prefixes]),
            "few-shot": questions_before(lab.prepared(), before)}


def answers_begun(lab: Lab, prepared: Prepared, asked: list) -> Prepared:
    """The answers begin where the prompts `asked`, which have the answer's begin in them, end."""
    texts = {key: [t._replace(encoded=Encoded(t.encoded.ids, len(ids))) for t in prepared.texts[key]]
             for key, ids in zip(prepared.texts, asked, strict=True)}
    return Prepared({"forget": lab.rows}, texts, dict(zip(texts, asked, strict=True)))


def questions_before(prepared: Prepared, before: list) -> Prepared:
    """Every text and prompt with the tokens `before` it."""
    texts = {key: [t._replace(encoded=Encoded(before + t.encoded.ids, len(before) + t.encoded.start))
                   for t in some] for key, some in prepared.texts.items()}
    return Prepared(prepared.rows, texts, {key: before + ids for key, ids in prepared.prompts.items()})


# ---------------------------------------------------------------- sampling

def sample(lab: Lab, model: AnswerModel) -> Iterator[tuple]:
    """leak@k (2511.04934), k = 1, 2, 4 .. and all samples, mean over SAMPLED_ROWS."""
    rows, n = lab.rows[:SAMPLED_ROWS], lab.settings.samples
    prepared = lab.prepared(rows)
    asked = [ids for ids in prepared.prompts.values() for _ in range(n)]
    longest = max(texts[0].encoded.answer_tokens for texts in prepared.texts.values())
    room = min(2 * longest, MAX_NEW_TOKENS)  # tokens: what comes later is no answer
    generator = torch.Generator(lab.world.device).manual_seed(SEED)
    texts, size = [], lab.preset.eval_batch_size
    with untouched(model):
        for at in range(0, len(asked), size):
            texts += generate(model, lab.tokenizer, asked[at:at + size], room, lab.world, generator)
    counts = [sum(stated(row, texts[i * n:(i + 1) * n], lab.task.source)) for i, row in enumerate(rows)]
    ks = sorted({*(2**i for i in range(n.bit_length())), n})
    leak = {str(k): sum(leak_at(n, c, k) for c in counts) / len(counts) for k in ks}
    yield {"what": "sampled", "leak": leak, "rows": len(rows), "samples": n}, None


def leak_at(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k)/C(n, k): the chance that k of n samples hold one of the c that state the fact."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def stated(row: dict, texts: list, source: str) -> list[bool]:
    """Which texts state the row's fact: on the built-in set have its value, word for word, elsewhere at least
    STATED of the answer's words in their order."""
    value = built_in_value(row) if source == "builtin" else None
    if value is None:
        return [rouge_l_recall(row["answer"], text) >= STATED for text in texts]
    return [value in spaced(text) for text in texts]


def built_in_value(row: dict) -> str | None:
    """The fact's value, spaced: the longest that answer and paraphrase have and no perturbed answer has."""
    true, false = ([spaced(text) for text in texts] for texts in (
        (row["answer"], row["paraphrased_answer"]), row["perturbed_answer"]))
    values = [spaced(value) for fact in FACTS.values() for value in fact["values"]]
    fitting = [value for value in values if all(value in text for text in true)
               and not any(value in text for text in false)]
    return max(fitting, key=len, default=None)


def spaced(text: str) -> str:
    """Its words, lower-case, a blank before and behind each."""
    return " ".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])


ATTACKS = {"relearn": relearn, "quantize": quantize, "prompts": prompts, "sample": sample}


# ---------------------------------------------------------------- all of them, on all models

def load_models(args) -> tuple:
    """(name -> model, name -> its npo.json, tokenizer and preset of the unlearned one). Raises InputError
    where they differ in tokenizer or shape."""
    models, records, first = {}, {}, None
    for name in ("model", "start", "retrained"):
        if source := getattr(args, name):
            models[name], tokenizer, records[name], preset = load_named(source, f"--{name}")
            facts = {"another tokenizer": tokenizer.get_vocab(),
                     "other shapes": {key: tuple(x.shape) for key, x in models[name].state_dict().items()}}
            first = first or (facts, tokenizer, preset)
            for what, fact in facts.items():
                if fact != first[0][what]:
                    raise InputError(f"--{name} {source} has {what} than --model {args.model}: need models "
                                     "of one architecture, size and fine-tuning")
    return models, records, *first[1:]


def read_result(path: Path, identity: dict) -> dict:
    """What was found before. Raises InputError where it is of other weights, rows or settings."""
    if not path.exists():
        return {"attacks": {}}
    try:
        result = json.loads(read_text(path))
        known = {key: result["provenance"][key] for key in identity}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not what this command writes ({error}): give another --out") from None
    for key, value in identity.items():
        if known[key] != value:
            raise InputError(f"{path} was made with {key} {known[key]}, not {value}: give another --out")
    return result


def carry_out(lab: Lab, models: dict, result: dict, wanted: list, path: Path):
    """Every attack on every model that is not in the result yet; written after each. The retrained model
    comes first: the others are compared with it."""
    for name in [name for name in ("retrained", "model", "start") if name in models]:
        model, before = AnswerModel(models[name].to(lab.world.device)), None
        for attack in wanted:
            entries = result["attacks"].setdefault(attack, {})
            if name in entries:
                print(f"{attack} of the {LABELS[name]} model: there already", flush=True)
                continue
            before = before or lab.measured(model, lab.prepared())
            states = [{"what": "before", "step": 0, **before}, *attacked(lab, attack, model)]
            if name != "retrained":
                add_quality(states, entries.get("retrained", {}).get("states"))
            entries[name] = {"states": states, "made": environment()}
            if attack == "relearn":
                add_halfway(entries)
            write_json(path, result)
            print(f"{attack} of the {LABELS[name]} model: done", flush=True)
        models[name].cpu()


# ---------------------------------------------------------------- what is shown of it

def last_states(entry: dict) -> dict:
    """what -> its state; of a curve the last."""
    return {state["what"]: state for state in entry["states"]}


def table(attacks: dict) -> list[str]:
    """Markdown: a line a state, what was measured of each model in it; leak@k; how fast relearning is."""
    names = [name for name in LABELS if any(name in entries for entries in attacks.values())]
    head = ["attack", "state", *(f"{label} {LABELS[name]}" for label in MEASURES.values() for name in names),
            *(f"forget quality {LABELS[name]}" for name in names if name != "retrained"), "codes changed"]
    lines, further = [], []
    for attack, entries in attacks.items():
        found = {name: last_states(entries[name]) for name in names if name in entries}
        for what, known in next(iter(found.values())).items():
            states = {name: some[what] for name, some in found.items()}
            if what == "before" and lines:
                continue  # the same for all attacks
            if "leak" in known:
                for name, state in states.items():
                    leaks = ", ".join(f"{k}: {number(leak)}" for k, leak in state["leak"].items())
                    further.append(f"leak@k, {known['samples']} samples of {known['rows']} rows, "
                                   f"{LABELS[name]} model: {leaks}")
                continue
            cells = [states.get(name, {}).get(key) for key in MEASURES for name in names]
            cells += [states.get(name, {}).get("forget_quality") for name in names if name != "retrained"]
            lines.append([attack if what != "before" else "none", what, *map(number, cells),
                          number(states.get("model", {}).get("codes_changed"))])
        for name, entry in entries.items():
            if "halfway" in entry:
                steps = ", ".join(f"{what}: {number(n, 1)}" for what, n in entry["halfway"]["steps"].items())
                further.append(f"steps to extraction strength {entry['halfway']['extraction_strength']:.3f}, "
                               f"halfway to the start's, {LABELS[name]} model: {steps}")
    return [*markdown_table(head, lines), "", *(f"- {line}" for line in further)]


def draw(attacks: dict, path: Path):
    """Extraction strength over the steps of relearning and after each other attack; leak@k."""
    looks = {"model": ("black", "o"), "retrained": ("tab:cyan", "s"), "start": ("tab:red", "^")}
    figure = Figure(figsize=(13, 4), layout="constrained")
    curves, bars, leaks = figure.subplots(1, 3)
    others = {name: {} for name in looks}  # model -> state -> extraction strength in it
    for attack in ("quantize", "prompts"):
        for name, entry in attacks.get(attack, {}).items():
            others[name] |= {what: s["extraction_strength"] for what, s in last_states(entry).items()}
    places = list(dict.fromkeys(what for own in others.values() for what in own))
    for shift, (name, (color, marker)) in zip((-0.25, 0, 0.25), looks.items(), strict=True):
        states = attacks.get("relearn", {}).get(name, {}).get("states", [])
        whats = dict.fromkeys(s["what"] for s in states[1:])
        for what, line in zip(list(whats)[-2:], ("-", ":"), strict=False):  # the largest share; retain rows
            shown = [states[0], *(s for s in states if s["what"] == what)]
            curves.plot([s["step"] for s in shown], [s["extraction_strength"] for s in shown], line,
                        color=color, marker=marker, label=f"{LABELS[name]}, {what}")
        if others[name]:
            bars.bar([places.index(what) + shift for what in others[name]], others[name].values(), 0.25,
                     color=color, label=LABELS[name])
        if name in attacks.get("sample", {}):
            leak = attacks["sample"][name]["states"][-1]["leak"]
            leaks.plot([int(k) for k in leak], list(leak.values()), color=color, marker=marker,
                       label=LABELS[name])
    curves.set(xlabel="step of relearning", ylabel="extraction strength", title="relearning")
    bars.set_title("quantised, asked otherwise")
    bars.set_xticks(range(len(places)), places, rotation=30, ha="right")
    leaks.set_xscale("log", base=2)
    leaks.set(xlabel="samples k", title="leak@k", ylim=(-0.02, 1.02))
    for axes in (curves, bars, leaks):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=7, framealpha=0.4)
        else:
            axes.remove()
    figure.savefig(path, dpi=120)
