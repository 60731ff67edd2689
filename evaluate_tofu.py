"""TOFU's metrics (Maini et al., 2024; the paper's Section 5.1): forget quality and model utility.

    python evaluate_tofu.py --model runs/NAME/model --split forget10 --retain-log FILE
    python evaluate_tofu.py --log FILE --split forget10 --retain-log FILE    # ours, or a released TOFU log

With loss = nll / tokens, and R = exp(mean loss of the perturbed answers - loss of the paraphrased answer):

    forget quality   p-value of the two-sample Kolmogorov-Smirnov test between R of this model and R of a
                     retrained model, on the forget rows
    model utility    harmonic mean of ROUGE-L recall, probability and truth ratio on the retain, real-author
                     and world-fact rows
    truth ratio      forget rows: mean min(R, 1/R); other rows: mean max(0, 1 - 1/R)
    probability      mean exp(-loss of the answer); real authors and world facts: divided by its sum with the
                     perturbed answers'

docs/beyond.md explains the metrics beside these: exact memorisation, extraction strength, paraphrase
probability, MIA and PrivLeak. R is kept as its logarithm, so a collapsed model gives numbers too. An
evaluation draws no random number and changes nothing.

Shapes: N answer tokens, V vocabulary.
"""

import json
import math
import os
import zlib
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import gammaln, logsumexp
from scipy.stats import hmean, ks_2samp, rankdata
from torch import Tensor
from tqdm import tqdm

from common import InputError, Parser, environment, positive, run_command, write_json
from data.batches import collate, deal
from data.logs import MAX_ROWS, read_log, read_retain_log
from data.prompts import TEMPLATES, Encoded, encode, encode_prompts
from data.tofu import EVALUATED, evaluation_split, load_task, parse_split
from losses import OBJECTIVES, kl_loss, token_logps
from model import ALONE, AUTOCAST, AnswerModel, World, autocast, check_head, gathered, join_world, load_model

UTILITY_SETS = ("retain", "real_authors", "world_facts")
KL_SETS = ("forget", "world_facts")
MIN_K = 0.4  # the min-k scores are means over this share of an answer's tokens, the least likely ones
SAMPLES = 3  # questions of a set whose answers are printed
PASSES = 0.05  # a model passes when its forget quality is above


# ---------------------------------------------------------------- from a model to rows

class Prepared(NamedTuple):
    """The rows of an evaluation as tokens. They do not change while a model trains."""
    rows: dict  # set -> rows
    texts: dict[str, Encoded]  # "forget/3/answer", "forget/3/paraphrased", "forget/3/perturbed0" ..
    prompts: dict[str, list]  # "forget/3" -> token ids

    def compared(self) -> dict[str, Encoded]:
        """The texts on which a reference is needed: for the KL metrics, and for MIA's reference score."""
        return {key: text for key, text in self.texts.items()
                if key.endswith("/answer") and key.split("/")[0] in (*KL_SETS, "holdout")}


def prepare(evaluated: dict, tokenizer, template: str, max_rows: int = MAX_ROWS,
            context: int | None = None) -> Prepared:
    """The first `max_rows` rows (0: all) of each set in `evaluated`; of a set "holdout" only the answers.
    Raises InputError for a text above `context` tokens."""
    rows = {name: rows[:max_rows or None] for name, rows in evaluated.items() if rows}
    pairs, questions = {}, {}
    for name in rows:
        for index, row in enumerate(rows[name]):
            key = f"{name}/{index}"
            pairs[f"{key}/answer"] = row["question"], row["answer"]
            if name == "holdout":
                continue
            questions[key] = row["question"]
            if row.get("paraphrased_answer"):
                pairs[f"{key}/paraphrased"] = row["question"], row["paraphrased_answer"]
            for k, answer in enumerate(row.get("perturbed_answer") or []):
                pairs[f"{key}/perturbed{k}"] = row["question"], answer
    texts = dict(zip(pairs, encode(tokenizer, template, list(pairs.values()), context), strict=True))
    prompts = encode_prompts(tokenizer, template, list(questions.values()))
    return Prepared(rows, texts, dict(zip(questions, prompts, strict=True)))


