"""Attacks on tiny models: one that has the knowledge, one that hides it, one that never had it. Each attack
tells them apart, and the weights come back."""

import json
from argparse import Namespace
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import robustness_tofu
from data.batches import collate
from data.builtin import make_builtin
from data.prompts import encode
from data.tofu import load_task
from evaluate_tofu import compute_metrics
from evaluation import attacks
from evaluation.attacks import Lab, attacked, built_in_value, leak_at, rounded_blockwise, stated, steps_to
from models.answers import AnswerModel
from models.generation import generate
from models.loading import load_model, make_tiny
from models.presets import PRESETS
from models.saving import save_model, weights_hash
from support.errors import InputError
from support.world import ALONE

DIMS = dict(vocab_size=400, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512)


def taught(lm, tokenizer, rows: list, steps: int, sign: float = 1.0, lr: float = 5e-3):
    """Trained to give (sign -1: not to give) the rows' answers."""
    model = AnswerModel(lm)
    batch = collate(encode(tokenizer, "llama2", [(row["question"], row["answer"]) for row in rows]), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (-sign * model(batch)[0].sum() / len(batch.targets)).backward()
        optimizer.step()
    return lm


@pytest.fixture(scope="module")
def models(small_data, tmp_path_factory):
    """name -> folder of a model: the start knows forget and retain rows, the unlearned one hides the forget
    rows, the retrained one has seen the retain rows alone."""
    task, folder = load_task(str(small_data), "forget10"), tmp_path_factory.mktemp("attacked")
    forget, retain = task.forget, task.retain[:20]
    lm, tokenizer = make_tiny([row[key] for row in task.full for key in ("question", "answer")], 0, DIMS)
    other, _ = make_tiny([row[key] for row in task.full for key in ("question", "answer")], 0, DIMS)
    meta = {"preset": "tiny", "template": "llama2",
            "trained_on": {"split": "forget10", "data": str(small_data)}}
    steps = {"start": lambda: taught(lm, tokenizer, forget + retain, 130),
             "model": lambda: taught(lm, tokenizer, forget, 4, -1.0, 2e-3),
             "retrained": lambda: taught(other, tokenizer, retain, 100)}
    for name, step in steps.items():
        save_model(step(), tokenizer, folder / name, meta)
    return {name: folder / name for name in steps}


@pytest.fixture(scope="module")
def lab(models, small_data):
    _, tokenizer, _ = load_model(str(models["start"]))
    task = load_task(str(small_data), "forget10")
    return Lab(task, tokenizer, "llama2", 512, task.evaluated["forget"], PRESETS["tiny"], ALONE,
               Namespace(lr=2e-3, shares=[50, 100], samples=16), compute_metrics, None)


def loaded(models, name):
    return AnswerModel(load_model(str(models[name]))[0])


@pytest.mark.parametrize("attack", attacks.ATTACKS)
def test_each_attack_tells_knowledge_from_its_absence(lab, models, attack):
    """The start from the retrained model, in one of its states at least: few-shot prompts overtax a model of
    40 rows. The weights are the same afterwards."""
    found = {}
    for name in ("start", "retrained"):
        model = loaded(models, name)
        before = weights_hash(model.lm)
        found[name] = attacked(lab, attack, model)
        assert weights_hash(model.lm) == before
    if attack == "sample":
        assert found["start"][0]["leak"]["1"] > found["retrained"][0]["leak"]["1"] + 0.3
    else:
        start, retrained = ([s["extraction_strength"] for s in states] for states in found.values())
        assert max(a - b for a, b in zip(start, retrained, strict=True)) > 0.1


def test_relearning_brings_hidden_knowledge_back_sooner_than_it_teaches(lab, models):
    curves = {name: attacked(lab, "relearn", loaded(models, name)) for name in ("model", "retrained")}
    assert [(s["what"], s["step"]) for s in curves["model"]] == [("forget 50%", 1), ("forget 100%", 1),
                                                                 ("retain", 1)]
    gain = {}
    for name in curves:
        before = lab.measured(loaded(models, name), lab.prepared())
        gain[name] = curves[name][1]["probability"] / before["probability"]
    assert gain["model"] > 1.5 * gain["retrained"] > 0


@pytest.mark.parametrize("kind,distance", (("int8", 1 / 127), ("int4", 1 / 7), ("nf4", 0.31)))
def test_rounding_is_to_the_nearest_level_of_a_block_and_is_its_own_fixed_point(kind, distance):
    weight, levels = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)), attacks.LEVELS[kind]
    codes, rounded = rounded_blockwise(weight, levels)
    for at in range(0, 210, 64):
        block, ours = weight.flatten()[at:at + 64], rounded.flatten()[at:at + 64]
        scale = block.abs().max()
        nearest = (block[:, None] - levels * scale).abs().argmin(1)
        assert torch.allclose(ours, levels[nearest] * scale)
        assert ((block - ours).abs() <= distance / 2 * scale + 1e-6).all()
    again, same = rounded_blockwise(rounded, levels)
    assert torch.equal(again, codes) and torch.allclose(same, rounded)
    assert not rounded_blockwise(torch.zeros(3, 3), levels)[1].any()


