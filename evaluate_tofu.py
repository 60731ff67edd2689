"""TOFU's metrics (Maini et al., 2024; the paper's Section 5.1): forget quality, model utility, their parts.

    python evaluate_tofu.py --model runs/NAME/model --split forget10 --retain-log FILE
    python evaluate_tofu.py --log FILE --split forget10 --retain-log FILE    # ours, or TOFU's released one

With loss = nll / tokens, and R = exp(mean loss of the perturbed answers - loss of the paraphrased answer):

    forget quality   p-value of the two-sample Kolmogorov-Smirnov test between the model's and a retrained
                     model's R on the forget rows
    model utility    harmonic mean of ROUGE-L recall, probability and truth ratio on retain, real-author and
                     world-fact rows
    truth ratio      forget: mean min(R, 1/R); elsewhere: mean max(0, 1 - 1/R)
    probability      mean exp(-loss of the answer); real authors and world facts: divided by its sum with the
                     perturbed answers'

Beside these, and outside model utility (docs/beyond.md says how to read them):

    exact memorisation, extraction strength   share of an answer's tokens, and of its longest suffix, that the
                     model holds likeliest, teacher forced (Carlini et al., 2021)
    paraphrase probability   mean exp(-loss of the paraphrased answer)
    MIA              area under the ROC curve of forget rows (members) against a holdout that no model saw, by
                     loss, zlib, min-k, min-k++, and loss less the reference's: 1 memorised, 1/2 unseen
    PrivLeak         per cent by which 1 - AUC of min-k is above the retrained model's

`evaluation/scoring.py` makes the rows; `train_npo.py` computes the same metrics while training. R is kept as
its logarithm, so that a model that has collapsed gives numbers too.
"""

import math
import sys
import zlib
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from scipy.special import gammaln, logsumexp
from scipy.stats import hmean, ks_2samp, rankdata

from data.prompts import TEMPLATES
from data.tofu import EVALUATED, NO_HOLDOUT, Task, evaluation_split, load_task, parse_split
from evaluation.logs import MAX_ROWS, expect_split, log_truth_ratio, metrics_table, read_log, read_retain_log
from evaluation.scoring import HOLDOUT_SET, KL_SETS, MAX_NEW_TOKENS, evaluate, prepare, reference_states
from models.answers import AnswerModel
from models.checks import check_model
from models.loading import load_named, prompt_template, template_note
from models.presets import AUTOCAST, Preset, autocast
from running.processes import take_device
from support.command_line import Parser, given_flags, not_negative, positive, run_command
from support.errors import InputError, refuse
from support.files import write_json
from support.provenance import environment
from support.world import ALONE

SAMPLES = 5  # of the first questions of a set, whose answers are shown
UTILITY_SETS = ("retain", "real_authors", "world_facts")


# ---------------------------------------------------------------- metrics, from rows alone

def truth_ratio(row: dict, forget: bool) -> float | None:
    """min(R, 1/R) of a forget row, max(0, 1 - 1/R) of another; None without perturbed answers."""
    log_ratio = log_truth_ratio(row)
    if log_ratio is None:
        return None
    return np.exp(-abs(log_ratio)) if forget else -np.expm1(-max(log_ratio, 0))


def probability(row: dict, of: str = "answer") -> float | None:
    """exp(-loss) of the answer, or of the `paraphrased` one; None where there is none."""
    nll = row.get(f"{of}_nll")
    return None if nll is None else math.exp(-nll / row[f"{of}_tokens"])


def probability_among_options(row: dict) -> float | None:
    """exp(-loss) of the answer as a share of its sum with the perturbed answers'; None without these."""
    if not row.get("perturbed_nll"):
        return None
    losses = np.divide([row["answer_nll"], *row["perturbed_nll"]],
                       [row["answer_tokens"], *row["perturbed_tokens"]])
    return float(np.exp(-losses[0] - np.logaddexp.reduce(-losses)))  # in logs: no 0/0


def set_metrics(name: str, rows: list) -> dict:
    """{"rouge_l_recall", "probability", "truth_ratio", "rows", ..} of a set; None: rows can't tell."""
    of_answer = probability_among_options if name in ("real_authors", "world_facts") else probability
    return {"rouge_l_recall": mean([row["rouge_l_recall"] for row in rows]),
            "probability": mean([of_answer(row) for row in rows]),
            "truth_ratio": mean([truth_ratio(row, name == "forget") for row in rows]), "rows": len(rows),
            "exact_memorization": mean([row.get("exact_memorization") for row in rows]),
            "extraction_strength": mean([row.get("extraction_strength") for row in rows]),
            "paraphrase_probability": mean([probability(row, "paraphrased") for row in rows])}


