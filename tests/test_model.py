"""The model against transformers' GPT-2, and what padding, saving and sampling must never do."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from support import loss as loss_module
from support import pretrained, sampling
from support.cli import UserError
from support.loss import BlockCrossEntropy, RowCrossEntropy, default_chunks

SMALL = GPTConfig(block_size=24, vocab_size=101, n_layer=3, n_head=4, n_embd=32)


def huggingface_model(seed: int = 0) -> transformers.GPT2LMHeadModel:
    """A GPT-2 of transformers with random weights everywhere, biases and gains included."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_positions=24, vocab_size=101, n_layer=3, n_head=4, n_embd=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def reference() -> transformers.GPT2LMHeadModel:
    return huggingface_model()


@pytest.fixture(scope="module")
def folder(reference: transformers.GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("huggingface")
    reference.save_pretrained(folder)
    return folder


def test_parameters_have_the_names_of_huggingface() -> None:
    with torch.device("meta"):
        ours = GPT(GPTConfig())
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert ours.config.n_parameters == 124_439_808
    assert sum(p.numel() for p in ours.parameters()) == 124_439_808 + 47 * 768  # padding
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert round(ours.config.flops_per_token(1024) / 1e6) == 855


def test_logits_loss_and_gradients_equal_transformers(
    reference: transformers.GPT2LMHeadModel, folder: Path
) -> None:
    ours = GPT.from_pretrained(folder)
    idx = torch.randint(101, (4, 21))
    targets = torch.randint(101, (4, 21))
    targets[1, 3:9] = -100
    logits, loss = ours(idx)[0], ours(idx, targets)[1]
    # transformers shifts its labels by one itself, so its loss is taken from its logits here.
    expected = reference(idx).logits
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=0)

    loss.backward()
    reference.zero_grad()
    expected_loss.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = theirs[name].grad.t() if name.endswith(pretrained.CONV1D_WEIGHTS) else theirs[name].grad
        own = parameter.grad[:101] if name.endswith("wte.weight") else parameter.grad
        assert (own - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_first_weights_follow_openais_code() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=1000, n_layer=8, n_head=2, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.01 if "wpe" in name else 0.02 / 4 if "c_proj" in name else 0.02  # sqrt(2 · 8) = 4
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < std / 20, name


def test_huggingface_format_round_trips_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    GPT.from_pretrained(folder).save_pretrained(tmp_path)
    theirs = safetensors.torch.load_file(folder / "model.safetensors")
    ours = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in transformers.GPT2LMHeadModel.from_pretrained(folder).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_openais_own_upload_loads(folder: Path, tmp_path: Path) -> None:
    """Names without prefix, causal masks as tensors, the head a tensor of its own: as `gpt2` on the Hub."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["lm_head.weight"] = old["wte.weight"].clone()
    for layer in range(3):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    safetensors.torch.save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    idx = torch.randint(101, (2, 24))
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], GPT.from_pretrained(folder)(idx)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function"),
        ({"n_inner": 77}, "n_inner"),
        ({"model_type": "llama"}, "model_type"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"n_layer": 4}, "another shape"),
        ({"n_embd": 64}, "another shape"),
        ({"n_head": 5}, "does not divide"),
        ({"n_layer": None}, "not the configuration"),
    ],
)
def test_from_pretrained_rejects_other_architectures(
    folder: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


def test_padding_changes_no_result() -> None:
    """Whatever is in it: large weights there would otherwise take all the probability."""
    torch.manual_seed(5)
    model = GPT(SMALL)
    idx, targets = torch.randint(101, (2, 3, 24))
    with torch.no_grad():
        weight = model.transformer.wte.weight[:101]
        expected = model.hidden(idx) @ weight.T
        model.lm_head.weight[101:] = 100.0
    logits, (none, loss) = model(idx)[0], model(idx, targets)
    assert none is None and model.lm_head.weight.shape == (128, SMALL.n_embd)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=0)
    loss.backward()
    assert (model.lm_head.weight.grad[101:] == 0).all()


@pytest.mark.parametrize(("chunks", "block"), [(1, 1024), (2, 1024), (5, 32), (72, 7)])
def test_loss_in_chunks_equals_the_loss_in_one(
    chunks: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradients, with ignored targets, padding, and a factor behind the loss."""
    monkeypatch.setattr(loss_module, "VOCABULARY_BLOCK", block)
    torch.manual_seed(5)
    model = GPT(SMALL)
    idx, targets = torch.randint(101, (2, 3, 24))
    targets[0, :9] = -100
    expected = torch.nn.functional.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())
    (3 * expected).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logits, loss = model(idx, targets, chunks)
    (3 * loss).backward()
    assert logits is None
    torch.testing.assert_close(loss, expected, atol=2e-6, rtol=0)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name
    with torch.no_grad():
        torch.testing.assert_close(model(idx, targets, chunks)[1], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.02, 1.5])
