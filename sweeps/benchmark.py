"""The training step of the gpt2 family against the same step written straight in PyTorch: python -m sweeps.benchmark

Needs torch and transformers alone. On a GPU both sides are compiled, where there are compilers, in bfloat16, at 124 M
and 350 M parameters; 10 M and 30 M follow alone, and stacks of 1 M, 10 M and 30 M against their members one by one. A
batch that does not fit is halved, for both sides. On a CPU neither is compiled, on one thread, at the widths 64, 128
and 256. Sides alternate (A B A B ...) and a ratio is the median of neighbours' ratios, so that a machine that slows
down slows both.

FLOPs of MFU: C of sweeps/accounting.py, three times the forward matmuls with the head and full (not causal) attention.
GFLOP/s beside it are of 6 N per token.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from sweeps.accounting import Shape, flops_6nd, flops_per_token, parameters
from sweeps.attention import drop_mask
from sweeps.cell import Optimizer
from sweeps.compiling import can_compile
from sweeps.devices import peak_flops
from sweeps.families import FAMILIES, build_model
from sweeps.losses import Loss, MeanLoss
from sweeps.stacking import Solo, Stack, precision

RECIPE = Optimizer(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)
LEAST_SECONDS, LEAST_PAIRS = 4.0, 5
GPU_STEPS = 10
"""Steps between two looks at the clock of a GPU."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """One shape of the gpt2 family with the sequences of a step."""

    width: int
    depth: int
    head: int
    vocabulary: int
    context: int
    sequences: int
    members: int = 1
    """Of a stack."""

    @property
    def shape(self) -> Shape:
        heads = self.width // self.head
        return Shape(
            width=self.width, depth=self.depth, heads=heads, kv_heads=heads, head_dim=self.head,
            mlp_width=4 * self.width, vocab_size=self.vocabulary, context=self.context, mlp_matrices=2, tied=True,
            learned_positions=True, attention_bias=True, mlp_bias=True, norm_bias=True, qk_norm=False,
        )  # fmt: skip

    def tokens(self, device: torch.device) -> torch.Tensor:
        return torch.randint(self.vocabulary, (self.sequences, self.context + 1), device=device)


CPU = (Setting(64, 4, 32, 256, 256, 16), Setting(128, 6, 32, 256, 256, 16), Setting(256, 8, 32, 256, 256, 16))
GPU_PAIRS = (Setting(768, 12, 64, 50_304, 1024, 32), Setting(1024, 24, 64, 50_304, 1024, 16))
GPU_ALONE = (Setting(320, 8, 64, 4096, 512, 64), Setting(512, 9, 64, 4096, 512, 64))
GPU_STACKS = (
    Setting(128, 5, 32, 256, 256, 16, members=32),
    Setting(320, 8, 64, 4096, 512, 16, members=8),
    Setting(512, 9, 64, 4096, 512, 16, members=4),
)


@dataclass(frozen=True)
class Result:
    """Medians of one setting; what was not measured is None."""

    width: int
    depth: int
    parameters: int
    tokens_per_second: float
    gflops: float
    """By 6 N per token, in 1e9 a second."""
    mfu: float | None
    sequences: int
    """Of a step, of each member."""
    members: int
    other_gflops: float | None
    """Of the plain step, or of a stack's members one by one."""
    ratio: float | None
    """The speed over the other's."""


