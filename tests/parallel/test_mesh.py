"""Meshes: parsing, numbering, and what is refused with which way out."""

import pytest

from models.config import LMConfig
from parallel import preflight
from parallel.check import Settings, refuse_combination
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import build, plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpp=2", "mesh has no key 'tpp'; did you mean tp?"),
        ("tp=two", "mesh has tp='two'; it takes a whole number, such as tp=2"),
        ("tp", "mesh has tp=''; it takes a whole number"),
        ("tp=0", "tp is 0; it must be at least 1"),
        ("tp=2,tp=2", "mesh gives tp twice"),
        ("hsdp=2", "hsdp is '2'; write replicas x shards, such as 2x2"),
        ("hsdp=0x2", "hsdp is '0x2'; write replicas x shards"),
        ("hsdp=2x2,dp=2", "hsdp=2x2 already says dp and fsdp"),
        ("pp=2,schedule=zvb", "schedule is 'zvb'; did you mean zbv?"),
        ("schedule=zbv", "schedule=zbv is for pipeline ranks, and pp is 1; leave schedule out, or give pp too"),
        ("fsdp=2,reshard=no", "mesh has reshard='no'; it is true or false"),
        ("dp=2,reshard=false", "reshard=false is about parameters that FSDP gathers, and fsdp is 1; leave it out"),
        ("cp=2,context=rings", "context is 'rings'; did you mean ring? it is one of ulysses, ring"),
        ("dp=2,context=ring", "context=ring is for context ranks, and cp is 1; leave it out, or give cp too"),
        (
            "dp=2,etp=4",
            "etp is 4, which must divide dp x fsdp x cp x tp = 2, whose ranks it borrows; use etp=1, or dp=4",
        ),
        (
            "dp=2,ep=2,etp=2",
            "ep x etp is 4, which must divide dp x fsdp x cp x tp = 2, whose ranks it borrows; use ep=1",
        ),
        ("dp=2,ep=4", "ep is 4, which must divide dp x fsdp x cp x tp = 2, whose ranks it borrows; use ep=2, or dp=4"),
        ("hsdp=1x2,ep=4", "use ep=2, or hsdp=2x2"),
        ("dp=1048573,ep=2", "use ep=1"),
    ],
)
def test_refused_meshes(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        MeshConfig.parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "config", "message"),
    [
        ("dp=100000", build(), "a check runs them all on this machine, at most 64"),
        ("tp=16", build(), "tp is 16, which does not divide the 8 heads of"),
        ("tp=3", build(vocab_size=33), "does not divide the 8 heads of layers.0.mixer.branch.mixer.q.weight; use tp=1"),
        ("tp=3", build(), "use tp=2"),
        (
            "tp=2",
            build(vocab_size=33),
            "tp is 2, which does not divide the 33 vocab of embed.weight; use tp=1, or vocab_size=34",
        ),
        ("cp=16", build(), "cp=16 with tp=1 needs 16 to divide the 8 heads of"),
        ("ep=2", build(), "ep is 2 and the model has no experts; use ep=1"),
        ("etp=2", build(), "etp is 2 and the model has no experts; use etp=1, or an ffn with experts, such as moe"),
        ("etp=16", build(ffn="moe"), "etp is 16, which does not divide the"),
        ("etp=2", build(ffn="moe", residual="desync"), "gives each tensor rank a part of an expert's width; use etp=1"),
        ("ep=8", build(ffn="moe"), "ep is 8, which does not divide the 4 experts of"),
        ("pp=8", build(), "pp=8 makes 8 stages and the number of layers is 4; use pp=4"),
        (
            "pp=4,schedule=zbv",
            build(),
            "pp=4 makes 8 stages (two per rank under zbv) and the number of layers is 4; use pp=2, or a schedule with",
        ),
    ],
)
def test_refused_combinations(text: str, config: LMConfig, message: str) -> None:
    with pytest.raises(ValueError) as error:
        refuse_combination(config, MeshConfig.parse(text), Settings())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("ep=3", "ep=2 with dp=2, or ffn.num_experts=6"),
        ("ep=6,dp=6", "ep=2, or ffn.num_experts=6"),
        ("ep=3,fsdp=3", "ep=2 with fsdp=2, or ffn.num_experts=6"),
        ("ep=3,hsdp=3x1", "ep=2 with hsdp=2x1, or ffn.num_experts=6"),
        ("ep=6,dp=3,tp=2", "ep=2, or ffn.num_experts=6"),
        ("ep=4,tp=16", "tp=8"),
        ("ep=4,dp=1,cp=16", "cp=8"),
    ],
)
def test_the_way_out_leads_out(text: str, way_out: str) -> None:
    """With the other degrees as they were given, or implied."""
    config = build(ffn="moe")
    given = MeshConfig.parse(text)
    with pytest.raises(ValueError, match=rf"use {way_out}(, or context=ring|$)"):
        preflight.refuse(config, given)
    changes = way_out.partition(",")[0].split(" with ")
    plain = {change.partition("=")[0] for change in changes}
    kept = [item for item in str(given).split(",") if item.partition("=")[0] not in plain]
    preflight.refuse(config, MeshConfig.parse(",".join([*kept, *changes])))
    preflight.refuse(config, MeshConfig.parse(",".join(changes)))


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "message"),
    [("interleaved", 3, "takes a multiple of pp=2 micro-batches and has 3; use 4"), ("zbv", 2, "needs at least 4")],
)
def test_too_few_micro_batches(schedule: str, micro_batches: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_combination(build(), MeshConfig(pp=2, schedule=schedule), Settings(micro_batches=micro_batches))


def test_expert_ranks_bring_data_ranks_when_nothing_else_does() -> None:
    assert MeshConfig.parse("ep=4").world_size == 4
    assert MeshConfig.parse("ep=4,tp=2") == MeshConfig(dp=2, tp=2, ep=4)
    assert MeshConfig.parse("ep=2,tp=2").world_size == 2
    assert MeshConfig.parse(" tp = 2 , pp=2 ") == MeshConfig(tp=2, pp=2)


def numbering(config: MeshConfig) -> dict[str, tuple[int, int]]:
    mesh = Mesh(config)
    names = ("pp", "data", "cp", "tp", "ep", "expert_data", "sequence", "stage")
    return {name: (ranks.index, ranks.size) for name in names if (ranks := getattr(mesh, name))} | {
        "share": (mesh.data_rank, mesh.data_size)
    }


def test_numbering(pool: Pool) -> None:
    """Ranks (pp, replicate, shard, cp, tp), tp fastest; experts (expert data, ep) within a stage, ep fastest."""
    answers = pool.run(numbering, 8, MeshConfig(fsdp=2, tp=2, pp=2, ep=4))
    assert [a["pp"][0] for a in answers] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [a["share"] for a in answers] == [(0, 2), (0, 2), (1, 2), (1, 2)] * 2
    assert [a["tp"] for a in answers] == [(0, 2), (1, 2)] * 4
    assert [a["ep"] for a in answers] == [(0, 4), (1, 4), (2, 4), (3, 4)] * 2
    assert all(a["expert_data"] == (0, 1) and a["stage"][1] == 4 for a in answers)


def test_a_ring_needs_no_heads_to_share_out() -> None:
    refuse_combination(build(), MeshConfig.parse("cp=16,context=ring"), Settings())
    with pytest.raises(ValueError, match=r"cp=16 with tp=1 needs 16 to divide the 8 heads of layers\.0\.mixer"):
        config = build(mixer=plain("mixer", "clipped_softmax"))
        refuse_combination(config, MeshConfig.parse("cp=16,context=ring"), Settings())


def test_world_size_must_fit() -> None:
    with pytest.raises(ValueError, match="the mesh tp=2 takes 2 processes and 1 were started; start 2"):
        Mesh(MeshConfig(tp=2))