def test_loss_in_chunks_is_accurate_in_16_bits(dtype: torch.dtype, spread: float) -> None:
    """Against fp64, over the whole vocabulary and with a scaler's factor: nothing under- or overflows."""
    generator = torch.Generator().manual_seed(7)
    states = torch.randn(32, 16, generator=generator)
    weight = spread * torch.randn(50304, 16, generator=generator)
    targets = torch.randint(50257, (32,), generator=generator)
    ours = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.autocast("cpu", dtype):
        loss = BlockCrossEntropy.apply(*ours, targets, 50257, 2)
    (loss * 2**16).backward()
    exact = [states.double().requires_grad_(), weight.double().requires_grad_()]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1][:50257].t(), targets)
    (expected * 2**16).backward()
    assert abs(loss - expected) < 2e-2
    for mine, right in zip(ours, exact, strict=True):
        assert (mine.grad - right.grad).norm() < 2e-2 * right.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_in_chunks_gives_rare_ids_their_gradient(dtype: torch.dtype) -> None:
    """To an id that is nobody's target each position adds some 1 / 5003 / 2048: fp16 has no bits for it."""
    generator = torch.Generator().manual_seed(8)
    states = torch.randn(2048, 16, generator=generator)
    weight = (0.02 * torch.randn(5003, 16, generator=generator)).requires_grad_()
    targets = torch.randint(100, (2048,), generator=generator)
    with torch.autocast("cpu", dtype):
        loss = BlockCrossEntropy.apply(states.clone().requires_grad_(), weight, targets, 5003, 4)
    loss.backward()
    exact = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(states.double() @ exact.t(), targets).backward()
    rows, right = weight.grad[100:], exact.grad[100:]
    assert (rows - right).norm() < 2e-2 * right.norm()


def test_the_loss_is_the_same_on_several_threads() -> None:
    """A run repeated on the same cores has the same losses to the bit: no two threads add to one gradient."""
    torch.manual_seed(0)
    states, weight, targets = torch.randn(512, 128), 0.02 * torch.randn(300, 128), torch.randint(4, (512,))
    torch.set_num_threads(4)
    found = []
    for _ in range(20):
        w = weight.clone().requires_grad_()
        BlockCrossEntropy.apply(states.clone().requires_grad_(), w, targets, 300, 1).backward()
        found.append(w.grad)
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=0, atol=0)


def test_padding_is_never_sampled() -> None:
    torch.manual_seed(0)
    model = GPT(SMALL)
    with torch.no_grad():
        # Were these rows looked at, their logits would tower over all others on one side or the other.
        model.lm_head.weight[101:] = 1000 * torch.randn(27, 32)
    for temperature in (0.0, 1.0, 5.0):
        ids = model.generate(torch.randint(101, (8, 3)), 15, temperature=temperature)
        assert ids.shape == (8, 18)
        assert ids.max() < 101


# ---------------------------------------------------------------- the loss of a GPU, on a CPU


