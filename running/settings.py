"""A run's settings: every flag with type, default, unit and one sentence; what a preset adds; refusals."""

import json
import os
import shlex
import shutil
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from data.prompts import TEMPLATES, system_prompt_of
from data.tofu import parse_split
from losses import KL_DIRECTIONS, OBJECTIVES
from models.loading import prompt_template
from models.presets import AUTOCAST, PRESETS, settings_of, split_model, tiny_dims
from models.saving import read_meta
from support.command_line import Parser, given_flags, not_negative, positive
from support.errors import InputError, cause_of, refuse
from support.files import fingerprint

NOT_STORED = ("resume", "dry_run", "gpus", "gpu_memory")  # of no meaning for a run folder


def checkpoint_interval(text: str) -> str:
    if text == "epoch" or (text.endswith("m") and positive(float)(text[:-1])) or positive(int)(text):
        return text


def evaluation_interval(text: str) -> str:
    if text in ("epoch", "step", "never", "end") or positive(int)(text):
        return text


def gigabytes(text: str) -> float:
    """"80G", or 80 (10^9 bytes) -> bytes."""
    return 1e9 * positive(float)(text.rstrip("Gg"))


def build_parser(description: str = "") -> Parser:
    parser = Parser(prog="train_npo.py", description=description)
    add = parser.add_argument_group("objective").add_argument
    add("--loss", default="npo", choices=OBJECTIVES, help="objective on the forget rows; sft fine-tunes")
    add("--split", help="rows to unlearn, forget01 to forget99 (default: forget10); with sft to learn: full "
                        "(default) or retainNN")
    add("--forget-weight", type=not_negative(float), default=1.0, help="weight of the forget loss")
    add("--retain-weight", type=not_negative(float), default=0.0, help="weight of RT, on retain rows (+rt)")
    add("--kl-weight", type=not_negative(float), default=0.0,
        help="weight of K, the divergence from the reference on retain rows (+kl)")
    add("--kl-direction", default="policy_reference", choices=KL_DIRECTIONS,
        help="K's order; policy_reference is the paper's")
    add("--beta", type=positive(float),
        help="inverse temperature (default: the loss's published one, else the preset's)")
    add("--beta2", type=positive(float), help="satimp's power of 1 - p (default: the loss's own)")
    add("--gamma", type=not_negative(float), default=0.0, help="SimNPO's margin")
    add("--retain-pairing", default="stream", choices=("stream", "fixed"),
        help="retain partners: a new one each epoch, or the authors' fixed rule")
    add = parser.add_argument_group("data and model").add_argument
    add("--model", default="tiny",
        help=f"preset ({', '.join(PRESETS)}), folder, Hub id, or PRESET=PATH, a folder or FILE.gguf")
    add("--data", default="builtin",
        help="builtin, a folder with TOFU's files, or a Hub id such as locuslab/TOFU")
    add("--forget", help="own rows to unlearn: JSON or JSON lines with question and answer, in place of "
                         "--data and --split")
    add("--retain", help="own rows to keep, with --forget")
    add("--template", choices=TEMPLATES, help="prompt template (default: the model's own, else the preset's)")
    add("--system-prompt", help="with --template chat: system turn before the question, kept with the model")
    add("--retain-log", help="evaluation log of a model retrained without the forget rows, for forget "
                             "quality (tiny: made on the spot)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive(int), help="passes over the forget rows (default: the preset's)")
    add("--batch-size", type=positive(int), default=32, help="global batch, rows")
    add("--micro-batch-size", type=positive(int),
        help="rows a process runs forward at once; changes memory, not numbers (default: the preset's)")
    add("--lr", type=positive(float), help="peak learning rate (default: the preset's)")
    add("--weight-decay", type=not_negative(float),
        help="AdamW's, not on norm weights and biases (default: the preset's)")
    add("--warmup-epochs", type=not_negative(float),
        help="linear warm-up, epochs, at least 1 step (default: the preset's)")
    add("--max-grad-norm", type=not_negative(float), default=0.0, help="clip the gradient's norm; 0: off")
    add("--seed", type=not_negative(int), default=0,
        help="of batches, partners, refusals, and a new model's weights")
    add("--dtype", default="fp32", choices=AUTOCAST,
        help="autocast precision; weights and AdamW stay float32")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where it runs")
    add("--parallel", default="ddp", choices=("ddp", "fsdp"),
        help="with several processes: each holds the model (ddp), or a part of every parameter (fsdp)")
    add("--activation-checkpointing", action="store_true",
        help="keep only each layer's input for the backward pass: less memory, a forward pass more")
    add("--lora", type=positive(int), metavar="RANK",
        help="train adapters of this rank on every linear layer, and nothing else (needs peft)")
    add("--compile", action="store_true", help="compile each layer (needs a C++ compiler)")
    add = parser.add_argument_group("the run").add_argument
    add("--eval-every", type=evaluation_interval,
        help="epoch, step, a number of steps, end, or never (default: epoch; sft: end)")
    add("--keep", default="last", choices=("last", "best"),
        help="best: also keep, in best/, the weights of the evaluation with the best forget quality or, "
             "without a retain log, the largest retain less forget probability")
    add("--checkpoint-every", type=checkpoint_interval, default="10m",
        help="besides at evaluations: minutes (10m), epoch, or steps")
    add("--out", help="run folder, must not exist (default: runs/METHOD_SPLIT, the next free number)")
    add("--resume", metavar="DIR",
        help="go on with an interrupted run; its settings hold, and flags that differ are refused")
    add("--dry-run", action="store_true",
        help="say what the run will need (steps, tokens, memory by part), and do nothing; loads no weights")
    add("--gpus", type=positive(int),
        help="for --dry-run: processes, one a GPU (default: this command's own number)")
    add("--gpu-memory", type=gigabytes, metavar="80G", help="for --dry-run: memory of one GPU (default: 80G)")
    return parser


def resolve(given: dict, typed: dict | None = None) -> Namespace:
    """Every setting: the parser's defaults, the preset's, the flags. Raises InputError, also where a flag of
    those `typed` (default: all that are given) would change nothing."""
    s = Namespace(**{**vars(build_parser().parse_args([])), **given})
    preset_name, path = split_model(s.model)
    # A folder that one of our runs wrote says which preset it is of.
    s.preset = preset_name or read_meta(s.model).get("preset")
    s.preset = s.preset if s.preset in PRESETS else None
    preset, sft = settings_of(s.preset), s.loss == "sft"
    for key, value in {"split": "full" if sft else "forget10", "beta": preset.beta,
                       "epochs": preset.sft_epochs if sft else preset.epochs,
                       "lr": preset.sft_lr if sft else preset.lr, "warmup_epochs": preset.warmup_epochs,
                       "weight_decay": preset.sft_weight_decay if sft else preset.weight_decay,
                       "micro_batch_size": min(preset.micro_batch_size, s.batch_size),
                       "eval_every": "end" if sft else "epoch", **OBJECTIVES[s.loss].defaults}.items():
        if given.get(key) is None:
            setattr(s, key, value)
    s.method = s.loss + "+rt" * (s.retain_weight > 0) + "+kl" * (s.kl_weight > 0)
    s.start = path or (preset.base if sft else preset.finetuned)  # "": the tiny model, made from scratch
    refuse_contradictions(s, given)
    refuse_without_effect(s, given if typed is None else typed)
    if s.forget:
        s.split, s.data = "own", f"{s.forget}, {s.retain}"
    return s


def refuse_contradictions(s: Namespace, given: dict):
    sft, own, objective = s.loss == "sft", s.forget or s.retain, OBJECTIVES[s.loss]
    tiny = PRESETS["tiny"].template
    unknown = [name for name in objective.settings if getattr(s, name, None) is None]
    refuse({
        f"--loss {s.loss} takes {', '.join(unknown)}: need names of losses.COMPUTED, a flag, or a default":
            unknown,
        f"--loss {s.loss} is a mean over {objective.mean}: need sequences or tokens":
            objective.mean not in ("sequences", "tokens"),
        "--loss sft learns its split, it has no retain or K term: leave out --retain-weight and --kl-weight":
            sft and (s.kl_weight or s.retain_weight),
        "--forget-weight, --retain-weight and --kl-weight are all 0: nothing would be trained; give one":
            s.forget_weight == s.retain_weight == s.kl_weight == 0,
        f"--micro-batch-size {s.micro_batch_size} is above --batch-size {s.batch_size}: need at most the "
        "global batch": s.micro_batch_size > s.batch_size,
        f"--warmup-epochs {s.warmup_epochs:g} is above the {s.epochs} epochs of the run: need at most these":
            s.warmup_epochs > s.epochs,
        f"--seed {s.seed} is too large: need less than 2^63": s.seed >= 2**63,
        f"--model {s.preset} has no published fine-tuned checkpoint: fine-tune with --loss sft --split full "
        f"first, then give --model {s.preset}=runs/NAME/model":
            s.preset != "tiny" and not s.start and not s.dry_run,
        f"--template {s.template}: the tiny model learns to be asked with {tiny}; leave it out":
            s.preset == "tiny" and not sft and not s.start and s.template not in (None, tiny),
        "--lora trains adapters of a model that is there: leave it out, or give --model": s.lora and sft and
            not s.start,
        "--lora needs the package peft: pip install peft":
            s.lora and not s.dry_run and find_spec("peft") is None,
        "--compile needs a compiler, such as g++ (of another name: in CXX)": s.compile and not (
            s.dry_run or os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "gcc", "clang")))),
        "--lora goes with --parallel ddp: adapters are small, and the frozen weights are not sharded":
            s.lora and s.parallel == "fsdp",
        "--forget and --retain are the data and the split: leave out --data and --split, and --loss sft":
            own and (sft or "split" in given or "data" in given),
        "--forget and --retain need the model that holds these rows: give --model FOLDER":
            own and not s.start,
        f"--split {s.split}: unlearning needs a forget split, forget01 to forget99 (or --loss sft learns it)":
            not own and not sft and parse_split(s.split)[0] != "forget"})


