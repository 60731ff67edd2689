"""A rehearsal on GPUs that you do not have: train_npo.py runs on fake tensors, for mistakes and for memory.

    python tests/rehearsal.py --gpus 2 --loss npo --retain-weight 1 --dtype bf16 --parallel fsdp

It takes the flags of train_npo.py, and those below. --model is a preset (llama2-7b if left out) or a folder
with config.json. It prints the peak of each phase beside plan_memory.py's figure, what is alive at the peak,
and where the host waits for the GPU. A mistake ends with status 1. A fake tensor has a shape, a type and a
device, but no numbers. What is faked:

    GPU        torch believes that CUDA is there; attention is the kernel that a GPU would choose
    processes  the first of --gpus runs. Collectives return at once. It makes the reference pass and the
               evaluations alone, in batches of the size that each process has
    weights    those of a Llama of the model's shape; the tokenizer is tiny's
    numbers    the host reads 0 from each and True from each condition; the check of the start is left out
    files      reference.safetensors, checkpoints and the finished model are not written
    rows       each has --tokens-per-row tokens, two thirds of them in the answer
    answers    of each generation the first token and the last three are computed

No rehearsal sees the CUDA context, gaps between the allocator's blocks, the libraries' work space, or speed.
"""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock, patch

KNOWN_TORCH = "2.13."  # what is replaced below differs between versions
# `import torch` asks once for CUDA's hooks, so a library that has some is loaded before it. A CPU build
# of torch needs it to index a fake cuda tensor and for the backward pass.
HOOKS = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>) }
namespace at {
struct FakeHooks : CUDAHooksInterface {
  FakeHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", FakeHooks)
}
"""
ROOT, TORCH = Path(__file__).resolve().parent.parent, Path(find_spec("torch").origin).parent
LIBRARY = ROOT / "tests" / "__pycache__" / f"rehearsal-{version('torch')}.so"
if not version("torch").startswith(KNOWN_TORCH):
    sys.exit(f"a rehearsal needs torch {KNOWN_TORCH}x, and this is torch {version('torch')}")
if not shutil.which("g++"):
    sys.exit("a rehearsal needs the compiler g++, and this machine has none")
if not LIBRARY.exists():
    aside = LIBRARY.with_suffix(f".{os.getpid()}")
    LIBRARY.parent.mkdir(exist_ok=True)
    subprocess.run(["g++", "-x", "c++", "-", "-o", aside, "-shared", "-fPIC", "-std=c++20",
                    f"-I{TORCH}/include", f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10",
                    f"-Wl,--no-as-needed,-rpath,{TORCH}/lib"], input=HOOKS, text=True, check=True)
    aside.rename(LIBRARY)
ctypes.CDLL(str(LIBRARY))
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import model
import train_npo
from common import Parser, positive, run_command
from plan_memory import ANSWER_SHARE, GB, memory, read_shape

aten, data = torch.ops.aten, torch._C.TensorBase.data
plain_attention = torch.nn.functional.scaled_dot_product_attention
TOKENS = 4  # that are computed of a generation
PHASES = {"open_reference": "reference", "train": "training", "evaluate": "evaluation",
          "save_model": "saving"}


class Watch(TorchDispatchMode):
    """Sees each operation on fake tensors: the bytes alive on the GPU, and where the host waits for it."""

    def __init__(self):
        super().__init__()
        self.phase, self.peaks, self.waits = "loading", Counter(), Counter()  # waits: (phase, line) -> count
        self.now, self.lines, self.at_peak, self.alive = 0, Counter(), {}, {}  # alive: (bytes, line)
        self.row_ends = False  # whether the next search for unended rows finds one less

    def in_phase(self, function, name: str):
        def call(*args, **kwargs):
            before, self.phase = self.phase, name
            result = function(*args, **kwargs)
            self.phase = before
            return result
        return call

    def line(self) -> str:
        """file:line of the innermost frame in the project; the threads of a backward pass have none."""
        frame = sys._getframe(2)
        while frame:
            name = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
            if not name.startswith(("/", "<", "tests/")):
                return f"{name}:{frame.f_lineno}"
            frame = frame.f_back
        return "backward pass"

    def count(self, storage):
        """A storage that is new or was resized, in the 512-byte blocks of torch's allocator."""
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.alive:
            weakref.finalize(storage, self.forget, key)
        before, line = self.alive.get(key) or (0, self.line())
        self.alive[key], self.now = (size, line), self.now + size - before
        self.lines[line] += size - before
        if self.now > max(self.peaks.values(), default=0):
            self.at_peak = dict(self.lines)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)

    def forget(self, key):
        size, line = self.alive.pop(key)
        self.now, self.lines[line] = self.now - size, self.lines[line] - size

    def read(self, tensor):
        """What item() and tolist() return."""
        if tensor.device.type == "cuda":
            self.waits[self.phase, self.line()] += 1
        value = True if tensor.dtype == torch.bool else 0.0 if tensor.dtype.is_floating_point else 0
        for size in reversed(tensor.shape):
            value = [value] * size
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(not issubclass(kind, FakeTensor) and kind is not torch.nn.Parameter for kind in types):
            return NotImplemented  # a DTensor takes itself apart first
        if func is aten._local_scalar_dense.default and args[0].constant is None:
            return self.read(args[0].reshape(()))
        if func is aten.nonzero.default:
            self.waits[self.phase, self.line()] += 1
            rows, self.row_ends = args[0].numel() - self.row_ends, False
            return args[0].new_empty((rows, args[0].dim()), dtype=torch.long)
        if func in (aten.index.Tensor, aten.index_put_.default) and args[0].device.type == "cpu":
            if any(index is not None and index.device.type == "cuda" for index in args[1]):
                raise RuntimeError("index on cuda of a tensor on cpu")  # fake tensors let it pass
        if func in (aten.cat.default, aten.stack.default) and len({x.device.type for x in args[0]}) > 1:
            raise RuntimeError("tensors on cpu and cuda in one cat")  # numbers alone on the CPU would pass
        output = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source, to = args[func is aten.copy_.default].device.type, output.device.type
            if source != to and not (to == "cuda" and (kwargs.get("non_blocking") or args[2:3] == (True,))):
                self.waits[self.phase, self.line()] += 1
        for x in (getattr(x, "_local_tensor", x) for x in tree_leaves(output)):
            if isinstance(x, FakeTensor) and x.device.type == "cuda":
                if (storage := x.untyped_storage())._cdata not in self.alive:
                    self.count(storage)
        return output


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """The kernels of a GPU, with their memory. On fake tensors torch would take the plain formula."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if query.dtype != torch.float32 and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:  # shared keys are known to the flash kernel alone
        return plain_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True)
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = bias.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale)[0]


def replacements_in_torch(watch: Watch, gpus: int) -> list[tuple]:
    """(module or class, name, what stands there during a rehearsal)."""
    infer, resize = ShardingPropagator._propagate_tensor_meta_non_cached, torch.UntypedStorage.resize_
    reduce, init, mesh = dist.all_reduce, dist.init_process_group, model.init_device_mesh

    def set_data(tensor, value):  # torch alone would leave a fake tensor on its old device
        data.__set__(tensor, value)
        if isinstance(value, FakeTensor):
            tensor.fake_device = value.fake_device

    def unseen(function):  # DTensor infers shapes with tensors of its own; a mesh has real numbers
        def call(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)
        return call

    def all_reduce(tensor, *args, **kwargs):
        if tensor.device.type != "cuda":
            raise RuntimeError("nccl takes no tensor on the CPU")  # the fake backend would
        return reduce(tensor, *args, **kwargs)

    answers = {"device_count": gpus, "set_device": None, "current_device": 0, "is_bf16_supported": True,
               "stream": contextlib.nullcontext(), "current_stream": MagicMock()}
    return [*((torch.cuda, name, MagicMock(return_value=answer)) for name, answer in answers.items()),
            (torch.cuda, "Stream", MagicMock), (torch.cuda, "Event", MagicMock),
            (sys.modules["torch.cuda.amp.common"], "amp_definitely_not_available", lambda: False),
            (FakeTensor, "data", property(data.__get__, set_data)),
            (FakeTensor, "tolist", lambda tensor: watch.read(tensor)),
            (torch.utils, "swap_tensors", set_data),  # Module.to; it refuses tensors with weak references
            (torch.UntypedStorage, "resize_", lambda x, size: (resize(x, size), watch.count(x))),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen(infer)),
            (model, "init_device_mesh", unseen(mesh)), (dist, "all_reduce", all_reduce),
            (dist, "init_process_group", lambda *_, **__: init("fake", None, None, gpus, 0, FakeStore())),
            (torch.nn.functional, "scaled_dot_product_attention", attention),
            (transformers.masking_utils, "is_tracing", lambda *_: False)]  # true of every fake tensor


def replacements(watch: Watch, shape: tuple, skipped: int) -> list[tuple]:
    """The same for our own code and its files. A generation skips this many tokens."""
    files, pad, next_logits = {}, torch.nn.functional.pad, model.AnswerModel.next_logits
    reference_pass, evaluate = train_npo.reference_pass, train_npo.evaluate

    def read_model(*_):
        V, H, F, layers, K, tied = shape
        head = min(K, 128 if H >= 4096 else 64)
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=H, intermediate_size=F, num_hidden_layers=layers, head_dim=head,
            num_attention_heads=H // head, num_key_value_heads=K // head, tie_word_embeddings=tied,
            max_position_embeddings=4096, pad_token_id=None)
        tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data/tiny/start")
        return transformers.LlamaForCausalLM(config).eval(), tokenizer

    def next_logits_near_the_end(policy, cache, attention_mask, **inputs):
        if cache is not None:
            attention_mask = pad(attention_mask, (0, skipped), value=1)
        if cache is not None and cache.get_seq_length() < skipped:
            for layer in cache.layers:
                layer.keys, layer.values = (pad(x, (0, 0, 0, skipped)) for x in (layer.keys, layer.values))
        return next_logits(policy, cache=cache, attention_mask=attention_mask, **inputs)

    def evaluate_alone(policy, prepared, tokenizer, batch_size, _, reference, world):
        watch.row_ends = not watch.peaks["evaluation"]  # once in the first evaluation
        return evaluate(policy, prepared, tokenizer, batch_size, TOKENS, reference, world._replace(size=1))

    replaced = {"evaluate": evaluate_alone, "check_start": lambda *_: None,
                "reference_pass": lambda *args: reference_pass(*args[:-1], args[-1]._replace(size=1)),
                "save_file": lambda tensors, path: files.update(tensors) or Path(path).touch(),
                "load_file": lambda path: files}
    for name, phase in PHASES.items():
        replaced[name] = watch.in_phase(replaced.get(name) or getattr(train_npo, name), phase)
    return [*((train_npo, *place) for place in replaced.items()), (model, "read_model", read_model),
            (model.AnswerModel, "next_logits", next_logits_near_the_end),
            (train_npo.dcp, "save", lambda *_, **__: None),
            (model.World, "collect", lambda world, value: [value] * world.size),
            (transformers.PreTrainedModel, "save_pretrained", lambda *_, **__: None)]


def write_rows(folder: str, rows: int, tokens: int, evaluated: int):
    """TOFU's files, with `rows` rows in forget10 and `evaluated` rows in an evaluation."""
    answer = max(2, round(ANSWER_SHARE * tokens)) - 1  # one is the end of sequence
    question = max(1, tokens - answer - 12)  # and eleven are the template's
    row = {"question": "the" + " the" * (question - 1), "answer": "the" + " the" * (answer - 1)}
    row |= {"paraphrased_answer": row["answer"], "perturbed_answer": [row["answer"]]}
    for name, count in {"full": 10 * rows, "forget10_perturbed": evaluated - 3, "retain_perturbed": 1,
                        "real_authors_perturbed": 1, "world_facts_perturbed": 1}.items():
        Path(folder, f"{name}.json").write_text(json.dumps([row] * count))


