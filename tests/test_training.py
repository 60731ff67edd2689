"""The training loop: one definition of the batch, no reference model beside the policy, and the textbook's
steps."""

import gc
import math
from dataclasses import replace

import pytest
import torch
from conftest import assert_close, log, sgd, weights
from transformers import AutoModelForCausalLM, LlamaForCausalLM, get_linear_schedule_with_warmup

import train_npo
from common import InputError
from data.batches import Plan, make_stream
from data.prompts import Encoded
from data.tofu import load_task
from losses import OBJECTIVES, Objective, ga_loss
from model import ALONE, PRESETS, load_model
from train_npo import (Reference, begin_run, check_start, kto_baseline, loss_sums, lr_factor, open_reference,
                       parse)

NPO_AT_START = 2 * math.log(2)  # times 1/beta


@pytest.fixture
def first_step(small_model, small_data, tmp_path, monkeypatch):
    """first_step("--loss npo") is (settings, model, plan, reference, items) of a run's first global batch."""
    monkeypatch.chdir(tmp_path)

    def prepare(flags: str):
        s = parse(["--model", str(small_model), "--data", str(small_data), "--epochs", "2", "--batch-size",
                   "8", "--eval-every", "never", *flags.split()])
        model, run = begin_run(s, ALONE)
        return s, model, run.plan, open_reference(s, model, run, ALONE), run.plan.stream[0]
    return prepare


# ---------------------------------------------------------------- one definition of the batch

