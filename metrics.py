"""From an evaluation's rows to metrics and pictures. It needs no model.

With loss = nll / tokens, and R = exp(mean loss of the perturbed answers - loss of the paraphrased answer):

    forget quality   p-value of the two-sample Kolmogorov-Smirnov test between R of this model and R of a
                     retrained model, on the forget rows
    model utility    harmonic mean of ROUGE-L recall, probability and truth ratio on the retain, real-author
                     and world-fact rows
    truth ratio      forget rows: mean min(R, 1/R); other rows: mean max(0, 1 - 1/R)
    probability      mean exp(-loss of the answer); real authors and world facts: divided by its sum with the
                     perturbed answers'

docs/beyond.md explains the other metrics. R is kept as its logarithm, so a collapsed model gives numbers too.
"""

import json
import math
import zlib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.special import gammaln, logsumexp
from scipy.stats import hmean, ks_2samp, mannwhitneyu, wilcoxon

from common import InputError
from data.tofu import EVALUATED

UTILITY_SETS = ("retain", "real_authors", "world_facts")
KL_SETS = ("forget", "world_facts")
PASSES = 0.05  # a model passes when its forget quality is above
COLORS = {"model utility": "tab:blue", "retain probability": "tab:green", "forget probability": "tab:red"}


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


def mean(values: list, average=np.mean) -> float | None:
    return None if None in values else float(average(values))


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
    return float(mannwhitneyu(unseen, members).statistic) / (len(unseen) * len(members))


def mia_aucs(forget_rows: list, holdout_rows: list) -> dict:
    """Name of a score -> AUC of forget rows against holdout rows: 1 memorised, 1/2 unseen."""
    members, unseen = ([mia_scores(row) for row in rows] for rows in (forget_rows, holdout_rows))
    return {name: auc([row[name] for row in members], [row[name] for row in unseen]) for name in members[0]}


def auc_interval(members: np.ndarray, unseen: np.ndarray) -> dict:
    """The AUC with its 95% interval, by the variance of DeLong et al. (1988); at least two rows each."""
    wins = (unseen[:, None] > members) + 0.5 * (unseen[:, None] == members)  # (unseen, members)
    variance = wins.mean(0).var(ddof=1) / len(members) + wins.mean(1).var(ddof=1) / len(unseen)
    low, high = (float(wins.mean() + sign * 1.96 * math.sqrt(variance)) for sign in (-1, 1))
    return {"auc": float(wins.mean()), "interval": [max(0.0, low), min(1.0, high)]}


def unseen_metrics(forget_rows: list, unseen_rows: list) -> dict:
    """Forget rows beside unseen rows: their losses per token, the unseen rows' probability, and the AUC."""
    forget, unseen = (np.array([row["answer_nll"] / row["answer_tokens"] for row in rows])
                      for rows in (forget_rows, unseen_rows))
    return {"forget_loss": float(forget.mean()), "unseen_loss": float(unseen.mean()),
            "probability": float(np.exp(-unseen).mean()), "rows": [len(forget), len(unseen)],
            "p": float(mannwhitneyu(forget, unseen).pvalue),  # few rows: DeLong's interval is too narrow
            **(auc_interval(forget, unseen) if min(len(forget), len(unseen)) > 1 else {})}


def unseen_verdict(measured: dict) -> str:
    """What an attacker who sees losses alone can tell, in words. AUC: 1 memorised, 1/2 like unseen rows."""
    auc, (low, high), (n_forget, n_unseen) = measured["auc"], measured["interval"], measured["rows"]
    if low > 0.5 and measured["p"] < 0.05:
        return f"not forgotten: an attacker tells the rows from unseen ones in {100 * auc:.0f} of 100 pairs"
    if high < 0.5 and measured["p"] < 0.05:
        return (f"forgotten too far: AUC {auc:.2f}, an attacker finds the forgotten rows in "
                f"{100 - 100 * auc:.0f} of 100 pairs")
    return (f"this test does not tell them apart: AUC {auc:.2f} on {n_forget} and {n_unseen} rows, 95% "
            f"interval {low:.2f} to {high:.2f}")


