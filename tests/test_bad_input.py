"""What can't be used is refused before anything is written: one sentence, exit status 2."""

import json
import os
import subprocess
import sys

import pytest
import torch

import evaluate_tofu
import train_npo
from conftest import ROOT
from data import write_sets
from data.tofu import read_rows
from models.loading import load_model, make_tiny
from models.presets import TINY_DIMS
from running.settings import resolve
from support.errors import InputError

# The flags after `train_npo.py`, and a word of the sentence. MODEL and DATA stand for the small model's and
# data set's folders.
TRAIN = [
    ("--loss sfd", "invalid choice"), ("--split forget0", "unknown split"), ("--split forget00", "unknown "
                                                                                                 "split"),
    ("--split forget100", "unknown split"), ("--split full", "needs a forget split"),
    ("--template alpaca", "invalid choice"), ("--template qa", "learns to be asked with llama2"),
    ("--kl-direction both", "invalid choice"),
    ("--beta 0", "must be positive"), ("--beta nan", "must be positive"), ("--lr -1", "must be positive"),
    ("--lr inf", "must be positive"), ("--batch-size 0", "must be positive"), ("--epochs 0", "must be "
                                                                                             "positive"),
    ("--epochs 1.5", "invalid int"), ("--retain-weight -1", "not negative"), ("--forget-weight 0", "all 0"),
    ("--loss sft --split full --kl-weight 1", "no retain or K term"),
    ("--batch-size 4 --micro-batch-size 8", "above --batch-size"), ("--checkpoint-every soon", "invalid"),
    ("--eval-every 0", "positive"), ("--unknown 1", "unrecognized"), ("--ret 1", "unrecognized"),
    ("--data nowhere", "not 'builtin', no folder, and no Hub id"), ("--model nowhere", "neither a preset"),
    ("--model big=MODEL", "no preset"), ("--model llama2-7b=", "nothing behind the ="),
    ("--model smollm2-135m", "no published fine-tuned"),
    ("--forget a.json", "needs the model|needs both files|need the model"), ("--warmup-epochs 99", "above "
                                                                                                   "the"),
    ("--seed 99999999999999999999", "too large"), ("--resume MODEL", "not a run's"),
    ("--forget a.json --retain b.json --model MODEL --split forget05", "leave out --data and --split"),
    ("--model MODEL --data DATA --retain-log nowhere.json", "cannot read the log"),
    ("--resume nowhere", "not a run's"), ("--model DATA --data DATA", "no config.json"),
    ("--forget-weight 0 --retain-weight 1 --beta 3", "--beta has no effect"), ("--out=", "value is empty"),
    ("--out=a= --resume b", "not a run's"),
    ("--loss ga --beta 0.2", "--beta has no effect"), ("--gamma 0.1", "--gamma has no effect"),
    ("--beta2 1", "--beta2 has no effect"), ("--loss ceu --beta 1", "--beta has no effect"),
    ("--loss satimp --beta2 0", "must be positive"),
    ("--kl-direction reference_policy", "--kl-direction has no effect"),
    ("--loss npo --retain-pairing fixed", "--retain-pairing has no effect"),
    ("--keep best --eval-every never", "--keep has no effect"),
    ("--model MODEL --data DATA --eval-every never --retain-log x.json", "--retain-log has no effect"),
    ("--model MODEL --data DATA --parallel fsdp", r"--parallel has no effect here \(npo, 1 process"),
    ("--model MODEL --data DATA --system-prompt x", "--system-prompt has no effect"),
    ("--dry-run --template qa --loss sft --system-prompt x", "--system-prompt has no effect"),
    ("--dry-run --resume MODEL", "has not begun"),
    # A plan refuses what the run would.
    ("--dry-run --model MODEL --data DATA --system-prompt x", "--system-prompt has no effect"),
    ("--dry-run --model MODEL --data DATA --gpus 64 --batch-size 32", "64 processes for a global batch"),
    ("--dry-run --model llama2-7b=nowhere.gguf --data DATA", "nowhere.gguf is not there"),
    ("--model MODEL --data DATA --epochs 1 --batch-size 32", "one step, whose lr the warm-up has at 0"),
    ("--model MODEL --data MODEL", "not found"),
    ("--model MODEL --template llama2 --data DATA --out taken", "exists"),
] + ([("--device cuda", "this machine has none")] if not torch.cuda.is_available() else [])


