"""Shared by all tests: paths, a small data set and a small model, and commands run in forks."""

import json
import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bitwise comparisons are made on a CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors this small, more threads are slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # fail at once instead of retrying a missing network
SHARED = Path(os.environ.get("NPO_SHARED", ROOT.parent / "shared"))
SMALL = 200  # rows of the small data set: 20 to forget


def pytest_collection_modifyitems(items):
    """Tests that start processes run first, so that no worker waits for one of them at the end. Those that
    share the fixture `runs` stay together, so that one worker makes it."""
    slow = {"command", "forked", "published_curves"}
    items.sort(key=lambda item: 0 if "runs" in item.fixturenames else 2 - bool(slow & {*item.fixturenames}))


@pytest.fixture
def shared():
    """shared("tofu") is that folder in $NPO_SHARED or ../shared. Where it is absent, the test is skipped."""
    def folder(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{name} not found in {SHARED}: set NPO_SHARED to the folder that holds it")
        return path
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """Ten authors of the built-in set as a folder of TOFU's files."""
    from data.tofu import load_sets
    sets, folder = load_sets("builtin")[0], tmp_path_factory.mktemp("data")
    sizes = {"full": slice(-SMALL, None), "forget10_perturbed": slice(-20, None),
             "retain_perturbed": slice(0, 20), "real_authors_perturbed": slice(0, 6),
             "world_facts_perturbed": slice(0, 7), "holdout10": slice(0, 20)}
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows[sizes[name]]))
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A folder with a random Llama of 0.1 M parameters, and the tiny model's tokenizer."""
    from transformers import LlamaConfig
    return save_random_model(tmp_path_factory.mktemp("small") / "model", LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2))


def save_random_model(folder: Path, config) -> Path:
    """Random weights, the same on every machine, and the tiny model's tokenizer."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config)
    for number, parameter in enumerate(lm.parameters()):
        noise = torch.from_numpy(np.random.default_rng(number).standard_normal(parameter.shape)).float()
        parameter.data = 0.1 * noise if parameter.ndim > 1 else parameter.data + 0.1 * noise
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data" / "tiny" / "start").save_pretrained(folder)
    (folder / "npo.json").write_text(json.dumps({"preset": None, "template": "llama2", "trained_on": {}}))
    return folder


@pytest.fixture
def retain_log(tmp_path, small_data) -> Path:
    """An evaluation's log of a made-up model, trained on the small data's retain rows."""
    rows = map(json.loads, (small_data / "forget10_perturbed.json").read_text().splitlines())
    rows = [{"index": i, "question": row["question"], "answer": row["answer"], "generation": "",
             "rouge_l_recall": 0, "answer_nll": 80, "answer_tokens": 10, "paraphrased_nll": 80 + i,
             "paraphrased_tokens": 10, "perturbed_nll": [80], "perturbed_tokens": [10]}
            for i, row in enumerate(rows)]
    path = tmp_path / "retrained.json"
    path.write_text(json.dumps({"rows": {"forget": rows}, "provenance": {}}))
    return path


@pytest.fixture
def run(small_model, small_data, tmp_path, monkeypatch):
    """run("--loss npo --epochs 1", out="a") trains the small model in this process, and returns the run's
    folder. Flags win over the defaults here."""
    import torch

    import train_npo
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def train(flags: str = "", out: str = "run") -> Path:
        defaults = ["--model", small_model, "--data", small_data, "--epochs", 2, "--batch-size", 8, "--lr",
                    1e-3, "--eval-every", "never", "--out", out]
        train_npo.main([*map(str, defaults), *shlex.split(flags)])
        return tmp_path / out
    monkeypatch.chdir(tmp_path)
    yield train
    torch.set_flush_denormal(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------- commands

@pytest.fixture
def command(tmp_path):
    """command("train_npo.py", "--loss", "npo", processes=2) runs it as a user would, in an empty folder, and
    returns the finished process. `forked` does the same and is faster."""
    def run(script: str, *args, processes: int = 0, status: int | None = 0, timeout: int = 600):
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                    "--standalone"]
        words = [*(torchrun if processes else [sys.executable]), str(ROOT / script), *map(str, args)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=timeout)
        assert status is None or done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return done
    return run


@pytest.fixture
def forked(tmp_path):
    return partial(fork, tmp_path)


FORKS = multiprocessing.get_context("forkserver")  # one process imports this, has no thread, and is forked
FORKS.set_forkserver_preload("pytest matplotlib.pyplot peft rouge_score.rouge_scorer scipy.stats "
                             "torch.distributed.fsdp torch.distributed.checkpoint.hf_storage "
                             "transformers.models.llama.modeling_llama".split())


def fork(folder: Path, script: str, *args, processes: int = 0, status: int | None = 0, timeout: int = 200,
         prepare=None):
    """`command` in `folder`, in forks of a process that has imported torch and transformers. Several
    processes meet as under torchrun. `prepare`, a function of a test file, is called before the script."""
    from torch.distributed import TCPStore
    words, environment = [str(ROOT / script), *map(str, args)], dict(os.environ)
    if processes:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
                        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    with TemporaryDirectory() as printed:
        outputs, ranks = [Path(printed) / "stdout", Path(printed) / "stderr"], []
        for rank in map(str, range(max(1, processes))):
            place = {"RANK": rank, "LOCAL_RANK": rank} if processes else {}
            ranks.append(FORKS.Process(target=run_script,
                                       args=(words, folder, environment | place, outputs, prepare)))
            ranks[-1].start()
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in ranks) and time.monotonic() < end:
            wait([process.sentinel for process in ranks if process.is_alive()], timeout=1)
            if any(process.exitcode for process in ranks):
                end = min(end, time.monotonic() + 5)  # the others may be waiting for a process that failed
        for process in ranks:
            process.kill()
            process.join()
        code = next((process.exitcode for process in ranks if process.exitcode), 0)
        done = subprocess.CompletedProcess(words, code, *(path.read_text() for path in outputs))
    assert status is None or code == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def run_script(words: list[str], folder: Path, environment: dict, outputs: list[Path], prepare):
    """What `python WORDS` does in `folder`, in this process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.path[0], sys.argv = str(Path(words[0]).parent), words
    if prepare:
        prepare()
    runpy.run_path(words[0], run_name="__main__")


# ---------------------------------------------------------------- what a run leaves

def weights(folder: Path) -> dict:
    """name -> tensor of the model in a folder."""
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


def log(run: Path) -> list[dict]:
    """The lines of log.jsonl without the speed, which differs from run to run."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


def assert_close(expected: dict, actual: dict, tolerance=1e-5):
    """Every tensor differs by at most this share of its norm."""
    assert expected.keys() == actual.keys()
    for name in expected:
        assert (expected[name] - actual[name]).norm() <= tolerance * expected[name].norm(), name


def sgd(model, s):
    """In place of train_npo.adamw. AdamW does not see a gradient's scale, and scales rounding errors up."""
    from torch.optim import SGD
    return SGD(model.parameters(), lr=s.lr)