def privleak(min_k_auc: float | None, retrained_auc: float | None) -> float | None:
    """100 ((1 - AUC) - (1 - AUC_retrained)) / (1 - AUC_retrained), per cent (MUSE, Shi et al., 2025)."""
    if None in (min_k_auc, retrained_auc) or retrained_auc == 1:
        return None
    return 100 * (retrained_auc - min_k_auc) / (1 - retrained_auc)


def log_truth_ratios(rows: list) -> np.ndarray:
    return np.array([log_truth_ratio(row) for row in rows], dtype=float)


def agreement(x: np.ndarray, y: np.ndarray) -> dict:
    """Of two models' log R on the same forget rows: the Kolmogorov-Smirnov test's p-value (forget quality),
    that of Wilcoxon's paired test, and the correlation over rows (None where log R does not vary)."""
    correlation = float(np.corrcoef(x, y)[0, 1]) if min(x.std(), y.std()) > 0 else None
    return {"ks_p": float(ks_2samp(x, y).pvalue), "correlation": correlation,
            "paired_p": 1.0 if (x == y).all() else float(wilcoxon(x, y, zero_method="zsplit").pvalue)}


def compute_metrics(rows: dict, retrained: list | None = None, retrained_holdout: list | None = None,
                    others: Sequence = ()) -> dict:
    """All metrics from row results, and from the retrained model's results on the same forget and holdout
    rows. `others` are the forget rows of more retrained models. A metric that cannot be computed is None."""
    sets = {name: set_metrics(name, rows[name]) for name in EVALUATED if rows.get(name)}
    nine = [sets.get(name, {}).get(metric)
            for name in UTILITY_SETS for metric in ("rouge_l_recall", "probability", "truth_ratio")]
    metrics = {"forget_quality": None, "forget_quality_log10": None, "ks_statistic": None, "ks_rows": None,
               "forget_truth_ratio": sets.get("forget", {}).get("truth_ratio"),
               "log_truth_ratio_mean": None, "log_truth_ratio_sd": None,  # of log R on the forget rows
               "model_utility": mean(nine, hmean), "forget_kl": None, "world_facts_kl": None}
    ratios = log_truth_ratios(rows.get("forget", []))
    if len(ratios) and np.isfinite(ratios).all():
        metrics |= {"log_truth_ratio_mean": float(ratios.mean()), "log_truth_ratio_sd": float(ratios.std())}
    if retrained is not None:
        models = list(map(log_truth_ratios, (retrained, *others)))
        test = ks_2samp(ratios, models[0])
        metrics |= {"forget_quality": float(test.pvalue), "ks_statistic": float(test.statistic),
                    "ks_rows": len(retrained),
                    "forget_quality_log10": ks_log10_p(len(retrained), test.statistic)}
        metrics["retrained"] = {"against": [agreement(ratios, model) for model in models],
                                "among": [agreement(*pair) for pair in combinations(models, 2)]}
    for name in KL_SETS:
        if rows.get(name) and all(row.get("kl") is not None for row in rows[name]):
            nats, tokens = (sum(row[column] for row in rows[name]) for column in ("kl", "answer_tokens"))
            metrics[f"{name}_kl"] = nats / tokens
    metrics, retrained_mia = metrics | sets, {}
    if rows.get("holdout"):
        holdout = (retrained_holdout or [])[:len(rows["holdout"])]
        if retrained and [row["answer"] for row in holdout] == [row["answer"] for row in rows["holdout"]]:
            retrained_mia = mia_aucs(retrained, holdout)
        metrics["mia"] = mia_aucs(rows["forget"], rows["holdout"])
        metrics["unseen"] = unseen_metrics(rows["forget"], rows["holdout"])
        metrics["privleak"] = privleak(metrics["mia"]["min_k"], retrained_mia.get("min_k"))
    return metrics


