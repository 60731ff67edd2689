"""TOFU's metrics (Maini et al., 2024; the paper's Section 5.1): forget quality and model utility.

    python evaluate_tofu.py --model runs/NAME/model --split forget10 --retain-log FILE
    python evaluate_tofu.py --log FILE --split forget10 --retain-log FILE    # ours, or a released TOFU log

metrics.py has the formulas. An evaluation draws no random number and changes nothing.
Shapes: N answer tokens, V vocabulary.
"""

import json
import os
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import InputError, Parser, cause_of, environment, locate, positive, run_command, write_json
from data.batches import collate, deal
from data.prompts import TEMPLATES, Encoded, encode, encode_prompts
from data.tofu import complement, evaluation_split, load_task, parse_split
from losses import kl_loss, token_logps
from metrics import KL_SETS, compute_metrics, metrics_table, plot_truth_ratios
from model import ALONE, AUTOCAST, AnswerModel, World, autocast, check_head, gathered, join_world, load_model

MAX_ROWS = 300  # TOFU evaluates the first 300 rows of a set
MIN_K = 0.4  # the min-k scores are means over this share of an answer's tokens, the least likely ones
SAMPLES = 3  # questions of a set whose answers are printed
CHUNK = 512  # answer tokens that are measured at once; a measure takes several tensors of their logits' size
TOFU_LOGS = {"retain": "eval_log.json", "real_authors": "eval_real_author_wo_options.json",
             "world_facts": "eval_real_world_wo_options.json", "forget": "eval_log_forget.json"}
TOFU_COLUMNS = {
    "answer_nll": "gt_loss", "answer_tokens": "num_token_gt", "paraphrased_nll": "paraphrased_loss",
    "paraphrased_tokens": "num_token_paraphrased", "perturbed_nll": "perturb_loss",
    "perturbed_tokens": "num_token_perturb", "rouge_l_recall": "rougeL_recall",
    "generated_text": "generated_text"}


# ---------------------------------------------------------------- from a model to rows

class Prepared(NamedTuple):
    """The rows of an evaluation as tokens. They do not change while a model trains."""
    rows: dict  # set -> rows
    texts: dict[str, Encoded]  # "forget/3/answer", "forget/3/paraphrased", "forget/3/perturbed0" ..
    prompts: dict[str, list]  # "forget/3" -> token ids

    def compared(self) -> dict[str, Encoded]:
        """The texts on which a reference is needed: for the KL metrics, and for MIA's reference score."""
        return {key: text for key, text in self.texts.items()
                if key.endswith("/answer") and key.split("/")[0] in (*KL_SETS, "holdout")}


def prepare(evaluated: dict, tokenizer, template: str, max_rows: int = MAX_ROWS,
            context: int | None = None) -> Prepared:
    """The first `max_rows` rows (0: all) of each set in `evaluated`; of a set "holdout" only the answers.
    Raises InputError for a text above `context` tokens."""
    rows = {name: rows[:max_rows or None] for name, rows in evaluated.items() if rows}
    pairs, questions = {}, {}
    for name in rows:
        for index, row in enumerate(rows[name]):
            key = f"{name}/{index}"
            pairs[f"{key}/answer"] = row["question"], row["answer"]
            if name == "holdout":
                continue
            questions[key] = row["question"]
            if row.get("paraphrased_answer"):
                pairs[f"{key}/paraphrased"] = row["question"], row["paraphrased_answer"]
            for k, answer in enumerate(row.get("perturbed_answer") or []):
                pairs[f"{key}/perturbed{k}"] = row["question"], answer
    texts = dict(zip(pairs, encode(tokenizer, template, list(pairs.values()), context), strict=True))
    prompts = encode_prompts(tokenizer, template, list(questions.values()))
    return Prepared(rows, texts, dict(zip(questions, prompts, strict=True)))


