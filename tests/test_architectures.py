"""Causal language models of many kinds train as a plain loop trains them, or are refused in one sentence."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from conftest import assert_close, log, save_random_model, sgd, weights
from safetensors.torch import save_file

import train_npo
from common import InputError
from data.batches import Plan
from data.tofu import load_task
from losses import npo_loss
from model import AnswerModel, load_model, save_model
from train_npo import lr_factor, parse

SIZES = dict(vocab_size=2048, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
HEADS = dict(SIZES, num_attention_heads=4, intermediate_size=64, max_position_embeddings=512)
GROUPED = dict(HEADS, num_key_value_heads=2)
SHORT = dict(GROUPED, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
WORKS = {  # the texts are longer than a window of 8 tokens
    "Llama": dict(GROUPED, tie_word_embeddings=False, attention_dropout=0.5),
    "GPT2": dict(vocab_size=2048, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1,
                 eos_token_id=2, resid_pdrop=0.5),
    "GPTNeoX": HEADS,
    "Phi": GROUPED,  # its head has a bias
    "OPT": dict(SIZES, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=16),
    "Gemma3Text": dict(SHORT, head_dim=8),
    "Mistral": dict(GROUPED, sliding_window=8),
    "Mamba": dict(SIZES, state_size=4),
    "Lfm2": dict(GROUPED, layer_types=["conv", "full_attention"]),
    "Qwen2Moe": dict(GROUPED, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
                     num_experts_per_tok=2),
    "GptOss": dict(SHORT, num_local_experts=4, num_experts_per_tok=2, head_dim=8),  # attention sinks
    "Apertus": GROUPED,  # its activations keep 0-dimensional buffers
}
CHANGES_LOGITS = {"Gemma2": dict(GROUPED, head_dim=8, final_logit_softcapping=1.0),
                  "Cohere": dict(GROUPED, logit_scale=0.5), "Granite": dict(GROUPED, logits_scaling=4.0)}
FLAGS = "--retain-weight 1 --kl-weight 9 --split forget05 --epochs 1 --batch-size 4 --lr 0.01"  # 3 steps


def config_of(name: str, arguments: dict):
    return getattr(transformers, f"{name}Config")(**arguments)


def plain_loop(s, tokenizer, policy) -> list:
    """npo+rt+kl in the textbook way: a second model as reference, logits at all places, one text at a time.
    (loss, gradient norm) of each step."""
    reference, plan, steps = copy.deepcopy(policy), Plan(s, load_task(s.data, s.split), tokenizer, None), []
    optimizer = sgd(policy, s)

    def log_p(lm, text):  # of the vocabulary, where the answer is predicted
        logits = lm(input_ids=torch.tensor([text.ids]), use_cache=False).logits
        return logits[0, text.start - 1:-1].log_softmax(-1)

    def token_logps(lm, text):
        return log_p(lm, text).gather(1, torch.tensor(text.ids[text.start:])[:, None])[:, 0]
    for step, items in enumerate(plan.stream):
        optimizer.param_groups[0]["lr"] = s.lr * lr_factor(step, plan.steps, plan.warmup_steps)
        rows, retain = ([plan.texts[key] for key in keys] for keys in plan.micro_batch_of(items)[::2])
        logps, reference_logps = (torch.stack([token_logps(lm, text).sum() for text in rows])
                                  for lm in (policy, reference))
        p, q = (torch.cat([log_p(lm, text) for text in retain]) for lm in (policy, reference))
        loss = npo_loss(logps, reference_logps.detach(), s.beta).mean() + (
            s.kl_weight * (p.exp() * (p - q.detach())).sum(1).mean()
            - s.retain_weight * torch.cat([token_logps(policy, text) for text in retain]).mean())
        optimizer.zero_grad()
        loss.backward()
        steps.append((loss.item(), torch.nn.utils.clip_grad_norm_(policy.parameters(), torch.inf).item()))
        optimizer.step()
    return steps


@pytest.mark.parametrize("name", WORKS)
def test_it_trains_as_a_plain_loop(run, small_data, tmp_path, monkeypatch, name):
    """With SGD: the gradient of an attention key's bias is 0, and AdamW would scale its rounding up."""
    monkeypatch.setattr(train_npo, "adamw", sgd)
    save_random_model(tmp_path / "start", config_of(name, WORKS[name]))
    lines = log(run(f"--model start {FLAGS}"))
    s = parse(["--model", "start", "--data", str(small_data), "--eval-every", "never", "--template", "llama2",
               *FLAGS.split()])
    lm, tokenizer, *_ = load_model("start")
    before = {key: p.detach().clone() for key, p in lm.named_parameters()}
    for line, (loss, norm) in zip(lines, plain_loop(s, tokenizer, lm), strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    trained, expected = dict(load_model("run/model").lm.named_parameters()), dict(lm.named_parameters())
    assert_close(expected, trained)
    assert sum(not torch.equal(before[key], trained[key]) for key in before) > 0.8 * len(before)


@pytest.mark.parametrize("name", ("Llama", *(pytest.param(name, marks=pytest.mark.slow)
                                             for name in ("GPT2", "Mamba", "Qwen2Moe"))))
def test_fsdp_matches_one_process(forked, run, small_data, tmp_path, name):
    """The heads of Llama and Qwen2Moe are not tied to the embedding."""
    save_random_model(tmp_path / "start", config_of(name, WORKS[name]))
    alone = run(f"--model start {FLAGS}", out="alone")
    forked("train_npo.py", "--model", "start", "--data", small_data, "--eval-every", "never", *FLAGS.split(),
           "--micro-batch-size", 1, "--out", "two", "--parallel", "fsdp", processes=2)
    for line, expected in zip(log(tmp_path / "two"), log(alone), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    expected, sharded = (weights(folder / "model") for folder in (alone, tmp_path / "two"))
    for name in [name for name in expected if name.endswith("c_attn.bias")]:
        del expected[name], sharded[name]  # AdamW scales up the rounding of a key's bias, whose gradient is 0
    assert_close(expected, sharded)


@pytest.mark.parametrize("name", CHANGES_LOGITS)
def test_a_model_that_changes_its_logits_behind_the_head_is_refused(run, tmp_path, name):
    save_random_model(tmp_path / "start", config_of(name, CHANGES_LOGITS[name]))
    with pytest.raises(InputError, match=f"--model start: {name}ForCausalLM changes its logits") as error:
        run(f"--model start {FLAGS}")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_model_that_also_reads_images_is_refused(run, tmp_path):
    """Its other towers would get no gradient."""
    text = config_of("Gemma3Text", WORKS["Gemma3Text"])
    vision = transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                             num_attention_heads=2, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    save_random_model(tmp_path / "start", config)
    with pytest.raises(InputError, match="also reads images or sound"):
        run(f"--model start {FLAGS}")


# ---------------------------------------------------------------- weights

QUANTISED = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("change, sentence", (
    ({"quantization_config": QUANTISED}, "quantised"),
    ({"model.layers.0.self_attn.q_proj.bias": 32}, "do not match .*q_proj.bias"),
    ({"model.layers.0.mlp.up_proj.weight_scale_inv": 1}, "do not match .*weight_scale_inv"),
    ({"model.norm.weight": 0}, "do not match .*norm.weight"),
    ({"num_hidden_layers": 3}, "do not match .*layers.2"), ({"intermediate_size": 72}, "cannot load")))
def test_weights_that_would_be_read_wrongly_are_refused(small_model, tmp_path, change, sentence):
    """A quantised checkpoint without its scales, a tensor that the configuration has no place for, one that
    is missing, and another shape."""
    folder, [(name, value)] = tmp_path / "start", change.items()
    shutil.copytree(small_model, folder)
    tensors, config = weights(folder), json.loads((folder / "config.json").read_text())
    if name.startswith("model."):
        tensors |= {name: torch.ones(value)}
        tensors = {key: tensor for key, tensor in tensors.items() if tensor.numel()}
    else:
        config[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"--model .*{sentence}") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


def test_other_files_in_the_folder_are_not_read(small_model, tmp_path):
    folder, before = tmp_path / "start", weights(small_model)
    shutil.copytree(small_model, folder)
    save_file({name: 2 * weight for name, weight in before.items()}, folder / "previous.safetensors")
    save_file(before | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
              folder / "model.safetensors", {"format": "pt"})  # older checkpoints have it; it does no harm
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')  # without do_sample
    lm, tokenizer, meta, _ = load_model(str(folder))
    assert_close(before, {name: p.detach() for name, p in lm.named_parameters()}, 0)
    lm.model.layers[1].register_buffer("bias", torch.arange(3.0))  # such as a router's, without a gradient
    save_model(AnswerModel(lm), tokenizer, tmp_path / "saved", meta | {"trained_on": {
        "loss": "npo", "split": "forget10", "data": "builtin"}})
    saved = weights(tmp_path / "saved")
    assert torch.equal(saved.pop("model.layers.1.bias"), torch.arange(3.0)) and saved.keys() == before.keys()
