"""Section 4: the published instances bit for bit, curves to 5e-9, every method's path, verdicts."""

import json

import numpy as np
import pytest
import torch

import losses
import synthetic
from common import InputError
from data.synthetic_instances import PUBLISHED_SEEDS, Instance, N, fresh_instance, published_instance
from study.report import judged
from synthetic import FIGURE4, METHODS, Problem, published_methods, reference_and_retrained


@pytest.fixture(scope="module")
def small():
    """A fresh instance at alpha 1 whose models are trained briefly."""
    instance = fresh_instance(0, 0)
    models = reference_and_retrained(instance, 1, 300)
    return instance, models, Problem([instance], 1, [models])


# -- the data


@pytest.mark.parametrize("seed", [1000, 2000])
def test_published_instances_are_redrawn_bit_for_bit(shared, seed):
    kept = np.load(shared("synthetic") / "published_instances.npz")
    instance = published_instance(seed)
    for field in Instance._fields:
        np.testing.assert_array_equal(getattr(instance, field), kept[f"{seed}_{field}"], err_msg=field)


def test_redrawing_disturbs_no_other_randomness():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = published_instance(1000)
    assert torch.equal(torch.rand(3), expected)
    assert (first.y_retain.sum(), first.y_forget.sum(), first.y_idk.sum()) == (312, 145, 94)


def test_fresh_instances_depend_on_seed_and_number_alone():
    np.testing.assert_array_equal(fresh_instance(3, 1).x_forget, fresh_instance(3, 1).x_forget)
    assert not np.array_equal(fresh_instance(3, 1).x_forget, fresh_instance(3, 2).x_forget)
    labels = [fresh_instance(0, i) for i in range(5)]
    assert abs(np.mean([i.y_forget.mean() for i in labels]) - 0.70) < 0.04  # E sigmoid(N(1, 1)) = 0.697
    assert abs(np.mean([i.y_retain.mean() for i in labels]) - 0.30) < 0.04


# -- the published curves


@pytest.fixture(scope="module")
def published_curves():
    eval_steps, curves = [0, 250, 500], []
    for seed in PUBLISHED_SEEDS:
        instance = published_instance(seed)
        models = reference_and_retrained(instance, 1, synthetic.TRAIN_STEPS)
        problem = Problem([instance], 1, [models])
        curves.append((models, problem.unlearn(published_methods(1), eval_steps)[0]))
    return eval_steps, [models for models, _ in curves], np.stack([curve for _, curve in curves])


def test_trained_models_are_the_published_ones(shared, published_curves):
    kept = np.load(shared("synthetic") / "published_instances.npz")
    for seed, models in zip((1000, 2000), published_curves[1], strict=False):
        assert abs(models[0] - kept[f"{seed}_theta_initial_alpha1"]).max() < 1e-9
        assert abs(models[1] - kept[f"{seed}_theta_retrained_alpha1"]).max() < 1e-9


def test_means_and_sds_are_the_published_ones(shared, published_curves):
    published = json.loads((shared("synthetic") / "published_figure4_alpha1.json").read_text())
    eval_steps, _, curves = published_curves
    for name, record in published["methods"].items():
        for axis, key in enumerate(("forget_distance", "retain_distance")):
            for at, step in enumerate(eval_steps):
                ours, place = curves[:, METHODS.index(name), axis, at], record["steps"].index(step)
                assert abs(ours.mean() - record[key]["mean"][place]) < 5e-9, (name, key, step)
                assert abs(ours.std() - record[key]["sd"][place]) < 5e-9, (name, key, step)


# -- gradients


