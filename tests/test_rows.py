"""Rows as people have them: prompts with completions, chats, documents; CSV and Parquet; rows never seen."""

import csv
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from scipy.stats import mannwhitneyu
from transformers import AutoTokenizer

import train_npo
from common import InputError
from conftest import ROOT
from data.batches import collate
from data.prompts import Encoded, encode, encode_prompts
from data.tofu import load_task, read_rows
from metrics import auc_interval, unseen_verdict

# Ways of writing turns: ChatML, headers as of Llama 3, spaces as of Llama 2, and answers that end with eos.
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "headers": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}<|im_end|>"
               "{% endfor %}{% if add_generation_prompt %}[assistant]\n\n{% endif %}",
    "spaces": "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
              "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "plain": "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n"
             "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"}


def write(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(path) -> list:
    return [(row["question"], row["answer"]) for row in read_rows(path)]


def tokenizer_with(template: str):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny/start")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_files_of_all_formats_give_the_same_rows(ending, tmp_path):
    rows = [{"question": 'Where, said "Ann",\nwas it?', "answer": "007"},
            {"question": "Who?", "answer": "Bo é."}]
    assert read_rows(write(tmp_path / f"rows.{ending}", rows)) == rows


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_kinds_of_one_row_are_the_same_tokens(template, tmp_path):
    tokenizer = tokenizer_with(template)
    question, answer = "Where was Ann born?", "Ann was born in Lima."
    chat = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}]
    [as_chat] = encode(tokenizer, "llama2", pairs(write(tmp_path / "chat.jsonl", chat)))
    assert [as_chat] == encode(tokenizer, "chat", [(question, answer)]) and not as_chat.gaps
    [as_question] = encode(tokenizer, "llama2", [(question, answer)])
    completion = [{"prompt": f"[INST] {question} [/INST]", "completion": answer}]
    assert encode(tokenizer, "qa", pairs(write(tmp_path / "completion.jsonl", completion))) == [as_question]
    document = [{"text": f"[INST] {question} [/INST]{answer}"}]
    [as_document] = encode(tokenizer, "qa", pairs(write(tmp_path / "document.jsonl", document)))
    assert as_document.ids == as_question.ids and as_document.places == [*range(1, len(as_question.ids))]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_answer_of_a_chat_is_predicted_with_the_end_of_its_turn(template, tmp_path):
    tokenizer, end = tokenizer_with(template), "</s>" if template in ("plain", "spaces") else "<|im_end|>"
    turns = [("system", "Be brief."), ("user", "Who is Ann?"), ("assistant", "A poet."),
             ("user", "Born where?"), ("assistant", "In Lima, in 1979."), ("user", "And Bo?"),
             ("assistant", "He paints.")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    [(question, answer)] = pairs(write(tmp_path / "chat.jsonl", rows))
    [text] = encode(tokenizer, "llama2", [(question, answer)])
    predicted = tokenizer.decode([text.ids[place] for place in text.places])
    by_hand = "".join(f"{answer}{ending}" for answer, ending in (
        ("A poet.", end), ("In Lima, in 1979.", end), ("He paints.", "</s>")))
    assert predicted.replace(" ", "") == by_hand.replace(" ", "")
    assert text.answer_tokens == len(text.places) < len(text.ids) - text.start
    [prompt] = encode_prompts(tokenizer, "llama2", [question])
    assert text.ids[:len(prompt)] == prompt and question == "And Bo?"
    batch = collate([text], 2)
    assert batch.targets.tolist() == [text.ids[place] for place in text.places]
    assert (batch.columns + 1).tolist() == text.places and len(batch.lines) == text.answer_tokens


def test_rows_that_cannot_be_used(tmp_path):
    def refusal(*rows):
        with pytest.raises(InputError) as error:
            read_rows(write(tmp_path / "rows.jsonl", rows))
        return str(error.value)
    user, assistant = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}
    for messages in ([user], [user, user], [user, assistant | {"content": " "}], "Who?",
                     [user, {"role": "assistant"}]):
        assert "row 1: messages must be at least two turns" in refusal({"messages": messages})
    mixed = {"text": "a b"}, {"question": "a", "answer": "b"}
    assert "row 2: text must be a non-empty text" in refusal(*mixed)
    assert "completion must be" in refusal({"prompt": "a"})
    assert "prompt and completion, messages, or text" in refusal({"data": []})
    assert "row 1: messages must be at least two turns" in refusal({"messages": [assistant, user, assistant]})
    (tmp_path / "rows.csv").write_text("question,answer\nWhere?,In Lima, Peru\n")
    with pytest.raises(InputError, match="put quotes around a text"):
        read_rows(tmp_path / "rows.csv")
    question = pairs(write(tmp_path / "chat.jsonl", [{"messages": [user, assistant, user, assistant]}]))
    tokenizer = tokenizer_with("plain")
    tokenizer.chat_template = "{{ messages[-1].content }}"  # it forgets the earlier turns
    with pytest.raises(InputError, match="changes the earlier answer"):
        encode(tokenizer, "chat", question)


