"""Context parallelism: what a mixer's core gets where ranks hold parts of the sequence.

Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509): every mixer's core sees the whole sequence of its heads. Around `core`
heads are exchanged for tokens and back; projections and merges stay on the rank's share of the sequence.

In place, with `context: ring`: tokens stay where they are. Mixers that can ask the other ranks for what they need
(`Mixer.in_place`): keys and values that go round, states, the tokens in front. The others' cores run by Ulysses.
Shape suffixes: B batch, T sequence (share), H heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.boundary import Core, LocalCore
from models.config import LMConfig
from models.kernels.attention import Softmax
from models.lm import LM
from models.slots import Cache
from models.state import Side
from parallel.collectives import all_to_all, gather
from parallel.mesh import Mesh, MeshConfig
from parallel.ranks import Ranks
from parallel.ring import order
from parallel.sequence import RankSequence

Order = Callable[[int, torch.device], Tensor]


def order_of(mesh: Mesh) -> Order | None:
    """From a length to the place in the sequence of each token (see `Side.order`); None where they lie as they come."""
    if mesh.cp.size == 1 or mesh.config.context != "ring":
        return None
    return lambda length, device: order(length, mesh.cp.size, device)


class InPlaceCore(LocalCore):
    """`core` on this rank's tokens."""

    splits = True

    def __init__(self, cp: Ranks) -> None:
        self.cp = cp

    def __call__(
        self, core: Core, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        assert cache is None, "decoding does not run under context parallelism"
        length = side.tokens.shape[1]
        own = side.ordered(order(length, self.cp.size, side.tokens.device))
        share = length // self.cp.size
        return core(heads, weights, own.narrow(self.cp.index * share, share), None)


class UlyssesCore(LocalCore):
    splits = True

    def __init__(self, cp: Ranks, order: Order | None) -> None:
        self.cp, self.order = cp, order

    def __call__(
        self, core: Core, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        assert cache is None, "decoding does not run under context parallelism"
        moved = {name: gather(x, 1, self.cp) if x.dim() == 2 else self.to_heads(x) for name, x in heads.items()}
        order = None if self.order is None else self.order(side.tokens.shape[1], side.tokens.device)
        if order is not None:
            places = order.argsort()
            moved = {name: x[:, places] for name, x in moved.items()}
        out_BTHV, _ = core(moved, {name: self.rows(weight) for name, weight in weights.items()}, side, None)
        return self.to_tokens(out_BTHV if order is None else out_BTHV[:, order]), None

    def to_heads(self, x_BTH: Tensor) -> Tensor:
        """[B, T, H, ...] to [B, T * cp, H / cp, ...].

        Fewer heads than ranks are repeated, and their gradients add up.
        """
        n, heads = self.cp.size, x_BTH.shape[2]
        if heads % n:
            x_BTH = x_BTH.repeat_interleave(n // heads, 2)
        stacked = x_BTH.unflatten(2, (n, -1)).movedim(2, 0)
        out = all_to_all(stacked, [1] * n, [1] * n, self.cp)
        return out.transpose(0, 1).flatten(1, 2)

    def to_tokens(self, x_BTH: Tensor) -> Tensor:
        """The way back: [B, T * cp, H / cp, ...] to [B, T, H, ...]."""
        n = self.cp.size
        stacked = x_BTH.unflatten(1, (n, -1)).movedim(1, 0)
        out = all_to_all(stacked, [1] * n, [1] * n, self.cp)
        return out.movedim(0, 2).flatten(2, 3)

    def rows(self, weight: Tensor) -> Tensor:
        """The rows of a per-head parameter that belong to this rank's heads."""
        n, heads = self.cp.size, weight.shape[0]
        if heads % n == 0:
            return weight.narrow(0, self.cp.index * (heads // n), heads // n)
        return weight.narrow(0, self.cp.index // (n // heads), 1)


def parallelize(model: LM, mesh: Mesh) -> None:
    if mesh.cp.size == 1:
        return
    order = order_of(mesh)
    for layer in model.blocks:
        branch = layer.mixer.branch
        if order is not None and branch.mixer.in_place:
            branch.mixer.sequence = RankSequence(mesh.cp)
            branch.run_core = InPlaceCore(mesh.cp)
        else:
            branch.run_core = UlyssesCore(mesh.cp, order)


def goes_round(model: LM, mesh: MeshConfig) -> bool:
    """Whether softmax attention is a ring's, in all mixers that have it."""
    mixers = [layer.mixer.branch.mixer for layer in model.blocks]
    having = [mixer for mixer in mixers if any(isinstance(part, Softmax) for part in mixer.modules())]
    return mesh.context == "ring" and bool(having) and all(mixer.in_place for mixer in having)


def exchanging(config: LMConfig, mesh: MeshConfig) -> str | None:
    """One line on the mixers that a ring's ranks cannot leave in place, if there are some."""
    if mesh.context != "ring":
        return None
    with torch.device("meta"):
        blocks = LM(config).blocks
    layers = [layer.index for layer in blocks if not layer.mixer.branch.mixer.in_place]
    kinds = sorted({config.expanded[index].mixer.kind for index in layers})
    if not layers:
        return None
    return f"context=ring: {len(layers)} of {len(blocks)} layers exchange heads for tokens instead ({', '.join(kinds)})"
