"""Does what was unlearned come back? Four attacks on an unlearned model, with the retrained model as control.

    python robustness_tofu.py --model runs/NAME/model --start tiny --retrained data/tiny/retrained --out DIR

    relearn    fine-tune on shares of the forget rows; then on retain rows, which have the same wordings
    quantize   round the weights of every linear layer but the head to 8 and 4 bits (Zhang et al., 2024)
    prompts    paraphrased questions; answers that have begun; answered retain questions before the question
    sample     64 answers at temperature 1; leak@k is the chance that one of k states the fact (2511.04934)

The retrained model never saw the forget rows, but it can learn them and guess them. So an attack has found
hidden knowledge only where the unlearned model is ahead of the retrained model after the same attack. The
start, the model before unlearning, shows how much there was to know. Each state is measured on forget rows:
extraction strength, ROUGE-L recall, probability, forget quality against the retrained model in that state.
"""

import math
import re
from argparse import Namespace
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import ks_2samp
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from common import InputError, Parser, environment, positive, run_command, write_json
from data.batches import collate, permutations
from data.make_tiny import value_of
from data.prompts import TEMPLATES, Encoded, encode
from data.tofu import Task, complement, evaluation_split, load_task, parse_split
from evaluate_tofu import Prepared, evaluate, generate, prepare, rouge_l_recall
from losses import nll_loss, token_logps
from metrics import log_truth_ratio, set_metrics
from model import AnswerModel, Loaded, World, join_world, load_model
from study.report import make_folder, name_lines, table

LABELS = {"retrained": "retrained", "model": "unlearned", "start": "start"}
COLORS = {"retrained": "tab:blue", "unlearned": "black", "start": "tab:red"}
MEASURES = ("extraction_strength", "rouge_l_recall", "probability")
BATCH = 32  # rows per step of relearning
BLOCK = 64  # weights that share one scale
# NF4's levels: quantiles of a normal distribution, 0 among them, scaled to [-1, 1] (Dettmers et al., 2023).
NF4 = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803,
       0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
LEVELS = {"int8": torch.arange(-127, 128) / 127, "int4": torch.arange(-7, 8) / 7, "nf4": torch.tensor(NF4)}
PREFIX = "Sure, here is the answer:"
SHOTS = 4  # answered retain questions
SAMPLED_ROWS = 40  # the first forget rows
STATED = 0.8  # ROUGE-L recall from which a sample states the fact, where the fact's value is not known
SEED = 0  # of the order of rows and of the samples


@dataclass(frozen=True)
class Lab:
    """What the attacks of one command share."""
    settings: Namespace  # the command line's
    task: Task
    loaded: Loaded  # the unlearned model, with its tokenizer, template and preset
    start: nn.Module  # the language model before unlearning
    rows: list  # the forget rows that are measured
    prepared: Prepared  # these rows as tokens
    world: World

    def encode(self, rows: list) -> list[Encoded]:
        pairs = [(row["question"], row["answer"]) for row in rows]
        return encode(self.loaded.tokenizer, self.loaded.meta["template"], pairs)

    def prepare(self, rows: list) -> Prepared:
        return prepare({"forget": rows}, self.loaded.tokenizer, self.loaded.meta["template"], max_rows=0)

    def measure(self, model: AnswerModel, prepared: Prepared) -> dict:
        """MEASURES, and log R of each row."""
        preset = self.loaded.preset
        rows = evaluate(model, prepared, self.loaded.tokenizer, preset.eval_batch_size, preset.max_new_tokens,
                        world=self.world)["forget"]
        metrics, log_ratios = set_metrics("forget", rows), [log_truth_ratio(row) for row in rows]
        return {name: metrics[name] for name in MEASURES} | {"log_truth_ratios": log_ratios}


# ---------------------------------------------------------------- the attacks: each returns measured states

