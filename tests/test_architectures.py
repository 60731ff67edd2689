"""Any causal language model is computed rightly, or refused in one sentence: tiny models of many
architectures, made from their configs, against a plain loop."""

from argparse import Namespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_training import assert_close

from data.batches import TokenBatch
from data.prompts import Encoded, encode
from data.tofu import load_task
from losses import npo_loss
from models import loading
from models.answers import AnswerModel
from models.checks import check_model
from models.generation import greedy
from models.layers import prepare_layers
from models.loading import load_model, make_tiny
from models.saving import save_model
from running.memory_plan import shape_of
from support.errors import InputError
from support.world import ALONE

SIZES = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=400,
             max_position_embeddings=512)
KV = dict(SIZES, num_key_value_heads=2)
WORKS = {  # name -> (config class, its arguments)
    "llama": ("LlamaConfig", KV),
    "mistral": ("MistralConfig", dict(KV, sliding_window=None)),
    "mistral, wide window": ("MistralConfig", dict(KV, sliding_window=400)),
    "qwen2": ("Qwen2Config", dict(KV, attention_dropout=0.3)),
    "qwen3": ("Qwen3Config", dict(KV, head_dim=12)),
    "gemma": ("GemmaConfig", dict(KV, head_dim=12)),
    "phi3": ("Phi3Config",
             dict(KV, pad_token_id=0, eos_token_id=2, bos_token_id=1, resid_pdrop=0.2, embd_pdrop=0.2)),
    "olmo2": ("Olmo2Config", KV),
    "gpt2": ("GPT2Config", dict(n_embd=48, n_layer=2, n_head=4, n_positions=512, vocab_size=400)),
}
EITHER = {
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "opt": ("OPTConfig",
            dict(hidden_size=48, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=400,
                              max_position_embeddings=512, word_embed_proj_dim=48, dropout=0.3)),
    "granite": ("GraniteConfig", KV),
    "granite, scaled logits": ("GraniteConfig", dict(KV, logits_scaling=4.0)),
    "bitnet": ("BitNetConfig", KV),
    "gemma3": ("Gemma3TextConfig", dict(KV, head_dim=12, sliding_window=400)),
}
REFUSED = {  # what the sentence must say
    "mistral, narrow window": ("MistralConfig", dict(KV, sliding_window=8), "last 8 tokens"),
    "gemma2": ("Gemma2Config", dict(KV, head_dim=12, final_logit_softcapping=1.0), "LM head"),
    "bloom": ("BloomConfig", dict(hidden_size=48, n_layer=2, n_head=4, vocab_size=400), ""),
    "mamba": ("MambaConfig", dict(hidden_size=48, num_hidden_layers=2, vocab_size=400, state_size=8), ""),
    "mamba2": ("Mamba2Config",
               dict(hidden_size=48, num_hidden_layers=2, vocab_size=400, state_size=8, num_heads=8,
                                    head_dim=12, n_groups=1, chunk_size=16), ""),
    "lfm2": ("Lfm2Config", dict(KV, layer_types=["conv", "full_attention"]), "conv"),
    "gpt_neo": ("GPTNeoConfig", dict(hidden_size=48, num_layers=2, attention_types=[[["global", "local"], 1]],
                                     num_heads=4, vocab_size=400), "local"),
}


@pytest.fixture(scope="module")
def rows(small_data):
    return load_task(str(small_data), "forget10").forget[:6]


@pytest.fixture(scope="module")
def tokenizer(rows):
    dims = dict(SIZES, vocab_size=320)
    return make_tiny([row[key] for row in rows for key in ("question", "answer")], 0, dims)[1]


def built(name: str, arguments: dict, tokenizer, folder):
    """A random model of the architecture, saved and loaded as a user's is."""
    config = getattr(transformers, name)(**arguments)
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in lm.parameters():  # beyond the initial values, for which some layers do nothing
            parameter.add_(0.05 * torch.randn(parameter.shape))
    save_model(lm, tokenizer, folder, {})
    return load_model(str(folder))[0]


def test_what_a_model_keeps_beside_its_parameters_is_written(tokenizer, tmp_path):
    """As the biases of a router, which no gradient moves."""
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**KV))
    lm.model.layers[1].register_buffer("bias", torch.arange(3.0))
    lm.model.layers[1].register_buffer("passing", torch.ones(2), persistent=False)
    save_model(lm, tokenizer, tmp_path, {})
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["model.layers.1.bias"], torch.arange(3.0)) and len(saved) == len(lm.state_dict())


def test_a_model_of_several_models_is_refused(tokenizer, tmp_path, monkeypatch):
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**KV))
    save_model(lm, tokenizer, tmp_path, {})
    nested = Namespace(config=Namespace(text_config=lm.config))
    monkeypatch.setattr(loading, "read", lambda *_: (nested, tokenizer))
    with pytest.raises(InputError, match="made of several models"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ("gpt2", "opt"))
