"""A causal language model that returns logits where answers are predicted. Only safetensors are read, and no
code from a model's folder runs. Shapes: N answer tokens, H hidden size, V vocabulary.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from common import InputError, cause_of, locate
from data.batches import TokenBatch, collate

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ASSISTANT = "You are a helpful assistant."


# ---------------------------------------------------------------- presets

@dataclass(frozen=True)
class Preset:
    """Where a model comes from and how it is trained. Flags win over it. The defaults are the paper's."""
    base: str = ""  # fine-tuning begins here: a folder or Hub id
    finetuned: str = ""  # unlearning begins here
    template: str = "llama2"
    system_prompt: str | None = None  # for the template chat
    lr: float = 1e-5
    epochs: int = 10
    beta: float = 0.1
    weight_decay: float = 0.01
    sft_lr: float = 1e-5
    sft_epochs: int = 5
    sft_weight_decay: float = 0.01
    micro_batch_size: int = 4
    eval_batch_size: int = 16
    max_new_tokens: int = 200  # of a generation


PRESETS = {
    # beta multiplies the log-ratio of the whole answer, so short answers need a larger beta.
    "tiny": Preset("data/tiny/untrained", "data/tiny/start", lr=1e-3, beta=0.5, sft_lr=4e-3, sft_epochs=16,
                   sft_weight_decay=0.3, micro_batch_size=16, eval_batch_size=128, max_new_tokens=64),
    "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M-Instruct", eval_batch_size=32),
    "llama3.2-1b": Preset("meta-llama/Llama-3.2-1B-Instruct",
                          "open-unlearning/tofu_Llama-3.2-1B-Instruct_full", "chat", ASSISTANT),
    "llama3.1-8b": Preset("meta-llama/Llama-3.1-8B-Instruct",
                          "open-unlearning/tofu_Llama-3.1-8B-Instruct_full", "chat", ASSISTANT),
    "qwen2.5-1.5b": Preset("Qwen/Qwen2.5-1.5B-Instruct", "", "chat", ASSISTANT),
    "llama2-7b": Preset("NousResearch/Llama-2-7b-chat-hf", "open-unlearning/tofu_Llama-2-7b-chat-hf_full"),
}
LORA_LR_FACTOR = 10  # adapters are trained with this multiple of the preset's lr


def resolve_model(model: str) -> tuple[Preset, str | None, str]:
    """--model's value (preset, PRESET=PATH, folder or Hub id) -> preset, its name or None, path or "". The
    preset of an unknown model has the paper's settings. Raises InputError."""
    name, _, path = model.partition("=")
    if name not in PRESETS:
        name, path = read_meta(model).get("preset"), model
    return PRESETS.get(name, Preset()), name, path


def read_meta(source: str) -> dict:
    """npo.json of a folder that train_npo.py wrote: preset, template, trained_on. Else {}."""
    file = locate(source) / "npo.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# ---------------------------------------------------------------- processes

class World(NamedTuple):
    """This process among all."""
    rank: int
    size: int
    device: torch.device
    sharded: bool = False  # each holds a part of every parameter, so all must run the model equally often

    def sum(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def collect(self, value) -> list:
        """The values of all processes, on all processes."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def say(self, *words):
        if self.rank == 0:
            print(*words, flush=True)


ALONE = World(0, 1, torch.device("cpu"))


def join_world(device: str, parallel: str = "ddp") -> World:
    """The processes that torchrun started, or this process alone. Raises InputError for a missing device."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    size, local_size = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    available = {"cpu": True, "cuda": torch.cuda.device_count() >= local_size,
                 "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise InputError(f"--device {device}: this machine has no such device for each of {local_size} "
                         "processes; leave the flag out, or use --device cpu")
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if local_size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun sets 1 on any machine
        torch.set_num_threads(max(1, os.cpu_count() // local_size))
    torch.set_flush_denormal(True)  # a collapsed model has many denormal numbers, which are slow on a CPU
    if size > 1:  # the others may wait long while one writes a large model
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=1))
    return World(rank, size, torch.device(device, local_rank if device == "cuda" else None),
                 sharded=parallel == "fsdp" and size > 1)


# ---------------------------------------------------------------- the model

