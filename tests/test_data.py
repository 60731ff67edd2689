"""Splits, answer tokens, the batch stream: what is trained on, and in which order."""

import copy
import json
import shutil
from argparse import Namespace
from collections import Counter

import pytest
import torch

from data.batches import collate, deal, make_stream
from data.prompts import encode, encode_prompts, prompt_text, system_prompt_of
from data.tofu import complement, evaluation_split, load_sets, load_task, read_rows, slice_rows
from evaluation import scoring
from models.loading import make_tiny, prompt_template
from models.presets import PRESETS, TINY_DIMS, split_model
from running.settings import resolve
from support.errors import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny(["Who wrote it? Ann did.", "Where is it? In Oslo.", "Question: Answer:"], 0,
                     TINY_DIMS)[1]


@pytest.mark.parametrize("split,size",
                         [("forget01", 40), ("forget05", 200), ("forget10", 400), ("forget20", 800),
                                        ("forget30", 1200), ("forget50", 2000), ("forget90", 3600),
                                        ("forget37", 1480)])
def test_split_sizes_and_slices(split, size):
    task = load_task("builtin", split)
    assert len(task.forget) == size
    assert task.forget == task.full[-size:] and task.retain == task.full[:-size]
    assert load_task("builtin", complement(split)).retain == task.retain
    judged = task.evaluated["forget"]
    assert len(judged) == min(size, 400)  # above 10%: the last 10%
    assert [r["question"] for r in judged] == [r["question"] for r in task.full[-len(judged):]]


def test_above_10_percent_the_last_10_are_judged_however_many_are_perturbed(small_data, tmp_path):
    folder = shutil.copytree(small_data, tmp_path / "data")
    full = read_rows(folder / "full.json")
    perturbed = [row | {"paraphrased_answer": "So.", "perturbed_answer": ["No."]} for row in full[-50:]]
    (folder / "forget10_perturbed.json").write_text(json.dumps(perturbed))
    for split in ("forget10", "forget20"):
        judged = load_task(str(folder), split).evaluated["forget"]
        expected = slice_rows(full, "forget10")
        assert [row["question"] for row in judged] == [row["question"] for row in expected]


def test_a_refusal_is_a_line_whatever_it_holds(small_data, tmp_path):
    folder = shutil.copytree(small_data, tmp_path / "data")
    (folder / "idontknow.jsonl").write_text("No idea\u2028at all.\n\nI can't say.\r\n", encoding="utf-8")
    assert load_sets(str(folder))[1] == ["No idea\u2028at all.", "I can't say."]


def test_the_presets_settings_are_the_papers_but_for_tiny():
    for name in PRESETS.keys() - {"tiny"}:
        given = {"model": f"{name}=somewhere"}
        s, sft = resolve(given), resolve(given | {"loss": "sft", "split": "full"})
        assert (s.loss, s.split) == ("npo", "forget10")
        assert (s.forget_weight, s.retain_weight, s.kl_weight) == (1, 0, 0)
        assert (s.lr, s.epochs, s.batch_size, s.weight_decay, s.beta) == (1e-5, 10, 32, 0.01, 0.1)
        assert (s.warmup_epochs, s.max_grad_norm, s.kl_direction) == (1, 0, "policy_reference")
        assert (sft.lr, sft.epochs, sft.weight_decay) == (1e-5, 5, 0.01)


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path):
    assert split_model(f"tiny={tmp_path}") == ("tiny", str(tmp_path))
    folder = tmp_path / "beta=0.1"
    with pytest.raises(InputError, match="is no preset"):
        split_model(str(folder))
    folder.mkdir()
    assert split_model(str(folder)) == (None, str(folder))


def test_split_names():
    assert complement("forget05") == "retain95" and complement("retain90") == "forget10"
    assert evaluation_split("full") == "forget10" and evaluation_split("retain99") == "forget01"
    assert len(slice_rows(list(range(30)), "forget01")) == 1 and len(slice_rows(list(range(30)),
                                                                                "retain99")) == 29
    for wrong in ("forget00", "forget100", "forget5", "retain0", "forgotten", "", "forget١٠"):
        with pytest.raises(InputError, match="unknown split"):
            load_task("builtin", wrong)


def test_real_tofu_is_read_whole(shared):
    sets, refusals, source = load_sets(str(shared("tofu")))
    sizes = {name: len(rows) for name, rows in sets.items()}
    assert sizes == {"full": 4000, "forget10_perturbed": 400, "retain_perturbed": 400,
                     "real_authors_perturbed": 100,
                     "world_facts_perturbed": 117}
    assert len(refusals) == 100 and source == "idontknow.jsonl"
    task = load_task(str(shared("tofu")), "forget05")
    assert task.forget[0]["question"] == task.evaluated["forget"][0]["question"]


