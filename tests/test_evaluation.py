"""The metrics: released logs with published values, rows and models made by hand, a naive loop over rows, the
library's generation, and logs that are refused."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp

import evaluate_tofu
from common import InputError, write_json
from conftest import ROOT
from data.batches import collate
from data.tofu import load_task
from evaluate_tofu import (ResidentReference, evaluate, generate, prepare, read_log, read_retain_log,
                           rouge_l_recall, score, token_measures)
from metrics import (KL_SETS, agreement, auc, compute_metrics, ks_log10_p, log_truth_ratio,
                     log_truth_ratios, metrics_table, mia_aucs, plot_trajectory,
                     plot_truth_ratios, privleak, probability_among_options, truth_ratio)
from model import AnswerModel, load_model

# The released logs of Llama-2-7B-chat: model utility, then ROUGE-L recall, probability and truth ratio of the
# retain, real-author, world-fact and forget rows.
PUBLISHED = {
    "full": (0.622677, (0.98565, 0.98953, 0.47470), (0.93300, 0.45548, 0.59623), (0.88248, 0.41856, 0.53903),
             (0.98545, 0.99094, 0.51599)),
    "retain90": (0.620344, (0.98221, 0.98977, 0.47187), (0.91800, 0.44454, 0.58680),
                 (0.90883, 0.41869, 0.54684), (0.39835, 0.14362, 0.66943)),
    "retain95": (0.617642, (0.98136, 0.98867, 0.47975), (0.92050, 0.43772, 0.57450),
                 (0.88462, 0.42248, 0.54122), (0.39287, 0.14897, 0.66196)),
    "retain99": (0.622015, (0.98525, 0.98993, 0.47823), (0.92500, 0.45057, 0.58629),
                 (0.87037, 0.42191, 0.54714), (0.40619, 0.17508, 0.67018))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_logs_give_the_published_metrics(shared, name):
    rows, _ = read_log(str(shared("retain_logs") / "llama2-7b" / f"{name}.json"))
    metrics, (utility, *sets) = compute_metrics(rows), PUBLISHED[name]
    assert round(metrics["model_utility"], 6) == utility
    for evaluated, values in zip(("retain", "real_authors", "world_facts", "forget"), sets, strict=True):
        measured = [metrics[evaluated][key] for key in ("rouge_l_recall", "probability", "truth_ratio")]
        assert [round(value, 5) for value in measured] == list(values), evaluated


def test_the_command_judges_released_logs(shared, tmp_path, capsys):
    folder, out = shared("retain_logs") / "llama2-7b", tmp_path / "judged.json"
    words = ["--log", str(folder / "full.json"), "--out", str(out), "--retain-log"]
    evaluate_tofu.main([*words, str(folder / "retain90.json"), "--split", "forget10"])
    metrics = json.loads(out.read_text())["metrics"]
    assert f"{metrics['forget_quality']:.6e}" == "1.096624e-19"
    assert metrics["ks_statistic"] == pytest.approx(0.38) and metrics["ks_rows"] == 300
    assert metrics["forget_quality_log10"] == pytest.approx(math.log10(metrics["forget_quality"]), abs=1e-6)
    assert "1.097e-19" in capsys.readouterr().out
    for name in ("retain95", "retain99"):
        with pytest.raises(InputError, match="forget rows, not the 300"):
            evaluate_tofu.main([*words, str(folder / f"{name}.json")])
    with pytest.raises(InputError, match="for --split forget05"):
        evaluate_tofu.main([*words, str(folder / "retain95.json"), "--split", "forget05"])


# ---------------------------------------------------------------- rows made by hand

def rows_with(log_ratios):
    """Rows with these log truth ratios, an answer loss of 0.5 and a paraphrase loss of 2 nats per token."""
    return [{"index": i, "question": f"Who is {i}?", "answer": f"Ann {i}.", "generation": "Ann.",
             "answer_nll": 1.0, "answer_tokens": 2, "paraphrased_nll": 10.0, "paraphrased_tokens": 5,
             "perturbed_nll": [4 * (1 + x), 2 * (1 + x), 4 + x], "perturbed_tokens": [4, 2, 1],
             "rouge_l_recall": 0.25} for i, x in enumerate(log_ratios)]


def test_truth_ratio_and_probability_by_hand():
    log_ratios = [math.log(2), -math.log(4), 0.0]
    rows = rows_with(log_ratios)
    assert [log_truth_ratio(row) for row in rows] == pytest.approx(log_ratios)
    metrics = compute_metrics({"forget": rows, "retain": rows, "world_facts": rows})
    assert metrics["forget"]["truth_ratio"] == pytest.approx((1 / 2 + 1 / 4 + 1) / 3)  # min(R, 1/R)
    assert metrics["forget_truth_ratio"] == metrics["forget"]["truth_ratio"]
    assert metrics["retain"]["truth_ratio"] == pytest.approx((1 / 2 + 0 + 0) / 3)  # max(0, 1 - 1/R)
    assert metrics["retain"]["probability"] == pytest.approx(math.exp(-0.5))
    assert metrics["forget"]["paraphrase_probability"] == pytest.approx(math.exp(-2))
    odds = [math.exp(-0.5) / (math.exp(-0.5) + 2 * math.exp(-1 - x) + math.exp(-4 - x)) for x in log_ratios]
    assert metrics["world_facts"]["probability"] == pytest.approx(np.mean(odds))
    assert metrics["forget"]["rows"] == 3 and metrics["model_utility"] is None  # no real authors


def test_rows_without_a_paraphrase_or_without_perturbed_answers():
    row = {**rows_with([0.0])[0], "paraphrased_nll": None, "paraphrased_tokens": None}
    assert log_truth_ratio(row) == pytest.approx(2.0 - 0.5)  # the answer stands in for the paraphrase
    assert compute_metrics({"forget": [row]})["forget"]["paraphrase_probability"] is None
    bare = {**row, "perturbed_nll": [], "perturbed_tokens": []}
    assert log_truth_ratio(bare) is truth_ratio(bare, True) is probability_among_options(bare) is None


def test_a_collapsed_model_still_gives_numbers():
    row = {**rows_with([0.0])[0], "answer_nll": 4e3, "paraphrased_nll": 9e3, "perturbed_nll": [4e3, 2e4, 7e3]}
    assert (truth_ratio(row, True), truth_ratio(row, False)) == (0, 1)
    assert probability_among_options(row) == 0 and log_truth_ratio(row) == 6000 - 1800


def test_model_utility_is_the_harmonic_mean_of_nine_numbers():
    sets = {name: rows_with([math.log(4)] * 3) for name in ("retain", "real_authors", "world_facts")}
    among = math.exp(-0.5) / (math.exp(-0.5) + (2 * math.exp(-1) + math.exp(-4)) / 4)
    nine = [0.25] * 3 + [0.75] * 3 + [math.exp(-0.5), among, among]
    assert compute_metrics(sets)["model_utility"] == pytest.approx(9 / sum(1 / value for value in nine))
    sets["retain"] = rows_with([-1.0] * 3)  # a truth ratio of 0
    assert compute_metrics(sets)["model_utility"] == 0


def test_forget_quality_is_the_ks_tests_p_value():
    x, y = np.linspace(-2, 2, 50), np.linspace(-1, 2.5, 50)
    test, metrics = ks_2samp(x, y), compute_metrics({"forget": rows_with(x)}, rows_with(y))
    assert metrics["forget_quality"] == pytest.approx(test.pvalue) and metrics["ks_rows"] == 50
    assert metrics["ks_statistic"] == pytest.approx(test.statistic) and 0.01 < test.pvalue < 0.5
    same = compute_metrics({"forget": rows_with(x)}, rows_with(x))
    assert (same["forget_quality"], same["ks_statistic"], same["forget_quality_log10"]) == (1, 0, 0)
    alone = compute_metrics({"forget": rows_with(x)})
    assert alone["forget_quality"] is alone["forget_quality_log10"] is alone["ks_statistic"] is None


@pytest.mark.parametrize("n", (3, 40, 300))
def test_exact_p_values_in_logarithms_agree_with_scipy(n):
    generator = np.random.default_rng(n)
    for shift in (0.0, 0.3, 1.0, 3.0):
        test = ks_2samp(generator.normal(size=n), generator.normal(shift, size=n), method="exact")
        assert ks_log10_p(n, test.statistic) == pytest.approx(math.log10(test.pvalue), abs=1e-8)
    assert ks_log10_p(n, 0.0) == 0 and ks_log10_p(n, 1 / n) == pytest.approx(0, abs=1e-9)


def test_p_values_that_underflow_keep_their_logarithm():
    apart = compute_metrics({"forget": rows_with([5.0] * 1000)}, rows_with([-5.0] * 1000))
    expected = (math.log(2) + 2 * math.lgamma(1001) - math.lgamma(2001)) / math.log(10)  # 2 / C(2000, 1000)
    assert apart["forget_quality"] < 1e-300
    assert apart["forget_quality_log10"] == pytest.approx(expected) and expected < -600


def test_kl_is_a_mean_over_answer_tokens_and_memorisation_over_rows():
    measures = ({"kl": 3.0, "answer_tokens": 2, "exact_memorization": 0.5, "extraction_strength": 0.25},
                {"kl": 1.0, "answer_tokens": 6, "exact_memorization": 1.0, "extraction_strength": 0.25})
    rows = [row | measure for row, measure in zip(rows_with([0.0, 0.0]), measures, strict=True)]
    metrics = compute_metrics({"forget": rows, "world_facts": [rows[0] | {"kl": None}, rows[1]]})
    assert metrics["forget_kl"] == 4 / 8 and metrics["world_facts_kl"] is None
    forget = metrics["forget"]
    assert (forget["exact_memorization"], forget["extraction_strength"]) == (0.75, 0.25)


def test_rouge_l_recall_by_hand():
    # Stemmed: the, cat, on, mat.
    assert rouge_l_recall("The cat sat on the mat.", "the cats sit on a mat") == pytest.approx(4 / 6)
    assert rouge_l_recall("Paris", "It is in Paris, France.") == 1.0 and rouge_l_recall("Paris", "") == 0.0


@pytest.mark.parametrize("hits, exact, strength", [
    ([1, 1, 1, 1], 1, 1), ([0, 1, 0, 1], 2 / 4, 1 / 4), ([1, 1, 1, 0], 3 / 4, 0),
    ([0, 0, 1, 1], 2 / 4, 2 / 4), ([0, 0, 0, 0], 0, 0)])
def test_memorisation_and_min_k_by_hand(hits, exact, strength):
    """The end of sequence, right or wrong, does not count as memorised. The min-k scores include it."""
    for end in (0, 1):
        measures = score([-4.0, -1.0, -3.0, -0.5, -2.0], [*hits, end], [-0.5, 1.0, 0.0, -2.0, 2.0])
        assert measures == {"nll": 10.5, "tokens": 5, "exact_memorization": exact,
                            "extraction_strength": strength, "min_k": 3.5, "min_k_plus_plus": 1.25}  # of two
    assert score([-4.0], [1], [-2.0]) == {"nll": 4, "tokens": 1, "exact_memorization": 1,
                                          "extraction_strength": 1, "min_k": 4, "min_k_plus_plus": 2}
    assert score([-4.0, -2.0]) == {"nll": 6, "tokens": 2}


@pytest.mark.parametrize("scale", (0.02, 1.0, 30.0))
def test_log_p_is_standardised_under_the_models_own_distribution(scale):
    logits = scale * torch.randn(20, 3000, generator=torch.Generator().manual_seed(0))
    targets = torch.cat([logits[:5].argmax(-1), torch.arange(5, 20)])
    log_p = logits.double().log_softmax(-1)
    logps, mean = log_p[torch.arange(20), targets], (log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p**2).sum(-1) - mean**2
    measured, hits, standardised = token_measures(logits, targets)
    torch.testing.assert_close(measured, logps.float(), rtol=1e-5, atol=1e-4)
    assert hits.tolist() == [1] * 5 + [0] * 15
    expected = (logps - mean) / variance.clamp(min=1e-6).sqrt()
    torch.testing.assert_close(standardised.double(), expected, rtol=1e-3, atol=1e-3)


def test_auc_is_the_share_of_pairs_in_which_the_member_scores_lower():
    generator = np.random.default_rng(0)
    members, unseen = generator.integers(0, 9, 40), generator.integers(1, 9, 25)  # with ties
    lower, equal = (of(members[:, None], unseen).mean() for of in (np.less, np.equal))
    assert auc(list(members), list(unseen)) == pytest.approx(lower + equal / 2)
    assert auc([1.0], [1.0]) == 0.5 and auc([2.0], [1.0]) == 0 and auc([1.0], [2.0]) == 1
    assert auc([1.0, 2.0], [None]) is auc([None], [1.0]) is None


def member(answer: str, nll: float, tokens: int, reference_nll: float, min_k: float) -> dict:
    return {**rows_with([1.0])[0], "answer": answer, "answer_nll": nll, "answer_tokens": tokens,
            "reference_nll": reference_nll, "min_k": min_k, "min_k_plus_plus": -min_k}


def test_membership_scores_by_hand():
    """The loss says one thing, the loss per compressed byte another. The reference's loss is per token."""
    forget, holdout = [member("qwertyuiop", 4.2, 2, 3.0, 1.0)], [member("a" * 300, 20.0, 10, 14.1, 2.0)]
    assert mia_aucs(forget, holdout) == {
        "loss": 0, "zlib": 1, "min_k": 1, "min_k_plus_plus": 0, "reference": 0}
    assert mia_aucs([{**forget[0], "reference_nll": 4.0}], holdout)["reference"] == 1
    assert mia_aucs(rows_with([0.0]), holdout) == {
        "loss": 1, "zlib": 1, "min_k": None, "min_k_plus_plus": None, "reference": None}