def refuse_without_effect(s: Namespace, typed: dict):
    """A flag that changes nothing is a misunderstanding. Raises InputError."""
    objective = OBJECTIVES[s.loss]
    pairs = s.retain_weight > 0 or s.kl_weight > 0 or objective.needs_refusals
    processes = int(os.environ.get("WORLD_SIZE", 1))
    idle = {"kl_direction": s.kl_weight == 0, "retain_pairing": not pairs,
            "keep": s.keep == "best" and s.eval_every == "never", "retain_log": s.eval_every == "never",
            "system_prompt": s.template not in (None, "chat"),
            "gpus": not s.dry_run, "gpu_memory": not s.dry_run,
            "parallel": s.parallel == "fsdp" and processes == 1 and not s.dry_run}
    for other in OBJECTIVES.values():
        idle.update({name: name not in objective.settings or s.forget_weight == 0 for name in other.settings})
    here = f"{s.method}, {processes} process(es), --eval-every {s.eval_every}, --keep {s.keep}"
    refuse({f"--{flag.replace('_', '-')} has no effect here ({here}): leave it out":
            changes_nothing and typed.get(flag) is not None for flag, changes_nothing in idle.items()})


def check_processes(s: Namespace, processes: int):
    """Raises InputError where one of them would have no row of a batch."""
    if processes > s.batch_size:
        raise InputError(f"{processes} processes for a global batch of {s.batch_size}: need at least one "
                         "row a process; use a larger --batch-size")


