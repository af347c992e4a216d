"""Declared parameters: every learned tensor names its axes, its initialisation and its optimiser role when it is made.

Parallelism reads the axes from outside; initialisation is a pure function of (seed, name), so that every mesh starts
from the same bits. Shape suffixes: D model width, N tokens (any leading dims), O outputs.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.buffers import reset_buffers
from models.kernels.in_float32 import Widening
from models.kernels.of_libraries import Library
from models.kernels.op import FLOAT8, FLOAT32, REFERENCE, without_float8
from models.kernels.rms_norm import rms_norm, rms_norm_rows, rms_norm_torch
from models.limits import check_size


class Init(Protocol):
    """Draws a whole (unsharded) parameter in float32 from a generator of its own."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Normal:
    """Gaussian with mean 0."""

    std: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator) * self.std


@dataclasses.dataclass(frozen=True)
class FanIn:
    """Gaussian with mean 0 and standard deviation 1 / sqrt(fan_in), whatever the model's width."""

    fan_in: int

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(self.fan_in)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Every element equal to `value`."""

    value: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.full(shape, self.value)


@dataclasses.dataclass(frozen=True)
class Axis:
    """A tensor dimension that may be split over ranks, in `groups` equal, contiguous pieces.

    Names with a meaning to `parallel/`: heads, ffn, vocab (tensor axis; must divide), kv_heads (tensor axis; fewer
    groups than ranks are replicated), experts (expert axis), expert_ffn (expert tensor axis).
    """

    name: str
    groups: int


@dataclasses.dataclass(frozen=True)
class Parts:
    """A dimension that holds several projections one after another; each part is split by its own axis."""

    sizes: tuple[int, ...]
    axes: tuple[Axis | None, ...]


@dataclasses.dataclass(frozen=True)
class Factors:
    """What the model's size makes of an optimiser's settings, for one parameter.

    lr, weight_decay, eps: factors on those of an optimiser that normalises elements, as Adam does. width: how many
    times as many inputs the parameter has as in the base model, 1 where their number is fixed; optimisers whose updates
    have another size go by it.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    width: float = 1.0


AS_SET = Factors()
Role = Literal["embedding", "head", "router", "gate", "matrix", "vector"]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What is known about a parameter beyond its values.

    shape: the global shape. axes: one `Axis`, `Parts` or None per dimension. decay: weight decay applies.
    role: what an optimiser may treat apart. embedding and head hold a row per token; router scores experts; gate makes
    coefficients (of decays, connections, skips) rather than features; matrix maps features to features, a stack of them
    per expert; vector is all else: norms, biases, scalars, convolution kernels. wide: its inputs are channels of which
    a wider model has more. factors: see there.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis | Parts | None, ...]
    init: Init
    decay: bool
    role: Role = "matrix"
    wide: bool = False
    factors: Factors = AS_SET


def is_stack(axes: tuple[Axis | Parts | None, ...]) -> bool:
    """Whether a parameter with these axes is one matrix per expert: [experts, inputs, outputs], acting as x @ w."""
    return len(axes) == 3 and isinstance(axes[0], Axis) and axes[0].name == "experts"


def is_matrices(spec: ParamSpec) -> bool:
    """Of a parameter whose role is matrix: whether it is several, [stack, inputs, outputs], each acting as x @ w."""
    return len(spec.shape) == 3


def declare(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    init: Init,
    axes: tuple[Axis | Parts | None, ...] | None = None,
    decay: bool | None = None,
    role: Role | None = None,
    wide: bool | None = None,
) -> None:
    """Register parameter `name` on `module` with its spec.

    Matrices decay by default, vectors do not. Unless it is given, the role is matrix for what decays and is a matrix or
    a stack of them, and vector for the rest; wide is every head, router, gate and matrix.
    Raises ValueError for a 0-d parameter, which FSDP2 cannot shard: use shape (1,), and for one of too many elements.
    """
    check_size(f"parameter {name!r} of shape", *shape)
    if not shape:
        raise ValueError(
            f"parameter {name!r} has no dimension; FSDP2 refuses 0-d parameters, declare it with shape (1,)"
        )
    axes = axes or (None,) * len(shape)
    assert len(axes) == len(shape), (name, shape, axes)
    specs: dict[str, ParamSpec] = module.__dict__.setdefault("param_specs", {})
    decay = decay if decay is not None else len(shape) > 1
    if role is None:
        role = "matrix" if decay and (len(shape) == 2 or is_stack(axes)) else "vector"
    wide = wide if wide is not None else role in ("head", "router", "gate", "matrix")
    specs[name] = ParamSpec(shape, axes, init, decay, role, wide)
    module.register_parameter(name, nn.Parameter(torch.empty(shape)))


