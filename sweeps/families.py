"""Families: one architecture recipe each, which yields a model at any size.

A family is a record of traits, from which sweeps/sizes.py makes a `Shape`, and of how a shape becomes a model. Only
`build_model` imports torch and transformers. The failure this guards against: a model that has not the parameters
that its shape claims (`build_model` checks).

To add a family, add one entry to `FAMILIES` and, if no existing one serves, one function that maps a shape to the
fields of its `transformers` config. `tests/sweeps/test_families.py` then holds its counts against the real model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.accounting import Shape, parameters
from sweeps.errors import InputError, nearest
from sweeps.usercode import load_function

if TYPE_CHECKING:
    import torch

Options = Mapping[str, float]
"""Options of a family by name; booleans and integers where the default is one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One architecture recipe: what defines its shapes, and how a shape becomes a model."""

    name: str
    """The name in study files, or `file.py:function` for a user's own."""
    version: int | str
    """Raised when the same shape would give another model; part of a cell's identity."""
    mlp_ratio: float
    """Nominal MLP width over model width; the realised one stays within a factor 1.5 of it."""
    mlp_matrices: int
    """2: up and down; 3: gate, up and down."""
    learned_positions: bool = False
    """A trained position table; otherwise rotary."""
    attention_bias: bool = False
    """Biases on the attention projections."""
    mlp_bias: bool = False
    """Biases on the MLP matrices."""
    norm_bias: bool = False
    """LayerNorm with a bias; otherwise RMSNorm with a gain only."""
    qk_norm: bool = False
    """Norms on queries and keys, one gain of head_dim each."""
    options: Mapping[str, float | None] = field(default_factory=lambda: {"tied": True})
    """Option name -> default. `tied` (required), `heads_per_kv`, `experts` and `experts_per_token` are read by the size
    rule; all others only by `config`. None: follows from the shape unless given."""
    config: Callable[[Shape, Options], dict[str, Any]] | None = None
    """Shape and options -> fields of a `transformers` config, `model_type` among them."""
    build: "Callable[[Shape, float], torch.nn.Module] | None" = None
    """In place of `config`: (shape, init_std) -> a module whose forward(input_ids) returns an object with `.logits`."""
    extra: Callable[[Shape], tuple[int, int]] | None = None
    """Parameters and forward matmul FLOPs per token beyond (or, negative, short of) the standard parts, for `build`."""


# --- The families -------------------------------------------------------------------------------------------
# What changes the numbers is written out (norm epsilons, rotary base, activations), so that a new default in
# transformers cannot move a loss. Embedding and projection dropouts are 0 everywhere.


def _rotary_config(shape: Shape, options: Options) -> dict[str, Any]:
    """The fields that llama and its relatives share."""
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_dropout": 0.0,
    }