def template_of(s: Namespace, tokenizer, start: dict) -> str:
    """How the run's model, `start` its record, is asked. Raises InputError where unlearning would ask it
    otherwise than it has learned to be asked, and for a system prompt that no template takes."""
    template = start.get("template") if start.get("trained_on") else None
    for flag, given, known in (("--template", s.template, template),
                               ("--system-prompt", s.system_prompt, system_prompt_of(tokenizer))):
        if s.loss != "sft" and known and given not in (None, known):
            raise InputError(f"{flag} {given}: {s.start} was trained with {known}, and answers nothing else "
                             "as it has learned to; leave it out")
    template = prompt_template(tokenizer, start, settings_of(s.preset), s.template, s.system_prompt)
    if s.system_prompt and template != "chat":
        raise InputError(f"--system-prompt has no effect with the template {template}: leave it out, or "
                         "give --template chat")
    return template


def parse(argv: list, description: str = "") -> Namespace:
    """The command line's settings; a resumed run's from its folder, also where torchrun has started all
    processes of the same command anew after a failure (`--max-restarts`, with `--out`). Raises InputError."""
    given = given_flags(build_parser(description), argv)
    if "dry_run" in given and "resume" in given:
        raise InputError("--dry-run is for a run that has not begun: leave out --resume, and give its flags")
    if "resume" in given:
        return resumed(Path(given.pop("resume")), given)
    s = resolve(given)
    if s.out and Path(s.out).exists() and not s.dry_run:
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))  # the count is each machine's own
        begun = restarts and (Path(s.out) / "config.json").is_file()
        if begun and read_config(Path(s.out)).get("command", "").endswith(f".py {shlex.join(argv)}"):
            return resumed(Path(s.out), given)
        raise InputError(f"--out {s.out} exists: choose another folder, or go on with --resume {s.out}")
    return s