def row_loss(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunks: int, dtype: torch.dtype
) -> torch.Tensor:
    """RowCrossEntropy over 1001 ids, its products in `dtype`."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return RowCrossEntropy.apply(states, weight, targets, 1001, chunks)


def exact_loss_and_gradients(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Torch's own cross-entropy over 1001 ids in fp64, and the gradients of states and weight."""
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    loss = torch.nn.functional.cross_entropy(exact[0] @ exact[1][:1001].t(), targets)
    loss.backward()
    return loss.detach(), exact[0].grad, exact[1].grad


def row_case(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, a weight with 23 rows of padding, and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(7)
    states = torch.randn(n, 16, generator=generator).requires_grad_()
    weight = (0.5 * torch.randn(1024, 16, generator=generator)).requires_grad_()
    targets = torch.randint(1001, (n,), generator=generator)
    targets[5:9] = -100
    return states, weight, targets


@pytest.mark.parametrize("chunks", [1, 5, 67])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
)
def test_loss_by_rows_equals_torchs(dtype: torch.dtype, tolerance: float, chunks: int) -> None:
    states, weight, targets = row_case(67)
    loss = row_loss(states, weight, targets, chunks, dtype)
    (2**16 * loss).backward(retain_graph=True)  # the factor of a gradient scaler
    expected, *gradients = exact_loss_and_gradients(states, weight, targets)
    assert abs(loss.detach() - expected) < tolerance
    first = [states.grad.clone(), weight.grad.clone()]
    for mine, right in zip(first, gradients, strict=True):
        assert (mine / 2**16 - right).norm() < tolerance * right.norm()
    assert (weight.grad[1001:] == 0).all()
    assert (states.grad[5:9] == 0).all()
    (2**16 * loss).backward()
    assert torch.equal(states.grad, 2 * first[0])
    assert torch.equal(weight.grad, 2 * first[1])


@pytest.mark.parametrize(("size", "same_target"), [(20.0, True), (0.01, False)])
def test_loss_by_rows_neither_overflows_nor_vanishes_in_fp16(size: float, same_target: bool) -> None:
    """The weight's gradient is a sum over 4,096 positions, here of 80,000 at most, and a mean below 1e-7."""
    states, weight, targets = row_case(4096)
    states, weight = (size * states).detach().requires_grad_(), (0.02 * weight).detach().requires_grad_()
    if same_target:
        states = states.abs().detach().requires_grad_()
        targets[:] = 3
    row_loss(states, weight, targets, 1, torch.float16).backward()
    _, *gradients = exact_loss_and_gradients(states, weight, targets)
    for mine, right in zip((states.grad, weight.grad), gradients, strict=True):
        assert (mine - right).norm() < 5e-3 * right.norm()
    others = torch.ones(1024, dtype=torch.bool)  # ids that are nobody's target have the smallest gradients
    others[targets.clamp_min(0)], others[1001:] = False, False
    rows, right = weight.grad[others], gradients[1][others]
    assert (rows - right).norm() < 5e-3 * right.norm()


def test_loss_by_rows_without_targets_is_nan() -> None:
    states, weight, targets = row_case(8)
    targets[:] = -100
    loss = row_loss(states, weight, targets, 2, torch.float32)
    loss.backward()
    assert loss.isnan()  # as torch's
    assert not states.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("compiled", [False, True])
def test_loss_by_rows_keeps_no_logits(compiled: bool) -> None:
    """Kept for backward: no more than the two gradients. Compiled: one graph, in training and validation."""
    states, weight, targets = row_case(80)
    loss_of = row_loss
    if compiled:
        torch._dynamo.reset()
        loss_of = torch.compile(row_loss, fullgraph=True, backend="aot_eager_decomp_partition")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = loss_of(states, weight, targets, 2, torch.float32)
    assert sum(kept) <= states.numel() + weight.numel() + 1
    loss.backward()
    expected, *gradients = exact_loss_and_gradients(states, weight, targets)
    assert abs(loss.detach() - expected) < 2e-6
    for mine, right in zip((states.grad, weight.grad), gradients, strict=True):
        assert (mine - right).norm() < 2e-6 * right.norm()
    with torch.no_grad():
        assert torch.equal(loss_of(states * 1, weight, targets, 2, torch.float32), loss)


