"""Pictures and page of `theory_check.py`: what every item measured, and what was predicted."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from study.synthetic_pages import table, tidy

RED, GREYS = "#d1495b", ("0", "0.25", "0.45", "0.6")  # gradient ascent; NPO at several beta


def finish(figure: Figure, axes, path: Path):
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_proposition1(path: Path, curves: dict):
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = zip("os", ("--", ":"), ("0", "0.5"), strict=True)
    for (name, curve), (marker, dashes, shade) in zip(curves.items(), styles, strict=True):
        for axis, key in zip(axes, ("error", "gradient_error"), strict=True):
            predicted = curve["predicted" if key == "error" else "predicted_gradient_error"]
            axis.loglog(curve["beta"], curve[key], marker, color=shade, label=name)
            axis.loglog(curve["beta"], predicted, dashes, color=RED, label=f"predicted, {name}")
    axes[0].set(title="|loss - (2/$\\beta$) log 2 - limit|", xlabel="$\\beta$", ylabel="nats")
    axes[1].set(title="|$\\nabla L_{NPO} - \\nabla L_{GA}$|", xlabel="$\\beta$")
    finish(figure, axes, path)


def draw_equation5(path: Path, curves: dict):
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    axes = figure.subplots(1, 2)
    for (beta, curve), dashes, shade in zip(curves.items(), ("-", "--", "-.", ":"), GREYS, strict=True):
        axes[0].plot(curve["log_ratio"], curve["weight"], dashes, color=shade, label=f"$\\beta$ = {beta}")
        axes[1].plot(curve["log_ratio"], curve["loss"], dashes, color=shade, label=f"NPO, $\\beta$ = {beta}")
    axes[1].plot([-15, 15], [-15, 15], color=RED, label="gradient ascent")
    axes[0].set(title="W: what NPO multiplies GA's gradient with", xlabel="log $\\pi_\\theta/\\pi_{ref}$")
    axes[1].set(title="loss", xlabel="log $\\pi_\\theta/\\pi_{ref}$", ylabel="nats", ylim=(-16, 32))
    finish(figure, axes, path)


def draw_theorem2(path: Path, times, sweeps: dict, outside: dict):
    """sweeps {key: {value: (GA's distance over its rate, NPO's over sqrt(n_f)/beta, what is predicted)}}."""
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    axes = figure.subplots(2, 3)
    shades = ("0", "0.2", "0.35", "0.5", "0.6", "0.7")
    for (key, sweep), linear, logarithmic in zip(sweeps.items(), *axes, strict=False):
        styles = zip("osD^vP", shades, strict=True)
        for (value, (ga, npo, predicted)), (marker, shade) in zip(sweep.items(), styles, strict=False):
            style = {"color": shade, "markersize": 3, "label": f"{key} = {value:g}"}
            linear.loglog(times, ga, marker + "-", **style)
            logarithmic.semilogx(times, npo, marker, **style)
            logarithmic.semilogx(times, predicted, "-", color=shade, linewidth=0.8)
        linear.set(title=f"GA: distance / ($n_f^{{-1/2}}\\eta t$), {key} varied", xlabel="t", ylim=(0.3, 2))
        logarithmic.set(title=f"NPO: distance $\\cdot\\beta/\\sqrt{{n_f}}$, {key} varied;\n"
                        "lines: log(c $\\eta t/n_f$ + 1), late c", xlabel="t")
    styles = zip(("-", "--", ":"), ("0", RED, "0.45"), strict=True)
    for (name, case), (dashes, shade) in zip(outside.items(), styles, strict=True):
        axes[0, 2].loglog(case["times"], case["ga"], dashes, color=shade, label=name)
        axes[1, 2].semilogx(case["times"], case["npo"], dashes, color=shade, label=name)
    axes[0, 2].set(title="outside the regime: GA's distance (no verdict)", xlabel="t")
    axes[1, 2].set(title="outside the regime: NPO's distance (no verdict)", xlabel="t")
    finish(figure, axes.ravel(), path)


def draw_divergence(path: Path, times, rates: dict):
    """rates {label: (distance, the theorem's lower bound, its upper bound)}, gradient ascent first."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for (label, (norm, *bounds)), shade, marker in zip(rates.items(), (RED, *GREYS), "^osDv", strict=True):
        for axis in axes:
            axis.fill_between(times, *bounds, color=shade, alpha=0.12, linewidth=0)
            for bound in bounds:
                axis.plot(times, bound, "-", color=shade, linewidth=0.8)
            axis.plot(times, norm, marker, color=shade, markersize=4, label=label)
    axes[0].set(title="linear time: GA leaves at constant speed", xlim=(0, 2000), ylim=(0, 80), xlabel="t",
                ylabel="|$\\theta^{(t)} - \\theta_{init}$| in $X^TX$\nlines: the theorem's two bounds")
    axes[1].set(title="logarithmic time: NPO's lines are straight", xscale="log", ylim=(0, 200), xlabel="t")
    axes[2].set(title="both logarithmic", xscale="log", yscale="log", xlabel="t")
    finish(figure, axes, path)


def draw_softmax(path: Path, curves: dict):
    figure = Figure(figsize=(6.5, 4.3), layout="constrained")
    axis = figure.subplots()
    logps, *rows = curves.items()
    styles = zip(("-", "-", "--", "-.", ":"), (RED, *GREYS), strict=True)
    for (name, row), (dashes, shade) in zip(rows, styles, strict=True):
        axis.semilogy(logps[1], row, dashes, color=shade, marker="^" if name == "ga" else None, markevery=5,
                      label=name)
    axis.set(title="gradient in $\\theta_y$ / |x| as the sample is unlearned",
             xlabel="log $\\pi_\\theta$(y|x)", ylim=(1e-16, 3))
    axis.invert_xaxis()
    finish(figure, [axis], path)


def page(verdicts: list, outside: dict, command: str) -> str:
    """Every verdict with its numbers, and the cases without one."""
    claims = []
    for item in verdicts:
        told = [f"{key} {json.dumps(value)}" for key, value in tidy(item["numbers"], 6).items()]
        cells = ["holds" if item["holds"] else "**fails**", item["claim"], "; ".join(told)]
        claims.append([cell.replace("|", "/") for cell in cells])
    cases = [[name, f"{case['ga_power_in_t']:.3f}", f"{case['npo_slope_over_predicted']:.3f}"]
             for name, case in outside.items()]
    return "\n".join([
        "# Section 3, checked", "", f"`python {command}`", "",
        *table(("", "claim", "measured (and predicted)"), claims), "",
        "Outside Theorem 2's regime, no verdict (eta 0.5, beta 1, last decade of t):", "",
        *table(("rows", "GA: power of t (1 within)",
                "NPO: slope in log t over sqrt(n_f)/beta (1 within)"), cases)]) + "\n"
