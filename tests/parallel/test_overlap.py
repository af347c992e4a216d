"""Sums over tensor ranks that are under way while the next branch computes."""

from typing import Any
from unittest import mock

import pytest
import torch

from configs.structure import instantiate, to_plain
from models.branches import FFNBranch, MixerBranch
from models.config import LMConfig
from models.state import Result
from parallel import check
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import build, plain
from tests.parallel.order import Computed, beside, flights

LADDER = build(residual="ladder")
MIXED = build(
    pattern="ADAD",
    repeat=1,
    layers={
        "A": {"mixer": plain("mixer", "attention"), "ffn": plain("ffn", "swiglu")},
        "D": {"mixer": plain("mixer", "gated_deltanet"), "ffn": plain("ffn", "moe")},
    },
    residual="ladder",
    values="resformer",
    tie_embeddings=True,
)
UPPER_HALF = build(residual={"kind": "ladder", "layers": [2, 3]}, norm="none")


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (LADDER, "tp=4"),
        (UPPER_HALF, "tp=2"),
        (build(residual="ladder", shortcut="laurel", mixer="gla"), "tp=2"),
        (MIXED, "tp=2"),
        (MIXED, "tp=2,cp=2,context=ring"),
        (MIXED, "tp=2,ep=2,fsdp=2,reshard=false"),
        (MIXED, "tp=2,pp=2,schedule=zbv"),
        (MIXED, "fsdp=2,tp=2,pp=2,schedule=interleaved"),
    ],
)
def test_equals_one_process(config: LMConfig, mesh: str, pool: Pool) -> None:
    report = check.run(config, MeshConfig.parse(f"{mesh},overlap=true"), None, pool, timeout=120)
    assert report.ok, report.wrong[:10]


def order(plain_config: dict[str, Any], mesh_config: MeshConfig) -> tuple[list[str], list[str]]:
    """What happens in a forward pass and in a backward pass, in order: sums launched and landed, branches computed."""
    config: LMConfig = instantiate(LMConfig, plain_config)
    engine = Engine(config, Mesh(mesh_config), seed=0, dtype=torch.float64)
    seen: list[str] = []

    def noted(forward: Any) -> Any:
        def run(*args: Any) -> Result:
            result = forward(*args)
            return result._replace(out_BTD=Computed.apply(result.out_BTD, seen))

        return run

    with (
        flights(seen),
        mock.patch.object(MixerBranch, "forward", noted_method(MixerBranch, noted)),
        mock.patch.object(FFNBranch, "forward", noted_method(FFNBranch, noted)),
    ):
        tokens = torch.arange(16)[None] % config.vocab_size
        loss = engine.models[0](tokens, tokens).loss
        forward = list(seen)
        seen.clear()
        assert loss is not None
        loss.backward()
    return forward, seen


def noted_method(kind: Any, noted: Any) -> Any:
    honest = kind.forward
    return lambda self, *args: noted(lambda *rest: honest(self, *rest))(*args)


def test_every_sum_but_the_ends_is_under_way_beside_a_branch(pool: Pool) -> None:
    """Forward: a sum is launched, another branch computes, the sum lands. Backward: the same of gradients, in the other
    direction. The first and last branches have no other one beside them."""
    for passes in pool.run(order, 2, to_plain(LADDER), MeshConfig(tp=2, overlap=True)):
        for seen in passes:
            found = beside(seen)
            assert len(found) == 8 and min(found[1:-1]) >= 1, seen


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"residual": "plain"},
            "overlap is true, and residual plain adds a branch's output at once; use another residual, such as ladder,",
        ),
        ({"norm": "peri"}, "layer 0 has a norm behind its mixer, which needs the whole sum; use norm pre"),
        ({"scaling": "rezero"}, "scaling rezero multiplies"),
        ({"shortcut": "pangu"}, "shortcut pangu adds"),
        ({"depth": "skip_middle"}, "depth skip_middle works on the rank's own tokens"),
        ({"depth": "universal"}, "depth universal works on the rank's own tokens"),
        ({"mixer": "mla"}, "mixer mla keeps something of the rank's own tokens beside its output; use another mixer"),
        ({"ffn": "moe_plus_plus"}, "ffn moe_plus_plus keeps something"),
    ],
)
def test_what_cannot_overlap(changes: dict[str, Any], said: str) -> None:
    config = build(**{"residual": "ladder", **changes})
    with pytest.raises(ValueError, match=said):
        check.refuse_combination(config, MeshConfig(tp=2, overlap=True), check.Settings())


def test_overlap_is_for_tensor_ranks() -> None:
    with pytest.raises(ValueError, match="tp is 1: there are no sums over tensor ranks; give tp too, or leave overlap"):
        check.refuse_combination(LADDER, MeshConfig(dp=2, overlap=True), check.Settings())
