"""What a training run leaves, and what happens around its steps: evaluations, checkpoints, the log, signals.

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
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from evaluation.scoring import evaluate
from models.answers import AnswerModel
from models.presets import autocast, settings_of
from models.saving import save_model
from running import checkpoints
from running.model_card import model_card
from running.processes import peak_memory
from support.command_line import number
from support.errors import InputError
from support.files import write_json
from support.provenance import environment
from support.world import World

SHOWN_EVERY = 50  # of fine-tuning's thousands of steps, on the terminal


class Stopped(Exception):
    """A signal asked for the end: the step was finished and saved."""


def open_folder(s: Namespace, config: dict, world: World) -> Path:
    """The run folder, which appears with its config.json in one rename. Raises InputError where it exists or
    can't be written."""
    if s.resume:
        return Path(s.resume)
    made = None
    if world.rank == 0:
        made = next((path for path in folder_names(s) if appears(path, config)), None)
    made = world.agree(made)
    if made is None:
        raise InputError(f"--out {s.out} exists: choose another folder, or go on with --resume {s.out}")
    return made


def folder_names(s: Namespace) -> list[Path]:
    """What a run's folder may be called, in order: `--out`, or its method and split with a number."""
    name = f"{s.method}_{s.split}"
    return [Path(s.out)] if s.out else [Path("runs", f"{name}-{k}" if k > 1 else name)
                                        for k in range(1, 10_000)]


def appears(folder: Path, config: dict) -> bool:
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


