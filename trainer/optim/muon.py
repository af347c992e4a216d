"""Muon: steepest descent under the spectral norm for matrices, AdamW for everything else.

What is orthogonalised is always a whole matrix, whatever pieces the ranks hold of it: each of a stack, such as of
experts, one per projection where several are fused into one parameter (`Parts`).
Shape suffixes: S matrices, M rows, N columns.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from models.limits import above_zero
from models.params import ParamSpec, Parts, is_matrices
from parallel.deal import needs_whole, on_whole
from parallel.gradients import Held
from parallel.shards import write
from trainer.optim.adamw import adamw_update, check_moments, first_moments
from trainer.optim.base import OptimConfig, Optimizer, local
from trainer.optim.groups import matches
from trainer.optim.newton_schulz import orthogonalized

if TYPE_CHECKING:
    from parallel.engine import Engine

MOMENTUM = "momentum_buffer"


@dataclasses.dataclass(frozen=True)
class MuonConfig(OptimConfig, kind="muon"):
    """Muon (Jordan et al., 2024; for language models at scale: arXiv 2502.16982), with AdamW for what is no matrix.

    momentum: decay of the average of the gradient. nesterov: the update looks one gradient ahead. ns_steps: iterations
    of the orthogonalisation. adjust_lr: what makes one lr suit all shapes: match_rms_adamw gives every update the root
    mean square `rms`, that of AdamW's, so that both share lr and weight_decay; original is the factor
    sqrt(max(1, rows / columns)). rms: see there. exclude: roles, or patterns of names, of matrices that AdamW takes.
    betas, eps: of AdamW.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    rms: float = 0.2
    exclude: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_moments(self)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must lie in [0, 1), such as 0.95")
        if not 1 <= self.ns_steps < 100:
            raise ValueError(f"ns_steps is {self.ns_steps}; it must lie between 1 and 99, and 5 is usual")
        above_zero(self, "rms", hint=", and 0.2 is AdamW's")

    def patterns(self) -> list[tuple[str, str]]:
        return super().patterns() + [(f"optim.exclude.{i}", pattern) for i, pattern in enumerate(self.exclude)]

    def build(self, engine: "Engine") -> Optimizer:
        return Muon(engine, self)

    def scale(self, rows: int, columns: int) -> float:
        """Factor on the learning rate of a matrix that maps `columns` features to `rows`."""
        if self.adjust_lr == "original":
            return math.sqrt(max(1, rows / columns))
        return self.rms * math.sqrt(max(rows, columns))


class Muon(Optimizer):
    def __init__(self, engine: "Engine", config: MuonConfig) -> None:
        super().__init__(engine, config)
        self.config = config

    def takes(self, held: Held) -> bool:
        """Whether the parameter is orthogonalised."""
        name, spec = held.shard.name, self.setting(held).spec
        return spec.role == "matrix" and not any(matches(pattern, name, spec) for pattern in self.config.exclude)

    def first_state(self, held: Held) -> dict[str, Tensor]:
        own = local(held.parameter)
        return {MOMENTUM: torch.zeros_like(own)} if self.takes(held) else first_moments(own)

    def update(self, held: list[Held], lr: float) -> None:
        matrices = [one for one in held if self.takes(one)]
        adamw_update(self, [one for one in held if not self.takes(one)], lr, self.config.betas, self.config.eps)
        directions = [self.direction(one) for one in matrices]
        for one, change in on_whole(matrices, directions, self.engine.mesh, self.orthogonal, needs_whole):
            setting = self.setting(one)
            # Adam's rule for wider matrices is undone as far as this update grows less with them.
            gain = self.width_gain(setting.spec.factors.width)
            own_lr = lr * setting.lr_scale * gain
            parameter = local(one.parameter)
            parameter.mul_(1 - own_lr * setting.weight_decay / gain)
            parameter.addcmul_(local(change).to(parameter.dtype), local(self.scales(one)), value=-own_lr)

    def width_gain(self, width: float) -> float:
        """Factor on Adam's learning rate for a matrix that has `width` times as many inputs, so that the spectral norm
        of an update stays what it is: Adam's grows in proportion, one of this root mean square as the square root."""
        return width if self.config.adjust_lr == "original" else math.sqrt(width)

    def direction(self, held: Held) -> Tensor:
        """The piece of what is to be orthogonalised: the average gradient, or with nesterov one gradient further.

        In bfloat16, in which the authors of Muon orthogonalise, so that half as much travels; float64 stays.
        """
        average, gradient, config = self.state(held)[MOMENTUM], held.gradient, self.config
        average.lerp_(gradient, 1 - config.momentum)
        ahead = torch.lerp(gradient, average, config.momentum) if config.nesterov else average
        out = torch.empty_like(held.parameter, dtype=None if ahead.dtype == torch.float64 else torch.bfloat16)
        local(out).copy_(ahead)
        return out

    def orthogonal(self, x: Tensor, spec: ParamSpec) -> Tensor:
        """Every matrix of a parameter orthogonalised. x: [M, N], or a stack [S, M, N]."""
        x_SMN = x if is_matrices(spec) else x[None]
        out = torch.empty_like(x_SMN, memory_format=torch.contiguous_format)
        for rows, columns in matrices_of(spec):
            out[:, rows, columns] = orthogonalized(x_SMN[:, rows, columns], self.config.ns_steps)
        return out.view(x.shape)

    def scales(self, held: Held) -> Tensor:
        """What each element's update is multiplied by: shape [1], or the parameter's where projections are fused."""
        spec = held.shard.spec
        scales = []
        for rows, columns in matrices_of(spec):
            size = (rows.stop - rows.start, columns.stop - columns.start)
            scales.append(self.config.scale(*(size[::-1] if is_matrices(spec) else size)))
        if len(set(scales)) == 1:
            return torch.full((1,), scales[0], dtype=held.parameter.dtype, device=local(held.parameter).device)
        whole = torch.empty(spec.shape, dtype=held.parameter.dtype)
        for (rows, columns), scale in zip(matrices_of(spec), scales, strict=True):
            whole[..., rows, columns] = scale
        out = torch.empty_like(held.parameter)
        write(out, held.shard, whole)
        return out


def matrices_of(spec: ParamSpec) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each matrix that a parameter, or each part of a stack, is made of."""
    runs = []
    for axes, size in zip(spec.axes[-2:], spec.shape[-2:], strict=True):
        ends = torch.tensor(axes.sizes if isinstance(axes, Parts) else (size,)).cumsum(0).tolist()
        runs.append([slice(start, end) for start, end in zip([0, *ends], ends, strict=False)])
    for rows in runs[0]:
        for columns in runs[1]:
            yield rows, columns
