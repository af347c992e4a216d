"""Expert parallelism: rows travel to the rank that owns their expert and back. Only FFN picks reach a dispatcher.

Shape suffixes: N tokens, K picks of a token, P rows or parts of a pick's expert, E experts, D model width.
"""

import itertools

import torch
from torch import Tensor

from models.ffn.dispatch import LocalDispatch, Rowwise
from models.ffn.groups import Grouped, Peers
from models.ffn.routed import RoutedFFN
from models.kernels.opaque import varying
from models.kernels.picks import of_picks
from models.lm import LM
from parallel.collectives import all_gather
from parallel.context import Order, order_of
from parallel.exchange import Direct, Exchange, TwoLevel
from parallel.mesh import Mesh
from parallel.ranks import Ranks


class SpreadDispatch(LocalDispatch):
    """Experts are dealt out in order: rank r owns E/ep of them. Empty ranks still join every exchange. Rows return in
    the order in which they were sent.

    chunks: pieces of the tokens, of which one's rows are computed while others are under way.
    """

    def __init__(self, exchange: Exchange, chunks: int) -> None:
        super().__init__()
        self.exchange, self.chunks = exchange, chunks

    def forward(
        self, x_ND: Tensor, index_NK: Tensor, keep_NK: Tensor | None, experts: Rowwise
    ) -> tuple[Tensor, Tensor]:
        return varying(self.spread, x_ND, index_NK, keep_NK, experts)

    def spread(self, x_ND: Tensor, index_NK: Tensor, keep_NK: Tensor | None, experts: Rowwise) -> tuple[Tensor, Tensor]:
        local, number_NK = experts.num_local, self.exchange.numbers(index_NK, experts.num_local)
        bounds = [round(index * len(x_ND) / self.chunks) for index in range(self.chunks + 1)]
        pieces = []
        for span in (slice(*span) for span in itertools.pairwise(bounds)):
            keep = None if keep_NK is None else keep_NK[span]
            pieces.append(self.arrange(x_ND[span], number_NK[span], keep, local * self.exchange.size))
        routes = [self.exchange.route(counts, local) for _, _, counts in pieces]
        flights = [route.legs[0].start(x_PD) for route, (x_PD, _, _) in zip(routes, pieces, strict=True)]
        for leg in range(1, len(routes[0].legs)):
            flights = [route.legs[leg].start(flight.wait()) for route, flight in zip(routes, flights, strict=True)]
        returning = []
        for route, flight in zip(routes, flights, strict=True):
            local_E = torch.arange(local, device=x_ND.device)
            ids = local_E.repeat(self.exchange.size).repeat_interleave(route.counts_RE.flatten())
            y_PD, places_P1 = super().forward(flight.wait(), ids[:, None], None, experts)
            returning.append(route.legs[-1].start_back(of_picks(y_PD, places_P1).squeeze(1)))
        for leg in range(len(routes[0].legs) - 1, 0, -1):
            returning = [
                route.legs[leg - 1].start_back(route.legs[leg].landed_back(flight))
                for route, flight in zip(routes, returning, strict=True)
            ]
        back = [route.legs[0].landed_back(flight) for route, flight in zip(routes, returning, strict=True)]
        places, first = [], 0
        for y_PD, (_, places_NK, _) in zip(back, pieces, strict=True):
            places.append(places_NK.where(places_NK < 0, places_NK + first))
            first += len(y_PD)
        return (torch.cat(back), torch.cat(places)) if len(back) > 1 else (back[0], places[0])


class PartsDispatch(SpreadDispatch):
    """Of every expert each of `etp` neighbouring ranks holds a part of the width: a row goes to all of them, and what
    they make of it adds up."""

    def __init__(self, exchange: Exchange, chunks: int, etp: int) -> None:
        super().__init__(exchange, chunks)
        self.etp = etp

    def forward(
        self, x_ND: Tensor, index_NK: Tensor, keep_NK: Tensor | None, experts: Rowwise
    ) -> tuple[Tensor, Tensor]:
        local = experts.num_local
        group_NK, own_NK = index_NK // local, index_NK % local
        rank_NKP = group_NK[..., None] * self.etp + torch.arange(self.etp, device=index_NK.device)
        number_NKP = rank_NKP * local + own_NK[..., None]
        keep = None if keep_NK is None else keep_NK.repeat_interleave(self.etp, 1)
        return super().forward(x_ND, number_NKP.flatten(1), keep, experts)


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