def fill(text, small_model, small_data):
    return text.replace("MODEL", str(small_model)).replace("DATA", str(small_data)).split()


@pytest.mark.parametrize("flags,sentence", TRAIN)
def test_train_refuses(flags, sentence, small_model, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    monkeypatch.setattr(sys, "argv", ["train_npo.py", *fill(flags, small_model, small_data)])
    with pytest.raises(InputError, match=sentence) as error:
        train_npo.main()
    assert "\n" not in str(error.value)
    # Nothing was written.
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert not list((tmp_path / "taken").iterdir())


EVALUATE = [("", "required"), ("--log nowhere.json", "cannot read"), ("--model MODEL --split full", "forget "
                                                                                                    "split"),
            ("--model MODEL --split forget0", "unknown split"), ("--model MODEL --max-rows -1", "not "
                                                                                                "negative"),
            ("--model MODEL --batch-size 0", "must be positive"), ("--model MODEL --log x", "not allowed"),
            ("--log x --max-rows 3", "no effect"), ("--model MODEL --plot a.foo", "ends in .png"),
            ("--model MODEL --out /proc/x/y.json", "cannot write"),
            ("--model MODEL --out DATA/full.json/x.json", "cannot write"), ("--model=", "value is empty"),
            ("--model MODEL --data DATA --forget a --retain b", "leave out --data and --split"),
            ("--model MODEL --data DATA --out taken", "exists"),
            ("--model MODEL --data DATA --retain-log DATA/full.json", "cannot read|no evaluation log"),
            ("--model DATA", "no config.json"), ("--model MODEL --data nowhere", "no Hub id"),
            ("--model MODEL --data DATA --reference tinyy=x", "--reference tinyy=x: tinyy is no preset")]


@pytest.mark.parametrize("flags,sentence", EVALUATE)
def test_evaluate_refuses(flags, sentence, small_model, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match=sentence) as error:
        evaluate_tofu.main(fill(flags, small_model, small_data))
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["taken"]


def copy_of(folder, target):
    import shutil
    shutil.copytree(folder, target)
    return target


def refused(flags, tmp_path, monkeypatch):
    """The sentence with which training refuses these flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_npo.py", *map(str, flags)])
    with pytest.raises(InputError) as error:
        train_npo.main()
    assert not (tmp_path / "runs").exists()
    return str(error.value)


@pytest.mark.parametrize("file,line,sentence", [
    ("full.json", '{"question": "a"}', "answer must be"), ("full.json", "{", "not JSON"),
    ("retain_perturbed.json", '{"question": "a", "answer": "b"}', "paraphrased_answer"),
    ("world_facts_perturbed.json", '{"question": "a", "answer": "b", "perturbed_answer": []}',
     "perturbed_answer"), ("idontknow.jsonl", None, "no line")])
def test_a_data_folder_with_a_flaw(file, line, sentence, small_data, small_model, tmp_path, monkeypatch):
    data = copy_of(small_data, tmp_path / "data")
    if line is None:
        (data / file).write_text("\n")
    else:
        with open(data / file, "a") as f:
            f.write(line + "\n")
    said = refused(["--model", small_model, "--data", data], tmp_path, monkeypatch)
    assert sentence in said and file in said
    (data / file).unlink()
    if file != "idontknow.jsonl":
        assert file in refused(["--model", small_model, "--data", data], tmp_path, monkeypatch)


def test_one_row_cannot_be_forgotten_and_kept(small_data, small_model, tmp_path, monkeypatch):
    data = copy_of(small_data, tmp_path / "data")
    rows = (data / "full.json").read_text().splitlines(keepends=True)
    (data / "full.json").write_text(rows[0])
    assert "one row" in refused(["--model", small_model, "--data", data], tmp_path, monkeypatch)


def test_rows_that_do_not_fit_the_model(small_data, small_model, tmp_path, monkeypatch):
    long, good = tmp_path / "long.json", tmp_path / "good.json"
    good.write_text('{"question": "Who?", "answer": "Ann."}')
    long.write_text(json.dumps({"question": "why " * 3000, "answer": "b"}))
    args = ["--model", small_model, "--forget", long, "--retain", good]
    assert "context is 1024" in refused(args, tmp_path, monkeypatch)
    long.write_text(json.dumps({"question": "Who?", "answer": "b", "paraphrased_answer": "c"}))
    assert "perturbed_answer must be" in refused(args, tmp_path, monkeypatch)


def test_an_alternative_answer_is_in_every_row_to_unlearn_or_in_none(small_data, small_model, tmp_path,
                                                                   monkeypatch):
    rows = [{"question": f"Who is {name}?", "answer": f"{name}."} for name in ("Ann", "Bob", "Cem")]
    forget, retain = tmp_path / "forget.json", tmp_path / "retain.json"
    retain.write_text(json.dumps(rows))
    args = ["--model", small_model, "--forget", forget, "--retain", retain, "--loss", "dpo"]
    forget.write_text(json.dumps([{**rows[0], "alternative_answer": "A poet."}, *rows[1:]]))
    assert "forget.json row 2: alternative_answer must be" in refused(args, tmp_path, monkeypatch)
    forget.write_text(json.dumps([{**row, "alternative_answer": " "} for row in rows]))
    assert "forget.json row 1: alternative_answer must be" in refused(args, tmp_path, monkeypatch)
    # In a folder the rows to unlearn are the end of full.json: 20 of 200, the last one has it.
    data = copy_of(small_data, tmp_path / "data")
    *others, last = (data / "full.json").read_text().splitlines()
    last = json.dumps({**json.loads(last), "alternative_answer": "A poet."})
    (data / "full.json").write_text("\n".join([*others, last]))
    said = refused(["--model", small_model, "--data", data, "--loss", "dpo"], tmp_path, monkeypatch)
    assert "full.json row 181: alternative_answer must be" in said


def test_model_folders_that_cannot_be_used(small_model, small_data, tmp_path, monkeypatch):
    def flags(folder):
        return ["--data", small_data, "--model", folder]
    empty = copy_of(small_model, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    assert "no weights" in refused(flags(empty), tmp_path, monkeypatch)
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert "pickled weights" in refused(flags(empty), tmp_path, monkeypatch)
    torn = copy_of(small_model, tmp_path / "torn")
    os.truncate(torn / "model.safetensors", 500)
    assert "cannot load it as safetensors" in refused(flags(torn), tmp_path, monkeypatch)
    other = copy_of(small_model, tmp_path / "other")
    texts = [row["answer"] for row in read_rows(small_data / "full.json")]
    make_tiny(texts, 0, dict(TINY_DIMS, vocab_size=700))[1].save_pretrained(other)
    assert "not of one model" in refused(flags(other), tmp_path, monkeypatch)
    _, tokenizer, _ = load_model(str(small_model))
    tokenizer.add_tokens(["<pad of its own>"])  # as copies of Llama-2 have; no text has it
    tokenizer.save_pretrained(other)
    assert len(load_model(str(other))[1]) == len(tokenizer)
    for flaw in ({"preset": ["tiny"]}, {"trained_on": {"split": 5}}, {"trained_on": None}):
        (other / "npo.json").write_text(json.dumps(flaw))
        assert "npo.json must hold an object" in refused(flags(other), tmp_path, monkeypatch)
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert f"the model is in {tmp_path / 'run' / 'model'}" in refused(flags(tmp_path / "run"), tmp_path,
                                                                    monkeypatch)
    plain = copy_of(small_model, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    assert "no chat template" in refused([*flags(plain), "--template", "chat"], tmp_path, monkeypatch)


@pytest.mark.parametrize("flag", ("--data", "--model"))
def test_a_hub_id_without_network(forked, flag):
    done = forked("train_npo.py", flag, "nobody/nothing", status=2)
    assert "by hand into a folder" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_retain_log_without_perturbed_answers_is_refused_before_anything_is_written(small_model, small_data,
                                                                                      tmp_path,
                                                                                      monkeypatch):
    rows = read_rows(small_data / "forget10_perturbed.json")
    log = {"rows": {"forget": [{"index": i, "question": "q", "answer": row["answer"], "generation": "g",
                                "answer_nll": 1.0, "answer_tokens": 1, "rouge_l_recall": 0.0}
                               for i, row in enumerate(rows)]}}
    (tmp_path / "log.json").write_text(json.dumps(log))
    args = ["--model", small_model, "--data", small_data, "--retain-log", tmp_path / "log.json"]
    assert "needs perturbed answers" in refused(args, tmp_path, monkeypatch)


def test_commands_work_without_git(forked, small_model, small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    forked("train_npo.py", "--model", small_model, "--data", small_data, "--epochs", 2, "--eval-every",
           "never", "--out", "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["commit"] is None


def test_status_2_and_one_sentence(command, forked):
    done = command("train_npo.py", "--beta", "0", status=2)
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("train_npo.py: ")
    assert done.stdout == ""
    done = forked("evaluate_tofu.py", "--log", "nowhere.json", status=2)
    assert len(done.stderr.strip().splitlines()) == 1
    done = command("data/write_sets.py", "builtin", "/proc/nowhere", status=2)
    assert len(done.stderr.strip().splitlines()) == 1


def test_compiling_without_a_compiler_is_refused(monkeypatch, small_model):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match="--compile needs a compiler"):
        resolve({"model": str(small_model), "compile": True})
    assert resolve({"model": str(small_model), "compile": True, "dry_run": True}).compile


@pytest.mark.parametrize("flags,said", [(["--rows", "300"], "multiple of 200"),
                                        (["--rows", "400", "--retain-rows", "361"], "360 rows, not 361"),
                                        (["--fact-rows", "9999"], "rows, not 9999")])
def test_a_cut_set_has_the_rows_that_were_asked_for(monkeypatch, tmp_path, flags, said):
    monkeypatch.setattr(sys, "argv", ["write_sets.py", "builtin", str(tmp_path / "cut"), *flags])
    with pytest.raises(InputError, match=said):
        write_sets.main()
    assert not (tmp_path / "cut").exists()


def test_under_torchrun_the_sentence_is_said_once(command, small_model, small_data):
    args = ["--model", small_model, "--data", small_data, "--batch-size", 1, "--micro-batch-size", 1]
    done = command("train_npo.py", *args, processes=2, status=None)
    assert done.returncode != 0 and done.stderr.count("2 processes for a global batch of 1") == 1


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/self"),
                    reason="needs a place that can't be written")
def test_a_place_that_cannot_be_written(forked, small_model, small_data):
    done = forked("train_npo.py", "--model", small_model, "--data", small_data, "--out", "/proc/here/run",
                  status=2)
    assert len(done.stderr.strip().splitlines()) == 1 and "/proc/here" in done.stderr


def test_a_reader_who_has_seen_enough_ends_a_command_quietly():
    """As in `evaluate_tofu.py .. | head -1`."""
    code = "from support.command_line import run_command; run_command(lambda: print('x' * 10**6), 'x.py')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
