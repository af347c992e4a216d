"""The degree that a refusal advises: taken, it is accepted, and no nearer one would be."""

import dataclasses
import re

import pytest

from models.config import LMConfig
from parallel.mesh import MeshConfig
from parallel.preflight import refuse
from tests.contract.tiny import build, plain

SIX_EXPERTS = build(ffn={**plain("ffn", "moe"), "num_experts": 6})
TWELVE_HEADS = build(mixer={"kind": "attention", "num_heads": 12, "head_dim": 4}, vocab_size=36)


def sentence(config: LMConfig, mesh: MeshConfig) -> str | None:
    """Why the mesh is refused."""
    try:
        refuse(config, mesh)
    except ValueError as error:
        return str(error)
    return None


def accepted(config: LMConfig, mesh: MeshConfig, **degrees: int) -> bool:
    try:
        return sentence(config, dataclasses.replace(mesh, **degrees)) is None
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (build(), MeshConfig(tp=3)),
        (build(), MeshConfig(tp=6, cp=4)),
        (build(), MeshConfig(cp=6, tp=2)),
        (build(vocab_size=33), MeshConfig(tp=2)),
        # 3 divides the experts and not the 4 ranks that they borrow.
        (SIX_EXPERTS, MeshConfig(dp=4, ep=4)),
        (SIX_EXPERTS, MeshConfig(fsdp=12, ep=12)),
        # 4 divides the heads, and 4 x 6 does not.
        (TWELVE_HEADS, MeshConfig(tp=5, cp=6)),
        (build(ffn="moe"), MeshConfig(tp=4, cp=2, ep=8)),
        (build(), MeshConfig(dp=2, ep=2)),
        (build(), MeshConfig(pp=8)),
        (build(), MeshConfig(pp=4, schedule="zbv")),
    ],
    ids=lambda value: str(value) if isinstance(value, MeshConfig) else "",
)
def test_the_advised_degree_is_the_nearest_that_is_accepted(config: LMConfig, mesh: MeshConfig) -> None:
    said = sentence(config, mesh)
    assert said is not None
    advice = re.search(r"use (\w+)=(\d+)", said)
    assert advice is not None, said
    key, degree = advice[1], int(advice[2])
    assert accepted(config, mesh, **{key: degree}), said
    assert not any(accepted(config, mesh, **{key: nearer}) for nearer in range(degree + 1, getattr(mesh, key))), said


def test_a_ring_is_advised_where_heads_do_not_divide() -> None:
    said = sentence(build(), MeshConfig(cp=3))
    assert said is not None and said.endswith(", or context=ring, which leaves heads whole")
    assert accepted(build(), MeshConfig(cp=3, context="ring"))
    said = sentence(build(mixer="clipped_softmax"), MeshConfig(cp=3))
    assert said is not None and "ring" not in said, "its heads are exchanged in a ring too"


def test_another_count_is_advised_where_nothing_else_depends_on_it() -> None:
    said = sentence(build(vocab_size=33), MeshConfig(tp=2))
    assert said is not None and said.endswith("use tp=1, or vocab_size=34")
    assert accepted(build(vocab_size=34), MeshConfig(tp=2))
    said = sentence(build(), MeshConfig(tp=16))
    assert said is not None and re.search(r"use tp=\d+$", said), "16 heads may not fit d_model or the key heads"


@pytest.mark.parametrize(
    ("layers", "mesh", "way_out"),
    [
        (4, "pp=8", "pp=4"),
        (4, "pp=3,schedule=zbv", "pp=2, or a schedule with one stage per rank such as 1f1b"),
        (4, "pp=8,schedule=zbv", "pp=2"),
        (3, "pp=2,schedule=zbv", "pp=1 without a schedule, or a schedule with one stage per rank such as 1f1b"),
        (1, "pp=2,schedule=zbv", "pp=1 without a schedule"),
        (1, "pp=2,schedule=gpipe", "pp=1 without a schedule"),
        (1, "pp=2", "pp=1"),
    ],
)
def test_stages_without_layers(layers: int, mesh: str, way_out: str) -> None:
    config, parsed = build(layers), MeshConfig.parse(mesh)
    said = sentence(config, parsed)
    assert said is not None and said.endswith(f"; use {way_out}")
    if way_out.startswith("pp=1"):
        assert accepted(config, MeshConfig())
        assert accepted(config, parsed, pp=1) == ("without a schedule" not in way_out)
    else:
        assert accepted(config, parsed, pp=int(way_out[3]))
    assert accepted(config, MeshConfig(pp=parsed.pp)) == ("or a schedule" in way_out)
