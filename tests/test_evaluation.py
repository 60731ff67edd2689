"""The metrics: released logs with known values, models whose scores are known, a naive loop, and no side
effects."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, mannwhitneyu

import evaluate_tofu
from data.batches import collate
from data.tofu import load_task
from evaluate_tofu import (
    auc,
    compute_metrics,
    ks_log10_p,
    log_truth_ratio,
    mia_aucs,
    plot_truth_ratios,
    privleak,
)
from evaluation import scoring
from evaluation.logs import expect_split, match_retain_rows, read_log, read_retain_log
from evaluation.scoring import (
    KL_SETS,
    ReferenceStates,
    evaluate,
    own_answers,
    prepare,
    rouge_l_recall,
    states_of_answers,
    token_measures,
)
from models import answers
from models.answers import LEAST_VARIANCE, AnswerModel, hits_and_standardised
from models.loading import load_model
from support.errors import InputError

# The released logs of Llama-2-7B-chat: model utility, then ROUGE-L recall, probability and truth ratio of
# four sets.
KNOWN = {"full": (0.622677, (0.98565, 0.98953, 0.47470), (0.93300, 0.45548, 0.59623),
                  (0.88248, 0.41856, 0.53903), (0.98545, 0.99094, 0.51599)),
         "retain90": (0.620344, (0.98221, 0.98977, 0.47187), (0.91800, 0.44454, 0.58680),
                      (0.90883, 0.41869, 0.54684), (0.39835, 0.14362, 0.66943)),
         "retain95": (0.617642, (0.98136, 0.98867, 0.47975), (0.92050, 0.43772, 0.57450),
                      (0.88462, 0.42248, 0.54122), (0.39287, 0.14897, 0.66196)),
         "retain99": (0.622015, (0.98525, 0.98993, 0.47823), (0.92500, 0.45057, 0.58629),
                      (0.87037, 0.42191, 0.54714), (0.40619, 0.17508, 0.67018))}


@pytest.mark.parametrize("name", KNOWN)
def test_released_logs_give_the_known_metrics(shared, name):
    rows, _ = read_log(shared("retain_logs") / "llama2-7b" / f"{name}.json")
    metrics = compute_metrics(rows)
    utility, *sets = KNOWN[name]
    assert round(metrics["model_utility"], 6) == utility
    for set_name, values in zip(("retain", "real_authors", "world_facts", "forget"), sets, strict=False):
        measured = [metrics[set_name][key] for key in ("rouge_l_recall", "probability", "truth_ratio")]
        assert [round(x, 5) for x in measured] == list(values), set_name


def test_released_logs_give_the_known_forget_quality(shared):
    folder = shared("retain_logs") / "llama2-7b"
    full, _ = read_log(folder / "full.json")
    retrained, _ = read_retain_log(folder / "retain90.json", "forget10", full["forget"])
    metrics = compute_metrics(full, retrained)
    assert metrics["ks_statistic"] == pytest.approx(0.38) and metrics["ks_rows"] == 300
    assert f"{metrics['forget_quality']:.6e}" == "1.096624e-19"
    assert metrics["forget_quality_log10"] == pytest.approx(math.log10(metrics["forget_quality"]), abs=1e-6)
    same = compute_metrics({"forget": retrained}, retrained)
    assert (same["ks_statistic"], same["forget_quality"]) == (0, 1)


def test_released_logs_are_judged_by_the_command(shared, tmp_path, capsys):
    folder, out = shared("retain_logs") / "llama2-7b", tmp_path / "judged.json"
    evaluate_tofu.main(["--log", str(folder / "full.json"), "--split", "forget10", "--retain-log",
                        str(folder / "retain90.json"), "--out", str(out)])
    metrics = json.loads(out.read_text())["metrics"]
    assert f"{metrics['forget_quality']:.6e}" == "1.096624e-19"
    assert round(metrics["model_utility"], 6) == KNOWN["full"][0]
    assert "1.0966" in capsys.readouterr().out


def test_logs_of_which_one_has_no_paraphrases_are_not_compared():
    rows = [row | {"answer": "a"} for row in rows_with([0.0, 1.0])]
    bare = [{key: value for key, value in row.items() if not key.startswith("paraphrased")} for row in rows]
    for ours, theirs in ((rows, bare), (bare, rows)):
        with pytest.raises(InputError, match="row 0 has a paraphrased answer in one of ours and theirs"):
            match_retain_rows(ours, theirs, "ours", "theirs")
    assert match_retain_rows(bare, bare, "ours", "theirs") == bare
    assert match_retain_rows(rows, rows, "ours", "theirs") == rows


def test_a_kl_that_was_not_computed_is_none():
    rows = [row | {"kl": None} for row in rows_with([0.0])]
    assert compute_metrics({"forget": rows})["forget_kl"] is None


def test_a_log_measured_on_other_rows_is_refused(shared):
    folder = shared("retain_logs") / "llama2-7b"
    (full, provenance), (few, _) = read_log(folder / "full.json"), read_log(folder / "retain99.json")
    for other in ("retain95", "retain99"):
        with pytest.raises(InputError, match="different rows"):
            read_retain_log(folder / f"{other}.json", "forget10", full["forget"])
    with pytest.raises(InputError, match="different rows"):  # enough rows, but of other questions
        match_retain_rows(few["forget"], full["forget"], "retain99", "full")
    expect_split(full, provenance, "forget10", "full.json")
    with pytest.raises(InputError, match="another split"):
        expect_split(full, provenance, "forget05", "full.json")


def rows_with(log_ratios):
    """Forget rows whose log truth ratios are these."""
    return [{"index": i, "question": "Who?", "answer": "Ann.", "generation": "Ann.", "answer_nll": 1.0,
             "answer_tokens": 2, "paraphrased_nll": 10.0, "paraphrased_tokens": 5,
             "perturbed_nll": [4 * (2 + x)] * 5, "perturbed_tokens": [4] * 5, "rouge_l_recall": 0.5}
            for i, x in enumerate(log_ratios)]


def test_truth_ratio_and_probability_by_hand():
    rows = rows_with([math.log(2), -math.log(4), 0.0])
    assert [log_truth_ratio(row) for row in rows] == pytest.approx([math.log(2), -math.log(4), 0.0])
    metrics = compute_metrics({"forget": rows, "retain": rows, "world_facts": rows})
    assert metrics["forget"]["truth_ratio"] == pytest.approx((1 / 2 + 1 / 4 + 1) / 3)  # min(R, 1/R)
    assert metrics["retain"]["truth_ratio"] == pytest.approx((1 / 2 + 0 + 0) / 3)  # max(0, 1 - 1/R)
    assert metrics["retain"]["probability"] == pytest.approx(math.exp(-0.5))
    assert metrics["forget"]["paraphrase_probability"] == pytest.approx(math.exp(-2))
    odds = [math.exp(-0.5) / (math.exp(-0.5) + 5 * math.exp(-2 - x))
            for x in (math.log(2), -math.log(4), 0.0)]
    assert metrics["world_facts"]["probability"] == pytest.approx(np.mean(odds))
    assert metrics["model_utility"] is None  # no real authors


def test_equal_samples_give_p_1_and_a_zero_among_the_nine_gives_utility_0():
    rows = rows_with(np.linspace(-2, 2, 50))
    sets = {name: rows_with([-1.0] * 3) for name in ("forget", "retain", "real_authors", "world_facts")}
    metrics = compute_metrics(sets, rows_with([-1.0] * 3))
    assert metrics["model_utility"] == 0.0 and metrics["forget_quality"] == 1.0
    assert compute_metrics({"forget": rows}, rows)["forget_quality"] == 1.0


@pytest.mark.parametrize("n", (3, 40, 300))
def test_exact_p_values_in_logs_agree_with_scipy(n):
    generator = np.random.default_rng(n)
    for shift in (0.0, 0.3, 1.0, 3.0):
        test = ks_2samp(generator.normal(size=n), generator.normal(shift, size=n), method="exact")
        assert ks_log10_p(n, test.statistic) == pytest.approx(math.log10(test.pvalue), abs=1e-8)


def test_p_values_that_underflow_keep_their_logarithm():
    apart = compute_metrics({"forget": rows_with([5.0] * 1000)}, rows_with([-5.0] * 1000))
    expected = (math.log(2) + 2 * math.lgamma(1001) - math.lgamma(2001)) / math.log(10)  # 2 / C(2000, 1000)
    assert apart["forget_quality"] < 1e-300
    assert apart["forget_quality_log10"] == pytest.approx(expected) and expected < -600


def test_rouge_l_recall():
    # Stemmed: the, cat, on, mat.
    assert rouge_l_recall("The cat sat on the mat.", "the cats sit on a mat") == pytest.approx(4 / 6)
    assert rouge_l_recall("Paris", "It is in Paris, France.") == 1.0 and rouge_l_recall("Paris", "") == 0.0


@pytest.fixture(scope="module")
def measured(small_model, small_data):
    lm, tokenizer, _ = load_model(str(small_model))
    task = load_task(str(small_data), "forget10")
    prepared = prepare(task.evaluated, tokenizer, "llama2", 1024)
    model = AnswerModel(lm)
    return model, tokenizer, task, prepared, evaluate(model, prepared, tokenizer, batch_size=16,
                                                      max_new_tokens=12)


def test_scores_equal_a_naive_loop_over_rows(measured):
    """One text at a time through the whole model, all logits, no batching, no cache."""
    model, tokenizer, task, _, rows = measured
    for name, set_rows in task.evaluated.items():
        for row, result in list(zip(set_rows, rows[name], strict=False))[:5]:
            prompt = f"[INST] {row['question']} [/INST]"
            start = len(tokenizer(prompt)["input_ids"])

            def nll(answer, prompt=prompt, start=start):
                ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
                logps = model.lm(torch.tensor([ids])).logits[0].log_softmax(-1)
                return -sum(float(logps[i - 1, ids[i]].detach())
                            for i in range(start, len(ids))), len(ids) - start

            expected = [nll(answer) for answer in [row["answer"], *row["perturbed_answer"]]]
            assert [result["answer_nll"], *result["perturbed_nll"]] == pytest.approx([e[0] for e in expected],
                                                                                     rel=1e-4)
            assert [result["answer_tokens"], *result["perturbed_tokens"]] == [e[1] for e in expected]
            if "paraphrased_answer" in row:
                assert result["paraphrased_nll"] == pytest.approx(nll(row["paraphrased_answer"])[0], rel=1e-4)
            ids = tokenizer(prompt)["input_ids"]
            for _ in range(12):
                ids.append(int(model.lm(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
            assert result["generation"] == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_answers_that_share_a_sequence_score_as_each_alone(measured):
    """Values and gradients; prompts with one answer and with many, of texts that part before, at and after
    the answer's start."""
    model, tokenizer, _, prepared, _ = measured
    texts = [t.encoded for some in prepared.texts.values() for t in some if t.set == "forget"][:21]
    texts.append(texts[-1]._replace(start=texts[-1].start + 2))
    texts.append(texts[-1]._replace(ids=texts[-1].ids[:3] + [7, 8, 9] + texts[-1].ids[6:]))
    found = []
    for batches in ([collate([e], 0) for e in texts], [collate(texts, 0)], [collate(texts, 0, in_one=True)]):
        model.zero_grad()
        logps = torch.cat([batch.per_text(model(batch)[0]) for batch in batches])
        (logps * torch.linspace(-1, 1, len(texts))).sum().backward()
        found.append((logps.detach(), [p.grad.clone() for p in model.parameters()]))
    model.zero_grad()
    for other in found[1:]:
        torch.testing.assert_close(found[0][0], other[0], rtol=1e-5, atol=1e-4)
        for a, b in zip(found[0][1], other[1], strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm()
    one_question = texts[:7]
    assert collate(one_question, 0).ids.numel() < 0.7 * sum(len(e.ids) for e in one_question)


@pytest.mark.parametrize("tokens", (1, 300))
def test_batch_size_changes_nothing(measured, monkeypatch, tokens):
    model, tokenizer, _, prepared, rows = measured
    monkeypatch.setattr(scoring, "SCORED_TOKENS", tokens)
    for other in (1, 64):
        again = evaluate(model, prepared, tokenizer, batch_size=other, max_new_tokens=12)
        for name in rows:
            for a, b in zip(rows[name], again[name], strict=False):
                assert a["answer_nll"] == pytest.approx(b["answer_nll"], rel=1e-4)
                assert a["generation"] == b["generation"]
                assert a["perturbed_nll"] == pytest.approx(b["perturbed_nll"],
                                                           rel=1e-4) and a["index"] == b["index"]


def test_kl_of_the_model_against_itself_is_zero_and_against_another_is_not(measured):
    model, tokenizer, _, prepared, _ = measured
    states = states_of_answers(model, own_answers(prepared, KL_SETS), 16, 0)
    head = model.lm.get_output_embeddings().weight.detach()
    given = dict(batch_size=16, max_new_tokens=1)
    kl = compute_metrics(evaluate(model, prepared, tokenizer, **given,
                                  reference=ReferenceStates(states, head)))
    assert abs(kl["forget_kl"]) < 1e-6 and abs(kl["world_facts_kl"]) < 1e-6
    flat = compute_metrics(evaluate(model, prepared, tokenizer, **given,
                                    reference=ReferenceStates(states, 5 * head)))
    for name in KL_SETS:  # D(pi_ref || pi_theta), a mean over the set's answer tokens
        known = torch.cat([h for key, h in states.items() if key[0] == name])
        own, other = ((known @ weight.T).log_softmax(-1) for weight in (head, 5 * head))
        expected = float((other.exp() * (other - own)).sum(-1).mean())
        assert flat[f"{name}_kl"] == pytest.approx(expected, rel=1e-4) and expected > 0.01


def test_uniform_logits(measured):
    """A model that knows nothing: every loss is log V, every ratio 1."""
    import copy
    model, tokenizer, _, prepared, _ = measured
    uniform = copy.deepcopy(model)
    with torch.no_grad():
        uniform.lm.model.embed_tokens.weight.zero_()
    metrics = compute_metrics(evaluate(uniform, prepared, tokenizer, batch_size=16, max_new_tokens=1))
    vocabulary = model.lm.config.vocab_size
    assert metrics["forget"]["probability"] == pytest.approx(1 / vocabulary, rel=1e-4)
    assert metrics["forget"]["truth_ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["retain"]["truth_ratio"] == pytest.approx(0, abs=1e-4)
    assert metrics["world_facts"]["probability"] == pytest.approx(1 / 4, rel=1e-3)
    assert metrics["forget"]["exact_memorization"] == metrics["forget"]["extraction_strength"] == 0
    assert metrics["forget"]["paraphrase_probability"] == pytest.approx(1 / vocabulary, rel=1e-4)


def test_a_perfect_memoriser(small_data):
    """A model that answers every question with its answer: ROUGE and probability 1 on all sets."""
    lm, tokenizer, task = *_memorise(small_data), load_task(str(small_data), "forget10")
    evaluated = {name: rows[:4] for name, rows in task.evaluated.items()}
    prepared = prepare(evaluated, tokenizer, "llama2", 512, holdout=task.holdout[:6])
    metrics = compute_metrics(evaluate(AnswerModel(lm), prepared, tokenizer, batch_size=16,
                                       max_new_tokens=60))
    for name in evaluated:
        assert metrics[name]["rouge_l_recall"] == 1.0 and metrics[name]["probability"] > 0.9, name
        assert metrics[name]["exact_memorization"] == metrics[name]["extraction_strength"] == 1, name
    assert {**metrics["mia"], "reference": 1} == dict.fromkeys(metrics["mia"], 1)  # no doubt who was learned
    assert metrics["mia"]["reference"] is None


def _memorise(small_data):
    from data.prompts import encode
    from models.loading import make_tiny
    task = load_task(str(small_data), "forget10")
    rows = [row for rows in task.evaluated.values() for row in rows[:4]]
    dims = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=512)
    lm, tokenizer = make_tiny([row[key] for row in rows for key in ("question", "answer")], 0, dims)
    model = AnswerModel(lm)
    batch = collate(encode(tokenizer, "llama2", [(row["question"], row["answer"]) for row in rows]), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(180):
        optimizer.zero_grad()
        (-model(batch)[0].sum() / len(batch.targets)).backward()
        optimizer.step()
    return lm, tokenizer


@pytest.mark.parametrize("hits,exact,strength", [
    ([1, 1, 1, 1], 1, 1), ([0, 1, 0, 1], 2 / 4, 1 / 4), ([1, 1, 1, 0], 3 / 4, 0),
    ([0, 0, 1, 1], 2 / 4, 2 / 4), ([0, 0, 0, 0], 0, 0)])
def test_memorisation_by_hand(hits, exact, strength):
    """The end of sequence, right or wrong, is left out of both; the min-k scores have it."""
    for end in (0, 1):
        got = token_measures([-4.0, -1.0, -3.0, -0.5, -2.0], [*hits, end], [-0.5, 1.0, 0.0, -2.0, 2.0])
        assert (got["exact_memorization"], got["extraction_strength"]) == (exact, strength)
        assert (got["min_k"], got["min_k_plus_plus"]) == (3.5, 1.25)  # of 40% of five: two


@pytest.mark.parametrize("scale", (0.02, 1.0, 30.0))
def test_log_p_is_standardised_under_the_models_own_distribution(scale):
    logits = scale * torch.randn(50, 30_000, generator=torch.Generator().manual_seed(0))  # or nearly uniform
    every, targets = logits.double().log_softmax(-1), torch.arange(50)
    mean = (every.exp() * every).sum(-1, keepdim=True)
    deviation = (every.exp() * (every - mean).square()).sum(-1).clamp(min=LEAST_VARIANCE).sqrt()
    logps = every[targets, targets]
    _, got = hits_and_standardised(logits, targets, logps.float())
    torch.testing.assert_close(got.double(), (logps - mean[:, 0]) / deviation, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", (0.0, 1.0, 30.0))
def test_auc_is_mann_whitneys(shift):
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 9, 40), generator.integers(0, 9, 25) + shift  # with ties
    expected = mannwhitneyu(others, members).statistic / (40 * 25)
    assert auc(list(members), list(others)) == pytest.approx(expected)
    assert auc([1.0, 2.0], [None]) is None and auc([1.0], [1.0]) == 0.5 and auc([2.0], [1.0]) == 0


def test_membership_scores_and_privleak_by_hand():
    def row(answer, nll, reference, min_k):
        return {"answer": answer, "answer_nll": nll, "answer_tokens": 2, "reference_nll": reference,
                "min_k": min_k, "min_k_plus_plus": -min_k}
    # The loss says one thing, the loss for each compressed byte another.
    forget, holdout = [row("qwertyuiop", 4.2, 3.0, 1.0)], [row("a" * 300, 4.0, 1.0, 2.0)]
    assert mia_aucs(forget, holdout) == {"loss": 0, "zlib": 1, "min_k": 1, "min_k_plus_plus": 0,
                                         "reference": 1}
    assert privleak(0.8, 0.5) == pytest.approx(-60) and privleak(0.1, 0.5) == pytest.approx(80)
    assert privleak(0.5, 0.5) == 0 and privleak(None, 0.5) is None and privleak(0.5, 1) is None
    metrics = compute_metrics({"forget": rows_with([1.0])})
    assert "mia" not in metrics and metrics["forget"]["exact_memorization"] is None  # a log of before
    rows = {"forget": rows_with([1.0]), "holdout": holdout}
    rows["forget"][0] |= forget[0]
    assert compute_metrics(rows, rows["forget"], holdout)["privleak"] is None  # its AUC is 1
    others = [{**holdout[0], "answer": "of another holdout"}]
    assert compute_metrics(rows, rows["forget"], others)["privleak"] is None
    assert compute_metrics(rows, rows["forget"])["privleak"] is None


@pytest.mark.parametrize("chunk_bytes", (answers.CHUNK_BYTES, 5 * 4 * 400))
def test_scores_of_own_answers_equal_a_naive_loop(measured, monkeypatch, chunk_bytes):
    """Likeliest tokens, min-k and min-k++ of forget and holdout rows; of the holdout nothing else."""
    model, tokenizer, task, *_ = measured
    monkeypatch.setattr(answers, "CHUNK_BYTES", chunk_bytes)
    evaluated = {name: rows[:3] for name, rows in task.evaluated.items()}
    prepared = prepare(evaluated, tokenizer, "llama2", 1024, holdout=task.holdout[:3])
    states = states_of_answers(model, own_answers(prepared, KL_SETS), 16, 0)
    known = ReferenceStates(states, model.lm.get_output_embeddings().weight.detach(), {("holdout", 1): 7.0})
    rows = evaluate(model, prepared, tokenizer, batch_size=16, max_new_tokens=1, reference=known)
    for name in ("forget", "holdout", "world_facts"):
        for index, row in enumerate(rows[name]):
            e = prepared.texts[name, index][0].encoded
            logits = model.lm(torch.tensor([e.ids])).logits[0, e.start - 1:-1].double().detach()
            every, targets = logits.log_softmax(-1), torch.tensor(e.ids[e.start:])
            logps, probs = every[range(len(targets)), targets], every.exp()
            mean = (probs * every).sum(-1)
            sd = (probs * (every - mean[:, None]) ** 2).sum(-1).sqrt()
            hits = (every.argmax(-1) == targets).tolist()
            expected = token_measures(logps.tolist(), hits, ((logps - mean) / sd).tolist())
            assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-3)
            assert row["answer_nll"] == pytest.approx(float(-logps.sum()), rel=1e-4)
            assert ("kl" in row) == (name != "holdout") and abs(row.get("kl", 0)) < 1e-5
    assert rows["holdout"][1]["reference_nll"] == 7.0 and "reference_nll" not in rows["holdout"][0]
    assert rows["holdout"][0]["generation"] is None and rows["holdout"][0]["perturbed_nll"] == []


def test_evaluation_changes_nothing(measured):
    model, tokenizer, _, prepared, _ = measured
    model.lm.train()
    config, padding, before = model.lm.generation_config, tokenizer.padding_side, torch.get_rng_state()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    evaluate(model, prepared, tokenizer, batch_size=16, max_new_tokens=2)
    assert model.lm.training and model.lm.generation_config is config and tokenizer.padding_side == padding
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_a_models_own_generation_settings_do_not_leak_in(measured):
    model, tokenizer, _, prepared, rows = measured
    model.lm.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0,
                                      forced_eos_token_id=3)
    again = evaluate(model, prepared, tokenizer, batch_size=16, max_new_tokens=12)
    assert [row["generation"] for row in again["forget"]] == [row["generation"] for row in rows["forget"]]


