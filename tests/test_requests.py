"""Requests that arrive one after another: parts of a split, and an older reference."""

import json
from pathlib import Path

import pytest
import torch
from conftest import log, weights

import train_npo
from common import InputError
from data.tofu import complement, evaluation_split, load_task, parse_split, slice_rows


def test_a_part_of_a_split_is_a_slice_of_its_rows():
    rows = list(range(4000))
    assert slice_rows(rows, "forget10_100to250") == rows[-400:][100:250]
    assert parse_split("forget10_0to100") == ("forget", 10) and complement("forget10_0to100") == "retain90"
    assert evaluation_split("forget10_0to100") == "forget10"
    task, whole = (load_task("builtin", split) for split in ("forget10_300to400", "forget10"))
    assert task.forget == whole.forget[300:] and task.retain == whole.retain
    assert task.evaluated == whole.evaluated and task.fingerprint == whole.fingerprint
    for split in ("forget10_0to401", "forget10_5to5", "forget10_7to5"):
        with pytest.raises(InputError, match="has 400 rows"):
            slice_rows(rows, split)
    for split in ("retain90_0to5", "forget10_0", "forget10_ato5", "full_0to5"):
        with pytest.raises(InputError, match="unknown split"):
            parse_split(split)


@pytest.fixture
def unlearn(small_model, small_data, tmp_path, monkeypatch):
    """unlearn(NAME, FLAG ..) makes a run of that name, and returns its folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *flags) -> Path:
        train_npo.main(["--retain-weight", "1", "--kl-weight", "1", "--data", str(small_data), "--epochs",
                        "4", "--batch-size", "8", "--lr", "1e-2", "--eval-every", "never", "--model",
                        str(small_model), "--out", name, *map(str, flags)])
        return tmp_path / name
    return run


def test_the_first_request_is_the_run_without_requests(unlearn, small_model):
    plain = unlearn("plain", "--split", "forget10")
    whole = unlearn("whole", "--split", "forget10_0to20")
    kept = unlearn("kept", "--split", "forget10", "--reference", small_model)
    for other in (whole, kept):
        pairs = zip(weights(plain / "model").values(), weights(other / "model").values(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_a_kept_reference_sees_what_was_forgotten_before(unlearn, small_model):
    first = unlearn("first", "--split", "forget10_0to10") / "model"
    renewed = unlearn("renewed", "--split", "forget10_0to20", "--model", first)
    kept = unlearn("kept", "--split", "forget10_0to20", "--model", first, "--reference", small_model)
    w = {run.name: log(run)[0]["mean_W"] for run in (renewed, kept)}
    assert w["renewed"] == pytest.approx(1, abs=1e-4) and w["kept"] < 0.9
    assert log(kept)[0]["kl_loss"] > 1e-3
    identities = [json.loads((run / "config.json").read_text())["run"] for run in (renewed, kept)]
    assert identities[0] != identities[1]
    with pytest.raises(InputError, match="is no model's folder"):
        unlearn("none", "--reference", "nowhere")
    with pytest.raises(InputError, match="leave out --reference"):
        train_npo.main(["--resume", str(kept), "--reference", str(first)])