def parts_and_gradient(s, model, plan, reference, items, processes: int):
    """Loss parts and gradient, added up over the micro-batches of all processes."""
    model.zero_grad()
    counts, parts, z = plan.counts(items), {}, torch.zeros(())
    if s.loss == "kto":
        z = kto_baseline(s, model, plan, plan.micro_batch_of(items).refusals, reference, ALONE)
    for rank in range(processes):
        for keys in plan.micro_batches(items, rank, processes):
            sums = loss_sums(s, model, plan, keys, counts, reference, z)
            sums["loss"].backward()
            parts = {name: parts.get(name, 0) + value.item() for name, value in sums.items()}
    return parts, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_loss_and_gradient_do_not_depend_on_micro_batches_or_processes(first_step, loss):
    """Of three processes that share 8 rows one by one, the last has no row for its third micro-batch."""
    terms = "--split retain90" if loss == "sft" else "--retain-weight 0.7 --kl-weight 0.3"
    s, model, *rest = first_step(f"--loss {loss} --micro-batch-size 8 {terms}")
    plan = rest[0]
    with torch.no_grad():  # away from the reference, where K and its gradient are 0
        for i, p in enumerate(model.parameters()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    expected_parts, expected = parts_and_gradient(s, model, *rest, processes=1)
    assert all(math.isfinite(value) and value != 0 for value in expected_parts.values())
    for plan.micro_batch_size, processes in ((1, 3), (3, 1)):
        parts, gradient = parts_and_gradient(s, model, *rest, processes)
        assert parts == pytest.approx(expected_parts, rel=1e-5)
        assert_close(expected, gradient)


def test_weights_do_not_depend_on_micro_batches(run):
    """Two processes are in test_resume.py."""
    flags = "--loss dpo --retain-weight 1 --kl-weight 1"
    expected, actual = (run(f"{flags} --micro-batch-size {size}", out=size) for size in ("8", "1"))
    assert_close(weights(expected / "model"), weights(actual / "model"))


def test_rows_and_retain_texts_are_sorted_apart_the_longest_first(first_step):
    """Memory and padding of a micro-batch are those of its longest texts. Each text is dealt once."""
    _, _, plan, _, items = first_step("--loss dpo --retain-weight 1 --micro-batch-size 2")
    shares = [plan.micro_batches(items, rank, 2) for rank in range(2)]
    for group in ("rows", "retain"):
        for share in shares:  # two micro-batches of two texts
            longer, shorter = ([len(plan.texts[key].ids) for key in getattr(keys, group)] for keys in share)
            assert len(longer) == len(shorter) == 2 and min(longer) >= max(shorter)
    for group, expected in enumerate(plan.micro_batch_of(items)):
        assert sorted(key for share in shares for keys in share for key in keys[group]) == sorted(expected)


def test_rows_partners_and_refusals_are_shuffled_independently():
    s = parse(["--epochs", "2", "--batch-size", "32", "--eval-every", "never"])
    places = zip(*(item for step in make_stream(100, 100, 100, s) for item in step), strict=True)
    assert len({*places}) == 3


def test_ktos_z_is_a_mean_over_the_refusals_of_the_global_batch(first_step):
    """Where the reference is e^0.5 times less certain of each token, z is half the mean number of tokens. The
    last batch of a run has fewer refusals than --batch-size."""
    s, model, plan, reference, items = first_step("--loss kto --micro-batch-size 1")
    tensors = {name: tensor - 0.5 for name, tensor in reference.tensors.items()}
    for count in (8, 3):
        refusals = plan.micro_batch_of(items[:count]).refusals
        z = kto_baseline(s, model, plan, refusals, Reference(tensors, "cpu"), ALONE)
        tokens = sum(plan.texts[key].answer_tokens for key in refusals)
        assert z.item() == pytest.approx(0.5 * tokens / count, rel=1e-4)


def plan_of(small_data, flags: str = "", **fields) -> Plan:
    s = parse(["--data", str(small_data), "--model", "tiny=data/tiny/start", "--epochs", "2",
               "--batch-size", "8", "--template", "llama2", *flags.split()])
    task = load_task(s.data, s.split)
    return Plan(s, replace(task, **fields), load_model("tiny").tokenizer, 512)


def test_a_folder_that_is_tiny_learns_the_facts_too():
    assert parse(["--loss", "sft", "--model", "data/tiny/untrained"]).model == "tiny=data/tiny/untrained"


def test_steps_warm_up_and_evaluations_follow_from_epochs(small_data):
    plan = plan_of(small_data, "--epochs 3")
    assert (plan.rows, plan.steps, plan.warmup_steps) == (20, 8, 2)  # 60 rows in batches of 8
    assert plan.steps_at("epoch") == {3, 5, 8} and plan.steps_at("end") == {8}
    assert plan.steps_at("4") == {4, 8} and plan.steps_at("3") == {3, 6, 8}
    assert plan.steps_at("never") == set() and plan.steps_at("2,5,9") == {2, 5, 8}
    assert plan_of(small_data, "--epochs 3 --batch-size 7").warmup_steps == 2  # 20/7, rounded down
    assert plan_of(small_data, "--batch-size 32").warmup_steps == 1  # at least one
    assert plan_of(small_data, "--warmup-epochs 2").warmup_steps == 5
    with pytest.raises(InputError, match="20 rows, 1 epochs and batch 20 give 1 step"):
        plan_of(small_data, "--epochs 1 --batch-size 20")
    with pytest.raises(InputError, match="the warm-up, which begins at lr 0, takes 7"):
        plan_of(small_data, "--warmup-epochs 3")  # the peak would never be reached


def test_a_plan_holds_the_texts_that_its_steps_use(small_data):
    plan = plan_of(small_data, "--loss dpo --retain-weight 1")
    items = [item for step in plan.stream for item in step]
    expected = {key for item in items for key in (
        f"run/row/{item.row}", f"run/refusal/{item.row}/{item.refusal}", f"run/retain/{item.partner}")}
    assert plan.texts.keys() == expected and len(expected) < 20 + 40 + 180
    assert {key.split("/")[1] for key in plan_of(small_data).texts} == {"row"}
    npo, ceu = (plan_of(small_data, f"--loss {loss}").texts["run/row/0"] for loss in ("npo", "ceu"))
    assert ceu.ids == npo.ids and ceu.start == npo.start + 1  # CE-U leaves out an answer's first token


@pytest.mark.parametrize("loss, read", (("dpo", ("rows", "refusals", "retain")),
                                        ("idk", ("refusals", "retain")), ("kto", ("rows", "retain"))))
def test_counts_are_of_the_texts_that_the_policy_reads(small_data, loss, read):
    """KTO's refusals are read without gradient, for its z."""
    plan = plan_of(small_data, f"--loss {loss} --retain-weight 1")
    counts, keys = plan.counts(plan.stream[0]), plan.micro_batch_of(plan.stream[0])
    texts = [[plan.texts[key] for key in getattr(keys, group)] for group in read]
    assert counts.rows == 8 and counts.tokens == sum(len(text.ids) for group in texts for text in group)
    assert counts.forget_tokens == sum(text.answer_tokens for text in texts[0])
    assert counts.retain_tokens == sum(text.answer_tokens for text in texts[-1])


# ---------------------------------------------------------------- the textbook's steps

GOLDEN = {  # (loss, gradient norm) of five steps, computed by an earlier implementation
    "ga": ((-8.136810, 2.8364627), (-8.064925, 2.6780965), (-8.194797, 3.0107787), (-8.312813, 2.2164054),
           (-8.389480, 2.1419210)),
    "npo": ((13.862945, 24.109917), (13.862943, 25.776667), (13.314579, 23.031895), (12.102759, 18.682379),
            (11.570778, 16.017931))}


@pytest.mark.parametrize("loss", GOLDEN)
def test_golden_steps(run, loss):
    lines = log(run(f"--loss {loss}"))
    assert [line["lr"] for line in lines] == pytest.approx([0, 5e-4, 1e-3, 2e-3 / 3, 1e-3 / 3])
    for line, (value, norm) in zip(lines, GOLDEN[loss], strict=True):
        assert line["loss"] == pytest.approx(value, rel=1e-5) == line["forget_loss"]
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    if loss == "npo":  # Eq. 3 and Eq. 5 at the start
        assert lines[0]["loss"] == pytest.approx(NPO_AT_START / 0.1)
        assert lines[0]["mean_W"] == pytest.approx(1)
        assert lines[-1]["mean_W"] == pytest.approx(0.8774424, rel=1e-5)


def test_the_schedule_is_hugging_faces():
    for steps, warmup in ((125, 12), (10, 1), (5, 5)):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, steps)
        for k in range(steps):
            assert 2.0 * lr_factor(k, steps, warmup) == pytest.approx(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()


def test_weight_decay_spares_norms(run, small_model):
    """With an lr of almost 0, decay alone changes weights, and norm weights stay as they are."""
    trained = weights(run("--lr 1e-12 --weight-decay 1e9") / "model")
    for name, before in weights(small_model).items():
        assert (trained[name].norm() < 0.999 * before.norm()) == (before.ndim > 1), name


@pytest.mark.parametrize("clip, length", ((0, 24.109917), (0.5, 0.5), (100, 24.109917)))
def test_the_gradient_is_clipped_over_all_parameters(run, small_model, monkeypatch, clip, length):
    """One step of SGD. The log has the norm before clipping."""
    monkeypatch.setattr(train_npo, "adamw", sgd)
    monkeypatch.setattr(train_npo, "lr_factor", first_step_alone)
    folder = run(f"--epochs 1 --lr 1e-3 --max-grad-norm {clip}")
    before, after = weights(small_model), weights(folder / "model")
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after]).norm()
    assert moved == pytest.approx(1e-3 * length, rel=1e-3)
    assert log(folder)[0]["grad_norm"] == pytest.approx(24.109917, rel=1e-4)


