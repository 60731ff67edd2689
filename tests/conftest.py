"""Shared by all tests: the project's root on the path, the folders that lie beside the repository, a small
data set and a small model."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared to the bit is a CPU's
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors this small, threads only get in each other's way
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # at once, where a missing network would be asked several times
SHARED = Path(os.environ.get("NPO_SHARED", ROOT.parent / "shared"))
SMALL = 200  # rows of the small data set: 20 to forget


def pytest_collection_modifyitems(items):
    """The long ones come first, so that no worker waits for one in the end."""
    long = {"command", "forked", "small", "published_curves"}
    items.sort(key=lambda item: long.isdisjoint(item.fixturenames))


@pytest.fixture
def shared():
    """shared("tofu") is that folder beside the repository ($NPO_SHARED, else ../shared); skips the test where
    it is absent."""
    def folder(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{name} not found in {SHARED}: set NPO_SHARED to the folder that holds it")
        return path
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """Ten authors of the built-in set as a folder of TOFU's files."""
    from data.builtin import make_builtin
    sets, folder = make_builtin(), tmp_path_factory.mktemp("data")
    sizes = {"full": slice(-SMALL, None), "forget10_perturbed": slice(-20, None),
             "retain_perturbed": slice(0, 20), "real_authors_perturbed": slice(0, 6),
             "world_facts_perturbed": slice(0, 7), "holdout10": slice(0, 20)}
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows[sizes[name]]))
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory, small_data) -> Path:
    """A folder with a random Llama of a few thousand parameters, and its tokenizer."""
    from data.tofu import load_task
    from models.loading import make_tiny
    from models.saving import save_model
    task = load_task(str(small_data), "forget10")
    texts = [row[key] for row in task.full + task.facts() for key in ("question", "answer")]
    dims = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=1024)
    folder = tmp_path_factory.mktemp("small") / "model"
    save_model(*make_tiny(texts, 0, dims), folder, {"preset": None, "template": "llama2", "trained_on": {}})
    return folder


@pytest.fixture
def command(tmp_path):
    """command("train_npo.py", "--loss", "npo", processes=2) runs it as a user would, in an empty folder; the
    finished process."""
    def run(script: str, *args, processes: int = 0, status: int | None = 0, timeout: int = 600):
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                    "--master_port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        words = [*(torchrun if processes else [sys.executable]), str(ROOT / script), *map(str, args)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=timeout,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert status is None or done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return done
    return run


FORKS = multiprocessing.get_context("forkserver")  # one process imports this, has no thread, and is forked
FORKS.set_forkserver_preload("pytest matplotlib.pyplot peft rouge_score.rouge_scorer scipy.stats "
                             "torch.distributed.fsdp transformers.models.llama.modeling_llama".split())


def run_script(words: list[str], folder: Path, environment: dict, outputs: list[Path]):
    """What `python WORDS` does in `folder`, in this process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.path[0], sys.argv = str(Path(words[0]).parent), words
    runpy.run_path(words[0], run_name="__main__")


def fork(folder: Path, script: str, *args, processes: int = 0, status: int | None = 0, timeout: int = 600):
    """As `command` in `folder`, in forks of a process that has imported torch and transformers: a new
    interpreter takes seconds to. Several find each other as under torchrun, at a store of their launcher."""
    from torch.distributed import TCPStore
    words, own = [str(ROOT / script), *map(str, args)], {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        own |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    with TemporaryDirectory() as said:
        outputs, ranks = [Path(said) / "stdout", Path(said) / "stderr"], []
        for rank in map(str, range(max(1, processes))):
            environment = own | ({"RANK": rank, "LOCAL_RANK": rank} if processes else {})
            ranks.append(FORKS.Process(target=run_script, args=(words, folder, environment, outputs)))
            ranks[-1].start()
        for process in ranks:
            process.join(timeout)
            process.kill()  # where it has not ended
            process.join()
        code = next((process.exitcode for process in ranks if process.exitcode), 0)
        done = subprocess.CompletedProcess(words, code, *(path.read_text() for path in outputs))
    assert status is None or code == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture
def forked(tmp_path):
    return partial(fork, tmp_path)
