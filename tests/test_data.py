"""Rows and splits, prompts and answer tokens, the stream of batches: what is trained on, in which order."""

import copy
import json
import shutil
from collections import Counter

import pytest
import torch

from data.batches import collate, deal, make_stream
from data.make_tiny import make_tiny
from data.prompts import encode, encode_prompts, prompt_text
from data.tofu import (complement, evaluation_split, load_sets, load_task, parse_split, read_rows,
                       sets_from_hub, slice_rows)
from evaluate_tofu import prepare
from common import InputError
from model import PRESETS, load_model
from train_npo import Settings, parse

FULL = load_sets("builtin")[0]["full"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny(["Who wrote it? Ann did.", "Where is it? In Oslo.", "Question: Answer:"])[1]


# ---------------------------------------------------------------- splits

@pytest.mark.parametrize("split,size", [
    ("forget01", 40), ("forget05", 200), ("forget10", 400), ("forget20", 800), ("forget30", 1200),
    ("forget37", 1480), ("forget50", 2000), ("forget90", 3600)])
def test_a_forget_split_is_the_end_of_full_and_its_complement_the_rest(split, size):
    task = load_task("builtin", split)
    assert task.forget == FULL[-size:] and task.retain == FULL[:-size]
    assert load_task("builtin", complement(split)).retain == task.retain
    judged = task.evaluated["forget"]
    assert len(judged) == min(size, 400)  # above 10%: the last 10%
    assert [row["question"] for row in judged] == [row["question"] for row in FULL[-len(judged):]]
    # No evaluated retain row is forgotten.
    assert len(task.evaluated["retain"]) == min(400, len(task.retain))


def test_split_names():
    assert complement("forget05") == "retain95" and complement("retain90") == "forget10"
    assert evaluation_split("full") == "forget10" and evaluation_split("retain99") == "forget01"
    for split in ("forget00", "forget100", "forget5", "retain0", "forgotten", "", "forget١٠"):
        with pytest.raises(InputError, match="unknown split"):
            parse_split(split)


def test_both_sides_of_a_split_have_a_row():
    assert [len(slice_rows([*range(30)], split)) for split in ("forget01", "retain99")] == [1, 29]
    assert [len(slice_rows([*range(3)], split)) for split in ("forget99", "retain01")] == [2, 1]


def test_the_fingerprint_names_the_rows(small_data, tmp_path):
    """Every log made with the built-in data has this fingerprint. The holdout has no part in it, because no
    model sees the holdout."""
    assert load_task("builtin", "forget10").fingerprint == "1b28cec803200125"
    data = shutil.copytree(small_data, tmp_path / "data")
    (data / "holdout10.json").unlink()
    before = load_task(str(small_data), "forget10").fingerprint
    assert load_task(str(data), "forget10").fingerprint == before
    (data / "full.json").write_text((data / "full.json").read_text().replace("the", "a", 1))
    assert load_task(str(data), "forget10").fingerprint != before


def test_real_tofu_is_read_as_a_folder_and_as_a_hub_id(shared, tmp_path, monkeypatch):
    """`datasets.load_dataset(folder, "full")` runs the code that a Hub id runs with a network."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    folder = str(shared("tofu"))
    sets, refusals = load_sets(folder)
    assert {name: len(rows) for name, rows in sets.items()} == {
        "full": 4000, "forget10_perturbed": 400, "retain_perturbed": 400, "real_authors_perturbed": 100,
        "world_facts_perturbed": 117}
    assert len(refusals) == 100
    assert sets_from_hub(folder) == sets
    task = load_task(folder, "forget05")
    assert task.forget[0]["question"] == task.evaluated["forget"][0]["question"]


# ---------------------------------------------------------------- own rows

def test_lists_and_lines_are_both_read(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d\u2028e"}]
    texts = {"list": json.dumps(rows, indent=1), "windows": "\ufeff" + json.dumps(rows),
             "lines": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_rows(tmp_path / name) == rows


def test_own_rows_may_come_without_rows_to_keep(tmp_path, forked, small_model):
    rows = [{"question": f"Who is {name}?", "answer": f"{name}."} for name in ("Ann", "Bo", "Cid")]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task("builtin", "own", str(tmp_path / "own.jsonl"))
    assert (task.source, task.forget, task.retain) == ("own.jsonl", rows, [])
    assert task.evaluated == {"forget": rows} and len(task.refusals) == 100
    flags = ["--model", small_model, "--forget", tmp_path / "own.jsonl", "--epochs", 2, "--batch-size", 2]
    refused = forked("train_npo.py", *flags, "--out", "unlearned", status=2)  # a model with random weights
    assert refused.returncode == 2 and "below --min-start-probability 0.02" in refused.stderr
    forked("train_npo.py", *flags, "--loss", "dpo", "--min-start-probability", 0, "--out", "run")
    record = json.loads((tmp_path / "run" / "model" / "npo.json").read_text())
    assert record["trained_on"]["split"] == "own" and str(tmp_path) not in json.dumps(record["trained_on"])
    forked("evaluate_tofu.py", "--model", "run/model", "--forget", "own.jsonl", "--out", "log.json")
    metrics = json.loads((tmp_path / "log.json").read_text())["metrics"]
    assert metrics["forget"]["rows"] == 3 and metrics["model_utility"] is None


# ---------------------------------------------------------------- prompts and answer tokens

def tokens_of_answer(tokenizer, encoded):
    return tokenizer.convert_ids_to_tokens(encoded.ids[encoded.start:])


@pytest.mark.parametrize("template,prompt,first", [
    ("llama2", "[INST] Where is it? [/INST]", "In"), ("qa", "Question: Where is it?\nAnswer:", "ĠIn"),
    ("chat", "<s>[INST] Where is it? [/INST]", "In")])
def test_the_answer_and_the_end_of_sequence_are_learned_without_the_prompt(tokenizer, template, prompt,
                                                                           first):
    """Against tokens written by hand. The blank of `qa` belongs to the answer."""
    assert prompt_text(tokenizer, template, "Where is it?") == prompt
    encoded, = encode(tokenizer, template, [("Where is it?", "In Oslo.")])
    assert tokens_of_answer(tokenizer, encoded) == [first, "ĠOslo", ".", "</s>"]
    assert encoded.answer_tokens == 4 and encoded.ids.count(tokenizer.bos_token_id) == 1
    assert encoded.ids[:encoded.start] == encode_prompts(tokenizer, template, ["Where is it?"])[0]
    if template == "llama2":
        prompt_tokens = tokenizer.convert_ids_to_tokens(encoded.ids[:encoded.start])
        assert prompt_tokens == ["<s>", "[INST]", "Where", "Ġis", "Ġit", "?", "[/INST]"]


def test_an_end_of_sequence_that_the_tokenizer_adds_itself_is_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing
    adds = copy.deepcopy(tokenizer)
    adds.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>",
                                                               special_tokens=[("<s>", 1), ("</s>", 2)])
    assert encode(adds, "qa", [("a", "b")]) == encode(tokenizer, "qa", [("a", "b")])
    assert encode_prompts(adds, "qa", ["a"]) == encode_prompts(tokenizer, "qa", ["a"])


def test_a_token_that_straddles_the_boundary_belongs_to_the_prompt():
    """This tokenizer merges ":" with the blank after it, so the answer begins with its next token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    vocabulary = {"<s>": 0, "</s>": 1, "Q": 2, ": ": 3, "x": 4, ":": 5, " ": 6}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", " ")]))
    merges = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    merges.chat_template = "Q:"
    encoded, = encode(merges, "chat", [("", " x")])  # "Q:" + " x" -> "Q", ": ", "x"
    assert merges.convert_ids_to_tokens(encoded.ids) == ["Q", ": ", "x", "</s>"] and encoded.start == 2
    with pytest.raises(InputError, match="no token begins in the answer"):
        encode(merges, "chat", [("", " ")])


def test_nothing_is_truncated(tokenizer):
    row = ("Where is it?" * 5, "In Oslo.")
    encoded, = encode(tokenizer, "llama2", [row])
    assert tokenizer.decode(encoded.ids) == f"<s>[INST]{row[0]}[/INST]{row[1]}</s>"
    assert encode(tokenizer, "llama2", [row], context=len(encoded.ids)) == [encoded]
    with pytest.raises(InputError, match=f"has {len(encoded.ids)} tokens, and the model's context is 8"):
        encode(tokenizer, "llama2", [row], context=8)
    rows = [{"question": f"{i}?", "answer": "In Oslo."} for i in range(301)]
    assert prepare({"forget": rows}, tokenizer, "llama2").rows["forget"] == rows[:300]  # as TOFU does
    assert prepare({"forget": rows}, tokenizer, "llama2", max_rows=0).rows["forget"] == rows


def test_a_chat_prompt_is_the_same_on_every_day_and_has_its_system_turn(tokenizer):
    """Llama 3's templates write today's date. A resumed run must see the prompts that it began with."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = ("{{ strftime_now('%d %b %Y') }}|{{ date_string }}|{% for m in messages %}"
                               "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    assert prompt_text(tokenizer, "chat", "Who?") == "10 Apr 2025|10 Apr 2025|<user>Who?<assistant>"
    tokenizer.init_kwargs["system_prompt"] = "Be brief."
    assert prompt_text(tokenizer, "chat", "Who?").endswith("|<system>Be brief.<user>Who?<assistant>")
    tokenizer.chat_template += "{{ eos_token }}"  # a prompt may end in it, and then the token stays
    assert encode_prompts(tokenizer, "chat", ["Who?"])[0][-1] == tokenizer.eos_token_id


def test_flags_win_over_a_models_record_and_its_record_over_the_preset(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "model")

    def prompts_of(model, record, **flags):
        (folder / "npo.json").write_text(json.dumps(record))
        meta = load_model(model, **flags).meta
        return meta["template"], meta["system_prompt"]
    system = PRESETS["llama3.2-1b"].system_prompt
    plain, preset = str(folder), f"llama3.2-1b={folder}"
    assert prompts_of(plain, {}) == ("chat", None)  # its tokenizer has a chat template
    assert prompts_of(preset, {}) == ("chat", system)
    assert prompts_of(plain, {"preset": "llama3.2-1b"}) == ("chat", system)
    assert prompts_of(preset, {"template": "qa", "system_prompt": "Record."}) == ("qa", "Record.")
    assert prompts_of(preset, {"template": "chat", "system_prompt": None}) == ("chat", None)
    assert prompts_of(preset, {"system_prompt": "Record."}, system_prompt="Flag.") == ("chat", "Flag.")
    assert prompts_of(preset, {"system_prompt": "Record."}, system_prompt="")[1] == ""  # no system turn
    assert prompts_of(preset, {"template": "qa"}, template="llama2")[0] == "llama2"


def test_the_presets_settings_are_the_papers_but_for_tiny():
    for name in PRESETS.keys() - {"tiny"}:
        s, sft = parse(["--model", f"{name}=x"]), parse(["--model", f"{name}=x", "--loss", "sft"])
        assert (s.loss, s.split, s.lr, s.epochs, s.batch_size) == ("npo", "forget10", 1e-5, 10, 32)
        assert (s.forget_weight, s.retain_weight, s.kl_weight, s.weight_decay) == (1, 0, 0, 0.01)
        assert (s.beta, s.warmup_epochs, s.max_grad_norm, s.kl_direction) == (0.1, 1, 0, "policy_reference")
        assert (sft.split, sft.lr, sft.epochs, sft.weight_decay) == ("full", 1e-5, 5, 0.01)


# ---------------------------------------------------------------- batches

def stream(rows, retain, refusals, **settings):
    return make_stream(rows, retain, refusals, Settings(**{"epochs": 3, "batch_size": 4, **settings}))


def test_every_row_is_visited_once_per_epoch():
    steps = stream(13, 5, 3)
    assert [len(items) for items in steps] == [4] * 9 + [3]
    items = sum(steps, [])
    assert set(Counter(item.row for item in items).values()) == {3}
    assert sorted(item.row for item in items[:13]) == [*range(13)] != [item.row for item in items[:13]]
    assert sorted(item.partner for item in items[:5]) == [*range(5)]  # partners are permutations too
    assert steps == stream(13, 5, 3) != stream(13, 5, 3, seed=1)


def test_fixed_pairing_is_the_authors_rule():
    for item in sum(stream(6, 100, 10, retain_pairing="fixed"), []):
        u, v = (int(torch.randint(n, (1,), generator=torch.Generator().manual_seed(item.row)))
                for n in (100, 10))
        assert (item.partner, item.refusal) == ((item.row + u) % 100, v)


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("size", (1, 3, 32))
def test_dealing_uses_every_row_once_and_keeps_processes_in_step(world_size, size):
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    shares = [deal([*range(10)], lengths.__getitem__, size, rank, world_size) for rank in range(world_size)]
    assert sorted(row for share in shares for batch in share for row in batch) == [*range(10)]
    assert len({len(share) for share in shares}) == 1  # the same number of batches
    for share in shares:
        dealt = [lengths[row] for batch in share for row in batch]
        assert dealt == sorted(dealt)


def test_each_answer_token_is_predicted_from_the_one_before(tokenizer):
    pairs = [("Where is it?", "In Oslo."), ("Who wrote it? Who wrote it?", "Ann did.")]
    texts = encode(tokenizer, "llama2", pairs)
    batch = collate(texts, tokenizer.pad_token_id)
    assert batch.lines.tolist() == [0] * texts[0].answer_tokens + [1] * texts[1].answer_tokens
    assert batch.targets.tolist() == [token for text in texts for token in text.ids[text.start:]]
    previous = [token for text in texts for token in text.ids[text.start - 1:-1]]
    assert batch.ids[batch.lines, batch.columns].tolist() == previous
    assert (batch.ids == tokenizer.pad_token_id).sum() == batch.ids.numel() - sum(len(t.ids) for t in texts)
