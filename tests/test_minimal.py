"""minimal_npo.py, the method on one page, is the oracle of train_npo.py."""

import re

import pytest
from conftest import assert_close, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import minimal_npo
import train_npo
from data.batches import make_stream
from data.prompts import encode
from data.tofu import load_task


@pytest.mark.parametrize("model", ("small", "tiny"))
def test_train_npo_ends_at_the_weights_of_the_method_on_one_page(model, small_model, small_data, tmp_path):
    """Three epochs of 20 rows in batches of 8, the last of 4, in micro-batches of 3 against 16."""
    folder = small_model if model == "small" else minimal_npo.MODEL
    flags = ["--loss", "npo", "--retain-weight", "1", "--model", str(folder), "--data", str(small_data),
             "--epochs", "3", "--batch-size", "8", "--micro-batch-size", "3", "--lr", "2e-3", "--beta", "0.3",
             "--weight-decay", "0.1", "--eval-every", "never"]
    train_npo.main([*flags, "--out", str(tmp_path / "run")])
    trained = weights(tmp_path / "run" / "model")

    tokenizer, task = AutoTokenizer.from_pretrained(folder), load_task(str(small_data), "forget10")
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    rows, partners = (encode(tokenizer, "llama2", [(row["question"], row["answer"]) for row in pairs])
                      for pairs in (task.forget, task.retain))
    stream = make_stream(len(rows), len(partners), 0, train_npo.parse(flags))
    steps = list(minimal_npo.unlearn(policy, reference, rows, partners, stream, lr=2e-3, beta=0.3,
                                     weight_decay=0.1))
    assert len(steps) == 8
    assert steps[0][1] == pytest.approx(1) and steps[-1][1] < 0.999  # W
    parameters = {name: p.detach() for name, p in policy.named_parameters()}
    assert_close({name: parameters[name] for name in trained}, trained, 1e-5)


def test_the_page_says_what_it_sees(monkeypatch, capsys):
    monkeypatch.setattr(minimal_npo, "EPOCHS", 1)
    minimal_npo.main()
    epoch, *answers = capsys.readouterr().out.splitlines()
    loss, w, forget, retain = map(float, re.findall(r"\d+\.\d+", epoch))
    assert epoch.startswith("epoch  1") and loss < 2.9 and w < 0.9 and forget < retain
    assert [line[:8].strip() for line in answers if line] == ["forget", "truth", "before", "now"] * 2 + [
        "retain", "truth", "before", "now"]