def best_step(evaluations: dict) -> int | None:
    """The best forget quality's step. Without a retain log: the step whose forget rows are nearest to the
    unseen rows at the start, or without these that of the largest retain minus forget probability."""
    def merit(step: int) -> float:
        quality, retain = evaluations[step]["forget_quality_log10"], evaluations[step].get("retain")
        if quality is None and "unseen" in evaluations.get(0, {}):
            return -abs(evaluations[step]["unseen"]["forget_loss"] - evaluations[0]["unseen"]["unseen_loss"])
        difference = (retain["probability"] if retain else 0) - evaluations[step]["forget"]["probability"]
        return difference if quality is None else quality
    return max((step for step in evaluations if step > 0), key=merit, default=None)


def metrics_table(metrics: dict) -> str:
    """Plain text: one line per set, then the metrics over all sets."""
    def listed(numbers: dict) -> str:
        return ", ".join(f"{name.replace('_', ' ')} " + ("-" if value is None else f"{value:.4g}")
                         for name, value in numbers.items())

    overall = {name: metrics.get(name) for name in (
        "forget_quality", "ks_statistic", "log_truth_ratio_mean", "log_truth_ratio_sd", "model_utility",
        "forget_kl", "world_facts_kl", "privleak")}
    models = metrics.get("retrained", {"against": [], "among": []})
    groups = [("", overall), ("MIA AUC: ", metrics.get("mia", {})),
              *((f"against retrained model {k}: ", pair) for k, pair in enumerate(models["against"], 1)),
              *(("two retrained models: ", pair) for pair in models["among"])]
    return "\n".join([*(f"{name:13s}{listed(metrics[name])}" for name in EVALUATED if name in metrics),
                      *(title + listed(group) for title, group in groups if {*group.values()} - {None})])


# ---------------------------------------------------------------- pictures

def plot_truth_ratios(rows: list, retrained: list | None, path: str):
    """The cumulative distributions that the KS test compares. Raises InputError without perturbed answers."""
    if not all(row.get("perturbed_nll") for row in rows):
        raise InputError("--plot draws the truth ratio: it needs perturbed answers in every forget row")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    samples = {"this model": rows} | ({"retrained model": retrained} if retrained else {})
    ratios = {name: log_truth_ratios(sample) for name, sample in samples.items()}
    for name, values in ratios.items():
        axes.ecdf(np.exp(values), label=name)
    axes.set(xscale="log", xlabel="truth ratio R (above 1: the truth is likelier than the falsehoods)",
             ylabel="share of forget rows below")
    if retrained:
        test = ks_2samp(*ratios.values())
        shares = [np.mean(values <= test.statistic_location) for values in ratios.values()]
        axes.vlines(np.exp(test.statistic_location), min(shares), max(shares), color="tab:red")
        axes.set_title(f"Largest gap {test.statistic:.3f} of {len(rows)} rows, p = {test.pvalue:.2g}")
    axes.legend(loc="upper left")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


def quality_axis(axes, lowest: float, axis: str = "y", floor: list = ()):
    """log10 forget quality on a square-root scale, down to `lowest`, with the band of p-values above 0.05,
    and within it the range that retrained models have among each other (`floor`, their agreements)."""
    line = math.log10(PASSES)
    getattr(axes, f"set_{axis}scale")("function", functions=(
        lambda decades: np.sign(decades) * abs(decades) ** 0.5, lambda height: np.sign(height) * height**2))
    getattr(axes, f"set_{axis}lim")(min(1.1 * lowest, -4), 0.01)
    powers = [n for n in (3, 6, 10, 20, 30, 40) if n < -1.1 * lowest]
    ticks = {0: "1", line: "0.05", **{-n: f"$10^{{-{n}}}$" for n in powers}}
    getattr(axes, f"set_{axis}ticks")(list(ticks), ticks.values(), fontsize=8)
    axes.minorticks_off()
    span = axes.axhspan if axis == "y" else axes.axvspan
    span(line, 0, color="tab:green", alpha=0.15, linewidth=0)
    if floor:
        span(math.log10(min(pair["ks_p"] for pair in floor)), 0, color="tab:green", alpha=0.2, linewidth=0)