def rehearse(flags: list[str], gpus: int = 1, tokens: int = 128, layers: int | None = None) -> tuple:
    """train_npo.py with these flags: (Watch, planned bytes by part, steps). Raises what the run raises."""
    typed, watch = dict(zip(flags, [*flags[1:], ""], strict=True)), Watch()
    start = typed.get("--model", "llama2-7b")
    preset, known, path = model.resolve_model(start)
    shape = read_shape(start)
    shape = (*shape[:3], layers or shape[3], *shape[4:])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(gpus), "LOCAL_WORLD_SIZE": str(gpus)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        micro = int(typed.get("--micro-batch-size", preset.micro_batch_size))
        batch = typed.get("--batch-size", str(min(32, 2 * micro * gpus)))  # two micro-batches show all
        evaluated = 4 if typed.get("--eval-every") == "never" else preset.eval_batch_size
        write_rows(folder, max(2 * int(batch), evaluated), tokens, evaluated)
        split = "retain10" if typed.get("--loss") == "sft" else "forget10"
        defaults = {"--data": folder, "--template": "qa", "--split": split, "--batch-size": batch,
                    "--epochs": "1", "--checkpoint-every": "1", "--device": "cuda", "--out": f"{folder}/run"}
        flags = [*(word for item in defaults.items() if item[0] not in typed for word in item), *flags,
                 "--model", start if path or not known else f"{start}={folder}"]
        s = train_npo.parse(flags)
        for place in (*replacements_in_torch(watch, gpus),
                      *replacements(watch, shape, preset.max_new_tokens - TOKENS)):
            stack.enter_context(patch.object(*place))
        with FakeTensorMode(), watch:
            train_npo.main(flags)
        steps = len(Path(folder, "run", "log.jsonl").read_text().splitlines())
    return watch, memory(s, shape, gpus, tokens), steps


