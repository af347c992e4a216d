"""Expert parallelism: rows travel to the rank that owns their expert and back. Only FFN picks reach a dispatcher.

Shape suffixes: M rows, E experts, D model width.
"""

import itertools

import torch
from torch import Tensor

from models.ffn.dispatch import LocalDispatch, Rowwise, inverse
from models.ffn.groups import Grouped, Peers
from models.ffn.routed import RoutedFFN
from models.lm import LM
from models.params import upcast
from parallel.collectives import all_gather
from parallel.context import Order, order_of
from parallel.exchange import Direct, Exchange, TwoLevel
from parallel.mesh import Mesh
from parallel.ranks import Ranks


class SpreadDispatch(LocalDispatch):
    """Experts are dealt out in order: rank r owns E/ep of them. Empty ranks still join every exchange.

    chunks: pieces of the rows, of which one is computed while others are under way.
    """

    def __init__(self, exchange: Exchange, chunks: int) -> None:
        self.exchange, self.chunks = exchange, chunks

    def __call__(self, x_MD: Tensor, expert_M: Tensor, experts: Rowwise) -> Tensor:
        bounds = [round(index * len(x_MD) / self.chunks) for index in range(self.chunks + 1)]
        spans = [slice(*span) for span in itertools.pairwise(bounds)]
        routes = [self.exchange.route(expert_M[span], experts.num_local) for span in spans]
        flights = [route.legs[0].start(x_MD[span]) for route, span in zip(routes, spans, strict=True)]
        for leg in range(1, len(routes[0].legs)):
            flights = [route.legs[leg].start(flight.wait()) for route, flight in zip(routes, flights, strict=True)]
        returning = []
        for route, flight in zip(routes, flights, strict=True):
            local_E = torch.arange(experts.num_local, device=x_MD.device)
            ids = local_E.repeat(self.exchange.size).repeat_interleave(route.counts_RE.flatten())
            returning.append(route.legs[-1].start_back(super().__call__(flight.wait(), ids, experts)))
        for leg in range(len(routes[0].legs) - 1, 0, -1):
            returning = [
                route.legs[leg - 1].start_back(flight.wait().index_select(0, inverse(route.legs[leg].before)))
                for route, flight in zip(routes, returning, strict=True)
            ]
        back = [
            flight.wait().index_select(0, inverse(route.legs[0].before))
            for route, flight in zip(routes, returning, strict=True)
        ]
        return torch.cat(back) if len(back) > 1 else back[0]


class PartsDispatch(SpreadDispatch):
    """Of every expert each of `etp` neighbouring ranks holds a part of the width: a row goes to all of them, and what
    they make of it adds up."""

    def __init__(self, exchange: Exchange, chunks: int, etp: int) -> None:
        super().__init__(exchange, chunks)
        self.etp = etp

    def __call__(self, x_MD: Tensor, expert_M: Tensor, experts: Rowwise) -> Tensor:
        local = experts.num_local
        group_M, own_M = expert_M // local, expert_M % local
        rank_MP = group_M[:, None] * self.etp + torch.arange(self.etp, device=expert_M.device)
        number_MP = rank_MP * local + own_M[:, None]
        y_MD = super().__call__(x_MD.repeat_interleave(self.etp, 0), number_MP.flatten(), experts)
        return upcast(y_MD).unflatten(0, (-1, self.etp)).sum(1).to(y_MD.dtype)


class RankPeers(Peers):
    """`ranks` hold the same groups' tokens. rows: how many different sets of rows they hold; ranks that share one hold
    its sequence in order, or in that of `order`, and are numbered side by side."""

    def __init__(self, ranks: Ranks, rows: int, order: Order | None) -> None:
        self.ranks, self.rows, self.order = ranks, rows, order

    def sum(self, x: Tensor) -> Tensor:
        return self.ranks.sum_(x.clone())

    def gather(self, x_BT: Tensor) -> Tensor:
        parts = all_gather(x_BT[None], 0, self.ranks).unflatten(0, (self.rows, -1))
        whole_BT = parts.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return whole_BT if self.order is None else whole_BT[:, self.order(whole_BT.shape[1], x_BT.device).argsort()]

    def own(self, x_BT: Tensor) -> Tensor:
        count = self.ranks.size // self.rows
        row, index = divmod(self.ranks.index, count)
        if self.order is not None:
            x_BT = x_BT[:, self.order(x_BT.shape[1], x_BT.device)]
        return x_BT.chunk(self.rows, 0)[row].chunk(count, 1)[index]


def dispatch(mesh: Mesh) -> SpreadDispatch:
    """The way of rows on this mesh."""
    exchange = TwoLevel(mesh.near_experts, mesh.far_experts) if mesh.config.ep_local > 1 else Direct(mesh.ep)
    chunks = mesh.config.ep_chunks
    return SpreadDispatch(exchange, chunks) if mesh.etp == 1 else PartsDispatch(exchange, chunks, mesh.etp)


def parallelize(model: LM, mesh: Mesh) -> None:
    """Give every module that dispatches rows, or looks at groups of tokens, the version of this mesh.

    Tensor ranks share a row's tokens, but where a model gives each a stream of its own: there it has all of them.
    """
    ranked = [s.branch for layer in model.blocks for s in (layer.mixer, layer.ffn) if s.by_rank is not None]
    alone = {module for branch in ranked for module in branch.modules()}
    order = order_of(mesh)
    for module in model.modules():
        if isinstance(module, RoutedFFN) and mesh.ep.size > 1:
            module.dispatch = dispatch(mesh)
        if isinstance(module, Grouped):
            row, everyone = (mesh.cp, mesh.data) if module in alone else (mesh.sequence, mesh.stage)
            sequence = module.group == "sequence"
            module.peers = RankPeers(row if sequence else everyone, 1 if sequence else mesh.data_size, order)
