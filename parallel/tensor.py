"""Tensor parallelism with sequence parallelism, from the axes that parameters declare.

Outside branches every rank works on its share of the tokens. A branch gathers them on entry, works on its own heads or
hidden columns, and its partial sum is reduce-scattered on exit. Head and embedding split the vocabulary.
Shape suffixes: B batch, T sequence, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.boundary import Boundary
from models.kernels.linear_cross_entropy import WholeVocabulary, linear_cross_entropy
from models.lm import LM
from models.params import Axis
from models.pieces import Part, split
from models.state import Layout, Side, State, Views
from models.tensor_group import TensorGroup
from parallel.collectives import all_gather, gather, scatter_sum, sum_all
from parallel.context import Order, order_of
from parallel.mesh import Mesh
from parallel.ranks import Ranks


class TensorBoundary(Boundary):
    """Gather on entry, reduce-scatter on exit, along the sequence. Entries laid out over heads are already whole; what
    a mixer made by head of its own tokens becomes all tokens of this rank's heads."""

    def __init__(self, tp: Ranks, over_heads: frozenset[str]) -> None:
        self.tp, self.over_heads = tp, over_heads

    def enter(self, views: Views, inputs: State, by_head: State) -> tuple[Views, State]:
        return views.map(lambda view: gather(view, 1, self.tp)), self.gathered(inputs, by_head)

    def gathered(self, inputs: State, by_head: State) -> State:
        gathered = {k: x if k in self.over_heads else gather(x, 1, self.tp) for k, x in inputs.items()}
        for name, x_BTH in by_head.items():
            heads = x_BTH.shape[2]
            first, length, _ = split(Axis("kv_heads", heads), heads, self.tp.index, self.tp.size)
            gathered[name] = gather(x_BTH, 1, self.tp).narrow(2, first, length)
        return gathered

    def exit(self, out_BTD: Tensor) -> Tensor:
        return scatter_sum(out_BTD, 1, self.tp)

    def side(self, side: Side) -> Side:
        assert side.window is not None
        _, length = side.window
        return side.narrow(-self.tp.index * length, length * self.tp.size)


class RankBoundary(TensorBoundary):
    """Of branches that a model defines for each tensor rank: views and outputs are the rank's own, over all tokens."""

    def enter(self, views: Views, inputs: State, by_head: State) -> tuple[Views, State]:
        return views, self.gathered(inputs, by_head)

    def exit(self, out_BTD: Tensor) -> Tensor:
        return out_BTD

    def gate(self, gate_BT: Tensor, out: Tensor) -> Tensor:
        return super().gate(gather(gate_BT, 1, self.tp), out)


class TensorRanks(TensorGroup):
    """The tensor ranks' exchanges outside branches."""

    def __init__(self, tp: Ranks) -> None:
        self.tp, self.size, self.index = tp, tp.size, tp.index

    def all_tokens(self, x_BT: Tensor) -> Tensor:
        return gather(x_BT, 1, self.tp)

    def own_tokens(self, x_BT: Tensor) -> Tensor:
        return x_BT.chunk(self.tp.size, 1)[self.tp.index]

    def sum(self, x: Tensor) -> Tensor:
        return sum_all(x, self.tp)

    def sum_own(self, x_BT: Tensor) -> Tensor:
        return scatter_sum(x_BT, 1, self.tp)


class VocabLookup:
    """Each rank looks up its rows of the vocabulary for the group's tokens; the sum is scattered over the sequence."""

    def __init__(self, tp: Ranks) -> None:
        self.tp = tp

    def __call__(self, weight_VD: Tensor, tokens_BT: Tensor) -> Tensor:
        return scatter_sum(self.own(weight_VD, all_gather(tokens_BT, 1, self.tp)), 1, self.tp)

    def own(self, weight_VD: Tensor, tokens_BT: Tensor) -> Tensor:
        """This rank's rows, and zeros for other ranks' tokens."""
        ids = tokens_BT - self.tp.index * weight_VD.shape[0]
        mine = (ids >= 0) & (ids < weight_VD.shape[0])
        return F.embedding(ids.where(mine, 0), weight_VD) * mine[..., None].to(weight_VD.dtype)