@torch.no_grad()
def evaluate(model: AnswerModel, prepared: Prepared, tokenizer, batch_size: int, max_new_tokens: int,
             reference=None, world: World = ALONE) -> dict:
    """set -> row results in order, the same on every process. Each process takes its share of the texts.
    `reference` has logits(keys) and logps(keys) of the texts in `prepared.compared()`; None: no KL metric."""
    def batches(things: dict, length, label: str):
        """Lists of keys: this process's share, in batches."""
        dealt = deal(list(things), lambda key: length(things[key]), batch_size, world.rank, world.size)
        return tqdm(filter(None, dealt), label, len(dealt), leave=False, disable=world.rank > 0 or None)

    scores, generations = {}, {}
    with gathered(model):
        for answers in (True, False):  # rows' own answers are measured in more ways than the other texts
            texts = {key: text for key, text in prepared.texts.items() if key.endswith("/answer") == answers}
            for keys in batches(texts, lambda text: len(text.ids), "scoring"):
                batch = collate([texts[key] for key in keys], tokenizer.eos_token_id, world.device)
                _, logits = model([batch])
                lengths = [texts[key].answer_tokens for key in keys]
                parts = zip(logits.split(CHUNK), batch.targets.split(CHUNK), strict=True)
                values = torch.cat([token_measures(*part, not answers) for part in parts], dim=1)
                per_text = values.cpu().double().split(lengths, dim=1)
                for key, value in zip(keys, per_text, strict=True):
                    scores[key] = score(*value.tolist())
                if answers and reference is not None:
                    compare(keys, logits.split(lengths), reference, scores)
        for keys in batches(prepared.prompts, len, "generating"):
            prompts = [prepared.prompts[key] for key in keys]
            ids = generate(model, prompts, tokenizer.eos_token_id, max_new_tokens, world.device)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            generations |= {key: text.strip() for key, text in zip(keys, texts, strict=True)}
    scores, generations = ({key: value for part in world.collect(share) for key, value in part.items()}
                           for share in (scores, generations))
    return {name: [row_result(name, index, row, scores, generations) for index, row in enumerate(rows)]
            for name, rows in prepared.rows.items()}


def token_measures(logits: Tensor, targets: Tensor, logps_alone: bool = False) -> Tensor:
    """Per answer token, (N, V) and (N,) -> (3, N), or the first row alone: log pi; whether the token is the
    likeliest; log pi standardised under the model's own distribution (min-k++, Zhang et al. 2024)."""
    logps = token_logps(logits, targets)
    if logps_alone:
        return logps[None]
    log_probs = logits.float().log_softmax(-1)
    probs = log_probs.exp()
    mean = (probs * log_probs).sum(-1)
    variance = (probs * (log_probs - mean[:, None]) ** 2).sum(-1)
    return torch.stack([logps, (logits.argmax(-1) == targets).float(),
                        (logps - mean) / variance.clamp(min=1e-6).sqrt()])


def score(logps: list, hits: list | None = None, standardised: list | None = None) -> dict:
    """The numbers that are kept of a text, from its answer tokens. The end-of-sequence token, the last one,
    does not count as memorised."""
    result = {"nll": -sum(logps), "tokens": len(logps)}
    if hits is None:
        return result
    hits, lowest = hits[:-1] or hits, max(1, int(MIN_K * len(logps)))
    suffix = sum(1 for _ in takewhile(bool, reversed(hits)))
    return result | {"exact_memorization": sum(hits) / len(hits), "extraction_strength": suffix / len(hits),
                     "min_k": -sum(sorted(logps)[:lowest]) / lowest,
                     "min_k_plus_plus": -sum(sorted(standardised)[:lowest]) / lowest}


def compare(keys: list, logits: tuple, reference, scores: dict):
    """Add to `scores` the sum over answer tokens of D(pi_ref || pi_theta), and -log pi_ref of the answer."""
    for key, policy_logits in zip(keys, logits, strict=True):
        name = key.split("/")[0]
        if name in KL_SETS:
            kl = kl_loss(policy_logits, reference.logits([key]), "reference_policy")
            scores[key]["kl"] = kl.cpu().double().sum().item()
        if name in (*KL_SETS, "holdout"):
            scores[key]["reference_nll"] = -reference.logps([key]).item()


