"""A plug-in that does not do what it declares is stopped where it would otherwise be wrong in silence."""

import dataclasses

import pytest
import torch
from torch import Tensor

from models.context import LayerContext
from models.layer import Layer, joined
from models.lm import LM
from models.params import Linear, initialize
from models.slots import FFN, FFNConfig
from models.state import Result, Side, State
from parallel.mesh import MeshConfig
from parallel.preflight import refuse
from tests.contract.tiny import build


def ffn_with(loss: str | None, declared: bool) -> None:
    """Register the kind "probe": an unsplit matrix that returns `loss` and says has_losses = `declared`."""

    class Probe(FFN):
        entry = "tokens" if declared or loss else "gathered"
        has_losses = declared

        def __init__(self, ctx: LayerContext) -> None:
            super().__init__()
            self.matrix = Linear(ctx.d_model, ctx.d_model)

        def forward(self, x_BTD: Tensor, inputs: State, side: Side) -> Result:
            return Result(self.matrix(x_BTD), losses={} if loss is None else {loss: x_BTD.sum()})

    @dataclasses.dataclass(frozen=True)
    class ProbeConfig(FFNConfig, kind="probe"):
        """A probe."""

        def build(self, ctx: LayerContext) -> FFN:
            return Probe(ctx)


@pytest.mark.parametrize(
    ("loss", "declared", "message"),
    [
        ("mine", False, "layer 0 says has_losses=False and returns ['mine']"),
        (None, True, "layer 0 says has_losses=True and returns no losses"),
    ],
)
def test_losses_are_not_lost(loss: str | None, declared: bool, message: str, forget: None) -> None:
    ffn_with(loss, declared)
    model = LM(build(ffn={"kind": "probe"}, depth={"kind": "skip_middle", "controller": {"kind": "fixed"}}))
    initialize(model, 0)
    x = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError) as error:
        model(x, x)
    assert message in str(error.value)


def test_losses_of_one_name_are_added() -> None:
    layer = LM(build()).layers["0"]
    assert isinstance(layer, Layer)
    one = torch.ones(())
    assert joined(layer, (True, {"mine": one}), (False, {}), (True, {"mine": 2 * one})) == {"mine": 3 * one}


def test_a_gathered_branch_that_nothing_splits_is_refused_under_tp(forget: None) -> None:
    ffn_with(None, False)
    config = build(ffn={"kind": "probe"})
    refuse(config, MeshConfig(fsdp=2))
    with pytest.raises(ValueError, match="Probe of layer 0 names no axis that tp can split"):
        refuse(config, MeshConfig(tp=2))


def test_whole_tokens_without_parts_are_refused_where_ranks_have_streams(forget: None) -> None:
    ffn_with("mine", True)
    with pytest.raises(ValueError, match="probe runs on whole tokens and does not say by_part"):
        refuse(build(ffn={"kind": "probe"}, residual={"kind": "desync", "ranks": 2}), MeshConfig())