def test_privleak_by_hand():
    assert privleak(0.8, 0.5) == pytest.approx(-60) and privleak(0.1, 0.5) == pytest.approx(80)
    assert privleak(0.9, 0.6) == pytest.approx(-75) and privleak(0.5, 0.5) == 0
    assert privleak(None, 0.5) is privleak(0.5, None) is privleak(0.5, 1) is None
    retrained, holdout = ([member(f"{name} {k}", 4.0, 2, 3.0, k) for k in scores]
                          for name, scores in (("f", (1, 4)), ("h", (2, 3))))
    rows = {"forget": [{**row, "min_k": 1} for row in retrained],
            "holdout": [{**row, "min_k": 9} for row in holdout]}
    assert compute_metrics(rows, retrained, holdout + retrained)["privleak"] == -100  # AUC 1; retrained 1/2
    assert compute_metrics(rows, retrained, holdout[::-1])["privleak"] is None  # another holdout
    assert compute_metrics(rows, retrained)["privleak"] is compute_metrics(rows)["privleak"] is None
    assert "mia" not in compute_metrics({"forget": retrained})


# ---------------------------------------------------------------- models made by hand

class Lines:
    """The hand-made model's cache: all tokens so far, (1, lines, tokens)."""
    ids = ()

    def batch_select_indices(self, lines: torch.Tensor):
        self.ids = self.ids[:, lines]