def objective(name, beta, instance, theta, reference, alpha):
    """The method's loss from losses.py: the same model, written as a two-class softmax."""
    def two_class(x, mean, parameters):
        logits = torch.from_numpy(instance.features(x + mean)) @ parameters
        return torch.stack([torch.zeros_like(logits), logits], -1)

    family, _, retain = name.partition("+")
    forget, forget_reference = (two_class(instance.x_forget, alpha, p) for p in (theta, reference))
    y, y_idk, y_retain = (torch.from_numpy(labels).long()
                          for labels in (instance.y_forget, instance.y_idk, instance.y_retain))
    policy, ref = (losses.token_logps(logits, y) for logits in (forget, forget_reference))
    policy_idk, ref_idk = (losses.token_logps(logits, y_idk) for logits in (forget, forget_reference))
    of_family = {"ga": lambda: losses.ga_loss(policy), "idk": lambda: losses.nll_loss(policy_idk),
                 "npo": lambda: losses.npo_loss(policy, ref, beta),
                 "dpo": lambda: 2 * losses.dpo_loss(policy_idk, policy, ref_idk, ref, beta)}
    loss = of_family[family]().mean()
    if retain:
        logits, reference_logits = (two_class(instance.x_retain, -alpha, p) for p in (theta, reference))
        loss = loss + (losses.nll_loss(losses.token_logps(logits, y_retain)) if retain == "rt" else
                       losses.kl_loss(logits, reference_logits, "reference_policy")).mean()
    return loss


def test_every_method_walks_the_path_of_autograd_on_losses(small):
    instance, models, problem = small
    methods = [synthetic.Method(name, 0.05, None if name[:2] in ("ga", "id") else 0.7)
               for name in METHODS]
    eval_steps = [1, 2, 12]
    curves = problem.unlearn(methods, [*eval_steps])[0]
    reference = torch.from_numpy(models[0].copy())
    for method, curve in zip(methods, curves, strict=True):
        theta = reference.clone().requires_grad_()
        for step in range(1, 13):
            loss = objective(method.name, method.beta, instance, theta, reference, 1)
            [gradient] = torch.autograd.grad(loss, theta)
            theta = (theta - method.lr * gradient).detach().requires_grad_()
            if step in eval_steps:
                expected = problem.distances(theta.detach()[None, None])[0, 0]
                np.testing.assert_allclose(curve[:, eval_steps.index(step)], expected, rtol=1e-10,
                                           err_msg=f"{method.name} {step}")


def test_training_is_gradient_descent_on_cross_entropy(small):
    instance, _, _ = small
    Z_retain, Z_forget = (torch.from_numpy(instance.features(x))
                          for x in (instance.x_retain - 1, instance.x_forget + 1))
    y_retain, y_forget = torch.from_numpy(instance.y_retain), torch.from_numpy(instance.y_forget)
    ours = reference_and_retrained(instance, 1, 10)
    for row, (Z, y) in enumerate([(torch.cat([Z_retain, Z_forget]), torch.cat([y_retain, y_forget])),
                                  (Z_retain, y_retain)]):
        theta = torch.zeros(N, dtype=torch.float64, requires_grad=True)
        for _ in range(10):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(Z @ theta, y)
            [gradient] = torch.autograd.grad(loss, theta)
            theta = (theta - synthetic.TRAIN_LR * gradient).detach().requires_grad_()
        np.testing.assert_allclose(ours[row], theta.detach().numpy(), rtol=1e-10, atol=1e-13)


def test_distance_is_zero_at_the_retrained_model_and_kl_elsewhere(small):
    _, models, problem = small
    assert abs(problem.distances(torch.from_numpy(models[1:])[None])).max() < 1e-14
    retrained, other = np.array([[1.0], [-2.0]]), np.array([[0.5], [3.0]])
    p, q = (1 / (1 + np.exp(-u)) for u in (retrained, other))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    ours = synthetic.kl(*(torch.from_numpy(u.T)[None] for u in (retrained, other))).mean(-1)
    np.testing.assert_allclose(ours, [[expected]], rtol=1e-12)


# -- the command


def run_command(out, *flags, monkeypatch):
    monkeypatch.setattr(synthetic, "TRAIN_STEPS", 60)
    synthetic.main([*flags, "--out", str(out)])
    return out


