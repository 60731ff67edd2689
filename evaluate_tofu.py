"""TOFU's metrics (Maini et al., 2024; Section 5.1 of the NPO paper): forget quality, model utility and their parts.

    python evaluate_tofu.py --model runs/NAME/model --split forget10 --retain-log FILE
    python evaluate_tofu.py --log FILE --split forget10 --retain-log FILE
        # from per-row logs, ours or TOFU's released ones

With loss = nll / tokens and R = exp(mean over perturbed answers of their loss - the paraphrased answer's loss):

    forget quality   p-value of the two-sample Kolmogorov-Smirnov test between the model's and a retrained model's R on
                     the forget rows
    model utility    harmonic mean of ROUGE-L recall, probability and truth ratio on retain, real-author and world-fact
                     rows
    truth ratio      forget: mean min(R, 1/R); elsewhere: mean max(0, 1 - 1/R)
    probability      mean exp(-loss of the answer); real authors and world facts: divided by its sum with the perturbed
                     answers'

`train_npo.py` calls the same functions while training: `prepare` once, `evaluate` at each evaluation, `compute_metrics`
on the rows. Evaluation changes nothing: mode, random state and tokenizer come out as they went in. R is kept as its
logarithm, so that a model that has collapsed gives numbers too.
"""

import functools
import json
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import hmean, ks_2samp
from tqdm import tqdm

from data.batches import collate, collate_packed, deal, group_tokens, within
from data.prompts import TEMPLATES, encode, encode_prompts
from data.tofu import EVALUATED, complement, load_task, parse_split
from models.generation import generate
from models.loading import AUTOCAST, PRESETS, AnswerModel, autocast, load_model, pad_id, preset_and_path
from running.processes import ALONE, World, flush_denormals, keep_freed_memory, pick_device
from running.sharding import release
from support.command_line import Parser, given_flags, not_negative, positive, run_command
from support.errors import InputError
from support.files import MAX_FILE_BYTES, read_text, write_json
from support.provenance import environment

MAX_ROWS = 300  # of a set, the first ones: TOFU's own
MAX_NEW_TOKENS = 200
SCORED_TOKENS = 1024  # of a forward pass over answers: enough for fast products, little memory
SAMPLES = 5  # questions a set whose answers are shown
UTILITY_SETS = ("retain", "real_authors", "world_facts")
KL_SETS = ("forget", "world_facts")


# ---------------------------------------------------------------- metrics, from rows alone

def log_truth_ratio(row: dict) -> float | None:
    """log R of a row, or None where the row has no perturbed answers.

    R > 1: the (paraphrased) truth is likelier than the falsehoods.
    """
    if not row.get("perturbed_nll"):
        return None
    truth_nll, truth_tokens = row.get("paraphrased_nll"), row.get("paraphrased_tokens")
    if truth_nll is None:  # real authors and world facts: the answer stands for its paraphrase
        truth_nll, truth_tokens = row["answer_nll"], row["answer_tokens"]
    perturbed = np.divide(row["perturbed_nll"], row["perturbed_tokens"])
    return float(perturbed.mean() - truth_nll / truth_tokens)


def row_probability(row: dict, among_options: bool) -> float:
    """exp(-loss) of the answer; `among_options`: as a share of its sum with the perturbed answers'
    (in logs: no 0/0)."""
    loss = row["answer_nll"] / row["answer_tokens"]
    if not among_options:
        return math.exp(-loss)
    losses = np.append(loss, np.divide(row["perturbed_nll"], row["perturbed_tokens"]))
    return float(np.exp(-loss - np.logaddexp.reduce(-losses)))


def set_metrics(name: str, rows: list) -> dict:
    """{"rouge_l_recall", "probability", "truth_ratio", "rows"} of a set; None where its rows can't tell."""
    log_ratios = [log_truth_ratio(row) for row in rows]
    among_options = name in ("real_authors", "world_facts")
    truth_ratio = None
    if None not in log_ratios:
        x = np.array(log_ratios)
        if name == "forget":
            truth_ratio = float(np.exp(-np.abs(x)).mean())
        else:
            truth_ratio = float(np.maximum(0, -np.expm1(-np.maximum(x, 0))).mean())
    return {"rouge_l_recall": float(np.mean([row["rouge_l_recall"] for row in rows])),
            "probability": float(np.mean([row_probability(row, among_options) for row in rows])),
            "truth_ratio": truth_ratio, "rows": len(rows)}


