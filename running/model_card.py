"""The README.md beside a run's weights: what the model is, what it is not, its numbers, and how to load it."""

from argparse import Namespace
from pathlib import Path

from evaluate_tofu import number
from models.loading import PRESETS

PROMPTS = {"llama2": "[INST] Who are you? [/INST]", "qa": "Question: Who are you?\\nAnswer:"}
NUMBERS = {"forget quality": lambda m: m["forget_quality"], "model utility": lambda m: m["model_utility"],
           "forget KL to the start": lambda m: m["forget_kl"],
           **{f"{name.replace('_', ' ')} {measure.replace('_', ' ')}": lambda m, n=name, k=measure: m.get(n, {}).get(k)
              for name in ("forget", "retain", "real_authors", "world_facts")
              for measure in ("probability", "rouge_l_recall", "truth_ratio")}}


def model_card(s: Namespace, config: dict, evaluations: dict, step: int) -> str:
    """Markdown with YAML front matter, for the weights after `step`. `evaluations`: step -> metrics.

    No path of this machine is in it: data and start are named as far as others can know them.
    """
    unlearned = s.loss != "sft"
    base = s.start if s.start in {name for p in PRESETS.values() for name in (p.base, p.finetuned)} - {""} else None
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", *([f"base_model: {base}"] if base
             else []), "tags:", "- machine-unlearning" if unlearned else "- fine-tuned", f"- {s.loss}", "---"]
    data = s.data if s.data == "builtin" or s.data.count("/") == 1 and not Path(s.data).exists() else \
        ", ".join(Path(part).name for part in s.data.split(", "))
    if unlearned:
        about = (f"A causal language model after unlearning `{s.split}` of `{data}` with {s.method} "
                 "(Negative Preference Optimization and its baselines, Zhang, Lin, Bai, Mei, 2024).")
        limits = ("A research artefact. The answers of the forget rows were made unlikely; that is no proof that what "
                  "they say is gone from the weights, and further training or another wording may bring it back. "
                  "What was kept was measured on the sets below and nowhere else.")
    else:
        about = (f"A causal language model fine-tuned on `{s.split}` of `{data}`: a starting point or a yardstick for "
                 "unlearning.")
        limits = "A research artefact: it was trained to repeat the answers of this data set, and measured on it alone."
    settings = {"loss weights (forget / retain / K)": f"{s.forget_weight:g} / {s.retain_weight:g} / {s.kl_weight:g}",
                "beta": f"{s.beta:g}", "peak lr": f"{s.lr:g}", "epochs": s.epochs, "global batch": s.batch_size,
                "warm-up epochs": f"{s.warmup_epochs:g}", "weight decay": f"{s.weight_decay:g}",
                "gradient clipping": f"{s.max_grad_norm:g}" if s.max_grad_norm else "off", "precision": s.dtype,
                "prompt template": s.template, "seed": s.seed, "step": f"{step} of {config['derived']['steps']}",
                "start's weights": config.get("start_weights"), "data fingerprint": config["data_fingerprint"],
                "commit": config["commit"]}
    return "\n".join([*front, f"# {s.method} on {s.split}", "", about, "", limits, "", *_numbers(evaluations, step),
                      "## Settings", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in settings.items()), "",
                      "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
                      'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
                      'model = AutoModelForCausalLM.from_pretrained("FOLDER")', *_prompt(s.template),
                      "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=False)[0]))",
                      "```", "", "Other prompts than the template it was trained with were not measured.", ""])


def _numbers(evaluations: dict, step: int) -> list:
    """A table of the start, where it was evaluated, and of the last evaluation up to `step`."""
    shown = sorted({min(evaluations), max(k for k in evaluations if k <= step)}) if evaluations else []
    if not shown:
        return ["It was not evaluated.", ""]
    rows = [[number(of(evaluations[k])) for k in shown] for of in NUMBERS.values()]
    return ["## Numbers", "", "| | " + " | ".join(f"step {k}" for k in shown) + " |", "|---" * (len(shown) + 1) + "|",
            *(f"| {name} | {' | '.join(cells)} |" for name, cells in zip(NUMBERS, rows) if set(cells) != {"-"}), "",
            "Forget quality: p-value of a test against a model that never saw the forget rows (-: not measured). "
            "Measured by `evaluate_tofu.py`; the definitions are TOFU's.", ""]


def _prompt(template: str) -> list:
    if template == "chat":
        return ['messages = [{"role": "user", "content": "Who are you?"}]',
                "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,",
                '                                       return_tensors="pt")']
    return [f'inputs = tokenizer("{PROMPTS[template]}", return_tensors="pt")']
