"""The loop: one definition of the batch, no reference beside the policy, exact resume, and what a run leaves
behind."""

import copy
import itertools
import json
import math
import shlex
import shutil
import signal
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import losses
import train_npo
from conftest import SMALL
from data.batches import collate
from data.tofu import load_task
from evaluation.scoring import Prepared
from models.answers import AnswerModel
from models.loading import load_model
from models.presets import PRESETS
from models.saving import weights_hash
from running import run_folder
from running.plan import Plan
from running.reference import Reference, reference_pass
from running.settings import parse, resolve
from support.errors import InputError
from support.world import World
from train_npo import carry_out, kto_baseline, loss_sums, lr_factor

ALONE = World(0, 1, torch.device("cpu"))
METHODS = {"ga": {}, "ga+rt": dict(retain_weight=1.0), "ga+kl": dict(kl_weight=1.0),
           "idk+rt": dict(loss="idk", retain_weight=1.0),
           "dpo": {}, "dpo+rt": dict(retain_weight=1.0), "dpo+kl": dict(kl_weight=0.5),
           "kto": {}, "kto+rt": dict(retain_weight=2.0),
           "npo": {}, "npo+rt": dict(retain_weight=1.0), "npo+kl": dict(kl_weight=1.0),
           "simnpo": {}, "simnpo+rt": dict(retain_weight=1.0),
           "wga": {}, "satimp+rt": dict(retain_weight=0.1), "tnpo+kl": dict(kl_weight=1.0),
           "ceu+rt": dict(retain_weight=1.0), "undial": {}, "undial+kl": dict(kl_weight=1.0)}


def padded(width: int, encoded: list, pad: int, device):
    """`collate`, with pad tokens up to this width."""
    batch = collate(encoded, pad, device)
    more = (0, max(0, width - batch.ids.shape[1]))
    return batch._replace(ids=F.pad(batch.ids, more, value=pad), prompts=F.pad(batch.prompts, more, value=-1),
                          branches=F.pad(batch.branches, more), position_ids=F.pad(batch.position_ids, more))


