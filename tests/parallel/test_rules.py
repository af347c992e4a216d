"""The rules of the design's section on parallelism, one test each. The gradient rule itself is the matrix."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from configs.structure import instantiate, to_plain
from models.config import LMConfig
from models.lm import LM
from models.params import Axis, Normal, ParamSpec, Parts, initialize
from parallel import check, pipeline, stages
from parallel.collectives import all_to_all, gather, scatter_sum
from parallel.engine import Batch, Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.shards import Shard, place, shard
from parallel.shelf import Shelf
from parallel.testing import Pool
from tests.contract.tiny import build, plain

ROOT = Path(__file__).parents[2]


class Position:
    """Stands in for a mesh where only the index and number of tensor and expert ranks matter."""

    def __init__(self, tp: tuple[int, int] = (0, 1), ep: tuple[int, int] = (0, 1), etp: int = 1) -> None:
        self.etp = etp
        self.tp, self.ep = (type("R", (), {"index": i, "size": n})() for i, n in (tp, ep))


def pieces(spec: ParamSpec, ranks: int, expert: bool = False) -> list[Shard]:
    positions: list[Any] = [Position(ep=(i, ranks)) if expert else Position(tp=(i, ranks)) for i in range(ranks)]
    return [shard("w", spec, position) for position in positions]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fused_projections_are_split_part_by_part(ranks: int) -> None:
    """[q | k | v] in one matrix: each rank gets its heads of each."""
    axes = (Axis("heads", 8), Axis("kv_heads", 2), None)
    spec = ParamSpec((24 + 6 + 3, 5), (Parts((24, 6, 3), axes), None), Normal(1.0), True)
    whole = torch.arange(33 * 5).view(33, 5)
    out = torch.zeros_like(whole)
    for index, piece in enumerate(pieces(spec, ranks)):
        cut = piece.cut(whole)
        heads, kv = 24 // ranks, 6 // min(ranks, 2)
        assert torch.equal(cut[:heads], whole[index * heads : (index + 1) * heads])
        first = 24 + (index * min(ranks, 2) // ranks) * kv
        assert torch.equal(cut[heads : heads + kv], whole[first : first + kv])
        assert torch.equal(cut[heads + kv :], whole[30:])
        place(out, piece.segments, cut)
    assert torch.equal(out, whole)


def test_expert_weights_are_split_over_expert_ranks_only() -> None:
    spec = ParamSpec((4, 6, 8), (Axis("experts", 4), None, Axis("expert_ffn", 8)), Normal(1.0), True)
    whole = torch.randn(4, 6, 8)
    cuts = [piece.cut(whole) for piece in pieces(spec, 2, expert=True)]
    assert torch.equal(torch.cat(cuts), whole)
    assert all(piece.shape == spec.shape for piece in pieces(spec, 2))


def test_ranks_that_share_an_expert_have_parts_of_its_width() -> None:
    spec = ParamSpec((4, 6, 8), (Axis("experts", 4), None, Axis("expert_ffn", 8)), Normal(1.0), True)
    whole = torch.randn(4, 6, 8)
    positions: list[Any] = [Position(ep=(i, 4), etp=2) for i in range(4)]
    found = [shard("w", spec, position) for position in positions]
    assert all(piece.pieces == 4 for piece in found)
    a, b, c, d = (piece.cut(whole) for piece in found)
    assert torch.equal(torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)]), whole)


def check_adjoints() -> list[float]:
    """<f(x), y> summed over ranks equals <x, f'(y)>: for a linear f that is what backward must be."""
    mesh = Mesh(MeshConfig(tp=3))
    ranks, errors = mesh.tp, []
    for function, sizes in (
        (lambda x: gather(x, 1, ranks), (2, 4)),
        (lambda x: scatter_sum(x, 1, ranks), (2, 12)),
        (
            lambda x: all_to_all(
                x, [(ranks.index + i) % 2 for i in range(3)], [(ranks.index + i) % 2 for i in range(3)], ranks
            ),
            None,
        ),
    ):
        rows = sum((ranks.index + i) % 2 for i in range(3))
        generator = torch.Generator().manual_seed(ranks.index)
        x = torch.randn(sizes or (rows, 3), generator=generator, dtype=torch.float64, requires_grad=True)
        out = function(x)
        y = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        (grad,) = torch.autograd.grad(out, x, y)
        sides = torch.stack([(out.detach() * y).sum(), (x.detach() * grad).sum()])
        ranks.sum_(sides)
        errors.append(float((sides[0] - sides[1]).abs()))
    return errors