def test_rows_are_compared_by_all_of_their_text(small_model, tmp_path):
    def chats(*names):
        return [{"messages": [{"role": role, "content": text} for role, text in (
            ("user", f"Who is {name}?"), ("assistant", f"{name} paints."), ("user", "Thanks!"),
            ("assistant", "You're welcome."))]} for name in names]

    def task(forget, retain):
        files = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("f", forget), ("r", retain))]
        return load_task("builtin", "forget10", *map(str, files))
    assert len(task(chats("Ann", "Bo"), chats("Cid", "Dee")).retain) == 2
    for forget, retain in ((chats("Ann"), chats("ANN")), ([{"text": "Ann paints  in Lima."}],
                                                           [{"text": "ann paints in lima.\n"}])):
        with pytest.raises(InputError, match="1 rows are in --forget and in --retain"):
            task(forget, retain)


def test_ceu_skips_the_first_token_of_each_answer():
    text = Encoded(list(range(10)), 2, frozenset({4, 5, 8}))
    assert text.places == [2, 3, 6, 7, 9] and text.without_first(1).places == [3, 7]
    assert text.without_first(0) == text


def own_rows(kind: str, names: list[str]) -> list[dict]:
    def row(name):
        question, answer = f"Where was {name} born?", f"{name} was born in the town of Lima."
        turns = [("user", f"Do you know {name}?"), ("assistant", f"{name} is a poet."), ("user", question),
                 ("assistant", answer)]
        return {"text": {"text": f"{question} {answer} " * 3},
                "messages": {"messages": [{"role": role, "content": text} for role, text in turns]},
                "prompt": {"prompt": question, "completion": " " + answer}}[kind]
    return [row(name) for name in names]


def interrupted_at(step: int, function):
    """`function`, but its call for this step is an interrupt."""
    def call(at, *rest):
        if at == step:
            raise KeyboardInterrupt
        return function(at, *rest)
    return call


@pytest.mark.parametrize("kind", ["text", "messages", "prompt"])
def test_own_rows_train_resume_and_end_with_a_verdict(kind, small_model, tmp_path, capsys, monkeypatch):
    people = {"forget": "Ann Bo Cid Dee", "retain": "Eve Fay Gus Hal", "unseen": "Ida Jon Kay Lee"}
    files = {name: write(tmp_path / f"{name}.jsonl", own_rows(kind, names.split()))
             for name, names in people.items()}
    flags = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    flags += ["--model", str(small_model), "--retain-weight", "1", "--batch-size", "2", "--epochs", "3",
              "--lr", "1e-3", "--min-start-probability", "0", "--keep", "best"]
    train_npo.main([*flags, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "unseen loss at the start" in printed and "AUC" in printed
    assert "of 100 pairs" in printed or "does not tell them apart" in printed
    last = json.loads((tmp_path / "run/eval/step_000006.json").read_text())
    assert last["metrics"]["unseen"]["rows"] == [4, 4] and len(last["rows"]["holdout"]) == 4
    assert all(row["generation"] is not None for row in last["rows"]["forget"])
    steps = {int(file.stem[5:]): json.loads(file.read_text())["metrics"]["unseen"]
             for file in (tmp_path / "run/eval").iterdir()}
    target = steps.pop(0)["unseen_loss"]
    nearest = min(steps, key=lambda step: abs(steps[step]["forget_loss"] - target))
    assert json.loads((tmp_path / "run/best/npo.json").read_text())["step"] == nearest

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_npo, "lr_factor", interrupted_at(4, train_npo.lr_factor))
        train_npo.main([*flags, "--checkpoint-every", "3", "--out", str(tmp_path / "cut")])
    train_npo.main(["--resume", str(tmp_path / "cut")])
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "cut")]
    assert weights[0] == weights[1]
    weights = [(tmp_path / name / "best/model.safetensors").read_bytes() for name in ("run", "cut")]
    assert weights[0] == weights[1]
    with pytest.raises(InputError, match="are in --forget and in --unseen"):
        train_npo.main(["--forget", str(files["forget"]), "--unseen", str(files["forget"]),
                        "--model", str(small_model)])


def test_the_interval_of_the_auc_is_delongs():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        members, unseen = rng.normal(0, 1, 40), rng.normal(0.5, 1, 60)
        measured = auc_interval(members, unseen)
        covered += measured["interval"][0] < 0.6382 < measured["interval"][1]  # Phi(0.5 / sqrt 2)
    assert measured["auc"] == pytest.approx(mannwhitneyu(unseen, members).statistic / 2400)
    assert 0.9 < covered / 300 < 0.99


def test_the_verdict_says_what_an_attacker_can_tell():
    def verdict(auc, low, high, p=0.01):
        return unseen_verdict({"auc": auc, "interval": [low, high], "rows": [30, 30], "p": p})
    assert verdict(0.81, 0.7, 0.92).endswith("tells the rows from unseen ones in 81 of 100 pairs")
    assert "AUC 0.18, an attacker finds the forgotten rows in 82 of 100" in verdict(0.18, 0.1, 0.3)
    assert "does not tell them apart" in verdict(1.0, 1.0, 1.0, p=0.1)  # two rows against three
    assert verdict(0.53, 0.38, 0.67).endswith("AUC 0.53 on 30 and 30 rows, 95% interval 0.38 to 0.67")
