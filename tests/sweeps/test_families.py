"""Families: their options, the counts held against the models that transformers builds, and families from a file."""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lattices import VARIANTS, lattice_shapes
from small import make_cell, put
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sweeps.accounting import forward_flops, parameters
from sweeps.attempt import run_attempt
from sweeps.cell import Cell
from sweeps.corpora import Corpus
from sweeps.errors import InputError
from sweeps.families import FAMILIES, build_model, find_family, resolve_options
from sweeps.probing import pays
from sweeps.sizes import shape_for
from sweeps.stacks import known_gain
from sweeps.store import Store

ROOT = Path(__file__).parents[2]


def weight_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


# --- Options ------------------------------------------------------------------------------------------------


def test_an_unknown_option_names_its_neighbour() -> None:
    with pytest.raises(InputError, match=r'no option "heads_per_kw" \(did you mean "heads_per_kv"\?\)'):
        resolve_options(FAMILIES["llama"], {"heads_per_kw": 2})
    with pytest.raises(InputError, match="no option"):
        resolve_options(FAMILIES["gpt2"], {"heads_per_kv": 2})


@pytest.mark.parametrize(
    "options",
    [
        {"tied": 2},
        {"tied": "yes"},
        {"heads_per_kv": 0},
        {"heads_per_kv": 1.5},
        {"heads_per_kv": True},
        {"experts": math.inf},
        {"experts": 4, "experts_per_token": 5},
    ],
)
def test_option_values_out_of_range_are_refused(options: Mapping[str, Any]) -> None:
    with pytest.raises(InputError):
        resolve_options(FAMILIES["mixtral"], options)


def test_equal_options_resolve_alike() -> None:
    assert resolve_options(FAMILIES["llama"], {"tied": 1, "heads_per_kv": 2.0}) == {"tied": True, "heads_per_kv": 2}
    assert repr(resolve_options(FAMILIES["llama"], {"heads_per_kv": 2.0, "tied": 0})) == repr(
        resolve_options(FAMILIES["llama"], {"tied": False, "heads_per_kv": 2})
    )


def test_granite_multipliers_reach_the_model() -> None:
    family = FAMILIES["granite"]
    shape = shape_for(family, 1e5, vocab_size=256, context=64)
    config: Any = build_model(family, shape, init_std=0.02, seed=0, device="meta").config
    assert (config.embedding_multiplier, config.residual_multiplier) == (12, 0.22)
    assert (config.attention_multiplier, config.logits_scaling) == (1 / shape.head_dim, shape.width / 256)
    chosen = {"embedding_multiplier": 3, "attention_multiplier": 0.5, "residual_multiplier": 0.1, "logits_scaling": 2}
    config = build_model(family, shape, init_std=0.02, seed=0, options=chosen, device="meta").config
    assert {name: getattr(config, name) for name in chosen} == chosen


# --- Counts against the models ------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "context"), [(256, 128), (50257, 1024)])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_counts_equal_the_model_over_the_whole_lattice(
    name: str, options: dict[str, float], vocab_size: int, context: int
) -> None:
    family = FAMILIES[name]
    every = 1 if context == 128 else 4  # what a vocabulary and a context add, a few sizes tell
    for _, shape in lattice_shapes(family, vocab_size, context, **options)[::every]:
        model: Any = build_model(family, shape, init_std=0.02, seed=0, options=options, device="meta")
        count, unique = parameters(shape), dict(model.named_parameters())
        assert sum(p.numel() for p in unique.values()) == count.total
        idle = sum(p.numel() for key, p in unique.items() if ".experts." in key)
        if shape.experts:
            idle = idle * (shape.experts - shape.experts_per_token) // shape.experts
        assert count.total - idle == count.active
        tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        assert len(tables) == (1 if shape.tied else 2)
        if shape.learned_positions:
            tables.add(model.transformer.wpe.weight)
        assert count.active - sum(p.numel() for p in tables) == count.non_embedding


def _sdpa(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_forward_flops_equal_what_torch_counts(name: str, options: dict[str, float]) -> None:
    family, sequences, context = FAMILIES[name], 2, 48
    # torch counts every attention kernel but the CPU's
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa}
    for target in (2e4, 3e5, 2e6):
        shape = shape_for(family, target, vocab_size=300, context=context, options=options)
        model = build_model(family, shape, init_std=0.02, seed=0, options=options)
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            model(torch.zeros(sequences, context, dtype=torch.long))
        matmuls = sum(n for op, n in forward_flops(shape).items() if op not in ("softmax", "embedding_lookup"))
        assert counter.get_total_flops() == sequences * context * matmuls


# --- Models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_an_untrained_model_of_the_smallest_size_predicts_nearly_uniformly(name: str) -> None:
    family = FAMILIES[name]
    options = {"logits_scaling": 1.0} if name == "granite" else {}  # its own would magnify logits below 256 wide
    shape = shape_for(family, 1e4, vocab_size=256, context=64)
    model = build_model(family, shape, init_std=0.02, seed=3, options=options).eval()
    tokens = torch.arange(2 * 64).reshape(2, 64)
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.shape == (2, 64, 256)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(256)) < 0.3