def first_step_alone(step, steps, warmup_steps):
    return float(step == 0)


# ---------------------------------------------------------------- the reference

@pytest.mark.parametrize("flags, with_logps, with_logits", (
    ("--loss npo --retain-weight 1", {"row"}, set()),
    ("--loss dpo --kl-weight 1", {"row", "refusal", "retain"}, {"retain"}),
    ("--loss kto", {"row", "refusal"}, set()), ("--loss idk --retain-weight 1", set(), set()),
    ("--loss tnpo", {"row"}, set()), ("--loss undial", {"row"}, {"row"})))
def test_the_reference_is_the_start(first_step, small_model, flags, with_logps, with_logits):
    """The file has log pi_ref of what the loss compares, and hidden states whose logits are the start's where
    it compares logits. Here a plain model reads one text after the other."""
    lm = AutoModelForCausalLM.from_pretrained(small_model)
    _, _, plan, reference, _ = first_step(flags)
    for kinds, prefix in ((with_logps, "logps/"), (with_logits, "states/")):
        expected = {prefix + key for key in plan.texts if key.split("/")[1] in kinds}
        assert expected == {name for name in reference.tensors if name.startswith(prefix)}
    for key, text in plan.texts.items():
        with torch.no_grad():
            log_p = lm(torch.tensor([text.ids])).logits[0, text.start - 1:-1].log_softmax(-1)
        logps = log_p.gather(1, torch.tensor(text.ids[text.start:])[:, None])[:, 0]
        if key.split("/")[0] in with_logps:
            torch.testing.assert_close(reference.token_logps([key]), logps, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(reference.logps([key]), logps.sum()[None], rtol=1e-5, atol=1e-4)
        if key.split("/")[0] in with_logits:
            log_q = reference.logits([key]).log_softmax(-1)
            torch.testing.assert_close(log_q, log_p, rtol=1e-5, atol=1e-5)


def test_the_identities_of_step_0_are_checked(small_data):
    s, plan = parse(["--loss", "npo", "--beta", "0.2", "--eval-every", "never"]), plan_of(small_data)
    start = {"forget_loss": NPO_AT_START / 0.2, "mean_W": 1.0, "kl_loss": 1e-7}
    check_start(s, plan, start)
    for wrong in ({"forget_loss": NPO_AT_START / 0.2 + 0.01}, {"mean_W": 1.001}, {"kl_loss": 0.002}):
        with pytest.raises(RuntimeError, match=f"step 0: {[*wrong][0]} is"):
            check_start(s, plan, start | wrong)
    s.dtype = "bf16"  # 16-bit kernels differ from batch to batch
    check_start(s, plan, {"forget_loss": NPO_AT_START / 0.2 + 0.3, "mean_W": 1.04, "kl_loss": 0.04})
    for wrong in ({"forget_loss": NPO_AT_START / 0.2 + 0.6}, {"mean_W": 1.06}, {"kl_loss": 0.06}):
        with pytest.raises(RuntimeError, match="step 0"):
            check_start(s, plan, wrong)
    plan.texts["run/row/0"] = Encoded([7] * 500, 100)  # and differ more where an answer is long
    check_start(s, plan, {"forget_loss": NPO_AT_START / 0.2 + 1.9, "mean_W": 1.19})
    plan.objective = Objective(ga_loss)  # without a value at the start
    check_start(s, plan, {"forget_loss": -3.0})


def test_a_run_whose_reference_is_another_model_ends_at_step_0(run, monkeypatch):
    plain = Reference.logps
    monkeypatch.setattr(Reference, "logps", lambda self, keys: plain(self, keys) + 1)
    with pytest.raises(RuntimeError, match="step 0: .* the reference is not the model"):
        run()


def test_no_second_model_is_in_memory(run, monkeypatch):
    def models():
        return sum(isinstance(thing, LlamaForCausalLM) for thing in gc.get_objects())
    plain, counts = train_npo.loss_sums, []

    def counted(*args):
        counts.append(models())
        return plain(*args)
    monkeypatch.setattr(train_npo, "loss_sums", counted)
    gc.collect()
    before = models()
    run("--retain-weight 1 --kl-weight 1 --epochs 1")
    assert set(counts) == {before + 1}


# ---------------------------------------------------------------- around the step

@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_objective_trains_with_both_retain_terms(run, loss):
    terms = "--split retain10" if loss == "sft" else "--retain-weight 1 --kl-weight 1"
    lines = log(run(f"--loss {loss} --epochs 1 --micro-batch-size 8 {terms}"))
    assert len(lines) == 3 and all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0].get("kl_loss", 0) == pytest.approx(0, abs=1e-6)  # the policy is still the reference
    assert ("mean_W" in lines[0]) == bool(OBJECTIVES[loss].weight)


