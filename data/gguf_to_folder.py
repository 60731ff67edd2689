"""A .gguf file of a Llama as a folder of float32 safetensors: python data/gguf_to_folder.py FILE.gguf FOLDER

The weights stay exactly the quantised ones. Needs: pip install gguf accelerate. Llama 3.1 and later are
refused, because transformers does not read their RoPE scaling (the tensor rope_freqs.weight).
"""

import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main(file: Path, folder: str):
    if "rope_freqs.weight" in [tensor.name for tensor in GGUFReader(file).tensors]:
        sys.exit(f"{file} scales its RoPE frequencies, which transformers does not read: take safetensors")
    lm = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if type(lm) is not LlamaForCausalLM:
        sys.exit(f"{file} holds a {type(lm).__name__}: this recipe was checked for Llamas only")
    del lm.config.quantization_config
    plain = LlamaForCausalLM(lm.config)  # a new model, so that nothing of the quantisation is saved
    plain.load_state_dict(lm.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