def test_the_command_writes_every_method_and_instance_as_one_process_computes_them(tmp_path, monkeypatch):
    out = run_command(tmp_path, "--all", "--steps", "40", "--eval-every", "20", monkeypatch=monkeypatch)
    instances = [published_instance(seed) for seed in PUBLISHED_SEEDS]
    for alpha in (1, 0):
        record = json.loads((out / f"synthetic_alpha{alpha}.json").read_text())
        alone = synthetic.unlearned(instances, alpha, published_methods(alpha), [0, 20, 40], 60)
        assert list(record["methods"]) == list(METHODS) and record["alpha"] == alpha
        for m, method in enumerate(METHODS):
            entry = record["methods"][method]
            assert entry["steps"] == [0, 20, 40] and {"lr", "beta"} < set(entry)
            for axis, key in enumerate(("forget_distance", "retain_distance")):
                np.testing.assert_allclose(entry[key]["instances"], alone[:, m, axis], rtol=1e-9)
                np.testing.assert_allclose(entry[key]["mean"], alone[:, m, axis].mean(0), rtol=1e-9)
                np.testing.assert_allclose(entry[key]["sd"], alone[:, m, axis].std(0), rtol=1e-6, atol=1e-12)
                assert record["start"][key] == {of: entry[key][of][0] for of in ("mean", "sd")}
        assert record["verdicts"] == [] and record["provenance"]["command"]  # forty steps decide nothing
        assert (out / f"synthetic_alpha{alpha}.png").stat().st_size > 10_000


def test_figure_3_has_ga_and_npo_at_every_beta(tmp_path, monkeypatch):
    out = run_command(tmp_path, "--figure", "3", "--instances", "6", "--steps", "20", monkeypatch=monkeypatch)
    record = json.loads((out / "synthetic_figure3.json").read_text())
    assert list(record["methods"]) == ["ga", "npo@0.01", "npo@0.1", "npo@0.2", "npo@0.5", "npo@1"]
    ga = record["methods"]["ga"]
    assert ga["steps"] == [0, 5, 10, 15, 20] and record["methods"]["npo@0.2"]["beta"] == 0.2
    assert {"mean", "sd", "instances"} == set(ga["forget_distance"])
    assert np.shape(ga["forget_distance"]["instances"]) == (6, 5)
    assert (out / "synthetic_figure3.png").stat().st_size > 10_000


def test_grid_search_reports_every_setting_and_chooses_a_stable_one(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "GRID_LR", (5e-4, 5e-3, 50))
    out = run_command(tmp_path, "--grid-search", "--methods", "ga", "npo+rt", "--steps", "30",
                      monkeypatch=monkeypatch)
    record = json.loads((out / "synthetic_alpha1_grid.json").read_text())
    assert len(record["rows"]) == 3 + 3 * len(synthetic.GRID_BETA)
    assert not next(row for row in record["rows"] if row["method"] == "ga" and row["lr"] == 50)["stable"]
    assert record["chosen"]["ga"]["lr"] == 5e-3 and record["chosen"]["ga"]["stable"]


def test_steps_and_evaluations_are_the_papers():
    four, three = synthetic.parse_args([]), synthetic.parse_args(["--figure", "3"])
    assert (four.steps, four.eval_every, three.steps, three.eval_every) == (2000, 25, 10_000, 5)


@pytest.mark.parametrize("flags", [
    "--alpha -1", "--alpha x", "--alpha nan", "--alpha inf", "--methods nope", "--instances 0",
    "--instances 1.5", "--steps 0", "--eval-every 0", "--seed 1", "--seed -1 --instances 2",
    "--all --alpha 1", "--all --figure 3", "--figure 5", "--figure 3 --methods ga",
    "--figure 3 --grid-search", "--figure 3 --alpha 0", "--nonsense", "--out {here}/file"])
