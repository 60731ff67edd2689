"""What a training run leaves, and what happens around its steps: evaluations, checkpoints, the log, signals.

    config.json  log.jsonl  eval/step_000013.json  checkpoints/  reference/  model/  trajectory.png
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
from tqdm import tqdm

from data.tofu import evaluation_split
from evaluation.logs import log_truth_ratio
from evaluation.scoring import evaluate
from models.answers import AnswerModel
from models.presets import autocast, settings_of
from models.saving import save_model
from running import checkpoints
from running.job import Job
from running.pages import draw_trajectory, model_card
from running.processes import peak_memory
from running.reference import Reference
from support.command_line import number
from support.errors import InputError
from support.files import whole_folder, write_json
from support.provenance import environment
from support.world import World

SHOWN_EVERY = 50  # of fine-tuning's thousands of steps, on the terminal


class Stopped(Exception):
    """A signal asked for the end: the step was finished and saved."""


def open_folder(s: Namespace, config: dict, world: World) -> Path:
    """The run folder, which appears with its config.json in one rename."""
    if s.resume:
        return Path(s.resume)
    name, k = f"runs/{s.method}_{s.split}", 1
    folder = Path(s.out or name)
    while not s.out and folder.exists():
        k += 1
        folder = Path(f"{name}-{k}")
    folder = world.agree(folder)
    if world.rank == 0:
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            write_json(aside / "config.json", config)
            os.rename(aside, folder)
        except OSError:
            if folder.exists():
                raise InputError(f"{folder} is of another command by now: choose another --out") from None
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # nothing is left of it after the rename
    world.wait()
    return folder


class RunFolder:
    """A run's folder while the run goes on. metrics_of: (rows, the retrained model's forget rows, its holdout
    rows) -> metrics."""

    def __init__(self, job: Job, reference: Reference | None, metrics_of: Callable, world: World):
        self.job, self.s, self.folder, self.plan = job, job.settings, job.folder, job.plan
        self.reference, self.mark, self.world = reference, job.mark(), world
        self.metrics_of = metrics_of
        self.evaluations = {}  # step -> metrics
        self.evaluation_steps = self.plan.evaluation_steps(self.s.eval_every)
        every = self.s.checkpoint_every
        self.checkpoint_steps = self.plan.evaluation_steps(every) - {0}
        self.interval = 60 * float(every[:-1]) if every.endswith("m") else math.inf
        self.saved_at, self.stop_asked = time.monotonic(), False
        self.log_file = self.folder / "log.jsonl"
        hidden = int(os.environ.get("RANK", 0)) > 0 or not sys.stderr.isatty()  # one a terminal
        self.bar = tqdm(total=self.plan.steps, desc=f"{self.s.method} {self.s.split}", disable=hidden)

    # ---- signals

    def __enter__(self):
        self.handlers = {which: signal.signal(which, self.ask_to_stop)
                         for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        self.bar.close()
        for which, handler in self.handlers.items():
            signal.signal(which, handler)

    def ask_to_stop(self, which, frame):
        self.stop_asked = True

    # ---- checkpoints

    @property
    def save_due(self) -> bool:
        """Process 0 says when a checkpoint's time has come."""
        return self.world.rank == 0 and time.monotonic() - self.saved_at > self.interval

    def restore(self, model: AnswerModel, optimizer, scaler) -> int:
        """The step to go on from: the newest whole checkpoint's, to which the log is cut, else 0. Process 0
        looks, and all do as it says: a file that one can't read must not part them."""
        first, kept = self.world.rank == 0, self.folder / "checkpoints"
        path, passed_over = self.world.agree(checkpoints.latest(kept) if first else None)
        for sentence in passed_over:
            self.world.say(sentence)
        state = {"step": 0, "log_bytes": 0}
        if path:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if state.get("run") != self.mark:
                raise InputError(f"{path} was written by another run, or by an earlier version; move it "
                                 "away, or start a new run")
            checkpoints.load(path, model.lm, optimizer)
            scaler.load_state_dict(state["scaler"])
            self.world.say(f"resumed after step {state['step']} of {self.plan.steps} from {path}")
        if first:
            for path in sorted((self.folder / "eval").glob(f"step_{'[0-9]' * 6}.json")):
                step = int(path.stem.removeprefix("step_"))
                if step <= state["step"]:
                    self.evaluations[step] = json.loads(path.read_text(encoding="utf-8"))["metrics"]
                else:
                    path.unlink()
            with open(self.log_file, "ab") as file:
                file.truncate(min(file.tell(), state["log_bytes"]))  # a machine's crash may cost it lines
        self.evaluations = self.world.agree(self.evaluations)
        self.bar.update(state["step"])
        return state["step"]

    def checkpoint(self, step: int, model: AnswerModel, optimizer, scaler):
        """Save what resume needs. Raises OSError where it can't be written."""
        self.saved_at = time.monotonic()
        if self.world.rank == 0 and self.log_file.exists():
            checkpoints.fsync(self.log_file)
        state = {"run": self.mark, "scaler": scaler.state_dict(),
                 "log_bytes": self.log_file.stat().st_size if self.log_file.exists() else 0}
        checkpoints.save(self.folder / "checkpoints", step, model.lm, optimizer, state, self.world)

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
        """The whole evaluation, written to eval/; with `--keep best` the weights of the best so far, too."""
        begin = time.perf_counter()
        with autocast(self.s.dtype, self.world.device):
            rows = evaluate(model, self.job.prepared, self.job.tokenizer, world=self.world,
                            batch_size=settings_of(self.s.preset).eval_batch_size,
                            reference=self.reference and self.reference.evaluation())
        metrics = self.evaluations[step] = self.metrics_of(rows, *self.job.retrained)
        if self.world.rank == 0:
            # Before its first step the model is the start.
            meta = self.job.meta() if step > 0 else self.job.start_record
            provenance = {"run": self.folder.name, "step": step, "trained_on": meta.get("trained_on", {}),
                          "split": evaluation_split(self.job.task.split), "data": self.s.data,
                          "data_fingerprint": self.job.task.fingerprint, "template": self.s.template,
                          "dtype": self.s.dtype, **environment()}
            content = {"metrics": metrics, "rows": rows, "provenance": provenance}
            write_json(self.evaluation_file(step), content)
        if self.s.keep == "best" and step > 0 and best_step(self.evaluations) == step:
            self.save_aside(model.lm, "best", step)
        self.world.say(f"step {step:5d}/{self.plan.steps}  evaluation: {told(metrics)}  "
                       f"({time.perf_counter() - begin:.1f} s)")

    def evaluation_file(self, step: int) -> Path:
        return self.folder / "eval" / f"step_{step:06d}.json"

    # ---- the end

    def save_aside(self, lm, name: str, step: int):
        """The model with its card in folder/NAME, whole or not at all. Raises OSError without room."""
        with whole_folder(self.folder / name, self.world) as aside:
            save_model(lm, self.job.tokenizer, aside, self.job.meta(), self.world)
            if self.world.rank == 0:
                card = model_card(self.s, self.job.config, self.evaluations, step)
                (aside / "README.md").write_text(card, encoding="utf-8")

    def finish(self, model: AnswerModel, seconds: float):
        """The result in model/, the picture, and what a reader wants to see first."""
        evaluations = self.evaluations
        self.save_aside(model.lm, "model", self.plan.steps)
        self.world.say(f"{self.folder / 'model'}: written after {seconds:.0f} s")
        if self.world.rank > 0 or len(evaluations) < 2:
            return
        start, last = min(evaluations), max(evaluations)
        for name, step in {"start": start, "best": best_step(evaluations), "last": last}.items():
            self.world.say(f"{name:6}step {step:5d}  {told(evaluations[step])}")
        before, after = (json.loads(self.evaluation_file(step).read_text(encoding="utf-8"))["rows"]
                         for step in (start, last))
        forget_rows = {"start": before["forget"], "retrained": self.job.retrained[0],
                       "unlearned": after["forget"]}
        samples = {name: list(map(log_truth_ratio, rows or [])) for name, rows in forget_rows.items()}
        log = [json.loads(line) for line in self.log_file.read_text(encoding="utf-8").splitlines()]
        draw_trajectory(self.s.method, evaluations, log, samples).savefig(self.folder / "trajectory.png")
        for name in ("forget", "retain"):
            row, later = before[name][0], after[name][0]
            self.world.say(f"\n{name} question: {row['question']}\n  true:   {row['answer']}\n  before: "
                           f"{row['generation']}\n  after:  {later['generation']}")
        self.world.say(f"\npicture {self.folder / 'trajectory.png'}")


def told(metrics: dict) -> str:
    """What a reader wants to see first, in a line."""
    shown = {"forget quality": metrics["forget_quality"], "model utility": metrics["model_utility"],
             "forget probability": metrics["forget"]["probability"],
             "retain probability": metrics["retain"]["probability"]}
    return "  ".join(f"{name} {number(value)}" for name, value in shown.items())


def best_step(evaluations: dict) -> int:
    """The step after the start with the best forget quality, or where that was not measured, the largest
    retain less forget probability; the first of equals."""
    later = {step: m for step, m in evaluations.items() if step > 0}
    merits = {step: m["forget_quality_log10"] for step, m in later.items()}
    if None in merits.values():
        merits = {step: m["retain"]["probability"] - m["forget"]["probability"] for step, m in later.items()}
    return max(merits, key=merits.get)
