"""A crafted model, data file or checkpoint is refused with one sentence, or harmless: no code of it runs, and
nothing outside its folder is read or removed."""

import json
import pickle
import resource
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_npo
from data.prompts import prompt_text
from data.tofu import load_task, read_rows
from evaluation.logs import read_log
from models import saving
from models.loading import MAX_JSON_BYTES, load_model
from models.saving import read_meta
from running import checkpoints
from running.memory_plan import read_shape
from running.settings import parse, read_config
from support.errors import InputError
from support.files import locked
from support.world import ALONE
from train_npo import carry_out


class Touch:
    """What runs when it is unpickled: a file appears."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def crafted(small_model, tmp_path) -> Path:
    return shutil.copytree(small_model, tmp_path / "crafted")


def edit(file: Path, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(call, *args) -> str:
    with pytest.raises(InputError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- models

@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.pt"))
def test_a_pickle_is_never_opened(crafted, tmp_path, name):
    ran = tmp_path / "ran"
    (crafted / name).write_bytes(pickle.dumps(Touch(ran)))
    load_model(str(crafted))  # beside safetensors: passed over
    weights = (crafted / "model.safetensors").read_bytes()
    (crafted / "model.safetensors").unlink()
    assert "pickled weights" in refusal(load_model, str(crafted))
    (crafted / "model.safetensors").write_bytes(pickle.dumps(Touch(ran)))  # under the good name
    assert "cannot load it as safetensors" in refusal(load_model, str(crafted))
    (crafted / "model.safetensors").write_bytes(weights[:1000])
    assert "cannot load it as safetensors" in refusal(load_model, str(crafted))
    assert not ran.exists()
    pickle.loads((crafted / name).read_bytes())  # the trap works
    assert ran.exists()


@pytest.mark.parametrize("target",
                         ("../elsewhere/model.safetensors", "/etc/passwd", "model.bin", "sub/x.safetensors"))
def test_an_index_that_points_elsewhere_is_refused(crafted, tmp_path, target):
    weights = load_file(crafted / "model.safetensors")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(crafted / "model.safetensors", tmp_path / "elsewhere" / "model.safetensors")
    save_file(weights, crafted / "part.safetensors", metadata={"format": "pt"})
    index = crafted / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}))
    load_model(str(crafted))  # an honest index
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, target)}))
    assert f"points to '{target}'" in refusal(load_model, str(crafted))
    index.write_text("[1]")
    assert "not an index" in refusal(load_model, str(crafted))


def test_code_in_a_model_folder_does_not_run(crafted, tmp_path):
    """`auto_map` names Python files of the folder: with a known model type they are passed over, else
    refused."""
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Trap: pass\n"
    (crafted / "trap.py").write_text(code)
    edit(crafted / "config.json", auto_map={"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"})
    edit(crafted / "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.Trap", "trap.Trap"]})
    try:
        load_model(str(crafted))
    except InputError as error:
        assert "trust_remote_code" in str(error) or "cannot load" in str(error)
    edit(crafted / "config.json", model_type="trap")
    assert "cannot load" in refusal(load_model, str(crafted))
    planned = Namespace(start=str(crafted), preset=None, model="it")
    assert "custom code" in refusal(read_shape, planned, [])
    assert not ran.exists()
    exec(compile(code, "trap", "exec"), {})  # the trap works
    assert ran.exists()


@pytest.mark.parametrize("template", ("{{ ''.__class__.__mro__[1].__subclasses__() }}",
                                      "{% for i in range(10**12) %}x{% endfor %}", "{% nonsense", "{{ 1 / 0 "
                                                                                                  "}}",
                                      "{{ cycler.__init__.__globals__.os.system('touch ran') }}"))
def test_a_chat_template_stays_in_its_sandbox(crafted, tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_model(str(crafted))[1]
    tokenizer.chat_template = template
    assert "chat template fails" in refusal(prompt_text, tokenizer, "chat", "Who?")
    assert not (tmp_path / "ran").exists()


def test_what_a_hub_id_says_of_itself_is_read(crafted, monkeypatch):
    (crafted / "npo.json").write_text('{"preset": "tiny", "template": "qa"}')
    monkeypatch.setattr(saving, "hf_hub_download", lambda source, name: str(crafted / name))
    assert read_meta("user/name") == {"preset": "tiny", "template": "qa"} and read_meta("a/b/c") == {}
    (crafted / "npo.json").unlink()
    assert read_meta("user/name") == {}

    def unreachable(source, name):
        raise OSError("no network")
    monkeypatch.setattr(saving, "hf_hub_download", unreachable)
    assert read_meta("user/name") == {}


def test_a_file_meant_to_fill_the_memory_is_refused_unread(crafted):
    with open(crafted / "tokenizer.json", "r+b") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse: it takes no room
    assert "tokenizer.json has more than 256 MB" in refusal(load_model, str(crafted))


def test_json_that_is_too_deep_is_refused(crafted, tmp_path):
    deep = "[" * 10**5
    (crafted / "npo.json").write_text(deep)
    assert "must hold an object" in refusal(read_meta, str(crafted))
    (tmp_path / "config.json").write_text(deep)
    assert "not a run's" in refusal(read_config, tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": ' + "1" * 10**4 + "}\n")
    assert "not JSON" in refusal(read_rows, tmp_path / "rows.jsonl")


def test_an_adapter_that_names_another_model_is_refused(crafted):
    adapter = {"base_model_name_or_path": "../other", "peft_type": "LORA"}
    (crafted / "adapter_config.json").write_text(json.dumps(adapter))
    assert "adapter" in refusal(load_model, str(crafted))


# ---------------------------------------------------------------- data and logs

def test_gigabytes_are_refused_without_reading_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "Who?", "answer": "Ann."}\n')
    with open(file, "r+b") as opened:
        opened.truncate(5 * 2**30)  # a second line of zeros, sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "has 5.0 GB, at most 1 GB" in refusal(read_rows, file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # kB
    assert "at most 1 GB" in refusal(read_log, file)


def test_a_device_is_no_endless_file(monkeypatch):
    monkeypatch.setattr("support.files.MAX_FILE_BYTES", 10_000)
    assert "not JSON" in refusal(read_rows, Path("/dev/zero"))


def test_a_data_name_with_dots_is_no_hub_id(tmp_path, monkeypatch, small_model, small_data):
    """A folder outside is the user's to name; a name that is not there goes nowhere else."""
    monkeypatch.chdir(tmp_path)
    for name in ("../nowhere", "../../etc", "a/../b", "http://x/y", "file:///etc"):
        assert "no Hub id" in refusal(load_task, name, "forget10")
        monkeypatch.setattr(sys, "argv", ["train_npo.py", "--data", str(small_data), "--model", name])
        assert "neither a preset" in refusal(train_npo.main)
    assert not list(tmp_path.iterdir())


