"""What a run shows: trajectory.png and, beside its weights, README.md, the model card.

The picture has four panels, each where there is something to show: forget quality; model utility and
probabilities; the mean weight W (of a loss without one: the parts of the loss); the log R that forget quality
compares. The card says what the model is, what it is not, its numbers, how to load it.
"""

import math
from argparse import Namespace
from pathlib import Path

from matplotlib.figure import Figure

from evaluation.logs import metrics_table
from losses import OBJECTIVES
from models.saving import hub_id
from support.command_line import markdown_table

BINS = 30  # of a histogram


def draw_trajectory(method: str, evaluations: dict, log: list, samples: dict) -> Figure:
    """evaluations: step -> metrics; log: the lines of log.jsonl; samples: model -> log R of its forget rows.
    A curve or a sample that wasn't measured everywhere (None) is left out."""
    steps, metrics = zip(*sorted(evaluations.items()), strict=True)
    weighted = "mean_W" in log[0]
    parts = ["mean_W"] if weighted else ["forget_loss", "retain_loss", "kl_loss"]
    what_is_kept = {"model utility": [m["model_utility"] for m in metrics],
                    "forget probability": [m["forget"]["probability"] for m in metrics],
                    "retain probability": [m["retain"]["probability"] for m in metrics],
                    "extraction strength": [m["forget"].get("extraction_strength") for m in metrics],
                    "MIA AUC (min-k)": [m.get("mia", {}).get("min_k") for m in metrics]}
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    figure.suptitle(method)
    quality, kept, weight, ratios = grid = figure.subplots(2, 2).flatten()
    draw_curves(quality, steps, {"log10 of its p-value": [m["forget_quality_log10"] for m in metrics]}, "o-")
    draw_curves(kept, steps, what_is_kept, "o-")
    draw_curves(weight, [line["step"] for line in log],
                {part.replace("_", " "): [line.get(part) for line in log] for part in parts})
    quality.set(title="forget quality")
    kept.set(title="what is kept and what is lost", ylim=(-0.02, 1.45))  # above 1: room for the legend
    weight.set(title="weight on gradient ascent's gradient" if weighted else "parts of the loss")
    if quality.lines:
        quality.axhline(math.log10(0.05), color="tab:red", linestyle="--", label="0.05")
    if weighted:
        weight.axhline(1, color="tab:red", linestyle="--", label="gradient ascent")
    samples = {name: sample for name, sample in samples.items() if sample and None not in sample}
    if samples:
        ratios.hist(list(samples.values()), BINS, histtype="step", label=list(samples))
    ratios.set(title="truth ratios", ylabel="forget rows",
               xlabel="log R (above 0: the truth is likelier than the falsehoods)")
    for axes in grid:
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=8, framealpha=0.4, ncols=2 if axes is kept else 1)
        else:
            axes.remove()
    return figure


def draw_curves(axes, steps: list, curves: dict, look: str = "-"):
    axes.set(xlabel="step")
    for label, values in curves.items():
        if None not in values:
            axes.plot(steps, values, look, label=label)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {kind}
- {loss}
---
# {method} on {split}

{about}

{numbers}

Forget quality: p-value of a test against a model that never saw the forget rows (-: not measured). The
metrics are those of `evaluate_tofu.py`, whose help defines them. MIA AUC: 1/2 where forget rows look unseen,
1 where learned, near 0 where unlearned too far.

## Settings

{settings}

`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load it. Other prompts than the
template it was trained with were not measured.
"""
UNLEARNED = """A language model after unlearning `{split}` of `{data}` with {method}. The
answers of the forget rows were made unlikely; that is no proof that what they say is gone from the weights,
and further training or another wording may bring it back. What was kept was measured on the sets below and
nowhere else."""
LEARNED = "A language model fine-tuned to repeat the answers of `{split}` of `{data}`, and measured on them."
SETTINGS = ("forget_weight", "retain_weight", "kl_weight", "lr", "epochs", "batch_size", "warmup_epochs",
            "weight_decay", "max_grad_norm", "dtype", "template", "seed")


def model_card(s: Namespace, config: dict, evaluations: dict, step: int) -> str:
    """Markdown with YAML front matter, for the weights after `step`. `evaluations`: step -> metrics, of which
    the start's and the last up to `step` are told. No path of this machine is in it."""
    data = s.data if hub_id(s.data) else ", ".join(Path(part).name for part in s.data.split(", "))
    about, kind = (LEARNED, "fine-tuned") if s.loss == "sft" else (UNLEARNED, "machine-unlearning")
    evaluated = [k for k in sorted(evaluations) if k <= step]
    settings = {key: getattr(s, key) for key in (*SETTINGS, *OBJECTIVES[s.loss].settings)}
    if s.system_prompt:  # whoever asks by the chat template must give it
        settings["system_prompt"] = " ".join(s.system_prompt.split()).replace("|", "/")
    settings["step"] = f"{step} of {config['derived']['steps']}"
    settings |= {key: config.get(key) for key in ("start_weights", "data_fingerprint", "commit")}
    return CARD.format(
        kind=kind, loss=s.loss, method=s.method, split=s.split,
        about=about.format(split=s.split, data=data, method=s.method),
        numbers="\n\n".join(f"Step {k}:\n\n{metrics_table(evaluations[k])}"
                            for k in sorted({*evaluated[:1], *evaluated[-1:]})),
        settings="\n".join(markdown_table(["setting", ""], settings.items())))
