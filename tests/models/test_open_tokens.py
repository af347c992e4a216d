"""Without gradients, a branch runs for the open tokens alone, and computes what the gated form does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.config import LMConfig
from models.lm import LM
from models.params import initialize
from parallel.engine import Batch, Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import build, plain

KINDS: dict[str, dict[str, Any]] = {
    "attention": {},
    "window": {"mixer": {**plain("mixer", "attention"), "window": 3}},
    "delta": {"mixer": "gated_deltanet", "norm": "peri"},
    "mla": {"mixer": "mla"},
    "moe": {"ffn": "moe", "residual": "hyper"},
    "router_entries": {"ffn": "moe_plus_plus", "values": "resformer"},
    "floor": {"depth": {"kind": "skip_middle", "key_floor": 0.01}},
    "ungated_keys": {"depth": "skip_middle_ungated_keys"},
}


def gated(**fields: Any) -> LMConfig:
    return build(**{"depth": "skip_middle", **fields})


def spread(config: LMConfig) -> LM:
    """A model whose gates are shut for many tokens and half open for others."""
    model = LM(config).double()
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 3.0 if "depth.proj.weight" in name else 0.2
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tokens(rows: int = 3, length: int = 10) -> Tensor:
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(3))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_is_the_gated_form(fields: dict[str, Any]) -> None:
    """With gradients tokens are gated, without them gathered: packed, padded, and decoded token by token."""
    model, x = spread(gated(**fields)), tokens()
    documents = torch.tensor([[0] * 10, [0] * 4 + [1] * 6, [0] * 7 + [-1] * 3])
    positions = torch.tensor([[*range(10)], [*range(4), *range(6)], [*range(7), 0, 0, 0]])
    packed = {"documents_BT": documents, "positions_BT": positions}
    whole, parts = model(x).logits, model(x, **packed).logits
    with torch.no_grad():
        close(model(x).logits, whole)
        close(model(x, **packed).logits[documents >= 0], parts[documents >= 0])
        out = model(x[:, :4], positions_BT=torch.arange(4).expand(3, 4), cache={})
        close(out.logits, whole[:, :4])
        for t in range(4, 10):
            out = model(x[:, t : t + 1], positions_BT=torch.full((3, 1), t), cache=out.cache)
            close(out.logits[:, 0], whole[:, t])


class Counted:
    """Counts the tokens that run through a linear map of each branch."""

    def __init__(self, model: LM) -> None:
        self.seen: list[int] = []
        for layer in model.blocks:
            for module in (layer.mixer.branch.get_submodule("mixer.q"), layer.ffn.branch.get_submodule("ffn.down")):
                module.register_forward_hook(self.count)

    def count(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        self.seen.append(out.numel() // out.shape[-1])


def test_closed_tokens_do_not_run() -> None:
    """A row alone: each branch sees as many tokens as its gate leaves open, and decoding a closed one computes none."""
    model, x = spread(gated()), tokens(1)
    gates: list[Tensor] = []
    for layer in model.blocks:
        layer.depth.register_forward_hook(lambda module, args, out: gates.append(out[0]))
    counted = Counted(model)
    model(x)
    assert counted.seen == [10] * 8
    with torch.no_grad():
        counted.seen.clear()
        model(x)
        open_ = [int((gate > 0).sum()) for gate in gates[:4]]
        assert counted.seen == [count for count in open_ for _ in range(2)]
        assert 0 < min(open_) < 10
        counted.seen.clear()
        cache: dict[str, dict[str, Tensor]] | None = {}
        for t in range(10):
            cache = model(x[:, t : t + 1], positions_BT=torch.full((1, 1), t), cache=cache).cache
    assert sum(counted.seen) == 2 * sum(open_)
    assert cache is not None and [cache[str(index)]["k"].shape[1] for index in range(4)] == open_


def evaluated(mesh_config: MeshConfig, ffn: str) -> tuple[float, int]:
    """The evaluation of one batch on a mesh, whose ranks need not have equally many open tokens."""
    mesh, config = Mesh(mesh_config), gated(ffn=ffn)
    engine = Engine(config, mesh, seed=0, dtype=torch.float64)
    engine.load_full_state(spread(config).state_dict())
    x = tokens(4).chunk(mesh.data_size)[mesh.data_rank]
    return engine.evaluate(Batch(x, x))


@pytest.mark.parametrize("mesh", ["tp=2", "cp=2", "fsdp=2,ep=2", "pp=2,schedule=zbv"])
def test_evaluation_on_a_mesh(mesh: str, pool: Pool) -> None:
    config = MeshConfig.parse(mesh)
    ffn = "moe" if config.ep > 1 else "swiglu"
    x = tokens(4)
    expected = float(spread(gated(ffn=ffn))(x, x).token_loss)
    for loss, count in pool.run(evaluated, config.world_size, config, ffn, timeout=120):
        assert count == x.numel() and abs(loss - expected) < 1e-11 * expected
