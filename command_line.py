"""What all commands share: errors of one sentence and exit status 2, argument types, provenance, JSON written whole."""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from data.tofu import InputError


class Parser(argparse.ArgumentParser):
    """argparse with errors of one sentence, and no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


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


def environment() -> dict:
    """What a result's provenance says of its making: versions, commit, command, time."""
    import torch
    import transformers
    git = lambda *args: subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = git("rev-parse", "HEAD")
    return {"versions": {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__},
            "commit": commit.stdout.strip() + ("+changes" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
            if commit.returncode == 0 else None,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def write_json(path: Path, content: dict):
    """Strict JSON (no NaN), written aside and renamed: a reader sees the old file or the whole new one. Raises InputError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".partial")
        aside.write_text(json.dumps(content, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a place with room and the right to write") from None


def run_command(main, name: str):
    """Run a command's `main`. What the user can mend ends in one sentence on stderr and exit status 2, Ctrl-C in status 130."""
    try:
        main()
    except InputError as error:
        _end(f"{name}: {error}", 2)
    except OSError as error:  # no room, no right to write
        _end(f"{name}: {error.filename or 'a file'}: {error.strerror or error}; need a place with room and the right to write", 2)
    except RuntimeError as error:
        if "closed by peer" not in str(error) and "Connection reset" not in str(error):
            raise
        _end(f"{name}: stopped, because another process has ended; it says why", 1)
    except KeyboardInterrupt:
        _end(f"{name}: interrupted", 130)


def _end(sentence: str, status: int):
    """Say it once: process 0 at once, another only where it hasn't been stopped with the rest some seconds later. Then leave without
    waiting for anyone: the others may be inside a collective operation that will never end, and torchrun stops them."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)
    print(sentence, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
