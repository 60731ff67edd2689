"""What all commands share: errors of one sentence, flags, whole JSON files, provenance."""

import argparse
import errno
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent  # of the repository
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # and with these transformers' own


def locate(path: str) -> Path:
    """`path`; what ships in data/tiny is found from any working directory."""
    return ROOT / path if path.startswith("data/tiny/") else Path(path)


class InputError(ValueError):
    """The input cannot be used. The sentence says what was given, what is needed and what to type."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations. A wrong command line raises InputError."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def positive(kind: type, or_zero: bool = False):
    """An argparse type: a finite number above 0, or with `or_zero` at least 0."""
    def parse(text: str):
        value = kind(text)
        if 0 < value < 2**63 or (or_zero and value == 0):
            return value
        raise argparse.ArgumentTypeError(f"must be {'not negative' if or_zero else 'positive'}, got {text}")
    parse.__name__ = kind.__name__
    return parse


def run_command(main):
    """Run `main`. An InputError becomes one sentence on stderr and exit status 2, an interrupt status 130."""
    try:
        return main()
    except InputError as error:
        sentence, status = str(error), 2
    except KeyboardInterrupt as error:
        sentence, status = str(error) or "interrupted", 130
    except Exception as error:  # safetensors has an error of its own
        if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
            raise
        sentence, status = f"no space left on the disk ({cause_of(error)}): make room and run it again", 2
    sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
    os._exit(status)  # other processes may wait in a collective that never ends; torchrun stops them


def cause_of(error: Exception) -> str:
    """The kind of an error and the first words of its message, at most 300 characters on one line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300, placeholder=' ..')}"


def write_json(path, content: dict):
    """Write strict JSON aside, then rename: readers see the old file or the whole new one. Raises ValueError
    for a number that is not finite, and InputError where the file cannot be written."""
    path, text = Path(path), json.dumps(content, allow_nan=False, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".partial"), "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())  # after a power cut a renamed file would otherwise be empty
        os.replace(file.name, path)
    except OSError as error:
        if path.parent.is_dir():
            path.with_name(path.name + ".partial").unlink(missing_ok=True)
        raise InputError(f"cannot write {path} ({cause_of(error)})") from None


def fingerprint(*parts) -> str:
    """16 hex digits of the SHA-256 over the parts' canonical JSON: equal rows have equal fingerprints."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def environment() -> dict:
    """Provenance of a result: versions, commit and whether the code differed from it, command, time."""
    def git(*words: str) -> str:
        if not shutil.which("git"):
            return ""
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    ours = git("rev-parse", "--show-toplevel") == str(ROOT)  # and not a repository around this folder
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno", "--", "*.py")
    size = os.environ.get("LOCAL_WORLD_SIZE")
    return {"versions": {"python": sys.version.split()[0], "torch": version("torch"),
                         "transformers": version("transformers")},
            "commit": commit + "+changes" * bool(changes) if ours else None,
            "command": f"torchrun --nproc_per_node={size} " * bool(size) + shlex.join(
                [Path(sys.argv[0]).name, *sys.argv[1:]]),
            "time": datetime.now(UTC).isoformat(timespec="seconds")}