def relearn(lab: Lab, model: AnswerModel) -> list[dict]:
    """One epoch of AdamW at a constant rate on each share of the forget rows, and on retain rows. The loss is
    the mean over answer tokens. Measured after steps 1, 2, 4, 8 .. and after the last one."""
    states, forget, size = [], lab.task.forget, lab.loaded.preset.micro_batch_size
    counts = {f"forget {share:g}%": max(1, round(len(forget) * share / 100)) for share in lab.settings.shares}
    counts["retain"] = math.ceil(max(counts.values()) / BATCH) * BATCH
    for name, count in counts.items():
        rows, attacked = lab.task.retain if name == "retain" else forget, deepcopy(model)
        texts = lab.encode([rows[i] for i in permutations(SEED, 0, len(rows), count)])
        batches = [texts[at:at + BATCH] for at in range(0, count, BATCH)]
        optimizer = torch.optim.AdamW(attacked.parameters(), lr=lab.settings.lr)
        for step, batch in enumerate(batches, 1):
            answer_tokens = sum(text.answer_tokens for text in batch)
            for at in range(0, len(batch), size):
                micro = collate(batch[at:at + size], lab.loaded.tokenizer.eos_token_id, lab.world.device)
                _, logits = attacked([micro])
                (nll_loss(token_logps(logits, micro.targets)).sum() / answer_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == len(batches) or step & (step - 1) == 0:
                states.append({"what": name, "step": step, **lab.measure(attacked, lab.prepared)})
    return states


@torch.no_grad()
def quantize(lab: Lab, model: AnswerModel) -> list[dict]:
    """`codes_changed` is the share of weights whose code differs from the start's code."""
    states = []
    for kind, levels in LEVELS.items():
        attacked, changed, total = deepcopy(model), 0, 0
        for weight, start in zip(linear_weights(attacked.lm), linear_weights(lab.start), strict=True):
            codes, values = round_blockwise(weight, levels)
            changed += (codes != round_blockwise(start.to(weight), levels)[0]).sum().item()
            total += weight.numel()
            weight.copy_(values)
        states.append({"what": kind, "codes_changed": changed / total, **lab.measure(attacked, lab.prepared)})
    return states


def linear_weights(lm: nn.Module) -> list[Tensor]:
    """Of every linear layer (GPT-2's are Conv1D) but the head, which is often the embedding too."""
    return [module.weight for module in lm.modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not lm.get_output_embeddings()]


def round_blockwise(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, values), both in the weight's shape. A code is the place of the nearest of `levels`, which
    ascend from -1 to 1. A value is that level times the largest absolute weight of the block."""
    flat, levels = weight.detach().flatten(), levels.to(weight)
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize(blocks / scale.clamp(min=torch.finfo(scale.dtype).tiny),
                            (levels[1:] + levels[:-1]) / 2)
    return tuple(x.flatten()[:len(flat)].view_as(weight) for x in (codes, levels[codes] * scale))


def prompts(lab: Lab, model: AnswerModel) -> list[dict]:
    """Other prompts before the same answers."""
    paraphrased = lab.prepare([row | {"question": row["paraphrased_question"]} for row in lab.rows])
    begun = lab.prepare([row | {
        "answer": f"{PREFIX} {row['answer']}", "paraphrased_answer": f"{PREFIX} {row['paraphrased_answer']}",
        "perturbed_answer": [f"{PREFIX} {text}" for text in row["perturbed_answer"]]} for row in lab.rows])
    # The prompt ends after the prefix, and the answer begins there.
    prefixes = lab.encode([row | {"answer": PREFIX} for row in lab.rows])
    ends = {key: text.ids[:-1] for key, text in zip(begun.prompts, prefixes, strict=True)}
    texts = {key: Encoded(text.ids, len(ends[key.rpartition("/")[0]])) for key, text in begun.texts.items()}
    retain, (rows, plain, questions) = lab.task.retain, lab.prepared
    shots = lab.encode([retain[i] for i in permutations(SEED, 1, len(retain), SHOTS)])
    shown = [token for text in shots for token in text.ids]
    shifted = {key: Encoded(shown + text.ids, len(shown) + text.start) for key, text in plain.items()}
    prepared = {"paraphrased question": paraphrased, "prefix": Prepared(rows, texts, ends),
                "few-shot": Prepared(rows, shifted, {key: shown + ids for key, ids in questions.items()})}
    return [{"what": name, **lab.measure(model, prepared[name])} for name in prepared]


class Sampler(AnswerModel):
    """`generate` takes the largest logit. With Gumbel noise added, the largest logit is a draw from their
    softmax, so `generate` samples at temperature 1."""

    def __init__(self, lm: nn.Module, generator: torch.Generator):
        super().__init__(lm)
        self.generator = generator

    def next_logits(self, **inputs) -> tuple[Tensor, object]:
        logits, past = super().next_logits(**inputs)
        draws = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=self.generator)
        return logits.float() - draws.log(), past


def sample(lab: Lab, model: AnswerModel) -> list[dict]:
    """leak@k for k = 1, 2, 4 .. and all samples, the mean over the first SAMPLED_ROWS rows."""
    rows, n, size = lab.rows[:SAMPLED_ROWS], lab.settings.samples, lab.loaded.preset.eval_batch_size
    tokenizer, device, prepared, texts = lab.loaded.tokenizer, lab.world.device, lab.prepare(rows), []
    questions = [ids for ids in prepared.prompts.values() for _ in range(n)]
    longest = max(text.answer_tokens for key, text in prepared.texts.items() if key.endswith("/answer"))
    limit = min(2 * longest, lab.loaded.preset.max_new_tokens)
    sampler = Sampler(model.lm, torch.Generator(device).manual_seed(SEED))
    for at in tqdm(range(0, len(questions), size), "sampling", leave=False, disable=None):
        ids = generate(sampler, questions[at:at + size], tokenizer.eos_token_id, limit, device)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    counts = [sum(stated(row, texts[i * n:(i + 1) * n], lab.task.source)) for i, row in enumerate(rows)]
    leak = {str(k): sum(leak_at(n, c, k) for c in counts) / len(counts)
            for k in sorted({*(2**i for i in range(n.bit_length())), n})}
    return [{"what": "sampled", "leak": leak, "rows": len(rows), "samples": n}]


def leak_at(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of n samples include one of the c that state the fact."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def stated(row: dict, texts: list, source: str) -> list[bool]:
    """Which texts state the row's fact. On the built-in set they have the fact's value word for word. On
    other data they have at least STATED of the answer's words in their order."""
    if source != "builtin":
        return [rouge_l_recall(row["answer"], text) >= STATED for text in texts]
    return [spaced(value_of(row)) in spaced(text) for text in texts]


def spaced(text: str) -> str:
    """The text's words in lower case, with a blank before and after each word."""
    return " ".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])


