"""The attacks on the tiny models that ship: the start knows the forget rows, the retrained model never saw
them, and a third model hides them."""

import json
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from conftest import ROOT

import robustness_tofu
from common import InputError
from data.batches import collate
from data.tofu import load_task
from evaluate_tofu import generate, prepare
from losses import ga_loss, token_logps
from model import ALONE, AnswerModel, load_model
from robustness_tofu import LEVELS, PREFIX, SHOTS, Lab, leak_at, round_blockwise, stated

TINY = {name: str(ROOT / "data" / "tiny" / name) for name in ("start", "retrained")}
STORED = sorted((ROOT / "results" / "robustness").glob("*/robustness.json"))


class Recorder(Lab):
    """Keeps what would be measured."""

    def measure(self, model, prepared):
        return {"model": model, "prepared": prepared}


@pytest.fixture(scope="module")
def lab():
    """The last 32 forget rows can be relearned, and 8 of them are measured."""
    task, loaded = load_task("builtin", "forget10"), load_model(TINY["start"])
    task = replace(task, forget=task.forget[-32:], retain=task.retain[:40])
    rows = task.evaluated["forget"][-8:]
    return Lab(Namespace(lr=2e-3, shares=[50, 100], samples=8), task, loaded, loaded.lm, rows,
               prepare({"forget": rows}, loaded.tokenizer, "llama2"), ALONE)


@pytest.fixture(scope="module")
def models(lab):
    """"unlearned" is the start after a few steps of gradient ascent."""
    models = {name: AnswerModel(load_model(folder).lm) for name, folder in TINY.items()}
    models["unlearned"] = AnswerModel(load_model(TINY["start"]).lm)
    batch = collate(lab.encode(lab.task.forget), lab.loaded.tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(models["unlearned"].parameters(), lr=1e-3)
    for _ in range(5):
        ga_loss(token_logps(models["unlearned"]([batch])[1], batch.targets)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return models


def test_relearning_brings_hidden_knowledge_back_sooner_than_it_teaches(lab, models, monkeypatch):
    monkeypatch.setattr(robustness_tofu, "BATCH", 11)  # 32 rows are 3 steps
    gain = {}
    for name in ("unlearned", "retrained"):
        weights = {key: tensor.clone() for key, tensor in models[name].state_dict().items()}
        states = robustness_tofu.relearn(lab, models[name])
        assert [(state["what"][:6], state["step"]) for state in states] == [
            *[("forget", k) for k in (1, 2, 1, 2, 3)], *[("retain", k) for k in (1, 2, 3)]]
        before = lab.measure(models[name], lab.prepared)  # an attack leaves the model as it was
        assert all(torch.equal(tensor, weights[key]) for key, tensor in models[name].state_dict().items())
        gain[name] = states[4]["probability"] / before["probability"]
    assert gain["unlearned"] > 1.2 * gain["retrained"] > 0


@pytest.mark.parametrize("kind,distance", [("int8", 1 / 127), ("int4", 1 / 7), ("nf4", 0.31)])
def test_rounding_takes_the_nearest_level_of_a_block_and_changes_nothing_twice(kind, distance):
    weight, levels = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)), LEVELS[kind]
    codes, rounded = round_blockwise(weight, levels)
    for block, ours in zip(weight.flatten().split(64), rounded.flatten().split(64), strict=True):
        scale = block.abs().max()
        nearest = (block[:, None] - levels * scale).abs().argmin(1)
        assert torch.allclose(ours, levels[nearest] * scale)
        assert ((block - ours).abs() <= distance / 2 * scale + 1e-6).all()
    assert torch.equal(round_blockwise(rounded, levels)[0], codes)
    assert not round_blockwise(torch.zeros(3, 3), levels)[1].any()


def test_the_rounded_model_is_measured_and_its_codes_are_compared_with_the_start(lab, models):
    states = robustness_tofu.quantize(Recorder(**vars(lab)), models["unlearned"])
    for state in states:
        weights = robustness_tofu.linear_weights(state["model"].lm)
        assert len(weights) == 7 * lab.loaded.lm.config.num_hidden_layers
        for weight in weights:
            assert weight is not state["model"].lm.get_output_embeddings().weight
            assert torch.allclose(round_blockwise(weight, LEVELS[state["what"]])[1], weight)
    changed = {state["what"]: state["codes_changed"] for state in states}
    assert 0 < changed["int4"] < changed["int8"] < 1
    states = robustness_tofu.quantize(Recorder(**vars(lab)), models["start"])
    assert {state["codes_changed"] for state in states} == {0}


def test_other_prompts_precede_the_same_answers(lab, models):
    def text(ids: list) -> str:
        return lab.loaded.tokenizer.decode(ids, skip_special_tokens=True).strip()

    for state in robustness_tofu.prompts(Recorder(**vars(lab)), models["start"]):
        prepared, name = state["prepared"], state["what"]
        assert [row["answer"] for row in prepared.rows["forget"]] == [row["answer"] for row in lab.rows]
        assert len(prepared.texts) == 7 * len(lab.rows)
        for index, row in enumerate(lab.rows):
            ids, answer = prepared.prompts[f"forget/{index}"], prepared.texts[f"forget/{index}/answer"]
            paraphrased = prepared.texts[f"forget/{index}/paraphrased"]
            assert answer.ids[:answer.start] == ids and text(answer.ids[answer.start:]) == row["answer"]
            assert text(paraphrased.ids[paraphrased.start:]) == row["paraphrased_answer"]
            assert (row["question"] in text(ids)) == (name != "paraphrased question")
            assert (row["paraphrased_question"] in text(ids)) == (name == "paraphrased question")
            assert text(ids).endswith(PREFIX) == (name == "prefix")
            shown = sum(retained["answer"] in text(ids) for retained in lab.task.retain)
            assert shown >= SHOTS if name == "few-shot" else shown == 0


