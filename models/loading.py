"""Models from a folder, a `.gguf` file or a Hub id, and the tiny Llama made from scratch.

Weights are float32 and safetensors only: pickled weights and code from a model folder are never read. A GGUF
file's tensors, often of 4 to 8 bits a weight, become a float32 Llama: exactly the quantised model, not the
one it was made from. The optional packages gguf and accelerate read it.
"""

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from data.prompts import system_prompt_of
from models.presets import PRESETS, settings_of, split_model
from models.saving import hub_id, read_meta, save_model
from models.sharded import weight_names
from support.errors import InputError, cause_of, refuse
from support.files import locked, whole_folder
from support.world import ALONE

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours are enough
logging.getLogger("transformers").setLevel(logging.ERROR)

MAX_JSON_BYTES = 2**28  # of a JSON file in a model folder; the largest tokenizers have some 35 MB


def make_tiny(texts: list, seed: int, dims: dict):
    """A small random Llama and a byte-level BPE tokenizer fitted to `texts`: functions of the arguments."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # One token each for the template's tags, blanks beside them included: a prompt should cost what it says.
    tags = [AddedToken("[INST]", rstrip=True), AddedToken("[/INST]", lstrip=True)]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=dims["vocab_size"], special_tokens=["<pad>", "<s>", "</s>", *tags], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    start = ("<s>", bpe.token_to_id("<s>"))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False, model_max_length=dims["max_position_embeddings"])
    tokenizer.chat_template = ("<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] "
                               "}} [/INST]{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}")
    config = LlamaConfig(**dims, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # Llama's initialisation draws from the global stream, which is put back
        return LlamaForCausalLM(config), tokenizer


def load_model(source: str, without_weights: bool = False, flag: str = "--model"):
    """(model, tokenizer, npo.json's content) from a folder, a `.gguf` file or a Hub id; float32, no dropout.
    `without_weights`: its parameters have no memory yet, `sharded.fill` gives it. Raises InputError, which
    names the flag that asked for it."""
    if source.endswith(".gguf"):
        source = str(converted(Path(source)))
    folder = Path(source)
    if folder.is_dir():
        check_folder(folder, f"{flag} {source}")
    elif not hub_id(source):
        raise InputError(f"{flag} {source}: neither a preset ({', '.join(PRESETS)}), a folder, nor a Hub id")
    advice = "" if folder.is_dir() else "; without network, fetch them by hand into a folder"
    model, tokenizer = read(source, f"{flag} {source}: cannot load it as safetensors", advice,
                            without_weights)
    if not hasattr(model.config, "num_hidden_layers"):
        raise InputError(f"{flag} {source}: {type(model).__name__} is made of several models; take one that "
                         "reads texts alone")
    rows = model.get_input_embeddings().weight.shape[0]
    # Added tokens that the model has no row for (a <pad> of Llama-2's copies) do no harm: nothing uses them.
    tokens = max(tokenizer.vocab_size, (tokenizer.eos_token_id or 0) + 1)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None or tokens > rows:
        raise InputError(f"{flag} {source}: need a fast tokenizer (tokenizer.json) with an end-of-sequence "
                         f"token and at most {rows} tokens, as the embedding has rows; it has {tokens}: not "
                         "of one model")
    return model.eval(), tokenizer, read_meta(source)


def prompt_template(tokenizer, meta: dict, preset, template: str | None = None,
                    system_prompt: str | None = None) -> str:
    """How a model is asked: as flags say, else its record, else its preset; so, too, the chat template's
    system prompt, which goes into the tokenizer."""
    template = template or meta.get("template") or preset.template
    wanted = system_prompt or system_prompt_of(tokenizer) or preset.system_prompt
    if template == "chat" and wanted:
        tokenizer.init_kwargs["system_prompt"] = wanted
    return template


def template_note(model: str, tokenizer, meta: dict, template: str) -> str:
    """What to say where only a default decides that a chat model is not asked as one; else nothing."""
    known = split_model(model)[0] or meta.get("template")
    own = getattr(tokenizer, "chat_template", None) and template != "chat"
    said = f"note: {model} has a chat template of its own, which --template chat takes; asked with {template}"
    return said if own and not known else ""


def load_named(model: str, flag: str = "--model"):
    """`load_model` of what a flag names (of a preset its checkpoint), and its preset's settings."""
    preset, path = split_model(model, flag)
    source = path or settings_of(preset).finetuned or settings_of(preset).base
    if not source:
        raise InputError(f"{flag} {model}: train_npo.py makes it on the spot; give the model/ of a run's "
                         "folder")
    lm, tokenizer, meta = load_model(source, flag=flag)
    return lm, tokenizer, meta, settings_of(preset or meta.get("preset"))


def read(source, flaw: str, advice: str, without_weights: bool = False, **gguf):
    """(model, tokenizer) by transformers, all weights there. A crafted folder can't run code here: remote
    code stays off, and only safetensors are opened. Raises InputError: `flaw`, the cause, `advice`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **gguf)
        # Dropout off for good: at step 0 the policy IS the reference, and resuming needs no random state.
        vars(config).update({name: 0.0 for name, value in vars(config).items()
                             if "drop" in name and isinstance(value, float)})
        if without_weights:
            return empty_model(source, config), tokenizer
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, **gguf)
    except Exception as error:  # network, format and version errors: the sentence carries the cause
        raise InputError(f"{flaw} ({cause_of(error)}){advice}") from None
    if info["missing_keys"]:
        raise InputError(f"{flaw}: weights are missing, among them {min(info['missing_keys'])}")
    return model, tokenizer


def empty_model(source: str, config):
    """The model of this config, its parameters without memory; buffers (rotary frequencies) are real."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None and not parameter.is_meta:  # a tied one stays the same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)
    nn.Module.register_parameter = on_meta
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    finally:
        nn.Module.register_parameter = register
    with suppress(OSError):  # a folder or a Hub id without one
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def weights_folder(source: str) -> Path:
    """The folder that holds a model's files; a Hub id's are fetched, and only weights that can't run code."""
    if source.endswith(".gguf"):
        return converted(Path(source))
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # network and format errors: the sentence carries the cause
        raise InputError(f"--model {source}: cannot fetch its weights ({cause_of(error)})") from None


def check_folder(folder: Path, named: str):
    """A model's folder is whole, no file's size is meant to fill the memory, no index and no adapter points
    elsewhere (code and pickles are never read). Raises InputError."""
    large = [path.name for path in folder.glob("*.json") if path.stat().st_size > MAX_JSON_BYTES]
    weights = list(folder.glob("*.safetensors"))
    refuse({
        f"{named}: that is a run's folder; the model is in {folder / 'model'}":
            (folder / "model").is_dir() and not weights,
        f"{named}: the folder has no config.json; need one written by save_pretrained":
            not (folder / "config.json").is_file(),
        f"{named}: no weights as safetensors (pickled weights can run code); need model.safetensors":
            not weights,
        f"{named}: {', '.join(large)} has more than {MAX_JSON_BYTES >> 20} MB": large,
        f"{named}: holds an adapter (adapter_config.json) of another model; merge it, save the whole model":
            (folder / "adapter_config.json").exists()})
    weight_names(folder)


# ---------------------------------------------------------------- .gguf files

def converted(file: Path) -> Path:
    """The folder with this file's weights in float32, made now where it isn't there yet: by the process that
    comes first, while the others wait for the lock. Raises InputError where the file can't be used."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; need a .gguf file with the weights of a Llama")
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = Path(f"runs/models/gguf-{file.stem}-{digest[:16]}")
    with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
        if not folder.is_dir():
            print(f"{file}: dequantising into {folder}, once", flush=True)
            with whole_folder(folder, ALONE) as aside:
                save_model(*read_gguf(file), aside, {"converted_from": {"file": file.name, "sha256": digest}})
    return folder


def read_gguf(file: Path):
    """(LlamaForCausalLM in float32, tokenizer with its chat template). Raises InputError."""
    from transformers import LlamaForCausalLM
    quantised, tokenizer = read(file.parent, f"{file}: cannot read it as a Llama",
                                "; need a GGUF file, and the packages of pip install gguf accelerate",
                                gguf_file=file.name)
    if type(quantised) is not LlamaForCausalLM:
        raise InputError(f"{file} holds a {type(quantised).__name__}, no Llama; take a folder of safetensors")
    # A fresh model, so that nothing of the file's quantisation stays in what is saved.
    vars(quantised.config).pop("quantization_config", None)
    model = LlamaForCausalLM(quantised.config)
    model.load_state_dict(quantised.state_dict())
    return model.eval(), tokenizer
