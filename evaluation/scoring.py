"""A model's scores on the evaluation's rows; what they mean is `evaluate_tofu.py`'s. Evaluation changes
nothing: mode, random state and tokenizer come out as they went in.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data.batches import TokenBatch, collate, deal, packed_tokens, within
from data.prompts import Encoded, encode, encode_prompts
from evaluation.logs import MAX_ROWS
from losses import kl_loss, token_logps
from models.answers import AnswerModel, Span, hits_and_standardised, untouched
from models.generation import generate
from support.world import ALONE, World

MAX_NEW_TOKENS = 200
SCORED_TOKENS = 1024  # of a forward pass over answers: enough for fast products, little memory
KL_SETS = ("forget", "world_facts")
HOLDOUT_SET = "holdout"  # rows that no model saw: their answers are scored, and nothing else is measured
MIA_SETS = ("forget", HOLDOUT_SET)
MIN_K = 0.4  # share of an answer's tokens, the least likely ones, that the min-k scores are means over
ANSWER, PARAPHRASED, PERTURBED = 0, 1, 2  # slots of a row's texts; the k-th perturbed one is PERTURBED + k


class Text(NamedTuple):
    """One text to score: which set and row it belongs to, and in which slot."""
    set: str
    index: int
    slot: int
    encoded: Encoded


class Prepared(NamedTuple):
    """The evaluation's rows and tokens, made once: tokenisation does not change while a model trains."""
    rows: dict  # set -> row dicts
    texts: dict  # (set, index) -> its Texts
    prompts: dict  # (set, index) -> prompt ids, of the rows that are asked

    def encoded(self) -> list[Encoded]:
        return [t.encoded for some in self.texts.values() for t in some]


class ReferenceStates(NamedTuple):
    """What KL(reference || model) needs, and for membership -log pi of the answers."""
    states: dict  # (set, index) -> hidden states at the answer's tokens, (tokens, H), on the CPU
    head: Tensor  # the LM head, (V, H)
    nlls: dict = {}  # (set, index) -> nats


def prepare(evaluated: dict, tokenizer, template: str, context: int | None,
            max_rows: int = MAX_ROWS, holdout=()) -> Prepared:
    """Tokenise the first `max_rows` (0: all) rows of each set and of the holdout. Raises InputError for a row
    above `context` tokens."""
    if holdout:  # the answers alone
        bare = [{key: row[key] for key in ("question", "answer")} for row in holdout]
        evaluated = {**evaluated, HOLDOUT_SET: bare}
    rows = {name: rows[:max_rows or None] for name, rows in evaluated.items()}
    places, pairs, prompts = [], [], {}
    for name, set_rows in rows.items():
        for index, row in enumerate(set_rows):
            answers = [row["answer"], row.get("paraphrased_answer"), *(row.get("perturbed_answer") or [])]
            places += [(name, index, slot) for slot, answer in enumerate(answers) if answer]
            pairs += [(row["question"], answer) for answer in answers if answer]
        if name != HOLDOUT_SET:
            prompt_ids = encode_prompts(tokenizer, template, [row["question"] for row in set_rows])
            prompts.update({(name, index): ids for index, ids in enumerate(prompt_ids)})
    texts = {}
    for place, encoded in zip(places, encode(tokenizer, template, pairs, context), strict=True):
        texts.setdefault(place[:2], []).append(Text(*place, encoded))
    return Prepared(rows, texts, prompts)


def batches_of(texts: dict, batch_size: int, pad: int, world: World) -> Iterator[tuple[list, TokenBatch]]:
    """This process's share of `texts`, key -> Encoded, as (keys, batch). Where the model is sharded, one
    without a row gets a ghost: no keys."""
    keys = list(texts)
    for mine in deal(keys, [len(texts[key].ids) for key in keys], batch_size, world.rank, world.size):
        if mine or world.sharded:
            yield mine, collate([texts[key] for key in mine or keys[:1]], pad, world.device)


@torch.no_grad()
def states_of_answers(model: AnswerModel, texts: dict, batch_size: int, pad: int,
                      world: World = ALONE) -> dict:
    """key -> the model's last hidden states at the answer's tokens, (tokens, H) on the CPU, of this process's
    share of `texts`, key -> Encoded."""
    states = {}
    for keys, batch in batches_of(texts, batch_size, pad, world):
        hidden = model.hidden(batch).cpu().split(batch.answer_tokens.tolist())
        states.update((key, h.clone()) for key, h in zip(keys, hidden, strict=False))
    return states