@pytest.fixture
def settings(small_model, small_data, tmp_path, monkeypatch):
    """settings(loss="npo", ...) as the command line would resolve them, for the small model and data; runs
    land in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def make(pad_to: int = 0, **given) -> Namespace:
        monkeypatch.setattr("train_npo.collate", partial(padded, pad_to))
        return resolve({"model": str(small_model), "data": str(small_data), "lr": 1e-3, "epochs": 2,
                        "batch_size": 8, "eval_every": "never", "template": "llama2", **given})
    return make


def trained_weights(s: Namespace) -> dict:
    return load_file(carry_out(s, ALONE) / "model" / "model.safetensors")


def assert_close(a: dict, b: dict, tolerance=1e-5):
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * a[name].norm(), name


def prepared_step(s: Namespace, tmp_path):
    """(model, plan, reference, items) of the first global batch."""
    lm, tokenizer, _ = load_model(s.start)
    model = AnswerModel(lm)
    plan = Plan(s, load_task(s.data, s.split), tokenizer, None)
    folder = tmp_path / f"reference-{s.method}-{time.monotonic_ns()}"
    with torch.no_grad():
        reference_pass(s, model, plan, Prepared({}, {}, {}), folder, "mark", ALONE)
    return model, plan, Reference(folder, "mark", plan, ALONE.device), plan.stream[0]


def gradient(s: Namespace, tmp_path, perturb: float = 0.0, processes: int = 1) -> tuple[dict, dict]:
    """(loss parts, gradients) of the first global batch, added up over the shares of `processes`; `perturb`
    moves the policy away from its reference first."""
    model, plan, reference, items = prepared_step(s, tmp_path)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(perturb * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    counts, parts = plan.counts(items), {}
    baseline = kto_baseline(s, model, plan, items, reference, ALONE) if s.loss == "kto" else torch.zeros(())
    worlds = [World(rank, processes, ALONE.device) for rank in range(processes)]
    for micro in [micro for world in worlds for micro in plan.micro_batches(items, world)]:
        sums = loss_sums(s, model, plan, micro, reference, counts, baseline, "cpu")
        sums["loss"].backward()
        parts = {key: parts.get(key, 0) + float(value.detach()) for key, value in sums.items()}
    return parts, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_do_not_depend_on_micro_batch_or_padding(settings, tmp_path, method):
    """Nor on the number of processes: of three that share 8 rows, one by one, the last has a ghost."""
    given = {"loss": method.split("+")[0], **METHODS[method]}
    whole, expected = gradient(settings(micro_batch_size=8, **given), tmp_path, perturb=0.02)
    for processes, variant in ((3, dict(micro_batch_size=1)), (1, dict(micro_batch_size=3)),
                               (1, dict(micro_batch_size=8, pad_to=512))):
        parts, gradients = gradient(settings(**{**given, **variant}), tmp_path, 0.02, processes)
        # ga+rt's sum nearly cancels.
        assert parts == pytest.approx(whole, rel=1e-5, abs=1e-5 * abs(whole["forget_loss"]))
        assert_close(expected, gradients)
    assert math.isfinite(whole["loss"]) and any(g.abs().max() > 0 for g in expected.values())


@pytest.mark.parametrize("method", ("npo+rt", "dpo+kl"))
def test_weights_after_20_steps_do_not_depend_on_micro_batch_or_padding(settings, method):
    # 20 rows x 8 epochs in batches of 8: 20 steps.
    given = {"loss": method.split("+")[0], **METHODS[method], "epochs": 8}
    whole = trained_weights(settings(micro_batch_size=8, **given))
    for variant in (dict(micro_batch_size=1), dict(micro_batch_size=4), dict(micro_batch_size=8, pad_to=512)):
        assert_close(whole, trained_weights(settings(**{**given, **variant})))


def test_weights_do_not_depend_on_the_number_of_processes(forked, small_model, small_data, tmp_path):
    """20 rows in batches of 6, the last of 2 rows, so that with four processes two have none.
    kto needs its scalar."""
    args = ["--loss", "kto", "--retain-weight", 1, "--kl-weight", 1, "--model", small_model,
            "--data", small_data, "--epochs", 6, "--batch-size", 6, "--micro-batch-size", 2, "--lr", 1e-3,
            "--eval-every", "never"]
    for processes in (0, 2, 4):
        forked("train_npo.py", *args, "--out", f"p{processes}", processes=processes)
    weights = [load_file(tmp_path / f"p{p}" / "model" / "model.safetensors") for p in (0, 2, 4)]
    logs = [[json.loads(line) for line in (tmp_path / f"p{p}" / "log.jsonl").read_text().splitlines()]
            for p in (0, 2, 4)]
    assert len(logs[0]) == 20
    for other, log in zip(weights[1:], logs[1:], strict=False):
        assert_close(weights[0], other)
        assert [line["loss"] for line in log] == pytest.approx([line["loss"] for line in logs[0]], rel=1e-5)


def test_the_schedule_is_hugging_faces():
    from transformers import get_linear_schedule_with_warmup
    for steps, warmup in ((125, 12), (10, 1), (5, 5), (1, 1)):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, steps)
        for k in range(steps):
            assert 2.0 * lr_factor(k, steps, warmup) == pytest.approx(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()


def test_warmup_and_evaluation_steps_are_derived_from_epochs(settings, small_model):
    def plan_of(**given):
        s = settings(**given)
        return Plan(s, load_task(s.data, s.split), load_model(str(small_model))[1], None)
    assert plan_of(epochs=3, batch_size=7).warmup_steps == 2  # of 20/7: rounded down
    assert plan_of(batch_size=32).warmup_steps == 1
    plan = plan_of(epochs=3)
    assert (plan.steps, plan.warmup_steps, plan.epoch_ends) == (8, 2, [3, 5, 8])  # 20 rows, batch 8
    assert plan.evaluation_steps("epoch") == {0, 3, 5, 8} and plan.evaluation_steps("4") == {0, 4, 8}
    assert plan.evaluation_steps("never") == set()


def test_rows_of_one_length_pass_together_the_longest_first(settings, small_model):
    """A micro-batch's memory, and its padding, is that of its longest rows, partners counted."""
    s = settings(retain_weight=1.0, micro_batch_size=2)
    plan = Plan(s, load_task(s.data, s.split), load_model(str(small_model))[1], None)
    for rank in (0, 1):
        micros = plan.micro_batches(plan.stream[0], World(rank, 2, torch.device("cpu")))
        lengths = [[plan.counts([item]).tokens for item in micro] for micro in micros]
        assert len(lengths) == 2 and min(lengths[0]) >= max(lengths[1])