@pytest.mark.parametrize("name", FAMILIES)
def test_no_token_sees_its_future(name: str) -> None:
    family = FAMILIES[name]
    model = build_model(family, shape_for(family, 3e4, vocab_size=256, context=16), init_std=0.1, seed=3).eval()
    tokens = torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, 10] = 99
    with torch.no_grad():
        difference = (model(tokens).logits - model(changed).logits).abs().amax(-1)[0]
    assert difference[:10].max() < 1e-5
    assert difference[10:].min() > 1e-4


HASH_CODE = """
import hashlib
from sweeps.families import FAMILIES, build_model
from sweeps.sizes import shape_for
for family in FAMILIES.values():
    shape = shape_for(family, 5e4, vocab_size=256, context=64)
    digest = hashlib.sha256()
    for name, tensor in build_model(family, shape, init_std=0.02, seed=11).state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    print(family.name, digest.hexdigest())
"""


@pytest.mark.slow
def test_a_seed_gives_the_same_bits_in_another_process() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", HASH_CODE], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    for line in result.stdout.splitlines():
        name, there = line.split()
        family = FAMILIES[name]
        shape = shape_for(family, 5e4, vocab_size=256, context=64)
        assert weight_hash(build_model(family, shape, init_std=0.02, seed=11)) == there
        assert weight_hash(build_model(family, shape, init_std=0.02, seed=12)) != there
    assert len(result.stdout.splitlines()) == len(FAMILIES)


