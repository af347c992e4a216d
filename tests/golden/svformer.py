"""SVFormer: whole models with Hugging Face Llama names, in which only the first layer projects values."""

from torch import Tensor

from models.values.svformer import SVFormerValues
from tests.golden.resformer import run_llama


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    return run_llama(inputs, params, config, SVFormerValues())