class AnswerModel(nn.Module):
    """Logits where answer tokens are predicted. At all other places they are never computed."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, batches: list[TokenBatch]) -> tuple[Tensor, Tensor]:
        """The last hidden states and the logits that predict answer tokens, batch after batch: (N, H) and
        (N, V). Padding comes last, and causal attention never looks ahead, so no mask is needed."""
        states = []
        for batch in batches:
            output = self.lm.base_model(input_ids=batch.ids, use_cache=False)
            states.append(output.last_hidden_state[batch.lines, batch.columns])
        hidden = torch.cat(states)
        return hidden, self.lm.get_output_embeddings()(hidden)

    def next_logits(self, **inputs) -> tuple[Tensor, object]:
        """Logits of the token after each line, and the cache: one step of generation."""
        inputs = self.lm.prepare_inputs_for_generation(**inputs, use_cache=True, logits_to_keep=1,
                                                       is_first_iteration=inputs["cache"] is None)
        output = self.lm(**inputs)
        return output.logits[:, -1], output.cache


@torch.no_grad()
def check_head(model: AnswerModel, texts: list, pad: int, name: str):
    """Raises InputError for `texts` with tokens that the model lacks, and for a model whose logits are not
    finite, are changed behind the LM head (scaled or capped), or are others in training mode (noise)."""
    largest, rows = max(max(text.ids) for text in texts), model.lm.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise InputError(f"--model {name}: its tokenizer writes token {largest}, and its embedding has "
                         f"{rows} rows: resize the embedding, and fine-tune it")
    batch = collate(texts[:2], pad)
    expected = model.lm(input_ids=batch.ids, use_cache=False).logits[batch.lines, batch.columns]
    model.lm.train()
    in_training = model([batch])[1]
    model.lm.eval()
    for logits, does in ((model([batch])[1], "changes its logits behind the head"),
                         (in_training, "has other logits in training mode than in evaluation mode")):
        if not (logits - expected).abs().max() <= 1e-5 * expected.abs().max():  # true also for nan
            raise InputError(f"--model {name}: {type(model.lm).__name__} {does}, or its logits are "
                             "not finite. Our log-probabilities would be wrong: take another model")


def autocast(dtype: str, device: torch.device):
    """Matrix products in `dtype` over float32 weights. fp32 changes nothing."""
    return torch.autocast(device.type, AUTOCAST[dtype], enabled=dtype != "fp32")


# ---------------------------------------------------------------- loading

class Loaded(NamedTuple):
    lm: nn.Module  # float32, without dropout
    tokenizer: object
    meta: dict  # for npo.json: preset, template, system_prompt, trained_on, start, start_hash
    preset: Preset


def load_model(model: str, template: str | None = None, system_prompt: str | None = None,
               base: bool = False) -> Loaded:
    """The model that --model names; a preset's fine-tuned one, or with `base` its base. Raises InputError."""
    preset, name, path = resolve_model(model)
    source = path or (preset.base if base else preset.finetuned)
    if not source:
        raise InputError(f"--model {model} has no published fine-tuned checkpoint: fine-tune with --loss sft "
                         f"--split full first, then give --model {model}=runs/NAME/model")
    folder = locate(source)
    lm, tokenizer = read_model(folder if folder.is_dir() else source, model)
    meta = {"system_prompt": preset.system_prompt} | read_meta(source)
    fallback = preset.template if name or not tokenizer.chat_template else "chat"
    meta = {"preset": name, "template": template or meta.get("template") or fallback,
            "system_prompt": meta["system_prompt"] if system_prompt is None else system_prompt,
            "trained_on": meta.get("trained_on"),
            "start": "/".join(Path(source).parts[-3:]), "start_hash": weights_hash(folder, lm.config)}
    if system_prompt and meta["template"] != "chat":
        raise InputError(f"--system-prompt is for the template chat alone, and this is {meta['template']}")
    if meta["template"] == "chat":
        tokenizer.init_kwargs["system_prompt"] = meta["system_prompt"]  # saved like its chat template
    return Loaded(lm, tokenizer, meta, preset)