@torch.no_grad()
def logps_of_texts(model: AnswerModel, texts: list, batch_size: int, pad: int,
                   world: World) -> tuple[Tensor, dict]:
    """log pi of each text's answer, (len(texts),) on the device; and of this process's share, place -> log pi
    of each token, on the CPU. All processes ask together."""
    result, of_tokens = torch.zeros(len(texts), device=world.device), {}
    for places, batch in batches_of(dict(enumerate(texts)), batch_size, pad, world):
        logps = model(batch)[0]
        if places:
            result[places] = batch.per_text(logps)
            each = logps.cpu().split(batch.answer_tokens.tolist())
            of_tokens.update(zip(places, each, strict=True))
    return world.sum(result), of_tokens


def own_answers(prepared: Prepared, sets: tuple) -> dict:
    """(set, index) -> tokens of the rows' answers of these sets."""
    return {t[:2]: t.encoded for texts in prepared.texts.values() for t in texts
            if t.slot == ANSWER and t.set in sets}


@torch.no_grad()
def reference_states(model: AnswerModel, prepared: Prepared, batch_size: int,
                     world: World) -> ReferenceStates:
    """What another model is compared with of this one, from before unlearning."""
    scored = own_answers(prepared, MIA_SETS)
    with untouched(model):
        states = states_of_answers(model, own_answers(prepared, KL_SETS), batch_size, 0, world)
        logps, _ = logps_of_texts(model, list(scored.values()), batch_size, 0, world)
    nlls = {key: -logp for key, logp in zip(scored, logps.tolist(), strict=True)}
    return ReferenceStates(states, model.lm.get_output_embeddings().weight.clone(), nlls)


def evaluate(model: AnswerModel, prepared: Prepared, tokenizer, *, batch_size: int,
             max_new_tokens: int = MAX_NEW_TOKENS, world: World = ALONE,
             reference: ReferenceStates | None = None, progress: bool = False) -> dict:
    """Score all rows: set -> list of row results, complete and in order, the same on every process. Rows are
    dealt over processes. `reference` adds KL(reference || model)."""
    results = {key: {"index": key[1]} for key in list(prepared.texts)[world.rank::world.size]}
    asked = [key for key in results if key in prepared.prompts]
    asked.sort(key=lambda key: (len(prepared.prompts[key]), key))
    total = sum(len(prepared.texts[key]) for key in results) + len(asked)
    with untouched(model, world), tqdm(total=total, desc="evaluate", unit="text", leave=False,
                                disable=not progress) as bar:
        score_answers(model, prepared, results, reference, tokenizer.eos_token_id, world, bar)
        batches = [asked[at:at + batch_size] for at in range(0, len(asked), batch_size)]
        for keys, counts in in_step(batches, list(prepared.prompts), world):
            texts = generate(model, tokenizer, [prepared.prompts[key] for key in keys], max_new_tokens, world)
            for key, text in zip(keys if counts else [], texts, strict=False):
                row = results[key]
                row.update(rouge_l_recall=rouge_l_recall(row["answer"], text), generation=text)
            bar.update(len(keys))
    gathered = world.collect(results)
    merged = {key: row for part in gathered for key, row in part.items()}
    assert sum(map(len, gathered)) == len(merged) == len(prepared.texts), "every row exactly once"
    return {name: [merged[name, index] for index in range(len(rows))] for name, rows in prepared.rows.items()}


