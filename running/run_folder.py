"""What happens around a training run's steps: its folder, evaluations, checkpoints, log, signals, picture
and last words.

    config.json  log.jsonl  eval/step_000013.json  checkpoints/  reference/  model/  trajectory.png

Process 0 writes every file, aside first and then renamed; only `reference/` has a file a process.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from data.tofu import evaluation_split
from evaluate_tofu import compute_metrics, evaluate, number
from models.loading import PRESETS, AnswerModel, autocast, save_model
from running import checkpoints
from running.model_card import model_card
from running.processes import World, peak_memory
from running.reference import Reference
from support.errors import InputError
from support.files import write_json
from support.provenance import environment


class Stopped(Exception):
    """A signal asked for the end: the step was finished and saved."""


def open_folder(s: Namespace, config: dict, w: World) -> Path:
    """The run folder, which appears with its config.json in one rename. Raises InputError where it
    exists or can't be written."""
    if s.resume:
        return Path(s.resume)
    made = next((path for path in folder_names(s) if _appear(path, config)), None) if w.rank == 0 else None
    return w.agree(made) or _exists(s.out)


def folder_names(s: Namespace) -> list[Path]:
    """What a run's folder may be called, in order: `--out`, or its method and split with a number."""
    name = f"{s.method}_{s.split}"
    return [Path(s.out)] if s.out else [Path("runs") / f"{name}{f'-{k}' if k > 1 else ''}" for k in range(1, 10_000)]


def _appear(folder: Path, config: dict) -> bool:
    """Make `folder` with its config.json, in one rename; False where it exists."""
    if folder.exists():
        return False
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        write_json(aside / "config.json", config)
        os.rename(aside, folder)
    except InputError:  # no room
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except OSError:  # another run took the name in this instant
        shutil.rmtree(aside)
        if not folder.exists():
            raise
        return False
    return True


def _exists(out: str):
    raise InputError(f"--out {out} exists: choose another folder, or go on with --resume {out}")


