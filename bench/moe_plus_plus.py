"""Forward speed of a MoE++ layer beside a vanilla one of the same size: `python -m bench.moe_plus_plus [--plot FILE]`.

Both are whole layers (router, gating residual, sorting, experts, their sum) of the paper's smaller models, width 768
and experts of 2,048, top 2, in bfloat16. Routers are untrained; a constant channel of the input moves MoE++'s logits
until its FFN experts get the share of picks at which the balance loss is least, tau N_F / (tau N_F + N_Z). The two
sides take turns, for each tau; ratios are those of the rounds' medians. The paper's numbers are of the experts of whole
models on GPUs (arXiv 2410.07348, table 3).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from models.config import LayerConfig, LMConfig
from models.ffn.moe import MoEConfig
from models.ffn.moe_plus_plus import LOGITS, MoEPlusPlus, MoEPlusPlusConfig
from models.mixers.attention import AttentionConfig
from models.params import initialize
from models.routers.mixtral import MixtralConfig
from models.slots import FFN, FFNConfig
from models.state import Side, State

WIDTH, HIDDEN, CLOSE = 768, 2048, 0.01
TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
# Gain in expert throughput, by the number of FFN experts (0.6B, 1B and 2B parameters) and tau.
PAPER = {
    8: (2.645, 1.927, 1.382, 1.252, 1.191),
    16: (2.112, 1.587, 1.301, 1.221, 1.152),
    32: (1.635, 1.443, 1.283, 1.218, 1.157),
}


def build(config: FFNConfig) -> FFN:
    """A middle layer, whose router sees the logits of the one before."""
    model = LMConfig(2, WIDTH, {"M": LayerConfig(AttentionConfig(12), config)}, "MMM")
    module = config.build(model.context(1))
    assert isinstance(module, FFN)
    initialize(nn.ModuleDict({"ffn": module}), seed=0)
    return module.bfloat16()


def aim(module: MoEPlusPlus, x_BTD: Tensor, state: State, side: Side) -> float:
    """Move the weights of the constant channel until the share of FFN picks is as wanted; returns that share."""
    config = module.config
    ffn, free = config.tau * config.num_experts, config.num_total - config.num_experts
    weight, wanted, low, high = module.router.get_parameter("weight"), ffn / (ffn + free), -10.0, 10.0
    share = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        weight[: config.num_experts, 0], weight[config.num_experts :, 0] = middle, 0.0
        residual_BTE = None if module.router_residual is None else module.router_residual(state[LOGITS])
        index_BTK = module.select(module.router(x_BTD), side, residual_BTE).index_BTK
        share = float((index_BTK < config.num_experts).double().mean())
        low, high = (middle, high) if share < wanted else (low, middle)
    if abs(share - wanted) > CLOSE:
        raise RuntimeError(f"tau {config.tau} wants {wanted:.1%} of picks at FFN experts, and {share:.1%} are there")
    return share


def timed(layer: FFN, x_BTD: Tensor, state: State, side: Side) -> float:
    start = time.perf_counter()
    layer(x_BTD, state, side)
    return time.perf_counter() - start


def draw(file: Path, experts: int, ratios: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(TAUS, ratios, "o-", label="here, one layer, CPU")
    axes.plot(TAUS, PAPER[experts], "s--", label="paper, experts, GPU")
    axes.axhline(1, color="gray", linewidth=1)
    axes.set(xlabel="tau", ylabel="times vanilla MoE", xticks=TAUS, title=f"MoE++, {experts} FFN experts, forward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
    pyplot.close(figure)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--experts", type=int, choices=PAPER, default=8, help="FFN experts")
    parser.add_argument("--plot", type=Path, help="picture to draw, .svg or .png")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(1, args.tokens, WIDTH, generator=generator).bfloat16()
    x_BTD[..., 0] = 1
    constants = 6 if args.experts == 32 else 2
    state = {LOGITS: torch.randn(1, args.tokens, args.experts + constants + 2, generator=generator)}
    ids = torch.zeros(1, args.tokens, dtype=torch.int64)
    side = Side(ids, ids)
    vanilla, layers, shares = build(MoEConfig(args.experts, HIDDEN, MixtralConfig())), [], []
    for tau in TAUS:
        layer = build(MoEPlusPlusConfig(args.experts, HIDDEN, num_constant=constants, tau=tau))
        assert isinstance(layer, MoEPlusPlus)
        shares.append(aim(layer, x_BTD, state, side))
        layers.append(layer)
    found: list[list[tuple[float, float]]] = [[] for _ in TAUS]
    for index in track(range(args.rounds + 1), "rounds", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        for layer, pairs in zip(layers, found, strict=True):
            pair = timed(vanilla, x_BTD, state, side), timed(layer, x_BTD, state, side)
            if index:  # the first round warms up
                pairs.append(pair)
    print(f"{args.experts} FFN experts, {args.tokens} tokens, {args.rounds} rounds")
    print("tau   FFN picks   vanilla ms   MoE++ ms   ratio   paper   by the experts' FLOPs")
    ratios = []
    for tau, share, pairs, paper in zip(TAUS, shares, found, PAPER[args.experts], strict=True):
        base, ours = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
        ratios.append(base / ours)
        print(f"{tau:<5} {share:>9.1%} {base:>12.1f} {ours:>10.1f} {ratios[-1]:>7.2f} {paper:>7.2f} {1 / share:>23.2f}")
    if args.plot:
        draw(args.plot, args.experts, ratios)
    return 0


if __name__ == "__main__":
    sys.exit(main())
