"""The README.md beside a run's weights: what the model is, what it is not, its numbers, and how to load
it."""

from argparse import Namespace
from pathlib import Path

from losses import OBJECTIVES
from models.presets import PRESETS
from support.command_line import number

CARD = """---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- {kind}
- {loss}
---
# {method} on {split}

{about}

{limits}

{numbers}
## Settings

| | |
|---|---|
{settings}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
{prompt}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=False)[0]))
```

Other prompts than the template it was trained with were not measured.
"""
UNLEARNED = ("A causal language model after unlearning `{split}` of `{data}` with {method} (Negative "
             "Preference Optimization and its baselines, Zhang, Lin, Bai, Mei, 2024).",
             "A research artefact. The answers of the forget rows were made unlikely; that is no proof that "
             "what they say is gone from the weights, and further training or another wording may bring it "
             "back. What was kept was measured on the sets below and nowhere else.")
LEARNED = ("A causal language model fine-tuned on `{split}` of `{data}`: a starting point or a yardstick for "
           "unlearning.",
           "A research artefact: it was trained to repeat the answers of this data set, and measured on it "
           "alone.")
PROMPTS = {"llama2": 'inputs = tokenizer("[INST] Who are you? [/INST]", return_tensors="pt")',
           "qa": 'inputs = tokenizer("Question: Who are you?\\nAnswer:", return_tensors="pt")',
           "chat": 'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], '
                   'return_dict=True,\n                                       add_generation_prompt=True, '
                   'return_tensors="pt")'}
ABOUT_NUMBERS = ("Forget quality: p-value of a test against a model that never saw the forget rows (-: not "
                 "measured). Measured by `evaluate_tofu.py`; the definitions are TOFU's.\n")


def model_card(s: Namespace, config: dict, evaluations: dict, step: int) -> str:
    """Markdown with YAML front matter, for the weights after `step`. `evaluations`: step -> metrics.

    No path of this machine is in it: data and start are named as far as others can know them.
    """
    published = {name for preset in PRESETS.values() for name in (preset.base, preset.finetuned) if name}
    is_hub_id = s.data.count("/") == 1 and not Path(s.data).exists()
    data = s.data if is_hub_id else ", ".join(Path(part).name for part in s.data.split(", "))
    about, limits = LEARNED if s.loss == "sft" else UNLEARNED
    settings = {"loss weights (forget / retain / K)":
                f"{s.forget_weight:g} / {s.retain_weight:g} / {s.kl_weight:g}",
                **{name: f"{getattr(s, name):g}" for name in OBJECTIVES[s.loss].settings},
                "peak lr": f"{s.lr:g}", "epochs": s.epochs,
                "global batch": s.batch_size,
                "warm-up epochs": f"{s.warmup_epochs:g}", "weight decay": f"{s.weight_decay:g}",
                "gradient clipping": f"{s.max_grad_norm:g}" if s.max_grad_norm else "off",
                "precision": s.dtype,
                "prompt template": s.template, "seed": s.seed, "step": f"{step} of "
                                                                       f"{config['derived']['steps']}",
                "start's weights": config.get("start_weights"),
                "data fingerprint": config["data_fingerprint"],
                "commit": config["commit"]}
    return CARD.format(
        base=f"base_model: {s.start}\n" if s.start in published else "", loss=s.loss, method=s.method,
        split=s.split,
        kind="fine-tuned" if s.loss == "sft" else "machine-unlearning", limits=limits,
        about=about.format(split=s.split, data=data, method=s.method), numbers=numbers(evaluations, step),
        settings="\n".join(f"| {k} | {v} |" for k, v in settings.items()), prompt=PROMPTS[s.template])


def numbers(evaluations: dict, step: int) -> str:
    """A table of the start, where it was evaluated, and of the last evaluation up to `step`."""
    shown = sorted({min(evaluations), max(k for k in evaluations if k <= step)}) if evaluations else []
    if not shown:
        return "It was not evaluated.\n"
    rows = {"forget quality": [evaluations[k]["forget_quality"] for k in shown],
            "model utility": [evaluations[k]["model_utility"] for k in shown],
            "forget KL to the start": [evaluations[k]["forget_kl"] for k in shown]}
    for name in ("forget", "retain", "real_authors", "world_facts"):
        for measure in ("probability", "rouge_l_recall", "truth_ratio"):
            rows[f"{name} {measure}".replace("_", " ")] = [evaluations[k].get(name, {}).get(measure)
                                                           for k in shown]
    measured = {name: values for name, values in rows.items() if any(value is not None for value in values)}
    lines = [f"| {name} | {' | '.join(map(number, values))} |" for name, values in measured.items()]
    head = "| | " + " | ".join(f"step {k}" for k in shown) + " |\n" + "|---" * (len(shown) + 1) + "|"
    return "\n".join(["## Numbers\n", head, *lines, "", ABOUT_NUMBERS])
