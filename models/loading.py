"""The presets, the tiny Llama made from scratch, loading and saving; and `AnswerModel`, the one forward pass that
everything uses.

Weights are float32 and safetensors only: pickled weights and code from a model folder are never read. `model/npo.json`
beside the weights keeps what a loader can't know: preset, prompt template, and what the model was trained on.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.batches import TokenBatch, collate_packed
from data.prompts import Encoded
from losses import token_logps
from models.chunked_head import answer_values
from models.gguf_weights import converted
from running.processes import ALONE, World
from running.sharding import parameters_on_meta, release, whole, write_weights
from support.errors import InputError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours are enough
logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Preset:
    """What `--model NAME` fixes; a flag wins over each. lr and epochs for unlearning, sft_* for fine-tuning and
    retraining."""
    base: str  # where fine-tuning starts ("": made from scratch)
    finetuned: str  # where unlearning starts ("": trained on the spot)
    template: str
    lr: float
    epochs: int
    beta: float
    sft_lr: float
    sft_epochs: int
    warmup_epochs: float
    micro_batch_size: int  # forget rows (each with its partners) that a process runs forward at once
    eval_batch_size: int  # answers generated at once
    dims: dict  # the Llama's dimensions


TINY_DIMS = dict(vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=6,
                 max_position_embeddings=512)
# Real TOFU has thrice the text of the built-in set, in far more varied words: it needs the larger memory.
TINY_DIMS_LARGE = dict(TINY_DIMS, num_hidden_layers=4, max_position_embeddings=1024)
MAX_JSON_BYTES = 2**28  # of a JSON file in a model folder; the largest tokenizers have some 35 MB
TINY_LARGE_FROM = 500_000  # characters of questions and answers


def tiny_dims(rows: list) -> dict:
    """The tiny Llama's dimensions for a data set: they follow from how much text it must hold."""
    characters = sum(len(row["question"]) + len(row["answer"]) for row in rows)
    return TINY_DIMS if characters < TINY_LARGE_FROM else TINY_DIMS_LARGE


# For anything but tiny, the paper's: lr 1e-5, 10 epochs (fine-tuning 5), batch 32, warm-up over the first epoch,
# beta 0.1.
PRESETS = {
    "tiny": Preset("", "", "llama2", lr=2e-3, epochs=10, beta=0.35, sft_lr=4e-3, sft_epochs=16, warmup_epochs=1,
                   micro_batch_size=8, eval_batch_size=256, dims=TINY_DIMS),
    "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M-Instruct", "", "llama2", lr=1e-5, epochs=10, beta=0.1,
                           sft_lr=1e-5, sft_epochs=5, warmup_epochs=1, micro_batch_size=8, eval_batch_size=128,
                           dims=dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                     num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)),
    "llama2-7b": Preset("NousResearch/Llama-2-7b-chat-hf", "open-unlearning/tofu_Llama-2-7b-chat-hf_full", "llama2",
                        lr=1e-5, epochs=10, beta=0.1, sft_lr=1e-5, sft_epochs=5, warmup_epochs=1, micro_batch_size=4,
                        eval_batch_size=32, dims=dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                                                      num_hidden_layers=32, num_attention_heads=32)),
    "llama2-70b": Preset("NousResearch/Llama-2-70b-chat-hf", "", "llama2", lr=1e-5, epochs=10, beta=0.1, sft_lr=1e-5,
                         sft_epochs=5, warmup_epochs=1, micro_batch_size=1, eval_batch_size=16,
                         dims=dict(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                   num_attention_heads=64, num_key_value_heads=8)),
}


def preset_and_path(model: str) -> tuple[str | None, str]:
    """`--model`'s value -> (preset or None, folder, file or Hub id): "smollm2-135m=PATH" has both.
    Raises InputError."""
    name, equals, path = model.partition("=")
    if not (equals and path):
        return None, model
    if name not in PRESETS:
        raise InputError(f"--model {model}: {name} is no preset; need one of {', '.join(PRESETS)} before the =")
    return name, path


AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(dtype: str, device):
    """Matrix products in `dtype` over float32 weights; fp32: nothing."""
    return torch.autocast(torch.device(device).type, AUTOCAST[dtype], enabled=dtype != "fp32")