@torch.no_grad()
def evaluate(model: AnswerModel, prepared: Prepared, tokenizer, batch_size: int, max_new_tokens: int,
             reference=None, world: World = ALONE) -> dict:
    """set -> row results in order, the same on every process. Each process takes its share of the texts.

    `reference` gives logits(keys) and logps(keys) of the texts in `prepared.compared()`; None: no KL metrics.
    """
    def batches(things: dict, length, label: str):
        """Lists of keys: this process's share, in batches."""
        dealt = deal(list(things), lambda key: length(things[key]), batch_size, world.rank, world.size)
        return tqdm(filter(None, dealt), label, len(dealt), leave=False,
                    disable=None if world.rank == 0 else True)

    scores, generations = {}, {}
    with gathered(model):
        for answers in (True, False):  # rows' own answers are measured in more ways than the other texts
            texts = {key: text for key, text in prepared.texts.items() if key.endswith("/answer") == answers}
            for keys in batches(texts, lambda text: len(text.ids), "scoring"):
                batch = collate([texts[key] for key in keys], tokenizer.eos_token_id, world.device)
                _, logits = model([batch])
                lengths = [texts[key].answer_tokens for key in keys]
                values = [token_logps(logits, batch.targets)]
                if answers:
                    values += likelihood_measures(logits, batch.targets, values[0])
                per_text = torch.stack(values).double().cpu().split(lengths, dim=1)
                for key, value in zip(keys, per_text, strict=True):
                    scores[key] = score(*value.tolist())
                if answers and reference is not None:
                    compare(keys, logits.split(lengths), reference, scores)
        for keys in batches(prepared.prompts, len, "generating"):
            prompts = [prepared.prompts[key] for key in keys]
            ids = generate(model, prompts, tokenizer.eos_token_id, max_new_tokens, world.device)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            generations |= {key: text.strip() for key, text in zip(keys, texts, strict=True)}
    scores, generations = ({key: value for part in world.collect(share) for key, value in part.items()}
                           for share in (scores, generations))
    return {name: [row_result(name, index, row, scores, generations) for index, row in enumerate(rows)]
            for name, rows in prepared.rows.items()}


def likelihood_measures(logits: Tensor, targets: Tensor, logps: Tensor) -> list[Tensor]:
    """Per answer token, (N, V) and (N,) -> 2 x (N,): whether it is the model's likeliest token, and its log
    pi standardised under the model's own distribution (min-k++, Zhang et al. 2024)."""
    log_probs = logits.float().log_softmax(-1)
    mean = (log_probs.exp() * log_probs).sum(-1)
    variance = (log_probs.exp() * (log_probs - mean[:, None]) ** 2).sum(-1)
    return [(logits.argmax(-1) == targets).float(), (logps - mean) / variance.clamp(min=1e-6).sqrt()]


def score(logps: list, hits: list | None = None, standardised: list | None = None) -> dict:
    """The numbers that are kept of a text, from its answer tokens. The end-of-sequence token, the last one,
    does not count as memorised."""
    result = {"nll": -sum(logps), "tokens": len(logps)}
    if hits is None:
        return result
    hits, lowest = hits[:-1] or hits, max(1, int(MIN_K * len(logps)))
    suffix = sum(1 for _ in takewhile(bool, reversed(hits)))
    return result | {"exact_memorization": sum(hits) / len(hits), "extraction_strength": suffix / len(hits),
                     "min_k": -sum(sorted(logps)[:lowest]) / lowest,
                     "min_k_plus_plus": -sum(sorted(standardised)[:lowest]) / lowest}


def compare(keys: list, logits: tuple, reference, scores: dict):
    """Add to `scores` the sum over answer tokens of D(pi_ref || pi_theta), and -log pi_ref of the answer."""
    for key, policy_logits in zip(keys, logits, strict=True):
        name = key.split("/")[0]
        if name in KL_SETS:
            kl = kl_loss(policy_logits, reference.logits([key]), "reference_policy")
            scores[key]["kl"] = kl.double().sum().item()
        if name in (*KL_SETS, "holdout"):
            scores[key]["reference_nll"] = -reference.logps([key]).item()


def row_result(name: str, index: int, row: dict, scores: dict, generations: dict) -> dict:
    """What an evaluation keeps of one row: sums in nats, numbers of tokens, measures, texts."""
    key = f"{name}/{index}"
    answer, paraphrased = scores[f"{key}/answer"], scores.get(f"{key}/paraphrased", {})
    perturbed = [scores[f"{key}/perturbed{k}"] for k in range(len(row.get("perturbed_answer") or []))
                 if name != "holdout"]
    generation = generations.get(key)
    return {"index": index, "answer_nll": answer["nll"], "answer_tokens": answer["tokens"],
            "paraphrased_nll": paraphrased.get("nll"), "paraphrased_tokens": paraphrased.get("tokens"),
            "perturbed_nll": [text["nll"] for text in perturbed],
            "perturbed_tokens": [text["tokens"] for text in perturbed],
            **{measure: value for measure, value in answer.items() if measure not in ("nll", "tokens")},
            "rouge_l_recall": None if generation is None else rouge_l_recall(row["answer"], generation),
            "question": row["question"], "answer": row["answer"], "generation": generation}