class Run:
    """What happens around the steps: evaluations, checkpoints, the log, and signals. Process 0 writes every file."""

    def __init__(self, s: Namespace, folder: Path, plan, prepared, retain_rows: list | None, tokenizer,
                 reference: Reference | None, meta: dict, w: World):
        self.s, self.folder, self.plan, self.prepared, self.retain_rows = s, folder, plan, prepared, retain_rows
        self.tokenizer, self.reference, self.meta, self.w = tokenizer, reference, meta, w
        self.start_rows = None  # the start's evaluation, where another run has made it
        self.evaluation_steps = plan.evaluation_steps(s.eval_every)
        every = s.checkpoint_every
        self.checkpoint_steps, self.interval = set(), math.inf
        if every == "epoch":
            self.checkpoint_steps = set(plan.epoch_ends)
        elif every.endswith("m"):
            self.interval = 60 * float(every[:-1])
        else:
            self.checkpoint_steps = set(range(0, plan.steps, int(every)))
        self.saved_at, self.stopped, self.wants_stop, self.saving = time.monotonic(), False, False, False
        self.log_file = folder / "log.jsonl"
        self.bar = tqdm(total=plan.steps, desc=f"{s.method} {s.split}", unit="step",
                        disable=w.rank > 0 or not sys.stderr.isatty())

    def __enter__(self):
        self.handlers = {number_: signal.signal(number_, self._on_signal)
                         for number_ in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        self.bar.close()
        for number_, handler in self.handlers.items():
            signal.signal(number_, handler)

    def _on_signal(self, number_, frame):
        # torchrun passes a Ctrl-C on that the terminal has sent us already: only a later one means "at once".
        if self.wants_stop and time.monotonic() - self.asked_at > 3 and not self.saving:
            raise KeyboardInterrupt
        if not self.wants_stop:
            self.wants_stop, self.asked_at = True, time.monotonic()

    @property
    def wants_checkpoint(self) -> bool:
        return time.monotonic() - self.saved_at > self.interval

    def restore(self, model: AnswerModel, optimizer, scaler) -> int:
        """Go back to the newest whole checkpoint and cut the log to where it was; the step to go on from, 0 where there
        is none."""
        path, passed_over = checkpoints.latest(self.folder / "checkpoints")
        for sentence in passed_over:
            self.w.say(sentence)
        state = checkpoints.load(path, model.lm, optimizer) if path else {"step": 0, "log_bytes": 0, "scaler": {}}
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if self.w.rank == 0:
            with open(self.log_file, "ab") as file:
                file.truncate(state["log_bytes"])
            for later in (self.folder / "eval").glob("step_*.json"):
                if int(later.stem[5:]) > state["step"]:
                    later.unlink()
        if path:
            self.w.say(f"resumed after step {state['step']} of {self.plan.steps} from {path}")
        self.bar.update(state["step"])
        return state["step"]

    def checkpoint(self, step: int, model: AnswerModel, optimizer, scaler, kept: int = checkpoints.KEPT):
        """Save what resume needs; all processes wait until it is there. Raises InputError where there is no room or no
        right to write."""
        self.saved_at, self.saving = time.monotonic(), True
        state = {"log_bytes": self.log_file.stat().st_size if self.log_file.exists() else 0,
                 "scaler": scaler.state_dict()}
        try:
            checkpoints.save(self.folder / "checkpoints", step, model.lm, optimizer, state, self.w, kept)
        except OSError as error:
            raise InputError(f"step {step}: cannot write a checkpoint in {self.folder} ({error.strerror or error}); "
                             f"make room, then --resume {self.folder}") from None
        self.w.wait()
        self.saving = False

    def log(self, step: int, lr: float, parts: dict, grad_norm: float, tokens_per_s: float):
        """One JSON line, and one aligned line on the terminal (fine-tuning, with its thousands of
        steps, shows every 50th)."""
        epoch = step * self.s.batch_size / self.plan.rows
        if self.w.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = peak_memory()
        line = {"step": step, "epoch": round(min(epoch, self.s.epochs), 4), "lr": lr, **parts, "grad_norm": grad_norm,
                "tokens_per_s": round(tokens_per_s), "memory": memory}
        self.bar.update(1)
        if self.w.rank == 0:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.s.loss != "sft" or step % 50 == 0 or step == self.plan.steps:
            shown = "".join(f"  {name} {parts[name]:10.4f}" for name in parts)
            self.w.say(f"step {step:5d}/{self.plan.steps}  epoch {line['epoch']:6.2f}  lr {lr:.2e}{shown}"
                       f"  grad {grad_norm:9.3f}  {tokens_per_s:8.0f} tok/s  {memory / 2**20:6.0f} MB")

    def evaluate(self, step: int, model: AnswerModel):
        """The whole evaluation, written to eval/; with `--keep best`, the weights too where it is the best so far."""
        begin = time.perf_counter()
        rows = self.start_rows if step == 0 else None
        if rows is None:
            rows = self.measured_rows(model)
        metrics = compute_metrics(rows, self.retain_rows)
        if self.w.rank == 0:
            write_json(self.folder / "eval" / f"step_{step:06d}.json",
                       {"metrics": metrics, "rows": rows, "provenance": self.provenance(step)})
        if self.s.keep == "best" and step > 0:
            evaluations = self.evaluations() if self.w.rank == 0 else {}
            if self.w.agree(self.w.rank == 0 and best_step(evaluations, self.s.best_by) == step):
                save_aside(model.lm, self.tokenizer, self.folder / "best", self.meta, self.w,
                           self.card(evaluations, step))
        self.w.say(f"step {step:5d}/{self.plan.steps}  evaluation: forget quality {number(metrics['forget_quality'])}"
                   f"  model utility {number(metrics['model_utility'])}"
                   f"  forget probability {number(metrics['forget']['probability'])}"
                   f"  retain probability {number(metrics['retain']['probability'])}"
                   f"  ({time.perf_counter() - begin:.1f} s)")

    def measured_rows(self, model: AnswerModel) -> dict:
        """set -> row results of the model as it is now."""
        batch_size = PRESETS[self.s.preset or "llama2-7b"].eval_batch_size
        with autocast(self.s.dtype, self.w.device):
            return evaluate(model, self.prepared, self.tokenizer, batch_size=batch_size, w=self.w,
                            reference=self.reference and self.reference.evaluation(),
                            reference_head=self.reference and self.reference.head_weight)

    def evaluations(self) -> dict:
        """step -> metrics of the evaluations so far."""
        files = sorted((self.folder / "eval").glob("step_*.json"))
        return {int(p.stem[5:]): json.loads(p.read_text())["metrics"] for p in files}

    def provenance(self, step: int) -> dict:
        return {"run": self.folder.name, "step": step, "trained_on": self.meta["trained_on"],
                "split": "own" if self.s.forget else evaluation_split(self.s.split), "data": self.s.data,
                "data_fingerprint": self.meta["trained_on"]["data_fingerprint"], "template": self.s.template,
                "dtype": self.s.dtype, **environment()}

    def card(self, evaluations: dict, step: int) -> str:
        return model_card(self.s, json.loads((self.folder / "config.json").read_text()), evaluations, step)

    def finish(self, model: AnswerModel, seconds: float):
        """The result in model/, the picture, and what a reader wants to see first."""
        card = self.card(self.evaluations(), self.plan.steps)
        save_aside(model.lm, self.tokenizer, self.folder / "model", self.meta, self.w, card)
        self.w.wait()  # whoever goes on may read it
        evaluations = self.evaluations()
        if self.w.rank > 0 or len(evaluations) < 2:
            self.w.say(f"{self.folder / 'model'}: written after {seconds:.0f} s")
            return
        plot_trajectory(evaluations, self.s.method, self.folder / "trajectory.png")
        start, best, last = min(evaluations), best_step(evaluations, self.s.best_by), max(evaluations)
        self.w.say(f"\n{'':16}{'forget quality':>15}{'model utility':>15}{'forget prob':>13}{'retain prob':>13}"
                   f"{'forget ROUGE':>14}{'retain ROUGE':>14}")
        for name, step in (("start", start), ("best", best), ("last", last)):
            m = evaluations[step]
            cells = [m["forget_quality"], m["model_utility"], m["forget"]["probability"], m["retain"]["probability"],
                     m["forget"]["rouge_l_recall"], m["retain"]["rouge_l_recall"]]
            widths = (15, 15, 13, 13, 14, 14)
            self.w.say(f"{name:6}step {step:<5}" + "".join(f"{number(c):>{width}}" for c, width in zip(cells, widths)))
        before, after = (json.loads((self.folder / "eval" / f"step_{step:06d}.json").read_text())["rows"]
                         for step in (start, last))
        for name in ("forget", "retain"):
            middle = len(before[name]) // 2
            row = before[name][middle]
            self.w.say(f"\n{name} question: {row['question']}\n  true:   {row['answer']}\n"
                       f"  before: {row['generation']}\n  after:  {after[name][middle]['generation']}")
        self.w.say(f"\n{seconds:.0f} s; model {self.folder / 'model'}, evaluations {self.folder / 'eval'}, "
                   f"picture {self.folder / 'trajectory.png'}")


# What "best" may mean; the first needs a retrained model's log, the second no further model, the third TOFU's sets.
BEST_BY = {"forget-quality": lambda m: m["forget_quality_log10"],
           "retain-minus-forget": lambda m: m["retain"]["probability"] - m["forget"]["probability"],
           "model-utility": lambda m: m["model_utility"]}


def best_step(evaluations: dict, by: str | None = None) -> int:
    """The step after the start with the largest value of BEST_BY[by], the first of equals. Without `by`: forget quality
    where it was measured, else retain less forget probability."""
    measured = all(m["forget_quality_log10"] is not None for m in evaluations.values())
    merit = BEST_BY[by or ("forget-quality" if measured else "retain-minus-forget")]
    return max((step for step in evaluations if step > 0), key=lambda step: merit(evaluations[step]))


def save_aside(lm, tokenizer, folder: Path, meta: dict, w: World, card: str):
    """`save_model` and the card as README.md, but the folder appears whole or not at all. Raises InputError where there
    is no room."""
    aside = folder.with_name(f".{folder.name}.partial")
    if w.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    try:
        save_model(lm, tokenizer, aside, meta, w)
        if w.rank == 0:
            (aside / "README.md").write_text(card, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}; make room, then "
                         f"--resume {folder.parent}") from None


def plot_trajectory(evaluations: dict, method: str, path: Path):
    """Forget quality (log scale, the 0.05 line) and model utility with the two probabilities, over steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    steps = sorted(evaluations)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    curve = lambda pick: [math.nan if pick(evaluations[k]) is None else pick(evaluations[k]) for k in steps]
    left.plot(steps, curve(lambda m: m["forget_quality_log10"]), "o-", color="black")
    left.axhline(math.log10(0.05), color="tab:red", linestyle="--", label="0.05")
    left.set(xlabel="step", ylabel="log10 forget quality", title=f"{method}: forget quality")
    right.plot(steps, curve(lambda m: m["model_utility"]), "o-", color="black", label="model utility")
    right.plot(steps, curve(lambda m: m["forget"]["probability"]), "s--", color="tab:red", label="forget probability")
    right.plot(steps, curve(lambda m: m["retain"]["probability"]), "^:", color="tab:blue", label="retain probability")
    right.set(xlabel="step", ylim=(-0.02, 1.02), title="what is kept and what is lost")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
