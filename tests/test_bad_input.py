"""What cannot be used is refused before anything is written, with one sentence and exit status 2."""

import errno
import json
import math
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate_tofu
import train_npo
from common import ROOT, InputError, run_command, write_json
from data.make_tiny import DIMS, make_tiny
from data.tofu import BUILTIN
from model import ALONE, read_model
from train_npo import begin_run, parse

# The flags after `train_npo.py`, and words of the sentence. MODEL and DATA stand for a small model's and a
# small data set's folders.
TRAIN = [
    ("--loss sfd", "invalid choice"), ("--unknown 1", "unrecognized"), ("--ret 1", "unrecognized"),
    ("--split forget0", "unknown split"), ("--split forget100", "unknown split"),
    ("--split full", "needs a forget split"), ("--split retain90", "needs a forget split"),
    ("--template alpaca", "invalid choice"), ("--model MODEL --data DATA --system-prompt foo", "chat alone"),
    ("--template qa", "was trained with llama2"),
    ("--kl-direction both", "invalid choice"), ("--epochs 1.5", "invalid int"),
    ("--beta 0", "must be positive"), ("--beta nan", "must be positive"), ("--lr -1", "must be positive"),
    ("--lr inf", "must be positive"), ("--batch-size 0", "must be positive"),
    ("--epochs 0", "must be positive"), ("--retain-weight -1", "not negative"),
    ("--loss sft --kl-weight 1", "no terms on retain rows"), ("--checkpoint-every soon", "need minutes"),
    ("--eval-every 0", "need epoch, end, never"), ("--loss ga --beta 0.2", "--beta has no effect on ga"),
    ("--loss ceu --beta 1", "--beta has no effect"), ("--gamma 0.1", "--gamma has no effect on npo"),
    ("--beta2 1", "--beta2 has no effect on npo"),
    ("--kl-direction reference_policy", "--kl-direction has no effect on npo"),
    ("--data nowhere --model MODEL", "full.json, .* not found"), ("--data MODEL --model MODEL", "not found"),
    ("--data nobody/nothing --model MODEL", "without network"), ("--model nowhere", "need a preset"),
    ("--model nobody/nothing", "without network"), ("--model big=MODEL", "need a preset"),
    ("--model smollm2-135m", "no published fine-tuned checkpoint"), ("--model DATA", "cannot load it"),
    ("--forget a.json --model MODEL --retain-weight 1", "give --retain FILE"),
    ("--retain a.json --model MODEL", "--retain needs --forget"),
    ("--forget a.json --model MODEL --split forget05", "leave those out"),
    ("--forget a.json --model MODEL --loss sft", "leave those out"),
    ("--forget nowhere.json --model MODEL", "cannot read nowhere.json"),
    ("--retain-log nowhere.json", "cannot read the log nowhere.json"),
    ("--retain-log DATA/full.json", "cannot read the log"), ("--resume nowhere", "needs a run's folder"),
    ("--resume MODEL", "needs a run's folder"), ("--resume nowhere --lr 1e-3", "leave out --lr"),
    ("--model MODEL --data DATA --epochs 1", "give 1 step"), ("--out taken", "taken exists"),
    ("--lora 8 --parallel fsdp", "--lora needs --parallel ddp"),
] + ([] if torch.cuda.is_available() else [("--device cuda", "has no such device")])
EVALUATE = [
    ("", "required"), ("--model MODEL --log x", "not allowed"), ("--log nowhere.json", "cannot read the log"),
    ("--model MODEL --split full", "need a forget split"), ("--model MODEL --split forget0", "unknown split"),
    ("--model MODEL --max-rows -1", "not negative"), ("--model MODEL --batch-size 0", "must be positive"),
    ("--model MODEL --data nowhere", "not found"), ("--model DATA", "cannot load it"),
    ("--model MODEL --retain b --data DATA", "--retain needs --forget"),
    ("--model MODEL --forget a.json --data DATA", "leave those out"),
    ("--model MODEL --data DATA --retain-log DATA/full.json", "cannot read the log"),
    ("--model MODEL --data DATA --reference nowhere", "need a preset"),
    ("--log x --max-rows 5", "--max-rows has no effect with --log"),
    ("--log x --reference MODEL", "--reference has no effect with --log")]


