"""NPO on one page: make the tiny model forget 400 of its 4,000 question-answer pairs, and keep the rest.

    python minimal_npo.py    # under a minute on two cores, no download

The policy pi_theta and the reference pi_ref start as one fine-tuned model. On pairs (x, y) to forget, NPO
lowers log pi_theta(y|x) below log pi_ref(y|x). On pairs to keep, the retain term RT raises it (Zhang, Lin,
Bai, Mei, 2024). NPO's gradient is that of gradient ascent times a weight W. W falls from 1 to 0 as an answer
is forgotten, so NPO slows down where gradient ascent breaks the model. `train_npo.py --loss npo
--retain-weight 1` ends at these weights; it measures 300 rows, this page 100. B texts, T tokens, V words.
"""

from types import SimpleNamespace

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import ROOT
from data.batches import make_stream
from data.prompts import encode, encode_prompts
from data.tofu import load_task

MODEL, TEMPLATE = ROOT / "data/tiny/start", "llama2"  # fine-tuned on all 4,000 pairs
BETA, LR, WEIGHT_DECAY, EPOCHS, BATCH_SIZE = 0.5, 1e-3, 0.01, 10, 32
MICRO_BATCH_SIZE = 16  # rows that run at once: changes memory, not numbers


def answer_logps(model, texts) -> torch.Tensor:
    """log pi(token) of the texts' answer tokens, in nats, and 0 at all other places: (B, T - 1)."""
    width = max(len(text.ids) for text in texts)
    # Padding comes last, and a causal model never looks ahead. So no attention mask is needed.
    ids = torch.tensor([text.ids + [0] * (width - len(text.ids)) for text in texts])  # (B, T)
    is_answer = torch.tensor([[text.start <= t < len(text.ids) for t in range(1, width)] for text in texts])
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, T - 1, V): place t predicts t + 1
    return (logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)).masked_fill(~is_answer, 0)


def unlearn(model, reference, rows, partners, stream, lr=LR, beta=BETA, weight_decay=WEIGHT_DECAY):
    """Train `model` in place: one AdamW update per batch of `stream`, and yield the step's (loss, mean W).
    rows and partners are encoded texts to forget and to keep. A batch holds pairs of indices into them."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0}]  # norms, biases
    optimizer = torch.optim.AdamW(groups, fused=True)
    steps, warmup = len(stream), max(1, len(rows) // len(stream[0]))  # one epoch; the first update has lr 0
    for step, items in enumerate(stream):
        for group in optimizer.param_groups:
            group["lr"] = lr * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        retain_tokens = sum(partners[item.partner].answer_tokens for item in items)
        loss = mean_w = 0.0
        for at in range(0, len(items), MICRO_BATCH_SIZE):  # each adds its part to the batch's gradient
            forget = [rows[item.row] for item in items[at:at + MICRO_BATCH_SIZE]]
            retain = [partners[item.partner] for item in items[at:at + MICRO_BATCH_SIZE]]
            policy_logps = answer_logps(model, forget).sum(-1)  # log pi_theta(y|x), (B,)
            with torch.no_grad():
                reference_logps = answer_logps(reference, forget).sum(-1)  # log pi_ref(y|x), (B,)
            log_ratio = policy_logps - reference_logps

            npo = -2 / beta * logsigmoid(-beta * log_ratio).sum() / len(items)  # Eq. 3: mean over sequences
            rt = -answer_logps(model, retain).sum() / retain_tokens  # mean over retain answer tokens

            (npo + rt).backward()
            loss += (npo + rt).item()
            mean_w += 2 * torch.sigmoid(beta * log_ratio).sum().item() / len(items)  # Eq. 5
        optimizer.step()
        optimizer.zero_grad()
        yield loss, mean_w


@torch.no_grad()
def probability(model, texts) -> float:
    """Of the first 100 texts: the mean of exp(mean log pi of the answer's tokens)."""
    tokens = torch.tensor([text.answer_tokens for text in texts[:100]])
    return (answer_logps(model, texts[:100]).sum(-1) / tokens).exp().mean().item()


def answer(model, tokenizer, question: str) -> str:
    prompt = torch.tensor(encode_prompts(tokenizer, TEMPLATE, [question]))
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    return tokenizer.decode(ids[0, prompt.shape[1]:], skip_special_tokens=True).strip()


def main():
    tokenizer, task = AutoTokenizer.from_pretrained(MODEL), load_task("builtin", "forget10")
    policy, reference = (AutoModelForCausalLM.from_pretrained(MODEL) for _ in range(2))
    rows, partners = (encode(tokenizer, TEMPLATE, [(row["question"], row["answer"]) for row in pairs])
                      for pairs in (task.forget, task.retain))
    settings = SimpleNamespace(epochs=EPOCHS, batch_size=BATCH_SIZE, seed=0, retain_pairing="stream")
    stream = make_stream(len(rows), len(partners), 0, settings)  # in random order, new partners per epoch
    for step, (loss, mean_w) in enumerate(unlearn(policy, reference, rows, partners, stream), 1):
        if step * BATCH_SIZE % len(rows) < BATCH_SIZE:  # the last step of an epoch
            print(f"epoch {step * BATCH_SIZE // len(rows):2d}  loss {loss:.3f}  W {mean_w:.3f}  probability: "
                  f"forget {probability(policy, rows):.3f}  retain {probability(policy, partners):.3f}")
    for name, row in (("forget", task.forget[0]), ("forget", task.forget[1]), ("retain", task.retain[0])):
        print(f"\n{name}  {row['question']}\n  truth   {row['answer']}")
        print(f"  before  {answer(reference, tokenizer, row['question'])}")
        print(f"  now     {answer(policy, tokenizer, row['question'])}")


if __name__ == "__main__":
    main()
