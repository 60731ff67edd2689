"""The README.md beside a run's weights: what the model is, what it is not, its numbers, how to load it."""

from argparse import Namespace
from pathlib import Path

from evaluation.logs import metrics_table
from losses import OBJECTIVES
from models.presets import PRESETS
from support.command_line import markdown_table

CARD = """---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
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
UNLEARNED = """A language model after unlearning `{split}` of `{data}` with {method} (Zhang et al., 2024). The
answers of the forget rows were made unlikely; that is no proof that what they say is gone from the weights,
and further training or another wording may bring it back. What was kept was measured on the sets below and
nowhere else."""
LEARNED = "A language model fine-tuned to repeat the answers of `{split}` of `{data}`, and measured on them."
SETTINGS = ("forget_weight", "retain_weight", "kl_weight", "lr", "epochs", "batch_size", "warmup_epochs",
            "weight_decay", "max_grad_norm", "dtype", "template", "seed")


def model_card(s: Namespace, config: dict, evaluations: dict, step: int) -> str:
    """Markdown with YAML front matter, for the weights after `step`. `evaluations`: step -> metrics, of which
    the start's and the last up to `step` are told. No path of this machine is in it: data and start are named
    as far as others can know them."""
    published = {name for preset in PRESETS.values() for name in (preset.base, preset.finetuned) if name}
    is_hub_id = s.data.count("/") == 1 and not Path(s.data).exists()
    data = s.data if is_hub_id else ", ".join(Path(part).name for part in s.data.split(", "))
    about, kind = (LEARNED, "fine-tuned") if s.loss == "sft" else (UNLEARNED, "machine-unlearning")
    evaluated = [k for k in sorted(evaluations) if k <= step]
    settings = {key: getattr(s, key) for key in (*SETTINGS, *OBJECTIVES[s.loss].settings)}
    settings["step"] = f"{step} of {config['derived']['steps']}"
    settings |= {key: config.get(key) for key in ("start_weights", "data_fingerprint", "commit")}
    return CARD.format(
        base=f"base_model: {s.start}\n" if s.start in published else "", kind=kind, loss=s.loss,
        method=s.method, split=s.split, about=about.format(split=s.split, data=data, method=s.method),
        numbers="\n\n".join(f"Step {k}:\n\n{metrics_table(evaluations[k])}"
                            for k in sorted({*evaluated[:1], *evaluated[-1:]})),
        settings="\n".join(markdown_table(["setting", ""], settings.items())))
