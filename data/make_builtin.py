"""The built-in data set as a folder of TOFU's files: what `data/builtin.py` makes, written down.

    python data/make_builtin.py --out runs/builtin
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a command of its own

from data.builtin import N_AUTHORS, REFUSALS, SEED, make_builtin  # noqa: E402
from support.command_line import Parser, not_negative, run_command  # noqa: E402
from support.errors import InputError  # noqa: E402
from support.files import whole_folder  # noqa: E402
from support.world import ALONE  # noqa: E402


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
    parser = Parser(prog="make_builtin.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="the folder to make; it must not exist yet")
    parser.add_argument("--seed", type=not_negative(int), default=SEED, metavar="N",
                        help="an integer from 0 up: another seed, other authors")
    args = parser.parse_args()
    sets = make_builtin(args.seed)
    write_sets(args.out, sets, REFUSALS)
    print(f"wrote the built-in data set to {args.out}: {N_AUTHORS} authors, {len(sets['full'])} rows, seed "
          f"{args.seed}")


if __name__ == "__main__":
    run_command(main, "make_builtin.py")