def answer_nats(rows: list) -> float:
    """-log pi of an answer: mean over rows, in nats."""
    return float(np.mean([row["answer_nll"] for row in rows]))


def plot_trajectory(folder: Path, retrained: list | None):
    """trajectory.png of a run: whether it has forgotten, what it has kept, W (or the forget loss), and how
    deep the forget answers have fallen, beside the `retrained` rows."""
    from losses import OBJECTIVES  # imported here because it imports PyTorch, and a study's pictures do not
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = {int(file.stem[5:]): json.loads(file.read_text(encoding="utf-8"))
                   for file in sorted((folder / "eval").glob("step_*.json"))}
    metrics = [evaluation["metrics"] for evaluation in evaluations.values()]
    rows = [evaluation["rows"]["forget"] for evaluation in evaluations.values()]
    steps, weight = list(evaluations), "mean_W" if "mean_W" in log[0] else "forget_loss"
    probabilities = {f"{name} probability": [m.get(name, {}).get("probability") for m in metrics]
                     for name in ("retain", "forget")}
    forgotten = {"forget quality": [m["forget_quality_log10"] for m in metrics]} if retrained else {
        "forget probability": probabilities.pop("forget probability")}
    panels = {"Forgotten?": (steps, forgotten),
              "Rest kept?": (steps, {"model utility": [m["model_utility"] for m in metrics]} | probabilities),
              "How fast?": ([line["step"] for line in log],
                            {weight.replace("_", " "): [line[weight] for line in log]}),
              "How deep?": (steps, {"forget answers": list(map(answer_nats, rows))})}
    figure = Figure(figsize=(10, 8), layout="constrained")
    quality, kept, fast, deep = figure.subplots(2, 2).flat
    for axes, (title, (x, curves)) in zip((quality, kept, fast, deep), panels.items(), strict=True):
        at = -math.inf  # the height of the last label: labels of close lines are moved apart
        for name, values in sorted(curves.items(), key=lambda curve: curve[1][-1] or 0):
            if None not in values:
                color = COLORS.get(name, "black")
                axes.plot(x, values, marker="" if axes is fast else ".", color=color)
                at = max(values[-1], at + 0.05 * (axes is kept))
                axes.annotate(f" {name}", (x[-1], at), va="center", color=color)
        axes.set(title=title, xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
    kept.set_ylim(0, 1)
    deep.set_ylabel("-log π of an answer, nats, mean over forget rows")
    if retrained:
        quality_axis(quality, min(forgotten["forget quality"]), floor=metrics[-1]["retrained"]["among"])
        quality.set_ylabel("forget quality, p-value\n(shaded: not told from a retrained model)")
        deep.axhline(answer_nats(retrained), color="green")
        deep.annotate("retrained model", (0, answer_nats(retrained)), va="bottom", color="green")
    elif steps[0] == 0 and "unseen" in metrics[0]:
        target = metrics[0]["unseen"]["probability"]
        quality.axhline(target, color="green")
        quality.annotate("unseen rows at the start", (0, target), va="bottom", color="green")
    s = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
    weights = [name for name in s if name.endswith("_weight") and name != "forget_weight"]
    names = (*weights, "split", "lr", *OBJECTIVES[s["loss"]].settings, "epochs", "seed")
    figure.suptitle(", ".join([s["loss"], *(f"{n.replace('_', ' ')} {s[n]}" for n in names if s.get(n))]))
    figure.savefig(folder / "trajectory.png", dpi=200)
