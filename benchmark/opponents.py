"""The loops that people use today, written plainly: A and B (training), B' (evaluation), S (synthetic).

bench.py says what each of them is. A, B and B' have a process of their own: what our code does to its process
(`keep_freed_memory`) must neither help nor hurt them.
"""

import copy
import multiprocessing
import os
import time
from argparse import Namespace
from contextlib import suppress

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from data.prompts import encode, encode_prompts
from losses import dpo_loss, kl_loss, npo_loss, token_logps
from models.loading import autocast, load_model, pad_id

A_PADDED_TO, A_ROWS_AT_ONCE, B_ROWS_AT_ONCE = 500, 2, 8  # tokens, rows, rows; B pads to the longest


def now(device="cpu") -> float:
    """Seconds; on a GPU, when all that was asked of it is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------- A and B: training

class PlainLoop:
    """A policy, a resident reference, and AdamW; rows padded to `pad_to` tokens or to the longest."""

    def __init__(self, s: Namespace, reference, tokenizer, pad_to: int, rows_at_once: int, device):
        self.s, self.pad_to, self.rows_at_once, self.device = s, pad_to, rows_at_once, device
        self.pad, self.policy = pad_id(tokenizer), copy.deepcopy(reference).train()
        self.reference = reference.eval()  # A and B may share it, since nothing changes it
        decay = {True: s.weight_decay, False: 0.0}  # norm weights and biases are vectors
        groups = [{"params": [p for p in self.policy.parameters() if (p.ndim >= 2) == matrix],
                   "weight_decay": value} for matrix, value in decay.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def logits(self, model, rows: list):
        """All positions' logits (B, T - 1, V) and the tokens they predict, -100 outside the answers."""
        ids, mask, labels = padded(rows, self.pad, self.pad_to, self.device)
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], labels[:, 1:]

    def logps(self, model, rows: list):
        """log pi(y|x), (B,)."""
        logits, labels = self.logits(model, rows)
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return -losses.sum(-1)

    @torch.no_grad()
    def reference_logps(self, rows: list):
        return self.logps(self.reference, rows)

    def objective(self, forget: list, refusal: list, retain: list, counts: dict):
        """This micro-batch's part of the whole batch's loss."""
        s, policy = self.s, self.logps(self.policy, forget)
        if s.loss == "sft":
            return -policy.sum() / counts["forget_tokens"]
        reference = self.reference_logps(forget)
        if s.loss == "npo":
            loss = npo_loss(policy, reference, s.beta).sum() / counts["rows"]
        else:
            chosen, reference_chosen = self.logps(self.policy, refusal), self.reference_logps(refusal)
            loss = dpo_loss(chosen, policy, reference_chosen, reference, s.beta).sum() / counts["rows"]
        if s.retain_weight > 0:
            loss = loss - s.retain_weight * self.logps(self.policy, retain).sum() / counts["retain_tokens"]
        if s.kl_weight > 0:
            logits, labels = self.logits(self.policy, retain)
            with torch.no_grad():
                reference_logits, _ = self.logits(self.reference, retain)
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
            with autocast(self.s.dtype, self.device):
                loss = self.objective(forget[chunk], refusal[chunk], retain[chunk], counts)
            loss.backward()
            total += float(loss.detach())
        passed = now(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, passed - begin, now(self.device) - passed


def padded(rows: list, pad: int, pad_to: int, device):
    """ids, attention mask and labels, (B, T), of encoded rows, padded at the end."""
    width = max(pad_to, max(len(e.ids) for e in rows))

    def fill(lists, value):
        return torch.tensor([x + [value] * (width - len(x)) for x in lists], device=device)
    labels = fill([[-100] * e.start + e.ids[e.start:] for e in rows], -100)
    return fill([e.ids for e in rows], pad), fill([[1] * len(e.ids) for e in rows], 0), labels


# ---------------------------------------------------------------- B': evaluation

@torch.no_grad()
def plain_evaluation(lm, tokenizer, template: str, rows: list, rows_at_once: int, max_new_tokens: int):
    """One set the plain way: a pass for the answers, one for the paraphrases, one for each place among the
    perturbed answers, then `generate`. A list of {"nll": [..], "generation", "rouge_l_recall"}."""
    from rouge_score import rouge_scorer
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    pad, device = pad_id(tokenizer), lm.device
    answers = [known_answers(row, "answer", "paraphrased_answer", "perturbed_answer") for row in rows]
    results = [{"nll": []} for _ in rows]
    chunks = [range(at, min(at + rows_at_once, len(rows))) for at in range(0, len(rows), rows_at_once)]
    for place in range(max(map(len, answers))):
        for chunk in chunks:
            chunk = [i for i in chunk if place < len(answers[i])]
            if not chunk:
                continue
            encoded = encode(tokenizer, template, [(rows[i]["question"], answers[i][place]) for i in chunk])
            ids, mask, labels = padded(encoded, pad, 0, device)
            logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
            for i, value in zip(chunk, nll.sum(-1).tolist(), strict=True):
                results[i]["nll"].append(value)
    for chunk in chunks:
        prompts = encode_prompts(tokenizer, template, [rows[i]["question"] for i in chunk])
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        made = lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                           pad_token_id=pad, eos_token_id=tokenizer.eos_token_id)
        texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        for i, text in zip(chunk, texts, strict=True):
            recall = scorer.score(rows[i]["answer"], text.strip())["rougeL"].recall
            results[i].update(generation=text.strip(), rouge_l_recall=recall)
    return results


