"""Muon takes the hidden matrices and no others, at AdamW's size of update, and goes on to the bit after a restore."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plans import only, study
from small import Killed, MemoryIO, make_cell
from torch.nn.functional import cross_entropy

from sweeps.cell import Cell, Optimizer, cell_from_identity
from sweeps.checkpoints import load, save
from sweeps.corpora import Corpus, make_source, open_corpus, prepare
from sweeps.families import FAMILIES, build_model, resolve_options
from sweeps.optimizers import MuonWithAdamW, make_muon
from sweeps.sizes import shape_for, shape_of
from sweeps.training import train

RECIPE = Optimizer(name="muon", learning_rate=0.01, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)


def model_of(family: str) -> torch.nn.Module:
    options = resolve_options(FAMILIES[family])
    shape = shape_for(FAMILIES[family], 60_000, vocab_size=97, context=16, options=options)
    return build_model(FAMILIES[family], shape, init_std=0.05, seed=0, options=options)


def take(model: torch.nn.Module, optimizer: MuonWithAdamW, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        backward(model, step)
        optimizer.step()
        model.zero_grad()


def backward(model: torch.nn.Module, step: int) -> None:
    tokens = torch.randint(97, (32, 17), generator=torch.Generator().manual_seed(step))
    cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_takes_every_hidden_matrix_and_adamw_the_rest(family: str) -> None:
    model = model_of(family)
    optimizer = make_muon(model, RECIPE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    take(model, optimizer, range(1))
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    outside = ("wte", "wpe", "embed_in", "embed_out", "embed_tokens", "lm_head")
    hidden = {name for name in before if before[name].ndim > 1 and name.split(".")[-2] not in outside}
    assert len(hidden) >= 4 * model.config.num_hidden_layers
    taken = {id(tensor) for tensor in optimizer.param_groups[0]["params"]}
    parameters = dict(model.named_parameters())
    assert {name for name in parameters if id(parameters[name]) in taken} == {
        name for name in hidden if parameters[name].ndim == 2
    }
    assert all(moved[name].abs().max() > 0 for name in hidden)
    for name in hidden:
        for matrix in moved[name].unbind() if moved[name].ndim == 3 else [moved[name]]:
            if min(matrix.shape) < 16:
                continue  # a router has too few rows to judge
            size = float(matrix.square().mean().sqrt()) / 0.01
            assert 0.1 < size < 0.3, f"{name}: the size of AdamW's update is about 0.2"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_as_wide_as_the_vocabulary_is_muons_too(family: str) -> None:
    """Bytes have 256 rows, and so have the matrices of a model that is 256 wide."""
    shape = shape_of(FAMILIES[family], 256, 2, 32, vocab_size=256, context=16, options=FAMILIES[family].options)
    model = build_model(FAMILIES[family], shape, init_std=0.05, seed=0, device="meta")
    muon = {id(tensor) for tensor in make_muon(model, RECIPE).param_groups[0]["params"]}
    layers = [p for name, p in model.named_parameters() if p.ndim == 2 and (".layers." in name or ".h." in name)]
    assert len(layers) >= 8
    assert all(id(one) in muon for one in layers)


def test_cells_whose_layers_muon_once_left_to_adamw_have_ids_of_their_own() -> None:
    def cell(width: int, optimizer: str) -> Cell:
        grid = {"type": "shapes", "widths": [width], "depths": [2], "head_dim": 32, "tokens": 64_000}
        return only(study(grid, training={"optimizer": optimizer, "batch_tokens": 640})).cell

    assert [cell(width, "muon").numerics_version for width in (128, 256)] == [1, 2]
    assert [cell(width, "adamw").numerics_version for width in (128, 256)] == [1, 1]
    assert cell_from_identity(cell(256, "muon").identity) == cell(256, "muon")


def test_the_experts_of_a_layer_are_orthogonalised_one_by_one() -> None:
    model = model_of("mixtral")
    experts = next(parameter for parameter in model.parameters() if parameter.ndim == 3)
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in experts.detach()]
    reference = torch.optim.Muon(alone, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer = make_muon(model, RECIPE)
    for step in range(2):
        backward(model, step)
        assert experts.grad is not None
        for matrix, gradient in zip(alone, experts.grad, strict=True):
            matrix.grad = gradient.clone()
        reference.step()
        optimizer.step()
        model.zero_grad()
    assert torch.equal(torch.stack(alone), experts)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_muon_goes_on_to_the_bit_from_a_checkpoint(family: str, tmp_path: Path) -> None:
    whole, half = model_of(family), model_of(family)
    take(whole, make_muon(whole, RECIPE), range(6))
    first = make_muon(half, RECIPE)
    take(half, first, range(3))
    found = load(save(tmp_path, 3, {"model": half.state_dict(), "optimizer": first.state_dict()}))
    assert found is not None
    again = model_of(family)
    again.load_state_dict(found.state["model"])
    second = make_muon(again, RECIPE)
    second.load_state_dict(found.state["optimizer"])
    take(again, second, range(3, 6))
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_cell_of_muon_trains_resumes_to_the_bit_and_has_an_id_of_its_own(tmp_path: Path) -> None:
    corpus = markov(tmp_path)
    plain = make_cell(corpus, 24)
    cell = make_cell(corpus, 24, optimizer=replace(plain.optimizer, name="muon"))
    assert cell.id != plain.id
    whole = MemoryIO(cell, corpus)
    expected = train(cell, whole)
    assert expected.val_loss_final is not None
    assert expected.loss_at_start is not None
    assert expected.val_loss_final < expected.loss_at_start - 0.1
    with pytest.raises(Killed):
        train(cell, MemoryIO(cell, corpus, folder=tmp_path / "checkpoints", every=5, kill_at=13))
    assert (
        train(cell, MemoryIO(cell, corpus, folder=tmp_path / "checkpoints")).val_loss_final == expected.val_loss_final
    )


def markov(folder: Path) -> Corpus:
    source = make_source("markov", None, {"vocab_size": 8, "tokens": 100_000, "seed": 3})
    return open_corpus(folder / "store", prepare(source, "bytes", folder / "store").fingerprint)
