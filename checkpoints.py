"""Exact resume: what a training run needs to go on as if it had never stopped.

A checkpoint is a folder `checkpoints/step_000013/` with the weights and AdamW's moments (safetensors), the scalar state
(JSON) and a manifest of sizes and hashes. It is written aside, flushed to the disk and renamed, so that it is whole or
not there; the last two are kept. Batches, partners and refusals are pure functions of (seed, position): the step is all
that is needed of the stream.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data.tofu import InputError

KEPT = 2


def save(folder: Path, step: int, model, optimizer, state: dict, kept: int = KEPT):
    """Write `folder/step_NNNNNN`, then drop all but the last `kept`. `state` is JSON: log length and scaler.

    Raises OSError where the disk is full or read-only; the checkpoints that were there stay as they were.
    """
    target, aside = folder / f"step_{step:06d}", folder / f".step_{step:06d}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _save_tensors(dict(model.named_parameters()), aside / "weights.safetensors")
        names = {id(p): name for name, p in model.named_parameters()}
        moments = {f"{names[id(p)]}/{key}": value
                   for p, values in optimizer.state.items() for key, value in values.items()}
        _save_tensors(moments, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": step, **state}) + "\n")
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                    for path in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for path in [*aside.iterdir(), aside]:
            _fsync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in sorted(folder.glob("step_*"))[:-kept]:
        shutil.rmtree(old)


def latest(folder: Path) -> tuple[Path | None, list]:
    """(the newest whole checkpoint or None, sentences about torn ones that were passed over)."""
    passed_over = []
    for path in sorted(folder.glob("step_*"), reverse=True):
        flaw = _flaw(path)
        if flaw is None:
            return path, passed_over
        passed_over.append(f"{path} is not whole ({flaw}): using the one before it")
    return None, passed_over


def load(path: Path, model, optimizer) -> dict:
    """Put weights and moments back in place and return the state. Raises InputError where they don't fit the model."""
    weights, moments = load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
    parameters = dict(model.named_parameters())
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in parameters.items()}:
        raise InputError(f"{path} holds the weights of another model; resume the run that wrote it")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for name, value in moments.items():
        name, key = name.rsplit("/", 1)
        # AdamW keeps its step count on the CPU unless it is fused on a GPU; load_state_dict's rule, applied per tensor.
        stays = key == "step" and not _fused(optimizer)
        optimizer.state[parameters[name]][key] = value if stays else value.to(parameters[name].device)
    return json.loads((path / "state.json").read_text())


def _fused(optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)


def _save_tensors(tensors: dict, path: Path):
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def _flaw(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest.items():
            if (path / name).stat().st_size != expected["bytes"] or _sha256(path / name) != expected["sha256"]:
                return f"{name} differs from its manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
