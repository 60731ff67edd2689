"""Does a method forget the fact or the sentence? Nats that the forget answers of the built-in set lose on the
tokens of the fact, and on their other tokens, against the model before unlearning.

    python study/facts.py runs/*/ --out results/facts.json      # finished runs; the retrained model is added
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file is run as a command

from common import Parser, environment, run_command, write_json  # noqa: E402
from data.batches import collate  # noqa: E402
from data.make_tiny import value_of  # noqa: E402
from data.prompts import encode  # noqa: E402
from data.tofu import load_task  # noqa: E402
from losses import token_logps  # noqa: E402
from model import AnswerModel, load_model  # noqa: E402
from study.report import table  # noqa: E402

@torch.no_grad()
def nats(model: str, rows: list) -> np.ndarray:
    """-log pi of each answer on the tokens of its fact and on the others: (rows, 2)."""
    loaded, results = load_model(model), []
    policy, end = AnswerModel(loaded.lm), loaded.tokenizer.eos_token_id
    pairs = [(row["question"], row["answer"]) for row in rows]
    texts = encode(loaded.tokenizer, loaded.meta["template"], pairs)
    for row, text in zip(rows, texts, strict=True):
        batch = collate([text], end)
        logps = token_logps(policy([batch])[1], batch.targets)
        pieces = [loaded.tokenizer.decode([token]) for token in text.ids[text.start:-1]]
        edges, begin = np.cumsum([0, *map(len, pieces)]), "".join(pieces).index(value := value_of(row))
        inside = (edges[1:] > begin) & (edges[:-1] < begin + len(value))
        inside = np.append(inside, False)  # the end-of-sequence token is no part of the fact
        results.append([-logps[inside].sum().item(), -logps[~inside].sum().item()])
    return np.array(results)


def main(argv: list | None = None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a table is written beside it")
    args = parser.parse_args(argv)
    rows = load_task("builtin", "forget10").evaluated["forget"]
    start, models = nats("data/tiny/start", rows), {"(retrained)": nats("data/tiny/retrained", rows)}
    for run in (run for run in args.runs if (run / "model").is_dir()):
        models[run.name] = nats(str(run / "model"), rows)
    lines = []
    for name, values in models.items():
        fact, rest = (values - start).mean(0).tolist()
        lines.append({"model": name, "nats lost on the fact": fact, "on the other tokens": rest,
                      "share of the fact": fact / (fact + rest)})
    write_json(args.out, {"nats_of_the_start": start.mean(0).tolist(), "models": lines,
                          "provenance": environment()})
    args.out.with_suffix(".md").write_text(table(lines) + "\n", encoding="utf-8")
    print(table(lines))


if __name__ == "__main__":
    run_command(main)