def test_loss_by_rows_forms_no_gradients_in_validation() -> None:
    states, weight, targets = row_case(80)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        row_loss(states * 1, weight, targets, 2, torch.float32)
    assert counter.get_total_flops() == 2 * 80 * 1024 * 16  # only the product that makes the logits


def test_default_chunks_depend_on_device_and_tokens() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [default_chunks(n, cpu) for n in (256, 2048)] == [1, 4]
    assert [default_chunks(n, cuda) for n in (1024, 65_536)] == [1, 4]


# ---------------------------------------------------------------- generation


def test_greedy_decoding_equals_transformers(reference: transformers.GPT2LMHeadModel, folder: Path) -> None:
    ours = GPT.from_pretrained(folder)
    idx = torch.randint(101, (3, 5))
    # The mask is given, as transformers would take the id 0 for padding where a prompt holds it.
    options = {"attention_mask": torch.ones_like(idx), "pad_token_id": 0}
    expected = reference.generate(idx, max_new_tokens=19, do_sample=False, **options)
    assert torch.equal(ours.generate(idx, 19, temperature=0), expected)


def test_a_sample_does_not_depend_on_its_batch(folder: Path) -> None:
    """Prompts of different lengths, run well beyond the 24 positions, with a draw of their own."""
    model = GPT.from_pretrained(folder)
    prompts = [torch.randint(101, (length,)).tolist() for length in (5, 1, 24, 40)]
    seeded = lambda i: torch.Generator().manual_seed(i)  # noqa: E731
    options = {"temperature": 0.9, "top_k": 30}
    together = list(model.stream(prompts, 60, generator=[seeded(i) for i in range(4)], **options))
    for i, prompt in enumerate(prompts):
        alone = list(model.stream([prompt], 60, generator=[seeded(i)], **options))
        assert [step[i] for step in together] == [step[0] for step in alone]
    once = model.generate(prompts, 60, generator=seeded(7))
    assert once == model.generate(prompts, 60, generator=seeded(7))
    assert once != model.generate(prompts, 60, generator=seeded(8))


def test_a_full_context_continues_from_its_last_half(folder: Path) -> None:
    """Brute force, without a cache: whenever 24 positions are full, the context shrinks to the last 12."""
    model = GPT.from_pretrained(folder)
    row, context = [3, 1, 4], [3, 1, 4]
    for _ in range(50):
        token = model(torch.tensor([context]))[0][0, -1].argmax().item()
        row.append(token)
        context = [*(context[-12:] if len(context) == 24 else context), token]
    assert model.generate([[3, 1, 4]], 50, temperature=0) == [row]


def test_a_sample_ends_at_its_end_of_text(folder: Path) -> None:
    model = GPT.from_pretrained(folder)
    free = model.generate(torch.tensor([[1, 2], [3, 4]]), 10, temperature=0)
    eos = free[0, 4].item()
    first = [row.index(eos) if eos in row else None for row in free[:, 2:].tolist()]
    ended = model.generate([[1, 2], [3, 4]], 10, temperature=0, eos_token_id=eos)
    for row, whole, end in zip(ended, free.tolist(), first, strict=True):
        assert row == (whole if end is None else whole[: 2 + end + 1])
    filled = model.generate(torch.tensor([[1, 2]]), 10, temperature=0, eos_token_id=eos)
    assert filled.tolist()[0] == ended[0]


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (7, None), (None, 0.6), (20, 0.8), (None, 0.0)])
def test_samples_follow_the_distribution_of_transformers(top_k: int | None, top_p: float | None) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 50)
    warped = logits / 0.7
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p is not None:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    expected = warped.softmax(-1)[0].double()
    # Evenly spread draws measure the distribution without chance.
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ids = sampling.sample(logits.expand(20_000, -1), draws, 0.7, top_k, top_p)
    measured = torch.bincount(ids, minlength=50) / 20_000
    torch.testing.assert_close(measured.double(), expected, atol=2e-4, rtol=0)
