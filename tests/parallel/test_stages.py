"""Where layers are in a pipeline, and what crosses its boundaries."""

import itertools
import random

import pytest
import torch

from models.config import LMConfig
from models.cost import Cost
from models.lm import LM
from parallel import check, stages
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.contract.draws import draw
from tests.contract.tiny import HYBRID, build
from tests.slow import in_turn

SCHEDULES = ("1f1b", "interleaved", "zbv", "dualpipev")


def planned(config: LMConfig, mesh: str, sequence: int = 8) -> list[stages.StagePlan]:
    with torch.device("meta"):
        return stages.plan(LM(config), MeshConfig.parse(mesh), sequence)


def spans(config: LMConfig, mesh: str) -> list[int]:
    return [stage.stop - stage.start for stage in planned(config, mesh)]


def test_a_wide_head_takes_the_place_of_layers() -> None:
    assert spans(build(8, ffn={"kind": "swiglu", "hidden": 512}), "pp=4") == [2, 2, 2, 2]
    wide = build(8, vocab_size=2**14)
    assert spans(wide, "pp=4")[-1] == 1
    assert planned(wide, "pp=4")[-1].cost.parameters > wide.vocab_size * wide.d_model


def test_a_wide_embedding_counts_by_its_parameters() -> None:
    """It has no FLOPs: it decides between cuts that are as fast."""
    layers, vocabulary = 6 * [Cost(10, 1, 1.0)], Cost(100, 0, 0.0)
    assert stages.cuts([vocabulary, *layers, Cost(0, 0, 0.0)], MeshConfig(pp=4)) == [(0, 1), (1, 2), (2, 4), (4, 6)]
    assert stages.cuts([Cost(0, 0, 0.0), *layers, vocabulary], MeshConfig(pp=4))[-1] == (5, 6)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_is_better(seed: int) -> None:
    """Against all of them, on random costs."""
    generator = random.Random(seed)
    depth, pp = generator.randint(4, 9), generator.randint(2, 4)
    costs = [Cost(generator.randint(0, 9), 0, float(generator.randint(0, 5))) for _ in range(depth + 2)]

    def worth(edges: tuple[int, ...]) -> tuple[float, int, float]:
        made = [stages.stage_cost(costs, *span) for span in itertools.pairwise((0, *edges, depth))]
        flops = [cost.flops_per_token for cost in made]
        return max(flops), max(cost.parameters for cost in made), sum(value**2 for value in flops)

    least = min(map(worth, itertools.combinations(range(1, depth), pp - 1)))
    found = stages.cuts(costs, MeshConfig(pp=pp))
    assert worth(tuple(stop for _, stop in found[:-1])) == least


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
@pytest.mark.parametrize("layers", [8, 10])
def test_mirror_layers_share_a_rank_under_v_schedules(schedule: str, layers: int) -> None:
    plans = planned(build(layers, depth="skip_middle"), f"pp=2,schedule={schedule}")
    rank = {layer: stage.rank for stage in plans for layer in range(stage.start, stage.stop)}
    assert all(rank[layer] == rank[layers - 1 - layer] for layer in range(layers))
    assert [(a.stop, b.start) for a, b in itertools.pairwise(plans)] == [(a.stop, a.stop) for a in plans[:-1]]
    assert {entry.name for entry in plans[1].received} == {"x", f"gate_sum.{plans[0].stop - 1}"}, "the sum goes on"
    assert {entry.name for entry in plans[3].received} == {"x"}
    gates = {entry.name for entry in plans[-1].taken if entry.name.startswith("gate_sum")}
    assert gates == {f"gate_sum.{layer}" for layer in range(plans[0].stop)}


def test_a_given_layout() -> None:
    config = build(8, depth="skip_middle")
    assert spans(config, "pp=2,stages=7+1") == [7, 1]
    assert spans(config, "pp=2,schedule=zbv,stages=1+2+4+1") == [1, 2, 4, 1]
    with pytest.raises(ValueError, match=r"stages=3\+4 places 7 layers and the model has 8; change one"):
        planned(config, "pp=2,stages=3+4")
    with pytest.raises(ValueError, match=r"stages=4\+4 says 2 of them, and pp=2 with schedule zbv has 4, two per rank"):
        MeshConfig.parse("pp=2,schedule=zbv,stages=4+4")
    for wrong in ("3+0", "8", "3+x", "-1+9", "+"):
        with pytest.raises(ValueError, match="stages"):
            MeshConfig.parse(f"pp=2,stages={wrong}")
    with pytest.raises(ValueError, match="pp is 1; leave it out"):
        MeshConfig(stages="4+4")