@pytest.mark.parametrize("c", range(6))
def test_leak_is_the_share_of_all_choices_of_k_samples_that_hold_a_hit(c):
    for k in range(1, 6):
        choices = list(combinations([1] * c + [0] * (5 - c), k))
        assert leak_at(5, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_samples_follow_the_models_distribution(lab, models):
    def draw(seed: int) -> list:
        sampler = robustness_tofu.Sampler(models["retrained"].lm, torch.Generator().manual_seed(seed))
        end = lab.loaded.tokenizer.eos_token_id
        return [ids[0] for ids in generate(sampler, [prompt] * 1000, end, 1, "cpu")]

    prompt, state = lab.prepared.prompts["forget/0"], torch.get_rng_state()
    tokens = draw(1)
    assert tokens == draw(1) != draw(2) and torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        probs = models["retrained"].lm(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    for token, count in Counter(tokens).most_common(3):
        p = probs[token].item()
        assert abs(count / 1000 - p) < 4 * (p * (1 - p) / 1000) ** 0.5


def test_the_start_leaks_more_than_the_retrained_model(lab, models):
    start, retrained = (robustness_tofu.sample(lab, models[name])[0]["leak"] for name in TINY)
    assert start["1"] > retrained["1"] + 0.3 and [*start] == ["1", "2", "4", "8"]


def test_a_builtin_fact_is_stated_by_its_value_and_other_facts_by_most_of_their_words():
    for row in load_task("builtin", "forget10").evaluated["forget"]:
        texts = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
        assert stated(row, texts, "builtin") == [True, True] + [False] * len(row["perturbed_answer"])
    assert stated(row, [row["answer"], "It is not so."], "elsewhere") == [True, False]


@pytest.mark.parametrize("file", STORED, ids=lambda file: file.parent.name)
def test_stored_results_are_drawn_with_their_message(file, tmp_path):
    attacks = json.loads(file.read_text())["attacks"]
    robustness_tofu.draw(attacks, tmp_path / "robustness.png")
    message = robustness_tofu.message(robustness_tofu.collect(attacks, "extraction_strength"))
    expected = {"ceu+rt": "takes the unlearned model to 0.83, the retrained model to 0.72",
                "smollm2_npo+rt": "Strongest attack: relearn (forget 100%) takes the unlearned model to 0.09"}
    assert expected.get(file.parent.name, "No attack takes the unlearned model past") in message


def run(folder, *flags):
    few = "--max-rows 6 --samples 2 --shares 5 --start tiny --retrained".split()
    robustness_tofu.main([*map(str, (*few, TINY["retrained"], "--out", folder / "out", *flags))])


def test_the_command_writes_the_format_of_the_stored_results(tmp_path, capsys):
    """With a model as its own control, forget quality is 1 in every state."""
    flags = ("--model", TINY["retrained"], "--split", "forget10")
    run(tmp_path, *flags)
    result = json.loads((tmp_path / "out" / "robustness.json").read_text())
    stored = json.loads((ROOT / "results" / "robustness" / "npo+rt" / "robustness.json").read_text())
    assert result["provenance"].keys() >= stored["provenance"].keys() - {"dirty"}
    for attack, entries in stored["attacks"].items():
        for name, entry in entries.items():
            states = {state["what"]: state.keys() for state in result["attacks"][attack][name]["states"]}
            assert states == {s["what"].replace("100%", "5%"): s.keys() for s in entry["states"]}
        states = result["attacks"][attack]["model"]["states"]
        assert all(state.get("forget_quality", 1) == 1 for state in states)
        assert result["attacks"][attack]["start"]["states"][0]["forget_quality"] < 1
    assert (tmp_path / "out" / "robustness.png").stat().st_size > 10_000
    assert "| relearn | forget 5% |" in capsys.readouterr().out
    with pytest.raises(InputError, match="finished robustness.json"):
        run(tmp_path, *flags)


@pytest.mark.parametrize("flags,sentence", [
    (("--split", "retain90"), "need a forget split"), (("--split", "forget05"), "--retrained of retain90"),
    (("--samples", 0), "must be positive"), (("--attacks", "steal"), "invalid choice"),
    (("--start", "nowhere"), "--model nowhere: cannot load"), (("--data", "nowhere"), "not found")])
def test_the_command_refuses_and_writes_nothing(flags, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence) as error:
        run(tmp_path, "--model", TINY["start"], *flags)
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]


def test_rows_without_a_paraphrased_question_cannot_be_asked_other_prompts(tmp_path, monkeypatch):
    task = load_task("builtin", "forget10")
    rows = [{"question": row["question"], "answer": row["answer"]} for row in task.forget]
    monkeypatch.setattr(robustness_tofu, "load_task", lambda *_: replace(task, evaluated={"forget": rows}))
    with pytest.raises(InputError, match="leave prompts out"):
        run(tmp_path, "--model", TINY["start"])