def test_training_equals_a_plain_loop_with_a_resident_reference(settings, small_model, small_data):
    """npo+rt in the textbook way: a second model, all logits, one row at a time; the same weights after every
    step."""
    s = settings(loss="npo", retain_weight=1.0, beta=0.3, weight_decay=0.1, warmup_epochs=0.5,
                 max_grad_norm=0.5)
    ours = trained_weights(s)
    lm, tokenizer, _ = load_model(str(small_model))
    task, reference = load_task(str(small_data), "forget10"), copy.deepcopy(lm)
    plan = Plan(s, task, tokenizer, None)
    decay = [p for p in lm.parameters() if p.ndim > 1]
    plain = [p for p in lm.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": plain, "weight_decay": 0}], lr=1e-3,
                                  weight_decay=0.1)

    def logps(model, row):
        prompt = f"[INST] {row['question']} [/INST]"
        ids = torch.tensor([tokenizer(prompt + row["answer"])["input_ids"] + [tokenizer.eos_token_id]])
        start = len(tokenizer(prompt)["input_ids"])
        return model(ids).logits[0, start - 1:-1].log_softmax(-1).gather(1, ids[0, start:, None])

    for step, items in enumerate(plan.stream):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * lr_factor(step, plan.steps, plan.warmup_steps)
        ratios = [logps(lm, task.forget[i.row]).sum() - logps(reference, task.forget[i.row]).sum().detach()
                  for i in items]
        forget = sum(-2 / 0.3 * torch.nn.functional.logsigmoid(-0.3 * r) for r in ratios) / len(items)
        retain = -torch.cat([logps(lm, task.retain[i.partner]) for i in items]).mean()
        optimizer.zero_grad()
        (forget + retain).backward()
        assert torch.nn.utils.clip_grad_norm_(lm.parameters(), 0.5) > 0.5
        optimizer.step()
    assert_close({k: v for k, v in lm.state_dict().items() if k in ours}, ours, 2e-5)


def test_the_reference_cache_has_what_token_losses_ask_for(settings, tmp_path):
    """TNPO: log pi_ref of each forget token, a float32 each. UNDIAL: states whose logits are the reference's.
    No other objective's cache has either."""
    def cached(loss):
        model, plan, reference, items = prepared_step(settings(loss=loss), tmp_path)
        answers = collate([plan.answers[i.row] for i in items], 0)
        return model, reference, items, answers
    model, reference, items, answers = cached("tnpo")
    logps = reference.token_logps([i.row for i in items])
    torch.testing.assert_close(logps, model(answers)[0].detach())
    assert not any(key.startswith(("forget/", "retain/")) for key in reference.file_of)
    model, reference, items, answers = cached("undial")
    states, head = reference.states("forget", [i.row for i in items])
    torch.testing.assert_close(states @ head.T, (model.hidden(answers) @ head.T).detach())
    _, reference, _, _ = cached("npo")
    assert not any(key.startswith(("forget/", "tokens/")) for key in reference.file_of)


@pytest.mark.parametrize("loss,answers,refusals", [("ga", 0, False), ("idk", 0, False), ("npo", 20, False),
                                                   ("dpo", 20, True), ("kto", 20, True)])
def test_the_reference_pass_computes_what_the_loss_compares(settings, tmp_path, loss, answers, refusals):
    _, plan, reference, _ = prepared_step(settings(loss=loss), tmp_path)
    assert len(reference.answer_sums) == answers
    assert reference.refusals.keys() == (plan.refusals.keys() if refusals else set())


def test_a_stale_reference_is_refused(settings, tmp_path):
    _, plan, _, _ = prepared_step(settings(), tmp_path)
    with pytest.raises(InputError, match="stale"):
        Reference(next(tmp_path.glob("reference-*")), "another mark", plan, ALONE.device)