def test_collectives_have_exact_adjoints(pool: Pool) -> None:
    for errors in pool.run(check_adjoints, 3):
        assert max(errors) < 1e-12


def initial_weights(config: dict[str, Any], mesh: MeshConfig) -> dict[str, Tensor]:
    return Engine(instantiate(LMConfig, config), Mesh(mesh), seed=11).full_state()


@pytest.mark.parametrize("mesh", ["tp=2,pp=2,schedule=interleaved", "fsdp=2,ep=2,tp=2", "hsdp=2x2"])
def test_initial_weights_are_one_process_s_bit_for_bit(mesh: str, pool: Pool) -> None:
    config = build(ffn="moe", tie_embeddings=True)
    model = LM(config)
    initialize(model, 11)
    parsed = MeshConfig.parse(mesh)
    for state in pool.run(initial_weights, parsed.world_size, to_plain(config), parsed):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def units(config: dict[str, Any], mesh: MeshConfig) -> int:
    engine = Engine(instantiate(LMConfig, config), Mesh(mesh), seed=0)
    roots = engine.stages or engine.models
    return sum(isinstance(module, FSDPModule) for root in roots for module in root.modules())


@pytest.mark.parametrize(
    ("schedule", "expected"), [("1f1b", 3), ("interleaved", 4), ("zero_bubble", 2), ("zbv", 2), ("dualpipev", 2)]
)
def test_a_stage_is_one_fsdp_unit_when_the_backward_is_split(schedule: str, expected: int, pool: Pool) -> None:
    """Per layer elsewhere: 1F1B has two layers and their stage on a rank, interleaved two stages of one layer."""
    mesh = MeshConfig(fsdp=2, pp=2, schedule=schedule)
    assert pool.run(units, 4, to_plain(build()), mesh) == [expected] * 4


def test_stage_outputs_own_their_storage() -> None:
    config = build(residual="hyper")
    with torch.device("cpu"):
        model = LM(config)
    initialize(model, 0)
    first = stages.plan(model, MeshConfig(pp=2), 4)[0]
    model.prune(first.start, first.stop)
    stage = pipeline.Stage(model, first, Shelf())
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    for out in stage(tokens=tokens, targets=tokens):
        assert not out._is_view() and out.is_contiguous()
        assert out.untyped_storage().nbytes() == out.numel() * out.element_size()


def test_the_wire_carries_the_state_and_nothing_else() -> None:
    """Token ids, targets, documents and positions are no entries of any boundary; losses of earlier stages are one."""
    config = build(ffn="moe_plus_plus", residual="ladder", values="resformer", depth="skip_middle")
    names = [{entry.name for entry in boundary} for boundary in LM(config).boundaries]
    assert names[1] == {"x", "pending", "first_value", "gate_sum.0", "router_logits", "losses"}
    assert "gate_sum.0" in names[3] and "gate_sum.1" not in names[3], "a gate is dropped after its mirror"
    assert names[4] == {"x", "losses"} or names[4] == {"x", "pending", "losses"}


def evaluations(config: dict[str, Any], mesh: MeshConfig, batch: Batch) -> tuple[float, int]:
    place = Mesh(mesh)
    engine = Engine(instantiate(LMConfig, config), place, seed=5, dtype=torch.float64)
    return engine.evaluate(check.share(batch, 1, place.data_rank, place.data_size))


