"""A small real TOFU: the first authors' rows and the last ones, with the perturbed rows that belong to them.

    python data/cut_tofu.py TOFU_DIR runs/smollm2/data --rows 400 --retain-rows 30 --fact-rows 30

`full` becomes its first 90% of `--rows` rows and its last 10%: these are forget10 of the cut set as they are
of the whole, the retain rows are among those that have perturbed answers, and both are whole authors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.make_builtin import write_sets  # noqa: E402
from data.tofu import HOLDOUT, load_sets  # noqa: E402
from support.command_line import Parser, positive, run_command  # noqa: E402
from support.errors import InputError  # noqa: E402

AUTHOR = 20  # rows


def main():
    parser = Parser(prog="cut_tofu.py", description=__doc__)
    parser.add_argument("data", help="folder with TOFU's published files")
    parser.add_argument("out", type=Path, help="folder to write, must not exist")
    for flag, rows, of in (("--rows", 400, "of full"), ("--retain-rows", 30, "to keep that are evaluated"),
                           ("--fact-rows", 30, "of real authors and of world facts")):
        parser.add_argument(flag, type=positive(int), default=rows, help=f"rows {of}")
    args = parser.parse_args()
    (sets, refusals, origin), forget = load_sets(args.data), args.rows // 10
    if args.rows % (10 * AUTHOR) or args.rows > len(sets["full"]) or args.retain_rows > args.rows - forget:
        raise InputError(f"--rows {args.rows}: need a multiple of {10 * AUTHOR} (whole authors) up to "
                         f"{len(sets['full'])}, and at most its 90% as --retain-rows")
    evaluated = {"retain_perturbed": args.retain_rows, "real_authors_perturbed": args.fact_rows,
                 "world_facts_perturbed": args.fact_rows}
    for name, rows in evaluated.items():
        if rows > len(sets[name]):
            raise InputError(f"{name} has {len(sets[name])} rows, not {rows}")
    cut = {"full": sets["full"][:args.rows - forget] + sets["full"][-forget:],
           "forget10_perturbed": sets["forget10_perturbed"][-forget:],
           **{name: sets[name][:rows] for name, rows in evaluated.items()}}
    if HOLDOUT in sets:
        cut[HOLDOUT] = sets[HOLDOUT][:forget]
    write_sets(args.out, cut, refusals if origin != "builtin" else ())
    for name, rows in cut.items():
        print(f"{args.out / name}.json: {len(rows)} rows")


if __name__ == "__main__":
    run_command(main, "cut_tofu.py")