def test_the_hub_path_reads_the_same_rows(shared, tmp_path, monkeypatch):
    """`datasets.load_dataset(folder, "full")` walks the code that a Hub id walks with a network."""
    import datasets

    from data import tofu
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    folder = shared("tofu")
    assert tofu._from_hub(str(folder),
                          "world_facts_perturbed") == read_rows(folder / "world_facts_perturbed.json")


def tokens_of(tokenizer, encoded):
    return tokenizer.convert_ids_to_tokens(encoded.ids[encoded.start:])


@pytest.mark.parametrize("template,first", [("llama2", "In"), ("qa", "ĠIn"), ("chat", "In")])
def test_answer_tokens_against_hand_written_lists(tokenizer, template, first):
    """The answer's tokens and the end of sequence are supervised, the prompt is not; `qa`'s blank belongs to
    the answer."""
    encoded, = encode(tokenizer, template, [("Where is it?", "In Oslo.")])
    assert tokens_of(tokenizer, encoded) == [first, "ĠOslo", ".", "</s>"]
    assert encoded.ids[0] == tokenizer.bos_token_id and encoded.ids.count(tokenizer.bos_token_id) == 1
    assert encoded.ids[:encoded.start] == encode_prompts(tokenizer, template, ["Where is it?"])[0]
    if template == "llama2":
        prompt = tokenizer.convert_ids_to_tokens(encoded.ids[:encoded.start])
        assert prompt == ["<s>", "[INST]", "Where", "Ġis", "Ġit", "?", "[/INST]"]


@pytest.mark.parametrize("template,text", [("llama2", "[INST] Who? [/INST]"),
                                           ("qa", "Question: Who?\nAnswer:")])
def test_a_prompt_is_the_templates_text(tokenizer, template, text):
    assert prompt_text(tokenizer, template, "Who?") == text


def test_an_end_of_sequence_that_the_tokenizer_adds_itself_is_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>",
                                                                special_tokens=[("<s>", 1), ("</s>", 2)])
    assert encode(other, "qa", [("a", "b")]) == encode(tokenizer, "qa", [("a", "b")])
    assert encode_prompts(other, "qa", ["a"]) == encode_prompts(tokenizer, "qa", ["a"])


def test_the_first_300_rows_of_a_set_are_asked_for_200_tokens(tokenizer):
    rows = [{"question": f"{i}?", "answer": "In Oslo."} for i in range(301)]
    assert scoring.prepare({"forget": rows}, tokenizer, "llama2", None).rows["forget"] == rows[:300]
    assert scoring.MAX_NEW_TOKENS == 200