@torch.no_grad()
def score_answers(model: AnswerModel, prepared: Prepared, results: dict, reference: ReferenceStates | None,
                  pad: int, world: World, bar):
    """Add to `results`, (set, index) -> row, each answer's negative log-probability, nats, its tokens, and
    `token_measures`. SCORED_TOKENS a forward pass, a question once for all of its answers."""
    keys = list(results)
    lengths = [packed_tokens([t.encoded for t in prepared.texts[key]]) for key in keys]
    batches = [[t for i in places for t in prepared.texts[keys[i]]]
               for places in within(lengths, SCORED_TOKENS)]
    ghost = next(iter(prepared.texts.values()))
    scores = {}  # Text without its tokens -> (nll, tokens)
    for texts, counts in in_step(batches, ghost, world):
        known = reference.states if reference is not None and counts else {}
        own = [t for t in texts if t.slot == ANSWER]
        kinds = [([t for t in texts if t.slot != ANSWER], token_logps, None),
                 ([t for t in own if t[:2] not in known], own_values, None),
                 ([t for t in own if t[:2] in known], own_values, reference)]
        kinds = [kind for kind in kinds if kind[0]]
        batch = collate([t.encoded for kind, *_ in kinds for t in kind], pad, world.device)
        found = model(batch, [span_of(*kind) for kind in kinds])
        if counts:
            for (kind, *_), values in zip(kinds, found, strict=True):
                each = torch.atleast_2d(values).cpu().split([t.encoded.answer_tokens for t in kind], dim=1)
                for t, of_tokens in zip(kind, each, strict=True):
                    logps, *measured = of_tokens.tolist()
                    scores[t[:3]] = -sum(logps), len(logps)
                    if measured:
                        results[t[:2]].update(token_measures(logps, *measured))
            bar.update(len(texts))
    for key in keys:
        row = prepared.rows[key[0]][key[1]]
        if reference is not None and key in reference.nlls:
            results[key]["reference_nll"] = reference.nlls[key]
        slots = [scores[t[:3]] for t in prepared.texts[key] if t.slot >= PERTURBED]
        answer, paraphrased = scores[(*key, ANSWER)], scores.get((*key, PARAPHRASED), (None, None))
        results[key].update(answer_nll=answer[0], answer_tokens=answer[1], paraphrased_nll=paraphrased[0],
                            paraphrased_tokens=paraphrased[1], perturbed_nll=[nll for nll, _ in slots],
                            perturbed_tokens=[tokens for _, tokens in slots], rouge_l_recall=None,
                            question=row["question"], answer=row["answer"], generation=None)


def span_of(texts: list, values: Callable, reference: ReferenceStates | None) -> Span:
    """What is asked of these texts' answer tokens, with the reference's logits there where it is given."""
    states = None
    if reference is not None:
        known = torch.cat([reference.states[t[:2]] for t in texts])
        states = known.to(reference.head.device), reference.head
    return Span(sum(t.encoded.answer_tokens for t in texts), values, states)


def own_values(logits: Tensor, targets: Tensor, *reference_logits) -> Tensor:
    """Of the tokens of rows' own answers, (3, n): log pi and `hits_and_standardised`; where there is a
    reference D(pi_ref || pi), nats, as a fourth."""
    logps = token_logps(logits, targets)
    kls = [kl_loss(logits, known, "reference_policy") for known in reference_logits]
    return torch.stack([logps, *hits_and_standardised(logits, targets, logps), *kls])


def token_measures(logps: list, hits: list, standardised: list, kls: list | None = None) -> dict:
    """Of one answer's tokens, the end of sequence last: the share that the model holds likeliest (exact
    memorisation) and that of the longest suffix of such (extraction strength), both without the end; minus
    the mean of the lowest MIN_K of log pi, and of the same standardised (min-k++), both with it; the sum of
    `kls`."""
    right = hits[:-1] or hits
    suffix = sum(1 for _ in takewhile(bool, reversed(right)))
    lowest = max(1, int(MIN_K * len(logps)))
    min_k, min_k_plus_plus = (-sum(sorted(values)[:lowest]) / lowest for values in (logps, standardised))
    measures = {"exact_memorization": sum(right) / len(right), "extraction_strength": suffix / len(right),
                "min_k": min_k, "min_k_plus_plus": min_k_plus_plus}
    return measures if kls is None else {**measures, "kl": sum(kls)}


def in_step(batches: list, ghost: list, world: World) -> list:
    """(batch, whether it counts) of this process's batches; where the model is sharded, with ghosts behind
    them, whose results go nowhere, so that all processes have equally many."""
    missing = world.most(len(batches)) - len(batches) if world.sharded else 0
    return [(batch, True) for batch in batches] + [(ghost[:1], False)] * missing


# ---------------------------------------------------------------- ROUGE

@functools.cache
def rouge_scorer():
    from rouge_score import rouge_scorer  # its import takes a second
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l_recall(answer: str, generation: str) -> float:
    """The share of the answer's (stemmed) words that the generation has in the same order."""
    return float(rouge_scorer().score(answer, generation)["rougeL"].recall)