def test_evaluations_leave_training_bitwise_the_same(run, small_model, monkeypatch):
    """Both runs have the evaluation's texts in their reference pass, so its batches are the same."""
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], max_new_tokens=4))
    flags = f"--model tiny={small_model} --retain-weight 1 --epochs 1"
    expected, watched = (run(f"{flags} --eval-every {every}", out=every) for every in ("end", "1"))
    assert len(list((watched / "eval").iterdir())) == 4
    expected, watched = weights(expected / "model"), weights(watched / "model")
    assert all(torch.equal(expected[name], watched[name]) for name in expected)


def test_activation_checkpointing_changes_no_number(run, monkeypatch):
    """It needs the training mode, also after passes without gradient such as those for KTO's z."""
    flags, plain, modes = "--loss kto --retain-weight 1 --epochs 1", train_npo.loss_sums, set()

    def watched(s, policy, *args):
        modes.add(policy.lm.training and policy.lm.is_gradient_checkpointing)
        return plain(s, policy, *args)
    expected = run(flags, out="plain")
    monkeypatch.setattr(train_npo, "loss_sums", watched)
    saving = run(f"{flags} --activation-checkpointing", out="saving")
    assert_close(weights(expected / "model"), weights(saving / "model"))
    assert modes == {True}


@pytest.mark.slow
def test_compiled_layers_change_no_number(run):
    expected = run("--retain-weight 1 --epochs 1", out="plain")
    compiled = run("--retain-weight 1 --epochs 1 --compile", out="compiled")
    assert_close(weights(expected / "model"), weights(compiled / "model"), 1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_at_its_last_checkpoint(run, tmp_path, monkeypatch):
    calls = []

    def broken(policy_logps):
        calls.append(0)
        return ga_loss(policy_logps) * (math.nan if len(calls) > 3 else 1)
    monkeypatch.setitem(OBJECTIVES, "ga", OBJECTIVES["ga"]._replace(loss=broken))
    with pytest.raises(InputError, match="step 4: loss nan.*smaller --lr than 0.001"):
        run("--loss ga --checkpoint-every 1 --micro-batch-size 8")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000003"]  # the last two
    assert not (tmp_path / "run" / "model").exists()