def row_result(name: str, index: int, row: dict, scores: dict, generations: dict) -> dict:
    """What an evaluation keeps of one row: sums in nats, numbers of tokens, measures, texts."""
    key = f"{name}/{index}"
    answer, paraphrased = scores[f"{key}/answer"], scores.get(f"{key}/paraphrased", {})
    perturbed = [scores[f"{key}/perturbed{k}"] for k in range(len(row.get("perturbed_answer") or []))
                 if name != "holdout"]
    generation = generations.get(key)
    return {"index": index, "answer_nll": answer["nll"], "answer_tokens": answer["tokens"],
            "paraphrased_nll": paraphrased.get("nll"), "paraphrased_tokens": paraphrased.get("tokens"),
            "perturbed_nll": [text["nll"] for text in perturbed],
            "perturbed_tokens": [text["tokens"] for text in perturbed],
            **{measure: value for measure, value in answer.items() if measure not in ("nll", "tokens")},
            "rouge_l_recall": None if generation is None else rouge_l_recall(row["answer"], generation),
            "question": row["question"], "answer": row["answer"], "generation": generation}


@torch.no_grad()
def generate(model: AnswerModel, prompts: list, end: int, max_new_tokens: int, device) -> list[list[int]]:
    """Greedy continuations of prompts, each up to the token `end`; behind it there is only `end`."""
    width = max(map(len, prompts))
    room = getattr(model.lm.config, "max_position_embeddings", width + max_new_tokens) - width
    ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions, cache = (mask.cumsum(-1) - 1).clamp(min=0), None
    texts = torch.full((len(prompts), max_new_tokens), end, device=device)
    rows, column = torch.arange(len(prompts), device=device), -1  # the rows that have not ended
    for column in range(min(max_new_tokens, room)):
        logits, cache = model.next_logits(input_ids=ids, attention_mask=mask, position_ids=positions,
                                          cache=cache)
        texts[rows, column] = logits.argmax(-1)
        unended = (texts[rows, column] != end).nonzero()[:, 0]
        if len(unended) < len(rows):
            rows, mask, positions = rows[unended], mask[unended], positions[unended]
            cache.batch_select_indices(unended)
        if len(rows) == 0:
            break
        ids, positions = texts[rows, column, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return texts[:, :column + 1].tolist()


def rouge_l_recall(answer: str, generation: str) -> float:
    """The share of the answer's (stemmed) words that the generation has in the same order."""
    from rouge_score.rouge_scorer import RougeScorer  # imported here because the import takes a second
    return float(RougeScorer(["rougeL"], use_stemmer=True).score(answer, generation)["rougeL"].recall)


# ---------------------------------------------------------------- logs, ours and TOFU's released ones

def read_log(path: str) -> tuple[dict, dict]:
    """(rows, provenance) of an evaluation's JSON, ours or a released one. Raises InputError."""
    try:
        log = json.loads(locate(path).read_text(encoding="utf-8"))
        released = {name: file for name, file in TOFU_LOGS.items() if file in log}
        rows = {name: tofu_rows(log[file]) for name, file in released.items()} or log["rows"]
        if not rows["forget"] or any([row["index"] for row in rows[name]] != [*range(len(rows[name]))]
                                     for name in rows):
            raise ValueError("it needs forget rows, and every index of a set once and in order")
        for row in rows["forget"]:
            row["answer"].split(), row["answer_nll"] / row["answer_tokens"]  # fails where one is missing
        return rows, {"format": "TOFU"} if released else log.get("provenance", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"cannot read the log {path} ({cause_of(error)}): need an evaluation's JSON, ours "
                         "or TOFU's") from None


def tofu_rows(columns: dict) -> list:
    """TOFU's columns (lists, or dictionaries keyed by row) -> our rows."""
    lists = [columns[name] for name in TOFU_COLUMNS.values()]
    lists = [[c[str(i)] for i in range(len(c))] if isinstance(c, dict) else c for c in lists]
    rows = [dict(zip(TOFU_COLUMNS, values, strict=True)) for values in zip(*lists, strict=True)]
    for index, row in enumerate(rows):
        row["question"], row["generation"], row["answer"] = row.pop("generated_text")
        row["index"] = index
    return rows


def read_retain_log(path: str | None, split: str, forget_rows: list, source: dict) -> tuple:
    """(The retrained model's results on `forget_rows`, on the holdout), or (None, None) without a path.
    Raises InputError for a log of other rows, data, template or system prompt than `source` says, and for a
    log of a model that was not trained on exactly the other rows."""
    if path is None:
        return None, None
    rows, provenance = read_log(path)
    trained = provenance.get("trained_on") or {}
    if trained.get("loss", "sft") != "sft":
        raise InputError(f"{path} is of an unlearned model ({trained['loss']}): need one that was fine-tuned "
                         "without the forget rows")
    if split != "own" and trained.get("split") not in (None, complement(split)):
        raise InputError(f"{path} is of a model trained on {trained['split']}; --split {split} needs one "
                         f"trained on {complement(split)}")
    stated = {**provenance, "trained_on": trained.get("data_fingerprint")}
    needed = {**source, "trained_on": source.get("data_fingerprint")}
    for name in ("data_fingerprint", "trained_on", "template", "system_prompt"):
        if None not in (stated.get(name), needed.get(name)) and stated[name] != needed[name]:
            raise InputError(f"{path} was made with another {name} ({stated[name]}, here {needed[name]}): "
                             "its forget rows cannot be compared")
    retrained = rows["forget"][:len(forget_rows)]
    # TOFU's logs keep the whole prompt and ours the question, but both keep the answer.
    answers, logged = ([row["answer"].split() for row in sample] for sample in (forget_rows, retrained))
    if logged != answers:
        raise InputError(f"{path} has {len(rows['forget'])} forget rows, not the {len(answers)} of {split}: "
                         "need the log of the model retrained without these rows")
    if not all(row.get("perturbed_nll") or row.get("perturbed_answer") for row in (*forget_rows, *retrained)):
        raise InputError(f"forget quality against {path} needs perturbed answers in every forget row")
    return retrained, rows.get("holdout")


def read_retain_logs(paths: list | None, *of) -> tuple:
    """(Forget rows, holdout rows) of the first log, the forget rows of the others; see `read_retain_log`."""
    first, *more = [read_retain_log(path, *of) for path in paths or [None]]
    return *first, [rows for rows, _ in more]


# ---------------------------------------------------------------- command line

class ResidentReference(NamedTuple):
    """The model before unlearning, kept in memory for a single evaluation. It takes one key at a time."""
    model: AnswerModel
    batches: dict  # key -> the text as a batch

    def logits(self, keys: list) -> Tensor:
        return self.model([self.batches[keys[0]]])[1]

    def logps(self, keys: list) -> Tensor:
        return token_logps(self.logits(keys), self.batches[keys[0]].targets).sum()


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or Hub id of the model to judge, or PRESET=PATH")
    source.add_argument("--log", help="judge an existing log instead: our JSON, or a released TOFU log")
    add("--retain-log", nargs="+", metavar="FILE", help="log of a model retrained without the forget rows, "
        "for forget quality; more of them show how far retrained models differ")
    add("--reference", help="the model before unlearning, given like --model: adds the KL metrics")
    add("--split", help="forget split (default: from the model's or the log's record, else forget10)")
    add("--data", help="builtin (default), a folder with TOFU's files, or a Hub id")
    add("--forget", help="own forget rows (JSON, CSV or Parquet), in place of --data")
    add("--retain", help="own retain rows, with --forget")
    add("--template", choices=TEMPLATES, help="prompt template (default: the one saved with the model)")
    add("--system-prompt", help="for the template chat (default: the one saved with the model)")
    add("--max-rows", type=positive(int, or_zero=True), default=MAX_ROWS, help="rows of each set, 0 for all")
    add("--max-new-tokens", type=positive(int), help="longest generation, in tokens (default: the preset's)")
    add("--batch-size", type=positive(int), help="texts at once (default: the preset's)")
    add("--dtype", choices=AUTOCAST, default="fp32", help="precision of linear layers and their weights")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--out", help="write metrics, rows and provenance to this JSON file")
    add("--plot", metavar="PNG", help="draw the distributions of the truth ratio")
    return parser


def store_linear(lm: nn.Module, dtype: torch.dtype):
    """Keep linear layers' weights in `dtype`. Under autocast to `dtype` this changes no number. A head that
    is the embedding stays, because lookups are not in `dtype`."""
    for layer in lm.modules():
        if isinstance(layer, nn.Linear) and layer.weight is not lm.get_input_embeddings().weight:
            layer.weight.data = layer.weight.data.to(dtype)


def measure(args) -> tuple[dict, dict, tuple]:
    """(rows, provenance, the retrained model's rows) of --model."""
    if args.forget and (args.data or args.split):
        raise InputError("--forget replaces --data and --split: leave those out")
    world = join_world(args.device)
    loaded = load_model(args.model, args.template, args.system_prompt)
    trained_on = loaded.meta["trained_on"] or {}
    recorded = trained_on.get("split") or "full"
    if recorded == "own" and not (args.forget or args.split):
        raise InputError(f"{args.model} was trained on own rows: give them with --forget, or give --split")
    split = "own" if args.forget else args.split or evaluation_split(recorded)
    if split != "own" and parse_split(split)[0] != "forget":
        raise InputError(f"--split {split}: need a forget split, forget01 to forget99")
    task = load_task(args.data or "builtin", split, args.forget, args.retain)
    if not args.forget and trained_on.get("data_fingerprint", task.fingerprint) != task.fingerprint:
        world.say(f"note: {args.model} was trained on other data ({trained_on['data']}) than {task.source}")
    pad, template = loaded.tokenizer.eos_token_id, loaded.meta["template"]
    prepared = prepare(task.evaluated | {"holdout": task.holdout}, loaded.tokenizer, template, args.max_rows,
                       getattr(loaded.lm.config, "max_position_embeddings", None))
    provenance = {**loaded.meta, "split": split, "data": task.source, "data_fingerprint": task.fingerprint,
                  "model": args.model, "reference": args.reference, "retain_log": args.retain_log,
                  "max_rows": args.max_rows, "dtype": args.dtype}
    retrained = read_retain_logs(args.retain_log, split, prepared.rows["forget"], provenance)
    model, reference = AnswerModel(loaded.lm), None
    check_head(model, [*prepared.texts.values()], pad, args.model)
    store_linear(loaded.lm, AUTOCAST[args.dtype])
    model.to(world.device)
    if args.reference:
        resident, tokenizer, *_ = load_model(args.reference)
        if tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise InputError(f"--reference {args.reference} has another tokenizer than --model {args.model}")
        store_linear(resident, AUTOCAST[args.dtype])
        reference = ResidentReference(AnswerModel(resident.to(world.device)), {
            key: collate([text], pad, world.device) for key, text in prepared.compared().items()})
    with autocast(args.dtype, world.device):
        rows = evaluate(model, prepared, loaded.tokenizer, args.batch_size or loaded.preset.eval_batch_size,
                        args.max_new_tokens or loaded.preset.max_new_tokens, reference, world)
    return rows, {**provenance, **environment()}, retrained


def read(args) -> tuple[dict, dict, tuple]:
    """(rows, provenance, the retrained model's rows) of --log."""
    for name in ("data", "forget", "retain", "reference", "template", "system_prompt", "max_rows",
                 "max_new_tokens", "batch_size", "dtype", "device"):
        if getattr(args, name) != build_parser().get_default(name):
            raise InputError(f"--{name.replace('_', '-')} has no effect with --log: leave it out")
    rows, provenance = read_log(args.log)
    split = args.split or provenance.get("split") or "forget10"
    logged, n = provenance.get("split", split), len(rows["forget"])
    released = min(MAX_ROWS, 40 * parse_split(split)[1]) if provenance.get("format") == "TOFU" else n
    if logged != split or n != released:
        raise InputError(f"{args.log} has {n} forget rows of {logged}: it is not for --split {split}")
    retrained = read_retain_logs(args.retain_log, split, rows["forget"], provenance)
    return rows, {**provenance, "log": args.log, "retain_log": args.retain_log, **environment()}, retrained


def main(argv: list | None = None):
    args = build_parser().parse_args(argv)
    rows, provenance, retrained = read(args) if args.log else measure(args)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    metrics = compute_metrics(rows, *retrained)
    if args.out:
        write_json(args.out, {"metrics": metrics, "rows": rows, "provenance": provenance})
    for name in ("forget", "retain"):
        for row in rows.get(name, [])[:SAMPLES]:
            print(f"[{name} {row['index']}] {row['question']}\n    true:  {row['answer']}\n    model: "
                  f"{row['generation']}")
    print(metrics_table(metrics))
    if args.plot:
        plot_truth_ratios(rows["forget"], retrained[0], args.plot)


if __name__ == "__main__":
    run_command(main)