def test_bad_settings_are_refused_with_one_sentence(flags, capsys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as refusal:
        synthetic.main(flags.format(here=tmp_path).split())
    assert capsys.readouterr().out == "" and "\n" not in str(refusal.value)


# -- the verdicts


def path(forget, retain):
    return np.array([forget, retain], dtype=float)


def test_frontier_interpolates_between_evaluations():
    levels = synthetic.frontier(path([1.7, 0.001], [0.1, 0.2]))  # one jump over every level
    assert (np.diff(levels) < 0).all() and 0.1 < levels[-1] < levels[0] < 0.2
    assert np.isinf(synthetic.frontier(path([1.7, 1.6], [0.1, 0.2]))).all()
    back = synthetic.frontier(path([1.7, 0.001, 1.0], [0.1, 0.2, 0.05]))
    np.testing.assert_allclose(back[-1], 0.104, atol=0.04)


def test_path_gap_is_of_paths_and_not_of_clocks():
    steps = np.arange(0, 101, 5)

    def walk(clock):  # a circle of one decade
        return path(10 ** np.cos(clock), 10 ** np.sin(clock))
    paths = {"ga": walk(steps / 40), "npo@0.1": walk(steps / 60), "npo@1": walk(steps / 60) * 10**0.1}
    [(holds, numbers)] = synthetic.figure3(paths, steps).values()
    assert holds and numbers["smallest_beta"] < 1e-3 and abs(numbers["largest_beta"] - 0.1) < 0.05
    [(holds, _)] = synthetic.figure3(paths | {"npo@0.01": paths["npo@1"]}, steps).values()
    assert not holds


def test_verdicts_can_fail():
    """Every claim is true of made-up paths. If one path is exchanged, the claim about it fails."""
    steps, low = np.arange(0, 2001, 100), np.r_[1.7, 0.1, 0.004 * np.ones(19)]
    flat, up = 1 - np.exp(-np.arange(21) / 3) / 2, 1.2 ** np.arange(21)
    true = {name: path(low, up if name.startswith("ga") else flat + 0.1 * (name != "npo+rt"))
            for name in FIGURE4}
    true["idk+rt"] = path(np.r_[1.7, 0.1 * np.ones(20)], flat + 0.1)
    slow = path(np.r_[np.full(13, 1.7), low[1:9]], flat + 0.1)  # gets small after step 1200

    def holds(alpha, paths, every=1):
        curves = {name: values[None, :, ::every] for name, values in paths.items()}
        return [result["holds"] for result in synthetic.verdicts(4, alpha, curves, steps[::every])]
    assert holds(1, true) == [True] * 7
    false = [{"npo": slow}, {"idk+rt": path(low, flat + 0.1)}, {"ga": path(low, flat + 0.1)},
             {"npo+rt": path(low, up)}, {"dpo+rt": path([1.7] * 21, flat + 0.1)},  # which forgets nothing
             {"npo+rt": path(low, flat + 0.2)}, {"npo": path(low, 2 * up)}]
    assert not any(holds(1, true | exchanged)[claim] for claim, exchanged in enumerate(false))
    assert not holds(1, dict.fromkeys(FIGURE4, true["npo"]))[5]  # equal frontiers: none is the best
    assert not holds(1, dict.fromkeys(FIGURE4, path([1.7] * 21, flat)))[5]  # nobody gets to any level

    equal = {name: path(*[flat[::-1] + 0.1 * (name != "npo+rt")] * 2) for name in FIGURE4}
    assert holds(0, equal) == [True, True]
    assert holds(0, equal | {"ga": path(flat * 0.5, flat)}) == [False, False]
    assert holds(1, true, every=2) == holds(1, {"npo": true["npo"]}) == []  # evaluated rarely; incomplete


def test_a_verdict_on_the_mean_is_not_one_on_the_instances():
    """Three tame instances and a wild one: the mean fails although most hold, and the numbers show both."""
    curves = np.tile(path([1.7, 0.001], [0.1, 0.1]), (4, 1, 1))
    curves[3, 0, 1] = 0.8
    [result] = judged(lambda paths, _: {"small": (paths["npo"][0].min() < 0.005, {})}, {"npo": curves}, None)
    assert not result["holds"] and result["numbers"]["share_of_instances"] == 0.75
