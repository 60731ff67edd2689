"""What `robustness_tofu.py` shows of its JSON, without PyTorch: a table, and a picture a page can show."""

from pathlib import Path

from matplotlib.figure import Figure

from support.command_line import markdown_table, number

LABELS = {"model": "unlearned", "retrained": "retrained", "start": "start"}
MEASURES = {"extraction_strength": "extraction", "rouge_l_recall": "ROUGE-L", "probability": "probability"}


def last_states(entry: dict) -> dict:
    """what -> its state; of a curve the last."""
    return {state["what"]: state for state in entry["states"]}


def table(attacks: dict) -> list[str]:
    """Markdown: a line a state, what was measured of each model in it; leak@k; how fast relearning is."""
    names = [name for name in LABELS if any(name in entries for entries in attacks.values())]
    head = ["attack", "state", *(f"{label} {LABELS[name]}" for label in MEASURES.values() for name in names),
            *(f"forget quality {LABELS[name]}" for name in names if name != "retrained"), "codes changed"]
    lines, further = [], []
    for attack, entries in attacks.items():
        found = {name: last_states(entries[name]) for name in names if name in entries}
        for what, known in next(iter(found.values())).items():
            states = {name: some[what] for name, some in found.items()}
            if what == "before" and lines:
                continue  # the same for all attacks
            if "leak" in known:
                for name, state in states.items():
                    leaks = ", ".join(f"{k}: {number(leak)}" for k, leak in state["leak"].items())
                    further.append(f"leak@k, {known['samples']} samples of {known['rows']} rows, "
                                   f"{LABELS[name]} model: {leaks}")
                continue
            cells = [states.get(name, {}).get(key) for key in MEASURES for name in names]
            cells += [states.get(name, {}).get("forget_quality") for name in names if name != "retrained"]
            lines.append([attack if what != "before" else "none", what, *map(number, cells),
                          number(states.get("model", {}).get("codes_changed"))])
        for name, entry in entries.items():
            if "halfway" in entry:
                steps = ", ".join(f"{what}: {number(n, 1)}" for what, n in entry["halfway"]["steps"].items())
                further.append(f"steps to extraction strength {entry['halfway']['extraction_strength']:.3f}, "
                               f"halfway to the start's, {LABELS[name]} model: {steps}")
    return [*markdown_table(head, lines), "", *(f"- {line}" for line in further)]


def draw(attacks: dict, path: Path):
    """Extraction strength over the steps of relearning and after each other attack; leak@k."""
    looks = {"model": ("black", "o"), "retrained": ("tab:cyan", "s"), "start": ("tab:red", "^")}
    figure = Figure(figsize=(13, 4), layout="constrained")
    curves, bars, leaks = figure.subplots(1, 3)
    others = {name: {} for name in looks}  # model -> state -> extraction strength in it
    for attack in ("quantize", "prompts"):
        for name, entry in attacks.get(attack, {}).items():
            others[name] |= {what: s["extraction_strength"] for what, s in last_states(entry).items()}
    places = list(dict.fromkeys(what for own in others.values() for what in own))
    for shift, (name, (color, marker)) in zip((-0.25, 0, 0.25), looks.items(), strict=True):
        states = attacks.get("relearn", {}).get(name, {}).get("states", [])
        whats = dict.fromkeys(s["what"] for s in states[1:])
        for what, line in zip(list(whats)[-2:], ("-", ":"), strict=False):  # the largest share; retain rows
            shown = [states[0], *(s for s in states if s["what"] == what)]
            curves.plot([s["step"] for s in shown], [s["extraction_strength"] for s in shown], line,
                        color=color, marker=marker, label=f"{LABELS[name]}, {what}")
        if others[name]:
            bars.bar([places.index(what) + shift for what in others[name]], others[name].values(), 0.25,
                     color=color, label=LABELS[name])
        if name in attacks.get("sample", {}):
            leak = attacks["sample"][name]["states"][-1]["leak"]
            leaks.plot([int(k) for k in leak], list(leak.values()), color=color, marker=marker,
                       label=LABELS[name])
    curves.set(xlabel="step of relearning", ylabel="extraction strength", title="relearning")
    bars.set_title("quantised, asked otherwise")
    bars.set_xticks(range(len(places)), places, rotation=30, ha="right")
    leaks.set_xscale("log", base=2)
    leaks.set(xlabel="samples k", title="leak@k", ylim=(-0.02, 1.02))
    for axes in (curves, bars, leaks):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=7, framealpha=0.4)
        else:
            axes.remove()
    figure.savefig(path, dpi=120)