class Memoriser:
    """A model that is nearly certain of its texts. Everywhere else all tokens are equally likely."""

    def __init__(self, texts: list, vocabulary: int):
        self.lm, self.vocabulary = torch.nn.Identity(), vocabulary
        self.lm.config = None  # no limit of positions
        self.next = {tuple(text.ids[:k]): text.ids[k] for text in texts
                     for k in range(text.start, len(text.ids))}

    def modules(self):
        return []

    def logits(self, lines: list) -> torch.Tensor:
        tokens = torch.tensor([self.next.get(tuple(line), -1) for line in lines])
        return 12 * F.one_hot(tokens + 1, self.vocabulary + 1)[:, 1:].float()

    def __call__(self, batches: list) -> tuple[None, torch.Tensor]:
        return None, self.logits([batch.ids[line, :column + 1].tolist() for batch in batches
                                  for line, column in zip(batch.lines, batch.columns, strict=True)])

    def next_logits(self, input_ids, attention_mask, position_ids, cache):
        cache = Lines() if cache is None else cache
        cache.ids = torch.cat([*cache.ids, input_ids], 1)[None]
        return self.logits([line[real.bool()].tolist()
                            for line, real in zip(cache.ids[0], attention_mask, strict=True)]), cache


@pytest.fixture(scope="module")
def tiny():
    return load_model(str(ROOT / "data/tiny/start"))


