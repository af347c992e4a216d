"""Triton's kernels on this GPU, beside plain torch: `python -m bench.kernels`.

For each operation at the sizes of a 1.3B model: whether outputs and gradients in bfloat16 are plain torch's in float32,
the time of both passes, and the bandwidth that comes of the bytes which the operation must move.
"""

import dataclasses
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.kernels.combine.reference import Free
from models.kernels.handover.reading import Reading
from models.kernels.normed_product.reference import normed_product
from models.kernels.stream_mix.reference import stream_mix
from models.params import RMSNorm

TOKENS, WIDTH = 16384, 2048
# bfloat16 keeps 8 digits: sums of products of rounded operands are within this of the largest of their kind.
CLOSE = 2.0**-6
ROUNDS, WARMUP = 20, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """call: (implementation, *leaves) -> outputs. moved: elements of bfloat16, 2 bytes, that both passes must move;
    without leaves there is only one."""

    op: str
    what: str
    leaves: tuple[Tensor, ...]
    call: Callable[..., Any]
    moved: int


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)


def cases() -> Iterator[Case]:
    n, d, wide = TOKENS, WIDTH, {"dtype": torch.float32}
    for ways, count in ((4, 8), (4, 24), (1, 24)):
        leaves = (draw(n, ways, count, **wide), *(draw(n, d) for _ in range(count)))
        moved = (3 * count + 2 * ways) * n * d
        yield Case("depth_mix", f"{ways} ways of {count}", leaves, lambda call, w, *x: call(list(x), w), moved)
    read = (draw(n, 4, d), draw(n, 4, 1))
    yield Case("stream_mix", "read of 4", read, lambda call, x, m: call(x, m), (3 * 4 + 2) * n * d)
    write = (draw(n, 4, d), draw(n, 4, 4), draw(n, 1, d), draw(n, 1, 4))
    yield Case("stream_mix", "write of 4", write, lambda call, *x: call(*x), (3 * 5 + 2 * 4) * n * d)
    layer = (draw(n, 4, d), draw(d, 6), draw(d), draw(d))
    yield Case("normed_product", "LayerNorm, 6 columns", layer, lambda call, *x: call(*x, 1e-5), 4 * 4 * n * d)
    flat = (draw(n, 4 * d), draw(4 * d, 24), draw(4 * d))
    yield Case("normed_product", "RMSNorm, 24 columns", flat, lambda call, *x: call(*x, None, 1e-6), 4 * 4 * n * d)
    streams = (*write, draw(4, 1, **wide), draw(1, **wide))
    # The streams once, and behind them the backward passes of a write, of a product and of a read.
    moved = (2 * 4 + 2 + (2 * 5 + 4) + 3 * 4 + (2 * 4 + 1)) * n * d
    yield Case("handover", "LayerNorm, 6 columns", (*streams, *layer[1:]), handed, moved)
    yield Case("handover", "RMSNorm, 24 columns", (*streams, *flat[1:]), handed, moved)
    step = (draw(n, d, **wide), draw(n, d), draw(d, **wide))
    yield Case("grid_add", "a step and its norm", step, stepped, (2 + 1 + 2 + 1 + 2 + 1 + 2 + 2 + 1) * n * d)
    logits = (draw(n, 4, 4, **wide),)
    yield Case("sinkhorn", "20 iterations", logits, lambda call, x: call(x, 20), 2 * 5 * n * 16)
    gate = (draw(n, 12, **wide), draw(n, 12, **wide))
    yield Case("masked_gate", "2 of 12", gate, lambda call, x, y: picked(call(x, y, 2, 11)), 2 * 10 * n * 12)
    for experts in (8, 64):
        index = torch.randint(experts, (1, 2 * n), device="cuda")
        yield Case("queues", f"{experts} experts", (), lambda call, q=index, e=experts: call(q, e), 4 * 2 * 2 * n)
    # Sorted by 8 experts, as in training.
    places = torch.randint(8, (2 * n,), device="cuda").argsort(stable=True).argsort().view(n, 2)
    rows = (draw(n, d),)
    yield Case("permute", "2 picks", rows, lambda call, x: call(x, places, 2 * n), 2 * (1 + 2) * n * d)
    leaves = (draw(2 * n, d), draw(n, 2, **wide))
    moved = (3 * 2 + 2) * n * d
    yield Case("combine", "2 picks", leaves, lambda call, y, w: call(y, w, places), moved)
    shares = (draw(n, d), draw(n, 1, **wide), draw(n, 2, **wide), draw(2, d))
    moved = (3 * 2 + 5) * n * d
    every = (*leaves, *shares)
    yield Case("combine", "and 2 constants", every, lambda call, y, w, *x: call(y, w, places, Free(*x)), moved)