def main(argv: list | None = None):
    parser, begin = Parser(__doc__), time.perf_counter()
    for flag, default in {"--gpus": 1, "--tokens-per-row": 128, "--layers": None}.items():
        parser.add_argument(flag, type=positive(int), default=default)
    args, flags = parser.parse_known_args(argv)
    watch, planned, steps = rehearse(flags, args.gpus, args.tokens_per_row, args.layers)
    print(f"\n{time.perf_counter() - begin:.0f} s. GB on each of {args.gpus} fake GPUs:")
    for phase, peak in (*watch.peaks.items(), ("peak", max(watch.peaks.values()))):
        print(f"  {phase:12}{peak / GB:8.2f}")
    print(f"  plan_memory {planned['peak'] / GB:8.2f}  =  " + " + ".join(
        f"{size / GB:.2f} {part}" for part, size in planned.items() if size and part != "peak"))
    alive = sorted(watch.at_peak.items(), key=lambda item: -item[1])[:10]
    print("Alive at the peak, by the line that made it:", *(
        f"{line:24}{size / GB:8.2f}" for line, size in alive), sep="\n  ")
    print(f"Waits of the host for the GPU, in {steps} steps:", *(
        f"{phase:12}{line:24}{count:6}" for (phase, line), count in sorted(watch.waits.items())), sep="\n  ")


if __name__ == "__main__":
    run_command(main)