class AnswerModel(nn.Module):
    """A causal language model, seen as what unlearning needs of it: log pi(answer | prompt), and K against a reference.

    Only hidden states at answer positions meet the LM head, a chunk of tokens at a time: never (S, T, V) logits.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Last hidden states where the answers' tokens are predicted, (N, H)."""
        inputs = batch.attention(self.lm.dtype)
        states = self.lm.base_model(input_ids=batch.ids, use_cache=False, **inputs).last_hidden_state
        return states[batch.sequences, batch.positions]

    def sums(self, hidden: Tensor, batch: TokenBatch, reference: tuple[Tensor, Tensor] | None = None,
             direction: str = "policy_reference") -> tuple[Tensor, Tensor | None]:
        """What `forward` returns, from the hidden states at the answers' tokens (N, H)."""
        head = self.lm.get_output_embeddings().weight
        logps, kl = answer_values(hidden, head, batch.targets, reference, direction)
        zeros = logps.new_zeros(len(batch.lengths))
        with_kl = batch.rows[len(logps) - len(kl):]
        return zeros.index_add(0, batch.rows, logps), None if reference is None else zeros.index_add(0, with_kl, kl)

    def forward(self, batch: TokenBatch, reference: tuple[Tensor, Tensor] | None = None,
                direction: str = "policy_reference") -> tuple[Tensor, Tensor | None]:
        """Float32 sums over each text's answer tokens, in nats: log pi(y|x) (R,), and K (R,) or None.

        K covers the LAST texts of the batch: `reference` holds the reference's hidden states (M, H) at their answer
        tokens, M <= N, and its LM head's weight (V, H).
        """
        return self.sums(self.hidden(batch), batch, reference, direction)

    def next_logits(self, **inputs) -> Tensor:
        """Logits of the token that follows each sequence, (S, V), as the language model itself computes them;
        `inputs` are its own."""
        return self.lm(**inputs, logits_to_keep=1).logits[:, -1]


def make_tiny(texts: list, seed: int, dims: dict = TINY_DIMS):
    """A small Llama with random weights and a byte-level BPE tokenizer fitted to `texts`, both functions of the
    arguments alone."""
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
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A",
                                                       special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        clean_up_tokenization_spaces=False,
                                        model_max_length=dims["max_position_embeddings"])
    tokenizer.chat_template = "<s>{% for m in messages %}{% if m['role'] == 'user' %}" \
                              "[INST] {{ m['content'] }} [/INST]" \
                              "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    config = LlamaConfig(**dims, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # Llama's initialisation draws from the global stream; it is put back behind us
        return LlamaForCausalLM(config), tokenizer


def load_model(source: str, without_weights: bool = False):
    """(model, tokenizer, npo.json's content) from a folder, a `.gguf` file or a Hub id; float32, no dropout.
    Raises InputError.

    `without_weights`: its parameters have no memory yet, for `sharding.fill` to give them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if source.endswith(".gguf"):
        source = str(converted(Path(source)))
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = f", e.g. --model {folder / 'model'}" if (folder / "model").is_dir() else ""
            raise InputError(f"--model {source}: the folder has no config.json; need a folder written by "
                             f"save_pretrained{hint}")
        if not list(folder.glob("*.safetensors")):
            pickled = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt*")]
            if pickled:
                raise InputError(f"--model {source}: only pickled weights ({pickled[0]}), which can run code when "
                                 "read; save them again with save_pretrained(safe_serialization=True)")
            raise InputError(f"--model {source}: no weights; need model.safetensors beside config.json")
        check_files(folder, source)
    elif folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise InputError(f"--model {source}: neither a preset ({', '.join(PRESETS)}), nor an existing folder, nor a "
                         "Hub id")
    try:
        # A crafted folder can't run code here: remote code stays off, and only safetensors are opened.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if without_weights:
            model, info = empty_model(source), {"missing_keys": []}
        else:
            model, info = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True,
                                                               trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # network, format and version errors of every kind: the sentence carries the cause
        where = "; without network, fetch the model's files by hand into a folder and pass --model FOLDER"
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(f"--model {source}: cannot load it as safetensors ({cause})"
                         f"{'' if folder.is_dir() else where}") from None
    if info["missing_keys"]:
        raise InputError(f"--model {source}: weights are missing, among them {sorted(info['missing_keys'])[0]}; need "
                         "the whole model")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise InputError(f"--model {source}: need a fast tokenizer (tokenizer.json) with an end-of-sequence token")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(f"--model {source}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows; "
                         "they are not of one model")
    if not without_weights:
        check_head(AnswerModel(model), source)
    return without_dropout(model), tokenizer, read_meta(source)


def empty_model(source: str):
    """The model that a folder's or a Hub id's config.json describes; its parameters have no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    with parameters_on_meta():
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if (Path(source) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def weights_folder(source: str) -> Path:
    """The folder that holds a model's files; a Hub id's are fetched, and only weights that can't run code."""
    if source.endswith(".gguf"):
        return converted(Path(source))
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))