def _gpt2_config(shape: Shape, options: Options) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.context,
        "n_embd": shape.width,
        "n_layer": shape.depth,
        "n_head": shape.heads,
        "n_inner": shape.mlp_width,
        "tie_word_embeddings": shape.tied,
        "activation_function": "gelu_pytorch_tanh",  # GPT-2's own approximation, as one fused kernel
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _gpt_neox_config(shape: Shape, options: Options) -> dict[str, Any]:
    # A quarter of each head rotates, in pairs. The library truncates head_dim x factor: aim between two integers.
    pairs = max(1, round(shape.head_dim / 8))
    factor = 0.25 if shape.head_dim % 8 == 0 else (2 * pairs + 0.5) / shape.head_dim
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    return {
        "model_type": "gpt_neox",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rope_parameters": rope,
        "use_parallel_residual": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _granite_config(shape: Shape, options: Options) -> dict[str, Any]:
    # Granite 3.0 2B and 8B: attention_multiplier 1/64 and 1/128 = 1/head_dim, logits_scaling 8 and 16 = width/256.
    return _rotary_config(shape, options) | {
        "model_type": "granite",
        "embedding_multiplier": options["embedding_multiplier"],
        "residual_multiplier": options["residual_multiplier"],
        "attention_multiplier": options.get("attention_multiplier", 1 / shape.head_dim),
        "logits_scaling": options.get("logits_scaling", shape.width / 256),
    }


def _mixtral_config(shape: Shape, options: Options) -> dict[str, Any]:
    """Trained on the cross-entropy alone: no load-balancing loss, so nothing keeps the experts equally used."""
    return _rotary_config(shape, options) | {
        "model_type": "mixtral",
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="gpt2",
            version=1,
            mlp_ratio=4,
            mlp_matrices=2,
            learned_positions=True,
            attention_bias=True,
            mlp_bias=True,
            norm_bias=True,
            config=_gpt2_config,
        ),
        Family(  # Pythia
            name="gpt_neox",
            version=1,
            mlp_ratio=4,
            mlp_matrices=2,
            attention_bias=True,
            mlp_bias=True,
            norm_bias=True,
            options={"tied": False},
            config=_gpt_neox_config,
        ),
        Family(
            name="llama",
            version=1,
            mlp_ratio=8 / 3,
            mlp_matrices=3,
            options={"tied": False, "heads_per_kv": 1},
            config=lambda shape, options: _rotary_config(shape, options) | {"model_type": "llama"},
        ),
        Family(
            name="qwen3",
            version=1,
            mlp_ratio=3,
            mlp_matrices=3,
            qk_norm=True,
            options={"tied": True, "heads_per_kv": 2},
            config=lambda shape, options: _rotary_config(shape, options) | {"model_type": "qwen3"},
        ),
        Family(
            name="granite",
            version=1,
            mlp_ratio=4,
            mlp_matrices=3,
            options={
                "tied": True,
                "heads_per_kv": 4,
                "embedding_multiplier": 12.0,
                "attention_multiplier": None,
                "residual_multiplier": 0.22,
                "logits_scaling": None,
            },
            config=_granite_config,
        ),
        Family(
            name="mixtral",
            version=1,
            mlp_ratio=3.5,
            mlp_matrices=3,
            options={"tied": False, "heads_per_kv": 4, "experts": 8, "experts_per_token": 2},
            config=_mixtral_config,
        ),
    )
}


# --- Finding a family, reading its options ------------------------------------------------------------------