@torch.no_grad()
def generate(model: AnswerModel, prompts: list, end: int, max_new_tokens: int, device) -> list[list[int]]:
    """Greedy continuations of prompts, each up to the token `end`; behind it there is only `end`."""
    width = max(map(len, prompts))
    room = getattr(model.lm.config, "max_position_embeddings", width + max_new_tokens) - width
    ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions, cache = (mask.cumsum(-1) - 1).clamp(min=0), None
    texts = torch.full((len(prompts), max_new_tokens), end, device=device)
    rows, column = torch.arange(len(prompts), device=device), -1  # the rows that have not ended
    for column in range(min(max_new_tokens, room)):
        logits, cache = model.next_logits(input_ids=ids, attention_mask=mask, position_ids=positions,
                                          cache=cache)
        texts[rows, column] = logits.argmax(-1)
        unended = (texts[rows, column] != end).nonzero()[:, 0]
        if len(unended) < len(rows):
            rows, mask, positions = rows[unended], mask[unended], positions[unended]
            cache.batch_select_indices(unended)
        if len(rows) == 0:
            break
        ids, positions = texts[rows, column, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return texts[:, :column + 1].tolist()


def rouge_l_recall(answer: str, generation: str) -> float:
    """The share of the answer's (stemmed) words that the generation has in the same order."""
    from rouge_score.rouge_scorer import RougeScorer  # imported here because the import takes a second
    return float(RougeScorer(["rougeL"], use_stemmer=True).score(answer, generation)["rougeL"].recall)


# ---------------------------------------------------------------- from rows to metrics

def log_truth_ratio(row: dict) -> float | None:
    """log R, above 0 where the (paraphrased) truth is likelier than the falsehoods. None without perturbed
    answers. The answer stands in where a row has no paraphrase (real authors, world facts)."""
    if not row.get("perturbed_nll"):
        return None
    truth = "answer" if row.get("paraphrased_nll") is None else "paraphrased"
    perturbed = np.divide(row["perturbed_nll"], row["perturbed_tokens"])
    return float(perturbed.mean() - row[f"{truth}_nll"] / row[f"{truth}_tokens"])


def truth_ratio(row: dict, forget: bool) -> float | None:
    """min(R, 1/R) for a forget row, max(0, 1 - 1/R) for any other row; None without perturbed answers."""
    log_ratio = log_truth_ratio(row)
    if log_ratio is None:
        return None
    return np.exp(-abs(log_ratio)) if forget else -np.expm1(-max(log_ratio, 0))


def probability(row: dict, of: str = "answer") -> float | None:
    """exp(-loss) of the answer, or of the paraphrased answer; None where the row has none."""
    nll = row.get(f"{of}_nll")
    return None if nll is None else math.exp(-nll / row[f"{of}_tokens"])


def probability_among_options(row: dict) -> float | None:
    """exp(-loss) of the answer, divided by its sum with the perturbed answers'; None without these."""
    if not row.get("perturbed_nll"):
        return None
    losses = np.divide([row["answer_nll"], *row["perturbed_nll"]],
                       [row["answer_tokens"], *row["perturbed_tokens"]])
    return float(np.exp(-losses[0] - np.logaddexp.reduce(-losses)))  # in logarithms, so never 0/0


def mean(values: list) -> float | None:
    return None if None in values else float(np.mean(values))


def set_metrics(name: str, rows: list) -> dict:
    """The metrics of one set; None where its rows lack something."""
    answer_probability = probability_among_options if name in ("real_authors", "world_facts") else probability
    return {"rouge_l_recall": mean([row["rouge_l_recall"] for row in rows]),
            "probability": mean([answer_probability(row) for row in rows]),
            "truth_ratio": mean([truth_ratio(row, name == "forget") for row in rows]), "rows": len(rows),
            "exact_memorization": mean([row.get("exact_memorization") for row in rows]),
            "extraction_strength": mean([row.get("extraction_strength") for row in rows]),
            "paraphrase_probability": mean([probability(row, "paraphrased") for row in rows])}


def ks_log10_p(n: int, statistic: float) -> float:
    """log10 of the exact p-value for two samples of n values, also where the p-value underflows:
    P(D >= k/n) = 2 sum_{i>=1} (-1)^(i-1) C(2n, n-ik) / C(2n, n)  (Gnedenko and Korolyuk 1951)."""
    k = round(n * statistic)
    if k == 0:
        return 0.0
    i = np.arange(1, n // k + 1)
    terms = -gammaln(n - i * k + 1) - gammaln(n + i * k + 1) + 2 * gammaln(n + 1)
    return min(0.0, float(logsumexp(terms, b=2.0 * (-1.0) ** (i - 1))) / math.log(10))


def mia_scores(row: dict) -> dict:
    """Scores from which membership is guessed. Each is the lower, the more a row looks memorised."""
    loss, reference_nll = row["answer_nll"] / row["answer_tokens"], row.get("reference_nll")
    return {"loss": loss, "zlib": loss / len(zlib.compress(row["answer"].encode())),
            "min_k": row.get("min_k"), "min_k_plus_plus": row.get("min_k_plus_plus"),
            "reference": None if reference_nll is None else loss - reference_nll / row["answer_tokens"]}


def auc(members: list, unseen: list) -> float | None:
    """The chance that a member scores below an unseen row; a tie counts one half (Mann-Whitney's U)."""
    if None in members or None in unseen:
        return None
    ranks = rankdata(np.concatenate([members, unseen]))[len(members):]
    return float((ranks.mean() - (len(unseen) + 1) / 2) / len(members))


def mia_aucs(forget_rows: list, holdout_rows: list) -> dict:
    """Name of a score -> AUC of forget rows against holdout rows: 1 memorised, 1/2 unseen."""
    members, unseen = ([mia_scores(row) for row in rows] for rows in (forget_rows, holdout_rows))
    return {name: auc([row[name] for row in members], [row[name] for row in unseen]) for name in members[0]}


def privleak(min_k_auc: float | None, retrained_auc: float | None) -> float | None:
    """100 ((1 - AUC) - (1 - AUC_retrained)) / (1 - AUC_retrained), per cent (MUSE, Shi et al., 2025)."""
    if None in (min_k_auc, retrained_auc) or retrained_auc == 1:
        return None
    return 100 * (retrained_auc - min_k_auc) / (1 - retrained_auc)


def compute_metrics(rows: dict, retrained: list | None = None, retrained_holdout: list | None = None) -> dict:
    """All metrics from row results, and from the retrained model's results on the same forget and holdout
    rows. A metric that cannot be computed is None."""
    sets = {name: set_metrics(name, rows[name]) for name in EVALUATED if rows.get(name)}
    nine = [sets.get(name, {}).get(metric)
            for name in UTILITY_SETS for metric in ("rouge_l_recall", "probability", "truth_ratio")]
    metrics = {"forget_quality": None, "forget_quality_log10": None, "ks_statistic": None, "ks_rows": None,
               "forget_truth_ratio": sets.get("forget", {}).get("truth_ratio"),
               "model_utility": None if None in nine else float(hmean(nine)),
               "forget_kl": None, "world_facts_kl": None}
    if retrained is not None:
        test = ks_2samp(*([log_truth_ratio(row) for row in sample] for sample in (rows["forget"], retrained)))
        metrics |= {"forget_quality": float(test.pvalue), "ks_statistic": float(test.statistic),
                    "ks_rows": len(retrained),
                    "forget_quality_log10": ks_log10_p(len(retrained), test.statistic)}
    for name in KL_SETS:
        if rows.get(name) and all(row.get("kl") is not None for row in rows[name]):
            nats, tokens = (sum(row[column] for row in rows[name]) for column in ("kl", "answer_tokens"))
            metrics[f"{name}_kl"] = nats / tokens
    if rows.get("holdout"):
        holdout = (retrained_holdout or [])[:len(rows["holdout"])]
        same = retrained and [row["answer"] for row in holdout] == [row["answer"] for row in rows["holdout"]]
        metrics["mia"] = mia_aucs(rows["forget"], rows["holdout"])
        metrics["privleak"] = privleak(metrics["mia"]["min_k"],
                                       mia_aucs(retrained, holdout)["min_k"] if same else None)
    return {**metrics, **sets}


def metrics_table(metrics: dict) -> str:
    """Plain text: one line per set, then the metrics over all sets."""
    def listed(numbers: dict) -> str:
        return ", ".join(f"{name.replace('_', ' ')} " + ("-" if value is None else f"{value:.4g}")
                         for name, value in numbers.items())

    overall = {name: metrics.get(name) for name in (
        "forget_quality", "ks_statistic", "model_utility", "forget_kl", "world_facts_kl", "privleak")}
    aucs = {f"MIA AUC {name}": value for name, value in metrics.get("mia", {}).items()}
    return "\n".join([*(f"{name:13s}{listed(metrics[name])}" for name in EVALUATED if name in metrics),
                      listed(overall), listed(aucs)])


# ---------------------------------------------------------------- pictures

def plot_truth_ratios(rows: list, retrained: list | None, path: str):
    """The cumulative distributions of R that the Kolmogorov-Smirnov test compares."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for sample, label in ((rows, "this model"), (retrained, "retrained model")):
        if sample is not None:
            axes.ecdf(np.exp([log_truth_ratio(row) for row in sample]), label=label)
    axes.set(xscale="log", xlabel="truth ratio R (above 1: the truth is likelier than the falsehoods)",
             ylabel="share of forget rows below", title="Forget quality compares these two distributions")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=200)


def plot_trajectory(folder: Path):
    """trajectory.png of a run: whether it has forgotten, what it has kept, and W (or the forget loss)."""
    from matplotlib.figure import Figure
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    files = sorted((folder / "eval").glob("step_*.json"))
    metrics = {int(file.stem[5:]): json.loads(file.read_text())["metrics"] for file in files}
    weight = "mean_W" if "mean_W" in log[0] else "forget_loss"
    kept = {"model utility": [m["model_utility"] for m in metrics.values()]}
    kept |= {f"{name} probability": [m.get(name, {}).get("probability") for m in metrics.values()]
             for name in ("retain", "forget")}
    panels = [("Forgotten?", {"forget quality": [m["forget_quality_log10"] for m in metrics.values()]}),
              ("Rest kept?", kept), ("How fast?", {weight.replace("_", " "): [line[weight] for line in log]})]
    figure = Figure(figsize=(13, 4.3), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, 3), panels, strict=True):
        at = -math.inf  # the height of the last label: labels of close lines are moved apart
        for name, values in sorted(curves.items(), key=lambda curve: curve[1][-1] or 0):
            if None not in values:
                x = list(metrics) if title != "How fast?" else [line["step"] for line in log]
                [line] = axes.plot(x, values, marker="." if title != "How fast?" else "")
                at = max(values[-1], at + 0.05 * (1 if title == "Rest kept?" else 0))
                axes.annotate(f" {name}", (x[-1], at), va="center", color=line.get_color())
        axes.set(title=title, xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].axhspan(math.log10(PASSES), 0, color="tab:green", alpha=0.15)
    figure.axes[0].set_ylabel("log10 p-value (shaded: indistinguishable\nfrom the retrained model)")
    figure.axes[1].set_ylim(0, 1)
    s = json.loads((folder / "config.json").read_text())["settings"]
    names = ("retain_weight", "kl_weight", "split", "lr", *OBJECTIVES[s["loss"]].settings, "epochs", "seed")
    figure.suptitle(", ".join([s["loss"], *(f"{n.replace('_', ' ')} {s[n]}" for n in names if s.get(n))]))
    figure.savefig(folder / "trajectory.png", dpi=200)


# ---------------------------------------------------------------- command line

class ResidentReference(NamedTuple):
    """The model before unlearning, kept in memory for a single evaluation. It takes one key at a time."""
    model: AnswerModel
    batches: dict  # key -> the text as a batch

    def logits(self, keys: list) -> Tensor:
        return self.model([self.batches[keys[0]]])[1]

    def logps(self, keys: list) -> Tensor:
        return token_logps(self.logits(keys), self.batches[keys[0]].targets).sum()


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or Hub id of the model to judge, or PRESET=PATH")
    source.add_argument("--log", help="judge an existing log instead: our JSON, or a released TOFU log")
    add("--retain-log", help="log of a model retrained without the forget rows, for forget quality")
    add("--reference", help="the model before unlearning, given like --model: adds the KL metrics")
    add("--split", help="forget split (default: from the model's or the log's record, else forget10)")
    add("--data", default="builtin", help="builtin, a folder with TOFU's files, or a Hub id")
    add("--forget", help="own forget rows, JSON or JSON lines with question and answer, in place of --data")
    add("--retain", help="own retain rows, with --forget")
    add("--template", choices=TEMPLATES, help="prompt template (default: the one saved with the model)")
    add("--max-rows", type=positive(int, or_zero=True), default=MAX_ROWS, help="rows of each set, 0 for all")
    add("--max-new-tokens", type=positive(int), help="longest generation, in tokens (default: the preset's)")
    add("--batch-size", type=positive(int), help="texts at once (default: the preset's)")
    add("--dtype", choices=AUTOCAST, default="fp32", help="precision of matrix products")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--out", help="write metrics, rows and provenance to this JSON file")
    add("--plot", metavar="PNG", help="draw the distributions of the truth ratio")
    return parser


def measure(args) -> tuple[dict, dict, tuple]:
    """(rows, provenance, the retrained model's rows) of --model."""
    world = join_world(args.device)
    loaded = load_model(args.model, args.template)
    trained_on = loaded.meta["trained_on"] or {}
    recorded = trained_on.get("split") or "full"
    if recorded == "own" and not (args.forget or args.split):
        raise InputError(f"{args.model} was trained on own rows: give them with --forget, or give --split")
    split = "own" if args.forget else args.split or evaluation_split(recorded)
    if split != "own" and parse_split(split)[0] != "forget":
        raise InputError(f"--split {split}: need a forget split, forget01 to forget99")
    task = load_task(args.data, split, args.forget, args.retain)
    if not args.forget and trained_on.get("data_fingerprint", task.fingerprint) != task.fingerprint:
        print(f"note: {args.model} was trained on other data ({trained_on['data']}) than {task.source}")
    pad, template = loaded.tokenizer.eos_token_id, loaded.meta["template"]
    prepared = prepare(task.evaluated | {"holdout": task.holdout}, loaded.tokenizer, template, args.max_rows,
                       getattr(loaded.lm.config, "max_position_embeddings", None))
    provenance = {**loaded.meta, "split": split, "data": task.source, "data_fingerprint": task.fingerprint,
                  "model": args.model, "reference": args.reference, "retain_log": args.retain_log,
                  "max_rows": args.max_rows, "dtype": args.dtype}
    retrained = read_retain_log(args.retain_log, split, prepared.rows["forget"], provenance)
    model, reference = AnswerModel(loaded.lm), None
    check_head(model, collate([*prepared.texts.values()][:2], pad), args.model)
    model.to(world.device)
    if args.reference:
        reference = ResidentReference(AnswerModel(load_model(args.reference).lm.to(world.device)), {
            key: collate([text], pad, world.device) for key, text in prepared.compared().items()})
    with autocast(args.dtype, world.device):
        rows = evaluate(model, prepared, loaded.tokenizer, args.batch_size or loaded.preset.eval_batch_size,
                        args.max_new_tokens or loaded.preset.max_new_tokens, reference, world)
    return rows, {**provenance, **environment()}, retrained


def read(args) -> tuple[dict, dict, tuple]:
    """(rows, provenance, the retrained model's rows) of --log."""
    rows, provenance = read_log(args.log)
    split = args.split or provenance.get("split") or "forget10"
    logged, n = provenance.get("split", split), len(rows["forget"])
    released = min(MAX_ROWS, 40 * parse_split(split)[1]) if provenance.get("format") == "TOFU" else n
    if logged != split or n != released:
        raise InputError(f"{args.log} has {n} forget rows of {logged}: it is not for --split {split}")
    retrained = read_retain_log(args.retain_log, split, rows["forget"], provenance)
    return rows, {**provenance, "log": args.log, "retain_log": args.retain_log, **environment()}, retrained


def main(argv: list | None = None):
    args = build_parser().parse_args(argv)
    for path in (args.out, args.plot):
        if path and not Path(path).resolve().parent.is_dir():
            raise InputError(f"cannot write {path}: its folder does not exist")
    rows, provenance, retrained = read(args) if args.log else measure(args)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    metrics = compute_metrics(rows, *retrained)
    for name in ("forget", "retain"):
        for row in rows.get(name, [])[:SAMPLES]:
            print(f"[{name} {row['index']}] {row['question']}\n    true:  {row['answer']}\n    model: "
                  f"{row['generation']}")
    print(metrics_table(metrics))
    if args.out:
        write_json(args.out, {"metrics": metrics, "rows": rows, "provenance": provenance})
    if args.plot:
        plot_truth_ratios(rows["forget"], retrained[0], args.plot)


if __name__ == "__main__":
    run_command(main)