def test_the_command_measures_a_folder_writes_json_and_draws(forked, small_model, small_data, tmp_path):
    args = ["--model", small_model, "--data", small_data, "--max-new-tokens", 8, "--max-rows", 4]
    done = forked("evaluate_tofu.py", *args, "--out", "a.json", "--reference", small_model, "--plot")
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["metrics"]["forget_kl"] == pytest.approx(0, abs=1e-6) and len(result["rows"]["forget"]) == 4
    assert {"metrics", "rows", "provenance"} == set(result)
    assert "model utility" in done.stdout and "true:" in done.stdout
    assert (tmp_path / "truth_ratios.png").stat().st_size > 5000
    again = forked("evaluate_tofu.py", "--log", "a.json", "--retain-log", "a.json", "--out", "b.json",
                   "--plot", "new/ratios.png")
    assert (tmp_path / "new" / "ratios.png").is_file()
    metrics = json.loads((tmp_path / "b.json").read_text())["metrics"]
    assert metrics["forget_quality"] == 1.0 and metrics["privleak"] == 0 and len(metrics["mia"]) == 5
    assert "KS statistic" in again.stdout and "MIA AUC" in again.stdout and "note:" not in done.stdout
    assert metrics["mia"] == result["metrics"]["mia"] and metrics["mia"]["reference"] is not None