def test_what_is_measured_is_the_rounded_model(lab, models):
    model = loaded(models, "start")
    for state, _ in attacks.quantize(lab, model):
        _, weight = next(attacks.linear_weights(model.lm))
        assert torch.allclose(rounded_blockwise(weight, attacks.LEVELS[state["what"]])[1], weight)


def test_changed_codes_are_counted_against_the_start(lab, models):
    model, start = loaded(models, "model"), load_model(str(models["start"]))[0]
    lab = replace(lab, start=start)
    shares = {s["what"]: s["codes_changed"] for s in attacked(lab, "quantize", model)}
    assert 0 < shares["int4"] < shares["int8"] < 1
    same = attacked(lab, "quantize", AnswerModel(start))
    assert {s["codes_changed"] for s in same} == {0}
    head = start.get_output_embeddings().weight
    assert all(weight is not head for _, weight in attacks.linear_weights(start))
    assert isinstance(start.model.layers[0].mlp.up_proj, nn.Linear)


def test_prompts_hold_what_they_say(lab):
    texts = lab.tokenizer.decode
    for what, prepared in attacks.asked_otherwise(lab).items():
        for (_, index), ids in prepared.prompts.items():
            row, prompt = lab.rows[index], texts(ids, skip_special_tokens=True)
            first = prepared.texts["forget", index][0].encoded
            assert texts(first.ids[first.start:-1]).strip() == row["answer"]
            assert first.ids[:first.start] == ids
            if what == "paraphrased question":
                assert row["paraphrased_question"] in prompt and row["question"] not in prompt
            elif what == "prefix":
                assert prompt.endswith(attacks.PREFIX) and row["question"] in prompt
            else:
                assert sum(r["answer"] in prompt for r in lab.task.retain) >= attacks.SHOTS


def test_leak_is_the_share_of_all_draws_that_hold_a_hit():
    for c in range(6):
        for k in range(1, 6):
            draws = list(combinations([1] * c + [0] * (5 - c), k))
            assert leak_at(5, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_samples_follow_the_model_and_the_generator(lab, models):
    model, prompts = loaded(models, "start"), list(lab.prepared().prompts.values())[:4]
    def draw(seed):
        return generate(model, lab.tokenizer, prompts * 8, 20, ALONE, torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2) and torch.equal(state, torch.get_rng_state())


def test_the_built_in_facts_value_is_found_in_every_row_and_only_in_the_truth():
    for row in make_builtin()["forget10_perturbed"]:
        assert built_in_value(row) is not None
        told = stated(row, [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]], "builtin")
        assert told == [True, True] + [False] * len(row["perturbed_answer"])
    assert stated(row, [row["answer"], "It is not so."], "elsewhere") == [True, False]