def ks_log10_p(n: int, statistic: float) -> float:
    """log10 of the exact two-sided p-value for two samples of n each, also where the p-value underflows.

    P(D >= k/n) = 2 sum_{i>=1} (-1)^(i-1) C(2n, n-ik) / C(2n, n)  (Gnedenko and Korolyuk 1951), k = n * statistic,
    summed in logs.
    """
    k = round(n * statistic)
    if k == 0:
        return 0.0
    log_binomial = lambda j: math.lgamma(2 * n + 1) - math.lgamma(j + 1) - math.lgamma(2 * n - j + 1)
    first = log_binomial(n - k) - log_binomial(n)
    total = sum((-1) ** (i - 1) * math.exp(log_binomial(n - i * k) - log_binomial(n - k)) for i in range(1, n // k + 1))
    return min(0.0, (math.log(2) + first + math.log(total)) / math.log(10))


def compute_metrics(rows: dict, retain_forget_rows: list | None = None) -> dict:
    """All metrics from per-row results; `retain_forget_rows` are the retrained model's rows on the same forget
    questions.

    What can't be measured is None: forget quality without them, model utility unless all nine numbers are there.
    """
    sets = {name: set_metrics(name, rows[name]) for name in EVALUATED if rows.get(name)}
    nine = [sets.get(name, {}).get(key)
            for name in UTILITY_SETS for key in ("rouge_l_recall", "probability", "truth_ratio")]
    metrics = {"forget_quality": None, "forget_quality_log10": None, "ks_statistic": None, "ks_rows": None,
               "forget_truth_ratio": sets["forget"]["truth_ratio"] if "forget" in sets else None,
               "model_utility": None if None in nine else float(hmean(nine)), "forget_kl": None, "world_facts_kl": None}
    if retain_forget_rows is not None:
        log_ratios = [[log_truth_ratio(row) for row in sample] for sample in (rows["forget"], retain_forget_rows)]
        test = ks_2samp(*log_ratios)
        metrics.update(forget_quality=float(test.pvalue), ks_statistic=float(test.statistic),
                       ks_rows=len(log_ratios[0]),
                       forget_quality_log10=ks_log10_p(len(log_ratios[0]), test.statistic))
    for name in KL_SETS:
        if rows.get(name) and all("kl" in row for row in rows[name]):
            nats, tokens = (sum(row[key] for row in rows[name]) for key in ("kl", "answer_tokens"))
            metrics[f"{name}_kl"] = nats / tokens
    return {**metrics, **sets}


class CachedStemTokenizer:
    """rouge-score's own tokenizer with Porter stems looked up: a set repeats its words thousands of times."""

    def __init__(self):
        from nltk.stem.porter import PorterStemmer
        self.stem = functools.lru_cache(maxsize=100_000)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list:
        from rouge_score import tokenize
        return tokenize.tokenize(text, self)


@functools.cache
def _rouge_scorer():
    from rouge_score import rouge_scorer
    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=CachedStemTokenizer())


def rouge_l_recall(answer: str, generation: str) -> float:
    """The share of the answer's (stemmed) words that the generation has in the same order."""
    return float(_rouge_scorer().score(answer, generation)["rougeL"].recall)


# ---------------------------------------------------------------- measuring a model

ANSWER, PARAPHRASED, PERTURBED = 0, 1, 2  # a text's slot in its row; the k-th perturbed answer has slot PERTURBED + k


class Text(NamedTuple):
    """One text to score: which set and row it belongs to, and in which slot."""
    set: str
    index: int
    slot: int
    encoded: object


class Prepared(NamedTuple):
    """The evaluation's rows and tokens, made once: tokenisation does not change while a model trains."""
    rows: dict  # set -> row dicts
    texts: list  # of Text
    prompts: dict  # (set, index) -> prompt ids


def prepare(evaluated: dict, tokenizer, template: str, context: int, max_rows: int = MAX_ROWS) -> Prepared:
    """Tokenise the first `max_rows` (0: all) rows of each set.

    Raises InputError for a row longer than `context` tokens.
    """
    rows = {name: rows[:max_rows or None] for name, rows in evaluated.items()}
    texts, pairs, prompts = [], [], {}
    for name, set_rows in rows.items():
        for index, row in enumerate(set_rows):
            answers = [row["answer"], row.get("paraphrased_answer"), *(row.get("perturbed_answer") or [])]
            texts += [(name, index, slot) for slot, answer in enumerate(answers) if answer]
            pairs += [(row["question"], answer) for answer in answers if answer]
        prompt_ids = encode_prompts(tokenizer, template, [row["question"] for row in set_rows])
        prompts.update({(name, index): ids for index, ids in enumerate(prompt_ids)})
    encoded = encode(tokenizer, template, pairs, context)
    return Prepared(rows, [Text(*text, e) for text, e in zip(texts, encoded)], prompts)


@contextmanager
def untouched(model: AnswerModel):
    """Evaluation mode inside, the mode as it was outside. Nothing inside draws a random number, or goes by the model's
    generation settings."""
    training = model.lm.training
    model.lm.eval()
    try:
        yield
    finally:
        model.lm.train(training)
        release(model)


@torch.no_grad()
def reference_states(model: AnswerModel, prepared: Prepared, tokenizer, batch_size: int,
                     w: World = ALONE) -> dict:
    """(set, index) -> the model's last hidden states at the answer's tokens, (tokens, H) on the CPU, for the sets with
    a KL metric.

    With several processes, this one's share of the rows.
    """
    texts = [t for t in prepared.texts if t.slot == ANSWER and t.set in KL_SETS]
    states = {}
    with untouched(model):
        for chunk in deal(texts, [len(t.encoded.ids) for t in texts], batch_size, w.rank, w.size):
            if chunk or w.sharded:
                batch = collate([t.encoded for t in chunk or texts[:1]], pad_id(tokenizer), w.device)
                hidden = model.hidden(batch).cpu().split(batch.lengths.tolist())
                states.update({(t.set, t.index): h.clone() for t, h in zip(chunk, hidden)})
    return states


@torch.no_grad()
def evaluate(model: AnswerModel, prepared: Prepared, tokenizer, *, batch_size: int,
             max_new_tokens: int = MAX_NEW_TOKENS, w: World = ALONE, reference: dict | None = None, reference_head=None,
             progress: bool = False) -> dict:
    """Score all rows: set -> list of row results, complete and in order, the same on every process.

    Rows are dealt over processes, and batched by length: for scoring SCORED_TOKENS a forward pass, a question once for
    all of its answers; for generation `batch_size` prompts. Where the model is sharded, all processes run it forward
    equally often: one that has fewer batches fills up with ghosts, whose results go nowhere. `reference` (what
    `reference_states` returns) and `reference_head`, its LM head's weight, add KL(reference || model).
    """
    keys = [(name, index) for name, rows in prepared.rows.items() for index in range(len(rows))]
    mine = keys[w.rank::w.size]
    results = {key: {"index": key[1]} for key in mine}
    prompts = sorted(mine, key=lambda key: (len(prepared.prompts[key]), key))
    texts_of = {key: [] for key in mine}
    for t in prepared.texts:
        if (t.set, t.index) in texts_of:
            texts_of[t.set, t.index].append(t)
    groups = list(texts_of.values())
    lengths = [group_tokens([t.encoded for t in group]) for group in groups]
    batches = [[groups[i] for i in places] for places in within(lengths, SCORED_TOKENS)]
    bar = tqdm(total=sum(map(len, groups)) + len(prompts), desc="evaluate", unit="text", leave=False,
               disable=not progress)
    with untouched(model):
        scores = {key: {} for key in mine}  # slot -> (nll, tokens)
        wants_kl = lambda t: reference is not None and t.slot == ANSWER and t.set in KL_SETS
        for batch_groups, counts in in_step(batches, [prepared.texts[:1]], w):
            # Texts with a KL come last, as the model wants them.
            texts = sorted((t for group in batch_groups for t in group), key=wants_kl)
            place = {t[:3]: i for i, t in enumerate(texts)}
            places = [[place[t[:3]] for t in group] for group in batch_groups]
            batch = collate_packed([t.encoded for t in texts], places, pad_id(tokenizer), w.device)
            states = None
            if counts and wants_kl(texts[-1]):
                known = [reference[t.set, t.index] for t in texts if wants_kl(t)]
                states = torch.cat(known).to(w.device), reference_head
            logps, kl = model(batch, states, "reference_policy")
            if not counts:
                continue
            for i, (t, nll, tokens) in enumerate(zip(texts, (-logps).tolist(), batch.lengths.tolist())):
                scores[t.set, t.index][t.slot] = nll, tokens
                if wants_kl(t):
                    results[t.set, t.index]["kl"] = float(kl[i])
            bar.update(len(texts))
        for key, slots in scores.items():
            perturbed = [slots[slot] for slot in sorted(slots) if slot >= PERTURBED]
            answer_nll, answer_tokens = slots[ANSWER]
            paraphrased_nll, paraphrased_tokens = slots.get(PARAPHRASED, (None, None))
            results[key].update(answer_nll=answer_nll, answer_tokens=answer_tokens, paraphrased_nll=paraphrased_nll,
                                paraphrased_tokens=paraphrased_tokens, perturbed_nll=[nll for nll, _ in perturbed],
                                perturbed_tokens=[tokens for _, tokens in perturbed])
        chunks = [prompts[at:at + batch_size] for at in range(0, len(prompts), batch_size)]
        for chunk, counts in in_step(chunks, keys[:1], w):
            asked = [prepared.prompts[key] for key in chunk]
            for key, text in zip(chunk if counts else [], generate(model, tokenizer, asked, max_new_tokens, w)):
                row = prepared.rows[key[0]][key[1]]
                results[key].update(rouge_l_recall=rouge_l_recall(row["answer"], text), question=row["question"],
                                    answer=row["answer"], generation=text)
            bar.update(len(chunk))
    bar.close()
    gathered = w.collect(results)
    merged = {key: row for part in gathered for key, row in part.items()}
    assert sum(map(len, gathered)) == len(merged) == len(keys), "every row exactly once"
    return {name: [merged[name, index] for index in range(len(rows))] for name, rows in prepared.rows.items()}


def in_step(batches: list, ghost: list, w: World) -> list:
    """(batch, whether it counts) of all of this process's batches; where the model is sharded, with as many ghosts
    behind them as it takes for all processes to have equally many."""
    missing = w.most(len(batches)) - len(batches) if w.sharded else 0
    return [(batch, True) for batch in batches] + [(ghost, False)] * missing


# ---------------------------------------------------------------- logs

# TOFU's released format: one file a set inside one JSON, one list (or dict keyed by row) a quantity.
TOFU_LOGS = {"retain": "eval_log.json", "real_authors": "eval_real_author_wo_options.json",
             "world_facts": "eval_real_world_wo_options.json", "forget": "eval_log_forget.json"}
TOFU_KEYS = {"answer_nll": "gt_loss", "answer_tokens": "num_token_gt", "paraphrased_nll": "paraphrased_loss",
             "paraphrased_tokens": "num_token_paraphrased", "perturbed_nll": "perturb_loss",
             "perturbed_tokens": "num_token_perturb", "rouge_l_recall": "rougeL_recall",
             "generated_text": "generated_text"}


def read_log(path: str) -> tuple[dict, dict]:
    """(rows, provenance) of an evaluation's JSON, ours or TOFU's released one. Raises InputError."""
    try:
        log = json.loads(read_text(Path(path), longest_line=MAX_FILE_BYTES))
    except (ValueError, RecursionError) as error:  # an InputError is a ValueError
        raise InputError(f"cannot read the log {path}: {error}; need an evaluation's JSON, ours or TOFU's released "
                         "one") from None
    if not isinstance(log, dict):
        raise InputError(f"{path} is no evaluation log: need an object with rows, or TOFU's {TOFU_LOGS['forget']}")
    if "rows" in log:
        if not isinstance(log["rows"], dict) or not isinstance(log.get("provenance", {}), dict):
            raise InputError(f"{path}: rows must be lists keyed by set, and provenance an object, as evaluate_tofu.py "
                             "writes them")
        checked = {name: check_rows(rows, f"{path}: {name}") for name, rows in log["rows"].items()}
        return checked, log.get("provenance", {})
    if not any(name in log for name in TOFU_LOGS.values()):
        raise InputError(f"{path} is no evaluation log: need rows (ours) or {', '.join(TOFU_LOGS.values())} (TOFU's)")
    rows = {name: _tofu_rows(log[file], f"{path}: {file}") for name, file in TOFU_LOGS.items() if file in log}
    return rows, {"format": "TOFU"}


def _tofu_rows(columns: dict, where: str) -> list:
    """TOFU's columns -> our rows; the columns are lists, or dicts keyed by row.

    Raises InputError where they don't match.
    """
    missing = [key for key in TOFU_KEYS.values() if key not in columns]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    n = len(columns[TOFU_KEYS["answer_nll"]])
    by_row = {}
    for ours, theirs in TOFU_KEYS.items():
        column = columns[theirs]
        keys = {str(i) for i in range(n)}
        if len(column) != n or isinstance(column, dict) and set(column) != keys:
            raise InputError(f"{where}: {theirs} has {len(column)} rows{' with other keys' * (len(column) == n)}, "
                             f"gt_loss has rows 0 to {n - 1}; rows are missing")
        by_row[ours] = [column[str(i)] for i in range(n)] if isinstance(column, dict) else column
    rows = [dict(zip(by_row, values), index=i) for i, values in enumerate(zip(*by_row.values()))]
    for row in rows:
        texts = row.pop("generated_text")
        if not isinstance(texts, list) or len(texts) != 3:
            raise InputError(f"{where} row {row['index']}: generated_text must hold prompt, generation and truth, got "
                             f"{texts!r}"[:300])
        row["question"], row["generation"], row["answer"] = texts
    return check_rows(rows, where)


def check_rows(rows: list, where: str) -> list:
    """Every index once and in order, every number there and finite. Raises InputError that starts with `where`."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where}: need a list of row objects, got {str(rows)[:60]}")
    if [row.get("index") for row in rows] != list(range(len(rows))):
        raise InputError(f"{where} has rows missing or out of order; need every index from 0 to {len(rows) - 1} once")
    number_ = lambda x, least: isinstance(x, (int, float)) and math.isfinite(x) and x >= least
    for row in rows:
        answer = number_(row.get("answer_nll"), 0) and number_(row.get("answer_tokens"), 1)
        paraphrased = (row.get("paraphrased_nll") is None
                       or number_(row["paraphrased_nll"], 0) and number_(row.get("paraphrased_tokens"), 1))
        nlls, tokens = row.get("perturbed_nll") or [], row.get("perturbed_tokens") or []
        perturbed = len(nlls) == len(tokens) and all(number_(x, 0) for x in nlls) and all(number_(x, 1) for x in tokens)
        texts = all(isinstance(row.get(key), str) for key in ("question", "answer", "generation"))
        if not (answer and number_(row.get("rouge_l_recall"), 0) and paraphrased and perturbed and texts):
            raise InputError(f"{where} row {row['index']}: needs question, answer and generation, finite sums "
                             "(answer_nll, paraphrased_nll, perturbed_nll), token counts of at least 1 beside them, as "
                             "many perturbed ones, and rouge_l_recall")
    return rows


def match_retain_rows(rows: list, retain_rows: list, model_name: str, retain_name: str) -> list:
    """The retained model's rows of the same questions, in the same order.

    Raises InputError where they aren't the same.
    """
    if len(retain_rows) < len(rows):
        raise InputError(f"{retain_name} holds {len(retain_rows)} forget rows, {model_name} {len(rows)}: they were "
                         "measured on different rows; need the log of the model retrained without this forget split")
    words = lambda text: " ".join(str(text).split())
    # TOFU's logs keep the whole prompt, ours the question: answers are in both.
    for index, (row, other) in enumerate(zip(rows, retain_rows)):
        if not other.get("perturbed_nll") or not (row.get("perturbed_nll") or row.get("perturbed_answer")):
            raise InputError(f"forget quality needs perturbed answers in every forget row: row {index} of {model_name} "
                             f"or of {retain_name} has none")
        if words(row["answer"]) != words(other["answer"]):
            raise InputError(f"row {index} is {words(row['answer'])[:60]!r} in {model_name} and "
                             f"{words(other['answer'])[:60]!r} in {retain_name}: they were measured on different rows; "
                             "need the log of the model retrained without this forget split")
    return retain_rows[:len(rows)]


def read_retain_log(path: str, split: str, forget_rows: list, fingerprint: str | None = None,
                    name: str = "this data") -> list:
    """A retrained model's rows on the same questions as `forget_rows`, in their order. Raises InputError where the log
    doesn't hold them, or was, by its own word, measured on other data or on a model trained on something else than the
    complement of `split`."""
    rows, provenance = read_log(path)
    if not rows.get("forget"):
        raise InputError(f"{path} has no forget rows")
    trained = provenance.get("trained_on", {}).get("split")
    if split != "own" and trained not in (None, complement(split)):
        raise InputError(f"{path} was measured on a model trained on {trained}; --split {split} needs one trained on "
                         f"{complement(split)}")
    if fingerprint and provenance.get("data_fingerprint") not in (None, fingerprint):
        raise InputError(f"{path} was measured on other data (fingerprint {provenance['data_fingerprint']}, here "
                         f"{fingerprint})")
    return match_retain_rows(forget_rows, rows["forget"], name, path)


def expect_split(rows: dict, provenance: dict, split: str, path: str):
    """A log says which split it was measured on, TOFU's released ones by their number of forget rows.
    Raises InputError."""
    if not rows.get("forget"):
        raise InputError(f"{path} has no forget rows")
    if provenance.get("split") not in (None, "own", split):
        raise InputError(f"{path} was measured for --split {provenance['split']}, not {split}")
    expected = min(MAX_ROWS, 40 * parse_split(split)[1])
    if provenance.get("format") == "TOFU" and "forget" in rows and len(rows["forget"]) != expected:
        raise InputError(f"{path} holds {len(rows['forget'])} forget rows, {split} has {expected}: it was measured on "
                         "another split")


# ---------------------------------------------------------------- output

def number(value, digits: int = 4) -> str:
    """For tables: small numbers in powers of ten, None as a dash."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 0.001 else f"{value:.{digits}e}"


def metrics_table(metrics: dict) -> str:
    """The nine numbers and what is made of them, as aligned text."""
    lines = [f"{'':14}{'ROUGE-L':>9}{'probability':>13}{'truth ratio':>13}{'rows':>6}"]
    for name in EVALUATED:
        if name in metrics:
            m = metrics[name]
            lines.append(f"{name:14}{number(m['rouge_l_recall']):>9}{number(m['probability']):>13}"
                         f"{number(m['truth_ratio']):>13}{m['rows']:>6}")
    quality = number(metrics["forget_quality"])
    if metrics["forget_quality"] is not None and metrics["forget_quality"] < 1e-300:
        quality = f"1e{metrics['forget_quality_log10']:.1f}"
    if metrics["ks_rows"]:
        measured = f"(KS statistic {metrics['ks_statistic']:.4f} over {metrics['ks_rows']} rows)"
    else:
        measured = "(needs --retain-log: the log of a model retrained without the forget set)"
    lines.append(f"forget quality {quality} {measured}")
    lines.append(f"model utility  {number(metrics['model_utility'], 6)}   forget KL {number(metrics['forget_kl'])}   "
                 f"world-facts KL {number(metrics['world_facts_kl'])}")
    return "\n".join(lines)


def sample_answers(rows: dict, n: int = SAMPLES) -> str:
    """True and generated answers to `n` questions of the forget and of the retain set, evenly spaced over its rows."""
    lines = []
    for name in ("forget", "retain"):
        set_rows = rows.get(name, [])
        for row in set_rows[::max(1, len(set_rows) // n)][:n]:
            lines += [f"[{name} {row['index']}] {row['question']}", f"    true:  {row['answer']}",
                      f"    model: {row['generation']}"]
    return "\n".join(lines)


def plot_truth_ratios(rows: list, retain_rows: list | None, path: Path):
    """The cumulative distributions of R that the Kolmogorov-Smirnov test compares, the largest gap marked."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    samples = [np.sort([log_truth_ratio(row) for row in x]) for x in (rows, retain_rows) if x is not None]
    for sample, style, label in zip(samples, ("-", "--"), ("this model", "retrained model")):
        axes.step(np.exp(sample), np.arange(1, len(sample) + 1) / len(sample), style, where="post", label=label,
                  color="black" if style == "-" else "tab:orange")
    if len(samples) == 2:
        at = np.concatenate(samples)
        below = [np.searchsorted(s, at, side="right") / len(s) for s in samples]
        widest = int(np.argmax(np.abs(below[0] - below[1])))
        axes.vlines(np.exp(at[widest]), below[0][widest], below[1][widest], color="tab:red", linewidth=3,
                    label=f"KS statistic {abs(below[0][widest] - below[1][widest]):.3f}")
    axes.set(xscale="log", xlabel="truth ratio R (above 1: the truth is likelier than the falsehoods)",
             ylabel="share of forget rows below")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------- command line

def build_parser() -> Parser:
    parser = Parser(prog="evaluate_tofu.py", description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="folder, .gguf file or Hub id of the model to judge, or PRESET=PATH")
    source.add_argument("--log", help="judge an existing per-row log instead: our JSON, or a released TOFU log")
    add("--data",
        help="builtin, a folder with TOFU's files, or a Hub id (default: what the model was trained on, else builtin)")
    add("--split", default="forget10", help="forget split, forget01 to forget99 (default: forget10)")
    add("--forget", help="own forget rows (JSON or JSON lines with question and answer) in place of --data")
    add("--retain", help="own retain rows, with --forget")
    add("--template", choices=TEMPLATES,
        help="prompt template (default: the one saved with the model, else llama2)")
    add("--retain-log", help="log of a model retrained without the forget split: forget quality is measured against it")
    add("--reference", help="the model before unlearning, given like --model: adds KL(reference || model)")
    add("--max-rows", type=not_negative(int), default=MAX_ROWS,
        help=f"first rows of each set, 0 for all (default: {MAX_ROWS})")
    add("--max-new-tokens", type=positive(int), default=MAX_NEW_TOKENS,
        help=f"length of a generation, tokens (default: {MAX_NEW_TOKENS})")
    add("--batch-size", type=positive(int), help="answers generated at once (default: the preset's, else 32)")
    add("--dtype", choices=AUTOCAST, default="fp32", help="autocast precision (default: fp32)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    add("--out", help="write metrics, rows and provenance to this JSON file")
    add("--plot", nargs="?", const="", metavar="PNG",
        help="draw the truth-ratio distributions (default: beside --out, else truth_ratios.png)")
    return parser


def measure(args, split: str) -> tuple[dict, dict, list | None]:
    """(rows, provenance, retained model's forget rows) of `--model`: load, check everything, then score."""
    device = pick_device(args.device)
    keep_freed_memory()
    flush_denormals()
    preset, path = preset_and_path(args.model)
    model, tokenizer, meta = load_model(path)
    meta = {**meta, **({"preset": preset} if preset else {})}
    trained_on = meta.get("trained_on", {})
    data = args.data or trained_on.get("data", "builtin")
    task = load_task(data, split, args.forget, args.retain)
    known = PRESETS.get(meta.get("preset"), PRESETS["llama2-7b"])  # another folder: the paper's template
    template = args.template or meta.get("template") or known.template
    batch_size = args.batch_size or known.eval_batch_size
    context = getattr(model.config, "max_position_embeddings", None)
    prepared = prepare(task.evaluated, tokenizer, template, context, args.max_rows)
    retain_rows = None
    if args.retain_log:
        retain_rows = read_retain_log(args.retain_log, task.split, prepared.rows["forget"], task.fingerprint)
    reference = reference_head = None
    alone = ALONE._replace(device=device)
    with autocast(args.dtype, device):
        if args.reference:
            reference_model = AnswerModel(load_model(preset_and_path(args.reference)[1])[0].to(device))
            if reference_model.lm.config.vocab_size != model.config.vocab_size:
                raise InputError(f"--reference {args.reference} has a vocabulary of "
                                 f"{reference_model.lm.config.vocab_size}, --model {args.model} of "
                                 f"{model.config.vocab_size}: need the model before unlearning")
            reference = reference_states(reference_model, prepared, tokenizer, batch_size, alone)
            reference_head = reference_model.lm.get_output_embeddings().weight
        rows = evaluate(AnswerModel(model.to(device)), prepared, tokenizer, batch_size=batch_size,
                        max_new_tokens=args.max_new_tokens, w=alone, reference=reference,
                        reference_head=reference_head, progress=sys.stderr.isatty())
    provenance = {"model": args.model, "trained_on": trained_on, "split": task.split, "data": task.source,
                  "data_fingerprint": task.fingerprint, "template": template, "max_rows": args.max_rows,
                  "max_new_tokens": args.max_new_tokens, "dtype": args.dtype, "reference": args.reference,
                  "retain_log": args.retain_log, **environment()}
    return rows, provenance, retain_rows


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    if not (args.model or args.log):
        raise InputError("--model DIR or --log FILE is required: what is to be judged?")
    if not (args.forget or args.retain) and parse_split(args.split)[0] != "forget":
        raise InputError(f"--split {args.split}: a model is judged on a forget split, forget01 to forget99")
    if args.out and Path(args.out).exists():
        raise InputError(f"--out {args.out} exists: choose another file, or remove it")
    picture = args.plot and Path(args.plot)
    if args.plot == "":
        picture = Path(args.out).with_suffix(".png") if args.out else Path("truth_ratios.png")
    if picture and picture.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--plot {picture}: need a name that ends in .png, .pdf or .svg")
    for file in filter(None, (args.out, picture)):
        absolute = Path(file).absolute()
        writable = os.access(next(p for p in absolute.parents if p.exists()), os.W_OK)
        if not writable or str(absolute).startswith("/proc/"):
            raise InputError(f"cannot write {file}: choose a place with the right to write")
    if args.log:
        without = {"data", "forget", "retain", "template", "reference", "max_rows", "max_new_tokens", "batch_size",
                   "dtype", "device"} & set(given_flags(build_parser(), argv))
        if without:
            raise InputError(f"--log holds what was measured: --{sorted(without)[0].replace('_', '-')} has no effect "
                             "there, leave it out")
        rows, provenance = read_log(args.log)
        expect_split(rows, provenance, args.split, args.log)
        judged = "own" if provenance.get("split") == "own" else args.split
        retain_rows = None
        if args.retain_log:
            retain_rows = read_retain_log(args.retain_log, judged, rows["forget"], provenance.get("data_fingerprint"),
                                          args.log)
    else:
        rows, provenance, retain_rows = measure(args, args.split)
    metrics = compute_metrics(rows, retain_rows)
    if args.out:
        write_json(args.out, {"metrics": metrics, "rows": rows, "provenance": provenance})
    print(sample_answers(rows))
    print(metrics_table(metrics))
    if picture and metrics["forget_truth_ratio"] is None:
        print("no picture: the forget rows have no perturbed answers, and so no truth ratios")
    elif picture:
        plot_truth_ratios(rows["forget"], retain_rows, picture)
        print(f"truth-ratio distributions: {picture}")


if __name__ == "__main__":
    run_command(main, "evaluate_tofu.py")