def named_specs(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, ParamSpec]]:
    """Yield (qualified name, owning module, attribute, spec) of every declared parameter that is present."""
    for prefix, module in model.named_modules():
        for attribute, spec in module.__dict__.get("param_specs", {}).items():
            if getattr(module, attribute) is not None:
                yield f"{prefix}.{attribute}".lstrip("."), module, attribute, spec


def initial_value(spec: ParamSpec, name: str, seed: int) -> Tensor:
    """The whole initial tensor (float32) of parameter `name`: a function of (seed, name) and nothing else."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return spec.init(spec.shape, generator)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of an unsharded model. Sharded models use `parallel.shards.fill`."""
    for name, module, attribute, spec in named_specs(model):
        parameter = getattr(module, attribute)
        parameter.copy_(initial_value(spec, name, seed))
    reset_buffers(model)


class Linear(Widening):
    """`y_NO = x_ND @ weight_OD.T (+ bias_O)` with declared axes; `axis` splits outputs, `in_axis` inputs."""

    name = "linear"
    reference: ClassVar[Callable[..., Any]] = staticmethod(F.linear)
    others = MappingProxyType(
        {FLOAT32: "models.kernels.in_float32:linear_in_float32", FLOAT8: "models.kernels.float8:float8_linear"}
    )

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        axis: Axis | Parts | None = None,
        in_axis: Axis | Parts | None = None,
        init: Init | None = None,
        bias: bool = False,
        bias_init: Init | None = None,
        role: Role | None = None,
        wide: bool | None = None,
    ) -> None:
        super().__init__()
        declare(self, "weight", (d_out, d_in), init or Normal(0.02), (axis, in_axis), role=role, wide=wide)
        self.bias = None
        if bias:
            del self.bias
            declare(self, "bias", (d_out,), bias_init or Constant(0.0), (axis,))

    def refusal(self, implementation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if implementation == FLOAT8:
            return without_float8(device, dtype)
        return super().refusal(implementation, device, dtype)

    def choose(self, implementation: str) -> None:
        """A matrix is asked for float8; what gates and routers are made of stays as it is."""
        spec: ParamSpec = self.__dict__["param_specs"]["weight"]
        super().choose(REFERENCE if implementation == FLOAT8 and spec.role != "matrix" else implementation)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.call(x_ND, self.weight, self.bias)


class NoOutput(nn.Module):
    """In place of a projection to `width` channels that nobody reads: zeros that take no memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND.new_zeros(1).expand(*x_ND.shape[:-1], self.width)


class RMSNorm(Library):
    """`x * weight / sqrt(mean(x^2) + eps)` over the last dimension (Zhang & Sennrich, arXiv 1910.07467)."""

    name = "rms_norm"
    reference: ClassVar[Callable[..., Any]] = staticmethod(rms_norm_torch)
    automatic: ClassVar[Callable[..., Any]] = staticmethod(rms_norm)
    implementations = MappingProxyType({"rows": rms_norm_rows, "torch": rms_norm_torch})

    weight: nn.Parameter

    def __init__(self, dim: int, eps: float, init: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        declare(self, "weight", (dim,), Constant(init))

    def order(self, device: torch.device) -> tuple[str, ...]:
        return ("rows",) if device.type == "cpu" else ("torch",)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.eps)


def upcast(x: Tensor) -> Tensor:
    """At least float32: bf16 goes up, float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def output_std(num_layers: int, gain: float = 1.0) -> Normal:
    """The initialisation of a branch's last matrix: 0.02 / sqrt(2 L), L the global depth (GPT-2)."""
    return Normal(gain * 0.02 / math.sqrt(2 * num_layers))