def test_a_plan_knows_the_shape_of_models_with_other_names_for_it(name):
    config, arguments = (WORKS | EITHER)[name]
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**arguments))
    shape = shape_of(lm)
    assert shape.inner == (192 if name == "gpt2" else 96) and shape.layers == 2 and shape.hidden == 48


def texts_of(tokenizer, rows) -> list:
    return encode(tokenizer, "llama2", [(row["question"], row["answer"]) for row in rows])


def checked(lm, tokenizer, texts):
    check_model(AnswerModel(lm), texts, tokenizer.eos_token_id, "FOLDER", "fp32", ALONE)


def equals_a_plain_loop(lm, texts):
    """npo's loss and gradient, all texts in few packed lines, against one whole pass a text."""
    from data.batches import collate
    prepare_layers(lm)
    lm.train()
    found = []
    for packed in (True, False):
        lm.zero_grad()
        if packed:
            batch = collate(texts, 0)
            logps = batch.per_text(AnswerModel(lm)(batch)[0])
        else:
            logps = torch.stack([plain_logp(lm, e) for e in texts])
        reference = torch.linspace(-20, -5, len(texts))
        loss = npo_loss(logps, reference, 0.3).mean()
        loss.backward()
        found.append((float(loss.detach()),
                      {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    norms = [torch.sqrt(sum((g**2).sum() for g in gradients.values())) for _, gradients in found]
    assert norms[0] == pytest.approx(float(norms[1]), rel=1e-4) and norms[0] > 0
    assert_close({"all": torch.cat([g.flatten() for g in found[1][1].values()])},
                 {"all": torch.cat([found[0][1][n].flatten() for n in found[1][1]])}, 1e-3)


def plain_logp(lm, encoded):
    ids = torch.tensor([encoded.ids])
    logps = lm(input_ids=ids, use_cache=False).logits[0, encoded.start - 1:-1].float().log_softmax(-1)
    return logps.gather(1, ids[0, encoded.start:, None]).sum()


@pytest.mark.parametrize("name", WORKS)
def test_what_must_work_equals_a_plain_loop(name, tokenizer, rows, tmp_path):
    lm, texts = built(*WORKS[name], tokenizer, tmp_path), texts_of(tokenizer, rows)
    checked(lm, tokenizer, texts)
    equals_a_plain_loop(lm, texts)


def test_in_16_bits_rounding_passes_and_a_leak_does_not(tokenizer, rows, tmp_path, monkeypatch):
    """Logits as large as a pretrained model's, where single tokens differ by more than a leak's least."""
    lm, texts = built(*WORKS["llama"], tokenizer, tmp_path), texts_of(tokenizer, rows)
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(8)
    lm = lm.bfloat16()
    check_model(AnswerModel(lm), texts, tokenizer.eos_token_id, "FOLDER", "bf16", ALONE)
    with pytest.raises(InputError, match="see each other"):
        check_model(AnswerModel(lm), texts, tokenizer.eos_token_id, "FOLDER", "fp32", ALONE)
    monkeypatch.setattr(TokenBatch, "attention", lambda self, dtype: {"position_ids": self.position_ids})
    with pytest.raises(InputError, match="see each other"):
        check_model(AnswerModel(lm), texts, tokenizer.eos_token_id, "FOLDER", "bf16", ALONE)


def test_rows_at_the_edge_of_learned_positions_are_checked_and_asked_as_alone(tokenizer, rows, tmp_path):
    """The check joins the first prompt with another answer, and a row without room stays in the batch."""
    texts = texts_of(tokenizer, rows)
    long = max(len(e.ids) for e in texts)
    texts[0] = Encoded(texts[0].ids[:2] * (long // 2) + texts[0].ids[-2:], long // 2 * 2)  # a long prompt
    context = max(len(e.ids) for e in texts)
    lm = built("GPT2Config", dict(n_embd=48, n_layer=2, n_head=4, n_positions=context, vocab_size=400),
               tokenizer, tmp_path)
    checked(lm, tokenizer, texts)
    prompts = [texts[0].ids[:texts[0].start], *[[7, 8, 9]] * 7]
    model, end = AnswerModel(lm), 399  # which the tokenizer does not have
    together = greedy(model, prompts, 12, end, ALONE)
    assert together[0] == greedy(model, prompts[:1], 12, end, ALONE)[0] and len(together[0]) < 12


@pytest.mark.parametrize("name", EITHER)
def test_what_may_work_equals_a_plain_loop_or_is_refused(name, tokenizer, rows, tmp_path):
    lm, texts = built(*EITHER[name], tokenizer, tmp_path), texts_of(tokenizer, rows)
    try:
        checked(lm, tokenizer, texts)
    except InputError as error:
        assert "FOLDER" in str(error) and "\n" not in str(error)
        return
    equals_a_plain_loop(lm, texts)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name, tokenizer, rows, tmp_path):
    kind, arguments, said = REFUSED[name]
    texts = texts_of(tokenizer, rows)
    with pytest.raises(InputError) as error:
        checked(built(kind, arguments, tokenizer, tmp_path), tokenizer, texts)
    assert said in str(error.value) and "FOLDER" in str(error.value) and "\n" not in str(error.value)
