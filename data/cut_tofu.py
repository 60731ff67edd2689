"""A smaller TOFU in TOFU's files: python data/cut_tofu.py TOFU_DIR runs/cut --rows 800 --fact-rows 50

A tenth of the rows are TOFU's last; they become the cut set's forget10. The others are TOFU's first. Authors
are complete. The cut set evaluates as many retain rows as forget rows.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file is run as a command

from common import Parser, positive, run_command  # noqa: E402
from data.tofu import load_sets  # noqa: E402

def main(argv: list | None = None):
    parser = Parser(__doc__)
    parser.add_argument("data", help="a folder with TOFU's files, or builtin")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--rows", type=int, choices=range(200, 4001, 200), required=True, help="of full.json")
    parser.add_argument("--fact-rows", type=positive(int), help="of either set of facts (default: all)")
    args = parser.parse_args(argv)
    (sets, refusals), n = load_sets(args.data), args.rows // 10
    sets["full"] = sets["full"][:9 * n] + sets["full"][-n:]
    sets["forget10_perturbed"] = sets["forget10_perturbed"][-n:]
    sizes = {"full": None, "real_authors_perturbed": args.fact_rows, "world_facts_perturbed": args.fact_rows}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows[:sizes.get(name, n)]]
        (args.out / f"{name}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.out / "idontknow.jsonl").write_text("\n".join(refusals) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