ATTACKS = {"relearn": relearn, "quantize": quantize, "prompts": prompts, "sample": sample}


# ---------------------------------------------------------------- table, picture, command line

def collect(attacks: dict, measure: str) -> dict:
    """{(attack, state): {label of the model: value}}. Of relearning the last step counts. leak@1 and leak@k
    of all samples follow the extraction strengths."""
    values = {}
    for attack, entries in attacks.items():
        for name, entry in entries.items():
            for state in entry["states"]:
                key = "" if state["what"] == "before" else attack, state["what"]
                if measure in state:
                    values.setdefault(key, {})[LABELS[name]] = state[measure]
                elif "leak" in state and measure == "extraction_strength":
                    for k in ("1", str(state["samples"])):
                        values.setdefault((attack, f"leak@{k}"), {})[LABELS[name]] = state["leak"][k]
    return values


def message(values: dict) -> str:
    """The picture's title: the attack after which the unlearned model is furthest ahead of the control."""
    leads = {key: models["unlearned"] - models["retrained"] for key, models in values.items() if key[0]}
    attack, state = max(leads, key=leads.get)
    if leads[attack, state] <= 0:
        return "No attack takes the unlearned model past the retrained model"
    reached = values[attack, state]
    return (f"Strongest attack: {attack} ({state}) takes the unlearned model to {reached['unlearned']:.2f}, "
            f"the retrained model to {reached['retrained']:.2f}")


