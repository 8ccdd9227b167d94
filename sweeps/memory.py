"""What a training step needs in memory, by arithmetic: so that a batch is cut before it fails, and workers are packed.

    state        weights, gradients and the optimizer's two moments, float32; bfloat16 adds a copy of the matrices
    activations  per token and layer: what the backward pass reads again. Fused attention keeps no scores
    loss         the logits and their gradients, or one chunk of them (sweeps/losses.py)

An estimate: within a factor of 1.5 of what a CPU was seen to take (tests/sweeps/test_memory.py). The failure this
guards against: a cell that ends as out of memory after others have waited for it. Imports nothing heavy.
"""

from dataclasses import dataclass

from sweeps.accounting import Shape, parameters
from sweeps.cell import Cell
from sweeps.errors import InputError

PROCESS_BYTES = {"cpu": 500_000_000, "cuda": 700_000_000}
"""Of a worker before it trains: Python and libraries on the host, or the device's context and its libraries' work."""
LOGITS_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Float32 logits up to this size exist at once; of larger ones so many bytes do (sweeps/losses.py)."""

BESIDE = {"cpu": 1.5, "cuda": 1.1}
"""Times the activations: temporaries, and gaps that the allocator cannot fill. Measured on a CPU."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one training step by what they are for."""

    state: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.state + self.activations + self.loss


