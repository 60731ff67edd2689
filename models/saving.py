"""A model's folder: what `from_pretrained` loads, and `npo.json`, which says what a loader can't know
otherwise: preset, prompt template, and what the model was trained on."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, split_state_dict_into_shards_factory
from safetensors.torch import save_file

from models.adapters import adapted
from models.sharded import whole
from support.errors import InputError
from support.files import holds_texts, read_text
from support.world import ALONE, World

FILE_BYTES = 4 * 2**30  # of weights in one file


@torch.no_grad()
def save_model(model, tokenizer, folder: Path, meta: dict, world: World = ALONE):
    """Write `folder`: what `from_pretrained` loads, weights gathered a parameter at a time, adapters merged
    into them. meta: {"preset", "template", "trained_on"}. Process 0 writes; where the model is sharded, all
    processes give it their parts."""
    # Not the model's own save_pretrained: it writes on torch's rank 0 alone, and that may be another world's.
    adapters = adapted(model)
    parameters = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()
                  if ".lora_" not in name}
    kept = model.state_dict().keys()
    parameters |= {name: b for name, b in model.named_buffers() if name in kept}  # a router's biases
    split = split_state_dict_into_shards_factory(
        parameters, get_storage_size=lambda p: p.numel() * 4, max_shard_size=FILE_BYTES,
        filename_pattern="model{suffix}.safetensors")
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    for name, keys in split.filename_to_tensors.items():
        at_hand = {}
        for key in keys:
            tensor = whole(parameters[key])  # all processes together
            if key in adapters:
                tensor = tensor.float() + adapters[key].get_delta_weight("default")
            if world.rank == 0:
                at_hand[key] = tensor.cpu().contiguous()
        if world.rank == 0:
            save_file(at_hand, folder / name, metadata={"format": "pt"})
    if world.rank > 0:
        return
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / "npo.json").write_text(json.dumps(meta, indent=1) + "\n")
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers reports a full disk as a bare Exception
        raise (OSError(str(error)) if type(error) is Exception else error) from None


def hub_id(source: str) -> bool:
    """user/name, and no folder of that name."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def read_meta(source: str) -> dict:
    """What npo.json of a model's folder or Hub id says; {} where there is none. Raises InputError."""
    file = Path(source) / "npo.json"
    if hub_id(source):
        with suppress(Exception):  # it has none, or there is no network, or no such id: loading says so
            file = Path(hf_hub_download(source, "npo.json"))
    if not file.is_file():
        return {}
    try:
        meta = json.loads(read_text(file))
        own = holds_texts(meta, "preset", "template")
        if not (own and holds_texts(meta.get("trained_on", {}), "split", "data")):
            raise ValueError("what it says is of another type")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} must hold an object with preset, template and trained_on ({error}); remove "
                         "it, and name template and settings by flags") from None
    return meta


def weights_hash(model) -> str:
    """16 hex digits over names, shapes, types and bytes of all parameters; all processes ask together."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        tensor = whole(tensor)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
