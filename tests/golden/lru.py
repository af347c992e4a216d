"""The LRU layer, from a state that it is given. C's columns are C_re and -C_im, next to each other."""

import torch
from torch import Tensor

from models.config import LayerConfig
from models.context import LayerContext
from models.ffn.swiglu import SwiGLUConfig
from models.mixers.lru import LRU, LRUConfig
from tests.models.mixers import run as run_mixer
from tests.models.mixers import side_of


def pairs(tensors: dict[str, Tensor], name: str, sign: int = 1) -> Tensor:
    return torch.stack([tensors[f"{name}_re"], sign * tensors[f"{name}_im"]], -1)


class Layer(torch.nn.Module):
    def __init__(self, mixer: LRU) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTD: Tensor, state_BHS2: Tensor) -> tuple[Tensor, Tensor]:
        cache = {"state": state_BHS2, "documents": torch.zeros(x_BTD.shape[0], 1, dtype=torch.int64)}
        out_BTD, after = run_mixer(self.mixer, x_BTD, side_of(x_BTD.shape[0], x_BTD.shape[1]), cache)
        assert after is not None
        return out_BTD, after["state"]


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    ours = LRUConfig(num_states=config["N"], num_heads=1)
    with torch.device("meta"):
        mixer = ours.build(LayerContext(config["D"], 0, (LayerConfig(ours, SwiGLUConfig(1)),), 1e-6))
    weights = {
        "v.weight": pairs(params, "B").transpose(1, 2).flatten(0, 1),
        "o.weight": pairs(params, "C", sign=-1).flatten(1),
        "ring": torch.stack([params[f"{name}_log"] for name in ("nu", "theta", "gamma")], -1)[None],
        "skip": params["D"],
    }
    weights = {f"mixer.{name}": x for name, x in weights.items()}
    state = pairs(inputs, "h0")[:, None]
    assert isinstance(mixer, LRU)
    y, state = torch.func.functional_call(Layer(mixer), weights, (inputs["x"], state))
    return {"y": y, "final_re": state[:, 0, :, 0], "final_im": state[:, 0, :, 1]}