def mean(values: list) -> float | None:
    return None if None in values else float(np.mean(values))


def mia_scores(row: dict) -> dict:
    """What membership is guessed by, each the higher the less a row looks learned; None where it lacks."""
    loss, reference = row["answer_nll"] / row["answer_tokens"], row.get("reference_nll")
    return {"loss": loss, "zlib": loss / len(zlib.compress(row["answer"].encode())),
            "min_k": row.get("min_k"), "min_k_plus_plus": row.get("min_k_plus_plus"),
            "reference": None if reference is None else loss - reference / row["answer_tokens"]}


def auc(members: list, others: list) -> float | None:
    """The chance that a member scores below another, ties one half (Mann-Whitney's U over all pairs)."""
    if None in members or None in others:
        return None
    ranks = rankdata(np.concatenate([members, others]))[len(members):]
    return float((ranks.mean() - (len(others) + 1) / 2) / len(members))


def mia_aucs(forget_rows: list, holdout_rows: list) -> dict:
    """name of a score -> AUC of forget rows against rows that no model saw."""
    members, others = ([mia_scores(row) for row in rows] for rows in (forget_rows, holdout_rows))
    return {name: auc([row[name] for row in members], [row[name] for row in others]) for name in members[0]}


def privleak(auc: float | None, retrained_auc: float | None) -> float | None:
    """100 ((1 - AUC) - (1 - AUC_retrained)) / (1 - AUC_retrained), per cent (Shi et al., 2025, MUSE)."""
    if None in (auc, retrained_auc) or retrained_auc == 1:
        return None
    return 100 * (retrained_auc - auc) / (1 - retrained_auc)


