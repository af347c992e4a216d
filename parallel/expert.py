"""Expert parallelism: rows travel to the rank that owns their expert and back. Only FFN picks reach a dispatcher.

Shape suffixes: M rows, E experts, D model width.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from models.ffn.balance import Grouped, LocalReduce
from models.ffn.dispatch import LocalDispatch
from models.ffn.experts import Experts
from models.ffn.routed import RoutedFFN
from models.lm import LM
from parallel.collectives import all_to_all
from parallel.mesh import Mesh, Ranks


class AllToAllDispatch(LocalDispatch):
    """Experts are dealt out in order: rank r owns E/ep of them. Empty ranks still join every exchange."""

    def __init__(self, ep: Ranks) -> None:
        self.ep = ep

    def __call__(self, x_MD: Tensor, expert_M: Tensor, experts: Experts) -> Tensor:
        local = experts.num_local
        order = expert_M.argsort(stable=True)
        counts_E = torch.bincount(expert_M, minlength=local * self.ep.size)
        theirs_E = torch.empty_like(counts_E)
        dist.all_to_all_single(theirs_E, counts_E, group=self.ep.group)
        send, receive = (c.view(self.ep.size, local).sum(1).tolist() for c in (counts_E, theirs_E))
        ids = torch.arange(local, device=x_MD.device).repeat(self.ep.size).repeat_interleave(theirs_E)
        rows = all_to_all(x_MD[order], receive, send, self.ep)
        back = all_to_all(super().__call__(rows, ids, experts), send, receive, self.ep)
        return back[order.argsort()]


class GroupReduce(LocalReduce):
    """Sums statistics over the ranks of their group."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, counts: Tensor) -> Tensor:
        return self.ranks.sum_(counts.clone())


def parallelize(model: LM, mesh: Mesh) -> None:
    """Give every module that dispatches or reduces statistics the version of this mesh."""
    for module in model.modules():
        if mesh.ep.size > 1 and isinstance(module, RoutedFFN):
            module.dispatch = AllToAllDispatch(mesh.ep)
        if isinstance(module, Grouped):
            module.reduce = GroupReduce(mesh.sequence if module.stats_group == "sequence" else mesh.stage)