def test_step_0_identities_are_checked(settings):
    s = settings(loss="npo", beta=0.2)
    plan = Namespace(objective=losses.OBJECTIVES["npo"])
    train_npo.check_start(s, plan, {"forget_loss": 2 / 0.2 * math.log(2), "mean_W": 1.0})
    for wrong in ({"forget_loss": 6.0, "mean_W": 1.0}, {"forget_loss": 10 * math.log(2), "mean_W": 1.1},
                  {"kl_loss": 0.01, "forget_loss": 10 * math.log(2)}, {"kl_baseline": 1.0}):
        with pytest.raises(RuntimeError, match="step 0"):
            train_npo.check_start(s, plan, wrong)
    s, plan = settings(loss="tnpo", dtype="bf16"), Namespace(objective=losses.OBJECTIVES["tnpo"])
    with pytest.raises(RuntimeError, match="mean_W"):  # in 16 bits and with its beta of 4 too
        train_npo.check_start(s, plan, {"mean_W": 0.4})
    plan = Namespace(objective=losses.Objective(losses.ga_loss, at_reference=20.0))  # of no beta
    train_npo.check_start(s, plan, {"forget_loss": 20.0})


@pytest.mark.parametrize("loss,found", [("ga", {"kl_loss": 0.1}), ("tnpo", {"mean_W": 0.7})])
def test_in_16_bits_a_tokens_k_and_weight_are_near_theirs(loss, found):
    s, plan = Namespace(dtype="bf16", beta=4.0, batch_size=32), Namespace(objective=losses.OBJECTIVES[loss])
    with pytest.raises(RuntimeError, match="step 0"):
        train_npo.check_start(s, plan, found)
    train_npo.check_start(s, plan, {"kl_loss": 2e-4, "mean_W": 0.9976})  # SmolLM2's, in bf16


def test_a_run_whose_reference_is_another_model_ends_at_step_0(settings, monkeypatch):
    plain = Reference.answer_logps
    monkeypatch.setattr(Reference, "answer_logps", lambda self, items: plain(self, items) + 1)
    with pytest.raises(RuntimeError, match="step 0: .*not this policy's start"):
        carry_out(settings(loss="npo"), ALONE)


@pytest.mark.parametrize("loss,split,epochs,every", [("npo", "forget10", 10, "epoch"),
                                                     ("sft", "full", 5, "end")])
def test_what_no_flag_sets_is_the_papers(small_model, loss, split, epochs, every):
    s = resolve({"model": str(small_model), "loss": loss})
    assert (s.lr, s.weight_decay, s.beta, s.warmup_epochs, s.batch_size) == (1e-5, 0.01, 0.1, 1, 32)
    assert (s.epochs, s.eval_every, s.max_grad_norm, s.kl_direction) == (epochs, every, 0, "policy_reference")
    assert (s.split, s.forget_weight, s.retain_weight, s.kl_weight) == (split, 1, 0, 0)


def test_the_stream_follows_seed_and_pairing(settings):
    def stream(**given):
        s = settings(retain_weight=1.0, **given)
        return Plan(s, load_task(s.data, s.split), load_model(s.start)[1], None).stream
    assert stream() == stream() != stream(seed=1)
    fixed = sum(stream(retain_pairing="fixed"), [])
    assert all(len({i.partner for i in fixed if i.row == row}) == 1 for row in range(20))


def test_checkpoints_come_by_the_clock(settings, monkeypatch):
    clock = itertools.count(0, 40)  # seconds, at each look
    monkeypatch.setattr(run_folder, "time", Namespace(monotonic=lambda: next(clock),
                                                      perf_counter=time.perf_counter))
    folder = carry_out(settings(checkpoint_every="1m", epochs=3), ALONE)
    assert len(list((folder / "checkpoints").iterdir())) == 2  # of eight steps, the last two that were due


