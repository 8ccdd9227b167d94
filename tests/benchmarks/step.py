"""The training step of the gpt2 family against the same step written straight in PyTorch, on one thread.

Run as a program, it prints one JSON line per shape: [width, depth, GFLOP/s of ours, of the plain one, ratio]. GFLOP/s
count 6 N per token. The target is the plain one. The two alternate (A B A B ...), and the ratio is the median of the
ratios of neighbours, so that a machine that slows down meanwhile slows both.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

from measuring import Place, Row, timed

SHAPES = ((64, 4), (128, 6), (256, 8))
CONTEXT, SEQUENCES, VOCABULARY, HEAD = 256, 16, 256, 32
LEAST_SECONDS, LEAST_PAIRS = 4.0, 5


def step(place: Place) -> list[Row]:
    rows = []
    for line in timed([sys.executable, __file__]).output.splitlines():
        width, depth, ours, plain, ratio = json.loads(line)
        rows.append(
            Row(
                what=f"gpt2 step, {width} wide, {depth} layers",
                measured=ours,
                unit="GFLOP/s",
                target=ours / ratio,
                at_least=True,
                note=f"1 thread; plain PyTorch {plain:.1f}",
            )
        )
    return rows


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for width, depth in SHAPES:
        ours, flops = _escala(width, depth)
        plain = _plain(width, depth)
        ours(), plain()
        pairs: list[tuple[float, float]] = []
        while len(pairs) < LEAST_PAIRS or sum(map(sum, pairs)) < LEAST_SECONDS:
            pairs.append((_seconds(ours), _seconds(plain)))
        ratio = statistics.median(b / a for a, b in pairs)
        speeds = [flops / statistics.median(side) / 1e9 for side in zip(*pairs, strict=True)]
        print(json.dumps([width, depth, *speeds, ratio]), flush=True)


def _seconds(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _escala(width: int, depth: int) -> tuple[Callable[[], None], float]:
    """A step as sweeps/training.py takes it, and its FLOPs (6 N D)."""
    import torch
    from torch.nn.functional import cross_entropy

    from sweeps.accounting import Shape, flops_6nd
    from sweeps.cell import Optimizer
    from sweeps.families import FAMILIES, build_model
    from sweeps.optimizers import make_optimizer

    family = FAMILIES["gpt2"]
    heads = width // HEAD
    shape = Shape(
        width=width, depth=depth, heads=heads, kv_heads=heads, head_dim=HEAD, mlp_width=4 * width,
        vocab_size=VOCABULARY, context=CONTEXT, mlp_matrices=2, tied=True, learned_positions=True,
        attention_bias=True, mlp_bias=True, norm_bias=True, qk_norm=False,
    )  # fmt: skip
    model = build_model(family, shape, init_std=0.02, seed=0).train()
    recipe = Optimizer(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)
    optimizer = make_optimizer(model, recipe)
    batch = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT + 1))

    def take() -> None:
        logits = model(batch[:, :-1]).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return take, float(flops_6nd(shape)) * SEQUENCES * CONTEXT


def _plain(width: int, depth: int) -> Callable[[], None]:
    """The same step in the fewest modules: one matrix for queries, keys and values, fused attention, GELU and AdamW."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, tokens, _ = x.shape
            split = self.qkv(self.norm_1(x)).view(batch, tokens, 3, width // HEAD, HEAD)
            query, key, value = split.permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
            return x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCABULARY, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.blocks(self.tokens(x) + self.positions.weight)))

    model = Model()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT + 1))

    def take() -> None:
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return take


if __name__ == "__main__":
    main()