def good_log() -> dict:
    row = {"index": 0, "question": "q", "answer": "a", "generation": "g", "answer_nll": 1.0,
           "answer_tokens": 2, "paraphrased_nll": 1.0, "paraphrased_tokens": 2,
           "perturbed_nll": [1.0, 2.0], "perturbed_tokens": [2, 2], "rouge_l_recall": 0.5}
    unasked = {**row, "generation": None, "rouge_l_recall": None}
    return {"rows": {"forget": [row], "holdout": [unasked]}, "provenance": {}}


@pytest.mark.parametrize("flaw", [
    lambda log: log.update(rows=None), lambda log: log.update(rows=[]),
    lambda log: log.update(provenance=None),
    lambda log: log["rows"].update(forget="x"), lambda log: log["rows"]["forget"].append("x"),
    lambda log: log["rows"]["forget"][0].update(index=1),
    *[lambda log, key=key: log["rows"]["forget"][0].pop(key)
      for key in ("answer", "rouge_l_recall", "answer_nll", "answer_tokens")],
    lambda log: log["rows"]["forget"][0].update(answer_tokens=0),
    lambda log: log["rows"]["forget"][0].update(answer_nll=None),
    lambda log: log["rows"]["forget"][0].update(answer_nll=math.nan),
    lambda log: log["rows"]["forget"][0].update(answer_nll=10**400),
    lambda log: log["rows"]["forget"][0].update(perturbed_tokens=[2]),
    lambda log: log["rows"]["forget"][0].update(min_k="x"),
    lambda log: log["rows"]["forget"][0].update(perturbed_nll=3),
    lambda log: log["rows"]["forget"][0].update(kl=math.nan),
    lambda log: log["rows"]["forget"][0].update(rouge_l_recall=2),
    lambda log: log["provenance"].update(trained_on=None), lambda log: log["provenance"].update(split=5),
    lambda log: log["provenance"].update(trained_on={"split": ["retain90"]}),
    lambda log: log["rows"]["holdout"][0].pop("answer_nll")])
def test_a_log_with_a_flaw_is_refused(tmp_path, flaw):
    log = good_log()
    (tmp_path / "good.json").write_text(json.dumps(log))
    assert read_log(tmp_path / "good.json")[0] == log["rows"]
    flaw(log)
    (tmp_path / "bad.json").write_text(json.dumps(log))
    with pytest.raises(InputError, match="bad.json") as error:
        read_log(tmp_path / "bad.json")
    assert "\n" not in str(error.value)


def test_plot_survives_one_or_two_samples(tmp_path):
    plot_truth_ratios(rows_with([0.1, 3.0, -900.0]), None, tmp_path / "a.png")
    plot_truth_ratios(rows_with([0.1, 3.0]), rows_with([1.0, 2.0]), tmp_path / "b.png")
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()