def resumed(folder: Path, given: dict) -> Namespace:
    """The settings of a run's folder. Raises InputError for flags that differ, and for a config.json that no
    flags give."""
    for path in (folder, *sorted(folder.rglob("*"))):  # files could lie elsewhere
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link: copy what it points to, or start a new run")
    stored = read_config(folder)["settings"]
    changed = {}
    if given.get("parallel") not in (None, stored.get("parallel")):  # how, not what
        changed["parallel"] = stored["parallel"] = given["parallel"]
    for key, value in given.items():
        if key == "out" and Path(value).resolve() == folder.resolve():  # whatever name it had
            continue
        if stored.get(key) != value:
            raise InputError(f"--resume {folder}: --{key.replace('_', '-')} {value} differs from the run's "
                             f"{stored.get(key)}; leave it out, or start a new run")
    parser = build_parser()
    flags = vars(parser.parse_args([])).keys() - ({"split", "data"} if stored.get("forget") else set())
    words = [f"--{key.replace('_', '-')}" + (f"={value}" if value is not True else "")
             for key, value in stored.items() if key in flags and value is not None and value is not False]
    try:
        s = resolve(given_flags(parser, words), typed=changed)
        wrong = [key for key, value in stored.items() if getattr(s, key, value) != value]
    except InputError as error:
        wrong = [error]
    if wrong:
        raise InputError(f"--resume {folder}: cannot go on with its config.json ({wrong[0]})")
    # As stored, where 1 may stand for 1.0. What a run of an earlier version lacks has its default.
    return Namespace(**{**vars(s), **stored, "resume": str(folder)})


def read_config(folder: Path) -> dict:
    """A run folder's config.json. Raises InputError where it isn't one of ours."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if missing := {"loss", "method", "model", "start", "split", "data"} - set(config["settings"]):
            raise KeyError(", ".join(sorted(missing)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder}: its config.json is not a run's ({cause_of(error)}); need a run folder, "
                         "such as runs/NAME") from None
    return config


def tiny_settings(s: Namespace, split: str, task, seed: int = 0) -> Namespace:
    """How the tiny model for `split` is trained, and where it is kept: runs/models/KEY. Unlearning asks for
    seed 0: all runs share one start."""
    sft = resolve({"loss": "sft", "split": split, "data": s.data, "device": s.device, "seed": seed})
    recipe = [tiny_dims(task.full), sft.lr, sft.epochs, sft.batch_size, sft.weight_decay, sft.warmup_epochs,
              PRESETS["tiny"].template]
    sft.out = f"runs/models/tiny-{split}-seed{sft.seed}-{fingerprint(task.fingerprint, recipe)}"
    # Unlearning evaluates its start itself; the retrained model's evaluation is the retain log.
    sft.eval_every = "never" if split == "full" else "end"
    return sft