@pytest.mark.parametrize("script,flags,sentence", [(train_npo, *case) for case in TRAIN]
                         + [(evaluate_tofu, *case) for case in EVALUATE])
def test_it_is_refused(script, flags, sentence, small_model, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "a.json").write_text('{"question": "Who?", "answer": "Ann."}')
    flags = flags.replace("MODEL", str(small_model)).replace("DATA", str(small_data))
    with pytest.raises(InputError, match=sentence) as error:
        script.main(flags.split())
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "taken"]  # nothing was written


@pytest.fixture
def refused(tmp_path, small_model, small_data, monkeypatch):
    """refused(model=FOLDER, ..) is the sentence with which training refuses these flags."""
    def refusal(*words, **flags):
        flags = {"model": small_model} | flags
        if "forget" not in flags:
            flags.setdefault("data", small_data)
        with pytest.raises(InputError) as error:
            train_npo.main([*words, *(str(word) for name, value in flags.items() for word in
                                      (f"--{name.replace('_', '-')}", value))])
        assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()
        return str(error.value)
    monkeypatch.chdir(tmp_path)
    return refusal


@pytest.mark.parametrize("file,line,sentence", [
    ("full.json", '{"question": "a"}', "row 201: answer must be a non-empty text, got {"),
    ("full.json", "{", "line 201: not JSON"),
    ("full.json", '{"question": " ", "answer": "b"}', "row 201: question must be"),
    ("forget10_perturbed.json", '{"question": "a", "answer": "b", "paraphrased_answer": "c", '
     '"perturbed_answer": ["d"]}', "are not the last of full.json")])
def test_a_flaw_in_a_data_folder_is_named_by_row(file, line, sentence, small_data, tmp_path, refused):
    data = shutil.copytree(small_data, tmp_path / "data")
    with open(data / file, "a") as stream:
        stream.write(line + "\n")
    message = refused(data=data)
    assert sentence in message and file in message
    (data / file).unlink()
    assert f"{file} not found" in refused(data=data)
    (data / file).write_text("\n")
    assert file in (message := refused(data=data)) and "has no rows" in message


def test_own_rows_with_a_flaw(tmp_path, refused):
    good, forget = tmp_path / "good.json", tmp_path / "forget.json"
    rows = [{"question": f"Who is {name}?", "answer": f"{name}."} for name in ("Ann", "Bo", "Cid", "Dee")]
    good.write_text(json.dumps(rows[:3]))

    def refusal(row, **flags):
        content = [{"question": "a", "answer": "b"}, row, {"question": "c", "answer": "d"}]
        forget.write_text(json.dumps(content))
        return refused(forget=forget, retain=good, **flags)
    assert "1 rows are in --forget and in --retain, such as 'Who is Bo?'" in refusal(rows[1])
    assert "1 rows are in" in refusal({"question": " Who is\u00a0BO? ", "answer": "bo."})
    assert "forget.json row 2: question must be a non-empty text" in refusal("a")
    for field in ({"perturbed_answer": "Dee."}, {"perturbed_answer": [1]}, {"paraphrased_answer": 5}):
        assert "row 2: perturbed_answer must be a list of texts, and para" in refusal(rows[3] | field)
    assert "context is 512" in refusal({"question": "why " * 600, "answer": "b"}, batch_size=2)


