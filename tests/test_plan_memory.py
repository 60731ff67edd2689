"""plan_memory.py: its formulas against what autograd keeps, against measured runs, and by hand."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import InputError
from plan_memory import GB, SHAPES, changes, main, memory, read_shape
from train_npo import Settings

SMALL = (60, 48, 80, 2, 16, False)  # vocabulary, hidden, MLP, layers, keys, tied
NPO_RT = Settings(loss="npo", retain_weight=1.0, model="llama2-7b", micro_batch_size=4)


def kept_per_token(layers: int, dtype: str, checkpointing: bool, sharded: bool) -> float:
    """Bytes that the forward pass keeps of each of 5 x 40 tokens, weights apart."""
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=48, intermediate_size=80, num_hidden_layers=layers,
                                      num_attention_heads=6, num_key_value_heads=2)).train()
    if sharded and dtype == "bf16":
        lm = lm.bfloat16()  # the precision of FSDP's gathered parameters
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    kept = {}  # address of the storage -> a tensor in it

    def keep(x):
        if x.numel() % (5 * 40) == 0:
            kept[x.untyped_storage().data_ptr()] = x
        return x
    with (torch.autograd.graph.saved_tensors_hooks(keep, torch.Tensor.detach),
          torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")):
        lm.base_model(input_ids=torch.zeros(5, 40, dtype=torch.long), use_cache=False)
    return sum(x.untyped_storage().nbytes() for x in kept.values()) / (5 * 40)


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("dtype, parallel", (("fp32", "ddp"), ("bf16", "ddp"), ("bf16", "fsdp")))
def test_the_plan_counts_what_a_layer_keeps(dtype, parallel, checkpointing):
    s = dataclasses.replace(NPO_RT, dtype=dtype, parallel=parallel, activation_checkpointing=checkpointing)
    two, one = (kept_per_token(layers, dtype, checkpointing, parallel == "fsdp") for layers in (2, 1))
    tokens = 2 * 4 * 100  # 4 rows and their partners
    planned = memory(s, SMALL, 2, 100)["activations"] / tokens / SMALL[3]
    assert planned == pytest.approx(two - one, rel=0.06)  # beside one number per norm and per head


def test_llama2_7b_by_hand():
    parts = memory(NPO_RT, SHAPES["llama2-7b"], 2, 128)
    assert parts["weights"] == 4 * 6_738_415_616 == parts["gradients"] == parts["AdamW's moments"] / 2
    sharded = memory(dataclasses.replace(NPO_RT, parallel="fsdp"), SHAPES["llama2-7b"], 2, 128)
    assert sum(sharded[part] for part in ("weights", "gradients", "AdamW's moments")) == 16 * 6_738_415_616 / 2
    adapters = memory(dataclasses.replace(NPO_RT, lora=8), SHAPES["llama2-7b"], 1, 128)
    assert adapters["gradients"] == 4 * 19_988_480  # peft's count for rank 8 on seven layers
