"""Parameters and FLOPs of a shape, by exact integer arithmetic.

Counting is never silent here: every convention in use has a name, all come from one table of parts, and the parts are
asserted to add up. The failure this guards against is a law fitted to an N or a C that counts something else than the
law's author counted. Imports nothing but the standard library, so that a plan of thousands of cells builds no model.

A multiply-add is 2 FLOPs; the backward pass costs twice the forward pass; recomputation is never counted.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything structural that defines the parameter count and the FLOP count of one decoder."""

    width: int
    """Size of the residual stream (d)."""
    depth: int
    """Number of layers."""
    heads: int
    """Query heads per layer."""
    kv_heads: int
    """Key and value heads per layer; divides `heads`."""
    head_dim: int
    """Size of one head; heads * head_dim is the attention width."""
    mlp_width: int
    """Hidden size of the MLP; of one expert in a mixture of experts."""
    vocab_size: int
    """Rows of the token table and of the head."""
    context: int
    """Tokens per sequence in training (T); also the rows of a learned position table."""
    mlp_matrices: int
    """2: up and down; 3: gate, up and down."""
    tied: bool
    """The head shares the token table."""
    learned_positions: bool
    """A trained table of positions; otherwise rotary, which has no parameters."""
    attention_bias: bool
    """Biases on the query, key, value and output projections."""
    mlp_bias: bool
    """Biases on every MLP matrix."""
    norm_bias: bool
    """Norms have a bias beside their gain (LayerNorm); otherwise a gain only (RMSNorm)."""
    qk_norm: bool
    """A gain of size head_dim on the queries and another on the keys of every layer."""
    experts: int = 0
    """Experts per layer; 0: one plain MLP and no router."""
    experts_per_token: int = 0
    """Experts that one token passes through."""
    extra_parameters: int = 0
    """Parameters beyond the standard parts (a user's own family); counted as active, not as embedding."""
    extra_flops: int = 0
    """Forward matmul FLOPs per token beyond the standard parts (a user's own family)."""


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of one shape. All but `total` count only the experts that one token passes through."""

    active: int
    """N, the default convention: every table and every layer, embeddings included."""
    non_embedding: int
    """`active` without the token table, the position table and an untied head (Kaplan's N)."""
    non_embedding_head: int
    """`non_embedding` plus one vocab x width matrix for the head, tied or not (Porian's N)."""
    total: int
    """Every parameter stored, all experts included."""


def parameter_parts(shape: Shape, *, active: bool = False) -> dict[str, int]:
    """Parameters per kind of part, over all layers; they sum to `Parameters.total` (or `.active`)."""
    s = shape
    query, key_value = s.heads * s.head_dim, s.kv_heads * s.head_dim
    # 1. attention: q, k, v and output, with their biases, and the two gains of qk-norm
    attention = s.width * (query + 2 * key_value) + query * s.width
    attention += (query + 2 * key_value + s.width) if s.attention_bias else 0
    attention += 2 * s.head_dim if s.qk_norm else 0
    # 2. one MLP or expert: the matrices, with their biases
    mlp = s.mlp_matrices * s.width * s.mlp_width
    mlp += ((s.mlp_matrices - 1) * s.mlp_width + s.width) if s.mlp_bias else 0
    # 3. norms: two per layer and the final one
    norm = s.width * (2 if s.norm_bias else 1)
    return {
        "token_table": s.vocab_size * s.width,
        "position_table": s.context * s.width if s.learned_positions else 0,
        "attention": s.depth * attention,
        "mlp": s.depth * mlp * _experts_counted(s, active),
        "router": s.depth * s.width * s.experts,
        "norms": (2 * s.depth + 1) * norm,
        "head": 0 if s.tied else s.vocab_size * s.width,
        "extra": s.extra_parameters,
    }


def parameters(shape: Shape) -> Parameters:
    """The exact parameter counts of `shape` under every convention that the studies use."""
    parts = parameter_parts(shape, active=True)
    active = sum(parts.values())
    tables = parts["token_table"] + parts["position_table"] + parts["head"]
    body = parts["attention"] + parts["mlp"] + parts["router"] + parts["norms"] + parts["extra"]
    assert body + tables == active, "the parts of the parameter count do not add up"
    total = active
    if shape.experts:
        idle = shape.experts - shape.experts_per_token
        total += idle * parts["mlp"] // shape.experts_per_token
        assert total == sum(parameter_parts(shape).values()), "the experts do not add up"
    return Parameters(
        active=active,
        non_embedding=body,
        non_embedding_head=body + shape.vocab_size * shape.width,
        total=total,
    )


def forward_flops(shape: Shape, *, causal: bool = False) -> dict[str, int]:
    """Forward FLOPs per token of every operation, over all layers, at full context.

    `softmax` (3 per score) and `embedding_lookup` (the table as if it were a matmul) follow Hoffmann et al. 2022,
    Appendix F; both are listed for comparison and are not part of the default C. `causal` halves what grows with
    context (scores, values, softmax), the usual convention, which leaves out half of the diagonal.
    """
    s = shape
    query, key_value = s.heads * s.head_dim, s.kv_heads * s.head_dim
    halves = 2 if causal else 1
    flops = {
        "attention_qkv": 2 * s.depth * s.width * (query + 2 * key_value),
        "attention_scores": 2 * s.depth * query * s.context // halves,
        "attention_values": 2 * s.depth * query * s.context // halves,
        "attention_out": 2 * s.depth * query * s.width,
        "mlp": 2 * s.depth * s.mlp_matrices * s.width * s.mlp_width * _experts_counted(s, True),
        "router": 2 * s.depth * s.width * s.experts,
        "extra": s.extra_flops,
        "head": 2 * s.vocab_size * s.width,
        "softmax": 3 * s.depth * s.heads * s.context // halves,
        "embedding_lookup": 2 * s.vocab_size * s.width,
    }
    # Each weight of a matrix is used once per token: one multiply-add, 2 FLOPs. Vectors (norms, biases) are left out.
    parts = parameter_parts(s, active=True)
    vectors = s.depth * (query + 2 * key_value + s.width) if s.attention_bias else 0
    vectors += s.depth * 2 * s.head_dim if s.qk_norm else 0
    if s.mlp_bias:
        vectors += s.depth * _experts_counted(s, True) * ((s.mlp_matrices - 1) * s.mlp_width + s.width)
    weights = parts["attention"] + parts["mlp"] + parts["router"] - vectors
    body = flops["attention_qkv"] + flops["attention_out"] + flops["mlp"] + flops["router"]
    assert body == 2 * weights, "FLOPs and weights of the layers do not agree"
    return flops


def flops_per_token(
    shape: Shape, *, causal: bool = False, head: bool = True, softmax: bool = False, lookup: bool = False
) -> int:
    """Training FLOPs per token, 3 x forward. The defaults are C: GPT-2 124M at 1,024 tokens gives 854,438,400.

    Hoffmann et al. 2022, Appendix F, is `softmax=True, lookup=True`.
    """
    counted = {"head": head, "softmax": softmax, "embedding_lookup": lookup}
    return 3 * sum(n for name, n in forward_flops(shape, causal=causal).items() if counted.get(name, True))


def small_part(sequences: int) -> int:
    """Sequences, of so many in a batch, whose gradient is measured beside that of the whole (`gradient_norm_small`).

    An eighth, at least one: the two-batch estimate of the noise wants batches far apart, and the extra pass is cheap.
    """
    return max(1, sequences // 8)


def flops_6nd(shape: Shape) -> int:
    """Training FLOPs per token by the rule C = 6 N D, with N = `Parameters.active`."""
    return 6 * parameters(shape).active


def _experts_counted(shape: Shape, active: bool) -> int:
    if not shape.experts:
        return 1
    return shape.experts_per_token if active else shape.experts