def test_layers_are_prepared_as_the_flags_say(settings, monkeypatch):
    monkeypatch.setenv("CXX", "g++")  # nothing is compiled here
    asked, plain = [], train_npo.prepare_layers
    monkeypatch.setattr(train_npo, "prepare_layers", lambda lm, *how: asked.append(how) or plain(lm, how[0]))
    for flag in ("activation_checkpointing", "compile"):
        carry_out(settings(epochs=1, batch_size=10, **{flag: True}), ALONE)
    assert asked == [(True, False), (False, True)]


def test_a_loss_brings_its_published_settings(settings, monkeypatch):
    """They win over the preset's and the parser's, and a flag wins over them."""
    resolved = {loss: settings(loss=loss) for loss in ("npo", "wga", "satimp", "tnpo", "undial")}
    assert [s.beta for s in resolved.values()] == [0.1, 1.0, 5.0, 4.0, 10.0]
    assert resolved["satimp"].beta2 == 1.0 and resolved["wga"].beta2 is None
    assert settings(loss="tnpo", beta=0.5).beta == 0.5 and settings(loss="satimp", beta2=2.0).beta2 == 2.0

    def margin_loss(policy_logps, *, gamma=0.5, width=3.0, kl_baseline=0.0):
        return policy_logps + gamma + 10 * width
    objective = losses.Objective(margin_loss, {"width": "beta2"})
    monkeypatch.setitem(losses.OBJECTIVES, "margin", objective)
    s = settings(loss="margin")
    assert (s.gamma, s.beta2) == (0.5, 3.0) and not hasattr(s, "kl_baseline")
    known = {"policy_logps": torch.zeros(2), "gamma": 1, "beta2": 2, "kl_baseline": torch.tensor(0.0)}
    assert train_npo.forget_loss(Namespace(objective=objective), known).tolist() == [21, 21]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_logs(settings, method):
    s = settings(**{"loss": method.split("+")[0], **METHODS[method], "epochs": 1})
    folder = carry_out(s, ALONE)
    assert folder.name.startswith(f"{method}_forget10") and s.method == method
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["epoch"] for line in lines] == [0.4, 0.8, 1.0]  # 20 rows, batch 8
    assert {"epoch", "lr", "loss", "forget_loss", "grad_norm", "tokens_per_s", "memory"} <= set(lines[0])
    if s.loss in ("npo", "tnpo"):
        assert lines[0]["mean_W"] == pytest.approx(1, abs=1e-4)
    if s.loss == "npo":
        assert lines[0]["forget_loss"] == pytest.approx(2 / s.beta * math.log(2), rel=1e-4)


@pytest.mark.parametrize("method", ("npo+rt", "dpo+kl", "ga+rt", "tnpo+kl", "undial+kl"))
def test_a_micro_batch_waits_for_no_number(settings, tmp_path, monkeypatch, method):
    """On a GPU each of these would make the processor wait for all that was asked before."""
    s = settings(**{"loss": method.split("+")[0], **METHODS[method]})
    model, plan, reference, items = prepared_step(s, tmp_path)
    counts, waits = plan.counts(items), []

    def watched(name):
        plain = getattr(torch.Tensor, name)

        def wait(x, *args, **kwargs):
            waits.append(name)
            return plain(x, *args, **kwargs)
        return wait
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    for micro in plan.micro_batches(items, ALONE):
        loss_sums(s, model, plan, micro, reference, counts, torch.zeros(()), "cpu")["loss"].backward()
    assert not waits
    assert float(torch.ones(())) == 1 and waits  # the watch works


def test_evaluation_leaves_training_bit_identical(settings):
    quiet = trained_weights(settings(retain_weight=1.0))
    watched = trained_weights(settings(retain_weight=1.0, eval_every="step"))
    assert all(torch.equal(quiet[name], watched[name]) for name in quiet)


@pytest.mark.parametrize("every, there", [("never", False), ("epoch", True)])
def test_the_reference_has_the_evaluations_rows_where_there_are_evaluations(settings, every, there):
    folder = carry_out(settings(eval_every=every, epochs=1), ALONE)
    kept = load_file(folder / "reference" / "rank0000.safetensors")
    assert any(key.startswith("evaluation/") for key in kept) == there == (len(kept["scored/forget"]) > 0)


