"""A data set as a folder of TOFU's files: the built-in one written down, or a small real TOFU.

    python data/write_sets.py builtin runs/builtin
    python data/write_sets.py TOFU_DIR runs/smollm2/data --rows 400 --retain-rows 30 --fact-rows 30

Of `--rows` rows `full` has its first 90% and its last 10%: these are forget10 of the cut set as they are of
the whole, the retain rows are among those that have perturbed answers, and both are whole authors.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a command of its own

from data.tofu import HOLDOUT, load_sets  # noqa: E402
from support.command_line import Parser, positive, run_command  # noqa: E402
from support.errors import InputError, refuse  # noqa: E402
from support.files import whole_folder  # noqa: E402
from support.world import ALONE  # noqa: E402

AUTHOR = 20  # rows


def write_sets(folder: Path, sets: dict, refusals=()):
    """Write TOFU's files: NAME.json with an object a line; of refusals idontknow.jsonl, plain sentences in
    spite of its name. The folder appears in one rename. Raises InputError where it exists, or OSError."""
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists: choose another folder, or remove it")
    lines = {f"{name}.json": [json.dumps(row, ensure_ascii=False) for row in rows]
             for name, rows in sets.items()}
    if refusals:
        lines["idontknow.jsonl"] = refusals
    with whole_folder(folder, ALONE) as aside:
        for name, texts in lines.items():
            (aside / name).write_bytes("".join(text + "\n" for text in texts).encode())


def main():
    parser = Parser(prog="write_sets.py", description=__doc__)
    add = parser.add_argument
    add("data", help="builtin, or a folder with TOFU's published files")
    add("out", type=Path, help="the folder to make; it must not exist yet")
    add("--rows", type=positive(int), help="rows of full, a tenth of them forget10 (default: all)")
    add("--retain-rows", type=positive(int), help="rows to keep that are evaluated (default: all)")
    add("--fact-rows", type=positive(int), help="rows of real authors and of world facts (default: all)")
    args = parser.parse_args()
    sets, refusals, origin = load_sets(args.data)
    if args.rows:
        full, forget = sets["full"], args.rows // 10
        refuse({f"--rows {args.rows}: need a multiple of {10 * AUTHOR} (whole authors) up to {len(full)}":
                args.rows % (10 * AUTHOR) or args.rows > len(full)})
        sets["full"] = full[:args.rows - forget] + full[-forget:]
        sets["forget10_perturbed"] = sets["forget10_perturbed"][-forget:]
        sets["retain_perturbed"] = sets["retain_perturbed"][:args.rows - forget]
        if HOLDOUT in sets:
            sets[HOLDOUT] = sets[HOLDOUT][:forget]
    for name, rows in (("retain_perturbed", args.retain_rows), ("real_authors_perturbed", args.fact_rows),
                       ("world_facts_perturbed", args.fact_rows)):
        refuse({f"{name} has {len(sets[name])} rows, not {rows}": rows and rows > len(sets[name])})
        sets[name] = sets[name][:rows]
    write_sets(args.out, sets, refusals if origin != "builtin" or args.data == "builtin" else ())
    for name, rows in sets.items():
        print(f"{args.out / name}.json: {len(rows)} rows")


if __name__ == "__main__":
    run_command(main, "write_sets.py")