def test_a_token_that_straddles_the_boundary_belongs_to_the_prompt():
    """A tokenizer that merges ":" with the blank after it: the answer begins with its next token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    vocabulary = {"<s>": 0, "</s>": 1, "Q": 2, ": ": 3, "x": 4, ":": 5, " ": 6}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", " ")]))
    straddler = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    straddler.chat_template = "Q:"
    encoded, = encode(straddler, "chat", [("", " x")])  # "Q:" + " x" -> "Q", ": ", "x"
    assert straddler.convert_ids_to_tokens(encoded.ids) == ["Q", ": ", "x", "</s>"] and encoded.start == 2
    with pytest.raises(InputError, match="no token begins in the answer"):
        encode(straddler, "chat", [("", " ")])


def test_texts_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(InputError, match="context is 8"):
        encode(tokenizer, "llama2", [("Where is it?" * 5, "In Oslo.")], context=8)
    with pytest.raises(InputError, match="unknown template"):
        encode(tokenizer, "alpaca", [("a", "b")])


def test_every_row_is_visited_exactly_epochs_times():
    stream = make_stream(n=13, epochs=3, batch_size=4, seed=0, n_retain=5, n_refusals=3, pairing="stream")
    assert [len(items) for items in stream] == [4] * 9 + [3]
    items = sum(stream, [])
    assert set(Counter(i.row for i in items).values()) == {3}
    assert sorted(i.row for i in items[:13]) == list(range(13)) != [i.row for i in items[:13]]
    assert sorted(i.partner for i in items[:5]) == list(range(5))  # partners are permutations too
    assert stream == make_stream(13, 3, 4, 0, 5, 3, "stream") != make_stream(13, 3, 4, 1, 5, 3, "stream")


def test_fixed_pairing_is_the_authors_rule():
    items = sum(make_stream(6, 2, 4, seed=3, n_retain=100, n_refusals=10, pairing="fixed"), [])
    for item in items:
        u, v = (int(torch.randint(n, (1,), generator=torch.Generator().manual_seed(item.row)))
                for n in (100, 10))
        assert item.partner == (item.row + u) % 100 and item.refusal == v


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("micro_batch_size", (1, 3, 32))
def test_dealing_uses_every_row_once_and_keeps_processes_in_step(world_size, micro_batch_size):
    rows, lengths = list(range(10)), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    shares = [deal(rows, lengths, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(row for share in shares for micro in share for row in micro) == rows
    assert len({len(share) for share in shares}) == 1  # the same number of micro-batches
    for share in shares:
        flat = [lengths[row] for micro in share for row in micro]
        assert flat == sorted(flat)


def test_collate_predicts_each_answer_token_from_the_one_before(tokenizer):
    pairs = [("Where is it?", "In Oslo."), ("Who wrote it? Who wrote it?", "Ann did.")]
    encoded = encode(tokenizer, "llama2", pairs)
    batch = collate(encoded, tokenizer.pad_token_id)
    assert batch.answer_tokens.tolist() == [e.answer_tokens for e in encoded]
    assert batch.targets.tolist() == [i for e in encoded for i in e.ids[e.start:]]
    before = [i for e in encoded for i in e.ids[e.start - 1:-1]]
    assert batch.ids[batch.lines, batch.columns].tolist() == before
    assert batch.ids.eq(tokenizer.pad_token_id).sum() == batch.ids.numel() - sum(len(e.ids) for e in encoded)


@pytest.mark.parametrize("text,message", [
    ('{"question": "a"', "line 1: not JSON"),
    ('{"question": "a", "answer": "b"}\n{"question": "a"}', "row 2: answer must"),
    ('{"question": "a", "answer": "\\ud800"}', "row 1: answer has half of a character"),
    ('{"question": "a", "answer": " "}', "row 1: answer must"), ('["a"]', "must be an object"),
    ("", "no rows")])
def test_broken_rows_are_named_by_file_and_line(tmp_path, text, message):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_rows(tmp_path / "own.json")
    assert "own.json" in str(error.value)


def test_lists_and_lines_are_both_read(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "windows.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    for name in ("list", "lines", "windows"):
        assert read_rows(tmp_path / f"{name}.json") == rows


def test_a_chat_prompt_is_the_same_on_every_day_and_has_its_system_turn():
    """Llama 3's templates write today's date; a resumed run must see the prompts that it began with."""
    tokenizer = make_tiny(["Who wrote it? Ann did."], 0, TINY_DIMS)[1]
    tokenizer.chat_template = ("{{ strftime_now('%d %b %Y') }}|{{ date_string }}|{% for m in messages %}"
                               "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    assert prompt_text(tokenizer, "chat", "Who?") == "10 Apr 2025|10 Apr 2025|<user>Who?<assistant>"
    tokenizer.chat_template += "{{ eos_token }}"  # a user's turn may end in one, and then it stays
    assert encode_prompts(tokenizer, "chat", ["Who?"])[0][-1] == tokenizer.eos_token_id
    tokenizer.init_kwargs["system_prompt"] = "Be brief."
    assert prompt_text(tokenizer, "chat", "Who?").endswith("<system>Be brief.<user>Who?<assistant></s>")


def test_flags_then_a_models_record_then_its_preset_say_how_it_is_asked():
    """In every command: a preset's checkpoint has learned with its system prompt."""
    preset, record = PRESETS["llama3.2-1b"], {"template": "qa"}
    for flags, meta, own, expected in ((("llama2",), record, None, ("llama2", None)),
                                       ((), record, None, ("qa", None)),
                                       ((), {}, None, ("chat", preset.system_prompt)),
                                       ((), {}, "Own.", ("chat", "Own.")),
                                       ((None, "Flag."), {}, "Own.", ("chat", "Flag."))):
        tokenizer = Namespace(init_kwargs={"system_prompt": own} if own else {})
        template = prompt_template(tokenizer, meta, preset, *flags)
        assert (template, system_prompt_of(tokenizer)) == expected


def test_a_row_in_both_own_files_is_refused(tmp_path):
    for name, known in (("forget", "ab"), ("retain", "bc")):
        rows = [{"question": f"Who is {k}?", "answer": "One."} for k in known]
        (tmp_path / name).write_text(json.dumps(rows))
    with pytest.raises(InputError, match="1 rows are in --forget and in --retain, such as 'Who is b"):
        load_task("builtin", "forget10", str(tmp_path / "forget"), str(tmp_path / "retain"))
