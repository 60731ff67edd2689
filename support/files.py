"""Files read and written so that a crafted, torn or shared one does no harm."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from support.errors import InputError

MAX_FILE_BYTES = 2**30  # of a text file; TOFU has 1 MB


def locked(file: Path, wait: bool = False):
    """Hold `file` as a lock until the `with` ends. Raises InputError where another process holds it and
    `wait` is False."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise InputError(f"{file.parent} is in use by a run: wait for it, or choose another") from None
        print(f"waiting for another run to finish {file.name}", flush=True)
        return lock.acquire()


@contextmanager
def whole_folder(target: Path, world):
    """A folder that all processes write into. It takes `target`'s place in one rename, or nothing is left of
    it; processes that read it then wait for nobody."""
    aside = target.with_name(f".{target.name}.partial")
    if world.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        aside.mkdir(parents=True)
    world.wait()
    try:
        yield aside
        world.wait()
        if world.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
        world.wait()
    finally:
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)


def fingerprint(*parts) -> str:
    """16 hex digits of the SHA-256 over the parts' canonical JSON: equal rows, equal fingerprint."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def read_text(path: Path) -> str:
    """A text file whole. Raises InputError before one too large fills the memory."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # Windows begins files with a mark
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise InputError(f"{path} has {size / 2**30:.1f} GB, at most {MAX_FILE_BYTES >> 30} GB is "
                                 "read: give a smaller file")
            return file.read(MAX_FILE_BYTES)  # a device has no size, and no end
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; need a UTF-8 text file") from None


def holds_texts(record, *keys) -> bool:
    """What a file says is an object with text, or nothing, at these keys."""
    return isinstance(record, dict) and all(isinstance(record.get(key), str | None) for key in keys)


def write_json(path: Path, content: dict):
    """Strict JSON, written aside and renamed: the old file or the whole new. Raises InputError for NaN."""
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    try:
        text = json.dumps(content, allow_nan=False, ensure_ascii=False)
    except ValueError:
        raise InputError(f"{path} would hold a number that is not finite: nothing was written") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