def find_family(name: str, *, allow_code: bool = False, base_dir: Path = Path()) -> Family:
    """The family called `name`: a built-in one, or `file.py:function`, whose function() returns a `Family`.

    A file is looked up from `base_dir` and runs only with `allow_code`. Its family keeps `name` as given, and its
    version carries a hash of the file's bytes: an edited file is a new family. Raises InputError.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    if not name.rpartition(":")[0].endswith(".py"):
        known = ", ".join(FAMILIES)
        raise InputError(
            f'no family "{name}"{nearest(name, FAMILIES)}. Built-in families: {known}. '
            "A family of your own is written my_file.py:function."
        )
    function, digest = load_function("family", name, Path(base_dir) if allow_code else None)
    return _call_family(name, function, digest)


@lru_cache(maxsize=16)
def _call_family(name: str, function: Callable[[], Any], digest: str) -> Family:
    try:
        family = function()
    except (Exception, SystemExit) as error:
        raise InputError(f'family "{name}" fails with {type(error).__name__}: {error}. Mend it.') from error
    if not isinstance(family, Family):
        raise InputError(f'family "{name}" returned {type(family).__name__}; it must return a sweeps.families.Family.')
    if (family.config is None) == (family.build is None) or "tied" not in family.options:
        raise InputError(f'family "{name}" needs exactly one of config and build, and a "tied" option.')
    traits = (
        ("mlp_ratio", 0 < family.mlp_ratio < math.inf, "more than 0"),
        ("mlp_matrices", family.mlp_matrices in (2, 3), "2 or 3"),
        ("options", isinstance(family.options["tied"], bool), "a tied of true or false"),
    )
    for trait, good, wanted in traits:
        if not good:
            raise InputError(f'family "{name}" has {trait} {getattr(family, trait)!r}; {wanted} is wanted.')
    return replace(family, name=name, version=f"{family.version}+{digest}")


def resolve_options(family: Family, options: Options | None = None) -> dict[str, float]:
    """Every option of `family` with its value, in the family's order; one that follows from the shape is left out.

    Values take the type of the default (bool, int or float), so that equal options compare and hash alike. Raises
    InputError for an unknown name or a value outside the option's range.
    """
    given = dict(options or {})
    for name in given:
        if name not in family.options:
            raise InputError(
                f'family {family.name} has no option "{name}"{nearest(name, family.options)}. '
                f"Its options: {', '.join(family.options)}."
            )
    resolved: dict[str, float] = {}
    for name, default in family.options.items():
        value = given.get(name)
        if value is None:
            if default is not None:
                resolved[name] = default
        elif isinstance(default, bool):
            if value not in (0, 1):
                raise InputError(f"option {name} of family {family.name} is {value!r}; it must be true or false.")
            resolved[name] = bool(value)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"option {name} of family {family.name} is {value!r}; it must be a positive number.")
        elif isinstance(default, int):
            if value != int(value):
                raise InputError(f"option {name} of family {family.name} is {value!r}; it must be a whole number.")
            resolved[name] = int(value)
        else:
            resolved[name] = float(value)
    if resolved.get("experts_per_token", 0) > resolved.get("experts", 0):
        raise InputError(
            f"family {family.name}: experts_per_token is {resolved['experts_per_token']}, more than the "
            f"{resolved.get('experts', 0)} experts. Lower it, or raise experts."
        )
    return resolved


# --- Models -------------------------------------------------------------------------------------------------


def build_model(
    family: Family,
    shape: Shape,
    *,
    init_std: float,
    seed: int,
    options: Options | None = None,
    device: str = "cpu",
) -> "torch.nn.Module":
    """A model with random float32 weights; forward(input_ids) gives `.logits` (batch, tokens, vocab_size).

    Weights depend on `seed` alone: they are drawn on the CPU, bit-equal in every process, and moved to `device`
    afterwards; the global random state is left as it was. `device="meta"` allocates nothing. Raises InputError when
    the model has not the parameters of `shape`, which only a user's own family can bring about.
    """
    import torch

    if not 0 < init_std < math.inf:
        raise InputError(f"init_std is {init_std!r}; it must be a positive number, such as 0.02.")
    place = torch.device("meta" if device == "meta" else "cpu")
    # The CPU generator alone: torch.manual_seed would also seed the accelerators, which fork_rng(devices=[]) leaves.
    with torch.random.fork_rng(devices=[]), place:
        torch.default_generator.manual_seed(seed)
        if family.build is not None:
            model = family.build(shape, init_std)
        else:
            model = _transformers_model(family, shape, init_std, resolve_options(family, options))
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"family {family.name}: build returned {type(model).__name__}, not a torch.nn.Module.")
    built, counted = sum(p.numel() for p in model.parameters()), parameters(shape).total
    if built != counted:
        raise InputError(
            f"family {family.name} built {built:,} parameters where its shape counts {counted:,}. "
            "Mend the traits of the family, or state the difference in its `extra`."
        )
    return model if device in ("cpu", "meta") else model.to(device)


def _transformers_model(family: Family, shape: Shape, init_std: float, options: Options) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    assert family.config is not None, "a family has a config or a build"
    fields = family.config(shape, options)
    config = AutoConfig.for_model(
        **fields,
        initializer_range=init_std,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    # Eager experts: plain matmuls per expert, which run for every width, precision and device. The library's grouped
    # kernel refuses narrow models, was no more than 12% faster on a CPU, and is chosen by what hardware is there.
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation="eager", dtype=torch.float32
    )
