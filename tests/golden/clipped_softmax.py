"""The clipped softmax alone."""

from torch import Tensor

from models.kernels.attention.by_blocks import ClippedSoftmax


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    return {"y": ClippedSoftmax(config["gamma"], config["eta"]).weights(inputs["x"])}
