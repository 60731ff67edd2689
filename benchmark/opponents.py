"""The loops that people use today, written plainly: A and B (training), B' (evaluation), S (synthetic). What
each of them is stands in bench.py."""

import copy
import os
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from unittest.mock import patch

import torch
import torch.nn.functional as F

from data.prompts import encode, encode_prompts
from losses import dpo_loss, kl_loss, npo_loss, token_logps
from models.loading import load_model


def padded(lists: list, value: int, width: int) -> torch.Tensor:
    return torch.tensor([x + [value] * (width - len(x)) for x in lists])


def now(device="cpu") -> float:
    """Seconds; on a GPU, when all that was asked of it is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------- A and B: training

def answer_logits(lm, rows: list, pad: int, pad_to: int = 0):
    """Of encoded rows, padded at the end: all positions' logits (B, T - 1, V), and the tokens that they
    predict, -100 outside the answers."""
    width = max(pad_to, max(len(e.ids) for e in rows))
    ids, mask, labels = (padded(lists, filler, width).to(lm.device) for lists, filler in (
        ([e.ids for e in rows], pad), ([[1] * len(e.ids) for e in rows], 0),
        ([[-100] * e.start + e.ids[e.start:] for e in rows], -100)))
    return lm(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], labels[:, 1:]


def answer_logps(*given):
    """log pi(y|x), (B,); takes what `answer_logits` takes."""
    logits, labels = answer_logits(*given)
    return -F.cross_entropy(logits.float().mT, labels, reduction="none", ignore_index=-100).sum(-1)


class PlainLoop:
    """A policy, a resident reference, and AdamW; rows padded to `pad_to` tokens or to the longest."""

    def __init__(self, s: Namespace, device, pad_to: int, rows_at_once: int):
        self.s, self.device, self.rows_at_once = s, device, rows_at_once
        self.reference, tokenizer, _ = load_model(s.start)
        self.reference.to(device).eval()
        self.padding, self.policy = (tokenizer.eos_token_id, pad_to), copy.deepcopy(self.reference).train()
        decay = {True: s.weight_decay, False: 0.0}  # norm weights and biases are vectors
        groups = [{"params": [p for p in self.policy.parameters() if (p.ndim >= 2) == matrix],
                   "weight_decay": value} for matrix, value in decay.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def logps(self, rows: list) -> tuple:
        """log pi(y|x) of policy and reference, (B,) each."""
        policy = answer_logps(self.policy, rows, *self.padding)
        with torch.no_grad():
            return policy, answer_logps(self.reference, rows, *self.padding)

    def objective(self, forget: list, refusal: list, retain: list, counts: dict):
        """This micro-batch's part of the whole batch's loss."""
        s = self.s
        if s.loss == "sft":
            return -answer_logps(self.policy, forget, *self.padding).sum() / counts["forget_tokens"]
        policy, reference = self.logps(forget)
        if s.loss == "npo":
            loss = npo_loss(policy, reference, s.beta).sum() / counts["rows"]
        else:
            chosen, reference_chosen = self.logps(refusal)
            loss = dpo_loss(chosen, policy, reference_chosen, reference, s.beta).sum() / counts["rows"]
        if s.retain_weight > 0:
            logps = answer_logps(self.policy, retain, *self.padding)
            loss = loss - s.retain_weight * logps.sum() / counts["retain_tokens"]
        if s.kl_weight > 0:
            logits, labels = answer_logits(self.policy, retain, *self.padding)
            with torch.no_grad():
                reference_logits, _ = answer_logits(self.reference, retain, *self.padding)
            kl = kl_loss(logits[labels >= 0], reference_logits[labels >= 0], s.kl_direction)
            loss = loss + s.kl_weight * kl.sum() / counts["retain_tokens"]
        return loss

    def step(self, lr: float, forget: list, refusal: list, retain: list) -> tuple[float, float, float]:
        """(loss, seconds of the passes, seconds of the update) of one optimizer step on these rows."""
        begin, total = now(self.device), 0.0
        counts = {"rows": len(forget), "forget_tokens": sum(e.answer_tokens for e in forget),
                  "retain_tokens": sum(e.answer_tokens for e in retain)}
        for at in range(0, len(forget), self.rows_at_once):
            chunk = slice(at, at + self.rows_at_once)
            loss = self.objective(forget[chunk], refusal[chunk], retain[chunk], counts)
            loss.backward()
            total += float(loss.detach())
        passed = now(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, passed - begin, now(self.device) - passed


LOOPS = {}  # A and B, in the process that they have of their own
SHAPES = {"A": (500, 2), "B": (0, 8)}  # padded to so many tokens (0: to the longest), rows at once


def step(s: Namespace, device, name: str, lr: float, *rows) -> tuple[float, float, float]:
    """What `PlainLoop.step` of A or B returns."""
    if name not in LOOPS:
        LOOPS[name] = PlainLoop(s, device, *SHAPES[name])
    return LOOPS[name].step(lr, *rows)


def weights(name: str) -> dict:
    """Those of A or B, as arrays: they travel through a pipe."""
    return {key: p.detach().cpu().numpy() for key, p in LOOPS[name].policy.named_parameters()}


@contextmanager
def fresh_process(**environ):
    """call(function, ...) in another process, which inherits `environ`, and nothing of what our code does to
    its own (`keep_freed_memory`): that must neither help nor hurt the opponents."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with patch.dict(os.environ, environ):
            for name in ("THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
                os.environ.pop(name, None)
            pool.submit(int).result()  # it has started
        yield lambda function, *given: pool.submit(function, *given).result()


# ---------------------------------------------------------------- B': evaluation

@torch.no_grad()
def evaluation(s: Namespace, device, rows: list, max_new_tokens: int) -> tuple[list, float]:
    """One set the plain way: a pass for every eight of its answers, then `generate` for every eight rows. Of
    each row {"nll": [..], "generation", "rouge_l_recall"}, and the seconds without loading."""
    from rouge_score import rouge_scorer
    lm, tokenizer, _ = load_model(s.start)
    lm.to(device).eval()
    begin = now(device)
    pad, scorer = tokenizer.eos_token_id, rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    asked = [(i, text) for i, row in enumerate(rows)
             for text in known_answers(row, "answer", "paraphrased_answer", "perturbed_answer")]
    results = [{"nll": []} for _ in rows]
    for at in range(0, len(asked), 8):
        chunk = asked[at:at + 8]
        encoded = encode(tokenizer, s.template, [(rows[i]["question"], text) for i, text in chunk])
        for (i, _), logp in zip(chunk, answer_logps(lm, encoded, pad).tolist(), strict=True):
            results[i]["nll"].append(-logp)
    for at in range(0, len(rows), 8):
        chunk = range(at, min(at + 8, len(rows)))
        prompts = encode_prompts(tokenizer, s.template, [rows[i]["question"] for i in chunk])
        width = max(map(len, prompts))
        ids = padded([prompt[::-1] for prompt in prompts], pad, width).flip(1).to(lm.device)
        mask = padded([[1] * len(prompt) for prompt in prompts], 0, width).flip(1).to(lm.device)
        made = lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                           pad_token_id=pad, eos_token_id=tokenizer.eos_token_id)
        texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        for i, text in zip(chunk, texts, strict=True):
            recall = scorer.score(rows[i]["answer"], text.strip())["rougeL"].recall
            results[i].update(generation=text.strip(), rouge_l_recall=recall)
    return results, now(device) - begin