class RunFolder:
    """A run's folder while the run goes on. `metrics_of`: rows, the retrained model's forget and
    holdout rows -> metrics."""

    def __init__(self, job, reference, meta: dict, metrics_of: Callable, world: World):
        self.job, self.s, self.folder, self.plan = job, job.settings, job.folder, job.plan
        self.reference, self.meta, self.metrics_of, self.world = reference, meta, metrics_of, world
        self.mark = job.run_mark()
        self.start_rows = None  # the start's evaluation, where another run has made it
        self.evaluation_steps = self.plan.evaluation_steps(self.s.eval_every)
        every = self.s.checkpoint_every
        self.checkpoint_steps, self.interval = set(), math.inf
        if every == "epoch":
            self.checkpoint_steps = set(self.plan.epoch_ends)
        elif every.endswith("m"):
            self.interval = 60 * float(every[:-1])
        else:
            self.checkpoint_steps = set(range(0, self.plan.steps, int(every)))
        self.saved_at, self.stop_asked, self.saving = time.monotonic(), False, False
        self.log_file = self.folder / "log.jsonl"
        self.bar = tqdm(total=self.plan.steps, desc=f"{self.s.method} {self.s.split}", unit="step",
                        disable=int(os.environ.get("RANK", 0)) > 0
                        or not sys.stderr.isatty())  # one a terminal

    # ---- signals

    def __enter__(self):
        self.handlers = {which: signal.signal(which, self.on_signal)
                         for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        self.bar.close()
        for which, handler in self.handlers.items():
            signal.signal(which, handler)

    def on_signal(self, which, frame):
        # torchrun passes a Ctrl-C on that the terminal has sent us already: only a later one means "at once".
        if self.stop_asked and time.monotonic() - self.asked_at > 3 and not self.saving:
            raise KeyboardInterrupt
        if not self.stop_asked:
            self.stop_asked, self.asked_at = True, time.monotonic()

    # ---- checkpoints

    @property
    def save_due(self) -> bool:
        """Process 0 says when a checkpoint's time has come."""
        return self.world.rank == 0 and time.monotonic() - self.saved_at > self.interval

    def restore(self, model: AnswerModel, optimizer, scaler) -> int:
        """Go back to the newest whole checkpoint and cut the log to where it was; the step to go on from, 0
        where there is none."""
        path, passed_over = checkpoints.latest(self.folder / "checkpoints")
        for sentence in passed_over:
            self.world.say(sentence)
        state = {"step": 0, "log_bytes": 0, "scaler": {}}
        if path:
            state = checkpoints.load(path, model.lm, optimizer)
            if state.get("run") != self.mark or state["step"] > self.plan.steps:
                raise InputError(f"{path} was written by another run, or by an earlier version; move it "
                                 "away, or start a new run")
            self.world.say(f"resumed after step {state['step']} of {self.plan.steps} from {path}")
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if self.world.rank == 0:
            with open(self.log_file, "ab") as file:
                file.truncate(state["log_bytes"])
            for step, later in self.evaluation_files().items():
                if step > state["step"]:
                    later.unlink()
        self.bar.update(state["step"])
        return state["step"]

    def checkpoint(self, step: int, model: AnswerModel, optimizer, scaler, kept: int = checkpoints.KEPT):
        """Save what resume needs; all processes wait until it is there. Raises InputError where there is no
        room or no right to write."""
        self.saved_at, self.saving = time.monotonic(), True
        state = {"run": self.mark, "scaler": scaler.state_dict(),
                 "log_bytes": self.log_file.stat().st_size if self.log_file.exists() else 0}
        try:
            checkpoints.save(self.folder / "checkpoints", step, model.lm, optimizer, state, self.world, kept)
        except OSError as error:
            raise InputError(f"step {step}: cannot write a checkpoint in {self.folder} "
                             f"({error.strerror or error}); make room, then --resume {self.folder}") from None
        self.world.wait()
        self.saving = False

    # ---- the log, evaluations

    def log(self, step: int, lr: float, parts: dict, grad_norm: float, tokens_per_s: float):
        """One JSON line, and one aligned line on the terminal."""
        epoch = min(step * self.s.batch_size / self.plan.rows, self.s.epochs)
        cuda = self.world.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else peak_memory()
        line = {"step": step, "epoch": round(epoch, 4), "lr": lr, **parts, "grad_norm": grad_norm,
                "tokens_per_s": round(tokens_per_s), "memory": memory}
        self.bar.update(1)
        if self.world.rank == 0:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.s.loss != "sft" or step % SHOWN_EVERY == 0 or step == self.plan.steps:
            shown = "".join(f"  {name} {parts[name]:10.4f}" for name in parts)
            what = f"{self.s.split} " if self.s.loss == "sft" else ""  # two may be trained side by side
            self.world.say(f"{what}step {step:5d}/{self.plan.steps}  epoch {epoch:6.2f}  lr {lr:.2e}{shown}  "
                           f"grad {grad_norm:9.3f}  {tokens_per_s:8.0f} tok/s  {memory / 2**20:6.0f} MB")

    def evaluate(self, step: int, model: AnswerModel):
        """The whole evaluation, written to eval/; with `--keep best`, the weights too where it is the best so
        far."""
        begin = time.perf_counter()
        rows = self.start_rows if step == 0 else None
        if rows is None:
            rows = self.measured_rows(model)
        metrics = self.metrics_of(rows, self.job.retrained_rows, self.job.retrained_holdout)
        if self.world.rank == 0:
            write_json(self.evaluation_file(step),
                       {"metrics": metrics, "rows": rows, "provenance": self.provenance(step)})
        if self.s.keep == "best" and step > 0:
            evaluations = self.evaluations() if self.world.rank == 0 else {}
            if self.world.agree(self.world.rank == 0 and best_step(evaluations, self.s.best_by) == step):
                self.save_aside(model.lm, "best", evaluations, step)
        self.world.say(f"step {step:5d}/{self.plan.steps}  evaluation: forget quality "
                       f"{number(metrics['forget_quality'])}  model utility "
                       f"{number(metrics['model_utility'])}  forget probability "
                       f"{number(metrics['forget']['probability'])}  retain probability "
                       f"{number(metrics['retain']['probability'])}  ({time.perf_counter() - begin:.1f} s)")

    def measured_rows(self, model: AnswerModel) -> dict:
        """set -> row results of the model as it is now."""
        with autocast(self.s.dtype, self.world.device):
            return evaluate(model, self.job.prepared, self.job.tokenizer, world=self.world,
                            batch_size=settings_of(self.s.preset).eval_batch_size,
                            reference=self.reference and self.reference.evaluation())

    def evaluation_file(self, step: int) -> Path:
        return self.folder / "eval" / f"step_{step:06d}.json"

    def evaluation_files(self) -> dict:
        """step -> file of the evaluations so far. Raises InputError for a file with another name."""
        files = {}
        for path in sorted((self.folder / "eval").glob("step_*.json")):
            if not path.stem[5:].isdigit():
                raise InputError(f"{path} is no evaluation of this run: need step_NUMBER.json; move it away")
            files[int(path.stem[5:])] = path
        return files

    def evaluations(self) -> dict:
        """step -> metrics of the evaluations so far."""
        return {step: json.loads(path.read_text())["metrics"] for step,
                path in self.evaluation_files().items()}

    def provenance(self, step: int) -> dict:
        return {"run": self.folder.name, "step": step, "trained_on": self.meta["trained_on"],
                "split": self.job.task.judged_split, "data": self.s.data,
                "data_fingerprint": self.meta["trained_on"]["data_fingerprint"], "template": self.s.template,
                "dtype": self.s.dtype, **environment()}

    # ---- the end

    def save_aside(self, lm, name: str, evaluations: dict, step: int):
        """The model with its card in folder/NAME, which appears whole or not at all. Raises InputError where
        there is no room."""
        target = self.folder / name
        aside = self.folder / f".{name}.partial"
        if self.world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        try:
            save_model(lm, self.job.tokenizer, aside, self.meta, self.world)
            if self.world.rank == 0:
                config = json.loads((self.folder / "config.json").read_text())
                (aside / "README.md").write_text(model_card(self.s, config, evaluations, step),
                                                 encoding="utf-8")
                shutil.rmtree(target, ignore_errors=True)
                os.replace(aside, target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise InputError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}; make "
                             f"room, then --resume {self.folder}") from None

    def finish(self, model: AnswerModel, seconds: float):
        """The result in model/, the picture, and what a reader wants to see first."""
        evaluations = self.evaluations()
        self.save_aside(model.lm, "model", evaluations, self.plan.steps)
        self.world.wait()  # whoever goes on may read it
        if self.world.rank > 0 or len(evaluations) < 2:
            self.world.say(f"{self.folder / 'model'}: written after {seconds:.0f} s")
            return
        plot_trajectory(evaluations, self.s.method, self.folder / "trajectory.png")
        start, best, last = min(evaluations), best_step(evaluations, self.s.best_by), max(evaluations)
        self.world.say(summary(evaluations, {"start": start, "best": best, "last": last}))
        before, after = (json.loads(self.evaluation_file(step).read_text())["rows"] for step in (start, last))
        for name in ("forget", "retain"):
            middle = len(before[name]) // 2
            row = before[name][middle]
            self.world.say(f"\n{name} question: {row['question']}\n  true:   {row['answer']}\n  before: "
                           f"{row['generation']}\n  after:  {after[name][middle]['generation']}")
        self.world.say(f"\n{seconds:.0f} s; model {self.folder / 'model'}, evaluations "
                       f"{self.folder / 'eval'}, picture {self.folder / 'trajectory.png'}")