def handed(call: Callable[..., Any], *leaves: Tensor) -> list[Tensor]:
    *written, static, scale, columns, weight = leaves[:8]
    bias = leaves[8] if len(leaves) > 8 else None
    stride = 1 if bias is not None else len(columns) // WIDTH + 1

    def settle(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        used = logits[..., :1] if bias is not None else logits[..., : stride * len(static) : stride, None]
        return (static + scale * used).sigmoid().to(written[0].dtype), {}

    operands = (normed_product, columns, weight, bias, 1e-5, static, scale, "sigmoid", stride, bias is None)
    return list(call(*written, False, Reading(*operands), settle, stream_mix)[:2])


def stepped(call: Callable[..., Any], x: Tensor, added: Tensor, weight: Tensor) -> list[Tensor]:
    norm = RMSNorm(len(weight), 1e-6)
    del norm.weight
    norm.weight = weight  # type: ignore[assignment]
    return list(call(x, (added,), 1.0, 14, norm))


def picked(made: tuple[Tensor, ...]) -> list[Tensor]:
    total, probs, _, weights = made
    return [total, probs, weights]


def outputs(case: Case, call: Callable[..., Any], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    outs = case.call(call, *leaves)
    return [outs] if isinstance(outs, Tensor) else list(outs)


def differentiated(outs: list[Tensor], leaves: tuple[Tensor, ...], grads: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outs, leaves, grads) if leaves else ()


def gradients(outs: list[Tensor]) -> list[Tensor]:
    """The same for the same shapes."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(x.shape, device="cuda", generator=generator).to(x.dtype) for x in outs]


def off(case: Case, ours: Callable[..., Any], reference: Callable[..., Any]) -> float:
    """The largest difference, relative to the largest element of its tensor."""
    found = []
    for call, leaves in (
        (ours, case.leaves),
        (reference, tuple(x.detach().float().requires_grad_() for x in case.leaves)),
    ):
        outs = outputs(case, call, leaves)
        found.append([*outs, *differentiated(outs, leaves, gradients(outs))])
    return max(float((a.float() - b.float()).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


def seconds(case: Case, call: Callable[..., Any]) -> float:
    """The median of both passes."""
    grads, times = gradients(outputs(case, call, case.leaves)), []
    for index in range(ROUNDS + WARMUP):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        differentiated(outputs(case, call, case.leaves), case.leaves, grads)
        ended.record()
        torch.cuda.synchronize()
        if index >= WARMUP:
            times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times)


def main() -> int:
    if not torch.cuda.is_available():
        print("bench.kernels measures a GPU, and this machine has none", file=sys.stderr)
        return 2
    table = Table("operation", "off", "triton", "torch", "compiled", "bandwidth", title=torch.cuda.get_device_name())
    wrong = []
    for case in cases():
        module = f"models.kernels.{case.op}"
        ours = getattr(importlib.import_module(f"{module}.triton"), case.op)
        plain = getattr(importlib.import_module(f"{module}.reference"), case.op)
        distance = off(case, ours, plain)
        if not distance < CLOSE:
            wrong.append(f"{case.op}, {case.what}: {distance:.1e}")
        times = [seconds(case, call) for call in (ours, plain, torch.compile(plain))]
        bandwidth = 2 * case.moved / times[0] / 1e12
        milliseconds = [f"{1e3 * t:.3f} ms" for t in times]
        table.add_row(f"{case.op}, {case.what}", f"{distance:.0e}", *milliseconds, f"{bandwidth:.2f} TB/s")
    Console().print(table)
    for line in wrong:
        print(f"not plain torch's: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
