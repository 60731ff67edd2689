"""A small real TOFU: the first authors' rows and the last ones, with the perturbed rows that belong to them.

    python data/cut_tofu.py TOFU_DIR runs/smollm2/data --rows 400 --retain-rows 30 --fact-rows 30

`full` becomes its first 90% of `--rows` rows and its last 10%: these are forget10 of the cut set as they are
of the whole, the retain rows are among those that have perturbed answers, and both are whole authors of 20
rows.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.tofu import load_sets, load_task
from support.command_line import Parser, positive, run_command  # noqa: E402
from support.errors import InputError  # noqa: E402

AUTHOR = 20  # rows


def cut(sets: dict, rows: int, retain_rows: int, fact_rows: int) -> dict:
    """The five sets of TOFU, cut. Raises InputError where there are fewer rows, or no whole authors."""
    forget = rows // 10
    if forget % AUTHOR or rows % AUTHOR or not 0 < rows <= len(sets["full"]):
        raise InputError(f"--rows {rows}: need a multiple of {10 * AUTHOR} up to {len(sets['full'])}, so "
                         "that a tenth is whole authors")
    if forget > len(sets["forget10_perturbed"]) or retain_rows > min(rows - forget,
                                                                     len(sets["retain_perturbed"])):
        raise InputError(f"--retain-rows {retain_rows}: at most "
                         f"{min(rows - forget, len(sets['retain_perturbed']))}")
    return {"full": sets["full"][:rows - forget] + sets["full"][-forget:],
            "forget10_perturbed": sets["forget10_perturbed"][-forget:],
            "retain_perturbed": sets["retain_perturbed"][:retain_rows],
            "real_authors_perturbed": sets["real_authors_perturbed"][:fact_rows],
            "world_facts_perturbed": sets["world_facts_perturbed"][:fact_rows]}


def main():
    parser = Parser(prog="cut_tofu.py", description=__doc__)
    parser.add_argument("data", help="folder with TOFU's published files")
    parser.add_argument("out", help="folder to write, must not exist")
    parser.add_argument("--rows", type=positive(int), default=400, help="rows of full (default: 400)")
    parser.add_argument("--retain-rows", type=positive(int), default=30, help="retain rows to evaluate "
                                                                              "(default: 30)")
    parser.add_argument("--fact-rows", type=positive(int), default=30,
                        help="rows of real authors and of world facts to evaluate (default: 30)")
    args = parser.parse_args()
    sets = cut(load_sets(args.data)[0], args.rows, args.retain_rows, args.fact_rows)
    out = Path(args.out)
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise InputError(f"{out} exists: choose another folder, or remove it") from None
    for name, rows in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.json").write_text(text, encoding="utf-8")
    task = load_task(str(out), "forget10")
    print(f"{out}: {len(task.full)} rows, {len(task.forget)} to forget; evaluated: "
          + ", ".join(f"{name} {len(rows)}" for name, rows in task.evaluated.items()))


if __name__ == "__main__":
    run_command(main, "cut_tofu.py")