def step_bytes(
    shape: Shape, micro_batch: int, precision: str, device: str = "cpu", stack: int = 1, shards: int = 1
) -> StepBytes:
    """Bytes of a training step of `micro_batch` sequences at once, over `stack` members trained as one program; or of
    one of `shards` workers that have a part of the model each."""
    stored = parameters(shape).total
    tokens = micro_batch * shape.context
    short = 2 if precision == "bfloat16" else 4
    # 1. Weights, gradients, two moments; the matrices once more in bfloat16.
    state = stored * (4 * 4 + (2 if short == 2 else 0))
    if shards > 1:  # tables and head, and two layers, are there as a whole with their gradients while they are used
        tables = _tables(shape)
        used = tables + 2 * (stored - tables) // shape.depth
        # autocast's copies of all layers stay until the way back has used them: FSDP2 knows nothing of these
        state = -(-stored * 4 * 4 // shards) + used * 2 * 4 + (stored * 2 if short == 2 else 0)
    # 2. The residual stream at the start, then the layers.
    activations = tokens * (shape.depth * layer_bytes_per_token(shape, precision, stack) + 4 * shape.width)
    # 3. Logits, their log-softmax and the gradients of both; in chunks, with the gradients of hidden states and head.
    limit = LOGITS_BYTES[device]
    whole = stack * tokens * shape.vocab_size * 4
    loss = 3 * whole + (whole // 2 if short == 2 else 0)
    if whole > limit:
        loss = 3 * limit + stack * 4 * shape.width * (2 * tokens + shape.vocab_size)
    return StepBytes(stack * state, round(stack * activations * BESIDE[device]), loss)


def layer_bytes_per_token(shape: Shape, precision: str, stack: int = 1) -> int:
    """Bytes that one layer keeps of one token for the way back."""
    s, short = shape, 2 if precision == "bfloat16" else 4
    query, key_value = s.heads * s.head_dim, s.kv_heads * s.head_dim
    # 1. Two norms: what goes in (the residual stream) and comes out; without a bias also what the gain multiplies.
    norms = 2 * s.width * (4 + short + (0 if s.norm_bias else 4))
    # 2. Attention: queries, keys and values; what comes out, as it is and in the order of the output matrix.
    attention = short * (query + 2 * key_value + 2 * query) + 4 * s.heads
    if s.qk_norm:
        attention += (4 + short) * (query + key_value)
    # 3. The MLP: before and after the activation; with a gate, its product with up as well.
    mlp = short * s.mlp_width * (4 if s.mlp_matrices == 3 else 2)
    if s.experts:  # each token's experts, their inputs and weighted outputs, and the router's weights
        mlp = s.experts_per_token * (mlp + 4 * 4 * s.width) + 8 * s.experts
        if stack > 1:  # and a copy of their matrices: what `vmap` takes of the library (sweeps/attention.py)
            mlp += short * s.experts_per_token * s.mlp_matrices * s.width * s.mlp_width
    # 4. Under autocast every matrix keeps a bfloat16 copy of its own of what goes in.
    casts = 2 * s.width * (s.mlp_matrices + 2) if short == 2 else 0
    return norms + attention + mlp + casts


def choose_micro_batch(
    shape: Shape,
    sequences: int,
    precision: str,
    bytes_available: int,
    *,
    device: str = "cpu",
    stack: int = 1,
    shards: int = 1,
) -> int:
    """Sequences a forward pass: all of a batch, or the most that fit, in parts as equal as they can be.

    InputError where not even one sequence fits.
    """

    def fits(count: int) -> bool:
        return step_bytes(shape, count, precision, device, stack, shards).total <= bytes_available

    if fits(1):
        return max(filter(fits, part_sizes(sequences)))
    needed = step_bytes(shape, 1, precision, device, stack, shards).total
    what = f"a stack of {stack} models" if stack > 1 else f"a {shards}th of a model" if shards > 1 else "a model"
    raise InputError(
        f"{what} of {parameters(shape).total:,} parameters does not fit: one sequence of {shape.context:,} tokens "
        f"needs about {needed / 1e9:.3g} GB, and {bytes_available / 1e9:.3g} GB are free for this worker. Use fewer "
        f"workers, {'a smaller stack, ' if stack > 1 else ''}a shorter context, a smaller size, or a device with more "
        "memory."
    )


def part_sizes(sequences: int) -> set[int]:
    """Micro-batches: divisors, and where these leave gaps of a factor of two, parts that are equal but for the last."""
    equal = {-(-sequences // parts) for parts in range(1, sequences + 1)}
    divisors = {count for count in equal if sequences % count == 0}
    return divisors | {count for count in equal if not any(count / 2 < one <= count for one in divisors)}


def demand(shape: Shape, sequences: int, precision: str, *, device: str = "cpu", stack: int = 1) -> int:
    """Bytes that a worker wants for cells of this shape, its process included: the whole batch at once."""
    return PROCESS_BYTES[device] + step_bytes(shape, sequences, precision, device, stack).total


def allocator_share(share: float, device_bytes: int) -> float:
    """Of a process's share of a device of so many bytes what its allocator may take, as a share of the device: the
    device's context, which the allocator does not count, has its place there too."""
    return max(share / 2, share - PROCESS_BYTES["cuda"] / device_bytes)


def workers_for(cell: Cell, gpu_bytes: int, gpus_per_node: int) -> int:
    """How many GPUs of a node a cell needs: one where a sequence of it fits, else the fewest that hold it in parts.

    `gpu_bytes`: of one GPU, what its process may take. InputError where a whole node does not hold it, or where it
    cannot be parted: an optimizer of whole matrices. A trainer of one's own has one, of which nothing is known.
    """
    free, shape = gpu_bytes - PROCESS_BYTES["cuda"], cell.shape

    def needs(workers: int) -> int:
        return step_bytes(shape, 1, cell.precision, "cuda", shards=workers).total

    if cell.trainer or needs(1) <= free:
        return 1
    most = min(gpus_per_node, cell.sequences) if cell.optimizer.name == "adamw" else 1
    for workers in range(2, most + 1):
        if needs(workers) <= free:
            return workers
    parts = f"{most} GPUs of a node" if most > 1 else f"one GPU, and {cell.optimizer.name} trains no parts of a model"
    raise InputError(
        f"a model of {parameters(shape).total:,} parameters does not fit on {parts}: it would need about "
        f"{needs(max(1, most)) / 1e9:.3g} GB of each, and {free / 1e9:.3g} GB are free. Lower its size or its context, "
        "use adamw, or name nodes with more or larger GPUs."
    )


def _tables(shape: Shape) -> int:
    """Parameters that are in no layer, but for the last norm's."""
    parts = parameters(shape)
    return parts.active - parts.non_embedding