def check_files(folder: Path, source: str):
    """What a crafted model folder could lead astray with, beside code and pickles: files of a size meant to fill the
    memory, an index or an adapter that points elsewhere. Raises InputError."""
    for file in folder.glob("*.json"):
        if file.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"--model {source}: {file.name} has {file.stat().st_size / 2**20:.0f} MB, at most "
                             f"{MAX_JSON_BYTES >> 20} MB is read; take a folder written by save_pretrained")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"--model {source}: holds an adapter (adapter_config.json), which names another model; merge "
                         "it and save the whole model")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            astray = sorted(name for name in names if Path(name).name != name or not name.endswith(".safetensors"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"--model {source}: {index.name} is not an index of weights ({type(error).__name__}: "
                             f"{error}); take a folder written by save_pretrained") from None
        if astray:
            raise InputError(f"--model {source}: {index.name} points to {astray[0]!r}; only .safetensors files in the "
                             "folder itself are read")


def read_meta(source: str) -> dict:
    """What npo.json in a model folder says: {"preset", "template", "trained_on"}; {} where there is none.
    Raises InputError."""
    file = Path(source) / "npo.json"
    if not file.is_file():
        return {}
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}); remove it, and name template and settings by flags") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("trained_on", {}), dict):
        raise InputError(f"{file} must hold an object with preset, template and trained_on; remove it, and name "
                         "template and settings by flags")
    return meta


def without_dropout(model):
    """Dropout off for good: at step 0 the policy IS the reference, and a resumed run has no random state to restore."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


@torch.no_grad()
def check_head(model: AnswerModel, source: str, device="cpu"):
    """`AnswerModel` takes the LM head's output as the logits, and packs texts into sequences by position ids and a
    mask. Raises InputError where the model does more to its logits (scaling, soft caps, a bias), or lets packed texts
    see each other (positions that no ids can set)."""
    lm = model.lm
    head = lm.get_output_embeddings()
    refused = f"--model {source}: {type(lm).__name__} changes its logits behind the LM head, or cannot pack texts " \
              "into sequences, which is not supported; take a Llama-like model"
    if head is None:
        raise InputError(refused)
    if getattr(head, "bias", None) is not None:
        raise InputError(f"--model {source}: {type(lm).__name__} has an LM head with a bias, which is not "
                         "supported; take a Llama-like model")
    ids = torch.arange(2, 10).view(2, 4) % lm.config.vocab_size
    texts = [Encoded(row, 3) for row in ids.tolist()]  # each row's last token answers
    try:
        ours, _ = model(collate_packed(texts, [[0], [1]], 0, device))
    except (TypeError, ValueError, IndexError) as error:  # a model that knows no such mask or position ids
        raise InputError(f"{refused} ({type(error).__name__}: {error})") from None
    theirs = model.next_logits(input_ids=ids[:, :3].to(device), use_cache=False)
    release(model)
    if not theirs.isfinite().all():
        raise InputError(f"--model {source}: its logits are not finite, so its weights are broken; take another "
                         "checkpoint")
    if not torch.allclose(ours, token_logps(theirs, ids[:, 3].to(device)), rtol=1e-3, atol=1e-3):
        raise InputError(refused)


def save_model(model, tokenizer, folder: Path, meta: dict, w: World = ALONE):
    """Write what `from_pretrained` loads, and npo.json: {"preset", "template", "trained_on"}. Process 0 writes; where
    the model is sharded, all processes give it their parts."""
    if w.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "npo.json").write_text(json.dumps(meta, indent=1) + "\n")
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # tokenizers reports a full disk as a bare Exception
            raise (OSError(str(error)) if type(error) is Exception else error) from None
    if w.sharded:
        write_weights(model, folder, w.rank)
        if w.rank == 0:
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
    elif w.rank == 0:
        model.save_pretrained(folder)


def weights_hash(model) -> str:
    """16 hex digits over names, shapes, types and bytes of all parameters; where the model is sharded, all processes
    must ask together."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        tensor = whole(tensor)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def pad_id(tokenizer) -> int:
    """Any id will do for padding, since nothing looks at it; the tokenizer's own where it has one."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