def known_answers(row: dict, answer: str, paraphrased: str, perturbed: str) -> list:
    """The row's values under these names in one list; a paraphrase or perturbed answers may be missing."""
    some = [row[answer]] if row.get(paraphrased) is None else [row[answer], row[paraphrased]]
    return some + (row.get(perturbed) or [])


# ---------------------------------------------------------------- their process

class Apart:
    """`serve` in a process of its own. While one side works, the other waits at its pipe."""

    def __init__(self, s: Namespace, args: Namespace):
        self.pipe, theirs = multiprocessing.Pipe()
        self.worker = self.start(theirs, s, args)
        self.pipe.recv()  # it has loaded its model: nothing that is timed runs beside that

    def start(self, theirs, *given):
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=serve, args=(theirs, *given), daemon=True)
        process.start()
        theirs.close()
        return process

    def ask(self, *message):
        """What `serve` answers to it."""
        self.pipe.send(message)
        return self.pipe.recv()

    def close(self):
        self.pipe.close()
        self.worker.join()


def serve(pipe, s: Namespace, args: Namespace):
    """A and B, or B', with the model they share: one answer a message, until the pipe is
    closed.

    ("step", "A" or "B", lr, forget, refusal and retain rows): what `PlainLoop.step` returns. ("save", "A" or
    "B", file): its weights are written there, as safetensors. ("evaluate", template, rows):
    (`plain_evaluation`, seconds).
    """
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # ours, inherited
    torch.set_num_threads(args.threads)
    lm, tokenizer, _ = load_model(s.start)
    lm.to(args.device).eval()
    loops = {}
    with pipe, suppress(EOFError, BrokenPipeError):
        pipe.send("ready")
        while True:
            what, *given = pipe.recv()
            if what == "step":
                name, lr, *rows = given
                if name not in loops:
                    shape = {"A": (A_PADDED_TO, A_ROWS_AT_ONCE), "B": (0, B_ROWS_AT_ONCE)}[name]
                    loops[name] = PlainLoop(s, lm, tokenizer, *shape, args.device)
                pipe.send(loops[name].step(lr, *rows))
            elif what == "save":
                name, file = given
                weights = loops[name].policy.named_parameters()
                pipe.send(save_file({key: p.detach().clone().cpu() for key, p in weights}, file))
            else:
                template, rows = given
                begin = now(args.device)
                with autocast(args.dtype, args.device):
                    scores = plain_evaluation(lm, tokenizer, template, rows, B_ROWS_AT_ONCE,
                                              args.max_new_tokens)
                pipe.send((scores, now(args.device) - begin))


# ---------------------------------------------------------------- S: the synthetic experiment

def plain_models(Z_retain, y_retain, Z_forget, y_forget, lr: float, steps: int) -> list:
    """theta of pi_ref and of pi_retr: gradient descent on the mean cross-entropy with autograd."""
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


def plain_unlearning(method, instance, alpha: float, models: list, steps: int, eval_every: int) -> list:
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