def follow(config: LMConfig, mesh: str) -> None:
    """Every stage has what it reads, and nothing is sent that its rank has."""
    with torch.device("meta"):
        model = LM(config)
    plans = stages.plan(model, MeshConfig.parse(mesh), 8)
    shelves: dict[int, set[str]] = {}
    sent: set[str] = set()
    for stage in plans:
        reads, writes = stages.events(model, (stage.start, stage.stop), len(plans), stage.index)
        received, taken = ({entry.name for entry in entries} for entries in (stage.received, stage.taken))
        assert received == sent and not received & taken
        assert bool(received) == (stage.index > 0)
        assert taken == shelves.pop(stage.rank, set())
        has = received | taken | writes
        assert reads <= has
        sent, kept = ({entry.name for entry in entries} for entries in (stage.sent, stage.kept))
        assert sent | kept <= has
        if kept:
            shelves[stage.rank] = kept
    assert not sent and not shelves


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(8))
def test_every_stage_has_what_it_reads(seed: int, schedule: str) -> None:
    config = draw(seed)
    pp = 2 if len(config.expanded) < 8 else 4
    try:
        follow(config, f"pp={pp},schedule={schedule}")
    except ValueError as error:
        assert "number of layers" in str(error)


def test_earlier_outputs_are_sent_once_to_each_rank() -> None:
    """Interleaved stages of MUDD read all that came before: what a rank saw in its first stage it has."""
    config = build(8, residual="mudd")
    plans = planned(config, "pp=2,schedule=interleaved")
    for before, stage in itertools.pairwise(plans[1:]):
        made = {f"past.{layer + 1}" for layer in range(before.start, before.stop)}
        assert {entry.name for entry in stage.received} == made
        assert {entry.name for entry in stage.taken} == {f"past.{layer}" for layer in range(before.start + 1)}
    follow(config, "pp=4,schedule=interleaved")


LAYOUTS = ("pp=2,stages=3+1", "pp=2,schedule=zbv,stages=1+2+2+1", "pp=2,schedule=interleaved,stages=2+1+1+2")


@pytest.mark.parametrize("mesh", LAYOUTS)
def test_layouts_equal_one_process(mesh: str, pool: Pool) -> None:
    layers = 4 if mesh.endswith("3+1") else 6
    config = build(layers, residual="mudd", depth="skip_middle", values="resformer", ffn="moe")
    report = check.run(config, MeshConfig.parse(mesh), None, pool, timeout=120)
    assert report.ok, report.wrong[:10]


ALONGSIDE = ("pp=2,schedule=zero_bubble", "fsdp=2,pp=2,schedule=zbv", "tp=2,pp=2,schedule=dualpipev")


@pytest.mark.parametrize(("residual", "mesh"), in_turn(("mudd", "denseformer", "ladder"), ALONGSIDE))
def test_what_a_rank_keeps_equals_one_process(residual: str, mesh: str, pool: Pool) -> None:
    config = build(**{**HYBRID, "repeat": 2}, residual=residual, depth="skip_middle", values="resformer")
    report = check.run(config, MeshConfig.parse(mesh), None, pool, timeout=120)
    assert report.ok, report.wrong[:10]


@pytest.mark.parametrize("mesh", ["pp=2,schedule=zero_bubble", "tp=2,pp=2,schedule=zbv"])
@pytest.mark.parametrize("depth", ["universal", "universal_act"])
@pytest.mark.parametrize("residual", ["mudd", "denseformer"])
def test_what_has_changed_since_is_not_kept(residual: str, depth: str, mesh: str, pool: Pool) -> None:
    """These depths add to the newest output, which later layers of mudd and denseformer read as it has become."""
    config = build(residual=residual, depth=depth)
    report = check.run(config, MeshConfig.parse(mesh), None, pool, timeout=120)
    assert report.ok, report.wrong[:10]