def test_building_leaves_the_global_random_state_alone() -> None:
    family = FAMILIES["llama"]
    shape = shape_for(family, 5e4, vocab_size=256, context=64)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(family, shape, init_std=0.02, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_init_std_is_the_spread_of_the_weights(name: str) -> None:
    family = FAMILIES[name]
    shape = shape_for(family, 3e5, vocab_size=256, context=64)
    for init_std in (0.005, 0.08):
        model: Any = build_model(family, shape, init_std=init_std, seed=1)
        weights = model.get_input_embeddings().weight
        assert weights.dtype == torch.float32
        assert weights.std().item() == pytest.approx(init_std, rel=0.03)
    with pytest.raises(InputError, match="init_std"):
        build_model(family, shape, init_std=0.0, seed=1)


# --- Families from a file -----------------------------------------------------------------------------------

OWN_FAMILY = """
from types import SimpleNamespace
import torch
from sweeps.families import Family

class Bag(torch.nn.Module):
    def __init__(self, shape, init_std):
        super().__init__()
        self.table = torch.nn.Embedding(shape.vocab_size, shape.width)
        self.head = torch.nn.Linear(shape.width, shape.vocab_size, bias=False)
        self.mix = torch.nn.ModuleList(torch.nn.Linear(shape.width, shape.mlp_width) for _ in range(shape.depth))
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=init_std)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.table(input_ids)))

def extra(shape):
    standard = shape.depth * (4 * shape.width**2 + 2 * shape.width * shape.mlp_width + 2 * shape.width) + shape.width
    mine = shape.depth * (shape.width + 1) * shape.mlp_width
    return mine - standard, 0

def bag():
    return Family(name="bag", version=1, mlp_ratio=4, mlp_matrices=2, options={"tied": False}, build=Bag, extra=extra)

def wrong():
    return "llama"

def wrong_count():
    return Family(name="bag", version=1, mlp_ratio=4, mlp_matrices=2, options={"tied": False}, build=Bag)

def incomplete():
    return Family(name="bag", version=1, mlp_ratio=4, mlp_matrices=2)

def breaks():
    return 1 / 0

def leaves():
    raise SystemExit(3)

def with_traits(**traits):
    return Family(**{"name": "bag", "version": 1, "mlp_ratio": 4, "mlp_matrices": 2, "options": {"tied": False},
                     "build": Bag, "extra": extra, **traits})

def no_ratio():
    return with_traits(mlp_ratio=0)

def no_matrices():
    return with_traits(mlp_matrices=1)

def no_tied():
    return with_traits(options={"tied": None})

def divides():
    return with_traits(extra=lambda shape: (1 / 0, 0))

def one_count():
    return with_traits(extra=lambda shape: 3)

def half():
    return with_traits(extra=lambda shape: (0.5, 0))

def bent():
    return with_traits(extra=lambda shape: (shape.depth * shape.mlp_width**2, 0))
"""


def own_cell(own: Path, corpus: Corpus, seed: int) -> Cell:
    family = find_family("mine.py:bag", allow_code=True, base_dir=own)
    shape = shape_for(family, 1e4, vocab_size=corpus.info.vocab_size, context=32)
    told = {"family": family.name, "family_version": str(family.version), "options": (("tied", False),)}
    return make_cell(corpus, 3, shape=shape, seed=seed, **told)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(OWN_FAMILY)
    return tmp_path


def test_a_family_from_a_file_counts_builds_and_is_sized_like_any_other(own: Path) -> None:
    family = find_family("mine.py:bag", allow_code=True, base_dir=own)
    assert family.name == "mine.py:bag"
    for target in (1e4, 1e5, 1e6):
        shape = shape_for(family, target, vocab_size=256, context=32)
        count = parameters(shape)
        assert abs(count.active / target - 1) <= 0.08
        model = build_model(family, shape, init_std=0.05, seed=4)
        assert sum(p.numel() for p in model.parameters()) == count.total
        assert model(torch.zeros(1, 32, dtype=torch.long)).logits.shape == (1, 32, 256)
    again = build_model(family, shape, init_std=0.05, seed=4)
    assert weight_hash(again) == weight_hash(model)


def test_an_edited_file_is_a_new_family(own: Path) -> None:
    before = find_family("mine.py:bag", allow_code=True, base_dir=own)
    same = find_family("mine.py:bag", allow_code=True, base_dir=own)
    assert str(before.version).startswith("1+")
    assert before.version == same.version
    (own / "mine.py").write_text(OWN_FAMILY.replace("mlp_ratio=4", "mlp_ratio=3"))  # the same length, at once
    after = find_family("mine.py:bag", allow_code=True, base_dir=own)
    assert after.version != before.version
    assert after.mlp_ratio == 3


def test_no_cell_is_trained_with_a_file_that_was_edited_since_it_was_planned(
    own: Path, corpus: Corpus, store: Store
) -> None:
    cells = [own_cell(own, corpus, seed) for seed in (0, 1)]
    assert run_attempt(store, put(store, cells[0]), study="s", base_dir=own).state == "finished"
    (own / "mine.py").write_text(OWN_FAMILY.replace("bias=False", "bias=True"))
    edited = run_attempt(store, put(store, cells[1]), study="s", base_dir=own)
    assert edited.state == "code"
    assert "mine.py:bag: it has changed since this cell was planned" in (edited.reason or "")


def test_members_of_a_family_of_ones_own_are_probed(own: Path, corpus: Corpus, store: Store) -> None:
    text = OWN_FAMILY.replace(
        "self.table(input_ids))", "self.table(input_ids) + sum(m(self.table.weight[0]).mean() for m in self.mix))"
    )
    (own / "mine.py").write_text(text)  # a stack wants every parameter used
    cells = [own_cell(own, corpus, seed) for seed in (0, 1)]
    ids = [put(store, cell) for cell in cells]
    pays(store, ids, own)
    gain = known_gain(store, cells[0], 2, "cpu")
    assert gain is not None
    assert gain > 0, "a stack that was tried has a gain, if below 1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lama", r'no family "lama" \(did you mean "llama"\?\)'),
        ("mine.py", "my_file.py:function"),
        ("absent.py:bag", "cannot read .*absent.py"),
        ("mine.py:bga", r'no function bga \(did you mean "bag"\?\)'),
        ("mine.py:wrong", "returned str; it must return a"),
        ("mine.py:incomplete", "exactly one of config and build"),
        ("mine.py:breaks", "ZeroDivisionError"),
        ("mine.py:leaves", "fails with SystemExit: 3"),
        ("mine.py:no_ratio", "has mlp_ratio 0; more than 0 is wanted"),
        ("mine.py:no_matrices", "has mlp_matrices 1; 2 or 3 is wanted"),
        ("mine.py:no_tied", "a tied of true or false is wanted"),
    ],
)
def test_what_is_wrong_with_a_family_is_said(own: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_family(name, allow_code=True, base_dir=own)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("divides", "its extra fails with ZeroDivisionError: division by zero. Let it return parameters and forward"),
        ("one_count", "its extra fails with TypeError"),
        ("half", "its extra is 0.5, 0; whole numbers are wanted"),
        ("bent", "no shape within 8% of 100,000 parameters"),
    ],
)
def test_what_is_wrong_with_the_counts_of_a_family_is_said(own: Path, function: str, message: str) -> None:
    family = find_family(f"mine.py:{function}", allow_code=True, base_dir=own)
    with pytest.raises(InputError, match=message):
        shape_for(family, 1e5, vocab_size=256, context=32)


def test_code_runs_only_when_allowed(own: Path) -> None:
    (own / "mine.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(InputError, match="--allow-code"):
        find_family("mine.py:bag", base_dir=own)


def test_a_model_with_other_parameters_than_its_shape_is_refused(own: Path) -> None:
    family = find_family("mine.py:wrong_count", allow_code=True, base_dir=own)
    shape = shape_for(family, 1e5, vocab_size=256, context=32)
    with pytest.raises(InputError, match="parameters where its shape counts"):
        build_model(family, shape, init_std=0.02, seed=0)