class SplitVocabulary(WholeVocabulary):
    """Each rank has the logits of its `size` rows of the vocabulary, for all tokens of the group."""

    def __init__(self, tp: Ranks, size: int) -> None:
        self.tp, self.offset = tp, tp.index * size

    def join(self, own_C: Tensor, picked_C: Tensor) -> tuple[Tensor, Tensor]:
        own_RC, picked_RC = all_gather(torch.stack((own_C, picked_C))[None], 0, self.tp).unbind(1)
        return own_RC.logsumexp(0), picked_RC.sum(0)

    def rescale(self, p_CV: Tensor, own_C: Tensor, all_C: Tensor) -> None:
        p_CV.mul_((own_C - all_C).exp()[:, None])


class VocabCrossEntropy:
    """Cross-entropy over a split vocabulary.

    Returns the sum over this rank's own tokens; its gradient covers the group's: each rank differentiates the sum of
    all ranks' shares with respect to its own logits.
    """

    def __init__(self, tp: Ranks) -> None:
        self.tp = tp

    def __call__(self, h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
        all_targets = all_gather(targets_BT, 1, self.tp)
        own = torch.zeros_like(all_targets, dtype=torch.bool)
        own.narrow(1, self.tp.index * targets_BT.shape[1], targets_BT.shape[1]).fill_(True)
        h_ND = gather(h_BTD, 1, self.tp).flatten(0, 1)
        vocabulary = SplitVocabulary(self.tp, weight_VD.shape[0])
        return linear_cross_entropy(h_ND, weight_VD, all_targets.flatten(), vocabulary, own.flatten())


def over_heads(model: LM) -> frozenset[str]:
    """The entries that lie over heads, by name."""
    entries = [entry for layer in model.blocks for _, writes in layer.events() for entry in writes]
    return frozenset(entry.name for entry in entries if entry.layout is Layout.HEADS)


def parallelize(model: LM, mesh: Mesh, heads: frozenset[str]) -> None:
    """Set every branch's boundary and the vocabulary's ends; `heads`: see `over_heads` of the whole model."""
    tp, cp = mesh.tp, mesh.cp
    if mesh.config.stream_ranks > 1:
        model.shard = TokenShard(Ranks() if mesh.config.overlap else tp, cp, order_of(mesh))
    if tp.size == 1 or mesh.config.overlap:
        return
    for layer in model.blocks:
        for sublayer in (layer.mixer, layer.ffn):
            if sublayer.by_rank is not None:
                sublayer.boundary, sublayer.by_rank.held = RankBoundary(tp, heads), Part(tp.index, tp.size)
            elif sublayer.branch.entry == "gathered":
                sublayer.boundary = TensorBoundary(tp, heads)
    for module in model.modules():
        if isinstance(getattr(module, "group", None), TensorGroup):
            module.__dict__["group"] = TensorRanks(tp)
    for vocabulary in (model.embed, model.head):
        if vocabulary is not None:
            vocabulary.lookup, vocabulary.cross_entropy = VocabLookup(tp), VocabCrossEntropy(tp)


class TokenShard:
    """This rank's window of the sequence, or of an order of its tokens: context ranks first, tensor ranks inside."""

    def __init__(self, tp: Ranks, cp: Ranks, order: Order | None) -> None:
        self.count, self.index, self.order = cp.size * tp.size, cp.index * tp.size + tp.index, order

    def __call__(self, side: Side) -> Side:
        length, rest = divmod(side.tokens.shape[1], self.count)
        assert rest == 0, "the engine pads the sequence to a multiple of cp x tp"
        if self.order is not None:
            side = side.ordered(self.order(side.tokens.shape[1], side.tokens.device))
        return side.narrow(self.index * length, length)
