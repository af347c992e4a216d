"""Compile every Triton kernel for a GPU that is not here, as far as machine code: `python -m tests.kernels.ahead`.

Prints one line per kernel. Kernels are launched as in training, on CPU tensors, with a launch that only compiles.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from models.kernels.combine.reference import Free
from models.kernels.combine.triton import combine
from models.kernels.depth_mix.triton import depth_mix
from models.kernels.grid_add.triton import grid_add
from models.kernels.handover.reading import Reading
from models.kernels.handover.triton import handover
from models.kernels.masked_gate.triton import masked_gate
from models.kernels.normed_product.triton import normed_product
from models.kernels.permute.triton import permute
from models.kernels.queues.triton import queues
from models.kernels.sinkhorn.triton import sinkhorn
from models.kernels.stream_mix.triton import stream_mix
from models.params import RMSNorm

TARGET = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes of shared memory that a program may have there


class NoDevice:
    """A driver that knows what to compile for, and cannot run it."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiling:
    """In the place of `JITFunction.run`."""

    def __init__(self) -> None:
        self.run, self.sizes = JITFunction.run, dict[str, list[int]]()

    def install(self) -> None:
        def run(function: Any, *args: Any, **kwargs: Any) -> Any:
            kernel = self.run(function, *args, **{**kwargs, "warmup": True})
            if kernel.metadata.shared > SHARED:
                raise ValueError(f"{function.__name__} needs {kernel.metadata.shared} bytes of shared memory")
            self.sizes.setdefault(function.__name__, []).append(len(kernel.asm["cubin"]))
            return kernel

        JITFunction.run = run


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def both_passes(outs: Tensor | list[Tensor]) -> None:
    outs = [outs] if isinstance(outs, Tensor) else outs
    torch.autograd.backward(outs, [torch.zeros_like(out) for out in outs])


def first(count: int, logits: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Every second of so many."""
    assert logits is not None
    return logits[..., :count:2].to(torch.bfloat16), {}


def launch_all() -> None:
    """Every kernel, in the types of training: bfloat16 with float32 weights."""
    weights = {"dtype": torch.float32}
    both_passes(depth_mix([draw(8, 2048) for _ in range(5)], draw(8, 4, 5, **weights)))
    both_passes(stream_mix(draw(8, 4, 2048), draw(8, 4, 4), draw(8, 1, 2048), draw(8, 1, 4)))
    both_passes(normed_product(draw(32, 2048), draw(2048, 6), draw(2048), draw(2048), 1e-5))
    # Those of mHC, and of mHC-lite with the most streams that it takes.
    both_passes(normed_product(draw(8, 8192), draw(8192, 24), draw(8192), None, 1e-6))
    both_passes(normed_product(draw(8, 3072), draw(3072, 732), draw(3072), None, 1e-6))
    total, probs, _, weight = masked_gate(draw(8, 12, **weights), draw(8, 12, **weights), 2, 11)
    both_passes([total, probs, weight])
    places = torch.arange(16).view(8, 2)
    free = Free(draw(8, 2048), draw(8, 1, **weights), draw(8, 2, **weights), draw(2, 2048))
    for added in (None, free):
        both_passes(combine(draw(16, 2048), draw(8, 2, **weights), places, added))
    both_passes(permute(draw(8, 2048), places, 16))
    queues(places % 8, 8)
    both_passes(sinkhorn(draw(8, 4, 4, **weights), 20))
    norm = RMSNorm(2048, 1e-6).bfloat16()
    for added in (), (draw(8, 2048),), (draw(8, 2048), draw(8, 2048)):
        out, normed = grid_add(draw(8, 2048, **weights), added, 1.0, 14, norm)
        assert normed is not None
        both_passes([out, normed])
    streams = draw(32, 4, 2048), draw(32, 4, 4), draw(32, 1, 2048), draw(32, 1, 4), True
    small = draw(4, 1, **weights), draw(1, **weights)
    rows = Reading(normed_product, draw(2048, 6), draw(2048), draw(2048), 1e-5, *small, "tanh", 1)
    both_passes(list(handover(*streams, rows, lambda x: (x[..., :1].to(torch.bfloat16), {}), stream_mix)[:2]))
    # One and eight streams of fractions.
    for rows, ways in (4, 4), (64, 8):
        logits = ways * (1 + rows // ways) + ways
        fractions = Reading(
            normed_product, draw(256, logits), draw(256), None, 1e-6, draw(rows, ways, **weights), small[1], "tanh", 2
        )
        written = draw(32, rows, 256), draw(32, rows, rows), draw(32, ways, 256), draw(32, ways, rows), False
        settle = functools.partial(first, 2 * ways)
        both_passes(list(handover(*written, fractions, settle, stream_mix)[:2]))
    flat = Reading(normed_product, draw(8192, 24), draw(8192), None, 1e-6, *small, "sigmoid", 5, flat=True)
    many = Reading(normed_product, draw(8192, 732), draw(8192), None, 1e-6, *small, "sigmoid", 1, flat=True)
    both_passes(list(handover(*streams, many, lambda x: (x[..., :4, None].to(torch.bfloat16), {}), stream_mix)[:2]))
    both_passes(list(handover(*streams, flat, lambda x: (x[..., :20:5, None].to(torch.bfloat16), {}), stream_mix)[:2]))


def main() -> None:
    driver.set_active(NoDevice())
    compiling = Compiling()
    compiling.install()
    launch_all()
    for name, sizes in compiling.sizes.items():
        print(f"{name}: {', '.join(map(str, sizes))} bytes for sm_{TARGET.arch}, Triton {triton.__version__}")


if __name__ == "__main__":
    main()
