"""2:4 sparse training with transposable masks (Hu et al., arXiv 2404.01847; the authors' code: huyz2023/2by4-pretrain).

Both passes see W * m, m of two elements in every four along rows and along columns. The gradient of what they see goes
to all of the dense W (straight through), plus decay * W where m hides it. The mask keeps the largest |W| and is made
anew every few updates; the last part of training is dense.

The dense weights and the mask are the optimiser's state, so that they are sharded, saved and moved to other meshes as
moments are, and neither model nor mesh knows of them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from models.config import LMConfig
from models.limits import at_least
from models.params import ParamSpec
from parallel.deal import needs_whole, on_whole
from parallel.gradients import Held
from trainer.optim.base import local
from trainer.optim.groups import matches, whole_specs
from trainer.sparsity.base import Sparsity, SparsityConfig
from trainer.sparsity.masks import SIDE, transposable

if TYPE_CHECKING:
    from trainer.optim.base import Optimizer

DENSE, MASK, UPDATES = "dense", "mask", "sparse_updates"


@dataclasses.dataclass(frozen=True)
class TransposableConfig(SparsityConfig, kind="transposable"):
    """match: of the model's matrices, those that are sparse: a pattern of names. decay: of hidden weights, added to
    their gradients after clipping; the authors use 6e-5 to 2e-4. refresh: updates from one mask to the next. until:
    updates after which training is dense; null: never. In the paper the last sixth of a run is dense.
    """

    match: str = "*.ffn.*"
    decay: float = 2e-4
    refresh: int = 40
    until: int | None = None

    example = MappingProxyType({"refresh": 1})

    def __post_init__(self) -> None:
        at_least(self, 0, "decay", "until")
        at_least(self, 1, "refresh")

    def patterns(self) -> list[tuple[str, str]]:
        return [("match", self.match)]

    def refuse(self, model: LMConfig) -> None:
        found = {name: spec for name, spec in whole_specs(model).items() if self.takes(name, spec)}
        if not found:
            raise ValueError(f"match is {self.match!r}, and no matrix is called so; '*.ffn.*' are those of FFNs")
        for name, spec in found.items():
            if any(size % SIDE for size in spec.shape[-2:]):
                raise ValueError(
                    f"{name} is {' x '.join(map(str, spec.shape))}, and masks are made of blocks of 4 x 4; use widths "
                    "that are multiples of 4, or a match that leaves it out"
                )

    def takes(self, name: str, spec: ParamSpec) -> bool:
        return spec.role == "matrix" and matches(self.match, name, spec)

    def build(self, optimizer: "Optimizer") -> Sparsity:
        self.refuse(optimizer.engine.config)
        return Transposable(optimizer, self)


class Transposable(Sparsity):
    """State of each sparse parameter: `dense` W; `mask` m, of the same type; how many updates there have been."""

    def __init__(self, optimizer: "Optimizer", config: TransposableConfig) -> None:
        self.optimizer, self.config = optimizer, config
        self.began = False
        mesh = optimizer.engine.mesh
        # Of the masks that the last update made anew: elements that changed, and all of them.
        self.flips = torch.zeros(2, dtype=torch.float64, device=mesh.device)

    def taken(self, parameters: list[Held]) -> list[Held]:
        return [held for held in parameters if self.config.takes(held.shard.name, self.optimizer.setting(held).spec)]

    def first_state(self, held: Held) -> dict[str, Tensor]:
        if not self.taken([held]):
            return {}
        own = local(held.parameter).detach()
        updates = torch.zeros((), dtype=torch.float32, device=own.device)
        return {DENSE: own.clone(), MASK: torch.ones_like(own), UPDATES: updates}

    def sparse(self, updates: float) -> bool:
        return self.config.until is None or updates < self.config.until

    @torch.no_grad()
    def begin(self) -> None:
        """A training's first mask; one that is resumed has its own."""
        self.flips.zero_()
        if self.began:
            return
        self.began = True
        for parameters in self.optimizer.rounds():
            new = [held for held in self.taken(parameters) if self.optimizer.state(held)[UPDATES] == 0]
            if self.sparse(0):
                self.refresh(new)
                self.hide(new)
        # They are no change.
        self.flips.zero_()

    @contextlib.contextmanager
    def updating(self, parameters: list[Held]) -> Iterator[None]:
        taken = self.taken(parameters)
        for held in taken:
            state = self.optimizer.state(held)
            local(held.parameter).copy_(state[DENSE])
            held.gradient.addcmul_(state[DENSE], 1 - state[MASK], value=self.config.decay)
        yield
        due = []
        for held in taken:
            state = self.optimizer.state(held)
            state[DENSE].copy_(local(held.parameter))
            updates = int(state[UPDATES].add_(1))
            if not self.sparse(updates):
                state[MASK].fill_(1)
            elif updates % self.config.refresh == 0:
                due.append(held)
        self.refresh(due)
        self.hide(taken)

    def refresh(self, parameters: list[Held]) -> None:
        """Make masks anew of parameters that hold their dense weights."""
        mesh, values = self.optimizer.engine.mesh, [held.parameter.detach() for held in parameters]
        for held, made in on_whole(parameters, values, mesh, mask_of, needs_whole):
            mask, new = self.optimizer.state(held)[MASK], local(made)
            share = 1 / held.holder(mesh)[1]
            if not held.shard.copy:
                self.flips += share * torch.stack([(new != mask).sum(), torch.full_like(new, 1).sum()]).double()
            mask.copy_(new)

    def hide(self, parameters: list[Held]) -> None:
        for held in parameters:
            state = self.optimizer.state(held)
            torch.mul(state[DENSE], state[MASK], out=local(held.parameter).detach())

    def report(self) -> dict[str, float]:
        flips = self.flips.clone()
        if dist.is_initialized():
            dist.all_reduce(flips)
        changed, count = flips.tolist()
        return {"flip_rate": changed / count} if count else {}


def mask_of(weight: Tensor, spec: ParamSpec) -> Tensor:
    """Of a matrix, or of each matrix of a stack."""
    rows = weight.abs().flatten(0, -2)
    return transposable(rows).to(weight.dtype).view(weight.shape)
