"""Exact resume: what a training run needs to go on as if it had never stopped.

A checkpoint is a folder `checkpoints/step_000013/` with the weights and AdamW's moments (safetensors), the
scalar state (JSON) and a manifest of sizes and hashes. It is written aside, flushed to the disk and renamed,
so that it is whole or not there. A sharded model's processes write a file each, of the rows that they hold;
whoever resumes reads the rows that it needs, so that the number of processes and `--parallel` may change.
Of the stream the step is all that is needed: it is a pure function of (seed, position).
"""

import hashlib
import json
import os
import shutil
from collections import ChainMap
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.sharded import first_row, local
from support.files import whole_folder
from support.world import World

KEPT = 2


def save(folder: Path, step: int, model, optimizer, state: dict, world: World):
    """Write `folder/step_NNNNNN`, then drop all others but the KEPT - 1 before it. `state` is JSON: log
    length and scaler. Raises OSError where the disk is full or read-only; what was there stays."""
    with whole_folder(folder / f"step_{step:06d}", world) as aside:
        writes = world.sharded or world.rank == 0
        parts = world.collect(_write_part(aside, model, optimizer, world.rank) if writes else {})
        if world.rank == 0:
            (aside / "state.json").write_text(json.dumps({"step": step, **state}) + "\n")
            manifest = dict(ChainMap({"state.json": _entry(aside / "state.json")}, *parts))
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            for path in (aside / "state.json", aside / "manifest.json", aside):
                fsync(path)
    if world.rank == 0:
        fsync(folder)
        saved = sorted(folder.glob("step_*"))
        newest = saved.index(folder / f"step_{step:06d}")  # behind it: torn ones, which were passed over
        for old in saved[:max(0, newest + 1 - KEPT)] + saved[newest + 1:]:
            shutil.rmtree(old)


def trained(model) -> dict:
    """name -> parameter, without what `--lora` has frozen: the run's start has that."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _write_part(aside: Path, model, optimizer, rank: int) -> dict:
    """This process's weights and moments, flushed to the disk; their entries in the manifest."""
    weights = trained(model)
    moments = {f"{name}/{key}": value for name, p in weights.items()
               for key, value in optimizer.state.get(p, {}).items()}
    manifest = {}
    for kind, tensors in (("weights", weights), ("optimizer", moments)):
        path = aside / f"{kind}-{rank:05d}.safetensors"
        first_rows = {name: first_row(tensor) for name, tensor in tensors.items()}
        save_file({name: local(tensor).detach().contiguous() for name, tensor in tensors.items()}, path,
                  metadata={"first_rows": json.dumps(first_rows)})
        fsync(path)
        manifest[path.name] = _entry(path)
    return manifest


def latest(folder: Path) -> tuple[Path | None, list]:
    """(the newest whole checkpoint or None, sentences about torn ones that were passed over). What a killed
    process has half written is removed."""
    passed_over = []
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(folder.glob("step_*"), reverse=True):
        if not (flaw := _flaw(path)):
            return path, passed_over
        passed_over.append(f"{path} is not whole ({flaw}): using the one before it")
    return None, passed_over


def load(path: Path, model, optimizer):
    """Put weights and moments back, whichever processes wrote them."""
    weights, moments = Rows(path, "weights"), Rows(path, "optimizer")
    parameters = trained(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            weights.read(name, parameter)
        for key in moments.pieces:
            name, kind = key.rsplit("/", 1)
            p = parameters[name]
            # AdamW's step count is a scalar, on the parameter's device where it is fused.
            into = torch.zeros((), device=local(p).device) if kind == "step" else torch.zeros_like(p)
            optimizer.state[p][kind] = moments.read(key, into)


class Rows:
    """The tensors of a checkpoint's files of one kind, by rows, whichever process wrote them."""

    def __init__(self, path: Path, kind: str):
        self.pieces = {}  # name -> [(first row, open file)]
        for file_path in sorted(path.glob(f"{kind}-*.safetensors")):
            file = safe_open(file_path, framework="pt")
            for name, first in json.loads(file.metadata()["first_rows"]).items():
                self.pieces.setdefault(name, []).append((first, file))

    def read(self, name: str, into: Tensor) -> Tensor:
        """Fill `into`, or this process's rows of it, and return it."""
        mine, start = local(into), first_row(into)
        if mine.ndim == 0:  # every process has the same
            mine.copy_(self.pieces[name][0][1].get_tensor(name))
            return into
        for first, file in self.pieces[name]:
            piece = file.get_slice(name)
            begin, end = max(start, first), min(start + len(mine), first + piece.get_shape()[0])
            if begin < end:
                mine[begin - start:end - start] = piece[begin - first:end - first].to(mine.device)
        return into


def _flaw(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        names = {file.name for file in path.iterdir() if not file.name.startswith(".")}  # a desktop's notes
        if names != {*manifest, "manifest.json"} or "state.json" not in manifest:
            return "its files are not those of its manifest"
        torn = [name for name, expected in manifest.items() if _entry(path / name) != expected]
        return f"{torn[0]} differs from its manifest" if torn else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _entry(path: Path) -> dict:
    """What the manifest says of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def fsync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