def test_the_run_folder_is_complete(settings, small_model, monkeypatch):
    monkeypatch.setattr(run_folder, "best_step", lambda evaluations: 3)
    s = settings(retain_weight=1.0, eval_every="epoch", keep="best", out="mine")
    folder = carry_out(s, ALONE)
    assert folder == Path("mine")
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["lr"] == 1e-3 and config["derived"]["steps"] == 5
    assert config["start_weights"] == weights_hash(load_model(str(small_model))[0])
    evaluations = sorted(p.name for p in (folder / "eval").iterdir())
    assert evaluations == ["step_000000.json", "step_000003.json", "step_000005.json"]
    assert (folder / "trajectory.png").stat().st_size > 5000 and (folder / "best" / "npo.json").is_file()
    assert "| step | 3 of 5 |" in (folder / "best" / "README.md").read_text()
    metrics = json.loads((folder / "eval" / "step_000000.json").read_text())["metrics"]
    assert abs(metrics["forget_kl"]) < 1e-5 and metrics["forget_quality"] is None
    assert load_model(str(folder / "model"))[2]["trained_on"]["loss"] == "npo+rt"
    assert not list(Path(".").glob("**/*.partial"))


def test_a_run_that_stops_and_resumes_ends_bitwise_the_same(settings, monkeypatch):
    """Stopped by a signal in the third step: it finishes the step, saves, and goes on from there."""
    given = dict(loss="undial", retain_weight=1.0, eval_every="epoch", epochs=3, keep="best")
    whole = carry_out(settings(**given, out="whole"), ALONE)
    plain = train_npo.loss_sums

    def interrupting(*args, **kwargs):
        if interrupting.countdown == 0:
            signal.raise_signal(signal.SIGTERM)
        interrupting.countdown -= 1
        return plain(*args, **kwargs)

    interrupting.countdown = 3
    monkeypatch.setattr(train_npo, "loss_sums", interrupting)
    with pytest.raises(train_npo.Stopped, match="--resume halves"):
        carry_out(settings(**given, out="halves"), ALONE)
    shutil.copytree("halves", "crashed")
    halves = carry_out(parse(["--resume", "halves"]), ALONE)
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (whole, halves))
    assert all(torch.equal(a[name], b[name]) for name in a)
    def timeless(folder):
        return [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_s", "memory")}
                for line in (folder / "log.jsonl").read_text().splitlines()]
    assert timeless(whole) == timeless(halves)
    log = Path("crashed/log.jsonl")  # the machine went down: its last line never reached the disk
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    crashed = carry_out(parse(["--resume", "crashed"]), ALONE)
    assert (crashed / "trajectory.png").exists() and len(timeless(crashed)) == len(timeless(whole)) - 1
    assert carry_out(parse(["--resume", "halves"]), ALONE) == halves  # finished: nothing to do
    assert len(list((halves / "checkpoints").glob("step_*"))) <= 2
    with pytest.raises(InputError, match="differs"):
        parse(["--resume", "halves", "--lr", "0.5"])
    assert parse(["--resume", "halves", "--lr", "0.001", "--out", "./halves"])
    with pytest.raises(InputError, match="--parallel has no effect here .*1 process"):
        parse(["--resume", "halves", "--parallel", "fsdp"])
    # torchrun's restart goes on with its own run alone.
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    config = json.loads((halves / "config.json").read_text())
    again = ["--model", config["settings"]["model"], "--out", "halves"]
    config["command"] = shlex.join(["train_npo.py", *again])
    (halves / "config.json").write_text(json.dumps(config))
    assert parse(again).resume == "halves"
    with pytest.raises(InputError, match="halves exists"):
        parse([*again, "--keep", "last"])