def summary(evaluations: dict, steps: dict) -> str:
    """A table of the steps (name -> step)."""
    columns = {"forget quality": 15, "model utility": 15, "forget prob": 13, "retain prob": 13,
               "forget ROUGE": 14, "retain ROUGE": 14}
    lines = [f"\n{'':16}" + "".join(f"{name:>{width}}" for name, width in columns.items())]
    for name, step in steps.items():
        m = evaluations[step]
        cells = [m["forget_quality"], m["model_utility"], m["forget"]["probability"],
                 m["retain"]["probability"], m["forget"]["rouge_l_recall"], m["retain"]["rouge_l_recall"]]
        lines.append(f"{name:6}step {step:<5}" + "".join(f"{number(cell):>{width}}" for cell, width in
                                                         zip(cells, columns.values(), strict=True)))
    return "\n".join(lines)


def retain_minus_forget(metrics: dict) -> float:
    return metrics["retain"]["probability"] - metrics["forget"]["probability"]


# What "best" may mean; the first needs a retrained model's log, the second no further model, the third TOFU's
# sets.
BEST_BY = ("forget-quality", "retain-minus-forget", "model-utility")


def best_step(evaluations: dict, by: str | None = None) -> int:
    """The step after the start that is best by one of BEST_BY, the first of equals. Without `by`: forget
    quality where it was measured, else retain less forget probability."""
    measured = all(m["forget_quality_log10"] is not None for m in evaluations.values())
    by = by or ("forget-quality" if measured else "retain-minus-forget")
    merits = {step: {"forget-quality": m["forget_quality_log10"], "model-utility": m["model_utility"],
                     "retain-minus-forget": retain_minus_forget(m)}[by] for step,
                     m in evaluations.items() if step > 0}
    return max(merits, key=merits.get)


def plot_trajectory(evaluations: dict, method: str, path: Path):
    """Forget quality (log scale, the 0.05 line) and, over steps, model utility, the two probabilities, the
    forget rows' extraction strength and their AUC against the holdout."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    steps = sorted(evaluations)
    curves = {"forget quality": [evaluations[k]["forget_quality_log10"] for k in steps],
              "model utility": [evaluations[k]["model_utility"] for k in steps],
              "forget probability": [evaluations[k]["forget"]["probability"] for k in steps],
              "retain probability": [evaluations[k]["retain"]["probability"] for k in steps],
              "extraction strength": [evaluations[k]["forget"].get("extraction_strength") for k in steps],
              "MIA AUC (min-k)": [evaluations[k].get("mia", {}).get("min_k") for k in steps]}
    curves = {name: [math.nan if value is None else value for value in values] for name,
              values in curves.items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(steps, curves.pop("forget quality"), "o-", color="black")
    left.axhline(math.log10(0.05), color="tab:red", linestyle="--", label="0.05")
    left.set(xlabel="step", ylabel="log10 forget quality", title=f"{method}: forget quality")
    looks = zip(("o-", "s--", "^:", "v--", "D:"), ("black", "tab:red", "tab:blue", "tab:orange", "tab:gray"),
                strict=True)
    for (name, values), (style, color) in zip(curves.items(), looks, strict=True):
        right.plot(steps, values, style, color=color, label=name)
    right.set(xlabel="step", ylim=(-0.02, 1.02), title="what is kept and what is lost")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