def read_model(source, flag: str):
    """(language model, tokenizer) from a folder or a Hub id. Raises InputError."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # Without noise the policy is the reference at step 0, and a resumed run needs no random state.
        noise = [key for key, value in vars(config).items()
                 if isinstance(value, float) and ("drop" in key or "jitter" in key)]
        vars(config).update(dict.fromkeys(noise, 0.0))
        if getattr(config, "quantization_config", None):
            raise InputError("its weights are quantised: take the unquantised model")
        lm, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
        if lm.config.get_text_config() is not lm.config:
            raise InputError("it also reads images or sound, which nothing here trains: take a text model")
        if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
            raise InputError(f"its weights do not match its config.json, for example {min(wrong)}")
        rows, end = lm.get_input_embeddings().weight.shape[0], tokenizer.eos_token_id
        if not tokenizer.is_fast or end is None or max(tokenizer.vocab_size, end + 1) > rows:
            raise InputError("its tokenizer needs a tokenizer.json, an end-of-sequence token, and at most as "
                             f"many tokens as the embedding has rows, {rows}")
    except Exception as error:  # the network, formats and versions each raise their own kinds
        cause = error if isinstance(error, InputError) else cause_of(error)
        hint = f"; the model is in {source}/model" if (Path(source) / "model").is_dir() else ""
        raise InputError(f"--model {flag}: cannot load it as safetensors ({cause}); need a preset, a folder "
                         f"or a Hub id; without network, copy its files into a folder{hint}") from None
    return lm.eval(), tokenizer


def weights_hash(folder: Path, config) -> str | None:
    """16 hex digits over the folder's safetensors files; a Hub id's commit."""
    if not folder.is_dir():
        return config._commit_hash
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- LoRA, FSDP

def add_adapters(lm: nn.Module, rank: int, seed: int, dtype: torch.dtype):
    """Freeze `lm`, and give every linear layer but the head the weight W + 2 B A (LoRA, Hu et al. 2021),
    where B is 0 at first. Frozen weights are kept in `dtype`, the precision of their matrix products."""
    from peft import LoraConfig, inject_adapter_in_model
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear",
                                       task_type="CAUSAL_LM"), lm)
    for layer in lm.modules():
        if hasattr(layer, "get_delta_weight"):
            layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.to(dtype)


def shard(model: AnswerModel, dtype: torch.dtype, world: World):
    """Cut a loaded model in place (FSDP2): each process keeps a part of every parameter, on its device."""
    dtypes = {} if dtype == torch.float32 else {"param_dtype": dtype, "reduce_dtype": torch.float32}
    policy = fsdp.MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    mesh = init_device_mesh(world.device.type, (world.size,))
    layers = next(m for m in model.lm.modules() if isinstance(m, nn.ModuleList)
                  and len(m) == model.lm.config.num_hidden_layers)
    for part in (*layers, model):
        fsdp.fully_shard(part, mesh=mesh, mp_policy=policy)
    fsdp.register_fsdp_forward_method(model, "next_logits")


@contextmanager
def gathered(model: AnswerModel):
    """For passes without gradient. Inside, a sharded model is whole on each process, and they may run it
    unequally often. Then all of it is cut again: AdamW must be given the parts, never the gathered copies."""
    was_training = model.lm.training
    model.lm.eval()
    parts = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)  # as torch's default
        part.reshard()
    model.lm.train(was_training)


# ---------------------------------------------------------------- saving

def full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_model(model: AnswerModel, tokenizer, folder: Path, meta: dict, world: World = ALONE):
    """Write what from_pretrained loads, adapters merged, with npo.json and a README: aside, then renamed."""
    weights = get_model_state_dict(model.lm, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if world.rank > 0:
        return
    named = dict(model.lm.named_parameters()) | dict(model.lm.named_buffers())  # a tied weight once
    weights = {name.replace(".base_layer.", "."): weight.float() for name, weight in weights.items()
               if name in named and ".lora_" not in name}
    for name, layer in model.lm.named_modules():
        if hasattr(layer, "get_delta_weight"):
            key = f"{name}.weight"  # not in place: on a CPU these are the model's own weights
            weights[key] = weights[key] + layer.get_delta_weight("default").detach().cpu()
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    model.lm.save_pretrained(aside, state_dict=weights)
    tokenizer.save_pretrained(aside)
    (aside / "npo.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    card = ("# {loss} on {split} of {data}\n\nMade by `train_npo.py` from {start}. Prompts: {template}. A "
            "low probability of the forget answers does not prove that they are gone.\n")
    (aside / "README.md").write_text(card.format(**meta | meta["trained_on"]), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
