"""What single residual topologies do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.kernels.sinkhorn.reference import sinkhorn
from models.params import named_specs
from models.residual.denseformer import DenseFormer
from models.residual.hyper import HyperConnections
from models.residual.hyper_fractional import FractionalHyperConnections
from models.residual.ladder import LadderResidual
from models.residual.mhc import ManifoldConfig, ManifoldHyper, ManifoldHyperConnections
from models.residual.mhc_lite import LiteManifoldHyperConnections
from models.residual.mhc_per_stream import PerStreamManifoldHyperConnections
from models.residual.midpoint import MidpointResidual
from models.residual.mudd import DepthAggregate, MUDDConnections
from models.residual.mudd_prepost import PrePostMUDD
from models.residual.parallel import ParallelResidual, ParallelResidualTwoNorms
from models.residual.past import Selection
from models.residual.plain import PlainResidual
from models.residual.reversible import ReversibleResidual
from models.scaling.rezero import ReZero
from models.shortcuts.laurel import Laurel
from models.slots import Connection, ResidualConfig
from models.state import Side, Views
from tests.connections import apply, context
from tests.models.residuals import build, perturb, tokens


def test_hyper_connections_decay_only_what_depends_on_the_token() -> None:
    decayed = {
        name.rpartition(".")[2]: spec.decay
        for name, _, _, spec in named_specs(build(HyperConnections()))
        if ".connection." in name
    }
    assert decayed == {
        "static_alpha": False,
        "static_beta": False,
        "alpha_scale": False,
        "beta_scale": False,
        "dynamic_alpha": True,
        "dynamic_beta": True,
        "weight": False,
        "bias": False,
    }


@pytest.mark.parametrize(
    "kind",
    [ManifoldHyperConnections(), PerStreamManifoldHyperConnections(), LiteManifoldHyperConnections(streams=3)],
    ids=lambda kind: kind.kind,
)
def test_mhc_keeps_the_mean_of_the_streams_and_parts_them(kind: ManifoldConfig) -> None:
    """Mixing leaves the mean as it is; and streams that start equal do not stay copies of each other."""
    model = build(kind)
    model(tokens(), tokens()).loss.backward()
    connection = model.blocks[0].mixer.connection
    assert isinstance(connection, ManifoldHyper) and connection.static_beta.grad is not None
    assert connection.static_beta.grad.std() > 0.01 * connection.static_beta.grad.abs().max()
    perturb(model)
    state = {"streams": torch.linspace(-1, 1, 2 * 6 * kind.streams * 8, dtype=torch.float64).view(2, 6, -1, 8).sin()}
    _, kept = connection.read(state)
    # Sinkhorn-Knopp ends with what each stream gives, on which the mean depends; what each gets converges slowly where
    # the matrix is close to the identity, as it starts.
    given, got = (kept["mix"].sum(dim).abs().max() for dim in (-1, -2))
    assert given < 1e-12 and got < 1e-2
    written = connection.write(state, kept, torch.zeros(2, 6, 8, dtype=torch.float64))
    torch.testing.assert_close(written["streams"].mean(-2), state["streams"].mean(-2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 4])
def test_sinkhorn_has_the_gradients_of_its_steps(iterations: int) -> None:
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: sinkhorn(x, iterations), logits)
    expected = logits.detach().exp()
    for _ in range(iterations):
        expected = expected / expected.sum(-2, keepdim=True)
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits, iterations).detach(), expected, rtol=1e-13, atol=1e-13)


def test_sinkhorn_holds_any_logits() -> None:
    logits = torch.tensor([[0.0, 500.0], [-500.0, 0.0]], requires_grad=True)
    found = sinkhorn(logits, 20)
    found.sum().backward()
    assert found.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("layers", [None, (), (0,), (1, 2), (0, 2)])
def test_ladder_reads_the_stream_without_the_newest_output(layers: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(6, 4, 4, generator=generator, dtype=torch.float64)
    kind = LadderResidual(layers)
    state, before = kind.open(4)(stream), stream
    for k, weight in enumerate(weights):
        on_ladder = layers is None or k // 2 in layers

        def branch(u: Tensor, weight: Tensor = weight) -> Tensor:
            return torch.tanh(u @ weight)

        before, stream = stream, stream + branch(before if on_ladder else stream)
        connection = kind.connect(context(4, k // 2, 3), "ffn" if k % 2 else "mixer", nn.Identity())
        state = apply(connection, {}, state, branch)
        assert state.keys() == {entry.name for entry in connection.writes}
    torch.testing.assert_close(kind.close(4, 3)(state), stream, rtol=1e-13, atol=1e-13)


def test_ordinary_layers_of_a_hybrid_ladder_send_one_stream() -> None:
    boundaries = build(LadderResidual(layers=(1,))).boundaries
    assert [[entry.name for entry in boundary] for boundary in boundaries] == [["x"], ["x", "pending"], ["x"], ["x"]]


def test_mudd_keeps_every_output_and_nothing_else() -> None:
    names = [[entry.name for entry in boundary] for boundary in build(MUDDConnections()).boundaries]
    assert names == [[f"past.{j}" for j in range(depth + 1)] for depth in range(4)]


@pytest.mark.parametrize(
    ("selection", "sources"),
    [
        (Selection(), [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
        (Selection(dilation=2), [[1], [0, 2], [1, 3], [0, 2, 4]]),
        (Selection(dilation=2, period=2), [None, [0, 2], None, [0, 2, 4]]),
        (Selection(window=2), [[0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]),
    ],
    ids=["all", "dilation", "period", "window"],
)
def test_mixes_look_at_what_is_selected(selection: Selection, sources: list[list[int] | None]) -> None:
    assert not selection.mixes(0)
    assert [selection.sources(i) if selection.mixes(i) else None for i in range(1, 5)] == sources


@pytest.mark.parametrize(("dilation", "period", "parameters"), [(1, 1, 44), (2, 1, 24), (4, 5, 2)])
def test_denseformer_has_the_weights_of_the_released_code(dilation: int, period: int, parameters: int) -> None:
    selection = Selection(dilation, period)
    assert sum(len(selection.sources(i)) for i in range(1, 9) if selection.mixes(i)) == parameters


def test_only_outputs_that_a_later_mix_looks_at_are_sent_on() -> None:
    names = [[entry.name for entry in boundary] for boundary in build(DenseFormer(dilation=2, period=2)).boundaries]
    assert names == [["past.0"], ["past.0", "past.1"], ["past.0", "past.2"], ["past.3"]]
    names = [[entry.name for entry in boundary] for boundary in build(DenseFormer(period=3)).boundaries]
    assert names == [["past.0"], ["past.0", "past.1"], ["past.0", "past.1", "past.2"], [f"past.{j}" for j in range(4)]]


def test_mudd_with_norms_adds_its_mixes_to_the_newest_output() -> None:
    """Equation 10 of the paper as the training code has it, written out for the second layer."""
    model = build(PrePostMUDD(eps=1e-6))
    perturb(model)
    start = model.get_submodule("layers.1.mixer.connection")
    aggregate = model.get_submodule("layers.1.mixer.connection.aggregate")
    assert isinstance(start, Connection) and isinstance(aggregate, DepthAggregate)
    parameters = dict(aggregate.named_parameters())
    generator = torch.Generator().manual_seed(4)
    x, *sources = torch.randn(3, 2, 6, 8, generator=generator, dtype=torch.float64)

    def rms(u: Tensor, name: str) -> Tensor:
        return u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt() * parameters[name]

    hidden = rms(x, "norm.weight") @ parameters["down.weight"].T
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    weights = (hidden @ parameters["up.weight"].T).view(2, 6, 4, 2) + parameters["static"]
    mixed = torch.einsum("btcj,jbtd->cbtd", weights, torch.stack(sources))
    expected = [x + mixed[0], x + mixed[1], x + mixed[2], x + rms(mixed[3], "post_norm.weight")]
    views, kept = start.read({"x": x, "past.0": sources[0], "past.1": sources[1]})
    for actual, reference in zip((*views, kept["residual"]), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [ParallelResidual(), ParallelResidualTwoNorms()], ids=lambda kind: kind.kind)
def test_parallel_branches_read_the_same_input(kind: ParallelResidualTwoNorms) -> None:
    model = build(kind)
    perturb(model)
    layer = model.blocks[1]
    names = [name for name in model.state_dict() if name.startswith("layers.1.") and ".norms." in name]
    assert len(names) == (1 if kind.one_norm else 2)
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    side = Side(tokens(), torch.arange(6).expand(2, 6))
    alone = [
        sublayer.branch(sublayer.placement.before(Views.same(x)), {}, side, side, None).out_BTD
        for sublayer in (layer.mixer, layer.ffn)
    ]
    state, _ = layer({"x": x}, side, side)
    assert state.keys() == {"x"}
    torch.testing.assert_close(state["x"], x + alone[0] + alone[1], rtol=1e-13, atol=1e-13)


def test_mudd_rounds_a_multiple_up_as_the_released_models_do() -> None:
    config = MUDDConnections(hidden_round=64, expand_last=4)
    assert [config.hidden(4, 3), config.hidden(4, 16), config.hidden(1, 16)] == [64, 128, 128]


def test_shortcuts_need_one_identity_path() -> None:
    with pytest.raises(ValueError, match="shortcut laurel acts on one identity path, which residual hyper does not"):
        build(HyperConnections(), shortcut=Laurel(2))


@pytest.mark.parametrize("residual", [PlainResidual(), LadderResidual()], ids=["plain", "ladder"])
def test_laurel_and_rezero_start_as_the_identity_and_learn(residual: ResidualConfig) -> None:
    model = build(residual, shortcut=Laurel(2), scaling=ReZero())
    assert model.embed is not None and model.norm is not None and model.head is not None
    identity = model.head.logits(model.norm(model.embed(tokens())))
    assert torch.equal(model(tokens()).logits, identity)
    perturb(model)
    model(tokens(), tokens()).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HyperConnections(streams=0), "streams is 0"),
        (lambda: FractionalHyperConnections(fractions=0), "fractions is 0"),
        (lambda: build(FractionalHyperConnections(fractions=3)), "d_model 8 is not a multiple of fractions 3"),
        (lambda: LadderResidual(layers=(-1,)), r"layers is \[-1\]"),
        (lambda: build(LadderResidual(layers=(3,))), "^residual.layers names layer 3 and the last one is 2"),
        (lambda: MUDDConnections(hidden_round=0), "hidden_round is 0"),
        (lambda: MUDDConnections(window=0), "window is 0"),
        (lambda: MUDDConnections(window=2, dilation=2), "window is 2 and dilation is 2"),
        (lambda: MidpointResidual(step=0.0), "step is 0.0"),
        (lambda: MidpointResidual(grid_bits=53), "grid_bits is 53"),
        (lambda: DenseFormer(period=0), "period is 0"),
        (lambda: ManifoldHyperConnections(streams=1), "streams is 1"),
        (lambda: ManifoldHyperConnections(iterations=0), "iterations is 0"),
        (lambda: LiteManifoldHyperConnections(streams=7), "streams is 7, and every permutation of them takes a weight"),
        (lambda: MUDDConnections(expand_last=0), "expand_last is 0"),
        (lambda: ReversibleResidual(grid_bits=0), "grid_bits is 0"),
        (lambda: Laurel(rank=0), "rank is 0"),
    ],
)
def test_wrong_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
