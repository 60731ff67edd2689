"""Does it stay forgotten? Attacks on an unlearned model, with the retrained model as their control.

    python robustness_tofu.py --model runs/NAME/model --start runs/models/FULL/model \
        --retrained runs/models/RETAIN/model --out results/NAME

    relearn    fine-tune on 1, 5, 20, 100% of the forget rows, and for as many steps on retain rows, which say
               other things in the same wordings: a curve over steps
    quantize   round the weights of every linear layer but the head to 8 and 4 bits, a scale for 64 of them
    prompts    paraphrased question, an answer that has begun, retain rows with answers before the question
    sample     64 answers at temperature 1: leak@k, the chance that one of k states the fact

Before and after each, extraction strength, ROUGE-L recall, probability of the forget rows and forget quality,
which compares with the retrained model after the same attack (docs/beyond.md). It leaves OUT/robustness.json,
.md and .png. What is in the JSON already, of the same weights, data and settings, is not done again.
"""

from pathlib import Path

from data.tofu import complement, parse_split
from evaluate_tofu import add_rows, asked_as, compute_metrics, refuse_unwritable, task_of
from evaluation import attacks
from models.answers import AnswerModel
from models.checks import check_attention, check_model
from models.presets import Preset
from running.processes import take_device
from support.command_line import Parser, not_negative, positive, run_command
from support.errors import refuse
from support.files import locked
from support.provenance import environment
from support.world import ALONE, World


def build_parser() -> Parser:
    parser = Parser(prog="robustness_tofu.py", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the unlearned model, a run's model/ or best/")
    add("--start", help="the model before unlearning: what there was to know")
    add("--retrained", help="the model trained without the forget rows: the control, and forget quality")
    add_rows(add)
    every = list(attacks.ATTACKS)
    add("--attacks", nargs="+", choices=every, default=every, help="only these (default: all)")
    add("--shares", nargs="+", type=positive(float), default=[1, 5, 20, 100], metavar="K",
        help="relearn on K per cent of the forget rows (default: 1 5 20 100)")
    add("--lr", type=positive(float), help="of relearning (default: the preset's)")
    add("--samples", type=positive(int), default=64, help="answers a question (default: 64)")
    add("--max-rows", type=not_negative(int), default=200,
        help="forget rows that are measured, the first ones, 0 for all (default: 200)")
    add("--out", required=True, help="folder of robustness.json, .md and .png; goes on with what is there")
    return parser


def make_lab(args, world: World, models: dict, records: dict, tokenizer, known: Preset) -> attacks.Lab:
    """What the attacks share. Raises InputError for what the data or the model can't carry."""
    lm, task = models["model"], task_of(args, records["model"].get("trained_on", {}))
    template = asked_as(args, tokenizer, records, known)
    learned = records.get("retrained", {}).get("trained_on", {}).get("split")
    if task.split != "own" and learned not in (None, complement(task.split)):
        print(f"note: --retrained was trained on {learned}; the control of {task.split} is a model trained "
              f"on {complement(task.split)}")
    rows = task.evaluated["forget"][:args.max_rows or None]
    args.lr = args.lr or known.lr
    context = getattr(lm.config, "max_position_embeddings", None)
    lab = attacks.Lab(task, tokenizer, template, context, rows, known, world, args, compute_metrics,
                      models.get("start"))
    texts = lab.prepared().encoded()
    check_model(AnswerModel(lm.to(world.device)), texts, tokenizer.eos_token_id, args.model, "fp32", world)
    lm.cpu()  # the retrained model comes first
    if "prompts" in args.attacks:
        longest = max(len(e.ids) for other in attacks.asked_otherwise(lab).values() for e in other.encoded())
        refuse({f"--attacks prompts: a question with {attacks.SHOTS} answered ones before it has {longest} "
                f"tokens, the model's context {context}; leave prompts out": context and longest > context})
        check_attention(lm.config, longest, f"--attacks prompts: {args.model}")
    return lab


def main(argv=None):
    args = build_parser().parse_args(argv)
    own, most = args.forget or args.retain, max(args.shares)
    refuse({f"--shares {most:g}: per cent of the forget rows, at most 100": most > 100,
            f"--split {args.split}: need a forget split, forget01 to forget99":
                args.split and not own and parse_split(args.split)[0] != "forget"})
    args.shares.sort()
    out = Path(args.out)
    refuse_unwritable([out / "robustness.json"])
    world = ALONE._replace(device=take_device(args.device))
    models, *known = attacks.load_models(args)
    lab = make_lab(args, world, models, *known)
    identity = lab.identity(models)
    print(f"{', '.join(args.attacks)} on {len(lab.rows)} forget rows of {lab.task.source}, lr {args.lr:g}")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "robustness.lock"):
        result = attacks.read_result(out / "robustness.json", identity)
        result["provenance"] = {**environment(), **identity}
        attacks.carry_out(lab, models, result, args.attacks, out / "robustness.json")
    lines = attacks.table(result["attacks"])
    (out / "robustness.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    attacks.draw(result["attacks"], out / "robustness.png")
    print("\n".join(lines), f"\n{out}: robustness.json, robustness.md, robustness.png")


if __name__ == "__main__":
    run_command(main, "robustness_tofu.py")