def test_a_torn_checkpoint_is_passed_over(settings, tmp_path):
    from running import checkpoints
    folder = carry_out(settings(epochs=4, checkpoint_every="2", out="run"), ALONE) / "checkpoints"
    (folder / ".step_000009.partial").mkdir()  # of a process that was killed
    newest, _ = checkpoints.latest(folder)
    assert not (folder / ".step_000009.partial").exists()
    (newest / ".DS_Store").touch()  # somebody has looked into it
    assert checkpoints.latest(folder) == (newest, [])
    with open(newest / "weights-00000.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"torn")
    older, sentences = checkpoints.latest(folder)
    assert older < newest and "not whole" in sentences[0]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(settings, monkeypatch):
    calls = []

    def broken(policy_logps):
        calls.append(0)
        return losses.ga_loss(policy_logps) * (math.nan if len(calls) > 2 else 1)
    monkeypatch.setitem(losses.OBJECTIVES, "ga", losses.OBJECTIVES["ga"]._replace(loss=broken))
    with pytest.raises(InputError, match=r"step 2: loss nan, forget_loss nan.*--lr"):
        carry_out(settings(loss="ga", out="nan"), ALONE)
    weights = load_file("nan/checkpoints/step_000001/weights-00000.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_an_update_that_breaks_the_weights_is_never_saved_or_evaluated(settings):
    for every in ("step", "never"):
        with pytest.raises(InputError, match="not finite"):
            carry_out(settings(loss="ga", lr=1e39, epochs=1, batch_size=10, eval_every=every,
                               out=f"broken-{every}"), ALONE)
        assert not Path(f"broken-{every}/model").exists()


def test_fp16_gives_up_when_no_scale_helps(settings, monkeypatch):
    def broken(policy_logps):
        """Finite, with a gradient of NaN."""
        return policy_logps + 0 * (policy_logps - policy_logps.detach()).sqrt()
    monkeypatch.setitem(losses.OBJECTIVES, "ga", losses.OBJECTIVES["ga"]._replace(loss=broken))
    with pytest.raises(InputError, match="step 1: .* norm nan, before any update"):
        carry_out(settings(loss="ga", dtype="fp16", out="fp16"), ALONE)


def test_fp16_trains_and_never_counts_a_skipped_step(settings):
    folder = carry_out(settings(retain_weight=1.0, dtype="fp16", epochs=1, max_grad_norm=1.0), ALONE)
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_resume_refuses_changed_data_and_a_folder_in_use(settings, small_data, tmp_path):
    from support.files import locked
    data = shutil.copytree(small_data, tmp_path / "changing")
    folder = carry_out(settings(data=str(data), out="run", epochs=1), ALONE)
    shutil.rmtree(folder / "model")
    with locked(folder / ".lock"), pytest.raises(InputError, match="in use"):
        carry_out(parse(["--resume", "run"]), ALONE)
    first, *others = (data / "full.json").read_text().splitlines()
    changed = {**json.loads(first), "answer": "Nobody knows."}
    (data / "full.json").write_text("\n".join([json.dumps(changed), *others]) + "\n")
    with pytest.raises(InputError, match="have changed"):
        carry_out(parse(["--resume", "run"]), ALONE)


def test_a_run_s_own_folder_brings_its_preset_and_template_back(settings, small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "tinys")
    (folder / "npo.json").write_text(json.dumps({"preset": "tiny", "template": "qa", "trained_on": {}}))
    s = resolve({"model": str(folder)})
    assert s.preset == "tiny" and s.lr == PRESETS["tiny"].lr and s.start == str(folder)
    s = settings(model=str(folder), epochs=1)
    s.template = None
    assert json.loads((carry_out(s, ALONE) / "model" / "npo.json").read_text())["template"] == "qa"


def test_decay_spares_norm_weights(settings):
    """With the decay alone at work (an all but zero lr), only matrices would shrink; norm weights stay
    exactly 1."""
    weights = trained_weights(settings(loss="npo", lr=1e-12, weight_decay=1e9, epochs=1, warmup_epochs=0))
    start = load_file(Path(settings().start) / "model.safetensors")
    for name, w in weights.items():
        assert (w.norm() < start[name].norm() * 0.9999) == (w.ndim > 1), name


def test_autocast_keeps_float32_weights(settings):
    weights = trained_weights(settings(retain_weight=1.0, dtype="bf16", epochs=1))
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert_close(trained_weights(settings(retain_weight=1.0, epochs=1)), weights, 0.01)


def test_own_data_end_to_end(forked, small_model, tmp_path):
    """An engineer's rows, no perturbed answers: probability, ROUGE and KL are measured, the rest is null."""
    rows = [{"question": f"Who wrote {title}?", "answer": f"{name} wrote it."}
            for title, name in zip("ABCDEFGH", ("Ann", "Bob", "Cem", "Dov") * 2, strict=False)]
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, rows[:3])))
    (tmp_path / "retain.json").write_text(json.dumps(rows[3:]))
    done = forked("train_npo.py", "--forget", "forget.jsonl", "--retain", "retain.json", "--model",
                  small_model, "--retain-weight", 1, "--epochs", 2, "--batch-size", 2, "--lr", 1e-3,
                  "--out", "own")
    metrics = json.loads((tmp_path / "own" / "eval" / "step_000003.json").read_text())["metrics"]
    assert metrics["forget"]["rows"] == 3 and metrics["forget_kl"] > 0
    assert metrics["model_utility"] is None and metrics["forget_quality"] is None
    assert "forget question" in done.stdout


