"""NeuTRENO, alone and over ResFormer: whole models with Hugging Face Llama names."""

from torch import Tensor

from models.slots import ValuesConfig
from models.values.neutreno import NeutrenoResFormerValues, NeutrenoValues
from tests.golden.resformer import run_llama


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    mixing = dict(config["mixing"])
    strength = mixing.pop("neutreno_lambda")
    values: ValuesConfig = NeutrenoResFormerValues(strength, **mixing) if mixing else NeutrenoValues(strength)
    return run_llama(inputs, params, config, values)
