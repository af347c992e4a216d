"""The lesson layer by layer: what a plain teacher's walk says, and what each layer of a student learns from it."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import LayerConfig, LMConfig
from models.depth.universal import UniversalDepth
from models.ffn.moe import MoEConfig
from models.ffn.swiglu import SwiGLUConfig
from models.lm import LM
from models.memory.full import FullConfig
from models.memory.reversible import ReversibleConfig
from models.mixers.attention import AttentionConfig
from models.residual.midpoint import MidpointResidual
from models.residual.reversible import ReversibleResidual
from models.slots import ResidualConfig
from models.state import Side
from models.values.resformer import ResFormerValues
from parallel.distillation import Student, Teacher
from parallel.engine import Batch
from parallel.following import LayerByLayer, share
from parallel.mesh import Mesh, MeshConfig

TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
FOLLOWING = [MidpointResidual(step=1.0), ReversibleResidual()]


def config(residual: ResidualConfig | None = None, layers: int = 3, **settings: Any) -> LMConfig:
    ffn = settings.pop("ffn", SwiGLUConfig(hidden=24))
    layer = LayerConfig(AttentionConfig(num_heads=2), ffn)
    given = {} if residual is None else {"residual": residual}
    return LMConfig(50, 16, {"A": layer}, "A", layers, **given, **settings)


def pair(student: ResidualConfig, memory: Any = None, **settings: Any) -> tuple[Teacher, Student]:
    """In float64, from the same weights."""
    mesh, common = Mesh(MeshConfig()), {"seed": 3, "dtype": torch.float64}
    teacher = Teacher(config(**settings), mesh, **common)
    return teacher, Student(config(student, **settings), mesh, teacher=teacher, memory=memory, **common)


def side() -> Side:
    return Side(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS))


@torch.no_grad()
def plain_inputs(model: LM, halves: bool) -> list[Tensor]:
    """Of all steps, which are layers or halves of them, in order; and what the last one makes."""
    assert model.embed is not None
    state, found = {"x": model.embed(TOKENS)}, []
    for layer in model.blocks:
        found.append(state["x"])
        state, gates = layer.gated(state, side())
        state, _ = layer.run_branches(("mixer",), state, side(), side(), gates)
        found += [state["x"]] if halves else []
        state, _ = layer.run_branches(("ffn",), state, side(), side(), gates)
    return [*found, state["x"]]


@pytest.mark.parametrize("halves", [False, True])
def test_a_walk_is_the_plain_models_stream(halves: bool) -> None:
    teacher, _ = pair(MidpointResidual())
    inputs = plain_inputs(teacher.models[0], halves)
    for index, taught in enumerate(LayerByLayer().walk(teacher, {"tokens": TOKENS}, halves)):
        first = 2 * index if halves else index
        expected = inputs[max(first - 1, 0)], *inputs[first : first + (3 if halves else 2)]
        for one, two in zip((taught.previous_BTD, taught.x_BTD, *taught.targets), expected, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("halves", [False, True])
def test_the_estimate_is_one_iteration_and_goes_to_the_fixed_point(halves: bool) -> None:
    teacher, _ = pair(MidpointResidual())
    with torch.no_grad():
        for name, parameter in teacher.models[0].named_parameters():
            if name.endswith((".o.weight", ".down.weight")):
                parameter *= 0.3
    model, inputs = teacher.models[0], plain_inputs(teacher.models[0], halves)
    errors = []
    for iterations in (1, 2, 4, 40):
        lessons = LayerByLayer(iterations).walk(teacher, {"tokens": TOKENS}, halves)[1:]
        before = inputs[1:-2:2] if halves else inputs[:-2]
        errors.append(
            max((taught.previous_BTD - true).abs().max() for taught, true in zip(lessons, before, strict=True))
        )
        if iterations == 1:
            for layer, taught in zip(model.blocks, lessons, strict=False):
                state = {"x": taught.x_BTD}
                made = layer.ffn(state, side(), side(), None, None, None) if halves else layer(state, side(), side())
                added = made[0]["x"] - taught.x_BTD
                torch.testing.assert_close(taught.previous_BTD, taught.x_BTD - added, rtol=1e-13, atol=1e-13)
    assert all(after < 0.9 * before for before, after in itertools.pairwise(errors)) and errors[-1] < 1e-9


def losses_and_gradients(student: Student) -> tuple[float, dict[str, Tensor]]:
    batch = Batch(TOKENS, TOKENS.roll(-1, 1).index_fill(1, torch.tensor([11]), -100))
    loss = float(student.step_gradients(batch, 1).loss)
    return loss, {held.shard.name: held.gradient.clone() for held in student.held()}


def test_the_loss_is_each_layers_share_of_its_step() -> None:
    """Written out; a layer whose step is the plain one's has none, which is the first at step 1."""
    teacher, student = pair(MidpointResidual(step=1.0))
    inputs = plain_inputs(teacher.models[0], halves=False)
    expected = []
    for index, layer in enumerate(student.models[0].blocks):
        state = {"x": inputs[index], "previous": inputs[max(index - 1, 0)]}
        with torch.no_grad():
            out = layer(state, side(), side())[0]["x"]
        error, step = out - inputs[index + 1], inputs[index + 1] - state["previous"]
        expected.append((error.square().sum(-1) / step.square().sum(-1))[:, :-1].mean())
    with student.taking(LayerByLayer()):
        loss, gradients = losses_and_gradients(student)
    assert loss == pytest.approx(float(sum(expected)) / len(expected), rel=1e-12)
    assert expected[0] < 1e-20 < 0.1 < min(expected[1:])
    assert gradients["embed.weight"].abs().max() == 0 < gradients["layers.2.ffn.branch.ffn.down.weight"].abs().max()
    # And afterwards the loss is the divergence again, of which the embedding has a part.
    assert losses_and_gradients(student)[1]["embed.weight"].abs().max() > 0