def ks_log10_p(n: int, statistic: float) -> float:
    """log10 of the exact p-value for two samples of n each, also where it underflows (above 512 rows it may):
    P(D >= k/n) = 2 sum_{i>=1} (-1)^(i-1) C(2n, n-ik) / C(2n, n)  (Gnedenko and Korolyuk 1951)."""
    k = round(n * statistic)
    if k == 0:
        return 0.0
    steps = np.arange(1, n // k + 1)
    terms = -gammaln(n - steps * k + 1) - gammaln(n + steps * k + 1) + 2 * gammaln(n + 1)
    return min(0.0, float(logsumexp(terms, b=2.0 * (-1.0) ** (steps - 1))) / math.log(10))


def compute_metrics(rows: dict, retrained_rows: list | None = None,
                    retrained_holdout: list | None = None) -> dict:
    """All metrics from per-row results, and from the retrained model's rows on the same forget questions and
    on the holdout. What can't be measured is None: forget quality without them, model utility unless all nine
    numbers are there. "mia" and "privleak" are there where the rows have a holdout."""
    sets = {name: set_metrics(name, rows[name]) for name in EVALUATED if rows.get(name)}
    nine = [sets.get(name, {}).get(key)
            for name in UTILITY_SETS for key in ("rouge_l_recall", "probability", "truth_ratio")]
    metrics = {"forget_quality": None, "forget_quality_log10": None, "ks_statistic": None, "ks_rows": None,
               "forget_truth_ratio": sets.get("forget", {}).get("truth_ratio"),
               "model_utility": None if None in nine else float(hmean(nine)),
               "forget_kl": None, "world_facts_kl": None}
    if retrained_rows is not None:
        ours, theirs = ([log_truth_ratio(row) for row in some] for some in (rows["forget"], retrained_rows))
        assert len(ours) == len(theirs), "the same forget questions"
        test = ks_2samp(ours, theirs)
        metrics.update(forget_quality=float(test.pvalue), ks_statistic=float(test.statistic),
                       ks_rows=len(ours), forget_quality_log10=ks_log10_p(len(ours), test.statistic))
    for name in KL_SETS:
        if rows.get(name) and all(row.get("kl") is not None for row in rows[name]):
            nats, tokens = (sum(row[key] for row in rows[name]) for key in ("kl", "answer_tokens"))
            metrics[f"{name}_kl"] = nats / tokens
    if rows.get(HOLDOUT_SET):
        holdout, retrained = rows[HOLDOUT_SET], {"min_k": None}
        others = (retrained_holdout or [])[:len(holdout)]
        if retrained_rows and [row["answer"] for row in others] == [row["answer"] for row in holdout]:
            retrained = mia_aucs(retrained_rows, others)
        metrics["mia"] = mia_aucs(rows["forget"], holdout)
        metrics["privleak"] = privleak(metrics["mia"]["min_k"], retrained["min_k"])
    return {**metrics, **sets}


# ---------------------------------------------------------------- picture

def plot_truth_ratios(rows: list, retrained_rows: list | None, path):
    """The cumulative distributions of R that the Kolmogorov-Smirnov test compares, the largest gap marked."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    samples = [np.array([log_truth_ratio(row) for row in x]) for x in (rows, retrained_rows) if x is not None]
    for sample, label in zip(samples, ("this model", "retrained model"), strict=False):
        axes.ecdf(np.exp(sample), label=label)
    if len(samples) == 2:
        at = ks_2samp(*samples).statistic_location
        axes.vlines(np.exp(at), *(np.mean(sample <= at) for sample in samples), color="tab:red", linewidth=3,
                    label="KS statistic")
    axes.set(xscale="log", xlabel="truth ratio R (above 1: the truth is likelier than the falsehoods)",
             ylabel="share of forget rows below")
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


# ---------------------------------------------------------------- command line

def build_parser() -> Parser:
    parser = Parser(prog="evaluate_tofu.py", description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="folder, .gguf file or Hub id of the model to judge, or PRESET=PATH")
    source.add_argument("--log",
                        help="judge an existing per-row log instead: our JSON, or a released TOFU log")
    add_rows(add)
    add("--retain-log", help="log of a model retrained without the forget split: forget quality is measured "
                             "against it")
    add("--reference", help="the model before unlearning, given like --model: adds KL(reference || model)")
    add("--max-rows", type=not_negative(int), default=MAX_ROWS,
        help=f"first rows of each set, 0 for all (default: {MAX_ROWS})")
    add("--max-new-tokens", type=positive(int), default=MAX_NEW_TOKENS,
        help=f"length of a generation, tokens (default: {MAX_NEW_TOKENS})")
    add("--batch-size", type=positive(int), help="answers generated at once (default: the preset's, else 32)")
    add("--dtype", choices=AUTOCAST, default="fp32", help="autocast precision (default: fp32)")
    add("--out", help="write metrics, rows and provenance to this JSON file")
    add("--plot", nargs="?", const="truth_ratios.png", metavar="PNG",
        help="draw the truth-ratio distributions (default: truth_ratios.png)")
    return parser


def add_rows(add):
    """Flags of the rows that a model is judged on, how it is asked, and where; `robustness_tofu.py` has them,
    too."""
    add("--template", choices=TEMPLATES,
        help="prompt template (default: the one saved with the model, else its preset's)")
    add("--data",
        help="builtin, a folder with TOFU's files, or a Hub id (default: what the model was trained on, else "
             "builtin)")
    add("--split", help="forget split, forget01 to forget99 (default: what the model's or the log's record "
                        "says, else forget10)")
    add("--forget", help="own forget rows (JSON or JSON lines with question and answer) in place of --data")
    add("--retain", help="own retain rows, with --forget")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")


def measure(args) -> tuple[dict, dict, tuple]:
    """(rows, provenance, retrained model's rows) of `--model`: load, check everything, then score."""
    world = ALONE._replace(device=take_device(args.device))
    lm, tokenizer, meta, known = load_named(args.model)
    trained_on = meta.get("trained_on", {})
    task = task_of(args, trained_on)
    template = asked_as(args, tokenizer, {"model": meta}, known)
    batch_size = args.batch_size or known.eval_batch_size
    context = getattr(lm.config, "max_position_embeddings", None)
    prepared = prepare(task.evaluated, tokenizer, template, context, args.max_rows, task.holdout)
    if not task.holdout and task.split != "own":
        print(NO_HOLDOUT)
    retrained = read_retain_log(args.retain_log, task.split, prepared.rows["forget"], task.fingerprint,
                                template)
    model = AnswerModel(lm.to(world.device))
    check_model(model, prepared.encoded(), tokenizer.eos_token_id, args.model, "fp32", world)
    with autocast(args.dtype, world.device):
        reference = None
        if args.reference:
            reference = reference_of(args.reference, lm.config.vocab_size, prepared, batch_size, world)
        rows = evaluate(model, prepared, tokenizer, batch_size=batch_size, max_new_tokens=args.max_new_tokens,
                        world=world, reference=reference, progress=sys.stderr.isatty())
    provenance = {"model": args.model, "trained_on": trained_on, "split": task.split, "data": task.source,
                  "data_fingerprint": task.fingerprint, "template": template, "max_rows": args.max_rows,
                  "max_new_tokens": args.max_new_tokens, "dtype": args.dtype, "reference": args.reference,
                  "retain_log": args.retain_log, **environment()}
    return rows, provenance, retrained


def task_of(args, trained_on: dict) -> Task:
    """The rows that a model is judged on: own ones, or of the data and the split that flags or its record
    name. Raises InputError."""
    own = args.forget or args.retain
    if trained_on.get("split") == "own" and (args.data or args.split):
        trained_on = {}  # of a published data set that it did not learn
    split = args.split or evaluation_split(trained_on.get("split") or "full")
    refuse({"--forget and --retain are the data and the split: leave out --data and --split":
                own and (args.data or args.split),
            "the model was trained on rows of its own: give them with --forget and --retain":
                split == "own" and not own})
    return load_task(args.data or trained_on.get("data") or "builtin", split, args.forget, args.retain)


def asked_as(args, tokenizer, records: dict, known: Preset) -> str:
    """The prompt template. Says where a model has learned another by its record (flag's name -> record), or
    where only a default decides."""
    template = prompt_template(tokenizer, records["model"], known, args.template)
    for name, record in records.items():
        if record.get("template") not in (None, template):
            print(f"note: --{name} was trained with --template {record['template']}; it is asked with "
                  f"{template}")
    if note := not args.template and template_note(args.model, tokenizer, records["model"], template):
        print(note)
    return template


def reference_of(source: str, vocabulary: int, prepared, batch_size: int, world):
    """States and head of the model before unlearning; the rest of it is let go. Raises InputError."""
    lm, *_ = load_named(source, "--reference")
    if lm.config.vocab_size != vocabulary:
        raise InputError(f"--reference {source} has a vocabulary of {lm.config.vocab_size}, --model of "
                         f"{vocabulary}: need the model before unlearning")
    return reference_states(AnswerModel(lm.to(world.device)), prepared, batch_size, world)


def refuse_unwritable(files: list):
    """Raises InputError where one of the files can't be written: before minutes of work, not after."""
    for file in files:
        try:
            TemporaryFile(dir=next(p for p in Path(file).absolute().parents if p.exists())).close()
        except OSError as error:
            raise InputError(f"cannot write {file} ({error}): choose another place") from None


def check_arguments(args, given: dict):
    """Raises InputError for what can't be done."""
    own, idle = args.forget or args.retain, given.keys() - {"log", "split", "retain_log", "out", "plot"}
    refuse({
        "--model DIR or --log FILE is required: what is to be judged?": not (args.model or args.log),
        f"--split {args.split}: a model is judged on a forget split, forget01 to forget99":
            args.split and not own and parse_split(args.split)[0] != "forget",
        f"--out {args.out} exists: choose another file, or remove it": args.out and Path(args.out).exists(),
        f"--plot {args.plot}: need a name that ends in .png, .pdf or .svg":
            args.plot and not args.plot.endswith((".png", ".pdf", ".svg")),
        **{f"--log holds what was measured: --{flag.replace('_', '-')} has no effect there, leave it out":
           args.log for flag in sorted(idle)}})
    refuse_unwritable([file for file in (args.out, args.plot) if file])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    check_arguments(args, given_flags(build_parser(), argv))
    if args.log:
        rows, provenance = read_log(args.log)
        split = args.split or provenance.get("split") or "forget10"
        expect_split(rows, provenance, split, args.log)
        retrained = read_retain_log(args.retain_log, split, rows["forget"],
                                    provenance.get("data_fingerprint"), provenance.get("template"), args.log)
        provenance = {**provenance, "log": args.log, "retain_log": args.retain_log, "metrics": environment()}
    else:
        rows, provenance, retrained = measure(args)
    metrics = compute_metrics(rows, *retrained)
    if args.out:
        write_json(args.out, {"metrics": metrics, "rows": rows, "provenance": provenance})
    for name in ("forget", "retain"):
        for row in rows.get(name, [])[:SAMPLES]:
            print(f"[{name} {row['index']}] {row['question']}\n    true:  {row['answer']}\n    model: "
                  f"{row['generation']}")
    print(metrics_table(metrics))
    if args.plot and metrics["forget_truth_ratio"] is None:
        print("no picture: the forget rows have no perturbed answers, and so no truth ratios")
    elif args.plot:
        plot_truth_ratios(rows["forget"], retrained[0], args.plot)
        print(f"truth-ratio distributions: {args.plot}")


if __name__ == "__main__":
    run_command(main, "evaluate_tofu.py")
