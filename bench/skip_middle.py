"""What skipping closed tokens saves on this machine: `python -m bench.skip_middle`.

A model's gates are set to leave a share of the tokens open in the inner half of its layers. Both sides compute the
logits of the same sequences, without gradients: for open tokens alone, and for all of them with their outputs gated.
The sides take turns; the ratio is that of the rounds' medians.
"""

import argparse
import statistics
import sys
import time
from typing import cast
from unittest import mock

import torch
from torch import Tensor

from models import layer
from models.config import LayerConfig, LMConfig
from models.depth.skip_middle import SkipMiddleDepth
from models.ffn.swiglu import SwiGLUConfig
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.norms.peri import PeriNorm
from models.params import Linear, initialize

LAYERS, SEQUENCES, LENGTH = 8, 2, 256
# Float32 sums in another order, over 8 layers.
SAME = 1e-4


def build(tokens_BT: Tensor, share: float) -> LM:
    """All layers are open to all tokens but those from LAYERS / 4 inwards, which are to that share of them."""
    config = LMConfig(
        vocab_size=4096,
        d_model=384,
        layers={"A": LayerConfig(AttentionConfig(num_heads=6), SwiGLUConfig(1024))},
        pattern="A",
        repeat=LAYERS,
        norm=PeriNorm(),
        depth=SkipMiddleDepth(),
    )
    model, scores = LM(config), []
    initialize(model, 0)
    projections = [cast(Linear, model.get_submodule(f"layers.{index}.depth.proj")) for index in range(LAYERS // 2)]
    with torch.no_grad():
        for proj in projections:
            proj.weight.mul_(1e6)  # gates are open or closed, and not between
            cast(Tensor, proj.bias).fill_(-1e9)
        middle = projections[LAYERS // 4]
        hook = middle.register_forward_hook(lambda module, inputs, out: scores.append(out))
        model(tokens_BT)
        hook.remove()
        cast(Tensor, middle.bias).sub_(scores[0].quantile(share))
    return model


def timed(model: LM, tokens_BT: Tensor, gathered: bool) -> tuple[float, Tensor]:
    with torch.no_grad(), mock.patch.object(layer, "worthwhile", lambda: gathered):
        start = time.perf_counter()
        logits = model(tokens_BT).logits
        return time.perf_counter() - start, logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    tokens_BT = torch.randint(4096, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    for share in (0.75, 0.5, 0.25, 0.1):
        model = build(tokens_BT, share)
        gates: list[Tensor] = []
        for block in model.blocks:
            block.depth.register_forward_hook(lambda module, inputs, out, to=gates: to.append(out[0]))
        found = {gathered: [timed(model, tokens_BT, gathered)] for gathered in (False, True)}
        open_ = float((torch.stack(gates[:LAYERS]) > 0).double().mean())
        error = float((found[True][0][1] - found[False][0][1]).abs().max())
        if error > SAME:
            print(f"the logits differ by {error:.1e}: the sides do not compute the same model", file=sys.stderr)
            return 1
        for _ in range(args.rounds):
            for gathered, times in found.items():
                times.append(timed(model, tokens_BT, gathered))
        gated, gathered = (statistics.median(t for t, _ in found[side][1:]) for side in (False, True))
        print(
            f"{open_:.0%} of tokens x layers open: {gated * 1e3:.0f} ms for all, {gathered * 1e3:.0f} ms for the open "
            f"ones, {gated / gathered:.2f} times as fast (logits within {error:.0e})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