class Block(nn.Module):
    """A transformer block in the fewest modules: one matrix for queries, keys and values, fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        hidden: torch.Tensor = self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))
        return x + hidden


class PlainModel(nn.Module):
    """GPT-2 with its loss, from tokens (sequences, context + 1)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.tokens, self.positions = nn.Embedding(shape.vocab_size, width), nn.Embedding(shape.context, width)
        self.blocks = nn.Sequential(*(Block(width, shape.heads) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.blocks(self.tokens(tokens[:, :-1]) + self.positions.weight))
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


def plain_step(setting: Setting, device: torch.device) -> Step:
    """The step of the straight model."""
    model, tokens = PlainModel(setting.shape).to(device), setting.tokens(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss: Loss = torch.compile(model, dynamic=False) if _compiles(device) else model
    amplify = precision(_precision(device), device)

    def take() -> None:
        with amplify:
            value = loss(tokens)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return take


def escala_step(setting: Setting, device: torch.device) -> Step:
    """The step as sweeps/training.py takes it."""
    model = _model(setting, device)
    loss: Loss = MeanLoss(model)
    if _compiles(device):
        loss = torch.compile(loss, dynamic=False)
    return _step(Solo(model, RECIPE, loss), setting.tokens(device)[None], device)


def stacked_step(setting: Setting, device: torch.device) -> Step:
    """A step of all members as one program."""
    models = [_model(setting, device) for _ in range(setting.members)]
    batches = torch.stack([setting.tokens(device) for _ in models])
    return _step(Stack(models, [RECIPE] * len(models)), batches, device)


def _model(setting: Setting, device: torch.device) -> nn.Module:
    model = build_model(FAMILIES["gpt2"], setting.shape, init_std=0.02, seed=0)
    if device.type == "cuda":
        drop_mask(model)  # as sweeps/models.py does
    return model.to(device).train()


def _step(program: Solo | Stack, batches: torch.Tensor, device: torch.device) -> Step:
    amplify = precision(_precision(device), device)

    def take() -> None:
        program.backward(batches, batches.shape[1], amplify)
        program.table.step(range(len(batches)))

    return take


def _compiles(device: torch.device) -> bool:
    return device.type == "cuda" and can_compile(device)


def _precision(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def measure(setting: Setting, device: torch.device, *, against_plain: bool) -> Result:
    """Time the steps of one setting: a stack against one of its members, or Escala's step, alone or against the plain
    one, in turn."""
    if setting.members > 1:
        sides = [stacked_step(setting, device), escala_step(setting, device)]
    else:
        sides = [escala_step(setting, device), *([plain_step(setting, device)] if against_plain else [])]
    for side in sides * 2:
        side()
    rounds: list[tuple[float, ...]] = []
    while len(rounds) < LEAST_PAIRS or sum(map(sum, rounds)) < LEAST_SECONDS:
        ours, *other = (_seconds(side, device) for side in sides)
        rounds.append((ours / setting.members, *other))
    seconds = [statistics.median(column) for column in zip(*rounds, strict=True)]
    shape, tokens = setting.shape, setting.sequences * setting.context
    speed, work = tokens / seconds[0], flops_6nd(shape) / 1e9
    peak = peak_flops(torch.cuda.get_device_name(device), "bfloat16") if device.type == "cuda" else None
    return Result(
        width=setting.width,
        depth=setting.depth,
        parameters=parameters(shape).total,
        tokens_per_second=speed,
        gflops=speed * work,
        mfu=speed * flops_per_token(shape) / peak if peak else None,
        sequences=setting.sequences,
        members=setting.members,
        other_gflops=tokens / seconds[1] * work if len(sides) > 1 else None,
        ratio=statistics.median(other / ours for ours, other in rounds) if len(sides) > 1 else None,
    )


def _seconds(step: Step, device: torch.device) -> float:
    """Of one step on average."""
    steps = GPU_STEPS if device.type == "cuda" else 1
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / steps


def results(device: torch.device) -> Iterator[Result]:
    """Every setting of a device, one after another."""
    for setting in CPU if device.type == "cpu" else GPU_PAIRS:
        yield fitting(setting, lambda one: measure(one, device, against_plain=True))
    for setting in () if device.type == "cpu" else (*GPU_ALONE, *GPU_STACKS):
        yield fitting(setting, lambda one: measure(one, device, against_plain=False))


def fitting(setting: Setting, take: Callable[[Setting], Result]) -> Result:
    """What `take` finds of a setting, with as many of its sequences as the device holds: half where it runs out."""
    while True:
        torch.compiler.reset()  # torch compiles one function a few times in a process, and then leaves it eager
        gc.collect()  # what is left of the setting before lies in cycles
        try:
            return take(setting)
        except torch.OutOfMemoryError:
            if setting.sequences == 1:
                raise
        setting = replace(setting, sequences=setting.sequences // 2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sweeps.benchmark", description="Time the training step.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="Print one JSON object a line.")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no GPU here. Leave it out, or install a torch for this GPU.")
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    if not arguments.json:
        name = "CPU, one thread, float32, eager"
        if device.type == "cuda":
            name = torch.cuda.get_device_name() + ("" if _compiles(device) else ", eager: no C compiler or no triton")
        print(f"{name}. torch {torch.__version__}. MFU by C: 3 x forward matmuls, head and full attention included.")
    for one in results(device):
        print(json.dumps(asdict(one)) if arguments.json else _line(one), flush=True)


def _line(one: Result) -> str:
    size = f"gpt2 {one.width} x {one.depth}, {one.parameters / 1e6:.3g} M parameters, {one.sequences} sequences"
    size, other = (f"{size}, {one.members} stacked", "one by one") if one.members > 1 else (size, "plain PyTorch")
    parts = [f"{one.tokens_per_second:,.0f} tokens/s", f"{one.gflops:,.1f} GFLOP/s (6 N D)"]
    parts += [f"MFU {one.mfu:.1%}"] if one.mfu is not None else []
    parts += [f"{one.ratio:.2f} x {other} ({one.other_gflops:,.1f})"] if one.ratio is not None else []
    return f"{size}: {', '.join(parts)}"


if __name__ == "__main__":
    main()
