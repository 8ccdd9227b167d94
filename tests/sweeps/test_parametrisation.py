"""Parametrisations: the factors of the published tables, a base where nothing changes, refusals in a sentence."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import MemoryIO

from sweeps.cell import Cell, Optimizer, Schedule, cell_from_identity
from sweeps.corpora import Corpus, CorpusInfo, make_source, open_corpus, prepare
from sweeps.errors import InputError
from sweeps.families import FAMILIES, build_model, resolve_options
from sweeps.grids import Plan, plan_study
from sweeps.losses import MeanLoss, mean_loss, token_losses
from sweeps.models import make_model, parametrise, tensor_factors
from sweeps.parametrisation import LAYOUTS, STANDARD, Parametrisation, TensorFactors, factors, role, scaled_factors
from sweeps.sizes import shape_of
from sweeps.stacking import Solo, Stack
from sweeps.stacks import check_stack, stack_key
from sweeps.store import open_store
from sweeps.study import Study
from sweeps.table import Table
from sweeps.training import train, train_together

MUP = Parametrisation(kind="mup", base_width=16, base_head_dim=8)
COMPLETEP = Parametrisation(kind="completep", base_width=16, base_head_dim=8, base_depth=2)
RECIPE = Optimizer(learning_rate=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8, clip_norm=1.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    store = open_store(tmp_path_factory.mktemp("parametrised") / "store")
    source = make_source("markov", None, {"tokens": 60_000, "vocab_size": 64, "seed": 1})
    return open_corpus(store.root, prepare(source, "bytes", store.root).fingerprint)


def shape_at(family: str, width: int, depth: int, head_dim: int = 8, vocab_size: int = 64, context: int = 32) -> Any:
    options = resolve_options(FAMILIES[family])
    return shape_of(FAMILIES[family], width, depth, head_dim, vocab_size=vocab_size, context=context, options=options)


def make_cell(corpus: Corpus, width: int = 32, depth: int = 2, family: str = "llama", **changes: Any) -> Cell:
    fields = {
        "family": family,
        "family_version": "1",
        "options": tuple(sorted(resolve_options(FAMILIES[family]).items())),
        "shape": shape_at(family, width, depth, vocab_size=corpus.info.vocab_size),
        "init_std": 0.05,
        "corpus": corpus.info.fingerprint,
        "tokenizer": "bytes",
        "tokens": 12 * 256,
        "batch_tokens": 256,
        "optimizer": RECIPE,
        "schedule": Schedule(name="cosine", warmup_tokens=512, final_fraction=0.1, cooldown_fraction=0.2),
        "precision": "float32",
        "seed": 0,
        "data_seed": 0,
    }
    return Cell(**{**fields, **changes})


# --- factors -----------------------------------------------------------------------------------------------------


def test_width_factors_are_those_of_the_published_table() -> None:
    found = scaled_factors(1024 / 256)
    hidden = TensorFactors(init=0.5, rate=0.25, decay=4.0, eps=0.25)
    assert found.roles["hidden"] == found.roles["projection"] == hidden
    assert found.roles["table"] == found.roles["head"] == TensorFactors(eps=0.25)
    assert found.roles["vector"] == found.roles["last_vector"] == TensorFactors(eps=0.25)
    assert (found.output, found.residual, found.attention) == (0.25, 1.0, None)


def test_attention_divides_by_the_head_size_and_meets_the_bases_root() -> None:
    shape = shape_at("llama", 1024, 2, head_dim=64)
    mup = Parametrisation(kind="mup", base_width=256, base_head_dim=1)
    assert factors(mup, shape).attention == 1 / 64
    assert factors(replace(mup, base_head_dim=16), shape).attention == 4 / 64
    assert factors(replace(mup, base_head_dim=64), shape).attention is None, "the family's own, to the bit"


@pytest.mark.parametrize(
    ("alpha", "residual", "rate", "vector", "eps"), [(1.0, 0.25, 0.25, 1.0, 0.0625), (0.5, 0.5, 0.125, 0.5, 0.125)]
)
def test_depth_factors_are_those_of_the_published_table(
    alpha: float, residual: float, rate: float, vector: float, eps: float
) -> None:
    found = scaled_factors(1024 / 256, 32 / 8, alpha=alpha)
    assert found.residual == residual
    assert found.roles["hidden"] == TensorFactors(init=0.5, rate=rate, decay=4.0, eps=eps)
    assert found.roles["vector"] == TensorFactors(rate=vector, eps=eps)
    assert found.roles["table"] == found.roles["head"] == found.roles["last_vector"] == TensorFactors(eps=0.25)
    assert found.output == 0.25


@settings(max_examples=40, deadline=None, derandomize=True)
@given(width=st.sampled_from([1.0, 0.5, 2.0, 8.0]), depth=st.sampled_from([1.0, 0.5, 2.0, 4.0]), shrunk=st.booleans())
def test_factors_multiply_as_ratios_do_and_vanish_at_the_base(width: float, depth: float, shrunk: bool) -> None:
    found, there, base = (scaled_factors(w, d, shrunk=shrunk) for w, d in ((width, depth), (4.0, 2.0), (1.0, 1.0)))
    both = scaled_factors(4 * width, 2 * depth, shrunk=shrunk)
    for name, one in found.roles.items():
        assert base.roles[name] == TensorFactors()
        for key, value in vars(one).items():
            assert value * vars(there.roles[name])[key] == pytest.approx(vars(both.roles[name])[key])
        assert one.rate * one.decay == pytest.approx(1.0 if name in ("hidden", "projection") else one.rate)
    assert (base.residual, base.output, base.attention) == (1.0, 1.0, None)


def test_projections_of_gpt2_keep_their_bases_scale_at_every_depth() -> None:
    # its own rule draws them smaller by sqrt(2 depth); completep shrinks the branch instead
    found = scaled_factors(1.0, 4.0, shrunk=True)
    assert (found.roles["projection"].init, found.roles["hidden"].init) == (2.0, 1.0)
    deviations = []
    for depth in (2, 8):
        shape = shape_at("gpt2", 64, depth)
        model = build_model(FAMILIES["gpt2"], shape, init_std=0.02, seed=0)
        parametrise(model, "gpt2", shape, replace(COMPLETEP, base_width=64))
        deviations.append(float(model.transformer.h[0].mlp.c_proj.weight.detach().std()))
    assert deviations[1] == pytest.approx(deviations[0], rel=0.05)
    assert deviations[0] == pytest.approx(0.02 / 2, rel=0.05)


# --- in the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(LAYOUTS))
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_its_role(family: str, tied: bool) -> None:
    options = resolve_options(FAMILIES[family], {"tied": tied})
    shape = shape_of(FAMILIES[family], 32, 2, 8, vocab_size=64, context=32, options=options)
    model = build_model(FAMILIES[family], shape, init_std=0.02, seed=0, options=options)
    counted: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        found = role(LAYOUTS[family], name, parameter.ndim)
        counted[found] = counted.get(found, 0) + parameter.numel()
    assert counted["projection"] == 2 * (32 * 32 + 32 * shape.mlp_width)
    assert counted["table"] == 64 * 32 + (32 * 32 if family == "gpt2" else 0)
    assert counted.get("head", 0) == (0 if tied else 64 * 32)
    assert counted["last_vector"] == (64 if family == "gpt2" else 32)
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_logits_in_chunks_and_evaluations_meet_the_same_multipliers(family: str) -> None:
    shape = shape_at(family, 64, 4)
    model = build_model(FAMILIES[family], shape, init_std=0.1, seed=0)
    tokens = torch.randint(64, (3, 33), generator=torch.Generator().manual_seed(0))
    plain = mean_loss(model, tokens)
    parametrise(model, family, shape, COMPLETEP)
    loss, chunked = mean_loss(model, tokens), mean_loss(model, tokens, 4 * 64 * 17)
    torch.testing.assert_close(chunked, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(token_losses(model, tokens).mean(), loss, rtol=1e-5, atol=0)
    assert abs(float((plain - loss).detach())) > 1e-3, "the multipliers are there"


def test_what_is_compiled_meets_them_too() -> None:
    shape = shape_at("llama", 64, 4)
    model = build_model(FAMILIES["llama"], shape, init_std=0.1, seed=0)
    parametrise(model, "llama", shape, COMPLETEP)
    tokens = torch.randint(64, (3, 33), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(MeanLoss(model), dynamic=False, backend="eager")  # the trace, without a compiler
    torch.testing.assert_close(compiled(tokens), mean_loss(model, tokens), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_divided_by_the_width_factor_tied_or_not(tied: bool) -> None:
    options = resolve_options(FAMILIES["llama"], {"tied": tied})
    shape = shape_of(FAMILIES["llama"], 64, 1, 8, vocab_size=64, context=32, options=options)
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    one, other = (build_model(FAMILIES["llama"], shape, init_std=0.02, seed=0, options=options) for _ in range(2))
    parametrise(other, "llama", shape, MUP)
    with torch.no_grad():
        for name, parameter in one.named_parameters():  # the same hidden weights: the output multiplier alone is left
            if role(LAYOUTS["llama"], name, parameter.ndim) in ("hidden", "projection"):
                parameter.mul_(0.5)
        torch.testing.assert_close(other(tokens).logits, one(tokens).logits / 4)


@pytest.mark.parametrize("family", sorted(LAYOUTS))
@pytest.mark.parametrize("parametrisation", [MUP, COMPLETEP], ids=lambda one: one.kind)
def test_at_its_base_a_parametrisation_is_the_standard_one_to_the_bit(
    family: str, parametrisation: Parametrisation, corpus: Corpus
) -> None:
    standard = make_cell(corpus, width=16, family=family)
    at_base = replace(standard, parametrisation=parametrisation)
    assert standard.id != at_base.id
    ios = [MemoryIO(cell, corpus) for cell in (standard, at_base)]
    ends = [train(io._cell, io) for io in ios]
    assert ends[0].val_loss_final == ends[1].val_loss_final
    losses = [{tokens: row.get("train_loss") for tokens, row in io.rows.items()} for io in ios]
    assert losses[0] == losses[1]


def test_a_stack_under_mup_trains_as_its_members_alone(corpus: Corpus) -> None:
    cells = [
        make_cell(corpus, seed=k, optimizer=replace(RECIPE, learning_rate=0.01 * 2**k), parametrisation=MUP)
        for k in range(3)
    ]
    ios = [MemoryIO(cell, corpus) for cell in cells]
    together = train_together(cells, ios)
    for cell, end in zip(cells, together, strict=True):
        alone = train(cell, MemoryIO(cell, corpus))
        assert end.val_loss_final == pytest.approx(alone.val_loss_final, rel=1e-4)


def test_cells_of_two_parametrisations_are_no_stack(corpus: Corpus) -> None:
    one, other = make_cell(corpus), make_cell(corpus, parametrisation=MUP)
    assert stack_key(one) != stack_key(other)
    with pytest.raises(InputError, match="they differ in parametrisation"):
        check_stack([one, other])


# --- in the optimizer --------------------------------------------------------------------------------------------


def reference(model: torch.nn.Module, told: Any, rate: float) -> torch.optim.AdamW:
    """AdamW with a group for every parameter."""
    groups = [
        {
            "params": [parameter],
            "lr": rate * told[name].rate,
            "weight_decay": 0.1 * told[name].decay if parameter.ndim > 1 else 0.0,
            "eps": 1e-8 * told[name].eps,
        }
        for name, parameter in model.named_parameters()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_the_table_steps_as_an_adamw_with_a_group_per_parameter(family: str) -> None:
    shape = shape_at(family, 64, 4)
    mine, own = (build_model(FAMILIES[family], shape, init_std=0.05, seed=0).double() for _ in range(2))
    for model in (mine, own):
        parametrise(model, family, shape, COMPLETEP)
    told = tensor_factors(mine, family, shape, COMPLETEP)
    program, optimizer = Solo(mine, replace(RECIPE, clip_norm=1e9), factors=told), reference(own, told, 0.003)
    tokens = torch.randint(64, (1, 4, 33), generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        program.table.set_rate(0, 0.003)
        program.backward(tokens, 4, nullcontext())
        program.table.step([0])
        optimizer.zero_grad()
        mean_loss(own, tokens[0]).backward()
        optimizer.step()
    for one, other in zip(mine.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_state_with_several_pieces_goes_from_a_solo_run_into_a_stack_and_back() -> None:
    shape = shape_at("gpt2", 32, 4)

    def model(seed: int) -> torch.nn.Module:
        built = build_model(FAMILIES["gpt2"], shape, init_std=0.05, seed=seed)
        parametrise(built, "gpt2", shape, COMPLETEP)
        return built

    told = tensor_factors(model(0), "gpt2", shape, COMPLETEP)
    solo = Solo(model(0), RECIPE, factors=told)
    solo.backward(torch.randint(64, (1, 4, 33)), 4, nullcontext())
    solo.table.step([0])
    state = solo.table.optimizer_state(0)
    assert len(state["param_groups"]) == 4, "tables, matrices, the layers' vectors, the last norm's"
    stack = Stack([model(0), model(1)], [RECIPE] * 2, told)
    stack.table.load_optimizer_state(1, state)
    back = stack.table.optimizer_state(1)
    assert back["param_groups"] == state["param_groups"]
    assert back["state"].keys() == state["state"].keys()
    for index, moments in state["state"].items():
        for key, value in moments.items():
            assert torch.equal(back["state"][index][key], value), (index, key)


def test_without_factors_the_table_has_the_two_pieces_that_it_always_had() -> None:
    table = Table([build_model(FAMILIES["gpt2"], shape_at("gpt2", 32, 2), init_std=0.05, seed=0)], [RECIPE])
    state = table.optimizer_state(0)
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.0]
    assert [group["eps"] for group in state["param_groups"]] == [1e-8, 1e-8]
    axes = [len(table.shapes[name]) for name in table.order]
    assert axes == sorted(axes, key=lambda count: count < 2)


# --- in a study --------------------------------------------------------------------------------------------------


def plan_of(training: dict[str, Any] | None = None, grid: dict[str, Any] | None = None, **fields: Any) -> Plan:
    info = CorpusInfo(
        fingerprint="0123456789abcdef",
        name="by hand",
        tokenizer="bytes",
        vocab_size=256,
        separator=255,
        train_tokens=10_000_000,
        train_documents=100,
        validation_tokens=500_000,
        validation_documents=10,
        validation_bytes=499_990,
        duplicate_documents=0,
        entropy_rate=None,
        description="made for a test",
    )
    shapes = {"type": "shapes", "widths": [16, 32], "depths": [2], "head_dim": 8, "tokens": 64_000}
    plain = {"name": "test", "families": ["llama"], "context": 64, "grid": grid or shapes}
    declared = {**plain, "training": {"batch_tokens": 640, **(training or {})}, **fields}
    return plan_study(Study.model_validate(declared), info)


def test_a_study_varies_its_parametrisation_and_standard_cells_keep_their_ids() -> None:
    before = {one.cell.id for one in plan_of().cells}
    found = plan_of(vary={"parametrisation": ["standard", {"kind": "mup", "base_width": 16}]}).cells
    kinds = {one.cell.id: one.cell.parametrisation for one in found}
    assert len(kinds) == 4
    assert {cell for cell, kind in kinds.items() if kind == STANDARD} == before
    assert set(kinds.values()) == {STANDARD, MUP}
    for one in found:
        assert cell_from_identity(one.cell.identity) == one.cell
        assert ("parametrisation" in one.cell.identity) == (one.cell.parametrisation != STANDARD)


def test_on_the_lattice_the_bases_head_size_is_that_of_the_size_rule() -> None:
    grid = {"type": "points", "points": [{"size": 20_000, "tokens": 64_000}]}
    (one,) = plan_of({"parametrisation": {"kind": "completep", "base_width": 128, "base_depth": 4}}, grid).cells
    expected = Parametrisation(kind="completep", base_width=128, base_head_dim=16, base_depth=4)
    assert one.cell.parametrisation == expected


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ("mup", "mup takes base_width; found none"),
        ("mupp", "standard"),
        ({"kind": "mup"}, "mup takes base_width; found none"),
        ({"kind": "completep", "base_width": 32}, "completep takes base_width and base_depth"),
        ({"kind": "standard", "base_width": 32}, "standard takes no base"),
        ({"kind": "mup", "base_width": 0}, "greater than 0"),
    ],
)
def test_a_parametrisation_without_its_base_is_a_fault(declared: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_of({"parametrisation": declared})
    with pytest.raises(ValueError, match=words):
        plan_of(vary={"parametrisation": [declared]})


def test_parametrisations_have_no_multiples() -> None:
    with pytest.raises(ValueError, match="parametrisation is no number"):
        plan_of(vary={"parametrisation": {"times": [1, 2]}})


def test_families_and_optimizers_without_a_parametrisation_are_refused() -> None:
    mup = {"parametrisation": {"kind": "mup", "base_width": 16}}
    with pytest.raises(InputError, match="family mixtral has no parametrisation mup: it is defined for gpt2, llama"):
        plan_of(mup, families=["mixtral"])
    with pytest.raises(InputError, match=r"optimizer muon has no parametrisation mup: its factors hold for .* AdamW"):
        plan_of({**mup, "optimizer": "muon"})


# --- the grid of shapes ------------------------------------------------------------------------------------------


def test_shapes_grow_in_width_at_one_head_size_with_the_families_mlp_ratio() -> None:
    grid = {"type": "shapes", "widths": [16, 32, 128], "depths": [1, 3], "head_dim": 8, "tokens_per_parameter": 5}
    cells = [one.cell for one in plan_of(grid=grid).cells]
    assert [(c.shape.width, c.shape.depth) for c in cells] == [(w, d) for w in (16, 32, 128) for d in (1, 3)]
    assert all(c.shape.head_dim == 8 and c.shape.heads * 8 == c.shape.width for c in cells)
    assert [c.shape.mlp_width for c in cells if c.shape.depth == 1] == [40, 88, 344]
    for one in plan_of(grid=grid).cells:
        assert one.cell.tokens == pytest.approx(5 * one.counts["N"], abs=320)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widths": [16, 36]}, "widths 36: no multiples of head_dim 8"),
        ({"head_dim": 7}, "multiple of 2"),
        ({"tokens_per_parameter": 20}, "exactly one of tokens, tokens_per_parameter"),
        ({"tokens": None}, "exactly one of tokens, tokens_per_parameter"),
        ({"widths": []}, "at least 1"),
        ({"depths": [0]}, "greater than 0"),
    ],
)
def test_shapes_that_cannot_be_are_faults(change: dict[str, Any], words: str) -> None:
    shapes = {"type": "shapes", "widths": [16, 32], "depths": [2], "head_dim": 8, "tokens": 64_000}
    with pytest.raises(ValueError, match=words):
        plan_of(grid=shapes | change)


def test_heads_that_make_no_whole_groups_are_refused() -> None:
    grid = {"type": "shapes", "widths": [24], "depths": [2], "head_dim": 8, "tokens": 64_000}
    with pytest.raises(InputError, match=r"3 heads .* are no multiple of heads_per_kv 2"):
        plan_of(grid=grid, families=["qwen3"])


def test_the_model_of_a_cell_is_its_families_under_its_parametrisation(corpus: Corpus) -> None:
    cell = make_cell(corpus, width=64)
    plain, scaled = (
        make_model(FAMILIES["llama"], cell),
        make_model(FAMILIES["llama"], replace(cell, parametrisation=MUP)),
    )
    for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        hidden = role(LAYOUTS["llama"], name, one.ndim) in ("hidden", "projection")
        assert torch.equal(one * 0.5 if hidden else one, other), name


def test_what_only_plans_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, sweeps.parametrisation, sweeps.grids; assert 'torch' not in sys.modules"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={"PYTHONPATH": str(root)})
