"""The reference model without a reference model in memory: the policy IS it until its first step. One pass
before keeps log pi_ref(y|x), a float32 number an answer, or one a token (TNPO); and for K, UNDIAL and the KL
metrics the last hidden states at the answers' tokens, from which the frozen LM head gives the exact logits.
"""

from argparse import Namespace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.batches import Item, sent
from evaluation import scoring
from models.answers import AnswerModel, untouched
from models.sharded import whole
from running.plan import Plan
from support.errors import InputError
from support.world import World

SUMS = ("answers", "refusals", *(f"scored/{name}" for name in scoring.MIA_SETS))  # log pi_ref of each text


class Reference:
    """log pi_ref of every answer that the loss compares, and hidden states, in `runs/NAME/reference/`: one
    file a process, read memory-mapped. The mark covers weights, texts, precision and stream; a file with
    another one is refused (InputError)."""

    def __init__(self, folder: Path, mark: str, plan: Plan, device):
        self.device, self.file_of = device, {}
        for path in sorted(folder.glob("rank*.safetensors")):
            file = safe_open(path, framework="pt")
            if (made_for := file.metadata().get("mark")) != mark:
                raise InputError(f"{path} is stale: it was made from other weights, data, template or "
                                 f"precision (mark {made_for}, now {mark}); start a new run")
            self.file_of.update(dict.fromkeys(file.keys(), file))
        self.answer_sums, refusals, *self.scored = (self[name] for name in SUMS)
        self.refusals = dict(zip(plan.refusals, refusals, strict=False))  # none where none are compared

    def __getitem__(self, key: str) -> Tensor:
        return self.file_of[key].get_tensor(key)

    def answer_logps(self, items: list[Item]) -> Tensor:
        """log pi_ref of the rows' own answers, (B,)."""
        return sent(self.answer_sums[[i.row for i in items]], self.device)

    def refusal_logps(self, items: list[Item]) -> Tensor:
        """log pi_ref of the rows' refusals, (B,)."""
        return sent(torch.stack([self.refusals[i.row, i.refusal] for i in items]), self.device)

    def token_logps(self, rows: list[int]) -> Tensor:
        """log pi_ref of each token of the rows' own answers, (N,)."""
        return sent(torch.cat([self[f"tokens/{row}"] for row in rows]), self.device)

    def states(self, kind: str, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Of each answer token of rows to unlearn ("forget") or to keep ("retain") the hidden states, (N, H),
        which with the LM head, (V, H), give the logits."""
        return sent(torch.cat([self[f"{kind}/{n}"] for n in numbers]), self.device), self.head

    @cached_property
    def head(self) -> Tensor:
        """The frozen LM head, (V, H): the policy's own moves. On the device only from its first use on."""
        return self["head"].to(self.device)

    def evaluation(self) -> scoring.ReferenceStates:
        keys = [key.split("/") for key in self.file_of if key.startswith("evaluation/")]
        states = {(name, int(index)): self[f"evaluation/{name}/{index}"] for _, name, index in keys}
        nlls = {(name, index): -logp for name, logps in zip(scoring.MIA_SETS, self.scored, strict=True)
                for index, logp in enumerate(logps.tolist())}
        head = self["head"].to(self.device)  # let go of after each evaluation
        return scoring.ReferenceStates(states, head, nlls)


@torch.no_grad()
def reference_pass(s: Namespace, model: AnswerModel, plan: Plan, prepared: scoring.Prepared, folder: Path,
                   mark: str, world: World):
    """Write this process's share of what `Reference` reads; nothing for evaluations where there are none."""
    batch_size = 2 * s.micro_batch_size
    if not plan.evaluation_steps(s.eval_every):
        prepared = scoring.Prepared({}, {}, {})
    scored = [scoring.own_answers(prepared, (name,)).values() for name in scoring.MIA_SETS]
    takes, tensors, of_tokens = set(plan.objective.takes), {}, {}
    answers = plan.answers if takes & {"reference_logps", "reference_token_logps"} else []
    refusals = plan.refusals.values() if takes & {"reference_refusal_logps", "kl_baseline"} else []
    for name, some in zip(SUMS, (answers, refusals, *scored), strict=True):
        logps, of_tokens[name] = scoring.logps_of_texts(model, [*some], batch_size, plan.pad, world)
        tensors[name] = logps.cpu()
    if "reference_token_logps" in takes:
        tensors |= {f"tokens/{row}": logps.clone() for row, logps in of_tokens["answers"].items()}
    partners = sorted({i.partner for items in plan.stream for i in items}) if s.kl_weight > 0 else []
    texts = {f"retain/{p}": plan.partners[p] for p in partners}
    if "reference_logits" in takes:
        texts |= {f"forget/{row}": e for row, e in enumerate(plan.answers)}
    evaluated = scoring.own_answers(prepared, scoring.KL_SETS)
    texts |= {f"evaluation/{name}/{index}": e for (name, index), e in evaluated.items()}
    with untouched(model, world):
        tensors |= scoring.states_of_answers(model, texts, batch_size, plan.pad, world)
    head = whole(model.lm.get_output_embeddings().weight)
    if world.rank == 0:
        tensors["head"] = head.detach().cpu().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"rank{world.rank:04d}.safetensors", metadata={"mark": mark})