@pytest.fixture(scope="module")
def prepared(tiny):
    task = load_task("builtin", "forget10")
    return prepare(task.evaluated | {"holdout": task.holdout}, tiny.tokenizer, "llama2", max_rows=3)


def measure(model, prepared, tokenizer, batch_size: int = 8, max_new_tokens: int = 40, reference=None):
    return evaluate(model, prepared, tokenizer, batch_size, max_new_tokens, reference)


def test_a_perfect_memoriser(tiny, prepared):
    answers = [text for key, text in prepared.texts.items() if "answer" in key and "holdout" not in key]
    rows = measure(Memoriser(answers, tiny.tokenizer.vocab_size), prepared, tiny.tokenizer)
    metrics = compute_metrics(rows)
    for name in ("forget", "retain", "real_authors", "world_facts"):
        assert metrics[name]["rouge_l_recall"] == 1 and metrics[name]["probability"] > 0.98, name
        assert metrics[name]["exact_memorization"] == metrics[name]["extraction_strength"] == 1, name
        assert [row["generation"] for row in rows[name]] == [row["answer"] for row in prepared.rows[name]]
    assert {**metrics["mia"], "reference": 1} == dict.fromkeys(metrics["mia"], 1)  # no doubt who was learned
    assert metrics["mia"]["reference"] is metrics["forget_kl"] is None