def test_model_folders_that_cannot_be_used(small_model, small_data, tmp_path, refused):
    (tmp_path / "adapters").mkdir()  # what peft saves: no model.safetensors
    (tmp_path / "adapters" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "cannot load it as safetensors" in refused(model=tmp_path / "adapters")
    other = make_tiny([chr(400 + i) * 2 for i in range(2500)], 0, DIMS | {"vocab_size": 3000})[1]
    large = shutil.copytree(small_model, tmp_path / "large")
    other.save_pretrained(large)
    assert "embedding has rows" in refused(model=large)
    added = AutoTokenizer.from_pretrained(small_model)
    added.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    added.chat_template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    added.save_pretrained(unready := shutil.copytree(small_model, tmp_path / "added"))
    assert "its tokenizer writes token 2048" in refused(model=unready, template="chat")
    (unready / "config.json").unlink()
    assert "config.json" in refused(model=unready)
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert f"the model is in {tmp_path / 'run'}/model" in refused(model=tmp_path / "run")
    plain = shutil.copytree(small_model, tmp_path / "plain", ignore=shutil.ignore_patterns("*.jinja"))
    assert "chat template fails" in refused(model=plain, template="chat")


def test_rows_that_the_tiny_model_may_not_know_are_noted(small_data, tmp_path, capsys):
    (tmp_path / "a.json").write_text('[{"question": "Who?", "answer": "Ann."}]')
    for flag, rows in (("--data", small_data), ("--forget", tmp_path / "a.json"), ("--data", BUILTIN)):
        begin_run(parse([flag, str(rows), "--batch-size", "1", "--out", f"{tmp_path}/a{rows.name}"]), ALONE)
        assert ("may not know" in capsys.readouterr().out) == (rows != BUILTIN)


def test_logs_and_references_of_the_wrong_kind(small_model, small_data, tmp_path, refused):
    data = shutil.copytree(small_data, tmp_path / "data")
    shutil.copy(data / "forget10_perturbed.json", data / "retain_perturbed.json")
    assert "retain_perturbed.json has questions of forget10" in refused(data=data)
    log = json.loads((ROOT / "data/tiny/retrained_forget10.json").read_text())
    log["provenance"]["trained_on"]["loss"] = "npo+rt"
    (tmp_path / "log.json").write_text(json.dumps(log))
    assert "of an unlearned model (npo+rt)" in refused(retain_log=tmp_path / "log.json")
    other = shutil.copytree(small_model, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["Ulmer"])
    tokenizer.save_pretrained(other)
    flags = ["--model", str(small_model), "--data", str(small_data), "--reference", str(other)]
    with pytest.raises(InputError, match="another tokenizer"):
        evaluate_tofu.main(flags)


@pytest.mark.parametrize("number", (math.nan, math.inf))
def test_a_number_that_is_not_finite_is_never_written(tmp_path, number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "new" / "file.json", {"loss": [number]})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- as a user sees it

def test_status_2_and_one_sentence(command, small_model):
    for script, *flags in (("train_npo.py", "--beta", 0), ("evaluate_tofu.py", "--log", "nowhere.json"),
                           ("data/make_tiny.py", "--only", "x"), ("data/cut_tofu.py", "builtin"),
                           ("synthetic.py", "--methods", "no"), ("theory_check.py", "--seed", "-1"),
                           ("train_npo.py", "--model", small_model, "--out", "/proc/x/y")):
        done = command(script, *flags, status=2)
        assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""
        assert done.stderr.startswith(f"{script.split('/')[-1]}: ")


def test_commands_work_without_git(forked, small_model, small_data, tmp_path, monkeypatch):
    (tmp_path / "true").symlink_to(shutil.which("true"))
    monkeypatch.setenv("PATH", str(tmp_path))
    forked("train_npo.py", "--model", small_model, "--data", small_data, "--epochs", 2,
           "--eval-every", "never", "--out", "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["commit"] is None


def test_a_start_with_a_nan_is_refused(small_model, tmp_path, refused):
    lm = AutoModelForCausalLM.from_pretrained(small_model)
    lm.model.norm.weight.data[0] = math.nan
    folder = shutil.copytree(small_model, tmp_path / "nan")
    lm.save_pretrained(folder)
    assert "logits are not finite" in refused(model=folder)


def test_router_noise_is_off_and_other_noise_is_refused(small_model, tmp_path, refused, monkeypatch):
    lm = AutoModelForCausalLM.from_pretrained(small_model)
    lm.config.router_jitter_noise = 0.01
    folder = shutil.copytree(small_model, tmp_path / "noise")
    lm.save_pretrained(folder)
    assert read_model(folder, "noise")[0].config.router_jitter_noise == 0
    head = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: head(self, x) + 0.01 * self.training)
    assert "other logits in training mode" in refused(model=small_model)


def test_a_full_disk_ends_in_a_sentence(monkeypatch, capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit, match="2"):
        run_command(full)
    assert "make room" in capsys.readouterr().err