@pytest.mark.parametrize(
    "mesh", ["pp=2,schedule=zbv", "pp=2,schedule=dualpipev", "fsdp=2,tp=2,pp=2", "cp=2,tp=2", "dp=2"]
)
def test_evaluation_is_the_same_on_every_mesh(mesh: str, pool: Pool) -> None:
    """Including the schedules on which torch's own evaluation fails."""
    config, parsed = build(residual="mudd", ffn="moe"), MeshConfig.parse(mesh)
    batch = check.make_batch(config, MeshConfig(dp=2), check.Settings())
    alone = Engine(config, Mesh.single(), seed=5, dtype=torch.float64).evaluate(batch)
    for loss, count in pool.run(evaluations, parsed.world_size, to_plain(config), parsed, batch):
        assert count == alone[1] and abs(loss - alone[0]) <= 1e-12 * abs(alone[0])


def losses_of_shapes(config: dict[str, Any], mesh: MeshConfig, shapes: list[tuple[int, int]]) -> list[float]:
    """The loss of one step for each (length, micro-batches), on one engine."""
    place, losses = Mesh(mesh), []
    engine = Engine(instantiate(LMConfig, config), place, seed=5, dtype=torch.float64)
    for length, count in shapes:
        batch = check.make_batch(engine.config, MeshConfig(), check.Settings(length=length, micro_batches=count))
        losses.append(float(engine.step_gradients(batch, count).loss))
    return losses


def test_stages_are_built_for_every_shape(pool: Pool) -> None:
    """Another length or number of micro-batches between steps, and back again."""
    config, shapes = build(residual="hyper", ffn="moe"), [(9, 4), (14, 4), (9, 6), (9, 4)]
    alone = losses_of_shapes(to_plain(config), MeshConfig(), shapes)
    for schedule in ("1f1b", "zbv"):
        for losses in pool.run(losses_of_shapes, 2, to_plain(config), MeshConfig(pp=2, schedule=schedule), shapes):
            assert losses == pytest.approx(alone, rel=1e-12)


def test_batch_statistics_do_not_depend_on_how_tokens_are_spread() -> None:
    """'sequence' sees each row, 'microbatch' all rows of one: accumulating row by row changes only the second."""
    losses = {}
    for group in ("sequence", "microbatch"):
        config = build(
            ffn={**plain("ffn", "moe"), "router": {"kind": "mixtral", "stats_group": group, "aux_coef": 1.0}}
        )
        engine = Engine(config, Mesh.single(), seed=0, dtype=torch.float64)
        batch = check.make_batch(config, MeshConfig(), check.Settings(packed=False))
        losses[group] = [float(engine.step_gradients(batch, count).losses["load_balance"]) for count in (1, 2)]
    assert losses["sequence"][0] == pytest.approx(losses["sequence"][1], rel=1e-12)
    assert losses["microbatch"][0] != pytest.approx(losses["microbatch"][1], rel=1e-6)
    assert losses["microbatch"][1] == pytest.approx(losses["sequence"][1], rel=1e-12)


def test_gradients_do_not_depend_on_accumulation() -> None:
    config = build()
    batch = check.make_batch(config, MeshConfig(), check.Settings(micro_batches=4))
    engine, results = Engine(config, Mesh.single(), seed=0, dtype=torch.float64), []
    for count in (1, 2, 4):
        engine.step_gradients(batch, count)
        results.append(engine.whole_tensors(lambda held: held.parameter.grad))
    for other in results[1:]:
        assert all(check.error(other[name], value) < 1e-12 for name, value in results[0].items())


def test_precision_never_falls_by_a_cast_to_float32() -> None:
    """`.float()` would turn float64 into float32 in the middle of a proof."""
    for path in (ROOT / "models").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        named = [call.func.attr for call in calls if isinstance(call.func, ast.Attribute)]
        assert "float" not in named, f"{path.name} calls .float(); use models.params.upcast"


def test_a_batch_that_does_not_divide_is_refused() -> None:
    engine = Engine(build(), Mesh.single(), seed=0)
    x = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 sequences per data rank do not divide into 2 micro-batches"):
        engine.step_gradients(Batch(x, x), 2)