def test_a_model_without_any_knowledge(tiny, prepared):
    """Every loss is log V, and every R is 1."""
    vocabulary = tiny.tokenizer.vocab_size
    rows = measure(Memoriser([], vocabulary), prepared, tiny.tokenizer, max_new_tokens=1)
    metrics = compute_metrics(rows, rows["forget"], rows["holdout"])
    assert metrics["forget"]["probability"] == pytest.approx(1 / vocabulary)
    assert metrics["forget"]["paraphrase_probability"] == pytest.approx(1 / vocabulary)
    assert metrics["forget"]["truth_ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["retain"]["truth_ratio"] == pytest.approx(0, abs=1e-5)
    assert metrics["world_facts"]["probability"] == pytest.approx(1 / 4)  # three perturbed answers
    assert metrics["forget"]["exact_memorization"] == metrics["forget"]["extraction_strength"] == 0
    assert metrics["privleak"] == 0 and metrics["forget_quality"] == 1


# ---------------------------------------------------------------- the tiny model

@pytest.fixture(scope="module")
def measured(tiny, prepared):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_tofu, "CHUNK", 16)  # a batch of tokens is measured in several parts
        return measure(AnswerModel(tiny.lm), prepared, tiny.tokenizer)


def test_prepared_rows(tiny, prepared):
    assert {name: len(rows) for name, rows in prepared.rows.items()} == dict.fromkeys(
        ("forget", "retain", "real_authors", "world_facts", "holdout"), 3)
    compared = {f"{name}/{i}/answer" for name in (*KL_SETS, "holdout") for i in range(3)}
    assert prepared.compared().keys() == compared
    assert {key for key in prepared.texts if key.startswith("holdout")} < compared  # answers alone
    rows = {"forget": [{"question": "Who?", "answer": "Ann."}] * 4}
    assert len(prepare(rows, tiny.tokenizer, "llama2", 0).texts) == 4  # all rows
    with pytest.raises(InputError, match="the model's context is 8"):
        prepare(rows, tiny.tokenizer, "llama2", context=8)