def known_answers(row: dict, answer: str, paraphrased: str, perturbed: str) -> list:
    """The row's values under these names in one list; a paraphrase or perturbed answers may be missing."""
    some = [row[answer]] if row.get(paraphrased) is None else [row[answer], row[paraphrased]]
    return some + (row.get(perturbed) or [])


# ---------------------------------------------------------------- S: the synthetic experiment

def models(instance, alpha: float, lr: float, steps: int) -> list:
    """theta of pi_ref and of pi_retr: gradient descent on the mean cross-entropy with autograd."""
    Z_retain, y_retain, Z_forget, y_forget = map(torch.from_numpy, instance.training_rows(alpha))
    thetas = []
    for Z, y in ((torch.cat([Z_retain, Z_forget]), torch.cat([y_retain, y_forget])), (Z_retain, y_retain)):
        theta = torch.zeros(Z.shape[1], dtype=Z.dtype, requires_grad=True)
        for _ in range(steps):
            [gradient] = torch.autograd.grad(F.binary_cross_entropy_with_logits(Z @ theta, y), theta)
            theta = (theta - lr * gradient).detach().requires_grad_()
        thetas.append(theta.detach())
    return thetas


def two_class(logits):
    return torch.stack([torch.zeros_like(logits), logits], -1)


def unlearning(method, instance, alpha: float, models: list, steps: int, eval_every: int) -> list:
    """One method on one instance, autograd on the objectives: [(forget distance, retain distance)] on the
    way. `models`: theta of pi_ref and of pi_retr."""
    reference, retrained = models
    Z_forget, Z_retain, *tests = (torch.from_numpy(instance.features(x, a)) for x, a in (
        (instance.x_forget, alpha), (instance.x_retain, -alpha), (instance.x_forget_test, alpha),
        (instance.x_retain_test, -alpha)))
    y_forget, y_idk, y_retain = (torch.from_numpy(y).long() for y in (instance.y_forget, instance.y_idk,
                                                                      instance.y_retain))
    with_reference = two_class(Z_forget @ reference)
    reference_logps, reference_idk = token_logps(with_reference, y_forget), token_logps(with_reference, y_idk)
    theta, distances = reference.clone().requires_grad_(), []
    for step in range(steps + 1):
        if step % eval_every == 0:
            with torch.no_grad():
                distances.append([float(kl_loss(two_class(Z @ theta), two_class(Z @ retrained),
                                                "reference_policy").mean()) for Z in tests])
        logits = two_class(Z_forget @ theta)
        logps = token_logps(logits, y_forget)
        if method.family == "ga":
            loss = logps.mean()
        elif method.family == "idk":
            loss = -token_logps(logits, y_idk).mean()
        elif method.family == "npo":
            loss = npo_loss(logps, reference_logps, method.beta).mean()
        else:
            chosen = token_logps(logits, y_idk)
            loss = 2 * dpo_loss(chosen, logps, reference_idk, reference_logps, method.beta).mean()
        if method.retain:
            retain = two_class(Z_retain @ theta)
            loss = loss + (-token_logps(retain, y_retain) if method.retain == "rt" else
                           kl_loss(retain, two_class(Z_retain @ reference), "reference_policy")).mean()
        [gradient] = torch.autograd.grad(loss, theta)
        theta = (theta - method.lr * gradient).detach().requires_grad_()
    return distances
