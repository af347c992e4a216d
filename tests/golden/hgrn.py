"""HGRN's recurrence of vectors."""

from torch import Tensor

from models.kernels.diagonal import scan


def run(inputs: dict[str, Tensor], params: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    o, final_state = scan(inputs["g"].exp(), inputs["x"], state_B=inputs.get("initial_state"))
    return {"o": o, "final_state": final_state}
