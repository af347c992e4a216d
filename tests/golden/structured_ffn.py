"""Structured matrices in place of a dense one, guided by it or not."""

import torch
from torch import Tensor

from models.matrices.base import MatrixConfig
from models.matrices.block_dense import BlockDenseConfig
from models.matrices.block_shuffle import BlockShuffleConfig
from models.matrices.guided import Guided, GuidedConfig
from models.matrices.low_rank import LowRankConfig


def structured(config: dict, params: dict[str, Tensor]) -> tuple[MatrixConfig, dict[str, Tensor]]:
    """Ours, and its weights. Theirs have [outputs, inputs] of each block."""
    if "lr1" in params:
        return LowRankConfig(config["rank"]), {"down.weight": params["lr1"], "up.weight": params["lr2"]}
    if "blkdiag" in params:
        weights = {"blocks": params["blkdiag"].transpose(1, 2), "out.weight": params["lr"]}
        return BlockDenseConfig(config["rank"], config["nblocks"]), weights
    names = {"first": "blkdiag1", "second": "blkdiag2"}
    return BlockShuffleConfig(config["nblocks"]), {ours: params[name].transpose(1, 2) for ours, name in names.items()}


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    ours, weights = structured(config, params)
    bias = {f"{'up.' if 'lr1' in params else 'out.' if 'lr' in params else ''}bias": params["bias"]}
    if config["guided"]:
        ours = GuidedConfig(ours, config["guide_max_step"])
        weights = {f"structured.{name}": weight for name, weight in weights.items()}
        weights |= {"dense.weight": params["guide_linear"]}
        bias = {"bias": params["bias"]}
    matrix = ours.build(config["in_features"], config["out_features"], bias=True).double()
    if config["guided"]:
        assert isinstance(matrix, Guided)
        for _ in range(config["guide_step"]):
            matrix.after_step()
    return {"y": torch.func.functional_call(matrix, {**weights, **bias}, (inputs["x"],), strict=False)}