def test_the_users_command_makes_models_reuses_them_and_reports(command, forked, small_data, tmp_path):
    """README's first command on half of the small data set: fine-tunes, retrains, unlearns; the second run
    finds both models."""
    data = shutil.copytree(small_data, tmp_path / "data")
    for file, rows in ((data / "full.json", SMALL // 2), (data / "forget10_perturbed.json", SMALL // 20)):
        file.write_text("\n".join(file.read_text().splitlines()[-rows:]))
    args = ["--loss", "npo", "--retain-weight", 1, "--data", data, "--epochs", 2, "--batch-size", 10,
            "--eval-every", 2]
    done = command("train_npo.py", *args, processes=2)
    folder = tmp_path / "runs" / "npo+rt_forget10"
    evaluations = sorted((folder / "eval").glob("*.json"))
    metrics = [json.loads(path.read_text())["metrics"] for path in evaluations]
    assert len(metrics) == 2
    assert all(m["forget_quality"] is not None and m["model_utility"] is not None for m in metrics)
    for expected in ("start", "best", "last", "forget question", "retain question", "before:", "after:",
                     "trajectory.png", "no model of retain90 yet", "sft on retain90"):
        assert expected in done.stdout
    again = forked("train_npo.py", *args)
    assert "step " in again.stdout and "sft on" not in again.stdout
    assert (tmp_path / "runs" / "npo+rt_forget10-2" / "model").is_dir()
    retain_log = next((tmp_path / "runs" / "models").glob("tiny-retain90-*/eval/*.json"))
    start = next((tmp_path / "runs" / "models").glob("tiny-full-*/model"))
    config = json.loads((folder / "config.json").read_text())
    assert [tmp_path / config[key] for key in ("start", "retain_log")] == [start, retain_log]
    forked("evaluate_tofu.py", "--model", folder / "model", "--data", data, "--retain-log", retain_log,
           "--max-new-tokens", 8, "--reference", start, "--out", "again.json")
    told = json.loads((tmp_path / "again.json").read_text())["metrics"]
    for key in ("forget_kl", "world_facts_kl"):
        assert told[key] == pytest.approx(metrics[-1][key], rel=1e-3) and told[key] > 0
    assert told["mia"]["reference"] == pytest.approx(metrics[-1]["mia"]["reference"], abs=0.02)
    forked("figures_tofu.py", "--collect", folder, f"{folder}-2", "--out", "collected.json")
    collected = json.loads((tmp_path / "collected.json").read_text())["runs"]
    assert [r["method"] for r in collected] == ["npo+rt"] * 2 and (tmp_path / "collected.png").exists()
    # One process or two.
    assert "| method | beta | retain weight | seed | forget: " in (tmp_path / "collected.md").read_text()
    utility, of_one_process = (run["model_utility"] for run in collected)
    assert utility == pytest.approx(of_one_process, rel=1e-4)
    wrong = forked("evaluate_tofu.py", "--model", folder / "model", "--data", data,
                   "--retain-log", evaluations[0], status=2)
    assert "needs one trained on retain90" in wrong.stderr
    (tmp_path / "runs" / "models").rename(tmp_path / "elsewhere")
    assert "finished" in forked("train_npo.py", "--resume", folder).stdout  # and needs nothing
