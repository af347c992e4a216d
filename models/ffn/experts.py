"""SwiGLU experts: many whose rows are grouped, and one that every token takes.

Shape suffixes: M rows, N tokens, E experts (those held here, or parts of them), D model width, F expert width.
"""

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.grouped_mm import GroupedMM
from models.params import Axis, Linear, Normal, declare


class Experts(nn.Module):
    """`down_e (silu(gate_e x) * up_e x)` for each row's expert e. Weights act as x @ w."""

    def __init__(self, num_experts: int, d_model: int, hidden: int, output_init: Normal) -> None:
        super().__init__()
        self.grouped_mm = GroupedMM(d_model, hidden)
        experts, ffn = Axis("experts", num_experts), Axis("expert_ffn", hidden)
        self.gate: nn.Parameter
        self.up: nn.Parameter
        self.down: nn.Parameter
        declare(self, "gate", (num_experts, d_model, hidden), Normal(0.02), (experts, None, ffn))
        declare(self, "up", (num_experts, d_model, hidden), Normal(0.02), (experts, None, ffn))
        declare(self, "down", (num_experts, hidden, d_model), output_init, (experts, ffn, None))

    @property
    def num_local(self) -> int:
        """Experts held here: all of them, or this rank's share."""
        return self.gate.shape[0]

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """x_MD: rows sorted by local expert. counts_E: rows of each local expert, or of each of as many equal parts of
        each one's width as there are counts to an expert. Returns [M, D]."""
        gate, up, down = self.gate, self.up, self.down
        parts = counts_E.shape[0] // gate.shape[0]
        if parts > 1:
            gate, up = (w.unflatten(2, (parts, -1)).movedim(2, 1).flatten(0, 1) for w in (gate, up))
            down = down.unflatten(1, (parts, -1)).flatten(0, 1)
        product = self.grouped_mm.call
        h_MF = F.silu(product(x_MD, gate, counts_E)) * product(x_MD, up, counts_E)
        return product(h_MF, down, counts_E)


@dataclasses.dataclass(frozen=True)
class ExpertParts:
    """Experts, each as `count` experts of an equal part of its width: part p of expert e is number e * count + p."""

    experts: Experts
    count: int

    @property
    def num_local(self) -> int:
        return self.experts.num_local * self.count

    def __call__(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        return self.experts(x_MD, counts_E)


class SharedExpert(nn.Module):
    """One SwiGLU that every token takes (DeepSeekMoE, arXiv 2401.06066). No mesh splits it: it is whole on each rank,
    because an FFN that routes works on the rank's own tokens."""

    def __init__(self, d_model: int, hidden: int, output_init: Normal) -> None:
        super().__init__()
        axis = Axis("expert_ffn", hidden)
        self.gate = Linear(d_model, hidden, axis=axis)
        self.up = Linear(d_model, hidden, axis=axis)
        self.down = Linear(hidden, d_model, in_axis=axis, init=output_init)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_ND)) * self.up(x_ND))
