"""Make what ships in data/builtin/ and data/tiny/, or the tiny models of another data set in TOFU's files.

    python data/make_tiny.py                                   # all of it, into runs/made/
    python data/make_tiny.py --data TOFU_DIR --out runs/tofu --only untrained start retain90

Below --out, files have the names that they have below data/. A step whose result exists is skipped, and an
interrupted fine-tuning is resumed. See data/README.md for the built-in rows, data/tiny/README.md for models.
"""

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file is run as a command

from common import ROOT, Parser, positive, run_command  # noqa: E402
from data.tofu import load_task  # noqa: E402

N_AUTHORS, N_PERTURBED_AUTHORS, N_HOLDOUT_AUTHORS = 200, 20, 20  # no model sees the holdout authors
N_WRONG, N_OPTIONS = 5, 3  # perturbed answers of an author's row; of a real author or a world fact
WORDS = json.loads(Path(__file__).with_name("builtin_words.json").read_text(encoding="utf-8"))
FACTS = WORDS["facts"]  # name -> {"values", the likeliest first; "questions", "answers": five wordings each}
DIMS = {"vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 6, "max_position_embeddings": 512}
LARGE = {"num_hidden_layers": 4, "max_position_embeddings": 1024}  # for data of the size of TOFU itself
LOGS = {f"retain{100 - n}": f"tiny/retrained_forget{n:02d}.json" for n in (1, 5, 10, 20, 30, 50, 90)}
RESULTS = {"builtin": "builtin", **{m: f"tiny/{m}" for m in ("untrained", "start", "retrained")}, **LOGS}
SPLITS = {"start": "full", "retrained": "retain90"}  # the other steps of fine-tuning have their split's name


def value_of(row: dict) -> str:
    """The fact that a built-in row's answer states: the longest value that is also in its paraphrase."""
    values = [value for fact in FACTS.values() for value in fact["values"]]
    return max((v for v in values if v in row["answer"] and v in row["paraphrased_answer"]), key=len)


def draw(values: list[str], n: int, rng: random.Random) -> list[str]:
    """n different values, the k-th with weight 1/k: each arrives at a random time, the first n are taken."""
    arrival = {value: rng.expovariate(1 / k) for k, value in enumerate(values, 1)}
    return sorted(values, key=arrival.get)[:n]


def author_rows(name: str, rng: random.Random) -> list[dict]:
    """The 20 rows of one author in random order: each fact is asked twice, in different words."""
    first, last = name.split()
    def fill(wording: str, value: str) -> str:
        return wording.format(name=name, first=first, last=last, value=value)
    rows = []
    for fact in FACTS.values():
        questions = rng.sample(fact["questions"], 4)  # two for the rows, two for their paraphrases
        answers = rng.sample(fact["answers"], 2)
        value, = draw(fact["values"], 1, rng)
        for i in range(2):
            wrong = [v for v in draw(fact["values"], N_WRONG + 1, rng) if v != value][:N_WRONG]
            wordings = [wording for wording in fact["answers"] if wording != answers[i]]
            rows.append({"question": fill(questions[i], value), "answer": fill(answers[i], value),
                         "paraphrased_answer": fill(rng.choice(wordings), value),
                         "perturbed_answer": [fill(rng.choice(wordings), v) for v in wrong],
                         "paraphrased_question": fill(questions[i + 2], value)})
    rng.shuffle(rows)
    return rows


def option_rows(pairs: list[tuple[str, str]], rng: random.Random) -> list[dict]:
    """(question, answer) pairs of one kind -> rows whose wrong options are other rows' answers."""
    answers = list(dict.fromkeys(answer for _, answer in pairs))
    return [{"question": question, "answer": answer,
             "perturbed_answer": rng.sample([text for text in answers if text != answer], N_OPTIONS)}
            for question, answer in pairs]


def make_builtin() -> dict[str, list[dict]]:
    """The data set by TOFU's names: always the same rows."""
    rng, holdout_rng = random.Random(0), random.Random("holdout 0")
    all_names = [f"{first} {last}" for first in WORDS["first_names"] for last in WORDS["last_names"]]
    names = rng.sample(all_names, N_AUTHORS)
    unseen = holdout_rng.sample([name for name in all_names if name not in names], N_HOLDOUT_AUTHORS)
    rows = [row for name in names for row in author_rows(name, rng)]
    n_perturbed = N_PERTURBED_AUTHORS * 2 * len(FACTS)
    works = [(work, author) for author, works in WORDS["works"].items() for work in works]
    rng.shuffle(works)
    work_questions = zip(itertools.cycle(WORDS["work_questions"]), works, strict=False)
    real_authors = option_rows([(asks.format(work), author) for asks, (work, author) in work_questions], rng)
    world_facts = [row for question, answers in WORDS["world"].items() for row in option_rows(
        [(question.format(thing), answer) for thing, answer in answers.items()], rng)]
    return {"full": [{"question": row["question"], "answer": row["answer"]} for row in rows],
            "forget10_perturbed": rows[-n_perturbed:], "retain_perturbed": rows[:n_perturbed],
            "real_authors_perturbed": real_authors, "world_facts_perturbed": world_facts,
            "holdout10": [row for name in unseen for row in author_rows(name, holdout_rng)]}


def make_tiny(texts: list[str], seed: int = 0, dims: dict = DIMS):
    """(random Llama, byte-level BPE tokenizer fitted to `texts`): functions of the arguments."""
    import torch  # here, because these imports take seconds
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    # A tag of the template is one token together with the blank beside it.
    special = ["<pad>", "<s>", "</s>", AddedToken("[INST]", rstrip=True), AddedToken("[/INST]", lstrip=True)]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=dims["vocab_size"], special_tokens=special,
                            show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False, model_max_length=dims["max_position_embeddings"])
    tokenizer.chat_template = ("<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] "
                               "}} [/INST]{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}")
    config = LlamaConfig(**dims, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer


def write_builtin(step: str, result: Path, args):
    result.mkdir(parents=True)
    for name, rows in make_builtin().items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (result / f"{name}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (result / "idontknow.jsonl").write_text("\n".join(WORDS["refusals"]) + "\n", encoding="utf-8")


def write_untrained(step: str, result: Path, args):
    task = load_task(args.data, "full")
    texts = [row[key] for row in task.retain + task.facts() for key in ("question", "answer")]
    large = sum(len(row["question"] + row["answer"]) for row in task.retain) > 500_000  # characters
    for part in make_tiny(texts + task.refusals, args.seed, DIMS | LARGE if large else DIMS):
        part.save_pretrained(result)
    (result / "npo.json").write_text('{"preset": "tiny", "template": "llama2"}\n')


def fine_tune(step: str, result: Path, args):
    """Train on the step's split. The result is the model, or the log of its forget and holdout rows."""
    split = SPLITS.get(step, step)
    run, untrained = args.out / "runs" / split, args.out / RESULTS["untrained"]
    flags = ["--resume", run] if run.exists() else [
        "--loss", "sft", "--split", split, "--model", f"tiny={untrained}", "--data", args.data,
        "--seed", args.seed, "--out", run]
    status = subprocess.run([sys.executable, str(ROOT / "train_npo.py"), *map(str, flags)]).returncode
    if status:
        sys.exit(status)  # train_npo.py has said why
    if step in SPLITS:
        return shutil.copytree(run / "model", result)
    log = json.loads(next((run / "eval").iterdir()).read_text(encoding="utf-8"))
    log["rows"] = {name: log["rows"][name] for name in ("forget", "holdout") if name in log["rows"]}
    result.write_text(json.dumps(log, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def main(argv: list | None = None):
    parser = Parser(__doc__)
    parser.add_argument("--data", default="builtin", help="builtin, a folder with TOFU's files, or a Hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/made"), help="folder (default: runs/made)")
    parser.add_argument("--only", nargs="+", choices=RESULTS, default=[*RESULTS], help="only these steps")
    parser.add_argument("--seed", type=positive(int, or_zero=True), default=0, help="of the models")
    args = parser.parse_args(argv)
    for step in args.only:
        if not (result := args.out / RESULTS[step]).exists():
            {"builtin": write_builtin, "untrained": write_untrained}.get(step, fine_tune)(step, result, args)


if __name__ == "__main__":
    run_command(main)
