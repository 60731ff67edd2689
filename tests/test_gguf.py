"""Weights from a .gguf file: a hand-made one comes over exactly, is converted once, and what is no Llama is
refused."""

import json
import os
from pathlib import Path

import pytest
import torch

from data.prompts import TEMPLATES, encode
from models.loading import converted, load_model
from models.presets import PRESETS
from running.settings import resolve
from support.errors import InputError

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write_gguf(folder: Path, file: Path, quantised: bool) -> dict:
    """The small model as a GGUF file, matrices in 8 bits or float32; returns what each parameter should come
    over as.

    The format orders the rows of q and k by pairs of rotated dimensions, (head, half, 2) -> (head, 2, half).
    """
    gguf = pytest.importorskip("gguf", reason="the optional package gguf is not installed")
    pytest.importorskip("accelerate", reason="the optional package accelerate is not installed")
    model, tokenizer, _ = load_model(str(folder))
    c, heads = model.config, model.config.num_attention_heads
    writer = gguf.GGUFWriter(str(file), "llama")
    for add, value in ((writer.add_block_count, c.num_hidden_layers),
                       (writer.add_embedding_length, c.hidden_size),
                       (writer.add_context_length, c.max_position_embeddings), (writer.add_head_count, heads),
                       (writer.add_feed_forward_length, c.intermediate_size),
                       (writer.add_vocab_size, c.vocab_size),
                       (writer.add_head_count_kv, c.num_key_value_heads),
                       (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_rope_freq_base, 10000.0)):
        add(value)
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    # The padding token under the name that this kind of tokenizer expects, or one more token would be added.
    writer.add_token_list(["<|endoftext|>", *sorted(bpe["vocab"], key=bpe["vocab"].get)[1:]])
    writer.add_token_types([3 if i < 5 else 1 for i in range(len(bpe["vocab"]))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    expected = {}
    for name, weight in model.named_parameters():
        array, kind = weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0
        stored = {"model.embed_tokens.weight": "token_embd.weight",
                  "model.norm.weight": "output_norm.weight"}.get(name)
        if stored is None:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)  # model.layers.0.mlp.up_proj
            stored = f"blk.{layer}.{NAMES[part]}.weight"
        def order(a):
            return a
        if stored.endswith(("attn_q.weight", "attn_k.weight")):
            def order(a):
                return a.reshape(heads, 2, -1, a.shape[1]).swapaxes(1, 2).reshape(a.shape)
        if quantised and array.ndim == 2:
            packed = gguf.quants.quantize(order(array), kind)
            writer.add_tensor(stored, packed, raw_dtype=kind)
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        else:
            writer.add_tensor(stored, order(array).copy())
        expected[name] = torch.tensor(array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("quantised", (False, True))
def test_a_hand_made_file_comes_over_exactly_and_once(quantised, small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = write_gguf(small_model, tmp_path / "small.gguf", quantised)
    model, tokenizer, meta = load_model("small.gguf")
    weights = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert "dequantising" in capsys.readouterr().out
    # Nothing of the file's quantisation is left, and no half-made folder.
    folder, = (path for path in Path("runs/models").iterdir() if path.is_dir())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert folder.name == f"gguf-small-{meta['converted_from']['sha256'][:16]}"
    # The tokenizer came too.
    _, own, _ = load_model(str(small_model))
    text = "Who is Ann? She writes in Paris."
    assert tokenizer(text).input_ids == own(text, add_special_tokens=False).input_ids
    assert tokenizer.chat_template == own.chat_template and tokenizer.eos_token == own.eos_token
    made = os.stat(folder / "model.safetensors").st_mtime_ns
    load_model("small.gguf")
    assert os.stat(folder / "model.safetensors").st_mtime_ns == made
    assert "dequantising" not in capsys.readouterr().out


def test_it_trains_and_is_evaluated_by_one_name(forked, small_model, small_data, tmp_path):
    """Two processes: one converts, both train; then `evaluate_tofu.py` finds the folder that is there."""
    write_gguf(small_model, tmp_path / "small.gguf", True)
    model = f"smollm2-135m={tmp_path / 'small.gguf'}"
    done = forked("train_npo.py", "--model", model, "--data", small_data, "--loss", "sft", "--split", "full",
                  "--epochs", 1, "--eval-every", "never", "--out", "run", processes=2)
    assert done.stdout.count("dequantising") == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["preset"] == "smollm2-135m" and config["settings"]["template"] == "llama2"
    done = forked("evaluate_tofu.py", "--model", model, "--data", small_data, "--max-rows", 2,
                  "--max-new-tokens", 4, "--reference", model, "--out", "log.json")
    log = json.loads((tmp_path / "log.json").read_text())
    assert "dequantising" not in done.stdout and abs(log["metrics"]["forget_kl"]) < 1e-6
    assert log["provenance"]["template"] == PRESETS["smollm2-135m"].template
    assert "no preset" in forked("evaluate_tofu.py", "--model", "small=x.gguf", status=2).stderr


def test_what_cannot_be_converted_is_refused(small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        converted(Path("nowhere.gguf"))
    Path("page.gguf").write_text("<html>not found</html>")
    Path("torn.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    for name in ("page.gguf", "torn.gguf"):  # with or without the packages
        with pytest.raises(InputError, match="cannot read it .* pip install gguf accelerate"):
            converted(Path(name))
    write_gguf(small_model, tmp_path / "small.gguf", True)  # skips where the packages are absent
    whole = Path("small.gguf").read_bytes()
    Path("small.gguf").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="cannot read it"):
        converted(Path("small.gguf"))
    assert not list(Path("runs/models").glob("gguf-*"))


def test_the_real_file_comes_over(tmp_path, monkeypatch):
    """$NPO_SMOLLM2 names SmolLM2-135M-Instruct as a .gguf file (docs/own_data_and_models.md: where from)."""
    file = os.environ.get("NPO_SMOLLM2")
    if not file or not Path(file).is_file():
        pytest.skip("set NPO_SMOLLM2 to the .gguf file of SmolLM2-135M-Instruct")
    for name in ("gguf", "accelerate"):
        pytest.importorskip(name, reason=f"the optional package {name} is not installed")
    monkeypatch.chdir(tmp_path)
    s = resolve({"model": f"smollm2-135m={file}", "loss": "sft", "split": "full"})
    model, tokenizer, _ = load_model(s.start)
    model.eval()
    question = {"role": "user", "content": "What is the capital of France?"}
    ids = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=True,
                                        return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert "Paris" in tokenizer.decode(said[0, ids["input_ids"].shape[1]:])
    dims = PRESETS["smollm2-135m"].dims
    assert {key: getattr(model.config, key) for key in dims} == dims and len(tokenizer) == dims["vocab_size"]
    for template in TEMPLATES:
        encoded, = encode(tokenizer, template, [("Where was Ann born?", "In Paris.")])
        answer = tokenizer.decode(encoded.ids[encoded.start:])
        assert answer == " " * (template == "qa") + "In Paris." + tokenizer.eos_token
        assert encoded.ids.count(tokenizer.eos_token_id) == (3 if template == "chat" else 1)
