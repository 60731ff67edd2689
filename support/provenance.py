"""Where a result comes from."""

import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

# git's pathspec without what commands write into results/: a study that has begun is not a change of the code
WRITTEN_BY_COMMANDS = [f":!results/*.{kind}" for kind in ("json", "md", "png")]


def git(*words) -> str:
    """What git says of this code; nothing where there is no git."""
    try:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent.parent, capture_output=True,
                              text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def without_folders(command: str) -> str:
    """A command whose paths elsewhere than in this folder are their last names, `--flag=PATH` too."""
    words = []
    for word in shlex.split(command):
        before, sign, path = word.rpartition("=")
        words.append(before + sign + Path(path).name if path.startswith(("/", "~", "..")) else word)
    return shlex.join(words)


def environment() -> dict:
    """What a result's provenance says of its making: versions, commit and whether files differed from it, the
    command as typed (without this machine's interpreter), time."""
    import torch
    import transformers
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", *WRITTEN_BY_COMMANDS)
    processes, nodes = int(os.environ.get("LOCAL_WORLD_SIZE", 0)), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    torchrun = ["torchrun", *[f"--nnodes={nodes}"] * (nodes > 1), f"--nproc_per_node={processes}"]
    command = [*torchrun * (processes > 0), Path(sys.argv[0]).name, *sys.argv[1:]]
    return {"versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "transformers": transformers.__version__},
            "commit": commit + "+changes" * bool(changes) or None, "dirty": bool(changes) if commit else None,
            "command": shlex.join(command), "time": datetime.now(UTC).isoformat(timespec="seconds")}