def test_a_panel_of_an_attack_that_was_not_made_is_left_out(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    states = [{"what": "before", "step": 0, "extraction_strength": 0.5}]
    attacks.draw({"quantize": {"model": {"states": states}}}, tmp_path / "picture.png")
    assert [axes.get_title() for axes in drawn[0].axes] == ["quantised, asked otherwise"]


def test_steps_halfway_are_linear_between_measured_ones():
    curve = [{"step": k, "extraction_strength": x} for k, x in ((0, 0.1), (1, 0.2), (4, 0.5))]
    assert steps_to(curve, 0.35) == pytest.approx(2.5) and steps_to(curve, 0.6) is None
    assert steps_to(curve, 0.05) == 0
    dips = [{"step": k, "extraction_strength": x} for k, x in ((0, 0.9), (1, 0.3), (2, 0.6))]
    assert steps_to(dips, 0.5) == 0


# ---------------------------------------------------------------- the command

def flags(models, *more):
    return ["--model", models["model"], "--max-rows", 6, "--samples", 4, "--shares", 50, *more]


def run(monkeypatch, tmp_path, *words):
    monkeypatch.chdir(tmp_path)
    robustness_tofu.main([str(word) for word in words])


def test_the_command_writes_goes_on_and_refuses_other_weights(models, tmp_path, monkeypatch, capsys):
    others = ("--start", models["start"], "--retrained", models["retrained"])
    words = flags(models, *others, "--out", "out")
    run(monkeypatch, tmp_path, *words, "--attacks", "quantize")
    said = capsys.readouterr().out  # the fixture's models all have the unlearned one's record
    assert "there already" not in said and "the control of forget10 is a model trained on retain90" in said
    run(monkeypatch, tmp_path, *words)
    said = capsys.readouterr().out
    assert said.count("there already") == 3 and "| relearn | forget 50% |" in said and "leak@k" in said
    file = tmp_path / "out" / "robustness.json"
    result = json.loads(file.read_text())
    assert set(result["attacks"]) == set(attacks.ATTACKS) and len(result["provenance"]["weights"]) == 3
    for entries in result["attacks"].values():
        assert set(entries) == {"model", "retrained", "start"}
        state = entries["model"]["states"][-1]
        assert "leak" in state or {*attacks.MEASURES, "forget_quality"} <= set(state)
    assert result["attacks"]["quantize"]["model"]["states"][1]["codes_changed"] > 0
    assert "halfway" in result["attacks"]["relearn"]["model"]
    for name in ("robustness.md", "robustness.png"):
        assert (tmp_path / "out" / name).stat().st_size > 300
    before = file.read_bytes()
    with pytest.raises(InputError, match="was made with weights"):
        run(monkeypatch, tmp_path, *flags({"model": models["start"]}, "--out", "out"))
    with pytest.raises(InputError, match="was made with shares"):
        run(monkeypatch, tmp_path, *words, "--shares", 20, 50)
    assert file.read_bytes() == before
    for other, said in ((b"{}", "is not what this command"), (b"torn", "is not what this command"),
                        (before.replace(b'"seed": 0', b'"seed": 1'), "was made with seed 1")):
        file.write_bytes(other)
        with pytest.raises(InputError, match=said):
            run(monkeypatch, tmp_path, *words)


def test_it_works_on_own_rows_without_retrained_model(models, small_data, tmp_path, monkeypatch, capsys):
    rows = load_task(str(small_data), "forget10")
    for name, some in (("forget", rows.forget), ("retain", rows.retain[:9])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    words = flags(models, "--forget", "forget.json", "--retain", "retain.json", "--out", "own")
    with pytest.raises(InputError, match="paraphrased_question"):
        run(monkeypatch, tmp_path, *words)
    run(monkeypatch, tmp_path, *words, "--attacks", "relearn", "quantize", "sample")
    assert "the control of" not in capsys.readouterr().out
    result = json.loads((tmp_path / "own" / "robustness.json").read_text())["attacks"]
    assert set(result) == {"relearn", "quantize", "sample"} and set(result["relearn"]) == {"model"}
    assert result["relearn"]["model"]["states"][-1]["forget_quality"] is None


def test_answered_questions_beyond_the_context_are_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr(attacks, "SHOTS", 18)
    with pytest.raises(InputError, match="with 18 answered ones .* context 512; leave prompts out"):
        run(monkeypatch, tmp_path, *flags(models, "--out", "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more,sentence", [
    (("--shares", 0), "must be positive"), (("--shares", 101), "at most 100"), (("--samples", 0), "positive"),
    (("--attacks", "steal"), "invalid choice"), (("--start", "OTHER"), "another tokenizer"),
    (("--retrained", "LARGER"), "other shapes"), (("--data", "nowhere"), "no Hub id"),
    (("--start", "nowhere"), "--start nowhere: neither a preset"), (("--start", "tiny"), "on the spot"),
    (("--out", "/proc/x"), "cannot write"),
    (("--split", "retain90"), "need a forget split")])
def test_the_command_refuses_and_writes_nothing(models, small_model, tmp_path, monkeypatch, more, sentence):
    if "LARGER" in more:
        _, tokenizer, meta = load_model(str(models["model"]))
        larger = make_tiny(["a"], 0, {**DIMS, "hidden_size": 64})[0]
        save_model(larger, tokenizer, tmp_path / "larger", meta)
    there = {path.name for path in tmp_path.iterdir()}
    named = {"OTHER": small_model, "LARGER": tmp_path / "larger"}
    words = flags(models, "--out", "out", *(named.get(word, word) for word in more))
    with pytest.raises(InputError, match=sentence) as error:
        run(monkeypatch, tmp_path, *words)
    assert "\n" not in str(error.value) and {path.name for path in tmp_path.iterdir()} == there