def test_scores_equal_a_naive_loop_over_rows(tiny, prepared, measured):
    """One text at a time through the model, all logits, no batches, no cache."""
    def predictions(question, answer):
        prompt = f"[INST] {question} [/INST]"
        ids = tiny.tokenizer(prompt + answer)["input_ids"] + [tiny.tokenizer.eos_token_id]
        start = len(tiny.tokenizer(prompt)["input_ids"])
        log_p = tiny.lm(torch.tensor([ids])).logits[0, start - 1:-1].detach().double().log_softmax(-1)
        return log_p, torch.tensor(ids[start:]), log_p.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]

    for name, rows in prepared.rows.items():
        for row, result in zip(rows, measured[name], strict=True):
            log_p, targets, logps = predictions(row["question"], row["answer"])
            mean = (log_p.exp() * log_p).sum(-1)
            deviation = ((log_p.exp() * (log_p - mean[:, None]) ** 2).sum(-1)).sqrt()
            hits = (log_p.argmax(-1) == targets).tolist()
            expected = score(logps.tolist(), hits, ((logps - mean) / deviation).tolist())
            expected |= {"answer_nll": expected.pop("nll"), "answer_tokens": expected.pop("tokens")}
            assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-3), name
            texts = [None] if name == "holdout" else [row.get("paraphrased_answer"), *row["perturbed_answer"]]
            nlls = [result["paraphrased_nll"], *result["perturbed_nll"]]
            for text, nll in zip(texts, nlls, strict=True):
                expected_nll = text and -predictions(row["question"], text)[2].sum().item()
                assert nll == (text and pytest.approx(expected_nll, rel=1e-4))
            assert (result["question"], result["answer"]) == (row["question"], row["answer"])
            assert (result["generation"] is None) == (result["rouge_l_recall"] is None) == (name == "holdout")
    assert measured["forget"][0]["generation"] == prepared.rows["forget"][0]["answer"]  # the start knows it


def test_kl_is_the_divergence_from_the_reference(tiny, prepared):
    model, blank = AnswerModel(tiny.lm), Memoriser([], tiny.tokenizer.vocab_size)
    batches = {key: collate([text], pad=0) for key, text in prepared.compared().items()}
    same, against_blank = (measure(model, prepared, tiny.tokenizer, max_new_tokens=1,
                                   reference=ResidentReference(lm, batches)) for lm in (model, blank))
    metrics = compute_metrics(same)
    assert abs(metrics["forget_kl"]) < 1e-6 and abs(metrics["world_facts_kl"]) < 1e-6
    for name in same:
        for row in same[name]:
            assert ("kl" in row) == (name in KL_SETS)
            assert row.get("reference_nll") == (pytest.approx(row["answer_nll"], rel=1e-4)
                                                if name in (*KL_SETS, "holdout") else None)
    # Against a reference that knows nothing, D(pi_ref || pi_theta) is -log V - mean over V of log pi_theta.
    text, row = prepared.texts["forget/1/answer"], against_blank["forget"][1]
    logits = tiny.lm(torch.tensor([text.ids])).logits[0, text.start - 1:-1].detach()
    divergence = -math.log(blank.vocabulary) - logits.log_softmax(-1).mean(-1)
    assert row["kl"] == pytest.approx(divergence.sum().item(), rel=1e-4)
    assert row["reference_nll"] == pytest.approx(math.log(blank.vocabulary) * text.answer_tokens)


def test_evaluation_changes_nothing(tiny, prepared):
    model, tokenizer = AnswerModel(tiny.lm), tiny.tokenizer
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state, texts = torch.get_rng_state(), [str(tokenizer), str(tiny.lm.generation_config), str(prepared)]
    for training in (True, False):
        model.lm.train(training)
        measure(model, prepared, tokenizer, max_new_tokens=2)
        assert model.lm.training == training
    assert [str(tokenizer), str(tiny.lm.generation_config), str(prepared)] == texts
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[name], p) and p.grad is None for name, p in model.named_parameters())


def random_model(kind: str):
    """A model of this kind. Its random weights are large, so that its answers differ."""
    from transformers import AutoConfig, AutoModelForCausalLM
    sizes = {"gpt2": dict(n_embd=32, n_layer=2, n_head=4), "mamba": dict(hidden_size=32, num_hidden_layers=2)}
    config = AutoConfig.for_model(kind, vocab_size=50, bos_token_id=1, eos_token_id=2, **sizes[kind])
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    for parameter in lm.parameters():
        parameter.data *= 5 if parameter.ndim > 1 else 1
    return lm


@pytest.mark.parametrize("kind", ("tiny", "gpt2", "mamba"))
def test_generation_equals_the_librarys(tiny, kind):
    """Prompts of unequal length in one batch, against `generate` on each prompt alone."""
    lm, end = (tiny.lm, tiny.tokenizer.eos_token_id) if kind == "tiny" else (random_model(kind), 2)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4]]
    answers = [lm.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=end,
                           pad_token_id=end)[0, len(prompt):].tolist() for prompt in prompts]
    for length in (12, 2):
        cut = [answer[:length] for answer in answers]
        padded = [answer + [end] * (max(map(len, cut)) - len(answer)) for answer in cut]
        assert generate(AnswerModel(lm), prompts, end, length, "cpu") == padded
    assert len({tuple(answer) for answer in answers}) > 2


