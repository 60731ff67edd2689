"""Write data.js for the page: the tiny model that knows all 4,000 pairs, and some of the pairs as token ids.

    python docs/unlearn/make_data.py                     # writes docs/unlearn/data.js
    python docs/unlearn/make_data.py --out other.js

The page has no tokenizer. So rows come as ids, and a table gives the text of every id. The weights are
rounded to float16 (2 bytes each, in base64), which changes the model's logits by about 1e-3. The rows are
of the built-in task: the first authors of forget10, the first authors of its retain set, and retain authors
whose rows the page never trains on ("unseen" by the retain term; the model was fine-tuned on them all).
"""

import argparse
import base64
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from common import ROOT
from data.prompts import encode
from data.tofu import load_task

START, TEMPLATE = ROOT / "data/tiny/start", "llama2"
FORGET_ROWS, RETAIN_ROWS, UNSEEN_ROWS = 40, 120, 40
CONFIG = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
          "vocab_size", "rms_norm_eps", "bos_token_id", "eos_token_id")
HEADER = "// Made by make_data.py from data/tiny/start and the built-in rows. Do not edit.\n"
FOOTER = 'if (typeof module === "object") module.exports = DATA;\n'


def weights_record() -> dict:
    """{names: [{name, shape}], base64}: all tensors in the order of `names`, float16, little-endian."""
    tensors = load_file(START / "model.safetensors")
    flat = np.concatenate([tensors[name].ravel() for name in tensors]).astype("<f2")
    return {"names": [{"name": name, "shape": list(tensor.shape)} for name, tensor in tensors.items()],
            "base64": base64.b64encode(flat.tobytes()).decode()}


def row_records(tokenizer, rows: list) -> list:
    """[{ids, start, question, answer}]: ids[start:] are the answer's tokens, end-of-sequence included."""
    texts = encode(tokenizer, TEMPLATE, [(row["question"], row["answer"]) for row in rows])
    return [{"ids": text.ids, "start": text.start, "question": row["question"], "answer": row["answer"]}
            for row, text in zip(rows, texts, strict=True)]


def vocabulary(tokenizer) -> list:
    """The text of every token id. A text is the concatenation; special tokens are empty."""
    # An id is decoded after another one, because a decoder may strip the space that begins a text.
    before = tokenizer("a", add_special_tokens=False).input_ids
    skip = len(tokenizer.decode(before))
    special = set(tokenizer.all_special_ids)
    return ["" if i in special else tokenizer.decode([*before, i])[skip:] for i in range(len(tokenizer))]


def data_record() -> dict:
    """The contents of data.js."""
    tokenizer, task = AutoTokenizer.from_pretrained(START), load_task("builtin", "forget10")
    config = json.loads((START / "config.json").read_text())
    rows = {"forget": task.forget[:FORGET_ROWS], "retain": task.retain[:RETAIN_ROWS],
            "unseen": task.retain[-UNSEEN_ROWS:]}
    return {"config": {**{key: config[key] for key in CONFIG},
                       "rope_theta": config["rope_parameters"]["rope_theta"]},
            "weights": weights_record(),
            "rows": {name: row_records(tokenizer, part) for name, part in rows.items()},
            "vocabulary": vocabulary(tokenizer),
            "runs": []}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("data.js"))
    path = parser.parse_args().out
    text = json.dumps(data_record(), ensure_ascii=False, separators=(",", ":"))
    path.write_text(f"{HEADER}const DATA = {text};\n{FOOTER}", encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
