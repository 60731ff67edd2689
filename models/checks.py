"""Is this model one that the code computes rightly? Tried once, when its texts are known, before training.

`AnswerModel` takes the LM head's product as the logits, packs texts into lines by position ids and a
mask, and generates from a batch that is padded on the left. Not every architecture allows this.
"""

import torch

from data.batches import collate
from data.prompts import Encoded
from losses import token_logps
from models.answers import AnswerModel, untouched
from models.generation import greedy
from support.errors import InputError, cause_of
from support.world import World

EXACT = 1e-3  # nats, the most that a token's log-probability or logit may differ by in float32
# In 16 bits single tokens differ by tenths from kernel to kernel, the mean over tokens by less than 0.06;
# where texts see each other it is above 1 (SmolLM2-135M). A generated token may be second by rounding.
ROUNDED, NEAR = 0.15, 1.0
TRIED_TOKENS = 3  # generated


def check_model(model: AnswerModel, texts: list[Encoded], end: int, source: str, dtype: str, world: World):
    """Compare what the code computes with the model's own plain passes, on three of the run's texts, the
    longest among them; dtype: of a sharded model's gathered weights, else fp32. Raises InputError."""
    lm, name = model.lm, f"--model {source}: {type(model.lm).__name__}"
    head = lm.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        flaw = "no LM head" if head is None else "an LM head with a bias"
        raise InputError(f"{name} has {flaw}, which is not supported; take a Llama-like model")
    first, second, longest = texts[0], texts[len(texts) // 2], max(texts, key=lambda e: len(e.ids))
    check_attention(lm.config, len(longest.ids), name)
    # Two texts, the longest, and a second answer to the first one's prompt.
    answer = second.ids[second.start:][:first.answer_tokens]  # no longer than the first one's: it fits
    again = Encoded(first.ids[:first.start] + answer, first.start)
    try:
        with untouched(model, world):
            flaw = (_flaw_of_scores(model, [first, second, longest, again], end, dtype, world.device)
                    or _flaw_of_generation(model, texts, end, EXACT if dtype == "fp32" else NEAR, world))
    except torch.OutOfMemoryError:  # no flaw of the model, whatever RuntimeError it is
        raise
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        flaw = f"cannot run as it is needed here ({cause_of(error)})"
    if flaw:
        raise InputError(f"{name} {flaw}, so its numbers would be wrong; take a Llama-like model")


def check_attention(config, longest: int, name: str):
    """Packed texts see each other through anything but attention that a mask governs. Raises InputError."""
    kinds = set(getattr(config, "layer_types", None) or [])
    kinds |= set(getattr(config, "attention_layers", None) or [])  # GPT-Neo's name for them
    others = sorted(kinds - {"full_attention", "sliding_attention", "global"})
    if others:
        raise InputError(f"{name} has layers of the kind {others[0]}, through which packed texts "
                         "would see each other; take a model with full attention alone")
    window = getattr(config, "sliding_window", None)
    if window and longest > window and (not kinds or "sliding_attention" in kinds):
        raise InputError(f"{name} sees the last {window} tokens and the longest text has {longest}: packed "
                         "texts lose the window; shorten the row, or take a model with full attention")


@torch.no_grad()
def _flaw_of_scores(model, texts: list, end: int, dtype: str, device) -> str | None:
    """Answers' log-probabilities in one packed line, against a whole pass over each text."""
    batch, theirs = collate(texts, end, device, in_one=True), []
    [ours] = model(batch)
    for e in texts:
        ids = torch.tensor([e.ids], device=device)
        theirs.append(token_logps(model.all_logits(input_ids=ids)[0, e.start - 1:-1], ids[0, e.start:]))
    theirs = torch.cat(theirs)
    model.lm.train()
    [in_training] = model(batch)
    model.lm.eval()
    if not theirs.isfinite().all():
        return "gives scores that are not finite: its weights are broken"
    def differ(some: torch.Tensor, others: torch.Tensor) -> bool:
        gaps = (some - others).abs()
        return bool(gaps.max() > EXACT if dtype == "fp32" else gaps.mean() > ROUNDED)
    if differ(ours, theirs):
        return "changes its logits behind the LM head, or lets packed texts see each other"
    if differ(in_training, ours):
        return "computes otherwise in training than in evaluation, as with dropout that no setting turns off"
    return None


@torch.no_grad()
def _flaw_of_generation(model, texts: list, end: int, tolerance: float, world: World) -> str | None:
    """Two prompts of different lengths, generated together: each token must be the best after those."""
    by_length = sorted((e.ids[:e.start] for e in texts), key=len)
    prompts = [by_length[0], by_length[-1]]
    for prompt, tokens in zip(prompts, greedy(model, prompts, TRIED_TOKENS, end, world), strict=True):
        ids = torch.tensor([prompt + tokens], device=world.device)
        logits = model.all_logits(input_ids=ids)[0, len(prompt) - 1:-1]
        chosen = logits.gather(-1, ids[0, len(prompt):, None])[:, 0]
        if (logits.max(-1).values - chosen).max() > tolerance:
            return "generates other tokens in a padded batch than alone"
    return None
