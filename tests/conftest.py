"""Shared by all tests: the project's root on the path, and the folders that lie beside the repository (TOFU, released logs, ...)."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MPLBACKEND", "Agg")
SHARED = Path(os.environ.get("NPO_SHARED", ROOT.parent / "shared"))


@pytest.fixture
def shared():
    """shared("tofu") is that folder beside the repository ($NPO_SHARED, else ../shared); skips the test where it is absent."""
    def folder(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{name} not found in {SHARED}: set NPO_SHARED to the folder that holds it")
        return path
    return folder