# ---------------------------------------------------------------- logs, the command, pictures

def good_log() -> dict:
    rows = rows_with([0.0, 1.0])
    return {"rows": {"forget": rows, "holdout": [{**rows[0], "generation": None, "rouge_l_recall": None}]},
            "provenance": {"template": "llama2", "data_fingerprint": "d0", "split": "forget10",
                           "trained_on": {"split": "retain90", "data_fingerprint": "d0"}}}


@pytest.mark.parametrize("flaw", [
    lambda log: log.pop("rows"), lambda log: log["rows"].update(forget=[]),
    lambda log: log["rows"]["forget"][0].update(index=1), lambda log: log["rows"]["forget"].pop(0),
    lambda log: log["rows"]["forget"][0].pop("answer_nll"),
    lambda log: log["rows"]["forget"][0].update(answer_tokens=0),
    lambda log: log.update({"eval_log_forget.json": {}})])
def test_a_log_with_a_flaw_is_refused_with_one_sentence(tmp_path, flaw):
    log = good_log()
    flaw(log)
    (tmp_path / "bad.json").write_text(json.dumps(log))
    (tmp_path / "half.json").write_text("{")
    for name in ("bad.json", "half.json", "missing.json"):
        with pytest.raises(InputError, match=f"cannot read the log .*{name}") as error:
            read_log(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_a_released_log_is_read_by_row_number(tmp_path):
    rows = rows_with(range(12))
    columns = {"gt_loss": "answer_nll", "num_token_gt": "answer_tokens", "rougeL_recall": "rouge_l_recall",
               "paraphrased_loss": "paraphrased_nll", "num_token_paraphrased": "paraphrased_tokens",
               "perturb_loss": "perturbed_nll", "num_token_perturb": "perturbed_tokens"}
    log = {name: {str(row["index"]): row[column] for row in rows[::-1]} for name, column in columns.items()}
    log["generated_text"] = [[row["question"], row["generation"], row["answer"]] for row in rows]
    (tmp_path / "log.json").write_text(json.dumps({"eval_log_forget.json": log}))
    assert read_log(str(tmp_path / "log.json")) == ({"forget": rows}, {"format": "TOFU"})


def test_only_a_model_retrained_without_the_forget_rows_is_compared(tmp_path):
    log, file = good_log(), tmp_path / "log.json"
    rows, source = log["rows"]["forget"], {"template": "llama2", "data_fingerprint": "d0"}

    def compare(split="forget10", rows=rows, source=source, **provenance):
        write_json(file, {**log, "provenance": log["provenance"] | provenance})
        return read_retain_log(str(file), split, rows, source)

    assert compare() == compare(trained_on=None) == (rows, log["rows"]["holdout"])
    assert compare(rows=rows[:1]) == (rows[:1], log["rows"]["holdout"])
    assert read_retain_log(None, "forget10", rows, source) == (None, None)
    for message, changes in (
            ("trained on retain90; --split forget05 needs one trained on retain95", {"split": "forget05"}),
            ("another template", {"template": "qa"}),
            ("another data_fingerprint", {"data_fingerprint": "d1"}),
            ("another trained_on", {"trained_on": {"data_fingerprint": "d1"}}),
            ("another system_prompt", {"source": {"system_prompt": "a"}, "system_prompt": "b"}),
            ("2 forget rows, not the 3", {"rows": [*rows, rows[0]]}), ("forget rows", {"rows": rows[::-1]}),
            ("needs perturbed answers", {"rows": [row | {"perturbed_nll": []} for row in rows]})):
        with pytest.raises(InputError, match=message):
            compare(**changes)
    log["rows"]["forget"] = [row | {"perturbed_nll": []} for row in rows]
    with pytest.raises(InputError, match="needs perturbed answers"):
        compare()


def test_the_command_measures_a_model_and_judges_its_log(tmp_path, capsys):
    start, out, picture = str(ROOT / "data/tiny/start"), tmp_path / "a.json", tmp_path / "ratios.png"
    evaluate_tofu.main(["--model", start, "--max-rows", "2", "--max-new-tokens", "8", "--reference", start,
                        "--out", str(out), "--plot", str(picture)])
    printed, log = capsys.readouterr().out, json.loads(out.read_text())
    assert log["metrics"]["forget_kl"] == pytest.approx(0, abs=1e-6) and len(log["rows"]["forget"]) == 2
    assert {"metrics", "rows", "provenance"} == set(log) and log["provenance"]["split"] == "forget10"
    assert "[forget 1]" in printed and "true:" in printed and picture.stat().st_size > 5000
    for value in (log["metrics"]["model_utility"], log["metrics"]["forget"]["rouge_l_recall"]):
        assert f"{value:.4g}" in printed
    evaluate_tofu.main(["--log", str(out), "--out", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text())["metrics"] == log["metrics"]
    assert capsys.readouterr().out == printed
    for words, message in ((["--log", out, "--retain-log", out], "trained on full"),
                           (["--log", out, "--split", "forget05"], "for --split forget05"),
                           (["--model", start, "--split", "retain90"], "need a forget split")):
        with pytest.raises(InputError, match=message):
            evaluate_tofu.main([*map(str, words)])


def test_the_trajectory_of_a_run_is_drawn(tmp_path):
    plot_truth_ratios(rows_with([0.1, 3.0, -900.0]), rows_with([1.0]), tmp_path / "new" / "ratios.png")
    with pytest.raises(InputError, match="needs perturbed answers"):
        plot_truth_ratios([{"answer_nll": 1.0}], None, tmp_path / "ratios.png")
    write_json(tmp_path / "config.json", {"settings": {"loss": "npo", "split": "forget10", "beta": 0.5}})
    (tmp_path / "log.jsonl").write_text('{"step": 1, "mean_W": 1.0}\n{"step": 2, "mean_W": 0.5}\n')
    retrained = rows_with([0.0, 1.0])
    for others, name in ((None, "alone.png"), (retrained, "trajectory.png")):
        for step, ratios in ((0, [3.0, 4.0]), (2, [0.0, 1.5])):
            rows = {"forget": rows_with(ratios), "retain": rows_with([0.0])}
            metrics = compute_metrics(rows, others, others=[retrained] if others else [])
            write_json(tmp_path / "eval" / f"step_{step:06d}.json", {"metrics": metrics, "rows": rows})
        plot_trajectory(tmp_path, others)
        (tmp_path / "trajectory.png").rename(tmp_path / name)
    sizes = [(tmp_path / name).stat().st_size for name in ("new/ratios.png", "alone.png", "trajectory.png")]
    assert 5000 < sizes[0] and 5000 < sizes[1] < sizes[2]


# ---------------------------------------------------------------- several retrained models

def test_several_retrained_models_are_compared_as_single_ones_are():
    rng = np.random.default_rng(0)
    model, *retrained = (rows_with(rng.normal(size=50)) for _ in range(4))
    together = compute_metrics({"forget": model}, retrained[0], others=retrained[1:])
    assert together["forget_quality"] == together["retrained"]["against"][0]["ks_p"]
    for rows, pair in zip(retrained, together["retrained"]["against"], strict=True):
        alone = compute_metrics({"forget": model}, rows)
        assert alone["retrained"] == {"against": [pair], "among": []}
        assert alone["forget_quality"] == pair["ks_p"]
    assert len(together["retrained"]["among"]) == 3
    assert together["retrained"]["among"][0] == agreement(*map(log_truth_ratios, retrained[:2]))
    text = metrics_table(together)
    assert text.count("against retrained model") == 3 and text.count("two retrained models") == 3


def test_agreement_is_paired_by_row():
    x = np.linspace(-1, 1, 40)
    shifted = agreement(x, x + 0.02)
    assert shifted["ks_p"] > 0.9 and shifted["paired_p"] < 1e-6  # a shift that KS does not see
    assert shifted["correlation"] == pytest.approx(1) == -agreement(x, -x)["correlation"]
    assert agreement(x, x)["paired_p"] == agreement(x[:1], x[:1])["paired_p"] == 1
    assert agreement(x, 0 * x)["correlation"] is None