def test_deep_nesting_is_a_sentence(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    assert "not JSON" in refusal(read_rows, tmp_path / "deep.json")
    assert "cannot read the log" in refusal(read_log, tmp_path / "deep.json")


# ---------------------------------------------------------------- checkpoints

def trained(small_model):
    lm = load_model(str(small_model))[0]
    optimizer = torch.optim.AdamW(lm.parameters(), fused=True)
    lm(input_ids=torch.arange(5).unsqueeze(0)).logits.sum().backward()
    optimizer.step()
    return lm, optimizer


def test_a_checkpoint_s_pickle_or_foreign_manifest_is_passed_over(small_model, tmp_path):
    lm, optimizer = trained(small_model)
    folder, ran = tmp_path / "checkpoints", tmp_path / "ran"
    for step in (3, 4, ):
        checkpoints.save(folder, step, lm, optimizer, {"log_bytes": 0, "scaler": {}}, ALONE)
    newest = folder / "step_000004"
    manifest = (newest / "manifest.json").read_text()
    (newest / "manifest.json").write_text("{}")  # names nothing, so vouches for nothing
    assert checkpoints.latest(folder)[0].name == "step_000003"
    (newest / "manifest.json").write_text(manifest)
    (newest / "weights-00000.safetensors").write_bytes(pickle.dumps(Touch(ran)))
    assert checkpoints.latest(folder)[0].name == "step_000003" and not ran.exists()
    # Going on before it, what is saved next stays.
    checkpoints.save(folder, 2, lm, optimizer, {"log_bytes": 0, "scaler": {}}, ALONE)
    assert [path.name for path in folder.iterdir()] == ["step_000002"]


# ---------------------------------------------------------------- run folders

@pytest.fixture(scope="module")
def unfinished(small_model, small_data, tmp_path_factory) -> Path:
    """A run folder whose result is missing, as after a crash."""
    flags = ["--model", small_model, "--data", small_data, "--epochs", 2, "--batch-size", 8, "--lr", 1e-3,
             "--eval-every", "never", "--checkpoint-every", 3,
             "--out", tmp_path_factory.mktemp("run") / "run"]
    folder = carry_out(parse(list(map(str, flags))), ALONE)
    shutil.rmtree(folder / "model")
    return folder


@pytest.fixture
def interrupted(unfinished, tmp_path) -> Path:
    return Path(shutil.copytree(unfinished, tmp_path / "run"))


def resume(folder):
    return carry_out(parse(["--resume", str(folder)]), ALONE)


@pytest.mark.parametrize("name",
                         ("log.jsonl", ".lock", "checkpoints", "checkpoints/step_000003",
                          "checkpoints/step_000003/weights-00000.safetensors", "eval", "model", "reference",
                          ".model.partial"))
def test_a_link_in_a_run_folder_is_refused_and_what_it_points_to_stays(interrupted, tmp_path, name):
    outside = tmp_path / "outside"
    target = interrupted / name
    if target.is_dir():
        shutil.move(target, outside)
    else:
        target.unlink(missing_ok=True)
        outside.mkdir() if name in ("eval", "model", ".model.partial") else outside.write_text("precious")
    target.symlink_to(outside)
    before = {p: p.read_bytes() for p in [outside, *outside.rglob("*")] if p.is_file()}
    assert "symbolic link" in refusal(resume, interrupted)
    assert {p: p.read_bytes() for p in [outside, *outside.rglob("*")]
            if p.is_file()} == before and outside.exists()


def test_the_lock_never_truncates(tmp_path):
    (tmp_path / ".lock").write_text("precious")
    with locked(tmp_path / ".lock"):
        pass
    assert (tmp_path / ".lock").read_text() == "precious"


def test_another_runs_checkpoint_is_refused(interrupted):
    """Of the same shape, from other settings: it would become this run's result."""
    other = Path(shutil.copytree(interrupted, interrupted.with_name("other")))
    edit(other / "config.json",
         settings={**json.loads((other / "config.json").read_text())["settings"], "lr": 2e-3})
    assert "start a new run" in refusal(resume, other)
    assert (resume(interrupted) / "model").is_dir()


def test_a_start_with_other_weights_is_refused_and_the_record_of_the_first_stays(interrupted):
    edit(interrupted / "config.json", start_weights="0" * 16)
    before = (interrupted / "config.json").read_bytes()
    assert "the start's weights have changed" in refusal(resume, interrupted)
    assert (interrupted / "config.json").read_bytes() == before


@pytest.mark.parametrize("changes",
                         ({"epochs": "x"}, {"checkpoint_every": "zz"}, {"micro_batch_size": 0}, {"lr": None},
                                     {"lr": "1e-3"}, {"loss": "nope"}, {"seed": -1}))
def test_a_hand_edited_setting_is_refused_in_a_sentence(interrupted, changes):
    settings = json.loads((interrupted / "config.json").read_text())["settings"]
    edit(interrupted / "config.json", settings={**settings, **changes})
    assert next(iter(changes)).replace("_", "-") in refusal(resume, interrupted).replace("_", "-")


def test_a_file_among_the_evaluations_is_passed_over(interrupted):
    (interrupted / "eval").mkdir(exist_ok=True)
    (interrupted / "eval" / "step_abc.json").write_text("{}")
    assert (resume(interrupted) / "model").is_dir()
