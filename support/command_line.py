"""What all commands share: errors of one sentence and exit status 2, argument types, provenance, JSON written whole."""

import argparse
import fcntl
import json
import math
import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from safetensors import SafetensorError

from data.tofu import InputError


class Parser(argparse.ArgumentParser):
    """argparse with errors of one sentence, and no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def given_flags(parser: Parser, argv) -> dict:
    """The flags that were really given, without the defaults of the others."""
    unset = object()
    marked = argparse.Namespace(**{key: unset for key in vars(parser.parse_args([]))})
    return {key: value for key, value in vars(parser.parse_args(argv, marked)).items() if value is not unset}


def positive(kind):
    """An argparse type: a positive finite number."""
    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


def not_negative(kind):
    """An argparse type: a finite number of at least 0."""
    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and value >= 0):
            raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


@contextmanager
def locked(file: Path, wait: bool = False):
    """Hold `file` as a lock: one process writes a folder at a time.

    Raises InputError where another holds it and `wait` is False.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise InputError(f"{file.parent} is in use by a run that goes on: wait for it, or choose another "
                                 "folder") from None
            print(f"waiting for another run to finish {file.name}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# git's pathspec without what commands write into results/: a study that has begun is not a change of the code
WRITTEN_BY_COMMANDS = [f":!results/*.{kind}" for kind in ("json", "md", "png")]


def environment() -> dict:
    """What a result's provenance says of its making: versions, commit and whether files differed from it, the command
    as typed (without this machine's interpreter), time."""
    import torch
    import transformers
    def git(*args) -> str:
        try:
            done = subprocess.run(["git", *args], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
            return done.stdout.strip()
        except FileNotFoundError:  # no git on this machine
            return ""

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", *WRITTEN_BY_COMMANDS)
    processes, nodes = int(os.environ.get("LOCAL_WORLD_SIZE", 0)), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    torchrun = ["torchrun", *[f"--nnodes={nodes}"] * (nodes > 1), f"--nproc_per_node={processes}"] * (processes > 0)
    return {"versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "transformers": transformers.__version__},
            "commit": commit + "+changes" * bool(changes) or None, "dirty": bool(changes) if commit else None,
            "command": shlex.join([*torchrun, Path(sys.argv[0]).name, *sys.argv[1:]]),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def write_json(path: Path, content: dict):
    """Strict JSON (no NaN), written aside and renamed: a reader sees the old file or the whole new one.
    Raises InputError."""
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    try:
        text = json.dumps(content, allow_nan=False, ensure_ascii=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, path)
    except ValueError:
        raise InputError(f"{path} would hold a number that is not finite: the model's scores are; nothing was "
                         "written") from None
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; choose a place with room and the right to "
                         "write") from None


def run_command(main, name: str):
    """Run a command's `main`. What the user can mend ends in one sentence on stderr and exit status 2, Ctrl-C in
    status 130."""
    try:
        main()
    except InputError as error:
        _end(f"{name}: {error}", 2)
    except (OSError, SafetensorError) as error:  # no room, no right to write
        where = " ".join(str(error).split())
        if getattr(error, "filename", None):
            where = f"{error.filename}: {error.strerror}"
        _end(f"{name}: {where}; need a place with room and the right to write", 2)
    except RuntimeError as error:
        if "closed by peer" not in str(error) and "Connection reset" not in str(error):
            raise
        _end(f"{name}: stopped, because another process has ended; it says why", 1)
    except KeyboardInterrupt:
        _end(f"{name}: interrupted", 130)


def _end(sentence: str, status: int):
    """Say it once: process 0 at once, another only where it hasn't been stopped with the rest some seconds later. Then
    leave without waiting for anyone: the others may be inside a collective operation that will never end, and torchrun
    stops them."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)
    print(sentence, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
