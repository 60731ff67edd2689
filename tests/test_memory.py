"""Memory and its plan: logits in chunks, what --dry-run predicts, and switches that change no number."""

import json
import re
import shutil

import pytest
import test_training
import torch
from test_training import assert_close, trained_weights
from torch.nn.functional import linear

import train_npo
from losses import KL_DIRECTIONS, ceu_loss, kl_loss, token_logps, undial_loss
from models import answers as chunked_head
from models import layers
from models.answers import Span, answer_values
from models.layers import prepare_layers
from running.memory_plan import Shape, token_bytes
from support.errors import InputError

settings = test_training.settings  # a fixture

N, M, H, V = 23, 9, 8, 50  # tokens, those with a K, hidden size, vocabulary


def head_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)
    return draw(N, H), draw(V, H), torch.randint(V, (N,), generator=generator), (draw(M, H), draw(V, H))


def values_and_gradients(function, hidden, weight):
    """(log-probabilities, K, gradient for hidden, gradient for weight), every token with its own upstream
    gradient."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps, kl = function(hidden, weight)
    loss = (logps * torch.linspace(-1, 2, N)).sum() + (kl * torch.linspace(1, 3, len(kl))).sum()
    loss.backward()
    return logps.detach(), kl.detach(), hidden.grad, weight.grad


def in_spans(targets, reference, direction="policy_reference", first=()):
    """A function of (hidden, weight), as training asks: the spans `first`, then log pi, of the last M also K
    where there is a `reference`."""
    def of_last(logits, targets, *known):
        return torch.stack([token_logps(logits, targets), *(kl_loss(logits, k, direction) for k in known)])
    spans = [*first, Span(N - M - sum(span.tokens for span in first)), Span(M, of_last, reference)]

    def chunked(hidden, weight):
        *values, (logps, *kl) = answer_values(hidden, weight, targets, spans)
        return torch.cat([*values, logps]), torch.cat([logps[:0], *kl])
    return chunked


@pytest.fixture(params=(1, 5, 9, 22))
def small_chunks(request, monkeypatch):
    """So many tokens a chunk; the last two chunks are kept."""
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", request.param * 4 * V)
    monkeypatch.setattr(chunked_head, "KEPT_CHUNKS", 2)


@pytest.mark.parametrize("direction", KL_DIRECTIONS)
@pytest.mark.parametrize("with_kl", (True, False))
def test_chunks_change_neither_values_nor_gradients(small_chunks, direction, with_kl):
    hidden, weight, targets, reference = head_inputs()
    reference = reference if with_kl else None

    def whole(hidden, weight):
        logits = linear(hidden, weight)
        kl = kl_loss(logits[N - M:], linear(*reference), direction) if with_kl else logits.new_zeros(0)
        return token_logps(logits, targets), kl
    chunked = in_spans(targets, reference, direction)
    for a, b in zip(values_and_gradients(whole, hidden, weight),
                    values_and_gradients(chunked, hidden, weight), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


F = 12  # tokens with a loss on logits


def on_logits(loss, reference):
    """CE-U's and UNDIAL's first F tokens, as training asks for them."""
    if loss == "ceu":
        return Span(F, ceu_loss)
    return Span(F, lambda policy, targets, reference: undial_loss(policy, reference, targets, 1.5),
                (reference[0].new_ones(F, H), reference[1]))


@pytest.mark.parametrize("loss", ("ceu", "undial"))
@pytest.mark.parametrize("with_kl", (True, False))
def test_chunks_change_no_loss_on_logits(small_chunks, loss, with_kl):
    hidden, weight, targets, reference = head_inputs()
    asked, states = on_logits(loss, reference), reference if with_kl else None

    def whole(hidden, weight):
        logits, theirs = linear(hidden, weight), linear(reference[0].new_ones(F, H), reference[1])
        kl = kl_loss(logits[N - M:], linear(*reference)) if with_kl else logits.new_zeros(0)
        first = asked.values(logits[:F], targets[:F], *([theirs] if asked.reference else []))
        return torch.cat([first, token_logps(logits[F:], targets[F:])]), kl
    chunked = in_spans(targets, states, first=[asked])
    for a, b in zip(values_and_gradients(whole, hidden, weight),
                    values_and_gradients(chunked, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_chunks_under_autocast_have_its_logits_and_a_float32_gradient(small_chunks, dtype):
    hidden, weight, targets, reference = head_inputs(torch.float32)

    def whole(hidden, weight):
        logits = linear(hidden, weight)
        return token_logps(logits, targets), kl_loss(logits[N - M:], linear(*reference))
    with torch.autocast("cpu", dtype):
        right = values_and_gradients(whole, hidden, weight)
        ours = values_and_gradients(in_spans(targets, reference), hidden, weight)
    for value, expected in zip(ours, right, strict=False):
        assert value.dtype == torch.float32
        assert (value - expected).norm() <= 1e-2 * expected.norm()
    torch.testing.assert_close(ours[0], right[0])


def test_no_step_of_the_head_holds_the_logits_of_all_tokens(monkeypatch):
    """The largest tensor that forward and backward make has a chunk's size (or the weight's)."""
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (made if isinstance(made, (tuple, list)) else [made])
                         if isinstance(x, torch.Tensor))
            return made
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 10 * 4 * V)
    hidden, weight, targets, reference = head_inputs()
    for first in ([], [on_logits("ceu", reference)], [on_logits("undial", reference)]):
        sizes.clear()
        with Watch():
            values_and_gradients(in_spans(targets, reference, first=first), hidden, weight)
        assert max(sizes) == 10 * V < N * V


# ---------------------------------------------------------------- layers

def two_layers(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=48, intermediate_size=80,
                                        num_hidden_layers=2, num_attention_heads=6,
                                        num_key_value_heads=2)).train()


def hidden_and_gradients(lm):
    ids = torch.arange(4 * 9).view(4, 9)
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {"hidden": hidden.detach(),
            **{name: p.grad for name, p in lm.named_parameters() if p.grad is not None}}


def kept_bytes(lm, dtype) -> int:
    """Bytes that forward keeps of 5 x 40 tokens for backward, each storage once; weights and their copies
    apart."""
    own, sizes = {p.untyped_storage().data_ptr() for p in lm.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own and x.numel() % (5 * 40) == 0:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x
    alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), \
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        lm.base_model(input_ids=torch.zeros(5, 40, dtype=torch.long), use_cache=False)
    return sum(sizes.values())


@pytest.mark.parametrize("checkpointing", (False, True))
def test_what_is_recomputed_changes_no_number(monkeypatch, checkpointing):
    monkeypatch.setattr(layers, "SMALL_HIDDEN", 0)
    plain, ours = two_layers(), two_layers()
    prepare_layers(ours, checkpointing)
    expected, found = hidden_and_gradients(plain), hidden_and_gradients(ours)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert kept_bytes(ours, "fp32") < (0.3 if checkpointing else 0.7) * kept_bytes(plain, "fp32")


def test_compiled_layers_give_the_same_numbers():
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler: --compile needs one")
    from torch._inductor import config
    plain, ours = two_layers(), two_layers()
    prepare_layers(ours, compile=True)
    with config.patch({"cpp.vec_isa_ok": True}):  # else it compiles three files to see what it may use
        expected, found = hidden_and_gradients(plain), hidden_and_gradients(ours)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", ({}, {"activation_checkpointing": True}))
def test_training_with_the_switches_ends_at_the_same_weights(settings, monkeypatch, flags):
    given = dict(loss="npo", retain_weight=1.0, kl_weight=0.5)
    plain = trained_weights(settings(**given))
    monkeypatch.setattr(layers, "SMALL_HIDDEN", 0)
    assert_close(plain, trained_weights(settings(**given, **flags)), 1e-5)


# ---------------------------------------------------------------- the plan

@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("small", (False, True))
def test_the_plan_knows_what_a_layer_keeps(monkeypatch, dtype, checkpointing, small):
    """The formula against the storages that autograd holds."""
    monkeypatch.setattr(layers, "SMALL_HIDDEN", 512 if small else 0)
    one, two = two_layers(), two_layers()
    one.base_model.layers = one.base_model.layers[:1]
    for lm in (one, two):
        prepare_layers_of(lm, checkpointing)
    x = Shape(0, 2, 0, 0, hidden=48, key_value=16, inner=80, vocabulary=60)
    measured = (kept_bytes(two, dtype) - kept_bytes(one, dtype)) / (5 * 40)
    if not small and not checkpointing:  # gate and up are kept outside autograd's own hooks
        measured += 2 * 80 * (4 if dtype == "fp32" else 2)
    kept = token_bytes(x, dtype, "ddp", checkpointing)
    assert kept == pytest.approx(measured, rel=0.06)  # plus one number a norm and a head


def prepare_layers_of(lm, checkpointing):
    lm.config.num_hidden_layers = len(lm.base_model.layers)
    prepare_layers(lm, checkpointing)


def plan_of(capsys, *flags) -> str:
    s_flags = ["train_npo.py", "--dry-run", "--loss", "npo", "--retain-weight", "1", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", s_flags)
        train_npo.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_llama2_7b_fits_on_two_gpus_of_80_gb_sharded(capsys, dtype):
    said = plan_of(capsys, "--model", "llama2-7b", "--gpus", "2", "--gpu-memory", "80G", "--dtype", dtype)
    assert "6.738 G parameters" in said and "estimated" in said
    assert "As asked it does not fit on 2 x 80 GB" in said and "This fits: --parallel fsdp" in said
    suggested = float(re.search(r"as suggested.*?peak +([\d.]+)", said, re.DOTALL)[1])
    assert 16 * 6.738 / 2 - 13.5 < suggested < 80  # weights, gradients and moments halved, the least


def test_llama2_70b_is_planned_without_weights(capsys):
    said = plan_of(capsys, "--model", "llama2-70b", "--gpus", "32", "--parallel", "fsdp", "--dtype", "bf16")
    assert "68.977 G parameters" in said and "As asked it fits" in said
    assert "Nothing fits" in plan_of(capsys, "--model", "llama2-70b", "--gpus", "2")


@pytest.mark.parametrize("preset, parameters", (("llama3.2-1b", "1.236 G"), ("llama3.1-8b", "8.030 G"),
                                                ("qwen2.5-1.5b", "1.54"), ("qwen3-4b", "4.02")))
def test_todays_models_are_planned_without_network(capsys, preset, parameters):
    said = plan_of(capsys, "--model", preset, "--data", "locuslab/TOFU", "--dtype", "bf16")
    assert parameters in said and "400 rows" in said


def test_answers_shorter_than_a_token_are_planned(capsys, tmp_path):
    for name in ("forget", "retain"):
        rows = [{"question": f"What is {k}, {name}?", "answer": str(k)} for k in range(9)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = ["--forget", str(tmp_path / "forget.json"), "--retain", str(tmp_path / "retain.json")]
    said = plan_of(capsys, "--model", "llama2-7b", *files)
    assert "9 rows" in said and "estimated" in said


def test_a_folders_own_shape_and_tokens_are_used(capsys, small_model, small_data):
    said = plan_of(capsys, "--model", str(small_model), "--data", str(small_data))
    assert "estimated" not in said and "20 rows" in said


def test_a_torn_tokenizer_is_one_sentence(capsys, small_model, small_data, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "torn")
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="no tokenizer that can be read"):
        plan_of(capsys, "--model", str(folder), "--data", str(small_data))


def test_a_micro_batch_that_fits_is_not_called_slow(capsys):
    said = plan_of(capsys, "--batch-size", "64", "--micro-batch-size", "64")
    assert "As asked it fits" in said and "Faster" not in said


@pytest.mark.parametrize("flags, reason", ((["--gpu-memory", "80X"], "invalid gigabytes value: '80X'"),
                                           (["--gpu-memory", "0G"], "positive"),
                                           (["--gpus", "0"], "positive")))
def test_a_plan_that_cannot_be_made_is_refused_in_one_sentence(capsys, flags, reason):
    with pytest.raises(InputError, match=reason):
        plan_of(capsys, "--model", "llama2-7b", *flags)


def test_a_plan_is_refused_where_the_run_would_be(capsys, small_model, tmp_path):
    for name, question in {"forget": "who ", "retain": "whom", "long": "long " * 2000}.items():
        (tmp_path / name).write_text(json.dumps([{"question": question, "answer": "One."}] * 40))
    given = ["--forget", str(tmp_path / "forget"), "--model", str(small_model), "--retain"]
    with pytest.raises(InputError, match="the model's context is"):
        plan_of(capsys, *given, str(tmp_path / "long"))
    with pytest.raises(InputError, match="that is one step"):
        plan_of(capsys, *given, str(tmp_path / "retain"), "--batch-size", "40", "--epochs", "1")


def test_a_mistyped_folder_is_not_planned_as_a_hub_id(capsys):
    with pytest.raises(InputError, match="--data nodir: not 'builtin', no folder, and no Hub id"):
        plan_of(capsys, "--model", "llama2-7b", "--data", "nodir")


def test_plan_flags_without_a_plan_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_npo.py", "--gpus", "2"])
    with pytest.raises(InputError, match="--gpus has no effect"):
        train_npo.main()


@pytest.mark.parametrize("flags, rows", (([], 400),
                                         (["--loss", "sft", "--split", "full", "--retain-weight", "0"],
                                          4000)))
def test_a_hub_id_is_planned_for_without_asking_it(capsys, flags, rows):
    """As the README's 7B command with --dry-run behind it, where there is no network."""
    shown = plan_of(capsys, "--model", "llama2-7b", "--data", "locuslab/TOFU", "--dtype", "bf16", "--gpus",
                    "2", *flags)
    assert f"{rows} rows" in shown and "not read" in shown and "This fits: --parallel fsdp" in shown