def test_the_loss_where_a_layer_is_two_steps() -> None:
    """Written out; the mean of the streams, which the final norm reads, is where the plain model ends."""
    teacher, student = pair(ReversibleResidual())
    h, shares = plain_inputs(teacher.models[0], halves=True), []
    for index, layer in enumerate(student.models[0].blocks):
        earlier, x, middle, end = h[max(2 * index - 1, 0)], *h[2 * index : 2 * index + 3]
        with torch.no_grad():
            out = layer({"x1": earlier, "x2": x}, side(), side())[0]
        if index == 2:
            end = 2 * end - middle
        for made, aim, left in ((out["x1"], middle, earlier), (out["x2"], end, x)):
            shares.append(((made - aim).square().sum(-1) / (aim - left).square().sum(-1))[:, :-1].mean())
    with student.taking(LayerByLayer()):
        loss, _ = losses_and_gradients(student)
    assert loss == pytest.approx(float(sum(shares)) / 6, rel=1e-12)
    assert shares[0] < 1e-20 < 5e-3 < min(shares[1:])


def test_tokens_that_a_layer_leaves_alone_have_a_loss() -> None:
    error_BTD, whole_BTD = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 10.0], [0.0, 0.0]]])
    assert share(error_BTD, whole_BTD).tolist() == [[0.25, 25.0]]


@pytest.mark.parametrize("residual", FOLLOWING, ids=lambda residual: residual.kind)
@pytest.mark.parametrize("memory", [ReversibleConfig(), FullConfig()], ids=lambda memory: memory.kind)
def test_other_memories_change_nothing(memory: Any, residual: ResidualConfig) -> None:
    found = []
    for kept in (None, memory):
        _, student = pair(residual, kept)
        keepers = [layer.keeper for layer in student.models[0].blocks]
        with student.taking(LayerByLayer()):
            found.append(losses_and_gradients(student))
        assert [layer.keeper for layer in student.models[0].blocks] == keepers
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"ffn": MoEConfig(hidden=8, num_experts=4)},
        {"values": ResFormerValues()},
        {"depth": UniversalDepth(), "layers": 4},
    ],
    ids=["moe", "resformer", "universal"],
)
@pytest.mark.parametrize("iterations", [None, 2])
@pytest.mark.parametrize("residual", FOLLOWING, ids=lambda residual: residual.kind)
def test_layers_learn_it_whatever_they_are_made_of(
    settings: dict[str, Any], iterations: int | None, residual: ResidualConfig
) -> None:
    _, student = pair(residual, **settings)
    optimizer, losses = torch.optim.Adam(student.models[0].parameters(), lr=3e-3), []
    with student.taking(LayerByLayer(iterations)):
        for _ in range(40):
            losses.append(losses_and_gradients(student)[0])
            optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
