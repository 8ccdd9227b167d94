"""The loss in chunks is the plain loss with the plain gradients, for any family, alone and stacked, in less memory."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from sweeps.accounting import Shape
from sweeps.families import FAMILIES, build_model, resolve_options
from sweeps.losses import MeanLoss, _MeanEntropy, mean_loss, token_losses
from sweeps.memory import LOGITS_BYTES
from sweeps.sizes import shape_for

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, CONTEXT = 3001, 24
CHUNKS = 4 * VOCABULARY * 17
"""Bytes of 17 tokens' logits: the last chunk is a short one."""


def model_of(family: str, dtype: torch.dtype = torch.float32, **options: float) -> torch.nn.Module:
    traits = FAMILIES[family]
    resolved = resolve_options(traits, options)
    shape: Shape = shape_for(traits, 200_000, vocab_size=VOCABULARY, context=CONTEXT, options=resolved)
    return build_model(traits, shape, init_std=0.1, seed=1, options=resolved).to(dtype)


def tokens_of(sequences: int = 3) -> torch.Tensor:
    return torch.randint(VOCABULARY, (sequences, CONTEXT + 1), generator=torch.Generator().manual_seed(5))


def plain(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of gradients, relative to the largest entry of its own tensor."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max() / other[key].abs().max().clamp(min=1e-12)) for key in one)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_give_the_plain_loss_and_gradients(family: str, dtype: torch.dtype, bound: float) -> None:
    model, tokens = model_of(family, dtype), tokens_of()
    expected = plain(model, tokens)
    found = mean_loss(model, tokens, CHUNKS)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=bound)
    assert farthest(gradients(model, 3 * found), gradients(model, 3 * plain(model, tokens))) < bound
    each = token_losses(model, tokens, CHUNKS)
    assert each.shape == (3, CONTEXT)
    assert torch.allclose(each, token_losses(model, tokens, 2**40), rtol=bound)
    assert float(each.mean()) == pytest.approx(float(expected.detach()), rel=bound)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads_get_their_gradients(tied: bool) -> None:
    model, tokens = model_of("llama", torch.float64, tied=tied), tokens_of()
    found = gradients(model, mean_loss(model, tokens, CHUNKS))
    assert ("lm_head.weight" in found) is not tied
    assert farthest(found, gradients(model, plain(model, tokens))) < 1e-10


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_chunks_honour_bfloat16(family: str) -> None:
    model, tokens = model_of(family), tokens_of()
    exact = gradients(model, plain(model, tokens))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = mean_loss(model, tokens), mean_loss(model, tokens, CHUNKS)
        each = token_losses(model, tokens, CHUNKS)
    assert found.dtype == each.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert float(each.mean()) == pytest.approx(float(expected.detach()), rel=1e-3)
    error = farthest(gradients(model, found), exact)
    assert 0 < error < 1.5 * farthest(gradients(model, expected), exact), "no worse than the plain way in bfloat16"


def test_small_logits_take_the_plain_way() -> None:
    model, tokens = model_of("gpt2"), tokens_of()
    assert tokens[:, 1:].numel() * VOCABULARY * 4 < LOGITS_BYTES["cpu"]
    logits, targets = model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()
    torch.testing.assert_close(mean_loss(model, tokens), cross_entropy(logits, targets), rtol=1e-6, atol=0)
    each = cross_entropy(logits, targets, reduction="none").view(tokens[:, 1:].shape)
    assert torch.equal(token_losses(model, tokens), each)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_entropy_of_logits_and_its_gradient(scale: float) -> None:
    """Also where probabilities underflow."""
    logits = (scale * torch.randn(64, 50, generator=torch.Generator().manual_seed(0))).requires_grad_()
    targets = torch.randint(50, (64,), generator=torch.Generator().manual_seed(1))
    expected = cross_entropy(logits, targets)
    (wanted,) = torch.autograd.grad(expected, logits)
    (loss,), _ = _MeanEntropy.apply(logits[None], targets[None])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(3.0 * loss, logits)
    torch.testing.assert_close(found, 3.0 * wanted, rtol=1e-5, atol=1e-7)


class OwnHead(torch.nn.Module):
    """A user's own family: no body, no head that could be known."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, 8)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tanh(self.table(input_ids) @ self.table.weight.T))


def test_a_model_whose_head_is_not_known_takes_the_plain_way() -> None:
    own, tokens = OwnHead(), tokens_of()
    assert torch.equal(mean_loss(own, tokens, CHUNKS), mean_loss(own, tokens))
    altered = model_of("llama")
    altered.__class__ = type("Capped", (type(altered),), {"__module__": "my_file"})
    assert torch.equal(mean_loss(altered, tokens, CHUNKS), mean_loss(altered, tokens))


@pytest.mark.parametrize("family", ["gpt2", "granite", "llama"])
def test_stacked_members_get_the_gradients_of_solo_ones(family: str) -> None:
    """Under vmap, each member with its own weights and tokens."""
    members = [model_of(family, torch.float64) for _ in range(3)]
    for number, member in enumerate(members):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in member.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    tokens = torch.stack([tokens_of(2).roll(number, 0) for number in range(3)])
    base = MeanLoss(copy.deepcopy(members[0]).to("meta"), CHUNKS)
    base.model.tie_weights()  # the move unties
    stacked = {
        name: torch.stack([dict(MeanLoss(one).named_parameters())[name].detach() for one in members]).requires_grad_()
        for name, _ in base.named_parameters()
    }
    buffers = {name: buffer.detach() for name, buffer in MeanLoss(members[0]).named_buffers()}

    def one(parameters: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (batch,), tie_weights=True)

    losses = torch.vmap(one)(stacked, tokens)
    losses.sum().backward()
    for number, member in enumerate(members):
        expected = plain(member, tokens[number])
        assert float(losses[number].detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
        found = {
            name.removeprefix("model."): tensor.grad[number]
            for name, tensor in stacked.items()
            if tensor.grad is not None
        }
        assert farthest(found, gradients(member, expected)) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own count of resident memory")
def test_full_logits_never_exist() -> None:
    """Peak memory of a step, measured in processes of their own, at 128 MB of float32 logits."""
    code = """
import json, sys, torch
from pathlib import Path
from sweeps.families import FAMILIES, build_model
from sweeps.losses import _MeanEntropy, mean_loss
from sweeps.sizes import shape_for
torch.set_num_threads(1)
shape = shape_for(FAMILIES["gpt2"], 3_000_000, vocab_size=32_000, context=256)
model = build_model(FAMILIES["gpt2"], shape, init_std=0.02, seed=0)
mean_loss(model, torch.randint(32_000, (1, 17)), 2**40).backward()
def most():  # resident so far, of this program alone: getrusage counts the parent's memory at the fork as well
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
before = most()
mean_loss(model, torch.randint(32_000, (4, 257)), int(sys.argv[1])).backward()
print(json.dumps(most() - before))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def peak(limit: int) -> int:
        command = [sys.executable, "-c", code, str(limit)]
        return int(json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout))

    logits = 4 * 256 * 32_000 * 4
    assert peak(2**40) > 2 * logits, "the plain way keeps logits and their gradients"
    assert peak(2**23) < 0.8 * logits, "weights, activations and their gradients, and chunks of 8 MB"