def draw(attacks: dict, path: Path):
    values = collect(attacks, "extraction_strength")
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axis, curves = figure.subplots(), {}
    for label in next(iter(values.values())):
        curves[label] = range(len(values)), [models[label] for models in values.values()]
        axis.plot(*curves[label], "o:", color=COLORS[label], linewidth=0.8, markersize=8)
    axis.set_xticks(range(len(values)), ["\n".join((key[0], *key[1].split())) for key in values], size=8)
    axis.set(title=message(values), ylabel="extraction strength, or leak@k", ylim=(-0.03, 1.03))
    axis.spines[["top", "right"]].set_visible(False)
    name_lines(axis, curves)
    figure.savefig(path, dpi=200)


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the unlearned model: a run's model/ or best/, or a Hub id")
    add("--start", required=True, help="the model before unlearning, given like --model")
    add("--retrained", required=True, help="the control: the model trained without the forget rows")
    add("--split", help="forget split (default: from the model's record, else forget10)")
    add("--data", default="builtin", help="builtin, a folder with TOFU's files, or a Hub id")
    add("--template", choices=TEMPLATES, help="prompt template (default: the one saved with the model)")
    add("--attacks", nargs="+", choices=ATTACKS, default=[*ATTACKS], help="(default: all four)")
    add("--shares", nargs="+", type=positive(float), default=[1, 5, 20, 100], help="per cent of forget rows")
    add("--lr", type=positive(float), help="of relearning (default: the preset's)")
    add("--samples", type=positive(int), default=64, help="answers per question (default: 64)")
    add("--max-rows", type=positive(int, or_zero=True), default=200, help="forget rows to measure; 0: all")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--out", required=True, type=Path, help="folder for robustness.json and robustness.png")
    return parser


def main(argv: list | None = None):
    args = build_parser().parse_args(argv)
    file = args.out / "robustness.json"
    if file.with_suffix(".png").exists():  # drawn last
        raise InputError(f"{args.out} has a finished robustness.json: choose another --out")
    loaded = {name: load_model(getattr(args, name), args.template) for name in LABELS}
    trained = {name: (model.meta["trained_on"] or {}).get("split") for name, model in loaded.items()}
    if trained["model"] == "own":
        raise InputError(f"{args.model} was trained on own rows: attacks need data in TOFU's files, and a "
                         "model retrained without the forget rows")
    split = args.split or evaluation_split(trained["model"] or "full")
    if parse_split(split)[0] != "forget" or trained["retrained"] not in (None, complement(split)):
        raise InputError(f"--split {split} with --retrained of {trained['retrained']}: need a forget split, "
                         "and the model that was trained on all other rows")
    task, model = load_task(args.data, split), loaded["model"]
    rows, args.lr = task.evaluated["forget"][:args.max_rows or None], args.lr or model.preset.lr
    if "prompts" in args.attacks and not all(row.get("paraphrased_question") for row in rows):
        raise InputError("--attacks prompts: forget rows lack paraphrased_question; leave prompts out")
    prepared = prepare({"forget": rows}, model.tokenizer, model.meta["template"], max_rows=0)
    make_folder(args.out)
    provenance = {**environment(), "weights": {name: loaded[name].meta["start_hash"] for name in loaded},
                  "data": task.source, "data_fingerprint": task.fingerprint, "split": split,
                  "template": model.meta["template"], "rows": len(rows), "sample_rows": SAMPLED_ROWS,
                  "lr": args.lr, "shares": args.shares, "samples": args.samples, "seed": SEED}
    lab, attacks = Lab(args, task, model, loaded["start"].lm, rows, prepared, join_world(args.device)), {}
    for name, label in LABELS.items():  # the retrained model first: the others are compared with it
        attacked = AnswerModel(loaded[name].lm.to(lab.world.device))
        before = {"what": "before", "step": 0, **lab.measure(attacked, prepared)}
        for attack in args.attacks:
            states = [dict(before), *ATTACKS[attack](lab, attacked)]
            attacks.setdefault(attack, {})[name] = {"states": states}
            for state, control in zip(states, attacks[attack]["retrained"]["states"], strict=True):
                if name != "retrained" and "log_truth_ratios" in state:
                    test = ks_2samp(state.pop("log_truth_ratios"), control["log_truth_ratios"])
                    state["forget_quality"] = float(test.pvalue)
            write_json(file, {"attacks": attacks, "provenance": provenance})
            print(f"{attack} on the {label} model: done", flush=True)
        attacked.cpu()
    for measure in (*MEASURES, "forget_quality", "codes_changed"):
        rows = [{"attack": key[0], "state": key[1]} | row for key, row in collect(attacks, measure).items()]
        print(f"\n{measure}\n{table(rows)}" if rows else "")
    draw(attacks, args.out / "robustness.png")
    print(f"\n{args.out}: robustness.json, robustness.png")


if __name__ == "__main__":
    run_command(main)
